//! The stored form of objects: canonical JSON in the storage version, without `metadata.resourceVersion`.
//!
//! Every value begins with [`Resource::head`] (`{"apiVersion":..,"kind":..,"metadata":{`), so that the resource version, which
//! is the revision of the key, is spliced in at a known place without parsing.

use super::resources::Resource;
use super::status::Status;
use bytes::{BufMut, Bytes, BytesMut};
use coracle_store::KeyValue;
use serde_json::{Map, Value};
use std::io::Write;

/// Room for `"resourceVersion":"18446744073709551615",`.
const VERSION_ROOM: usize = 42;

/// The stored bytes of an object in its storage version.
///
/// # Errors
/// 500 when the object has no metadata (it always has).
pub fn encode(resource: &Resource, object: &Value) -> Result<Bytes, Status> {
    let fields = object.as_object().ok_or_else(|| Status::internal("object is not a JSON object"))?;
    let metadata = fields.get("metadata").and_then(Value::as_object);
    let metadata = metadata.ok_or_else(|| Status::internal("object has no metadata"))?;
    let mut out = BytesMut::with_capacity(1024);
    out.extend_from_slice(resource.head());
    write_members(&mut out, metadata, |key| key != "resourceVersion")?;
    out.extend_from_slice(b"}");
    let mut rest = BytesMut::new();
    write_members(&mut rest, fields, |key| !matches!(key, "apiVersion" | "kind" | "metadata"))?;
    if !rest.is_empty() {
        out.extend_from_slice(b",");
        out.extend_from_slice(&rest);
    }
    out.extend_from_slice(b"}");
    Ok(out.freeze())
}

fn write_members(out: &mut BytesMut, members: &Map<String, Value>, keep: impl Fn(&str) -> bool) -> Result<(), Status> {
    let mut writer = out.writer();
    let mut first = true;
    for (key, value) in members.iter().filter(|(key, _)| keep(key)) {
        let comma = if first { Ok(()) } else { writer.write_all(b",") };
        first = false;
        comma
            .and_then(|()| serde_json::to_writer(&mut writer, key).map_err(Into::into))
            .and_then(|()| writer.write_all(b":"))
            .and_then(|()| serde_json::to_writer(&mut writer, value).map_err(Into::into))
            .map_err(Status::internal)?;
    }
    Ok(())
}

/// What follows the head in a stored value; none when it was written under another storage version.
fn tail<'a>(resource: &Resource, value: &'a [u8]) -> Option<&'a [u8]> {
    value.strip_prefix(&resource.head()[..])
}

fn put_version(out: &mut BytesMut, revision: u64, tail: &[u8]) {
    out.extend_from_slice(b"\"resourceVersion\":\"");
    put_number(out, revision);
    out.extend_from_slice(if tail.first() == Some(&b'}') { b"\"" } else { b"\"," });
    out.extend_from_slice(tail);
}

fn put_number(out: &mut BytesMut, number: u64) {
    let mut digits = [0u8; 20];
    let mut at = digits.len();
    let mut rest = number;
    loop {
        at -= 1;
        // The remainder of a division by ten fits.
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

/// Appends the object with its resource version. False when the value must be parsed and converted instead.
pub fn splice(resource: &Resource, value: &[u8], revision: u64, out: &mut BytesMut) -> bool {
    let Some(tail) = tail(resource, value) else { return false };
    out.reserve(value.len() + VERSION_ROOM);
    out.extend_from_slice(resource.head());
    put_version(out, revision, tail);
    true
}

/// As [`splice`], without `apiVersion` and `kind`: the form of items in lists of built-in kinds.
pub fn splice_item(resource: &Resource, value: &[u8], revision: u64, out: &mut BytesMut) -> bool {
    let Some(tail) = tail(resource, value) else { return false };
    out.reserve(value.len() + VERSION_ROOM);
    out.extend_from_slice(b"{\"metadata\":{");
    put_version(out, revision, tail);
    true
}

/// The object of a stored value, in its storage version, with its resource version.
///
/// # Errors
/// 500 when the bytes are not what this program writes.
pub fn decode(value: &[u8], revision: u64) -> Result<Value, Status> {
    let mut object: Value = serde_json::from_slice(value).map_err(Status::internal)?;
    set_revision(&mut object, revision);
    Ok(object)
}

/// As [`decode`], of a key and its value.
///
/// # Errors
/// As [`decode`].
pub fn decode_kv(kv: &KeyValue) -> Result<Value, Status> {
    decode(&kv.value, kv.mod_revision)
}

/// Sets `metadata.resourceVersion`.
pub fn set_revision(object: &mut Value, revision: u64) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".to_owned(), Value::String(revision.to_string()));
    }
}

/// A string of the metadata; empty when absent.
pub fn meta<'a>(object: &'a Value, key: &str) -> &'a str {
    object.get("metadata").and_then(|m| m.get(key)).and_then(Value::as_str).unwrap_or_default()
}

/// The metadata, made if it is not there.
pub fn metadata_mut(object: &mut Value) -> &mut Map<String, Value> {
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    let metadata = &mut object["metadata"];
    if !metadata.is_object() {
        *metadata = Value::Object(Map::new());
    }
    match metadata {
        Value::Object(map) => map,
        // Made an object above.
        _ => unreachable!(),
    }
}

/// The finalizers of an object.
pub fn finalizers(object: &Value) -> Vec<&str> {
    let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    list.into_iter().flatten().filter_map(Value::as_str).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;
    use serde_json::json;

    #[test]
    fn the_version_is_spliced_into_what_was_stored() {
        let configmaps = &RESOURCES[2];
        let object = json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": { "a": "b" },
            "metadata": { "name": "c", "resourceVersion": "7", "uid": "u" } });
        let stored = encode(configmaps, &object).unwrap();
        assert_eq!(
            stored,
            r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c","uid":"u"},"data":{"a":"b"}}"#
        );
        let mut out = BytesMut::new();
        assert!(splice(configmaps, &stored, 1_234_567_890, &mut out));
        let read: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(read, decode(&stored, 1_234_567_890).unwrap());
        out.clear();
        assert!(splice_item(configmaps, &stored, 0, &mut out));
        assert_eq!(out, r#"{"metadata":{"resourceVersion":"0","name":"c","uid":"u"},"data":{"a":"b"}}"#);
        assert!(!splice(&RESOURCES[3], &stored, 1, &mut out));
    }
}
