//! Why a write was refused; `apiserver::status` turns it into a `metav1.Status`.

use serde_json::{Value, json};

/// A refusal with everything the `metav1.Status` of the answer needs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// HTTP status code.
    pub code: u16,
    /// `metav1.StatusReason`.
    pub reason: &'static str,
    pub message: String,
    /// `metav1.StatusDetails`: name, group, kind (the *resource* for upstream's errors by resource), causes.
    pub details: Option<Value>,
}

fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}

fn details(group: &str, kind: &str, name: &str) -> Value {
    let mut details = serde_json::Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
        if !value.is_empty() {
            details.insert(key.to_owned(), Value::from(value));
        }
    }
    Value::Object(details)
}

impl Rejection {
    fn new(code: u16, reason: &'static str, message: String, details: Option<Value>) -> Rejection {
        Rejection { code, reason, message, details }
    }

    /// 403 as `apierrors.NewForbidden`: `<resource>.<group> "<name>" is forbidden: <why>`.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: &str) -> Rejection {
        let what = qualified(group, resource);
        let message = match (resource, name) {
            ("", _) => format!("forbidden: {why}"),
            (_, "") => format!("{what} is forbidden: {why}"),
            _ => format!("{what} \"{name}\" is forbidden: {why}"),
        };
        Rejection::new(403, "Forbidden", message, Some(details(group, resource, name)))
    }

    /// 404 as `apierrors.NewNotFound`.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Rejection {
        let message = format!("{} \"{name}\" not found", qualified(group, resource));
        Rejection::new(404, "NotFound", message, Some(details(group, resource, name)))
    }

    /// 409 as `apierrors.NewConflict`.
    pub fn conflict(group: &str, resource: &str, name: &str, why: &str) -> Rejection {
        let what = qualified(group, resource);
        let message = format!("Operation cannot be fulfilled on {what} \"{name}\": {why}");
        Rejection::new(409, "Conflict", message, Some(details(group, resource, name)))
    }

    /// 400 as `apierrors.NewBadRequest`.
    pub fn bad_request(why: impl Into<String>) -> Rejection {
        Rejection::new(400, "BadRequest", why.into(), None)
    }

    /// 500 as `apierrors.NewInternalError`.
    pub fn internal(why: impl std::fmt::Display) -> Rejection {
        let cause = json!({ "causes": [{ "message": why.to_string() }] });
        Rejection::new(500, "InternalError", format!("Internal error occurred: {why}"), Some(cause))
    }

    /// 422 as `apierrors.NewInvalid` of one or more field errors; `kind` is the Kind, not the resource.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Rejection {
        let texts: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.message)).collect();
        let all = match texts.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let mut details = details(group, kind, name);
        details["causes"] = errors
            .iter()
            .map(|e| json!({ "reason": e.reason, "message": e.message, "field": e.field }))
            .collect::<Vec<_>>()
            .into();
        let message = format!("{} \"{name}\" is invalid: {all}", qualified(group, kind));
        Rejection::new(422, "Invalid", message, Some(details))
    }
}

/// One wrong field (`field.Error`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// Path, e.g. `spec.containers[0].name`.
    pub field: String,
    /// `metav1.CauseType`, e.g. `FieldValueInvalid`.
    pub reason: &'static str,
    /// Upstream's text, e.g. `Invalid value: "x": must be ...`.
    pub message: String,
}

impl FieldError {
    /// `Required value: <detail>`.
    pub fn required(field: impl Into<String>, detail: &str) -> FieldError {
        let message = if detail.is_empty() { "Required value".into() } else { format!("Required value: {detail}") };
        FieldError { field: field.into(), reason: "FieldValueRequired", message }
    }

    /// `Invalid value: <value>: <detail>`; strings are quoted as Go's `%q`.
    pub fn invalid(field: impl Into<String>, value: &Value, detail: &str) -> FieldError {
        FieldError {
            field: field.into(),
            reason: "FieldValueInvalid",
            message: format!("Invalid value: {value}: {detail}"),
        }
    }

    /// `Forbidden: <detail>`.
    pub fn forbidden(field: impl Into<String>, detail: &str) -> FieldError {
        FieldError { field: field.into(), reason: "FieldValueForbidden", message: format!("Forbidden: {detail}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_read_as_upstreams() {
        let forbidden = Rejection::forbidden("apps", "deployments", "web", "no");
        assert_eq!(forbidden.message, r#"deployments.apps "web" is forbidden: no"#);
        assert_eq!(forbidden.details, Some(json!({ "name": "web", "group": "apps", "kind": "deployments" })));
        let invalid = Rejection::invalid("", "Pod", "p", &[FieldError::required("spec.x", "")]);
        assert_eq!(invalid.message, r#"Pod "p" is invalid: spec.x: Required value"#);
    }
}
