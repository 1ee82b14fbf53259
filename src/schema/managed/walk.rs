//! Typed values against each other: compare, merge, take out, and the set of all fields.
//! Reference: `structured-merge-diff/v6/typed`.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::super::node::{Field, Kind, ListType, Schema, TypeId};
use super::super::patch::go_print;
use super::set::{Element, Set};

/// How a value of a type is owned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// By field or key.
    Map,
    /// By item.
    List,
    /// As a whole.
    Leaf,
}

fn shape(schema: &Schema, id: TypeId) -> Shape {
    let node = schema.node(id);
    match node.kind {
        Kind::Struct | Kind::Map if !node.atomic => Shape::Map,
        Kind::List if node.list_type != ListType::Atomic => Shape::List,
        _ => Shape::Leaf,
    }
}

/// Type of a field or map value. Fields that the schema does not know are owned as a whole.
fn child(schema: &Schema, id: TypeId, key: &str) -> Option<TypeId> {
    match schema.kind(id) {
        Kind::Struct => schema.field(id, key).map(|f| f.node),
        _ => schema.item(id),
    }
}

fn is_empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(items)) => items.is_empty(),
        Some(_) => false,
    }
}

/// Which item of its list a value is.
fn item_element(schema: &Schema, list: TypeId, value: &Value) -> Result<Element, String> {
    let node = schema.node(list);
    if node.list_type == ListType::Set {
        let problem = match value {
            Value::Object(_) => "associative list without keys has an element that's a map type",
            Value::Array(_) => "not supported: associative list with lists as elements",
            Value::Null => "associative list without keys has an element that's an explicit null",
            other => return Ok(Element::Value(other.to_string())),
        };
        return Err(problem.to_owned());
    }
    let map = match value {
        Value::Object(map) => map,
        Value::Null => return Err("associative list with keys may not have a null element".to_owned()),
        _ => return Err("associative list with keys may not have non-map elements".to_owned()),
    };
    let mut keys = Map::new();
    for name in schema.list_keys(list) {
        let value = map.get(name).cloned().or_else(|| key_default(schema, schema.field(node.item, name)?));
        if let Some(value) = value {
            keys.insert(name.to_owned(), value);
        }
    }
    if keys.is_empty() {
        let names: Vec<String> = schema.list_keys(list).map(|k| format!("{k:?}")).collect();
        return Err(format!(
            "associative list with keys has an element that omits all key fields [{}] (and doesn't have default values for any key fields)",
            names.join(" ")
        ));
    }
    Ok(Element::Key(Value::Object(keys).to_string()))
}

/// The default of a key: the one OpenAPI shows, which is the zero value of a scalar that Go always writes.
fn key_default(schema: &Schema, field: &Field) -> Option<Value> {
    if field.default_public {
        return schema.field_default(field).cloned();
    }
    let zero = match schema.kind(field.node) {
        _ if field.omit_empty || field.pointer => return None,
        Kind::String => Value::String(String::new()),
        Kind::Int32 | Kind::Int64 | Kind::Float64 => Value::from(0),
        Kind::Bool => Value::Bool(false),
        _ => return None,
    };
    Some(zero)
}

/// What the right value changed against the left one.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    pub removed: Set,
    pub modified: Set,
    pub added: Set,
}

impl Comparison {
    pub fn without(&self, set: &Set) -> Comparison {
        Comparison {
            removed: self.removed.without(set),
            modified: self.modified.without(set),
            added: self.added.without(set),
        }
    }

    fn push(&mut self, element: &Element, change: Change, below: Comparison) {
        self.removed.push(element.clone(), change.removed, below.removed);
        self.modified.push(element.clone(), change.modified, below.modified);
        self.added.push(element.clone(), change.added, below.added);
    }

    fn sort(&mut self) {
        self.removed.sort();
        self.modified.sort();
        self.added.sort();
    }
}

/// What happened to a value itself. Only a list item whose duplicates come or go has two of them.
#[derive(Clone, Copy, Default)]
struct Change {
    removed: bool,
    modified: bool,
    added: bool,
}

/// Compares two objects of one type.
///
/// # Errors
/// An item of a list whose keys are missing.
pub(super) fn compare(schema: &Schema, id: TypeId, left: &Value, right: &Value) -> Result<Comparison, String> {
    compare_values(schema, id, Some(left), Some(right)).map(|(_, below)| below)
}

