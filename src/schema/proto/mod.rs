//! Protobuf as Kubernetes clients send and accept it: `k8s\0`, then `runtime.Unknown` around the object's message.
//!
//! ```ignore
//! let body = proto::encode(schema, pod, &value);                        // application/vnd.kubernetes.protobuf
//! let event = proto::watch_frame("ADDED", &body);                       // ...;stream=watch
//! ```
//! Field numbers come from the table. Values are in Go form on the JSON side.

mod read;
pub(super) mod wire;
mod write;

use serde_json::Value;

use super::node::{Schema, TypeId};
use wire::{Reader, Writer};

/// What every body begins with.
pub const MAGIC: &[u8; 4] = b"k8s\0";

/// A body that is no protobuf message of the type. `Display` is upstream's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    #[error("empty data")]
    EmptyData,
    #[error("provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]")]
    Prefix,
    #[error("empty body")]
    EmptyBody,
    #[error("unexpected EOF")]
    Eof,
    #[error("proto: integer overflow")]
    Overflow,
    #[error("proto: illegal wireType {0}")]
    WireType(u8),
    #[error("proto: wrong wireType = {found} for field {field}")]
    Field { found: u8, field: String },
    #[error("proto: illegal tag {0}")]
    Tag(u64),
    /// A value inside has no valid form.
    #[error("{0}")]
    Value(String),
    #[error("exceeded max depth")]
    Depth,
}

/// The envelope of a body.
pub struct Unknown<'a> {
    pub api_version: String,
    pub kind: String,
    pub raw: &'a [u8],
}

/// Opens the envelope.
///
/// # Errors
/// [`ProtoError`] when it is none.
pub fn open(body: &[u8]) -> Result<Unknown<'_>, ProtoError> {
    if body.is_empty() {
        return Err(ProtoError::EmptyData);
    }
    let message = body.strip_prefix(MAGIC).ok_or(ProtoError::Prefix)?;
    if message.is_empty() {
        return Err(ProtoError::EmptyBody);
    }
    let mut unknown = Unknown { api_version: String::new(), kind: String::new(), raw: &[] };
    let mut reader = Reader::new(message);
    while let Some((field, wire)) = reader.tag()? {
        match field {
            1 => {
                let mut meta = Reader::new(reader.bytes(wire, "TypeMeta")?);
                while let Some((field, wire)) = meta.tag()? {
                    match field {
                        1 => unknown.api_version = meta.string(wire, "APIVersion")?,
                        2 => unknown.kind = meta.string(wire, "Kind")?,
                        _ => meta.skip(wire)?,
                    }
                }
            }
            2 => unknown.raw = reader.bytes(wire, "Raw")?,
            _ => reader.skip(wire)?,
        }
    }
    Ok(unknown)
}

/// The value of a message of type `id`, in Go form.
///
/// # Errors
/// [`ProtoError`] for malformed messages and values.
pub fn decode(schema: &Schema, id: TypeId, message: &[u8]) -> Result<Value, ProtoError> {
    read::message(schema, id, message)
}

/// The body of an object in Go form; `apiVersion` and `kind` are taken from it.
pub fn encode(schema: &Schema, id: TypeId, value: &Value) -> Vec<u8> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let message = write::message(schema, id, value);
    let mut meta = Writer::default();
    meta.bytes(1, text("apiVersion").as_bytes());
    meta.bytes(2, text("kind").as_bytes());
    let mut out = Writer::from(MAGIC.to_vec());
    out.bytes(1, &meta.into_bytes());
    out.bytes(2, &message);
    out.bytes(3, b"");
    out.bytes(4, b"");
    out.into_bytes()
}

