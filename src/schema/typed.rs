//! What Go's decoder and encoder make of a value of a type, in one pass over any serde source: type errors with Go's texts,
//! unknown and duplicate fields, canonical scalars, zero values dropped or written as the struct tags say.

use std::cell::RefCell;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::keys::{FieldKey, Key, base64_error};
use super::node::{Field, Kind, Schema, TypeId};
use super::{quantity, time};

/// Upstream stops collecting strict errors here.
const MAX_STRICT_ERRORS: usize = 100;

/// What a walk found beside the value.
#[derive(Debug, Default)]
pub struct Findings {
    /// `unknown field "spec.foo"`, `duplicate field "spec.foo"`, in the order of the body, each once.
    pub strict: Vec<String>,
    /// The first error that made the value unusable, in Go's words.
    pub error: Option<String>,
}

/// Decodes a value of type `id`. Strict findings are collected only when `strict`.
///
/// # Errors
/// The source's own error when it is malformed; a value of the wrong type is reported in [`Findings::error`] instead.
pub fn decode<'de, D: Deserializer<'de>>(
    schema: &Schema,
    id: TypeId,
    strict: bool,
    source: D,
) -> Result<(Value, Findings), D::Error> {
    let walk = Walk { schema, strict, found: RefCell::default() };
    let result = Seed { walk: &walk, node: id, path: &Path::Root }.deserialize(source);
    let found = walk.found.into_inner();
    let findings = Findings { strict: found.strict, error: found.fatal.or(found.first) };
    match result {
        Ok(value) => Ok((value, findings)),
        Err(_) if findings.error.is_some() => Ok((Value::Null, findings)),
        Err(error) => Err(error),
    }
}

/// Brings a value into Go form: decodes and encodes it as its type.
///
/// # Errors
/// Go's text for the first value of a wrong type.
pub fn normalize(schema: &Schema, id: TypeId, value: Value) -> Result<Value, String> {
    let (value, findings) = decode(schema, id, false, value).map_err(|e| e.to_string())?;
    findings.error.map_or(Ok(value), Err)
}

/// Go's zero value of a type as its encoder writes it.
pub fn zero(schema: &Schema, id: TypeId) -> Value {
    match schema.kind(id) {
        Kind::String => Value::String(String::new()),
        Kind::Bool => Value::Bool(false),
        Kind::Int32 | Kind::Int64 | Kind::Float64 | Kind::IntOrString => Value::from(0),
        Kind::Quantity => Value::String("0".to_owned()),
        Kind::Struct => {
            let mut map = Map::new();
            fill(schema, id, &mut map);
            Value::Object(map)
        }
        _ => Value::Null,
    }
}

/// Writes the fields that Go always writes and that are not there.
pub(super) fn fill(schema: &Schema, id: TypeId, map: &mut Map<String, Value>) {
    for field in schema.fields(id) {
        if field.always(schema.kind(field.node)) {
            let name = schema.field_name(field);
            if !map.contains_key(name) {
                let value = if field.pointer { Value::Null } else { zero(schema, field.node) };
                map.insert(name.to_owned(), value);
            }
        }
    }
}

struct Walk<'s> {
    schema: &'s Schema,
    strict: bool,
    found: RefCell<Found>,
}

#[derive(Default)]
struct Found {
    strict: Vec<String>,
    /// First wrong type; decoding goes on after it.
    first: Option<String>,
    /// An error of a type with its own decoder; decoding stops at it.
    fatal: Option<String>,
}

/// Where in the body the walk is.
enum Path<'p> {
    Root,
    Field { parent: &'p Path<'p>, owner: TypeId, field: &'p Field },
    Key { parent: &'p Path<'p>, key: &'p str },
    Index { parent: &'p Path<'p>, index: usize },
}

impl Path<'_> {
    /// `spec.containers[0].name`
    fn strict(&self, schema: &Schema, out: &mut String) {
        let (parent, name) = match self {
            Path::Root => return,
            Path::Index { parent, index } => {
                parent.strict(schema, out);
                out.push_str(&format!("[{index}]"));
                return;
            }
            Path::Field { parent, field, .. } => (parent, schema.field_name(field)),
            Path::Key { parent, key } => (parent, *key),
        };
        parent.strict(schema, out);
        if !out.is_empty() {
            out.push('.');
        }
        out.push_str(name);
    }

    /// The struct that holds the innermost field, and the fields down to it, without indexes and map keys.
    fn go(&self, schema: &Schema, names: &mut Vec<String>) -> Option<TypeId> {
        match self {
            Path::Root => None,
            Path::Key { parent, .. } | Path::Index { parent, .. } => parent.go(schema, names),
            Path::Field { parent, owner, field } => {
                parent.go(schema, names);
                if let Some((embedded, _)) = field.embedded {
                    names.push(schema.go_name(embedded).to_owned());
                }
                names.push(schema.field_name(field).to_owned());
                Some(*owner)
            }
        }
    }
}

