//! The three kinds of patch. Server-side apply is [`super::managed`].

mod json;
mod strategic;

use serde_json::{Map, Value};

use super::decode::{Decoded, FieldValidation};
use super::node::{Schema, TypeId};
use super::{default, generic, typed};

/// Which patch a body is, by its content type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchKind {
    /// `application/json-patch+json`, RFC 6902.
    Json,
    /// `application/merge-patch+json`, RFC 7386.
    Merge,
    /// `application/strategic-merge-patch+json`
    Strategic,
}

/// A patch that cannot be applied. `Display` is upstream's message; for `Invalid` it is the detail of the cause, and the message is
/// ` "" is invalid: patch: Invalid value: "VALUE": DETAIL` (value quoted).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    /// 400 `BadRequest`.
    #[error("{0}")]
    BadRequest(String),
    /// 413 `RequestEntityTooLarge`.
    #[error("{0}")]
    TooLarge(String),
    /// 422 `Invalid` with empty details. Upstream keeps the reason to itself; here it is for the log.
    #[error("the server rejected our request due to an error in our request")]
    Unprocessable(String),
    /// 422 `Invalid` with one cause: `field.Invalid("patch", value, detail)`, of no kind and no name.
    #[error("{detail}")]
    Invalid { value: String, detail: String },
    /// 500 without a reason: upstream passes these on as they are.
    #[error("{0}")]
    Internal(String),
}

/// Upstream's bound on the number of operations.
const MAX_JSON_PATCH_OPERATIONS: usize = 10_000;

/// Applies a patch to an object in Go form; gives the new object in Go form with defaults, and warnings.
///
/// `apiVersion` and `kind` cannot be changed by a patch.
///
/// # Errors
/// See [`PatchError`].
pub fn apply(
    schema: &Schema,
    id: TypeId,
    kind: PatchKind,
    current: &Value,
    body: &[u8],
    validation: FieldValidation,
) -> Result<Decoded, PatchError> {
    let strict = validation != FieldValidation::Ignore;
    // What `field.Invalid` shows as the bad value.
    let mut shown = None;
    let (patched, mut found) = match kind {
        PatchKind::Json => json_patch(current, body, strict)?,
        PatchKind::Merge => merge_patch(current, body, strict)?,
        PatchKind::Strategic => {
            let (patch, found) = generic::parse_object(body).map_err(PatchError::BadRequest)?;
            shown = Some(go_print(&Value::Object(patch.clone())));
            let original = current.as_object().cloned().unwrap_or_default();
            (Value::Object(strategic::apply(schema, id, original, patch)?), found)
        }
    };
    let bad_value = |patched: &Value| shown.clone().unwrap_or_else(|| patched.to_string());
    let invalid = |value: String, detail: String| PatchError::Invalid { value, detail };
    check_kind(current, &patched).map_err(|detail| invalid(bad_value(&patched), detail))?;
    let (mut value, findings) =
        typed::decode(schema, id, strict, &patched).map_err(|e| invalid(bad_value(&patched), e.to_string()))?;
    if let Some(detail) = findings.error {
        return Err(invalid(bad_value(&patched), detail));
    }
    if !strict {
        found.clear();
    }
    found.extend(findings.strict);
    if validation == FieldValidation::Strict && !found.is_empty() {
        let detail = format!("strict decoding error: {}", found.join(", "));
        return Err(invalid(bad_value(&patched), detail));
    }
    default::apply(schema, id, &mut value);
    Ok(Decoded { value, warnings: found })
}

/// The patched document, not yet of any type, and what a strict reader found in the patch.
type Patched = Result<(Value, Vec<String>), PatchError>;

fn json_patch(current: &Value, body: &[u8], strict: bool) -> Patched {
    let context = |e: String| if strict { format!("error decoding patch: {e}") } else { e };
    let (patch, _) = generic::parse(body).map_err(|e| PatchError::BadRequest(context(e)))?;
    let operations = json::operations(patch).map_err(|e| PatchError::BadRequest(context(e)))?;
    let found = if strict { json::strict_findings(&operations) } else { Vec::new() };
    if operations.len() > MAX_JSON_PATCH_OPERATIONS {
        return Err(PatchError::TooLarge(format!(
            "The allowed maximum operations in a JSON patch is {MAX_JSON_PATCH_OPERATIONS}, got {}",
            operations.len()
        )));
    }
    let patched = json::apply(current.clone(), &operations).map_err(PatchError::Unprocessable)?;
    Ok((patched, found))
}

fn merge_patch(current: &Value, body: &[u8], strict: bool) -> Patched {
    if strict {
        let context = |e: String| PatchError::BadRequest(format!("error decoding patch: {e}"));
        let (patch, found) = generic::parse_object(body).map_err(context)?;
        return Ok((merge(current.clone(), Value::Object(patch)), found));
    }
    let bad = || PatchError::BadRequest("Invalid JSON Patch".to_owned());
    let (patch, _) = generic::parse(body).map_err(|_| bad())?;
    if !(patch.is_object() || patch.is_array()) {
        return Err(bad());
    }
    Ok((merge(current.clone(), patch), Vec::new()))
}

