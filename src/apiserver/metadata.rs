//! `metadata`: what every object has, filled in and checked on each write with upstream's texts.

use super::field::{ErrorList, FieldError};
use super::names;
use super::object::{finalizers, meta};
use super::resources::Resource;
use crate::strategy::NameRule;
use serde_json::{Map, Value};

const IMMUTABLE: &str = "field is immutable";
/// All keys and values of the annotations together, in bytes.
const ANNOTATIONS_MAX: usize = 256 * 1024;

/// Keeps an object until its dependents have been orphaned.
pub const FINALIZER_ORPHAN: &str = "orphan";
/// Keeps an object until its dependents are gone.
pub const FINALIZER_FOREGROUND: &str = "foregroundDeletion";

/// Now, as `metav1.Time` has it.
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What is wrong with a name under the rule of a kind.
pub fn check_name(rule: NameRule, name: &str, prefix: bool) -> Vec<String> {
    // A prefix may end in what only the end of a name may not be.
    let masked;
    let name = if prefix && rule != NameRule::PathSegment {
        masked = match name.strip_suffix('-') {
            Some(rest) => format!("{rest}a"),
            None => name.to_owned(),
        };
        masked.as_str()
    } else {
        name
    };
    match rule {
        NameRule::Subdomain => names::dns1123_subdomain(name),
        NameRule::Label => names::dns1123_label(name),
        NameRule::Label1035 => names::dns1035_label(name),
        NameRule::PathSegment => names::path_segment(name, prefix),
        NameRule::Address => crate::strategy::address::address_faults(name),
    }
}

/// Everything wrong with the metadata of an object.
pub fn validate(resource: &Resource, object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let rule = resource.strategy.names;
    let (name, generate) = (meta(object, "name"), meta(object, "generateName"));
    if !generate.is_empty() {
        let wrong = check_name(rule, generate, true);
        errors.extend(wrong.into_iter().map(|w| FieldError::invalid("metadata.generateName", generate, w)));
    }
    if name.is_empty() {
        errors.push(FieldError::required("metadata.name", "name or generateName is required"));
    } else {
        let wrong = check_name(rule, name, false);
        errors.extend(wrong.into_iter().map(|w| FieldError::invalid("metadata.name", name, w)));
    }
    let namespace = meta(object, "namespace");
    if resource.is_namespaced() {
        if namespace.is_empty() {
            errors.push(FieldError::required("metadata.namespace", ""));
        } else {
            let wrong = names::dns1123_label(namespace);
            errors.extend(wrong.into_iter().map(|w| FieldError::invalid("metadata.namespace", namespace, w)));
        }
    } else if !namespace.is_empty() {
        errors.push(FieldError::forbidden("metadata.namespace", "not allowed on this type"));
    }
    let map = |key: &str| object.pointer(&format!("/metadata/{key}")).and_then(Value::as_object);
    if let Some(generation) = object.pointer("/metadata/generation").and_then(Value::as_i64).filter(|g| *g < 0) {
        let why = "must be greater than or equal to 0";
        errors.push(FieldError::invalid("metadata.generation", generation, why));
    }
    errors.extend(map("labels").into_iter().flat_map(|labels| validate_labels(labels, "metadata.labels")));
    errors.extend(map("annotations").into_iter().flat_map(validate_annotations));
    validate_owners(object, &mut errors);
    validate_finalizers(object, &mut errors);
    for (index, finalizer) in finalizers(object).into_iter().enumerate() {
        if !finalizer.contains('/') && !matches!(finalizer, "kubernetes" | FINALIZER_ORPHAN | FINALIZER_FOREGROUND) {
            let why = "name is neither a standard finalizer name nor is it fully qualified";
            errors.push(FieldError::invalid(format!("metadata.finalizers[{index}]"), finalizer, why));
        }
    }
    errors
}

/// Everything wrong with a map of labels.
pub fn validate_labels(labels: &Map<String, Value>, path: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (key, value) in labels {
        let wrong = names::qualified_name(key);
        errors.extend(wrong.into_iter().map(|w| FieldError::invalid(path, key.as_str(), w)));
        let value = value.as_str().unwrap_or_default();
        let wrong = names::label_value(value);
        errors.extend(wrong.into_iter().map(|w| FieldError::invalid(path, value, w)));
    }
    errors
}

fn validate_annotations(annotations: &Map<String, Value>) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut size = 0;
    for (key, value) in annotations {
        size += key.len() + value.as_str().map_or(0, str::len);
        let wrong = names::qualified_name(&key.to_lowercase());
        errors.extend(wrong.into_iter().map(|w| FieldError::invalid("metadata.annotations", key.as_str(), w)));
    }
    if size > ANNOTATIONS_MAX {
        errors.push(FieldError::too_long("metadata.annotations", ANNOTATIONS_MAX));
    }
    errors
}