impl Walk<'_> {
    fn strict_error(&self, what: &str, path: &Path<'_>, name: &str) {
        if !self.strict {
            return;
        }
        let mut full = String::new();
        path.strict(self.schema, &mut full);
        if !full.is_empty() {
            full.push('.');
        }
        full.push_str(name);
        let text = format!("{what} {}", time::quote(&full));
        let strict = &mut self.found.borrow_mut().strict;
        if strict.len() < MAX_STRICT_ERRORS && !strict.contains(&text) {
            strict.push(text);
        }
    }

    fn type_text(&self, path: &Path<'_>, found: &str, wanted: &str) -> String {
        let mut names = Vec::new();
        match path.go(self.schema, &mut names) {
            None => format!("json: cannot unmarshal {found} into Go value of type {wanted}"),
            Some(owner) => {
                let owner = self.schema.go_name(owner);
                format!(
                    "json: cannot unmarshal {found} into Go struct field {owner}.{} of type {wanted}",
                    names.join(".")
                )
            }
        }
    }

    fn save(&self, text: String) {
        self.found.borrow_mut().first.get_or_insert(text);
    }

    fn fatal<E: serde::de::Error>(&self, text: String) -> E {
        self.found.borrow_mut().fatal.get_or_insert(text);
        E::custom("wrong value")
    }
}

#[derive(Clone, Copy)]
struct Seed<'w, 's> {
    walk: &'w Walk<'s>,
    node: TypeId,
    path: &'w Path<'w>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    /// `Null` stands for Go's nil.
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        match self.walk.schema.kind(self.node) {
            Kind::Any | Kind::Raw | Kind::Fields => Value::deserialize(source),
            Kind::SchemaOrBool | Kind::SchemaOrArray | Kind::SchemaOrStrings => {
                self.alternatives(Value::deserialize(source)?)
            }
            _ => source.deserialize_any(self),
        }
    }
}

impl Seed<'_, '_> {
    fn kind(&self) -> Kind {
        self.walk.schema.kind(self.node)
    }

    /// A JSON schema or what may stand for one. Upstream decodes these loosely: what is unknown below them is not reported.
    fn alternatives<E: serde::de::Error>(&self, value: Value) -> Result<Value, E> {
        let schema = self.walk.schema;
        let props = schema.node(self.node).item;
        let one = |value: Value| normalize(schema, props, value).map_err(|e| self.walk.fatal(e));
        match (self.kind(), value) {
            (_, Value::Null) => Ok(Value::Null),
            (_, value @ Value::Object(_)) => one(value),
            (Kind::SchemaOrBool, value @ Value::Bool(_)) => Ok(value),
            (Kind::SchemaOrBool, _) => Err(self.walk.fatal("boolean or JSON schema expected".to_owned())),
            (Kind::SchemaOrArray, Value::Array(items)) => items.into_iter().map(one).collect(),
            (Kind::SchemaOrStrings, Value::Array(items)) if items.iter().all(Value::is_string) => {
                Ok(Value::Array(items))
            }
            (_, other) => self.mismatch(super::decode::json_type(&other)),
        }
    }

    /// A value of another JSON type than the node wants. `found` is Go's name of the JSON type.
    fn mismatch<E: serde::de::Error>(&self, found: &str) -> Result<Value, E> {
        let fatal = |found, wanted| Err(self.walk.fatal(self.walk.type_text(self.path, found, wanted)));
        match self.kind() {
            Kind::Time | Kind::MicroTime => fatal(found.split(' ').next().unwrap_or(found), "string"),
            Kind::IntOrString => fatal(found, "int32"),
            Kind::Quantity => Err(self.walk.fatal(quantity::QuantityError::Format.to_string())),
            _ => {
                let wanted = self.walk.schema.go_type(self.node);
                let text = self.walk.type_text(self.path, found, &wanted);
                self.walk.save(text);
                Ok(Value::Null)
            }
        }
    }

