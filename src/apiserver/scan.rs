//! Looks into stored JSON without parsing it: finds one member by skipping over the others. The bytes are our own
//! canonical form, so no validation happens here; anything unexpected reads as absent.

use super::selector::Lookup;
use std::borrow::Cow;

/// The value at `path` as raw JSON, e.g. `["metadata", "labels"]`.
pub fn find<'a>(json: &'a [u8], path: &[&str]) -> Option<&'a [u8]> {
    let mut at = json;
    for key in path {
        at = member(at, key)?;
    }
    Some(at)
}

/// The text of the scalar at `path`: a string's content, or a number's or boolean's digits.
pub fn text<'a>(json: &'a [u8], path: &[&str]) -> Option<Cow<'a, str>> {
    let raw = find(json, path)?;
    match raw.first()? {
        b'"' => unquote(raw),
        b'{' | b'[' | b'n' => None,
        _ => std::str::from_utf8(raw).ok().map(Cow::Borrowed),
    }
}

fn unquote(raw: &[u8]) -> Option<Cow<'_, str>> {
    let inner = raw.get(1..raw.len().checked_sub(1)?)?;
    if inner.contains(&b'\\') {
        return serde_json::from_slice::<String>(raw).ok().map(Cow::Owned);
    }
    std::str::from_utf8(inner).ok().map(Cow::Borrowed)
}

/// The raw value of a member of the object that `json` begins with.
fn member<'a>(json: &'a [u8], key: &str) -> Option<&'a [u8]> {
    let mut members = Members::new(json)?;
    members.find(|(name, _)| *name == key.as_bytes()).map(|(_, value)| value)
}

/// Name (raw, between its quotes) and raw value of each member of an object.
pub struct Members<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Members<'a> {
    /// None when `json` is no object.
    pub fn new(json: &'a [u8]) -> Option<Members<'a>> {
        let at = skip_blank(json, 0);
        (json.get(at)? == &b'{').then_some(Members { json, at: at + 1 })
    }
}

impl<'a> Iterator for Members<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let mut at = skip_blank(self.json, self.at);
        if self.json.get(at)? == &b',' {
            at = skip_blank(self.json, at + 1);
        }
        if self.json.get(at)? != &b'"' {
            return None;
        }
        let name_end = skip_string(self.json, at)?;
        let name = &self.json[at + 1..name_end - 1];
        at = skip_blank(self.json, name_end);
        if self.json.get(at)? != &b':' {
            return None;
        }
        let start = skip_blank(self.json, at + 1);
        let end = skip_value(self.json, start)?;
        self.at = end;
        Some((name, &self.json[start..end]))
    }
}

fn skip_blank(json: &[u8], mut at: usize) -> usize {
    while matches!(json.get(at), Some(b' ' | b'\n' | b'\r' | b'\t')) {
        at += 1;
    }
    at
}

/// The index after the string that begins at `at`.
fn skip_string(json: &[u8], at: usize) -> Option<usize> {
    let mut at = at + 1;
    loop {
        match json.get(at)? {
            b'"' => return Some(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// The index after the value that begins at `at`.
fn skip_value(json: &[u8], at: usize) -> Option<usize> {
    match json.get(at)? {
        b'"' => skip_string(json, at),
        b'{' | b'[' => {
            let (mut depth, mut at) = (0usize, at);
            loop {
                match json.get(at)? {
                    b'"' => {
                        at = skip_string(json, at)?;
                        continue;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            return Some(at + 1);
                        }
                    }
                    _ => {}
                }
                at += 1;
            }
        }
        _ => {
            let rest = &json[at..];
            let length = rest.iter().position(|c| matches!(c, b',' | b'}' | b']' | b' ' | b'\n')).unwrap_or(rest.len());
            Some(at + length)
        }
    }
}

/// The raw JSON object of an object's labels. Label keys and values need no escapes, so they compare as bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawLabels<'a>(pub &'a [u8]);

impl<'a> RawLabels<'a> {
    /// The labels of a stored object.
    pub fn of(json: &'a [u8]) -> RawLabels<'a> {
        RawLabels(find(json, &["metadata", "labels"]).unwrap_or_default())
    }
}

impl Lookup for RawLabels<'_> {
    fn lookup(&self, key: &str) -> Option<&str> {
        let raw = member(self.0, key)?;
        std::str::from_utf8(raw.get(1..raw.len().checked_sub(1)?)?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &[u8] = br#"{"apiVersion":"v1","kind":"Pod","metadata":{"annotations":{"a":"{\"x\":\"}\"}"},"labels":{"app":"web","empty":""},"name":"p"},"spec":{"list":[1,{"a":"]"}],"nodeName":"n\"1","hostNetwork":true},"status":{"replicas":3}}"#;

    #[test]
    fn finds_without_parsing() {
        assert_eq!(text(POD, &["spec", "nodeName"]).unwrap(), "n\"1");
        assert_eq!(text(POD, &["spec", "hostNetwork"]).unwrap(), "true");
        assert_eq!(text(POD, &["status", "replicas"]).unwrap(), "3");
        assert_eq!(text(POD, &["status", "phase"]), None);
        assert_eq!(find(POD, &["spec", "list"]).unwrap(), br#"[1,{"a":"]"}]"#);
        let labels = RawLabels::of(POD);
        assert_eq!(labels.lookup("app"), Some("web"));
        assert_eq!(labels.lookup("empty"), Some(""));
        assert_eq!(labels.lookup("x"), None);
        assert_eq!(RawLabels::of(b"{}").lookup("x"), None);
    }

    #[test]
    fn broken_input_reads_as_absent() {
        for end in 0..POD.len() {
            let _ = find(&POD[..end], &["spec", "nodeName"]);
            let _ = RawLabels::of(&POD[..end]).lookup("app");
        }
    }
}