/// One frame of a watch stream: length, then `metav1.WatchEvent` around an encoded body.
pub fn watch_frame(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut raw = Writer::default();
    raw.bytes(1, body);
    let mut event = Writer::default();
    event.bytes(1, kind.as_bytes());
    event.bytes(2, &raw.into_bytes());
    let event = event.into_bytes();
    let mut out = (event.len() as u32).to_be_bytes().to_vec();
    out.extend(event);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::{builtin, default, typed};
    use serde_json::json;

    fn there_and_back(group: &str, version: &str, kind: &str, body: Value) {
        let schema = builtin();
        let id = schema.by_gvk(group, version, kind).unwrap();
        let mut value = typed::normalize(schema, id, body).unwrap();
        default::apply(schema, id, &mut value);
        let encoded = encode(schema, id, &value);
        let unknown = open(&encoded).unwrap();
        assert_eq!(unknown.kind, value["kind"].as_str().unwrap_or_default());
        let mut decoded = decode(schema, id, unknown.raw).unwrap();
        for key in ["apiVersion", "kind"] {
            decoded[key] = value[key].clone();
        }
        assert_eq!(decoded, value);
    }

    #[test]
    fn objects_survive_the_round_trip() {
        there_and_back(
            "",
            "v1",
            "Pod",
            json!({"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "p", "creationTimestamp": "2024-01-02T03:04:05Z", "labels": {"a": "b"},
                "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}]},
            "spec": {"containers": [{"name": "c", "image": "i", "args": ["", "x"],
                "resources": {"limits": {"cpu": "100m", "memory": "1Gi"}},
                "ports": [{"containerPort": 80}], "livenessProbe": {"tcpSocket": {"port": "http"}},
                "env": [{"name": "E", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}],
                "securityContext": {"runAsUser": 0, "privileged": false, "procMount": "Default"}}],
                "volumes": [{"name": "v", "projected": {"sources": [{"configMap": {"name": "x"}}]}},
                    {"name": "e", "emptyDir": {"sizeLimit": "1Mi"}}],
                "tolerations": [{"key": "k", "tolerationSeconds": -5}]},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [
                {"name": "c", "ready": true, "restartCount": 3, "state": {"running": {"startedAt": "2024-01-02T03:04:05Z"}}}]}}),
        );
        there_and_back(
            "",
            "v1",
            "Secret",
            json!({"apiVersion": "v1", "kind": "Secret", "data": {"a": "AAEC", "b": ""}}),
        );
        there_and_back(
            "coordination.k8s.io",
            "v1",
            "Lease",
            json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
            "spec": {"renewTime": "2024-01-02T03:04:05.123456Z", "leaseDurationSeconds": 40}}),
        );
        there_and_back(
            "authentication.k8s.io",
            "v1",
            "TokenReview",
            json!({"apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview", "status": {"user": {"extra": {"a": ["x", "y"]}}}}),
        );
        there_and_back(
            "admissionregistration.k8s.io",
            "v1",
            "ValidatingWebhookConfiguration",
            json!({
            "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "webhooks": [{"name": "w", "sideEffects": "None", "admissionReviewVersions": ["v1"], "clientConfig": {"url": "u"},
                "rules": [{"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}]}]}),
        );
        there_and_back(
            "apiextensions.k8s.io",
            "v1",
            "CustomResourceDefinition",
            json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
            "spec": {"group": "g", "scope": "Cluster", "names": {"kind": "K", "plural": "ks"}, "versions": [{"name": "v1",
                "served": true, "storage": true, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": {"type": "object",
                "maximum": 1.5, "default": {"a": 1}, "properties": {"l": {"type": "array", "items": {"type": "string"}},
                "m": {"additionalProperties": false, "enum": ["a", 1]}}}}}]}}),
        );
        there_and_back(
            "apps",
            "v1",
            "ControllerRevision",
            json!({"apiVersion": "apps/v1", "kind": "ControllerRevision",
            "data": {"x": [1, "y"]}, "revision": 7}),
        );
    }

    #[test]
    fn a_known_body_reads() {
        // A ConfigMap `a` with data x=y, as client-go writes it.
        let mut meta = Writer::default();
        meta.bytes(1, b"a");
        meta.bytes(2, b"");
        meta.varint(7, 0);
        let mut entry = Writer::default();
        entry.bytes(1, b"x");
        entry.bytes(2, b"y");
        let mut message = Writer::default();
        message.bytes(1, &meta.into_bytes());
        message.bytes(2, &entry.into_bytes());
        let schema = builtin();
        let id = schema.by_gvk("", "v1", "ConfigMap").unwrap();
        let value = decode(schema, id, &message.into_bytes()).unwrap();
        assert_eq!(value, json!({"metadata": {"name": "a"}, "data": {"x": "y"}}));
    }

    #[test]
    fn malformed_bodies_are_refused() {
        assert_eq!(open(b"").err(), Some(ProtoError::EmptyData));
        assert_eq!(open(b"{}").err(), Some(ProtoError::Prefix));
        assert_eq!(open(MAGIC).err(), Some(ProtoError::EmptyBody));
        let schema = builtin();
        let id = schema.by_gvk("", "v1", "Pod").unwrap();
        assert_eq!(decode(schema, id, &[0x0a, 0xff]).unwrap_err(), ProtoError::Eof);
        assert_eq!(
            decode(schema, id, &[0x08, 0x01]).unwrap_err().to_string(),
            "proto: wrong wireType = 0 for field metadata"
        );
        // Nonsense of any kind is an error, not a panic.
        let mut state = 7u32;
        for length in 0..400usize {
            let noise: Vec<u8> = (0..length)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as u8
                })
                .collect();
            let _ = decode(schema, id, &noise);
        }
    }

    #[test]
    fn a_watch_frame_carries_its_length() {
        let frame = watch_frame("ADDED", b"k8s\0x");
        assert_eq!(frame[..4], ((frame.len() - 4) as u32).to_be_bytes());
    }
}
