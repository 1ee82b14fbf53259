//! What [`super::typed`] reads besides values: keys of maps and structs, and whether a text is base64.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Visitor};

use super::node::{Schema, TypeId};

/// A map key; YAML may bring one that is not a string.
pub(super) struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<String, D::Error> {
        source.deserialize_any(self)
    }
}

impl Visitor<'_> for Key {
    type Value = String;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<String, E> {
        Ok(value)
    }
}

/// The key of a struct: index of the field, or the unknown name.
pub(super) struct FieldKey<'s> {
    pub(super) schema: &'s Schema,
    pub(super) owner: TypeId,
}

impl<'de> DeserializeSeed<'de> for FieldKey<'_> {
    type Value = Result<usize, String>;

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<Self::Value, D::Error> {
        source.deserialize_any(self)
    }
}

impl Visitor<'_> for FieldKey<'_> {
    type Value = Result<usize, String>;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a field name")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
        Ok(self.schema.field_at(self.owner, value).map(|(index, _)| index).ok_or_else(|| value.to_owned()))
    }
}

/// Offset at which Go's decoder of padded standard base64 would stop, or 0 with line breaks in an otherwise good text.
pub(super) fn base64_error(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'+' || b == b'/';
    let (mut count, mut breaks) = (0usize, false);
    let mut index = 0;
    while index < bytes.len() {
        match bytes[index] {
            b'\n' | b'\r' => breaks = true,
            b'=' => break,
            b if good(b) => count += 1,
            _ => return Some(index),
        }
        index += 1;
    }
    let padding = bytes[index..].iter().filter(|b| !matches!(b, b'\n' | b'\r')).count();
    breaks |= bytes[index..].iter().any(|b| matches!(b, b'\n' | b'\r'));
    let all_padding = bytes[index..].iter().all(|b| matches!(b, b'=' | b'\n' | b'\r'));
    let wanted = match count % 4 {
        0 => 0,
        2 => 2,
        3 => 1,
        _ => return Some(index),
    };
    if !all_padding || padding != wanted {
        return Some(if padding < wanted { bytes.len() } else { index });
    }
    breaks.then_some(0)
}
