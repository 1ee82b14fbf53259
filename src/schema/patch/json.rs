//! JSON patch (RFC 6902) as `gopkg.in/evanphx/json-patch.v4` does it: negative indexes count from the end, `replace` of an
//! absent member adds it, and its error texts. (The crate `json-patch` differs in all three.)

use serde_json::{Map, Value};

/// Upstream's bound on what `copy` operations may add up to (the request body's bound, 3 MiB).
const COPY_LIMIT: usize = 3 * 1024 * 1024;

const MISSING: &str = "missing value";
const INVALID_INDEX: &str = "invalid index referenced";
const TEST_FAILED: &str = "test failed";

/// The operations of a patch document.
///
/// # Errors
/// Go's text when the document is not a list of objects.
pub fn operations(patch: Value) -> Result<Vec<Map<String, Value>>, String> {
    let found = super::super::decode::json_type(&patch);
    let Value::Array(items) = patch else {
        return Err(format!("json: cannot unmarshal {found} into Go value of type jsonpatch.Patch"));
    };
    let object = |item| match item {
        Value::Object(map) => Ok(map),
        other => {
            let found = super::super::decode::json_type(&other);
            Err(format!("json: cannot unmarshal {found} into Go value of type jsonpatch.Operation"))
        }
    };
    items.into_iter().map(object).collect()
}

/// Members that no operation has.
pub fn strict_findings(operations: &[Map<String, Value>]) -> Vec<String> {
    let known = |key: &str| matches!(key, "op" | "path" | "from" | "value");
    let unknown = operations.iter().enumerate().flat_map(|(index, operation)| {
        let keys = operation.keys().filter(|k| !known(k));
        keys.map(move |key| format!("json patch unknown field \"[{index}].{key}\""))
    });
    unknown.collect()
}

/// Runs the operations in order.
///
/// # Errors
/// The text of the first operation that fails.
pub fn apply(mut document: Value, operations: &[Map<String, Value>]) -> Result<Value, String> {
    let mut copied = 0;
    for operation in operations {
        let kind = operation.get("op").and_then(Value::as_str).unwrap_or("unknown");
        match kind {
            "add" => add(&mut document, operation)?,
            "remove" => remove(&mut document, operation)?,
            "replace" => replace(&mut document, operation)?,
            "move" => relocate(&mut document, operation)?,
            "copy" => copy(&mut document, operation, &mut copied)?,
            "test" => test(&document, operation)?,
            _ => return Err(format!("Unexpected kind: {kind}")),
        }
    }
    Ok(document)
}

fn add(document: &mut Value, operation: &Map<String, Value>) -> Result<(), String> {
    let path = path(operation).ok_or_else(|| format!("add operation failed to decode path: {MISSING}"))?;
    let Some((container, key)) = find(document, path) else {
        return Err(format!("add operation does not apply: doc is missing path: \"{path}\": {MISSING}"));
    };
    insert(container, &key, value(operation)).map_err(|e| format!("error in add for path: '{path}': {e}"))
}

fn remove(document: &mut Value, operation: &Map<String, Value>) -> Result<(), String> {
    let path = path(operation).ok_or_else(|| format!("remove operation failed to decode path: {MISSING}"))?;
    let Some((container, key)) = find(document, path) else {
        return Err(format!("remove operation does not apply: doc is missing path: \"{path}\": {MISSING}"));
    };
    take(container, &key).map(drop).map_err(|e| format!("error in remove for path: '{path}': {e}"))
}

fn replace(document: &mut Value, operation: &Map<String, Value>) -> Result<(), String> {
    let path = path(operation)
        .ok_or_else(|| format!("replace operation failed to decode path: operation missing path field: {MISSING}"))?;
    let value = value(operation);
    if path.is_empty() {
        if !(value.is_object() || value.is_array()) {
            return Err("replace operation value must be object or array".to_owned());
        }
        *document = value;
        return Ok(());
    }
    let Some((container, key)) = find(document, path) else {
        return Err(format!("replace operation does not apply: doc is missing path: {path}: {MISSING}"));
    };
    match container {
        Value::Object(map) => {
            map.insert(key, value);
        }
        Value::Array(items) => {
            let missing = |_| format!("replace operation does not apply: doc is missing key: {path}: {MISSING}");
            let at = index(&key, items.len()).map_err(missing)?;
            items[at] = value;
        }
        _ => {}
    }
    Ok(())
}