fn compare_values(
    schema: &Schema,
    id: TypeId,
    left: Option<&Value>,
    right: Option<&Value>,
) -> Result<(Change, Comparison), String> {
    let mut below = Comparison::default();
    if left == right {
        return Ok((Change::default(), below));
    }
    let both = left.is_some() && right.is_some();
    let mut change = Change { removed: right.is_none(), modified: both, added: left.is_none() };
    let shape = shape(schema, id);
    if shape == Shape::Leaf || (is_empty(left) && is_empty(right)) {
        return Ok((change, below));
    }
    match shape {
        Shape::Map => compare_maps(schema, id, left, right, &mut below)?,
        _ => compare_lists(schema, id, left, right, &mut below)?,
    }
    // A container that is on both sides is not itself modified.
    change.modified = false;
    Ok((change, below))
}

fn compare_maps(
    schema: &Schema,
    id: TypeId,
    left: Option<&Value>,
    right: Option<&Value>,
    out: &mut Comparison,
) -> Result<(), String> {
    let (left, right) = (left.and_then(Value::as_object), right.and_then(Value::as_object));
    let keys = left.into_iter().flat_map(Map::keys).chain(right.into_iter().flat_map(Map::keys));
    let mut keys: Vec<&String> = keys.collect();
    keys.sort();
    keys.dedup();
    for key in keys {
        let (l, r) = (left.and_then(|m| m.get(key)), right.and_then(|m| m.get(key)));
        if l == r {
            continue;
        }
        let Some(child) = child(schema, id, key) else { continue };
        let (change, below) = compare_values(schema, child, l, r)?;
        out.push(&Element::field(key), change, below);
    }
    Ok(())
}

/// Items by element, in the order they stand; several for duplicates.
type Items<'v> = Vec<(Element, Vec<&'v Value>)>;

fn items<'v>(schema: &Schema, list: TypeId, value: Option<&'v Value>) -> Result<Items<'v>, String> {
    let mut out: Items<'v> = Vec::new();
    let mut places: HashMap<Element, usize> = HashMap::new();
    for (index, item) in value.and_then(Value::as_array).into_iter().flatten().enumerate() {
        let element = item_element(schema, list, item).map_err(|e| format!("element {index}: {e}"))?;
        match places.get(&element) {
            Some(at) => out[*at].1.push(item),
            None => {
                places.insert(element.clone(), out.len());
                out.push((element, vec![item]));
            }
        }
    }
    Ok(out)
}

fn compare_lists(
    schema: &Schema,
    id: TypeId,
    left: Option<&Value>,
    right: Option<&Value>,
    out: &mut Comparison,
) -> Result<(), String> {
    let node = schema.node(id).item;
    let (left, right) = (items(schema, id, left)?, items(schema, id, right)?);
    let rights: HashMap<&Element, &Vec<&Value>> = right.iter().map(|(e, v)| (e, v)).collect();
    let lefts: HashMap<&Element, &Vec<&Value>> = left.iter().map(|(e, v)| (e, v)).collect();
    let only_right = right.iter().filter(|(e, _)| !lefts.contains_key(e)).map(|(e, _)| e);
    for element in left.iter().map(|(e, _)| e).chain(only_right) {
        let l = lefts.get(element).map_or(&[][..], |v| v.as_slice());
        let r = rights.get(element).map_or(&[][..], |v| v.as_slice());
        // Duplicates count as one value; what is single before or after them is compared item by item.
        let (change, below) = match (l, r) {
            ([] | [_], [] | [_]) => compare_values(schema, node, l.first().copied(), r.first().copied())?,
            ([_, _, ..], [_, _, ..]) => (Change { modified: l != r, ..Change::default() }, Comparison::default()),
            ([_, _, ..], _) => {
                let (change, below) = compare_values(schema, node, None, r.first().copied())?;
                (Change { removed: true, ..change }, below)
            }
            _ => {
                let (change, below) = compare_values(schema, node, l.first().copied(), None)?;
                (Change { added: true, ..change }, below)
            }
        };
        out.push(element, change, below);
    }
    out.sort();
    Ok(())
}

/// All fields that an applied object sets.
pub(super) fn fields(schema: &Schema, id: TypeId, value: &Value) -> Set {
    let mut set = Set::default();
    collect(schema, id, value, &mut set);
    set
}

/// Whether the value itself is a member; what is below it goes to `out`.
fn collect(schema: &Schema, id: TypeId, value: &Value, out: &mut Set) -> bool {
    match (shape(schema, id), value) {
        (Shape::Leaf, _) => true,
        (Shape::Map, Value::Object(map)) => {
            let is_struct = schema.kind(id) == Kind::Struct;
            for (key, value) in map {
                let Some(child) = child(schema, id, key) else { continue };
                let mut below = Set::default();
                let whole = collect(schema, child, value, &mut below);
                let hollow = value.is_null() || value.as_object().is_some_and(Map::is_empty);
                out.push(Element::field(key), whole || hollow || !is_struct, below);
            }
            false
        }
        (Shape::List, Value::Array(_)) => {
            let node = schema.node(id).item;
            for (element, values) in items(schema, id, Some(value)).unwrap_or_default() {
                let mut below = Set::default();
                if let [single] = values.as_slice() {
                    collect(schema, node, single, &mut below);
                }
                out.push(element, true, below);
            }
            out.sort();
            false
        }
        _ => false,
    }
}

