//! An OpenAPI v2 document in protobuf, as `openapiv2/OpenAPIv2.proto` of gnostic-models lays it out. Values that may be
//! anything travel as YAML text; ours is JSON, which is YAML too.

use serde_json::{Map, Value};

use crate::schema::proto::wire::Writer;

/// One message.
#[derive(Default)]
struct Message(Writer);

impl Message {
    fn bytes(&mut self, field: u32, bytes: &[u8]) -> &mut Message {
        self.0.bytes(field, bytes);
        self
    }

    fn message(&mut self, field: u32, message: Message) -> &mut Message {
        self.bytes(field, &message.0.into_bytes())
    }

    /// Writes a text that is there and not empty.
    fn text(&mut self, field: u32, value: Option<&Value>) -> &mut Message {
        match value.and_then(Value::as_str) {
            Some(text) if !text.is_empty() => self.bytes(field, text.as_bytes()),
            _ => self,
        }
    }

    fn truth(&mut self, field: u32, value: Option<&Value>) -> &mut Message {
        if value == Some(&Value::Bool(true)) {
            self.0.varint(field, 1);
        }
        self
    }

    fn texts(&mut self, field: u32, value: Option<&Value>) -> &mut Message {
        for text in items(value).filter_map(Value::as_str) {
            self.bytes(field, text.as_bytes());
        }
        self
    }

    /// `vendor_extension`: everything named `x-...`.
    fn extensions(&mut self, field: u32, map: &Map<String, Value>) -> &mut Message {
        for (name, value) in map.iter().filter(|(name, _)| name.starts_with("x-")) {
            self.message(field, named(name, any(value)));
        }
        self
    }
}

fn items(value: Option<&Value>) -> impl Iterator<Item = &Value> {
    value.and_then(Value::as_array).into_iter().flatten()
}

fn entries(value: Option<&Value>) -> impl Iterator<Item = (&String, &Value)> {
    value.and_then(Value::as_object).into_iter().flatten()
}

/// `Any`
fn any(value: &Value) -> Message {
    let mut out = Message::default();
    out.bytes(2, value.to_string().as_bytes());
    out
}

/// `NamedSchema` and its like.
fn named(name: &str, value: Message) -> Message {
    let mut out = Message::default();
    out.bytes(1, name.as_bytes()).message(2, value);
    out
}

/// One alternative of a `oneof`.
fn one_of(field: u32, value: Message) -> Message {
    let mut out = Message::default();
    out.message(field, value);
    out
}

fn schema(value: &Value) -> Message {
    let mut out = Message::default();
    let Some(map) = value.as_object() else { return out };
    let get = |key: &str| map.get(key);
    out.text(1, get("$ref")).text(2, get("format")).text(4, get("description"));
    out.truth(16, get("uniqueItems")).texts(19, get("required"));
    for value in items(get("enum")) {
        out.message(20, any(value));
    }
    if let Some(inner) = get("additionalProperties") {
        out.message(21, one_of(1, schema(inner)));
    }
    if let Some(kind) = get("type").and_then(Value::as_str) {
        let mut item = Message::default();
        item.bytes(1, kind.as_bytes());
        out.message(22, item);
    }
    if let Some(inner) = get("items") {
        out.message(23, one_of(1, schema(inner)));
    }
    if get("properties").is_some() {
        let mut properties = Message::default();
        for (name, property) in entries(get("properties")) {
            properties.message(1, named(name, schema(property)));
        }
        out.message(25, properties);
    }
    out.extensions(31, map);
    out
}

