//! ConfigMaps and Secrets: keys, size, immutability, and what a Secret's type requires.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::pod::container::config_key;
use super::value::{object_mut, text, truth};
use super::{Context, Strategy};
use crate::apiserver::field::{ErrorList, FieldError};

/// Bytes that a ConfigMap or Secret may hold.
const MAX_SIZE: usize = 1 << 20;
const IMMUTABLE: &str = "field is immutable when `immutable` is set";
const REDACTED: &str = "<secret contents redacted>";

/// ConfigMaps.
pub static CONFIG_MAP: Strategy = Strategy {
    validate_create: |_, new| config_map(new),
    validate_update: |_, new, old| {
        let mut errors = frozen(new, old, &["data", "binaryData"]);
        errors.extend(config_map(new));
        errors
    },
    ..Strategy::DEFAULT
};

/// Secrets.
pub static SECRET: Strategy = Strategy {
    prepare_create: |_, new| prepare_secret(new, None),
    prepare_update: |_, new, old| prepare_secret(new, Some(old)),
    validate_create: |_, new| secret(new),
    validate_update: |_, new, old| {
        let mut errors = ErrorList::new();
        if new["type"] != old["type"] {
            errors.push(FieldError::invalid("type", new["type"].clone(), "field is immutable"));
        }
        errors.extend(frozen(new, old, &["data"]));
        errors.extend(secret(new));
        errors
    },
    ..Strategy::DEFAULT
};

fn frozen(new: &Value, old: &Value, fields: &[&str]) -> ErrorList {
    let mut errors = ErrorList::new();
    if !truth(old, "/immutable") {
        return errors;
    }
    if !truth(new, "/immutable") {
        errors.push(FieldError::forbidden("immutable", IMMUTABLE));
    }
    let content = |object: &Value, field: &str| object[field].as_object().filter(|m| !m.is_empty()).cloned();
    for field in fields {
        if content(new, field) != content(old, field) {
            errors.push(FieldError::forbidden(*field, IMMUTABLE));
        }
    }
    errors
}

fn config_map(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut size = 0;
    for field in ["data", "binaryData"] {
        let Some(entries) = object[field].as_object() else { continue };
        for (key, value) in entries {
            let at = format!("{field}[{key}]");
            errors.extend(config_key(key).into_iter().map(|f| FieldError::invalid(&at, key.as_str(), f)));
            if field == "data" && object["binaryData"].get(key).is_some() {
                errors.push(FieldError::invalid(&at, key.as_str(), "duplicate of key present in binaryData"));
            }
            let text = value.as_str().unwrap_or_default();
            size += if field == "data" { text.len() } else { text.len() / 4 * 3 };
        }
    }
    if size > MAX_SIZE {
        errors.push(FieldError::too_long("", MAX_SIZE));
    }
    errors
}

/// `stringData` is write-only: it goes into `data`.
fn prepare_secret(new: &mut Value, old: Option<&Value>) {
    if let Some(Value::Object(strings)) = new.as_object_mut().and_then(|o| o.remove("stringData")) {
        let data = object_mut(new, "data");
        for (key, value) in strings {
            data.insert(key, json!(STANDARD.encode(value.as_str().unwrap_or_default())));
        }
    }
    if text(new, "/type").is_empty() {
        let kind = old.map(|old| text(old, "/type")).filter(|t| !t.is_empty()).unwrap_or("Opaque");
        new["type"] = json!(kind);
    }
}