fn validate_owners(object: &Value, errors: &mut ErrorList) {
    const PATH: &str = "metadata.ownerReferences";
    let Some(owners) = object.pointer("/metadata/ownerReferences") else { return };
    let mut controller: Option<String> = None;
    for owner in owners.as_array().into_iter().flatten() {
        let text = |key: &str| owner.get(key).and_then(Value::as_str).unwrap_or_default();
        let api_version = text("apiVersion");
        let version = api_version.rsplit('/').next().unwrap_or_default();
        if version.is_empty() || api_version.matches('/').count() > 1 {
            let why = "version must not be empty";
            errors.push(FieldError::invalid(format!("{PATH}.apiVersion"), api_version, why));
        }
        for key in ["kind", "name", "uid"] {
            if text(key).is_empty() {
                errors.push(FieldError::invalid(format!("{PATH}.{key}"), "", "must not be empty"));
            }
        }
        if (api_version, text("kind")) == ("v1", "Event") {
            let why = "/v1, Kind=Event is disallowed from being an owner";
            errors.push(FieldError::invalid(PATH, owner.clone(), why));
        }
        if owner.get("controller").and_then(Value::as_bool) == Some(true) {
            let this = format!("{}/{}", text("kind"), text("name"));
            if let Some(first) = &controller {
                let why = format!(
                    "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {this}"
                );
                errors.push(FieldError::invalid(PATH, owners.clone(), why));
            } else {
                controller = Some(this);
            }
        }
    }
}

fn validate_finalizers(object: &Value, errors: &mut ErrorList) {
    const PATH: &str = "metadata.finalizers";
    let all = finalizers(object);
    for finalizer in &all {
        let wrong = names::qualified_name(finalizer);
        errors.extend(wrong.into_iter().map(|w| FieldError::invalid(PATH, *finalizer, w)));
    }
    if all.contains(&FINALIZER_ORPHAN) && all.contains(&FINALIZER_FOREGROUND) {
        let why = "finalizer orphan and foregroundDeletion cannot be both set";
        errors.push(FieldError::invalid(PATH, all, why));
    }
}

/// Everything wrong with how the metadata changed; both objects carry a resource version.
pub fn validate_update(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let get = |object: &Value, key: &str| object.get("metadata").and_then(|m| m.get(key)).cloned();
    if get(old, "deletionTimestamp").is_some() {
        let before = finalizers(old);
        let mut extra: Vec<&str> = finalizers(new).into_iter().filter(|f| !before.contains(f)).collect();
        extra.sort_unstable();
        if !extra.is_empty() {
            let list: Vec<String> = extra.iter().map(|e| super::field::quote(e)).collect();
            let why = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                list.join(", ")
            );
            errors.push(FieldError::forbidden("metadata.finalizers", why));
        }
    }
    let generation = |object: &Value| get(object, "generation").and_then(|g| g.as_i64()).unwrap_or(0);
    if generation(new) < generation(old) {
        errors.push(FieldError::invalid("metadata.generation", generation(new), "must not be decremented"));
    }
    for key in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let (after, before) = (get(new, key), get(old, key));
        if after != before {
            errors.push(FieldError::invalid(format!("metadata.{key}"), after.unwrap_or(Value::Null), IMMUTABLE));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;
    use serde_json::json;

    #[test]
    fn metadata_is_checked() {
        let configmaps = &RESOURCES[2];
        let texts =
            |object: Value| -> Vec<String> { validate(configmaps, &object).iter().map(ToString::to_string).collect() };
        assert!(texts(json!({ "metadata": { "name": "a", "namespace": "b", "generateName": "x-" } })).is_empty());
        let wrong = texts(json!({ "metadata": { "namespace": "b", "labels": { "a": "-" },
            "finalizers": ["orphan", "foregroundDeletion"],
            "ownerReferences": [{ "apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "" }] } }));
        assert_eq!(wrong[0], "metadata.name: Required value: name or generateName is required");
        assert!(wrong[1].starts_with(r#"metadata.labels: Invalid value: "-": a valid label must"#));
        assert_eq!(wrong[2], r#"metadata.ownerReferences.uid: Invalid value: "": must not be empty"#);
        assert!(wrong[3].contains("cannot be both set"));
    }

    #[test]
    fn what_may_not_change() {
        let old = json!({ "metadata": { "name": "a", "uid": "u", "deletionTimestamp": "t", "finalizers": [] } });
        let mut new = old.clone();
        new["metadata"]["uid"] = json!("v");
        new["metadata"]["finalizers"] = json!(["x.y/z"]);
        let texts: Vec<String> = validate_update(&new, &old).iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "metadata.finalizers: Forbidden: no new finalizers can be added if the object is being deleted, found new finalizers []string{\"x.y/z\"}",
                "metadata.uid: Invalid value: \"v\": field is immutable",
            ]
        );
    }
}
