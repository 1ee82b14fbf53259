//! Pods from templates, and the hash and comparison of templates.

use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde_json::{Map, Value, json};

use super::object::Object;
use super::resource::Resource;

/// Label that holds a template's hash.
pub const POD_TEMPLATE_HASH: &str = "pod-template-hash";

/// Alphabet of hashes and random suffixes: no vowels (and nothing like them), so that no words appear.
const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

/// The reference by which `object` controls others.
pub fn controller_reference(resource: &Resource, object: &Object) -> OwnerReference {
    OwnerReference {
        api_version: resource.api_version(),
        kind: resource.kind.to_string(),
        name: object.key.name().to_owned(),
        uid: object.uid.to_string(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// A pod as a template asks for it; `name` is exact, `prefix` lets the API complete it.
pub fn pod(
    template: &PodTemplateSpec,
    name: PodName<'_>,
    namespace: &str,
    owner: &OwnerReference,
) -> Result<Value, serde_json::Error> {
    let mut metadata = Map::new();
    match name {
        PodName::Exact(name) => metadata.insert("name".to_owned(), json!(name)),
        PodName::Prefix(prefix) => metadata.insert("generateName".to_owned(), json!(format!("{prefix}-"))),
    };
    metadata.insert("namespace".to_owned(), json!(namespace));
    if let Some(source) = &template.metadata {
        for (field, value) in [("labels", &source.labels), ("annotations", &source.annotations)] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                metadata.insert(field.to_owned(), serde_json::to_value(value)?);
            }
        }
        if let Some(finalizers) = source.finalizers.as_ref().filter(|finalizers| !finalizers.is_empty()) {
            metadata.insert("finalizers".to_owned(), json!(finalizers));
        }
    }
    metadata.insert("ownerReferences".to_owned(), json!([serde_json::to_value(owner)?]));
    Ok(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template.spec}))
}

/// How a pod is to be named.
#[derive(Clone, Copy, Debug)]
pub enum PodName<'a> {
    /// Exactly so.
    Exact(&'a str),
    /// `<prefix>-` and a random suffix.
    Prefix(&'a str),
}

/// A stable hash of any JSON, spelled so that it can be part of a name. `collisions` makes it another one.
pub fn hash(value: &Value, collisions: Option<i32>) -> String {
    let mut hash = Fnv::default();
    hash_value(value, &mut hash);
    if let Some(collisions) = collisions {
        hash.write(&collisions.to_le_bytes());
    }
    safe_encode(&hash.0.to_string())
}

/// Spells decimal digits (and anything else) in the alphabet of safe names.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|byte| char::from(ALPHABET[usize::from(byte) % ALPHABET.len()])).collect()
}

/// A template without the hash label, in the form that is hashed and compared: nothing empty, nothing null.
pub fn canonical(template: &PodTemplateSpec) -> Result<Value, serde_json::Error> {
    let mut value = serde_json::to_value(template)?;
    if let Some(labels) = value.pointer_mut("/metadata/labels").and_then(Value::as_object_mut) {
        labels.remove(POD_TEMPLATE_HASH);
    }
    Ok(without_empty(value).unwrap_or(Value::Null))
}

/// Drops nulls and empty lists and maps: Go's encoders do not tell them from absent ones.
pub fn without_empty(value: Value) -> Option<Value> {
    match value {
        Value::Null => None,
        Value::Array(items) if items.is_empty() => None,
        Value::Array(items) => {
            Some(Value::Array(items.into_iter().map(|item| without_empty(item).unwrap_or(Value::Null)).collect()))
        }
        Value::Object(fields) => {
            let fields: Map<String, Value> =
                fields.into_iter().filter_map(|(name, value)| Some((name, without_empty(value)?))).collect();
            (!fields.is_empty()).then_some(Value::Object(fields))
        }
        other => Some(other),
    }
}

/// FNV-1a, 32 bits: small, stable, good enough where collisions are handled.
struct Fnv(u32);

impl Default for Fnv {
    fn default() -> Fnv {
        Fnv(0x811c_9dc5)
    }
}

impl Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
        }
    }
}

fn hash_value(value: &Value, hash: &mut Fnv) {
    match value {
        Value::Object(fields) => {
            hash.write(b"{");
            let mut names: Vec<&String> = fields.keys().collect();
            names.sort();
            for name in names {
                hash.write(name.as_bytes());
                hash.write(b":");
                hash_value(&fields[name], hash);
            }
            hash.write(b"}");
        }
        Value::Array(items) => {
            hash.write(b"[");
            for item in items {
                hash_value(item, hash);
                hash.write(b",");
            }
            hash.write(b"]");
        }
        scalar => hash.write(scalar.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_depend_on_content_not_on_order_or_empty_fields() {
        let template = |json: &str| canonical(&serde_json::from_str::<PodTemplateSpec>(json).unwrap()).unwrap();
        let one = template(
            r#"{"metadata":{"labels":{"a":"1","pod-template-hash":"x"}},"spec":{"containers":[{"name":"c","args":[]}]}}"#,
        );
        let same =
            template(r#"{"spec":{"containers":[{"name":"c"}],"securityContext":{}},"metadata":{"labels":{"a":"1"}}}"#);
        let other = template(r#"{"spec":{"containers":[{"name":"d"}]},"metadata":{"labels":{"a":"1"}}}"#);
        assert_eq!(one, same);
        assert_eq!(hash(&one, None), hash(&same, None));
        assert_ne!(hash(&one, None), hash(&other, None));
        assert_ne!(hash(&one, None), hash(&one, Some(1)));
        assert!(hash(&one, None).bytes().all(|byte| ALPHABET.contains(&byte)));
    }
}