/// RFC 7386.
pub fn merge(target: Value, patch: Value) -> Value {
    let Value::Object(patch) = patch else { return patch };
    let mut target = match target {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            let old = target.remove(&key).unwrap_or(Value::Null);
            target.insert(key, merge(old, value));
        }
    }
    Value::Object(target)
}

fn check_kind(current: &Value, patched: &Value) -> Result<(), String> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    if !patched.is_object() {
        return Ok(());
    }
    let (kind, version) = (text(patched, "kind"), text(patched, "apiVersion"));
    if kind.is_empty() {
        return Err(format!("Object 'Kind' is missing in '{patched}'"));
    }
    if version.is_empty() {
        return Err(format!("Object 'apiVersion' is missing in '{patched}'"));
    }
    if kind != text(current, "kind") || version != text(current, "apiVersion") {
        return Err(format!(
            "no kind {kind:?} is registered for version {version:?} in scheme \"pkg/api/legacyscheme/scheme.go:30\""
        ));
    }
    Ok(())
}

/// Go's `%v` of a decoded JSON value.
pub(super) fn go_print(value: &Value) -> String {
    match value {
        Value::Null => "<nil>".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(s) => s.clone(),
        Value::Array(items) => format!("[{}]", items.iter().map(go_print).collect::<Vec<_>>().join(" ")),
        Value::Object(map) => {
            let entries: Vec<String> = map.iter().map(|(k, v)| format!("{k}:{}", go_print(v))).collect();
            format!("map[{}]", entries.join(" "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;
    use serde_json::json;

    fn deployment() -> Value {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {"a": "1", "b": "2"}},
            "spec": {"replicas": 1, "template": {"spec": {"containers": [{"name": "a", "image": "x:1"}]}}}})
    }

    fn patched(kind: PatchKind, body: &str, validation: FieldValidation) -> Result<Decoded, PatchError> {
        let schema = builtin();
        let id = schema.by_gvk("apps", "v1", "Deployment").unwrap();
        apply(schema, id, kind, &deployment(), body.as_bytes(), validation)
    }

    #[test]
    fn a_merge_patch_sets_and_removes() {
        let body = r#"{"metadata":{"labels":{"a":null,"c":"3"}},"spec":{"replicas":5}}"#;
        let value = patched(PatchKind::Merge, body, FieldValidation::Strict).unwrap().value;
        assert_eq!(value["metadata"]["labels"], json!({"b": "2", "c": "3"}));
        assert_eq!(
            (&value["spec"]["replicas"], &value["spec"]["strategy"]["type"]),
            (&json!(5), &json!("RollingUpdate"))
        );
    }

    #[test]
    fn unknown_fields_in_a_patch_warn_or_fail() {
        let body = r#"{"spec":{"foo":1}}"#;
        for kind in [PatchKind::Merge, PatchKind::Strategic] {
            let warned = patched(kind, body, FieldValidation::Warn).unwrap();
            assert_eq!(warned.warnings, [r#"unknown field "spec.foo""#]);
            assert!(patched(kind, body, FieldValidation::Ignore).unwrap().warnings.is_empty());
        }
        let error = patched(PatchKind::Strategic, body, FieldValidation::Strict).unwrap_err();
        let detail = r#"strict decoding error: unknown field "spec.foo""#.to_owned();
        assert_eq!(error, PatchError::Invalid { value: "map[spec:map[foo:1]]".to_owned(), detail });
    }

    #[test]
    fn a_wrong_type_is_invalid() {
        let error = patched(PatchKind::Merge, r#"{"spec":{"replicas":"x"}}"#, FieldValidation::Warn).unwrap_err();
        assert_eq!(
            error.to_string(),
            "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32"
        );
        assert!(matches!(error, PatchError::Invalid { .. }));
    }

    #[test]
    fn malformed_bodies_are_bad_requests() {
        for (kind, body, text) in [
            (PatchKind::Merge, "{", "error decoding patch: unexpected end of JSON input"),
            (PatchKind::Json, "{", "error decoding patch: unexpected end of JSON input"),
            (PatchKind::Strategic, "[]", "json: cannot unmarshal array into Go value of type map[string]interface {}"),
        ] {
            let error = patched(kind, body, FieldValidation::Warn).unwrap_err();
            assert_eq!(error, PatchError::BadRequest(text.to_owned()));
        }
    }

    #[test]
    fn the_kind_cannot_be_patched() {
        let error = patched(PatchKind::Merge, r#"{"kind":"Pod"}"#, FieldValidation::Warn).unwrap_err();
        assert!(matches!(error, PatchError::Invalid { .. }));
    }

    #[test]
    fn a_json_patch_runs_its_operations() {
        let body = r#"[{"op":"test","path":"/spec/replicas","value":1},{"op":"replace","path":"/spec/replicas","value":3},
            {"op":"add","path":"/metadata/labels/x~1y","value":"z"},{"op":"remove","path":"/metadata/labels/a"}]"#;
        let value = patched(PatchKind::Json, body, FieldValidation::Strict).unwrap().value;
        assert_eq!(value["spec"]["replicas"], 3);
        assert_eq!(value["metadata"]["labels"], json!({"b": "2", "x/y": "z"}));
    }
}
