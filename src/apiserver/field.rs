//! Field errors of validation (upstream's `field.Error`) and their exact texts.

use serde_json::Value;
use std::fmt;

/// What is wrong with a field; [`ErrorType::cause`] is its `metav1.CauseType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorType {
    NotFound,
    Required,
    Duplicate,
    Invalid,
    NotSupported,
    Forbidden,
    TooLong,
    TooMany,
    Internal,
    TypeInvalid,
}

impl ErrorType {
    /// The machine-readable reason of the cause.
    pub fn cause(self) -> &'static str {
        match self {
            ErrorType::NotFound => "FieldValueNotFound",
            ErrorType::Required => "FieldValueRequired",
            ErrorType::Duplicate => "FieldValueDuplicate",
            ErrorType::Invalid => "FieldValueInvalid",
            ErrorType::NotSupported => "FieldValueNotSupported",
            ErrorType::Forbidden => "FieldValueForbidden",
            ErrorType::TooLong => "FieldValueTooLong",
            ErrorType::TooMany => "FieldValueTooMany",
            ErrorType::Internal => "InternalError",
            ErrorType::TypeInvalid => "FieldValueTypeInvalid",
        }
    }

    fn text(self) -> &'static str {
        match self {
            ErrorType::NotFound => "Not found",
            ErrorType::Required => "Required value",
            ErrorType::Duplicate => "Duplicate value",
            ErrorType::Invalid | ErrorType::TypeInvalid => "Invalid value",
            ErrorType::NotSupported => "Unsupported value",
            ErrorType::Forbidden => "Forbidden",
            ErrorType::TooLong => "Too long",
            ErrorType::TooMany => "Too many",
            ErrorType::Internal => "Internal error",
        }
    }
}

/// One wrong field. `Display` is `<field>: <body>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    pub kind: ErrorType,
    /// Path, e.g. `spec.containers[0].name`.
    pub field: String,
    /// The value as it is printed (strings already quoted); none is omitted.
    pub value: Option<String>,
    pub detail: String,
}

/// All that is wrong with an object, in upstream's order.
pub type ErrorList = Vec<FieldError>;

/// A value as upstream prints it in a field error: strings as Go's `%q`, everything else as JSON.
fn print(value: &Value) -> String {
    match value {
        Value::String(text) => quote(text),
        other => other.to_string(),
    }
}

/// Go's `strconv.Quote`.
pub fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
            '\u{feff}' | '\u{fffd}' | '\u{a0}' | '\u{2028}' | '\u{2029}' | '\u{200b}'..='\u{200f}' => {
                out.push_str(&format!("\\u{:04x}", c as u32));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

impl FieldError {
    fn new(kind: ErrorType, field: impl Into<String>, value: Option<String>, detail: impl Into<String>) -> FieldError {
        FieldError { kind, field: field.into(), value, detail: detail.into() }
    }

    /// `Required value[: detail]`.
    pub fn required(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(ErrorType::Required, field, None, detail)
    }

    /// `Invalid value: <value>[: detail]`.
    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError::new(ErrorType::Invalid, field, Some(print(&value.into())), detail)
    }

    /// `Invalid value: <value>[: detail]` with the cause `FieldValueTypeInvalid`.
    pub fn type_invalid(field: impl Into<String>, value: impl Into<Value>, detail: impl Into<String>) -> FieldError {
        FieldError::new(ErrorType::TypeInvalid, field, Some(print(&value.into())), detail)
    }

    /// `Unsupported value: <value>: supported values: "a", "b"`; pass the values in upstream's (sorted) order.
    pub fn not_supported(field: impl Into<String>, value: impl Into<Value>, supported: &[&str]) -> FieldError {
        let detail = match supported {
            [] => String::new(),
            some => {
                let quoted: Vec<String> = some.iter().map(|s| quote(s)).collect();
                format!("supported values: {}", quoted.join(", "))
            }
        };
        FieldError::new(ErrorType::NotSupported, field, Some(print(&value.into())), detail)
    }

    /// `Duplicate value: <value>`.
    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(ErrorType::Duplicate, field, Some(print(&value.into())), "")
    }

    /// `Not found: <value>`.
    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> FieldError {
        FieldError::new(ErrorType::NotFound, field, Some(print(&value.into())), "")
    }

    /// `Forbidden: <detail>`.
    pub fn forbidden(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(ErrorType::Forbidden, field, None, detail)
    }

    /// `Too long: may not be more than N bytes`.
    pub fn too_long(field: impl Into<String>, max: usize) -> FieldError {
        let unit = if max == 1 { "byte" } else { "bytes" };
        FieldError::new(ErrorType::TooLong, field, None, format!("may not be more than {max} {unit}"))
    }

    /// `Too many: <actual>: must have at most N items`.
    pub fn too_many(field: impl Into<String>, actual: usize, max: usize) -> FieldError {
        let unit = if max == 1 { "item" } else { "items" };
        FieldError::new(ErrorType::TooMany, field, Some(actual.to_string()), format!("must have at most {max} {unit}"))
    }

    /// `Internal error: <detail>`.
    pub fn internal(field: impl Into<String>, detail: impl Into<String>) -> FieldError {
        FieldError::new(ErrorType::Internal, field, None, detail)
    }

    /// The text without the field (the message of the cause).
    pub fn body(&self) -> String {
        let mut text = self.kind.text().to_owned();
        let shows_value =
            !matches!(self.kind, ErrorType::Required | ErrorType::Forbidden | ErrorType::TooLong | ErrorType::Internal);
        if let Some(value) = self.value.as_deref().filter(|_| shows_value) {
            text.push_str(": ");
            text.push_str(value);
        }
        if !self.detail.is_empty() {
            text.push_str(": ");
            text.push_str(&self.detail);
        }
        text
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.body())
    }
}

/// Upstream's aggregate of several messages: one as it is, more as `[a, b]`, repeats left out, none as `None`.
pub fn aggregate<I: IntoIterator<Item = String>>(messages: I) -> Option<String> {
    let mut unique: Vec<String> = Vec::new();
    for message in messages {
        if !unique.contains(&message) {
            unique.push(message);
        }
    }
    match unique.len() {
        0 => None,
        1 => unique.pop(),
        _ => Some(format!("[{}]", unique.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_read_as_upstreams() {
        let error = FieldError::invalid("spec.replicas", -1, "must be greater than or equal to 0");
        assert_eq!(error.to_string(), "spec.replicas: Invalid value: -1: must be greater than or equal to 0");
        let error = FieldError::not_supported("spec.restartPolicy", "x", &["Always", "Never"]);
        assert_eq!(error.body(), r#"Unsupported value: "x": supported values: "Always", "Never""#);
        assert_eq!(FieldError::too_long("a", 63).body(), "Too long: may not be more than 63 bytes");
        assert_eq!(quote("a\"b\n\u{1}é"), "\"a\\\"b\\n\\x01é\"");
        assert_eq!(aggregate(["a".into(), "a".into(), "b".into()]).as_deref(), Some("[a, b]"));
    }
}
