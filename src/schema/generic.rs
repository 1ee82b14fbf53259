//! JSON documents of no particular type: values, and the duplicate fields on the way.

use std::cell::RefCell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::{syntax, time};

/// The document and `duplicate field "a.b"` for each field that stands twice; the last one wins.
///
/// # Errors
/// Go's text for malformed JSON.
pub fn parse(body: &[u8]) -> Result<(Value, Vec<String>), String> {
    let duplicates = RefCell::new(Vec::new());
    let mut source = serde_json::Deserializer::from_slice(body);
    let seed = Seed { duplicates: &duplicates, path: &Path::Root };
    let value = seed.deserialize(&mut source).and_then(|value| source.end().map(|()| value));
    let value = value.map_err(|e| syntax::describe(body, &e))?;
    Ok((value, duplicates.into_inner()))
}

/// The same for a document that must be an object.
///
/// # Errors
/// Go's text also for any other type.
pub fn parse_object(body: &[u8]) -> Result<(Map<String, Value>, Vec<String>), String> {
    match parse(body)? {
        (Value::Object(map), duplicates) => Ok((map, duplicates)),
        (Value::Null, duplicates) => Ok((Map::new(), duplicates)),
        (other, _) => {
            let found = super::decode::json_type(&other);
            Err(format!("json: cannot unmarshal {found} into Go value of type map[string]interface {{}}"))
        }
    }
}

enum Path<'p> {
    Root,
    Key { parent: &'p Path<'p>, key: &'p str },
    Index { parent: &'p Path<'p>, index: usize },
}

impl Path<'_> {
    fn write(&self, out: &mut String) {
        match self {
            Path::Root => {}
            Path::Index { parent, index } => {
                parent.write(out);
                out.push_str(&format!("[{index}]"));
            }
            Path::Key { parent, key } => {
                parent.write(out);
                if !out.is_empty() {
                    out.push('.');
                }
                out.push_str(key);
            }
        }
    }
}

struct Seed<'a> {
    duplicates: &'a RefCell<Vec<String>>,
    path: &'a Path<'a>,
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
        out.write_str("a JSON value")
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
        Ok(Value::from(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        loop {
            let path = Path::Index { parent: self.path, index: items.len() };
            match access.next_element_seed(Seed { duplicates: self.duplicates, path: &path })? {
                Some(item) => items.push(item),
                None => return Ok(Value::Array(items)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = access.next_key::<String>()? {
            let path = Path::Key { parent: self.path, key: &key };
            let value = access.next_value_seed(Seed { duplicates: self.duplicates, path: &path })?;
            if map.contains_key(&key) {
                let mut full = String::new();
                path.write(&mut full);
                let text = format!("duplicate field {}", time::quote(&full));
                let mut duplicates = self.duplicates.borrow_mut();
                if !duplicates.contains(&text) {
                    duplicates.push(text);
                }
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}
