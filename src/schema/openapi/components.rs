//! `components.schemas`: each type of the table as OpenAPI v3 writes it.

use std::collections::{BTreeSet, HashMap};

use serde_json::{Map, Value, json};

use super::descriptions::Descriptions;
use crate::apiserver::resources::Resource;
use crate::schema::node::{Field, Kind, ListType, Schema, Text, TypeId};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";
const PATCH: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Patch";
/// Kinds of every group and version.
const COMMON: [&str; 4] = ["DeleteOptions", "Status", "WatchEvent", "APIResourceList"];

/// OpenAPI names of the scalars that have a schema of their own.
fn scalar_name(kind: Kind) -> Option<&'static str> {
    Some(match kind {
        Kind::Time => "io.k8s.apimachinery.pkg.apis.meta.v1.Time",
        Kind::MicroTime => "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime",
        Kind::Fields => "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1",
        Kind::Quantity => "io.k8s.apimachinery.pkg.api.resource.Quantity",
        Kind::IntOrString => "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
        Kind::Raw => "io.k8s.apimachinery.pkg.runtime.RawExtension",
        Kind::Any => "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON",
        Kind::SchemaOrBool => "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool",
        Kind::SchemaOrArray => "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray",
        Kind::SchemaOrStrings => {
            "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray"
        }
        _ => return None,
    })
}

fn scalar_schema(name: &str) -> Option<Value> {
    let last = name.rsplit('.').next().unwrap_or_default();
    Some(match last {
        "Time" | "MicroTime" => json!({"format": "date-time", "type": "string"}),
        "Quantity" => json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
        "IntOrString" => json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]}),
        "FieldsV1" | "RawExtension" | "Patch" => json!({"type": "object"}),
        _ => return None,
    })
}

/// OpenAPI names of what the paths of a group and version refer to.
pub fn roots(schema: &Schema, group: &str, version: &str, rows: &[&Resource]) -> BTreeSet<String> {
    let writer = Names::new(schema);
    let mut roots: BTreeSet<String> = COMMON.iter().map(|n| format!("{META}{n}")).collect();
    roots.insert(PATCH.to_owned());
    for row in rows {
        let list = format!("{}List", row.kind);
        let own = [(group, version, row.kind.as_ref()), (group, version, list.as_str())];
        let below = row.subresources.iter().filter(|s| !s.kind.is_empty()).map(|s| {
            let inherits = s.group.is_empty() && s.version.is_empty();
            if inherits { (group, version, s.kind) } else { (s.group, s.version, s.kind) }
        });
        let ids = own.into_iter().chain(below).filter_map(|(g, v, k)| schema.by_gvk(g, v, k));
        roots.extend(ids.filter_map(|id| writer.of(id)));
    }
    roots
}

/// OpenAPI names of struct types, also of the copies that a field made atomic.
pub struct Names<'s> {
    schema: &'s Schema,
    names: HashMap<Text, (&'s str, &'s str)>,
}

impl<'s> Names<'s> {
    pub fn new(schema: &'s Schema) -> Names<'s> {
        let names = schema.structs().map(|(prefix, name, id)| (schema.node(id).name, (prefix, name))).collect();
        Names { schema, names }
    }

    pub fn of(&self, id: TypeId) -> Option<String> {
        let node = self.schema.node(id);
        if node.kind != Kind::Struct {
            return scalar_name(node.kind).map(str::to_owned);
        }
        self.names.get(&node.name).map(|(prefix, name)| format!("{prefix}.{name}"))
    }
}

pub struct Components<'s> {
    schema: &'s Schema,
    names: Names<'s>,
    texts: Descriptions,
    group: &'s str,
    version: &'s str,
}