/// `ParametersItem`
fn parameter(value: &Value) -> Message {
    let none = Map::new();
    let map = value.as_object().unwrap_or(&none);
    let get = |key: &str| map.get(key);
    let place = get("in").and_then(Value::as_str).unwrap_or_default();
    let mut out = Message::default();
    if place == "body" {
        out.text(1, get("description")).text(2, get("name")).text(3, get("in")).truth(4, get("required"));
        if let Some(inner) = get("schema") {
            out.message(5, schema(inner));
        }
        return one_of(1, one_of(1, out));
    }
    out.truth(1, get("required")).text(2, get("in")).text(3, get("description")).text(4, get("name"));
    let alternative = if place == "path" {
        out.text(5, get("type")).text(6, get("format")).truth(19, get("uniqueItems"));
        4
    } else {
        out.text(6, get("type")).text(7, get("format")).truth(20, get("uniqueItems"));
        3
    };
    one_of(1, one_of(2, one_of(alternative, out)))
}

fn operation(value: &Value) -> Message {
    let mut out = Message::default();
    let Some(map) = value.as_object() else { return out };
    let get = |key: &str| map.get(key);
    out.texts(1, get("tags")).text(3, get("description")).text(5, get("operationId"));
    out.texts(6, get("produces")).texts(7, get("consumes"));
    for one in items(get("parameters")) {
        out.message(8, parameter(one));
    }
    let mut responses = Message::default();
    for (code, response) in entries(get("responses")) {
        let mut body = Message::default();
        body.text(1, response.get("description"));
        if let Some(inner) = response.get("schema") {
            body.message(2, one_of(1, schema(inner)));
        }
        responses.message(1, named(code, one_of(1, body)));
    }
    out.message(9, responses).texts(10, get("schemes")).extensions(13, map);
    out
}

fn path_item(value: &Value) -> Message {
    let mut out = Message::default();
    let methods = [("get", 2), ("put", 3), ("post", 4), ("delete", 5), ("options", 6), ("head", 7), ("patch", 8)];
    for (method, field) in methods {
        if let Some(one) = value.get(method) {
            out.message(field, operation(one));
        }
    }
    for one in items(value.get("parameters")) {
        out.message(9, parameter(one));
    }
    out
}

/// The whole document: its head as JSON, paths and definitions one after the other.
pub fn document(
    head: &Value,
    paths: impl Iterator<Item = (String, Value)>,
    definitions: impl Iterator<Item = (String, Value)>,
) -> Vec<u8> {
    let mut out = Message::default();
    let mut info = Message::default();
    info.text(1, head["info"].get("title")).text(2, head["info"].get("version"));
    out.text(1, head.get("swagger")).message(2, info);
    let mut all = Message::default();
    for (path, item) in paths {
        all.message(2, named(&path, path_item(&item)));
    }
    out.message(8, all);
    let mut all = Message::default();
    for (name, definition) in definitions {
        all.message(1, named(&name, schema(&definition)));
    }
    out.message(9, all);
    for requirement in items(head.get("security")) {
        let mut one = Message::default();
        for (name, scopes) in entries(Some(requirement)) {
            let mut list = Message::default();
            list.texts(1, Some(scopes));
            one.message(1, named(name, list));
        }
        out.message(12, one);
    }
    let mut all = Message::default();
    for (name, key) in entries(head.get("securityDefinitions")) {
        let mut one = Message::default();
        one.text(1, key.get("type")).text(2, key.get("name")).text(3, key.get("in")).text(4, key.get("description"));
        all.message(1, named(name, one_of(2, one)));
    }
    out.message(13, all);
    out.0.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_are_laid_out_as_gnostic_reads_them() {
        let value = json!({"type": "string", "x-a": true});
        // type: 22 { 1: "string" }, vendor_extension: 31 { name: "x-a", value: { yaml: "true" } }
        let expected = b"\xb2\x01\x08\x0a\x06string\xfa\x01\x0d\x0a\x03x-a\x12\x06\x12\x04true";
        assert_eq!(schema(&value).0.into_bytes(), expected);
        let path = parameter(&json!({"in": "path", "name": "n", "required": true, "type": "string"}));
        assert_eq!(path.0.into_bytes()[..4], *b"\x0a\x17\x12\x15");
    }
}
