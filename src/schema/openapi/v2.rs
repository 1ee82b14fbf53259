//! The OpenAPI v2 document: all groups and versions in one, made of the same paths and types as v3's documents. Clients
//! that find a kind in no v3 document look for it here.

use std::collections::BTreeSet;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Map, Value, json};

use super::components::{self, Components};
use super::paths::Paths;
use super::{Stream, gnostic};
use crate::apiserver::resources::Resource;
use crate::schema::node::Schema;

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";
/// Kinds that belong to every group and version.
const EVERYWHERE: [&str; 2] = ["DeleteOptions", "WatchEvent"];

/// A group and version with the resources it serves.
pub struct GroupVersion<'a> {
    /// Empty for the core group.
    pub group: &'a str,
    /// Version.
    pub version: &'a str,
    /// What it serves.
    pub rows: Vec<&'a Resource>,
}

struct Document<'a> {
    schema: &'a Schema,
    versions: &'a [GroupVersion<'a>],
}

/// The document as JSON.
pub fn json(schema: &Schema, versions: &[GroupVersion<'_>]) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 << 20);
    match (Document { schema, versions }).serialize(&mut serde_json::Serializer::new(&mut out)) {
        Ok(()) => out,
        // Writing strings and maps to memory does not fail.
        Err(_) => Vec::new(),
    }
}

/// The document as protobuf, in the message types of gnostic.
pub fn protobuf(schema: &Schema, versions: &[GroupVersion<'_>]) -> Vec<u8> {
    let document = Document { schema, versions };
    gnostic::document(&document.head(), document.paths(), document.definitions())
}

impl Document<'_> {
    fn head(&self) -> Value {
        json!({
            "swagger": "2.0",
            "info": {"title": "Kubernetes", "version": concat!("coracle-", env!("CARGO_PKG_VERSION"))},
            "securityDefinitions": {"BearerToken": {"description": "Bearer Token authentication", "in": "header",
                "name": "authorization", "type": "apiKey"}},
            "security": [{"BearerToken": []}],
        })
    }

    fn paths(&self) -> impl Iterator<Item = (String, Value)> + '_ {
        self.versions.iter().flat_map(|one| {
            let paths = Paths { schema: self.schema, group: one.group, version: one.version };
            let all: Vec<_> =
                std::iter::once(paths.root()).chain(one.rows.iter().flat_map(|row| paths.of(row))).collect();
            all.into_iter().map(|(path, item)| (path, path_item(item)))
        })
    }

    fn definitions(&self) -> impl Iterator<Item = (String, Value)> + '_ {
        let writer = Components::new(self.schema, "", "v1");
        let mut roots = BTreeSet::new();
        for one in self.versions {
            roots.extend(components::roots(self.schema, one.group, one.version, &one.rows));
        }
        writer.reachable(&roots).into_iter().map(move |name| {
            let mut definition = schema(writer.schema_of(&name));
            if let Some(kind) = EVERYWHERE.iter().find(|kind| name.strip_prefix(META) == Some(**kind)) {
                let kinds = self.versions.iter().map(|v| json!({"group": v.group, "kind": kind, "version": v.version}));
                definition["x-kubernetes-group-version-kind"] = kinds.collect();
            }
            (name, definition)
        })
    }
}

impl Serialize for Document<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        for (key, value) in self.head().as_object().into_iter().flatten() {
            map.serialize_entry(key, value)?;
        }
        map.serialize_entry("paths", &Stream(|| self.paths()))?;
        map.serialize_entry("definitions", &Stream(|| self.definitions()))?;
        map.end()
    }
}

/// A schema of v3 as v2 has it: without defaults and alternatives, references bare.
fn schema(value: Value) -> Value {
    let Value::Object(mut map) = value else { return value };
    map.remove("default");
    if map.remove("oneOf").is_some() {
        map.insert("type".to_owned(), "string".into());
    }
    if let Some(Value::Array(all)) = map.remove("allOf")
        && let Some(Value::Object(only)) = all.into_iter().next()
    {
        map.extend(only);
    }
    if let Some(Value::String(reference)) = map.get_mut("$ref") {
        *reference = reference.replace("#/components/schemas/", "#/definitions/");
    }
    for key in ["items", "additionalProperties"] {
        if let Some(inner) = map.get_mut(key) {
            *inner = schema(inner.take());
        }
    }
    if let Some(Value::Object(properties)) = map.get_mut("properties") {
        properties.values_mut().for_each(|property| *property = schema(property.take()));
    }
    Value::Object(map)
}

