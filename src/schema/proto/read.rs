//! Messages to values.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use super::ProtoError;
use super::wire::{BYTES, Reader, VARINT};
use crate::schema::node::{Kind, Schema, Text, TypeId};
use crate::schema::{quantity, time, typed};

/// Only JSON schemas nest deeper than a few levels.
const MAX_DEPTH: usize = 128;

pub fn message(schema: &Schema, id: TypeId, bytes: &[u8]) -> Result<Value, ProtoError> {
    Decoder { schema }.message(id, bytes, 0)
}

struct Decoder<'s> {
    schema: &'s Schema,
}

/// Where the value of a field number goes.
enum Target<'s> {
    Field(&'s crate::schema::node::Field),
    /// An embedded struct: its fields stand in the outer object.
    Embedded(TypeId),
    Unknown,
}

impl<'s> Decoder<'s> {
    fn message(&self, id: TypeId, bytes: &[u8], depth: usize) -> Result<Value, ProtoError> {
        if depth > MAX_DEPTH {
            return Err(ProtoError::Depth);
        }
        let mut map = Map::new();
        self.fields(id, bytes, depth, &mut map)?;
        for field in self.schema.fields(id) {
            let name = self.schema.field_name(field);
            if map.get(name).is_some_and(|v| typed::unset(self.schema, field, v)) {
                map.remove(name);
            }
        }
        typed::fill(self.schema, id, &mut map);
        Ok(Value::Object(map))
    }