/// Merges an applied object into the live one; the applied one wins. `None` when nothing is left.
///
/// # Errors
/// Duplicate or keyless items in the applied object.
pub(super) fn merge(
    schema: &Schema,
    id: TypeId,
    live: Option<&Value>,
    applied: Option<&Value>,
) -> Result<Option<Value>, String> {
    let Some(right) = applied else { return Ok(live.cloned()) };
    let shape = shape(schema, id);
    if shape == Shape::Leaf || (is_empty(live) && is_empty(applied)) {
        return Ok(Some(right.clone()));
    }
    match shape {
        Shape::Map => merge_maps(schema, id, live, right),
        _ => merge_lists(schema, id, live, right),
    }
}

fn merge_maps(schema: &Schema, id: TypeId, live: Option<&Value>, applied: &Value) -> Result<Option<Value>, String> {
    let mut out = live.and_then(Value::as_object).cloned().unwrap_or_default();
    for (key, value) in applied.as_object().into_iter().flatten() {
        let merged = match child(schema, id, key) {
            Some(child) => merge(schema, child, out.get(key), Some(value))?,
            None => Some(value.clone()),
        };
        match merged {
            Some(value) => out.insert(key.clone(), value),
            None => out.remove(key),
        };
    }
    Ok((!out.is_empty()).then_some(Value::Object(out)))
}

/// Items keep the order of the applied list; items that only the live list has stay where they stood relative to the shared ones.
fn merge_lists(schema: &Schema, id: TypeId, live: Option<&Value>, applied: &Value) -> Result<Option<Value>, String> {
    let node = schema.node(id).item;
    let right = items(schema, id, Some(applied))?;
    if let Some((element, _)) = right.iter().find(|(_, values)| values.len() > 1) {
        return Err(format!("duplicate entries for key {element}"));
    }
    // The live list one by one, duplicates included.
    let mut left = Vec::new();
    for (index, item) in live.and_then(Value::as_array).into_iter().flatten().enumerate() {
        let element = item_element(schema, id, item).map_err(|e| format!("element {index}: {e}"))?;
        left.push((element, item));
    }
    let mut singles: HashMap<&Element, Option<&Value>> = HashMap::new();
    for (element, item) in &left {
        singles.entry(element).and_modify(|v| *v = None).or_insert(Some(item));
    }
    let applied: HashMap<&Element, &Value> =
        right.iter().filter_map(|(e, values)| Some((e, *values.first()?))).collect();
    let mut shared = right.iter().map(|(e, _)| e).filter(|e| singles.contains_key(e));
    let mut next = shared.next();
    let mut out = Vec::with_capacity(left.len().max(right.len()));
    let mut merged: Vec<&Element> = Vec::new();
    let one = |element: &Element| {
        let live = singles.get(element).copied().flatten();
        merge(schema, node, live, applied.get(element).copied()).map_err(|e| format!("{element}: {e}"))
    };
    let (mut l, mut r) = (0, 0);
    while l < left.len() || r < right.len() {
        if let (Some((le, _)), Some((re, _))) = (left.get(l), right.get(r)) {
            if le == re {
                out.extend(one(re)?);
                merged.push(re);
                (l, r) = (l + 1, r + 1);
                next = shared.next();
                continue;
            }
            if applied.contains_key(le) && next.is_some_and(|n| n != le) {
                // A shared item, but not the one whose turn it is.
                l += 1;
                continue;
            }
        }
        if let Some((element, item)) = left.get(l) {
            if !applied.contains_key(element) {
                out.push((*item).clone());
                l += 1;
                continue;
            }
            if merged.contains(&element) {
                l += 1;
            }
        }
        if let Some((element, _)) = right.get(r) {
            out.extend(one(element)?);
            merged.push(element);
            r += 1;
            if next == Some(element) {
                next = shared.next();
            }
        }
    }
    Ok((!out.is_empty()).then_some(Value::Array(out)))
}