impl<'s> Components<'s> {
    pub fn new(schema: &'s Schema, group: &'s str, version: &'s str) -> Components<'s> {
        Components { schema, names: Names::new(schema), texts: Descriptions::read(), group, version }
    }

    /// All types that the roots refer to, themselves included.
    pub fn reachable(&self, roots: &BTreeSet<String>) -> BTreeSet<String> {
        let mut all = roots.clone();
        let mut open: Vec<String> = roots.iter().cloned().collect();
        while let Some(name) = open.pop() {
            let Some(id) = self.schema.by_name(&name) else { continue };
            for field in self.schema.fields(id) {
                let mut node = field.node;
                while let Some(item) = self.schema.item(node) {
                    node = item;
                }
                if let Some(name) = self.names.of(node)
                    && all.insert(name.clone())
                {
                    open.push(name);
                }
            }
        }
        all
    }

    /// The schema of a type by its OpenAPI name.
    pub fn schema_of(&self, name: &str) -> Value {
        let (own, texts) = self.texts.of(name);
        let mut out = match (scalar_schema(name), self.schema.by_name(name)) {
            (Some(scalar), _) => scalar,
            (None, Some(id)) => self.structure(name, id, &texts),
            (None, None) => json!({}),
        };
        if let (Some(text), Some(map)) = (own, out.as_object_mut()) {
            map.insert("description".to_owned(), text.into());
        }
        out
    }

    fn structure(&self, name: &str, id: TypeId, texts: &HashMap<&str, String>) -> Value {
        let mut out = Map::new();
        let fields = self.schema.fields(id);
        let properties: Map<String, Value> = fields
            .iter()
            .map(|f| {
                let name = self.schema.field_name(f);
                (name.to_owned(), self.property(f, texts.get(name)))
            })
            .collect();
        if !properties.is_empty() {
            out.insert("properties".to_owned(), Value::Object(properties));
        }
        let required: Vec<&str> = fields.iter().filter(|f| f.required).map(|f| self.schema.field_name(f)).collect();
        if !required.is_empty() {
            out.insert("required".to_owned(), json!(required));
        }
        out.insert("type".to_owned(), "object".into());
        if self.schema.node(id).atomic {
            out.insert("x-kubernetes-map-type".to_owned(), "atomic".into());
        }
        let kinds = self.schema.kinds().filter(|k| k.3 == id);
        let mut kinds: Vec<Value> = kinds.map(|(g, v, k, _)| json!({"group": g, "kind": k, "version": v})).collect();
        if matches!(name.strip_prefix(META), Some("DeleteOptions" | "WatchEvent")) {
            let kind = name.rsplit('.').next().unwrap_or_default();
            kinds = vec![json!({"group": self.group, "kind": kind, "version": self.version})];
        }
        if !kinds.is_empty() {
            out.insert("x-kubernetes-group-version-kind".to_owned(), Value::Array(kinds));
        }
        Value::Object(out)
    }

    fn property(&self, field: &Field, text: Option<&String>) -> Value {
        let mut out = self.type_of(field.node);
        let kind = self.schema.kind(field.node);
        let default = match self.schema.field_default(field).filter(|_| field.default_public) {
            Some(default) => Some(default.clone()),
            None if field.pointer => None,
            None => zero_default(kind, field.omit_empty),
        };
        if let Some(reference) = out.remove("$ref") {
            // A reference stands alone; what is said beside it needs the wrapper.
            let reference = json!({ "$ref": reference });
            if text.is_none() && default.is_none() {
                return reference;
            }
            out.insert("allOf".to_owned(), json!([reference]));
        }
        if let Some(default) = default {
            out.insert("default".to_owned(), default);
        }
        if let Some(text) = text {
            out.insert("description".to_owned(), text.as_str().into());
        }
        let mut put = |key: &str, value: Value| out.insert(format!("x-kubernetes-{key}"), value);
        let node = self.schema.node(field.node);
        if node.kind == Kind::List {
            match node.list_type {
                ListType::Set => put("list-type", "set".into()),
                ListType::Map => {
                    put("list-map-keys", self.schema.list_keys(field.node).collect());
                    put("list-type", "map".into())
                }
                ListType::Atomic if field.atomic_list => put("list-type", "atomic".into()),
                ListType::Atomic => None,
            };
        }
        if node.kind == Kind::Map && node.atomic {
            put("map-type", "atomic".into());
        }
        let patch = field.patch;
        let names = [("merge", patch.merge), ("replace", patch.replace), ("retainKeys", patch.retain_keys)];
        let names: Vec<&str> = names.into_iter().filter(|(_, on)| *on).map(|(name, _)| name).collect();
        if !names.is_empty() {
            put("patch-strategy", names.join(",").into());
        }
        if !self.schema.merge_key(field).is_empty() {
            put("patch-merge-key", self.schema.merge_key(field).into());
        }
        Value::Object(out)
    }

    fn type_of(&self, id: TypeId) -> Map<String, Value> {
        let plain = |kind: &str, format: &str| {
            let mut map = Map::new();
            map.insert("type".to_owned(), kind.into());
            if !format.is_empty() {
                map.insert("format".to_owned(), format.into());
            }
            map
        };
        let kind = self.schema.kind(id);
        match kind {
            Kind::String => plain("string", ""),
            Kind::Bool => plain("boolean", ""),
            Kind::Int32 => plain("integer", "int32"),
            Kind::Int64 => plain("integer", "int64"),
            Kind::Float64 => plain("number", "double"),
            Kind::Bytes => plain("string", "byte"),
            Kind::List | Kind::Map => {
                let (wrapper, key) =
                    if kind == Kind::List { ("array", "items") } else { ("object", "additionalProperties") };
                let mut map = plain(wrapper, "");
                if let Some(item) = self.schema.item(id) {
                    map.insert(key.to_owned(), self.item(item));
                }
                map
            }
            _ => {
                let mut map = Map::new();
                let name = self.names.of(id).unwrap_or_default();
                map.insert("$ref".to_owned(), format!("#/components/schemas/{name}").into());
                map
            }
        }
    }

    fn item(&self, id: TypeId) -> Value {
        let mut out = self.type_of(id);
        let Some(default) = zero_default(self.schema.kind(id), false) else { return Value::Object(out) };
        if let Some(reference) = out.remove("$ref") {
            out.insert("allOf".to_owned(), json!([{ "$ref": reference }]));
        }
        out.insert("default".to_owned(), default);
        Value::Object(out)
    }
}

/// The default that upstream's generator shows for a value that is not a pointer.
fn zero_default(kind: Kind, omit_empty: bool) -> Option<Value> {
    match kind {
        Kind::Struct => Some(json!({})),
        Kind::String if !omit_empty => Some("".into()),
        Kind::Bool if !omit_empty => Some(false.into()),
        Kind::Int32 | Kind::Int64 | Kind::Float64 if !omit_empty => Some(0.into()),
        _ => None,
    }
}
