//! `metadata.managedFields`: who wrote which field, updated on every write.

use super::call::Call;
use super::codec;
use super::object::metadata_mut;
use super::options::WriteOptions;
use super::status::Status;
use crate::schema;
use crate::schema::managed;
use serde_json::Value;

/// Records the caller as the manager of what it changed. What was applied has been recorded already.
///
/// # Errors
/// 500 when the schema does not know the kind.
pub fn track(
    call: &Call<'_>,
    object: &mut Value,
    old: Option<&Value>,
    options: &WriteOptions,
    now: &str,
) -> Result<(), Status> {
    if options.applied {
        return Ok(());
    }
    // Fields are named as the client's version names them.
    let kind = call.kind();
    let (table, node) = (schema::builtin(), codec::type_of(kind)?);
    let manager = options.manager(call.user_agent());
    let reset = managed::reset_fields(table, node, kind.group, kind.kind, call.subresource_name());
    let operation = managed::Operation {
        manager: &manager,
        api_version: &kind.api_version(),
        subresource: call.subresource_name(),
        now,
        reset: &reset,
    };
    let version = call.info.version;
    if codec::is_stored_form(call.resource, version) {
        managed::update(table, node, old, object, &operation);
        return Ok(());
    }
    let served = |object: &Value| {
        let mut object = object.clone();
        codec::from_storage(call.resource, version, &mut object);
        object
    };
    let mut new = served(object);
    managed::update(table, node, old.map(served).as_ref(), &mut new, &operation);
    let fields = new.get_mut("metadata").and_then(|m| m.get_mut("managedFields")).map(Value::take);
    match fields {
        Some(fields) => {
            metadata_mut(object).insert("managedFields".to_owned(), fields);
        }
        None => {
            metadata_mut(object).remove("managedFields");
        }
    }
    Ok(())
}

/// Whether two versions of an object differ in nothing but the times of their `managedFields`.
pub fn only_times_differ(new: &Value, old: &Value) -> bool {
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else { return false };
    let same = |key: &str| new.get(key) == old.get(key);
    if !new.keys().chain(old.keys()).all(|key| key == "metadata" || same(key)) {
        return false;
    }
    let (Some(new), Some(old)) = (new.get("metadata"), old.get("metadata")) else { return false };
    let (Some(new), Some(old)) = (new.as_object(), old.as_object()) else { return false };
    let ignored = |key: &str| matches!(key, "managedFields" | "resourceVersion");
    if !new.keys().chain(old.keys()).all(|key| ignored(key) || new.get(key) == old.get(key)) {
        return false;
    }
    let entries = |metadata: &serde_json::Map<String, Value>| -> Vec<Value> {
        let list = metadata.get("managedFields").and_then(Value::as_array);
        list.into_iter()
            .flatten()
            .map(|entry| {
                let mut entry = entry.clone();
                if let Some(fields) = entry.as_object_mut() {
                    fields.remove("time");
                }
                entry
            })
            .collect()
    };
    entries(new) == entries(old)
}
