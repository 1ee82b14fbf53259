//! Sets of fields, and the `fieldsV1` they are stored as. Reference: `structured-merge-diff/v6/fieldpath`.

use std::cmp::Ordering;
use std::fmt;

use serde_json::{Map, Value};

/// One step from a value to a part of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Element {
    /// A field of a struct or a key of a map (`f:name`).
    Field(String),
    /// An item of a list by its keys (`k:{"name":"a"}`), as canonical JSON.
    Key(String),
    /// An item of a set by its value (`v:"a"`), as canonical JSON.
    Value(String),
    /// An item by its index (`i:0`); only other servers write these.
    Index(i64),
}

impl Element {
    pub(super) fn field(name: &str) -> Element {
        Element::Field(name.to_owned())
    }

    fn parse(text: &str) -> Result<Element, String> {
        let Some((kind, rest)) = text.split_once(':') else {
            return Err(if text.len() < 2 {
                "key must be 2 characters long:".to_owned()
            } else {
                format!("missing colon: {text}")
            });
        };
        let canonical =
            |rest: &str| serde_json::from_str::<Value>(rest).map(|v| v.to_string()).map_err(|e| format!("{text}: {e}"));
        match kind {
            "f" => Ok(Element::field(rest)),
            "k" => canonical(rest).map(Element::Key),
            "v" => canonical(rest).map(Element::Value),
            "i" => rest.parse().map(Element::Index).map_err(|_| format!("invalid index: {text}")),
            _ => Err("unknown path element type".to_owned()),
        }
    }

    fn write(&self) -> String {
        match self {
            Element::Field(name) => format!("f:{name}"),
            Element::Key(json) => format!("k:{json}"),
            Element::Value(json) => format!("v:{json}"),
            Element::Index(index) => format!("i:{index}"),
        }
    }
}

/// As conflicts and errors print it: `.spec`, `[name="a"]`, `[="a"]`.
impl fmt::Display for Element {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Element::Field(name) => write!(out, ".{name}"),
            Element::Value(json) => write!(out, "[={json}]"),
            Element::Index(index) => write!(out, "[{index}]"),
            Element::Key(json) => {
                let keys: Map<String, Value> = serde_json::from_str(json).unwrap_or_default();
                let keys: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
                write!(out, "[{}]", keys.join(","))
            }
        }
    }
}

/// Fields and what is owned of them; sorted by element.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Set {
    entries: Vec<Entry>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub element: Element,
    /// The element itself is in the set, not only parts of it.
    pub member: bool,
    pub children: Set,
}

impl Set {
    /// The set of one path, without the fields on the way.
    pub fn path(names: &[&str]) -> Set {
        match names {
            [] => Set::default(),
            [last] => {
                Set { entries: vec![Entry { element: Element::field(last), member: true, children: Set::default() }] }
            }
            [first, rest @ ..] => Set {
                entries: vec![Entry { element: Element::field(first), member: false, children: Set::path(rest) }],
            },
        }
    }

    /// The union of several paths.
    pub fn paths(paths: &[&[&str]]) -> Set {
        paths.iter().fold(Set::default(), |set, path| set.union(&Set::path(path)))
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub(super) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Adds an entry that sorts behind all others, or in any order before [`Set::sort`]. Empty ones are left out.
    pub(super) fn push(&mut self, element: Element, member: bool, children: Set) {
        if member || !children.is_empty() {
            self.entries.push(Entry { element, member, children });
        }
    }

    pub(super) fn sort(&mut self) {
        self.entries.sort_by(|a, b| a.element.cmp(&b.element));
    }

    fn get(&self, element: &Element) -> Option<&Entry> {
        self.entries.binary_search_by(|e| e.element.cmp(element)).ok().map(|i| &self.entries[i])
    }

    pub(super) fn has(&self, element: &Element) -> bool {
        self.get(element).is_some_and(|e| e.member)
    }

    pub(super) fn below(&self, element: &Element) -> Option<&Set> {
        self.get(element).map(|e| &e.children).filter(|c| !c.is_empty())
    }

    /// Walks both sets in step and keeps what `join` makes of each element.
    fn zip(&self, other: &Set, join: impl Fn(Option<&Entry>, Option<&Entry>) -> (bool, Set)) -> Set {
        let mut out = Set { entries: Vec::with_capacity(self.entries.len().max(other.entries.len())) };
        let (mut left, mut right) = (self.entries.iter().peekable(), other.entries.iter().peekable());
        loop {
            let order = match (left.peek(), right.peek()) {
                (None, None) => return out,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(l), Some(r)) => l.element.cmp(&r.element),
            };
            let l = if order.is_le() { left.next() } else { None };
            let r = if order.is_ge() { right.next() } else { None };
            let Some(element) = l.or(r).map(|e| e.element.clone()) else { return out };
            let (member, children) = join(l, r);
            out.push(element, member, children);
        }
    }

