//! Walking pod specs in JSON.

use serde_json::Value;

/// Annotation of mirror pods.
pub const MIRROR: &str = "kubernetes.io/config.mirror";

/// The items of a list; nothing when it is missing.
pub fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Containers of all kinds with the name of their list.
pub fn containers(spec: &Value) -> impl Iterator<Item = (&'static str, &Value)> {
    ["initContainers", "containers", "ephemeralContainers"]
        .into_iter()
        .flat_map(|list| items(&spec[list]).map(move |container| (list, container)))
}

/// Init and ordinary containers, to be changed.
pub fn containers_mut(spec: &mut Value) -> impl Iterator<Item = &mut Value> {
    let Some(spec) = spec.as_object_mut() else { return Vec::new().into_iter() };
    let mut all = Vec::new();
    for (key, list) in spec.iter_mut() {
        if key == "initContainers" || key == "containers" {
            all.extend(list.as_array_mut().into_iter().flatten());
        }
    }
    all.into_iter()
}

/// Appends to a list, making it when it is missing.
pub fn push(object: &mut Value, list: &str, item: Value) {
    match &mut object[list] {
        Value::Array(items) => items.push(item),
        other => *other = Value::Array(vec![item]),
    }
}

pub fn is_mirror(pod: &Value) -> bool {
    pod["metadata"]["annotations"].get(MIRROR).is_some()
}

/// Text of a field; empty when it is missing.
pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}