fn path_item(item: Value) -> Value {
    let Value::Object(item) = item else { return item };
    let convert = |(key, value): (String, Value)| match key.as_str() {
        "parameters" => (key, parameters(value)),
        _ => (key, operation(value)),
    };
    item.into_iter().map(convert).collect::<Map<_, _>>().into()
}

fn parameters(value: Value) -> Value {
    let Value::Array(all) = value else { return value };
    let flat = |mut parameter: Value| {
        if let Some(Value::Object(schema)) = parameter.as_object_mut().and_then(|map| map.remove("schema"))
            && let Some(map) = parameter.as_object_mut()
        {
            map.extend(schema);
        }
        parameter
    };
    all.into_iter().map(flat).collect()
}

/// The media types of a `content`, and the schema that all of them have.
fn content(value: &mut Value) -> (Vec<Value>, Value) {
    let Some(map) = value.get_mut("content").and_then(Value::as_object_mut) else { return (Vec::new(), Value::Null) };
    let media = map.keys().map(|key| json!(key)).collect();
    let first = map.values_mut().next().map(|media| media["schema"].take()).unwrap_or_default();
    (media, schema(first))
}

fn operation(value: Value) -> Value {
    let Value::Object(mut map) = value else { return value };
    let mut given = match map.remove("parameters").map(parameters) {
        Some(Value::Array(given)) => given,
        _ => Vec::new(),
    };
    let mut consumes = vec![json!("*/*")];
    if let Some(mut body) = map.remove("requestBody") {
        let (media, schema) = content(&mut body);
        consumes = media;
        let mut parameter = json!({"in": "body", "name": "body", "schema": schema});
        if body["required"] == true {
            parameter["required"] = true.into();
        }
        given.insert(0, parameter);
    }
    let mut produces = Vec::new();
    if let Some(Value::Object(responses)) = map.get_mut("responses") {
        for response in responses.values_mut() {
            let (media, schema) = content(response);
            let mut flat = json!({"description": response["description"].take()});
            if !schema.is_null() {
                flat["schema"] = schema;
                produces = media;
            }
            *response = flat;
        }
    }
    map.insert("consumes".to_owned(), consumes.into());
    map.insert("produces".to_owned(), produces.into());
    map.insert("schemes".to_owned(), json!(["https"]));
    if !given.is_empty() {
        map.insert("parameters".to_owned(), given.into());
    }
    Value::Object(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;
    use crate::schema::builtin;

    fn apps() -> Vec<GroupVersion<'static>> {
        let rows = RESOURCES.iter().filter(|row| row.group == "apps").map(|row| &**row).collect();
        vec![GroupVersion { group: "apps", version: "v1", rows }]
    }

    #[test]
    fn references_are_bare_and_resolve_and_nothing_of_v3_is_left() {
        let document: Value = serde_json::from_slice(&json(builtin(), &apps())).unwrap();
        fn walk(value: &Value, definitions: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(name) = map.get("$ref").and_then(Value::as_str) {
                        assert!(definitions.get(name.strip_prefix("#/definitions/").unwrap()).is_some(), "{name}");
                    }
                    for key in ["oneOf", "allOf", "requestBody", "content"] {
                        assert!(!map.contains_key(key) || definitions.get(key).is_some(), "{key} in {map:?}");
                    }
                    map.iter().filter(|(key, _)| *key != "properties").for_each(|(_, v)| walk(v, definitions));
                    if let Some(Value::Object(properties)) = map.get("properties") {
                        properties.values().for_each(|v| walk(v, definitions));
                    }
                }
                Value::Array(items) => items.iter().for_each(|v| walk(v, definitions)),
                _ => {}
            }
        }
        walk(&document, &document["definitions"]);
        let quantity = &document["definitions"]["io.k8s.apimachinery.pkg.api.resource.Quantity"];
        assert_eq!(quantity["type"], "string");
        let post = &document["paths"]["/apis/apps/v1/namespaces/{namespace}/deployments"]["post"];
        assert_eq!(post["parameters"][0]["name"], "body");
        assert_eq!(post["responses"]["200"]["schema"]["$ref"], "#/definitions/io.k8s.api.apps.v1.Deployment");
    }

    #[test]
    fn both_forms_hold_the_same_paths() {
        let document: Value = serde_json::from_slice(&json(builtin(), &apps())).unwrap();
        let bytes = protobuf(builtin(), &apps());
        for path in document["paths"].as_object().unwrap().keys() {
            assert!(bytes.windows(path.len()).any(|window| window == path.as_bytes()), "{path}");
        }
    }
}