fn relocate(document: &mut Value, operation: &Map<String, Value>) -> Result<(), String> {
    let from = from(operation)
        .ok_or_else(|| format!("move operation failed to decode from: operation, missing from field: {MISSING}"))?;
    let Some((container, key)) = find(document, from) else {
        return Err(format!("move operation does not apply: doc is missing from path: {from}: {MISSING}"));
    };
    let value = take(container, &key).map_err(|e| format!("error in move for path: '{key}': {e}"))?;
    let path = path(operation)
        .ok_or_else(|| format!("move operation failed to decode path: operation missing path field: {MISSING}"))?;
    let Some((container, key)) = find(document, path) else {
        return Err(format!("move operation does not apply: doc is missing destination path: {path}: {MISSING}"));
    };
    insert(container, &key, value).map_err(|e| format!("error in move for path: '{path}': {e}"))
}

fn copy(document: &mut Value, operation: &Map<String, Value>, copied: &mut usize) -> Result<(), String> {
    let from = from(operation)
        .ok_or_else(|| format!("copy operation failed to decode from: operation, missing from field: {MISSING}"))?;
    let Some((container, key)) = find(document, from) else {
        return Err(format!("copy operation does not apply: doc is missing from path: {from}: {MISSING}"));
    };
    let value = get(container, &key).map_err(|e| format!("error in copy for from: '{from}': {e}"))?;
    let value = value.cloned().unwrap_or(Value::Null);
    let path = path(operation).ok_or_else(|| format!("copy operation failed to decode path: {MISSING}"))?;
    let Some((container, key)) = find(document, path) else {
        return Err(format!("copy operation does not apply: doc is missing destination path: {path}: {MISSING}"));
    };
    *copied += value.to_string().len();
    if *copied > COPY_LIMIT {
        return Err(format!(
            "Unable to complete the copy, the accumulated size increase of copy is {copied}, exceeding the limit {COPY_LIMIT}"
        ));
    }
    insert(container, &key, value).map_err(|e| format!("error while adding value during copy: {e}"))
}

fn test(document: &Value, operation: &Map<String, Value>) -> Result<(), String> {
    let path = path(operation)
        .ok_or_else(|| format!("test operation failed to decode path: operation missing path field: {MISSING}"))?;
    let failed = || Err(format!("testing value {path} failed: {TEST_FAILED}"));
    let wanted = operation.get("value").unwrap_or(&Value::Null);
    if path.is_empty() {
        return if document == wanted { Ok(()) } else { failed() };
    }
    let Some((container, key)) = look(document, path) else {
        return Err(format!("test operation does not apply: is missing path: {path}: {MISSING}"));
    };
    let found = get(container, &key).map_err(|e| format!("error in test for path: '{path}': {e}"))?;
    if found.unwrap_or(&Value::Null) == wanted { Ok(()) } else { failed() }
}

fn path(operation: &Map<String, Value>) -> Option<&str> {
    operation.get("path").and_then(Value::as_str)
}

fn from(operation: &Map<String, Value>) -> Option<&str> {
    operation.get("from").and_then(Value::as_str)
}

fn value(operation: &Map<String, Value>) -> Value {
    operation.get("value").cloned().unwrap_or(Value::Null)
}

fn unescape(part: &str) -> String {
    part.replace("~1", "/").replace("~0", "~")
}

/// The container that a path points into, and the key in it.
fn find<'a>(document: &'a mut Value, path: &str) -> Option<(&'a mut Value, String)> {
    let (parents, key) = path.rsplit_once('/')?;
    let mut at = document;
    for part in parents.split('/').skip(1) {
        let part = unescape(part);
        at = match at {
            Value::Object(map) => map.get_mut(&part)?,
            Value::Array(items) => {
                let index = index(&part, items.len()).ok()?;
                items.get_mut(index)?
            }
            _ => return None,
        };
    }
    (at.is_object() || at.is_array()).then(|| (at, unescape(key)))
}

fn look<'a>(document: &'a Value, path: &str) -> Option<(&'a Value, String)> {
    let (parents, key) = path.rsplit_once('/')?;
    let mut at = document;
    for part in parents.split('/').skip(1) {
        at = get(at, &unescape(part)).ok()??;
    }
    (at.is_object() || at.is_array()).then(|| (at, unescape(key)))
}