    fn target(&self, id: TypeId, number: u32) -> Target<'s> {
        for field in self.schema.fields(id) {
            match field.embedded {
                None if u32::from(field.tag) == number => return Target::Field(field),
                Some((inner, tag)) if u32::from(tag) == number => return Target::Embedded(inner),
                _ => {}
            }
        }
        Target::Unknown
    }

    fn fields(&self, id: TypeId, bytes: &[u8], depth: usize, map: &mut Map<String, Value>) -> Result<(), ProtoError> {
        let mut reader = Reader::new(bytes);
        while let Some((number, wire)) = reader.tag()? {
            let field = match self.target(id, number) {
                Target::Field(field) => field,
                Target::Embedded(inner) => {
                    let bytes = reader.bytes(wire, self.schema.go_name(inner))?;
                    self.fields(inner, bytes, depth, map)?;
                    continue;
                }
                Target::Unknown => {
                    reader.skip(wire)?;
                    continue;
                }
            };
            let name = self.schema.field_name(field);
            match self.schema.kind(field.node) {
                Kind::List if !self.is_wrapped(field.node) => {
                    let list = map.entry(name).or_insert_with(|| Value::Array(Vec::new()));
                    if let Value::Array(items) = list {
                        self.items(field.node, &mut reader, wire, name, depth, items)?;
                    }
                }
                Kind::Map => {
                    let entry = self.entry(field.node, reader.bytes(wire, name)?, name, depth)?;
                    let entries = map.entry(name).or_insert_with(|| Value::Object(Map::new()));
                    if let Value::Object(entries) = entries {
                        entries.insert(entry.0, entry.1);
                    }
                }
                _ => {
                    let value = self.value(field.node, &mut reader, wire, name, depth)?;
                    map.insert(name.to_owned(), value);
                }
            }
        }
        Ok(())
    }

    /// Named lists of strings (`ExtraValue`, `Verbs`) are messages with the list as field 1.
    fn is_wrapped(&self, id: TypeId) -> bool {
        let node = self.schema.node(id);
        node.kind == Kind::List && node.name != Text::default() && self.schema.kind(node.item) == Kind::String
    }

    fn items(
        &self,
        list: TypeId,
        reader: &mut Reader<'_>,
        wire: u8,
        name: &str,
        depth: usize,
        items: &mut Vec<Value>,
    ) -> Result<(), ProtoError> {
        let item = self.schema.node(list).item;
        let packable = matches!(self.schema.kind(item), Kind::Int32 | Kind::Int64 | Kind::Bool);
        if packable && wire == BYTES {
            let mut packed = Reader::new(reader.bytes(wire, name)?);
            while !packed.is_empty() {
                items.push(self.value(item, &mut packed, VARINT, name, depth)?);
            }
            return Ok(());
        }
        items.push(self.value(item, reader, wire, name, depth)?);
        Ok(())
    }

    fn entry(&self, map: TypeId, bytes: &[u8], name: &str, depth: usize) -> Result<(String, Value), ProtoError> {
        let item = self.schema.node(map).item;
        let (mut key, mut value) = (String::new(), None);
        let mut reader = Reader::new(bytes);
        while let Some((number, wire)) = reader.tag()? {
            match number {
                1 => key = reader.string(wire, name)?,
                2 => value = Some(self.value(item, &mut reader, wire, name, depth)?),
                _ => reader.skip(wire)?,
            }
        }
        Ok((key, value.unwrap_or_else(|| typed::zero(self.schema, item))))
    }

    fn value(
        &self,
        id: TypeId,
        reader: &mut Reader<'_>,
        wire: u8,
        name: &str,
        depth: usize,
    ) -> Result<Value, ProtoError> {
        let kind = self.schema.kind(id);
        Ok(match kind {
            Kind::String => Value::String(reader.string(wire, name)?),
            Kind::Bool => Value::Bool(reader.int(wire, name)? != 0),
            Kind::Int32 => Value::from(reader.int(wire, name)? as i32),
            Kind::Int64 => Value::from(reader.int(wire, name)?),
            Kind::Float64 => Value::from(reader.double(wire, name)?),
            Kind::Bytes => Value::String(STANDARD.encode(reader.bytes(wire, name)?)),
            Kind::Struct => self.message(id, reader.bytes(wire, name)?, depth + 1)?,
            Kind::List => self.wrapped(reader.bytes(wire, name)?, name)?,
            _ => self.special(id, kind, reader.bytes(wire, name)?, name, depth)?,
        })
    }

    fn wrapped(&self, bytes: &[u8], name: &str) -> Result<Value, ProtoError> {
        let (mut reader, mut items) = (Reader::new(bytes), Vec::new());
        while let Some((number, wire)) = reader.tag()? {
            match number {
                1 => items.push(Value::String(reader.string(wire, name)?)),
                _ => reader.skip(wire)?,
            }
        }
        Ok(Value::Array(items))
    }

    /// Types whose message is not what their JSON is.
    fn special(&self, id: TypeId, kind: Kind, bytes: &[u8], name: &str, depth: usize) -> Result<Value, ProtoError> {
        let (mut first, mut second, mut text) = (0i64, 0i64, None);
        let (mut schemas, mut schema, mut strings) = (Vec::new(), None, Vec::new());
        let props = self.schema.node(id).item;
        let mut reader = Reader::new(bytes);
        while let Some((number, wire)) = reader.tag()? {
            match (kind, number) {
                (Kind::Time | Kind::MicroTime | Kind::IntOrString, 1) | (Kind::SchemaOrBool, 1) => {
                    first = reader.int(wire, name)?;
                }
                (Kind::Time | Kind::MicroTime | Kind::IntOrString, 2) => second = reader.int(wire, name)?,
                (Kind::IntOrString, 3) | (Kind::Quantity | Kind::Raw | Kind::Any | Kind::Fields, 1) => {
                    text = Some(reader.bytes(wire, name)?);
                }
                (Kind::SchemaOrBool, 2) | (Kind::SchemaOrArray | Kind::SchemaOrStrings, 1) => {
                    schema = Some(self.message(props, reader.bytes(wire, name)?, depth + 1)?);
                }
                (Kind::SchemaOrArray, 2) => schemas.push(self.message(props, reader.bytes(wire, name)?, depth + 1)?),
                (Kind::SchemaOrStrings, 2) => strings.push(Value::String(reader.string(wire, name)?)),
                _ => reader.skip(wire)?,
            }
        }
        let string = || String::from_utf8_lossy(text.unwrap_or_default()).into_owned();
        let empty = bytes.is_empty();
        Ok(match kind {
            Kind::Time | Kind::MicroTime if empty => Value::Null,
            Kind::Time => Value::String(time::from_epoch(first, None)),
            Kind::MicroTime => Value::String(time::from_epoch(first, Some((second / 1000).clamp(0, 999_999) as u32))),
            Kind::Quantity if string().is_empty() => Value::String("0".to_owned()),
            Kind::Quantity => {
                Value::String(quantity::canonical(&string()).map_err(|e| ProtoError::Value(e.to_string()))?)
            }
            Kind::IntOrString if first == 1 => Value::String(string()),
            Kind::IntOrString => Value::from(second as i32),
            Kind::SchemaOrBool => schema.unwrap_or(Value::Bool(first != 0)),
            Kind::SchemaOrArray => schema.unwrap_or(Value::Array(schemas)),
            Kind::SchemaOrStrings => schema.unwrap_or(Value::Array(strings)),
            // JSON inside protobuf; anything else cannot be shown as JSON.
            _ => match text.filter(|t| !t.is_empty()) {
                Some(text) => serde_json::from_slice(text).map_err(|e| ProtoError::Value(format!("{name}: {e}")))?,
                None => Value::Null,
            },
        })
    }
}
