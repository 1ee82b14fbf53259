//! OpenAPI v3 documents, one per group and version, and v2's single one ([`v2`], [`gnostic`]), written from the table and
//! the rows of `RESOURCES`.
//!
//! ```ignore
//! let rows: Vec<&Resource> = RESOURCES.iter().filter(|r| r.group == "apps" && r.serves("v1")).map(|r| &**r).collect();
//! let body: Vec<u8> = openapi::document(schema::builtin(), "apps", "v1", &rows);
//! ```
//! A document is up to 2 MB and takes some ten milliseconds: keep it compressed if at all, and let clients cache it by
//! [`hash`] (`/openapi/v3/apis/apps/v1?hash=...`, immutable).

mod components;
mod descriptions;
mod gnostic;
mod paths;
pub mod v2;

use std::sync::LazyLock;

use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use serde_json::{Value, json};

use super::node::Schema;
use crate::apiserver::resources::Resource;

/// The document of a group and version. `rows` are the resources that it serves.
pub fn document(schema: &Schema, group: &str, version: &str, rows: &[&Resource]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 << 20);
    let document = Document { schema, group, version, rows };
    match document.serialize(&mut serde_json::Serializer::new(&mut out)) {
        Ok(()) => out,
        // Writing strings and maps to memory does not fail.
        Err(_) => Vec::new(),
    }
}

/// Changes when the document does: upper-case hex as upstream.
pub fn hash(group: &str, version: &str, rows: &[&Resource]) -> String {
    use sha2::{Digest, Sha256};
    static TABLE: LazyLock<Sha256> =
        LazyLock::new(|| Sha256::new_with_prefix(concat!(env!("CARGO_PKG_VERSION"), include_str!("../table.txt"))));
    let mut digest = TABLE.clone();
    digest.update(format!("{group}/{version}"));
    for row in rows {
        digest.update(format!("\n{} {:?} {:?}", row.plural, row.verbs, row.subresources));
    }
    digest.finalize().iter().map(|b| format!("{b:02X}")).collect()
}

/// A short name of a text that changes when the text does.
pub fn digest(text: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(text).iter().map(|b| format!("{b:02X}")).collect()
}

/// `api/v1`, `apis/apps/v1`: the path below `/openapi/v3/`.
pub fn document_path(group: &str, version: &str) -> String {
    if group.is_empty() { format!("api/{version}") } else { format!("apis/{group}/{version}") }
}

struct Document<'a> {
    schema: &'a Schema,
    group: &'a str,
    version: &'a str,
    rows: &'a [&'a Resource],
}

/// A map whose entries are made one by one while it is written, so that a large document is never held as a tree.
struct Stream<F>(F);

impl<F, I> Serialize for Stream<F>
where
    F: Fn() -> I,
    I: Iterator<Item = (String, Value)>,
{
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        for (key, value) in (self.0)() {
            map.serialize_entry(&key, &value)?;
        }
        map.end()
    }
}

struct Components<'a>(&'a Document<'a>);

impl Serialize for Components<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let document = self.0;
        let writer = components::Components::new(document.schema, document.group, document.version);
        let roots = components::roots(document.schema, document.group, document.version, document.rows);
        let names = writer.reachable(&roots);
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("schemas", &Stream(|| names.iter().map(|n| (n.clone(), writer.schema_of(n)))))?;
        let bearer = json!({"BearerToken": {"description": "Bearer Token authentication", "in": "header",
            "name": "authorization", "type": "apiKey"}});
        map.serialize_entry("securitySchemes", &bearer)?;
        map.end()
    }
}

