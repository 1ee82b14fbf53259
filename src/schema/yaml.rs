//! YAML documents to JSON values, as `sigs.k8s.io/yaml` converts them: keys become strings, of duplicates the last wins.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// The document, and what a strict reader says about duplicate keys (none when there are none).
///
/// # Errors
/// The parser's text, `yaml: ...`.
pub fn to_json(body: &[u8]) -> Result<(Value, Option<String>), String> {
    let text = std::str::from_utf8(body).map_err(|_| "yaml: invalid leading UTF-8 octet".to_owned())?;
    let duplicates = RefCell::new(Vec::new());
    let seed = Seed { duplicates: &duplicates };
    let mut documents = serde_yaml::Deserializer::from_str(text);
    // Only the first document of a stream counts, as upstream.
    let value = match documents.next() {
        Some(document) => seed.deserialize(document).map_err(|e| describe(&e))?,
        None => Value::Null,
    };
    let duplicates = duplicates.into_inner();
    if duplicates.is_empty() {
        return Ok((value, None));
    }
    let lines = duplicate_lines(text, &duplicates);
    let mut out = "yaml: unmarshal errors:".to_owned();
    for (key, line) in duplicates.iter().zip(lines) {
        out.push_str(&format!("\n  line {line}: key {} already set in map", super::time::quote(key)));
    }
    Ok((value, Some(out)))
}

/// go-yaml's text: it counts lines from 0 when the parser stumbles and from 1 when the scanner does.
fn describe(error: &serde_yaml::Error) -> String {
    const SCANNER: [&str; 4] = ["found ", "mapping values", "could not find", "block sequence entries"];
    let text = error.to_string();
    let what = text.split(" at line ").next().unwrap_or(&text);
    let scanner = SCANNER.iter().any(|s| what.starts_with(s));
    match error.location().map(|l| if scanner { l.line() } else { l.line().saturating_sub(1) }) {
        Some(line) if line > 0 => format!("yaml: line {line}: {what}"),
        _ => format!("yaml: {what}"),
    }
}

/// The parser gives no positions inside a document: the lines on which these keys stand for the second time at one depth.
fn duplicate_lines(text: &str, keys: &[String]) -> Vec<usize> {
    let mut found = Vec::with_capacity(keys.len());
    for key in keys {
        let mut seen = std::collections::HashMap::new();
        let mut hit = 0;
        for (index, line) in text.lines().enumerate() {
            let trimmed = line.trim_start();
            let name = trimmed.split(':').next().unwrap_or_default().trim_matches(['"', '\'', ' ']);
            if name == key && !found.contains(&(index + 1)) {
                let depth = line.len() - trimmed.len();
                if seen.insert(depth, index).is_some() {
                    hit = index + 1;
                    break;
                }
            }
        }
        found.push(hit);
    }
    found
}

#[derive(Clone, Copy)]
struct Seed<'a> {
    duplicates: &'a RefCell<Vec<String>>,
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a YAML value")
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        serde_json::Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a number that JSON has"))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key_seed(self)? {
            let key = match key {
                Value::String(text) => text,
                Value::Bool(_) | Value::Number(_) => key.to_string(),
                _ => return Err(A::Error::custom("a key must be a scalar")),
            };
            let value = access.next_value_seed(self)?;
            if map.contains_key(&key) {
                self.duplicates.borrow_mut().push(key.clone());
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}