/// Takes the fields of a set out of a value.
pub(super) fn remove(schema: &Schema, id: TypeId, value: &Value, set: &Set) -> Value {
    match (shape(schema, id), value) {
        (Shape::Map, Value::Object(map)) if !map.is_empty() => {
            let mut out = Map::new();
            for (key, value) in map {
                let element = Element::field(key);
                if set.has(&element) {
                    continue;
                }
                let value = match (set.below(&element), child(schema, id, key)) {
                    (Some(below), Some(child)) => remove(schema, child, value, below),
                    _ => value.clone(),
                };
                out.insert(key.clone(), value);
            }
            if out.is_empty() { Value::Null } else { Value::Object(out) }
        }
        (Shape::List, Value::Array(items)) if !items.is_empty() => {
            let node = schema.node(id).item;
            let mut out = Vec::with_capacity(items.len());
            for item in items {
                let Ok(element) = item_element(schema, id, item) else {
                    out.push(item.clone());
                    continue;
                };
                if set.has(&element) {
                    continue;
                }
                out.push(set.below(&element).map_or_else(|| item.clone(), |below| remove(schema, node, item, below)));
            }
            if out.is_empty() { Value::Null } else { Value::Array(out) }
        }
        (Shape::Leaf, value) if !value.is_object() && !value.is_array() => value.clone(),
        _ => Value::Null,
    }
}

/// Adds the struct fields on the way to every member of the set.
pub(super) fn with_named_fields(schema: &Schema, id: Option<TypeId>, set: &Set) -> Set {
    let mut out = Set::default();
    for entry in set.entries() {
        let (named, below) = match (&entry.element, id) {
            (Element::Field(name), Some(id)) => {
                let named = schema.kind(id) == Kind::Struct && schema.field(id, name).is_some();
                (named, child(schema, id, name))
            }
            (_, Some(id)) => (false, schema.item(id)),
            _ => (false, None),
        };
        let member = entry.member || (named && !entry.children.is_empty());
        out.push(entry.element.clone(), member, with_named_fields(schema, below, &entry.children));
    }
    out
}

/// Checks an applied object against its type: every field declared, every value of the right sort, no duplicate items.
///
/// # Errors
/// One `PATH: TEXT` for each fault.
pub(super) fn validate(schema: &Schema, id: TypeId, value: &Value) -> Result<(), Vec<String>> {
    let mut faults = Vec::new();
    check(schema, id, value, String::new(), &mut faults);
    if faults.is_empty() { Ok(()) } else { Err(faults) }
}

fn check(schema: &Schema, id: TypeId, value: &Value, path: String, faults: &mut Vec<String>) {
    let mut fault = |text: String| faults.push(if path.is_empty() { text } else { format!("{path}: {text}") });
    if value.is_null() {
        return;
    }
    let kind = schema.kind(id);
    match kind {
        Kind::Int32 | Kind::Int64 | Kind::Float64 if !value.is_number() => {
            fault(format!("expected numeric (int or float), got {}", go_type(value)));
        }
        Kind::Bool if !value.is_boolean() => fault(format!("expected boolean, got &{{{}}}", go_print(value))),
        Kind::String | Kind::Bytes if !value.is_string() => {
            fault(format!("expected string, got &value.valueUnstructured{{Value:{value}}}"));
        }
        Kind::Time | Kind::MicroTime | Kind::Quantity | Kind::IntOrString if value.is_object() || value.is_array() => {
            fault(format!("expected any scalar, got &{{{}}}", go_print(value)));
        }
        Kind::List => match value.as_array() {
            None => fault(format!("expected list, got &{{{}}}", go_print(value))),
            Some(items) => check_items(schema, id, items, &path, faults),
        },
        Kind::Struct | Kind::Map => match value.as_object() {
            None => fault(format!("expected map, got &{{{}}}", go_print(value))),
            Some(map) => {
                for (key, value) in map {
                    match child(schema, id, key) {
                        Some(child) => check(schema, child, value, format!("{path}.{key}"), faults),
                        None => {
                            // Upstream looks no further in this struct.
                            faults.push(format!("{path}.{key}: field not declared in schema"));
                            return;
                        }
                    }
                }
            }
        },
        _ => {}
    }
}

fn check_items(schema: &Schema, id: TypeId, items: &[Value], path: &str, faults: &mut Vec<String>) {
    let node = schema.node(id);
    let mut seen: Vec<Element> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let element = if node.list_type == ListType::Atomic {
            Element::Index(index as i64)
        } else {
            match item_element(schema, id, item) {
                Ok(element) => element,
                Err(text) => {
                    faults.push(format!("{path}: element {index}: {text}"));
                    return;
                }
            }
        };
        if seen.contains(&element) {
            faults.push(format!("{path}: duplicate entries for key {element}"));
        }
        check(schema, node.item, item, format!("{path}{element}"), faults);
        seen.push(element);
    }
}

fn go_type(value: &Value) -> &'static str {
    match value {
        Value::Null => "<nil>",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    }
}