    fn integer<E: serde::de::Error>(&self, number: i128) -> Result<Value, E> {
        let literal = || format!("number {number}");
        match self.kind() {
            Kind::Int32 | Kind::IntOrString => match i32::try_from(number) {
                Ok(n) => Ok(Value::from(n)),
                Err(_) => self.mismatch(&literal()),
            },
            Kind::Int64 => match i64::try_from(number) {
                Ok(n) => Ok(Value::from(n)),
                Err(_) => self.mismatch(&literal()),
            },
            Kind::Float64 => Ok(Value::from(number as f64)),
            Kind::Quantity => self.quantity(&number.to_string()),
            _ => self.mismatch("number"),
        }
    }

    fn quantity<E: serde::de::Error>(&self, text: &str) -> Result<Value, E> {
        quantity::canonical(text).map(Value::String).map_err(|e| self.walk.fatal(e.to_string()))
    }

    /// Scalars with a form of their own. Plain strings never come here.
    fn text<E: serde::de::Error>(&self, text: &str) -> Result<Value, E> {
        let own = |r: Result<String, String>| r.map(Value::String).map_err(|e| self.walk.fatal(e));
        match self.kind() {
            Kind::String | Kind::IntOrString => Ok(Value::String(text.to_owned())),
            Kind::Time => own(time::canonical(text)),
            Kind::MicroTime => own(time::canonical_micro(text)),
            Kind::Quantity => self.quantity(text),
            Kind::Bytes => {
                match base64_error(text) {
                    None => return Ok(Value::String(text.to_owned())),
                    Some(0) if text.contains(['\n', '\r']) => {
                        return Ok(Value::String(text.replace(['\n', '\r'], "")));
                    }
                    Some(at) => self.walk.save(format!("illegal base64 data at input byte {at}")),
                }
                Ok(Value::Null)
            }
            _ => self.mismatch("string"),
        }
    }

    /// Items and map values: Go decodes `null` there to the zero value.
    fn element(&self, node: TypeId, value: Value) -> Value {
        if value.is_null() { zero(self.walk.schema, node) } else { value }
    }