fn get<'a>(container: &'a Value, key: &str) -> Result<Option<&'a Value>, String> {
    match container {
        Value::Object(map) => Ok(map.get(key)),
        Value::Array(items) => index(key, items.len()).map(|i| items.get(i)),
        _ => Ok(None),
    }
}

fn number(key: &str) -> Result<i64, String> {
    key.parse().map_err(|_| format!("strconv.Atoi: parsing \"{key}\": invalid syntax"))
}

/// Index of an item that is there.
fn index(key: &str, len: usize) -> Result<usize, String> {
    let number = number(key)?;
    let at = if number < 0 { number + len as i64 } else { number };
    let refused = || format!("Unable to access invalid index: {number}: {INVALID_INDEX}");
    usize::try_from(at).ok().filter(|i| *i < len).ok_or_else(refused)
}

fn insert(container: &mut Value, key: &str, value: Value) -> Result<(), String> {
    match container {
        Value::Object(map) => {
            map.insert(key.to_owned(), value);
            Ok(())
        }
        Value::Array(items) if key == "-" => {
            items.push(value);
            Ok(())
        }
        Value::Array(items) => {
            number(key).map_err(|e| format!("value was not a proper array index: '{key}': {e}"))?;
            let at = index(key, items.len() + 1)?;
            items.insert(at, value);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn take(container: &mut Value, key: &str) -> Result<Value, String> {
    match container {
        Value::Object(map) => {
            map.remove(key).ok_or_else(|| format!("Unable to remove nonexistent key: {key}: {MISSING}"))
        }
        Value::Array(items) => index(key, items.len()).map(|i| items.remove(i)),
        _ => Ok(Value::Null),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(document: Value, patch: Value) -> Result<Value, String> {
        apply(document, &operations(patch)?)
    }

    #[test]
    fn operations_do_what_the_rfc_says() {
        let document = json!({"a": [1, 2, 3], "b": {"c": 1}});
        for (patch, expected) in [
            (json!([{"op": "add", "path": "/a/1", "value": 9}]), json!({"a": [1, 9, 2, 3], "b": {"c": 1}})),
            (json!([{"op": "add", "path": "/a/-", "value": 9}]), json!({"a": [1, 2, 3, 9], "b": {"c": 1}})),
            (json!([{"op": "remove", "path": "/a/-1"}]), json!({"a": [1, 2], "b": {"c": 1}})),
            (
                json!([{"op": "replace", "path": "/b/new", "value": 1}]),
                json!({"a": [1, 2, 3], "b": {"c": 1, "new": 1}}),
            ),
            (json!([{"op": "move", "from": "/b/c", "path": "/d"}]), json!({"a": [1, 2, 3], "b": {}, "d": 1})),
            (json!([{"op": "copy", "from": "/a/0", "path": "/d"}]), json!({"a": [1, 2, 3], "b": {"c": 1}, "d": 1})),
            (json!([{"op": "test", "path": "/a", "value": [1, 2, 3]}]), document.clone()),
        ] {
            assert_eq!(run(document.clone(), patch), Ok(expected));
        }
    }

    #[test]
    fn failures_have_upstreams_texts() {
        for (patch, text) in [
            (json!([{"op": "test", "path": "/a", "value": 2}]), "testing value /a failed: test failed"),
            (
                json!([{"op": "remove", "path": "/x"}]),
                "error in remove for path: '/x': Unable to remove nonexistent key: x: missing value",
            ),
            (
                json!([{"op": "add", "path": "/x/y", "value": 1}]),
                "add operation does not apply: doc is missing path: \"/x/y\": missing value",
            ),
            (
                json!([{"op": "replace", "path": "/l/7", "value": 1}]),
                "replace operation does not apply: doc is missing key: /l/7: missing value",
            ),
            (
                json!([{"op": "add", "path": "/l/7", "value": 1}]),
                "error in add for path: '/l/7': Unable to access invalid index: 7: invalid index referenced",
            ),
            (json!([{"op": "bad", "path": "/a"}]), "Unexpected kind: bad"),
            (json!({"op": "add"}), "json: cannot unmarshal object into Go value of type jsonpatch.Patch"),
        ] {
            assert_eq!(run(json!({"a": 1, "l": []}), patch).unwrap_err(), text);
        }
    }
}