    pub fn union(&self, other: &Set) -> Set {
        self.zip(other, |l, r| match (l, r) {
            (Some(l), Some(r)) => (l.member || r.member, l.children.union(&r.children)),
            (Some(e), None) | (None, Some(e)) => (e.member, e.children.clone()),
            (None, None) => (false, Set::default()),
        })
    }

    pub fn intersection(&self, other: &Set) -> Set {
        self.zip(other, |l, r| match (l, r) {
            (Some(l), Some(r)) => (l.member && r.member, l.children.intersection(&r.children)),
            _ => (false, Set::default()),
        })
    }

    /// What is in `self` and not in `other`; a field that `other` has leaves the parts of it.
    pub fn difference(&self, other: &Set) -> Set {
        self.zip(other, |l, r| match (l, r) {
            (Some(l), Some(r)) => (l.member && !r.member, l.children.difference(&r.children)),
            (Some(l), None) => (l.member, l.children.clone()),
            _ => (false, Set::default()),
        })
    }

    /// As [`Set::difference`], but a field that `other` has takes its parts along.
    pub fn without(&self, other: &Set) -> Set {
        self.zip(other, |l, r| match (l, r) {
            (Some(_), Some(r)) if r.member => (false, Set::default()),
            (Some(l), Some(r)) => (l.member, l.children.without(&r.children)),
            (Some(l), None) => (l.member, l.children.clone()),
            _ => (false, Set::default()),
        })
    }

    /// Every path in the set as it is printed, in order.
    pub fn printed(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.print("", &mut out);
        out
    }

    fn print(&self, prefix: &str, out: &mut Vec<String>) {
        // Upstream lists the members of one level before what is below them.
        for entry in self.entries.iter().filter(|e| e.member) {
            out.push(format!("{prefix}{}", entry.element));
        }
        for entry in &self.entries {
            entry.children.print(&format!("{prefix}{}", entry.element), out);
        }
    }

    /// Reads `fieldsV1`.
    ///
    /// # Errors
    /// What is wrong with a key.
    pub fn parse(fields: &Value) -> Result<Set, String> {
        let mut set = Set::default();
        let Some(map) = fields.as_object() else { return Ok(set) };
        for (key, value) in map {
            if key == "." {
                continue;
            }
            let below = value.as_object();
            let member = below.is_none_or(|b| b.is_empty() || b.contains_key("."));
            set.push(Element::parse(key)?, member, Set::parse(value)?);
        }
        set.sort();
        Ok(set)
    }

    /// Writes `fieldsV1`.
    pub fn write(&self) -> Value {
        let entry = |entry: &Entry| {
            let mut children = match entry.children.write() {
                Value::Object(map) => map,
                _ => Map::new(),
            };
            if entry.member && !children.is_empty() {
                children.insert(".".to_owned(), Value::Object(Map::new()));
            }
            (entry.element.write(), Value::Object(children))
        };
        Value::Object(self.entries.iter().map(entry).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(fields: Value) -> Set {
        Set::parse(&fields).unwrap()
    }

    #[test]
    fn fields_v1_reads_and_writes() {
        let fields = json!({"f:metadata": {"f:labels": {".": {}, "f:a": {}}},
            "f:spec": {"f:containers": {"k:{\"name\":\"x\"}": {".": {}, "f:image": {}}}, "f:finalizers": {"v:\"a\"": {}}}});
        assert_eq!(set(fields.clone()).write(), fields);
        assert!(Set::parse(&json!({"x": {}})).is_err());
    }

    #[test]
    fn paths_print_as_in_conflicts() {
        let fields = json!({"f:spec": {"f:ports": {"k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:name": {}}}},
            "f:finalizers": {"v:\"a\"": {}}});
        assert_eq!(
            set(fields).printed(),
            [
                r#".finalizers[="a"]"#,
                r#".spec.ports[port=80,protocol="TCP"]"#,
                r#".spec.ports[port=80,protocol="TCP"].name"#
            ]
        );
    }

    #[test]
    fn algebra() {
        let (a, b) = (set(json!({"f:a": {".": {}, "f:x": {}}, "f:b": {}})), set(json!({"f:a": {}, "f:c": {}})));
        assert_eq!(a.union(&b), set(json!({"f:a": {".": {}, "f:x": {}}, "f:b": {}, "f:c": {}})));
        assert_eq!(a.intersection(&b), set(json!({"f:a": {}})));
        assert_eq!(a.difference(&b), set(json!({"f:a": {"f:x": {}}, "f:b": {}})));
        assert_eq!(a.without(&b), set(json!({"f:b": {}})));
    }
}
