//! Values to messages.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::wire::Writer;
use crate::schema::node::{Kind, Schema, Text, TypeId};
use crate::schema::time;

pub fn message(schema: &Schema, id: TypeId, value: &Value) -> Vec<u8> {
    let mut out = Writer::default();
    if let Value::Object(map) = value {
        Encoder { schema }.fields(id, map, &mut out);
    }
    out.into_bytes()
}

struct Encoder<'s> {
    schema: &'s Schema,
}

impl Encoder<'_> {
    /// Fields in the order of their numbers, as Go writes them.
    fn fields(&self, id: TypeId, map: &Map<String, Value>, out: &mut Writer) {
        let mut present: Vec<(u32, Option<TypeId>, TypeId, &Value)> = Vec::with_capacity(map.len());
        for field in self.schema.fields(id) {
            let Some(value) = map.get(self.schema.field_name(field)).filter(|v| !v.is_null()) else { continue };
            match field.embedded {
                Some((inner, tag)) if tag > 0 => {
                    let number = u32::from(tag);
                    if !present.iter().any(|p| p.0 == number) {
                        present.push((number, Some(inner), inner, value));
                    }
                }
                _ if field.tag > 0 => present.push((u32::from(field.tag), None, field.node, value)),
                _ => {}
            }
        }
        present.sort_by_key(|p| p.0);
        for (number, embedded, node, value) in present {
            match embedded {
                Some(inner) => {
                    let mut below = Writer::default();
                    self.fields(inner, map, &mut below);
                    out.bytes(number, &below.into_bytes());
                }
                None => self.value(node, number, value, out),
            }
        }
    }

    fn value(&self, id: TypeId, number: u32, value: &Value, out: &mut Writer) {
        let node = self.schema.node(id);
        match (node.kind, value) {
            (Kind::String, Value::String(text)) => out.bytes(number, text.as_bytes()),
            (Kind::Bool, Value::Bool(on)) => out.varint(number, i64::from(*on)),
            (Kind::Int32 | Kind::Int64, Value::Number(n)) => out.varint(number, n.as_i64().unwrap_or_default()),
            (Kind::Float64, Value::Number(n)) => out.double(number, n.as_f64().unwrap_or_default()),
            (Kind::Bytes, Value::String(text)) => out.bytes(number, &STANDARD.decode(text).unwrap_or_default()),
            (Kind::List, Value::Array(items)) => {
                if node.name != Text::default() && self.schema.kind(node.item) == Kind::String {
                    let mut below = Writer::default();
                    items.iter().for_each(|item| self.value(node.item, 1, item, &mut below));
                    out.bytes(number, &below.into_bytes());
                } else {
                    items.iter().for_each(|item| self.value(node.item, number, item, out));
                }
            }
            (Kind::Map, Value::Object(map)) => {
                for (key, value) in map {
                    let mut entry = Writer::default();
                    entry.bytes(1, key.as_bytes());
                    self.value(node.item, 2, value, &mut entry);
                    out.bytes(number, &entry.into_bytes());
                }
            }
            (Kind::Struct, Value::Object(map)) => {
                let mut below = Writer::default();
                self.fields(id, map, &mut below);
                out.bytes(number, &below.into_bytes());
            }
            (_, Value::Null) => {}
            (kind, value) => out.bytes(number, &self.special(kind, node.item, value)),
        }
    }

    /// Types whose message is not what their JSON is.
    fn special(&self, kind: Kind, props: TypeId, value: &Value) -> Vec<u8> {
        let mut out = Writer::default();
        match (kind, value) {
            (Kind::Time | Kind::MicroTime, Value::String(text)) => {
                if let Some((seconds, micros)) = time::epoch(text) {
                    let nanos = if kind == Kind::MicroTime { i64::from(micros) * 1000 } else { 0 };
                    out.varint(1, seconds);
                    out.varint(2, nanos);
                }
            }
            (Kind::Quantity, Value::String(text)) => out.bytes(1, text.as_bytes()),
            (Kind::IntOrString, Value::String(text)) => {
                out.varint(1, 1);
                out.varint(2, 0);
                out.bytes(3, text.as_bytes());
            }
            (Kind::IntOrString, Value::Number(n)) => {
                out.varint(1, 0);
                out.varint(2, n.as_i64().unwrap_or_default());
                out.bytes(3, b"");
            }
            (Kind::Raw | Kind::Any | Kind::Fields, value) => out.bytes(1, value.to_string().as_bytes()),
            (Kind::SchemaOrBool, Value::Bool(on)) => out.varint(1, i64::from(*on)),
            (Kind::SchemaOrBool, Value::Object(map)) => {
                out.varint(1, 1);
                self.below(props, 2, map, &mut out);
            }
            (Kind::SchemaOrArray | Kind::SchemaOrStrings, Value::Object(map)) => self.below(props, 1, map, &mut out),
            (Kind::SchemaOrArray, Value::Array(items)) => {
                items.iter().filter_map(Value::as_object).for_each(|map| self.below(props, 2, map, &mut out));
            }
            (Kind::SchemaOrStrings, Value::Array(items)) => {
                items.iter().filter_map(Value::as_str).for_each(|text| out.bytes(2, text.as_bytes()));
            }
            _ => {}
        }
        out.into_bytes()
    }

    fn below(&self, id: TypeId, number: u32, map: &Map<String, Value>, out: &mut Writer) {
        let mut below = Writer::default();
        self.fields(id, map, &mut below);
        out.bytes(number, &below.into_bytes());
    }
}