    fn map<'de, A: MapAccess<'de>>(&self, mut access: A) -> Result<Value, A::Error> {
        let schema = self.walk.schema;
        let item = schema.node(self.node).item;
        let mut map = Map::new();
        while let Some(key) = access.next_key_seed(Key)? {
            let path = Path::Key { parent: self.path, key: &key };
            let value = access.next_value_seed(Seed { walk: self.walk, node: item, path: &path })?;
            let value = self.element(item, value);
            if map.contains_key(&key) {
                self.walk.strict_error("duplicate field", self.path, &key);
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }

    fn structure<'de, A: MapAccess<'de>>(&self, mut access: A) -> Result<Value, A::Error> {
        let schema = self.walk.schema;
        let fields = schema.fields(self.node);
        let mut map = Map::new();
        let mut seen = 0u128;
        while let Some(key) = access.next_key_seed(FieldKey { schema, owner: self.node })? {
            let index = match key {
                Ok(index) => index,
                Err(unknown) => {
                    self.walk.strict_error("unknown field", self.path, &unknown);
                    access.next_value::<IgnoredAny>()?;
                    continue;
                }
            };
            let field = &fields[index];
            let name = schema.field_name(field);
            if seen & (1 << (index & 127)) != 0 {
                self.walk.strict_error("duplicate field", self.path, name);
            }
            seen |= 1 << (index & 127);
            let path = Path::Field { parent: self.path, owner: self.node, field };
            let value = access.next_value_seed(Seed { walk: self.walk, node: field.node, path: &path })?;
            // An empty list there is a request to reset it: `managed::update` must see it.
            let reset = name == "managedFields" && value.is_array();
            if !reset && unset(schema, field, &value) {
                map.remove(name);
            } else {
                map.insert(name.to_owned(), value);
            }
        }
        fill(schema, self.node, &mut map);
        Ok(Value::Object(map))
    }
}

/// Go would leave the field out, or write its zero value.
pub(super) fn unset(schema: &Schema, field: &Field, value: &Value) -> bool {
    if value.is_null() || field.pointer {
        return value.is_null();
    }
    if field.omit_empty && empty(schema.kind(field.node), value) {
        return true;
    }
    field.omit_zero && *value == zero(schema, field.node)
}

/// A default would apply: nothing was set, or what stands there is what Go cannot tell from nothing.
pub(super) fn is_zero(schema: &Schema, field: &Field, value: &Value) -> bool {
    value.is_null() || (!field.pointer && empty(schema.kind(field.node), value))
}

fn empty(kind: Kind, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(b) => !b,
        Value::Number(n) => kind != Kind::IntOrString && n.as_f64() == Some(0.0),
        Value::String(s) => matches!(kind, Kind::String | Kind::Bytes) && s.is_empty(),
        Value::Array(items) => kind == Kind::List && items.is_empty(),
        Value::Object(map) => kind == Kind::Map && map.is_empty(),
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.walk.schema.go_type(self.node))
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        if self.kind() == Kind::Bool { Ok(Value::Bool(value)) } else { self.mismatch("bool") }
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        self.integer(i128::from(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        self.integer(i128::from(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        match self.kind() {
            Kind::Float64 => Ok(Value::from(value)),
            Kind::Quantity => self.quantity(&format!("{value}")),
            Kind::Int32 | Kind::Int64 | Kind::IntOrString => self.mismatch(&format!("number {value:?}")),
            _ => self.mismatch("number"),
        }
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.text(value)
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<Value, E> {
        if self.kind() == Kind::String { Ok(Value::String(value)) } else { self.text(&value) }
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        self.deserialize(source)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        if self.kind() != Kind::List {
            let result = self.mismatch("array")?;
            while access.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(result);
        }
        let item = self.walk.schema.node(self.node).item;
        let mut items = Vec::with_capacity(access.size_hint().unwrap_or(0).min(1024));
        loop {
            let path = Path::Index { parent: self.path, index: items.len() };
            let Some(value) = access.next_element_seed(Seed { walk: self.walk, node: item, path: &path })? else {
                break;
            };
            let value = self.element(item, value);
            items.push(value);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        match self.kind() {
            Kind::Struct => self.structure(access),
            Kind::Map => self.map(access),
            _ => {
                let result = self.mismatch("object")?;
                while access.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(result)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;
    use serde_json::json;

    fn read(kind: (&str, &str, &str), body: Value) -> (Value, Findings) {
        let schema = builtin();
        let id = schema.by_gvk(kind.0, kind.1, kind.2).unwrap();
        decode(schema, id, true, body).unwrap()
    }

    #[test]
    fn a_minimal_deployment_takes_go_form() {
        let body = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "labels": {}},
            "spec": {"replicas": 0, "paused": false, "template": {"spec": {"containers": [{"name": "a", "image": "b"}]}}}});
        let (value, findings) = read(("apps", "v1", "Deployment"), body);
        assert!(findings.error.is_none() && findings.strict.is_empty());
        assert_eq!(
            value,
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
                "spec": {"replicas": 0, "selector": null, "strategy": {},
                    "template": {"metadata": {}, "spec": {"containers": [{"name": "a", "image": "b", "resources": {}}]}}},
                "status": {}})
        );
    }

    #[test]
    fn wrong_types_get_gos_texts() {
        let spec = |spec: Value| json!({"spec": spec});
        for (kind, body, text) in [
            (
                ("apps", "v1", "Deployment"),
                spec(json!({"replicas": "3"})),
                "json: cannot unmarshal string into Go struct field DeploymentSpec.spec.replicas of type int32",
            ),
            (
                ("", "v1", "Pod"),
                spec(json!({"containers": {"name": "x"}})),
                "json: cannot unmarshal object into Go struct field PodSpec.spec.containers of type []v1.Container",
            ),
            (
                ("", "v1", "ConfigMap"),
                json!({"data": {"a": 1}}),
                "json: cannot unmarshal number into Go struct field ConfigMap.data of type string",
            ),
            (("", "v1", "Pod"), json!([]), "json: cannot unmarshal array into Go value of type v1.Pod"),
            (
                ("", "v1", "Pod"),
                spec(json!({"restartPolicy": 1})),
                "json: cannot unmarshal number into Go struct field PodSpec.spec.restartPolicy of type v1.RestartPolicy",
            ),
            (
                ("", "v1", "Service"),
                spec(json!({"ports": [{"port": 80, "targetPort": true}]})),
                "json: cannot unmarshal bool into Go struct field ServicePort.spec.ports.targetPort of type int32",
            ),
            (
                ("", "v1", "Pod"),
                spec(json!({"volumes": [{"name": "v", "emptyDir": 1}]})),
                "json: cannot unmarshal number into Go struct field Volume.spec.volumes.VolumeSource.emptyDir of type v1.EmptyDirVolumeSource",
            ),
            (
                ("", "v1", "Pod"),
                spec(json!({"containers": [{"resources": {"limits": {"cpu": "1x"}}}]})),
                "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            ),
            (("", "v1", "Secret"), json!({"data": {"a": "!"}}), "illegal base64 data at input byte 0"),
        ] {
            assert_eq!(read(kind, body).1.error.as_deref(), Some(text));
        }
    }

    #[test]
    fn unknown_fields_are_dropped_and_named_with_their_path() {
        let body = json!({"spec": {"containers": [{"name": "a", "foo": 1}], "bar": {}}, "baz": 1});
        let (value, findings) = read(("", "v1", "Pod"), body);
        assert_eq!(
            findings.strict,
            [r#"unknown field "baz""#, r#"unknown field "spec.bar""#, r#"unknown field "spec.containers[0].foo""#]
        );
        assert!(value["spec"]["bar"].is_null());
    }

    #[test]
    fn duplicates_are_named_once() {
        let schema = builtin();
        let id = schema.by_gvk("", "v1", "ConfigMap").unwrap();
        let body = r#"{"data": {"a": "1", "a": "2", "a": "3"}, "kind": "ConfigMap", "kind": "ConfigMap"}"#;
        let (value, findings) = decode(schema, id, true, &mut serde_json::Deserializer::from_str(body)).unwrap();
        assert_eq!(findings.strict, [r#"duplicate field "data.a""#, r#"duplicate field "kind""#]);
        assert_eq!(value["data"]["a"], "3");
    }

    #[test]
    fn nulls_mean_what_they_mean_to_go() {
        let body = json!({"metadata": {"creationTimestamp": null, "labels": null},
            "spec": {"containers": null, "nodeSelector": {"a": null}, "tolerations": [null]}});
        let (value, _) = read(("", "v1", "Pod"), body);
        assert_eq!(
            value,
            json!({"metadata": {}, "spec": {"containers": null, "nodeSelector": {"a": ""}, "tolerations": [{}]}, "status": {}})
        );
    }

    #[test]
    #[ignore = "a measurement: cargo test --release -- --ignored"]
    fn how_long_a_pod_takes() {
        let schema = builtin();
        let id = schema.by_gvk("", "v1", "Pod").unwrap();
        let container = json!({"name": "app", "image": "registry.local/app:v1", "args": ["--a", "--b"],
            "env": [{"name": "A", "value": "b"}, {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "ports": [{"containerPort": 80, "name": "http"}], "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
            "volumeMounts": [{"name": "v", "mountPath": "/v"}], "livenessProbe": {"httpGet": {"port": 80}}});
        let body = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"a": "b", "c": "d"}},
            "spec": {"containers": [container, container, container], "volumes": [{"name": "v", "emptyDir": {}}],
                "tolerations": [{"key": "a", "operator": "Exists"}], "nodeSelector": {"a": "b"}}});
        let text = serde_json::to_string(&body).unwrap();
        let start = std::time::Instant::now();
        const ROUNDS: u32 = 2000;
        for _ in 0..ROUNDS {
            let mut source = serde_json::Deserializer::from_str(&text);
            let (mut value, _) = decode(schema, id, true, &mut source).unwrap();
            crate::schema::default::apply(schema, id, &mut value);
            assert!(value.is_object());
        }
        println!("{} bytes: {:?} each", text.len(), start.elapsed() / ROUNDS);
    }
}