impl Serialize for Document<'_> {
    fn serialize<S: Serializer>(&self, out: S) -> Result<S::Ok, S::Error> {
        let mut map = out.serialize_map(None)?;
        map.serialize_entry("components", &Components(self))?;
        map.serialize_entry("info", &json!({"title": "Kubernetes", "version": "unversioned"}))?;
        map.serialize_entry("openapi", "3.0.0")?;
        let paths = paths::Paths { schema: self.schema, group: self.group, version: self.version };
        let all = || std::iter::once(paths.root()).chain(self.rows.iter().flat_map(|row| paths.of(row)));
        map.serialize_entry("paths", &Stream(all))?;
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;
    use crate::schema::builtin;

    fn read(group: &str, version: &str) -> Value {
        let rows: Vec<&Resource> =
            RESOURCES.iter().filter(|r| r.group == group && r.serves(version)).map(|r| &**r).collect();
        serde_json::from_slice(&document(builtin(), group, version, &rows)).unwrap()
    }

    fn all() -> std::collections::BTreeSet<(String, String)> {
        let versions =
            |r: &Resource| r.versions.iter().map(|v| (r.group.to_string(), v.to_string())).collect::<Vec<_>>();
        RESOURCES.iter().flat_map(|r| versions(r)).collect()
    }

    #[test]
    fn a_patch_lists_what_kubectl_looks_for() {
        let document = read("apps", "v1");
        let path = "/apis/apps/v1/namespaces/{namespace}/deployments/{name}";
        let patch = &document["paths"][path]["patch"];
        assert!(patch["requestBody"]["content"].get("application/strategic-merge-patch+json").is_some());
        let parameters: Vec<&str> =
            patch["parameters"].as_array().unwrap().iter().map(|p| p["name"].as_str().unwrap()).collect();
        assert_eq!(parameters, ["dryRun", "fieldManager", "fieldValidation", "force"]);
        assert_eq!(
            patch["x-kubernetes-group-version-kind"],
            json!({"group": "apps", "kind": "Deployment", "version": "v1"})
        );
    }

    #[test]
    fn schemas_carry_types_extensions_and_texts() {
        let document = read("", "v1");
        let schemas = &document["components"]["schemas"];
        let container = &schemas["io.k8s.api.core.v1.Container"];
        assert!(container["description"].as_str().unwrap().starts_with("A single application container"));
        let ports = &container["properties"]["ports"];
        assert_eq!(ports["x-kubernetes-list-map-keys"], json!(["containerPort", "protocol"]));
        assert_eq!(ports["x-kubernetes-patch-merge-key"], "containerPort");
        assert_eq!(container["required"], json!(["name"]));
        let pod = &schemas["io.k8s.api.core.v1.Pod"];
        assert_eq!(pod["x-kubernetes-group-version-kind"], json!([{"group": "", "kind": "Pod", "version": "v1"}]));
        assert_eq!(
            pod["properties"]["spec"]["allOf"],
            json!([{"$ref": "#/components/schemas/io.k8s.api.core.v1.PodSpec"}])
        );
    }

    #[test]
    fn every_reference_resolves() {
        fn walk(value: &Value, schemas: &Value) {
            match value {
                Value::Object(map) => {
                    if let Some(name) = map.get("$ref").and_then(Value::as_str) {
                        let name = name.strip_prefix("#/components/schemas/").unwrap();
                        assert!(schemas.get(name).is_some(), "{name}");
                    }
                    map.values().for_each(|v| walk(v, schemas));
                }
                Value::Array(items) => items.iter().for_each(|v| walk(v, schemas)),
                _ => {}
            }
        }
        for (group, version) in all() {
            let document = read(&group, &version);
            walk(&document, &document["components"]["schemas"]);
        }
    }

    #[test]
    #[ignore = "writes the documents for a comparison with upstream's: OPENAPI_OUT=dir"]
    fn dump() {
        let folder = std::env::var("OPENAPI_OUT").unwrap();
        for (group, version) in all() {
            let name = document_path(&group, &version).replace('/', "__");
            let path = std::path::Path::new(&folder).join(format!("{name}_openapi.json"));
            std::fs::write(path, read(&group, &version).to_string()).unwrap();
        }
    }
}
