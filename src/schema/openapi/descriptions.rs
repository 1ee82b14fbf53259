//! The texts of types and fields, as `kubectl explain` shows them: 0.8 MB, compressed in the binary, unpacked on demand.
//!
//! `descriptions.txt.gz` is written by `generate.py`; read it with `zcat`. A line `=NAME TEXT` opens a type, `FIELD TEXT`
//! follows; `\n` and `\\` are escaped.

use std::collections::HashMap;
use std::io::Read as _;

static PACKED: &[u8] = include_bytes!("descriptions.txt.gz");

/// All texts, unpacked.
#[derive(Default)]
pub struct Descriptions {
    text: String,
    /// Offset of each type's line, by OpenAPI name.
    types: HashMap<String, usize>,
}

impl Descriptions {
    pub fn read() -> Descriptions {
        let mut text = String::new();
        // The archive is compiled in and a test reads it.
        if flate2::read::GzDecoder::new(PACKED).read_to_string(&mut text).is_err() {
            return Descriptions::default();
        }
        let mut types = HashMap::with_capacity(800);
        let mut offset = 0;
        for line in text.split_inclusive('\n') {
            if let Some(rest) = line.strip_prefix('=') {
                types.insert(rest.split([' ', '\n']).next().unwrap_or_default().to_owned(), offset);
            }
            offset += line.len();
        }
        Descriptions { text, types }
    }

    /// Text of a type, and of its fields by name.
    pub fn of(&self, name: &str) -> (Option<String>, HashMap<&str, String>) {
        let mut fields = HashMap::new();
        let Some(start) = self.types.get(name) else { return (None, fields) };
        let mut lines = self.text[*start..].lines();
        let own = lines.next().and_then(|l| l.split_once(' ')).map(|(_, text)| unescape(text));
        for line in lines.take_while(|l| !l.starts_with('=')) {
            if let Some((field, text)) = line.split_once(' ') {
                fields.insert(field, unescape(text));
            }
        }
        (own, fields)
    }
}

fn unescape(text: &str) -> String {
    if !text.contains('\\') {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                Some('n') => out.push('\n'),
                Some(other) => out.push(other),
                None => {}
            },
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_of_a_type_and_its_fields() {
        let descriptions = Descriptions::read();
        let (own, fields) = descriptions.of("io.k8s.api.core.v1.PodSpec");
        assert_eq!(own.as_deref(), Some("PodSpec is a description of a pod."));
        assert!(fields["nodeName"].starts_with("NodeName indicates"));
        assert_eq!(unescape(r"a\nb\\n"), "a\nb\\n");
    }
}