fn secret(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let decoded =
        |key: &str| object["data"].get(key).and_then(Value::as_str).map(|v| STANDARD.decode(v).unwrap_or_default());
    let mut size = 0;
    if let Some(data) = object["data"].as_object() {
        for (key, value) in data {
            errors.extend(
                config_key(key).into_iter().map(|f| FieldError::invalid(format!("data[{key}]"), key.as_str(), f)),
            );
            size += value.as_str().map_or(0, |v| v.len() / 4 * 3);
        }
    }
    if size > MAX_SIZE {
        errors.push(FieldError::too_long("data", MAX_SIZE));
    }
    let required = |key: &str| FieldError::required(format!("data[{key}]"), "");
    match text(object, "/type") {
        "kubernetes.io/service-account-token"
            if text(object, "/metadata/annotations/kubernetes.io~1service-account.name").is_empty() =>
        {
            errors.push(FieldError::required("metadata.annotations[kubernetes.io/service-account.name]", ""));
        }
        kind @ ("kubernetes.io/dockercfg" | "kubernetes.io/dockerconfigjson") => {
            let key = if kind.ends_with("cfg") { ".dockercfg" } else { ".dockerconfigjson" };
            match decoded(key) {
                None => errors.push(required(key)),
                Some(bytes) => {
                    if let Err(e) = serde_json::from_slice::<serde_json::Map<String, Value>>(&bytes) {
                        errors.push(FieldError::invalid(format!("data[{key}]"), REDACTED, e.to_string()));
                    }
                }
            }
        }
        "kubernetes.io/basic-auth" if decoded("username").is_none() && decoded("password").is_none() => {
            errors.push(required("username"));
            errors.push(required("password"));
        }
        "kubernetes.io/ssh-auth" if decoded("ssh-privatekey").is_none_or(|k| k.is_empty()) => {
            errors.push(required("ssh-privatekey"));
        }
        "kubernetes.io/tls" => {
            errors.extend(["tls.crt", "tls.key"].into_iter().filter(|k| decoded(k).is_none()).map(required));
        }
        _ => {}
    }
    errors
}

/// Namespaces: what the API server adds, and what stays until the content is gone.
pub static NAMESPACE: Strategy = Strategy {
    prepare_create: |context, new| {
        new["status"] = json!({"phase": "Active"});
        let finalizers = object_mut(new, "spec").entry("finalizers").or_insert_with(|| json!([]));
        if let Value::Array(list) = finalizers
            && !list.iter().any(|f| f == "kubernetes")
        {
            list.push(json!("kubernetes"));
        }
        label_with_name(context, new);
    },
    prepare_update: |context, new, old| {
        if context.subresource != "finalize" {
            // Only the finalize subresource changes the finalizers of the spec.
            new["spec"]["finalizers"] = old["spec"]["finalizers"].clone();
        }
        label_with_name(context, new);
    },
    names: super::NameRule::Label,
    ..Strategy::DEFAULT
};

fn label_with_name(context: &Context<'_>, new: &mut Value) {
    if let Some(metadata) = new.get_mut("metadata") {
        object_mut(metadata, "labels").insert("kubernetes.io/metadata.name".to_owned(), json!(context.name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(errors: &ErrorList) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn string_data_goes_into_data_and_types_require_keys() {
        let mut object = json!({"stringData": {"a": "x"}, "data": {"b": "eQ=="}});
        prepare_secret(&mut object, None);
        assert_eq!(object, json!({"data": {"a": "eA==", "b": "eQ=="}, "type": "Opaque"}));
        let tls = json!({"type": "kubernetes.io/tls", "data": {"tls.crt": "eA=="}});
        assert_eq!(texts(&secret(&tls)), ["data[tls.key]: Required value"]);
    }

    #[test]
    fn an_immutable_one_stays() {
        let old = json!({"immutable": true, "data": {"a": "1"}});
        let new = json!({"immutable": true, "data": {"a": "2"}});
        assert_eq!(
            texts(&frozen(&new, &old, &["data"])),
            ["data: Forbidden: field is immutable when `immutable` is set"]
        );
        assert!(frozen(&old, &old, &["data"]).is_empty());
    }

    #[test]
    fn keys_are_checked_and_the_size_is_bounded() {
        let bad = json!({"data": {"a b": "x", "same": "1"}, "binaryData": {"same": "eA=="}});
        assert_eq!(config_map(&bad).len(), 2);
        let big = json!({"data": {"a": "x".repeat(MAX_SIZE + 1)}});
        assert_eq!(config_map(&big).len(), 1);
    }
}
