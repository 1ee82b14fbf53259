//! Strategic merge patch: merges lists by key or as sets where the schema says so, steered by directives.
//! Reference: `k8s.io/apimachinery/pkg/util/strategicpatch` and "preserve order in strategic merge patch".

use serde_json::{Map, Value};

use super::super::node::{Kind, PatchStrategy, Schema, TypeId};
use super::{PatchError, go_print};

const DIRECTIVE: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const DELETE_FROM_PRIMITIVES: &str = "$deleteFromPrimitiveList";
const SET_ELEMENT_ORDER: &str = "$setElementOrder";

type Object = Map<String, Value>;

/// Merges a patch into an object of type `id`.
///
/// # Errors
/// [`PatchError::BadRequest`] for malformed directives, [`PatchError::Internal`] for what upstream gives no status.
pub fn apply(schema: &Schema, id: TypeId, original: Object, patch: Object) -> Result<Object, PatchError> {
    Merger { schema }.map(Some(id), original, patch)
}

struct Merger<'s> {
    schema: &'s Schema,
}

/// What the schema says about one member. Below values of unknown type there is nothing to say.
struct Member<'s> {
    node: Option<TypeId>,
    strategy: PatchStrategy,
    merge_key: &'s str,
}

type Merged<T> = Result<T, PatchError>;

fn internal<T>(text: String) -> Merged<T> {
    Err(PatchError::Internal(text))
}

fn bad(text: &str) -> PatchError {
    PatchError::BadRequest(text.to_owned())
}

fn bad_order() -> PatchError {
    bad("invalid patch format of setElementOrder list")
}

fn no_merge_key(map: &Object, key: &str) -> PatchError {
    let map = go_print(&Value::Object(map.clone()));
    PatchError::Internal(format!("map: {map} does not contain declared merge key: {key}"))
}

fn bad_argument(expected: &str, found: &Value) -> PatchError {
    let found = match found {
        Value::Null => "%!s(<nil>)",
        Value::Bool(_) => "bool",
        Value::Number(n) if n.is_f64() => "float64",
        Value::Number(_) => "int64",
        Value::String(_) => "string",
        Value::Array(_) => "[]interface {}",
        Value::Object(_) => "map[string]interface {}",
    };
    PatchError::Internal(format!("expected a {expected}, but received a {found}"))
}

impl<'s> Merger<'s> {
    fn member(&self, node: Option<TypeId>, key: &str) -> Merged<Member<'s>> {
        let plain = |node| Member { node, strategy: PatchStrategy::default(), merge_key: "" };
        let Some(id) = node else { return Ok(plain(None)) };
        match self.schema.kind(id) {
            Kind::Struct => match self.schema.field(id, key) {
                Some(field) => Ok(Member {
                    node: Some(field.node),
                    strategy: field.patch,
                    merge_key: self.schema.merge_key(field),
                }),
                None => internal(format!(
                    "unable to find api field in struct {} for the json field {key:?}",
                    self.schema.go_name(id)
                )),
            },
            Kind::Map => Ok(plain(self.schema.item(id))),
            _ => Ok(plain(None)),
        }
    }

    fn map(&self, node: Option<TypeId>, mut original: Object, mut patch: Object) -> Merged<Object> {
        if let Some(directive) = patch.get(DIRECTIVE) {
            return match directive.as_str() {
                Some("replace") => {
                    patch.remove(DIRECTIVE);
                    Ok(patch)
                }
                Some("delete") => Ok(Object::new()),
                _ => bad_patch_type(directive, &patch),
            };
        }
        retain_keys(&mut original, &mut patch)?;
        self.ordered_lists(node, &mut original, &mut patch)?;
        for (key, value) in patch {
            self.entry(node, &mut original, key, value)?;
        }
        Ok(original)
    }

    fn entry(&self, node: Option<TypeId>, original: &mut Object, key: String, mut patch: Value) -> Merged<()> {
        let mut deletes = false;
        let key = if key.starts_with(DELETE_FROM_PRIMITIVES) {
            deletes = true;
            target(&key, DELETE_FROM_PRIMITIVES)
                .ok_or_else(|| bad("invalid patch format of primitive list"))?
                .to_owned()
        } else {
            key
        };
        if patch.is_null() {
            original.remove(&key);
            return Ok(());
        }
        let old = original.remove(&key);
        let merged = match (old, patch) {
            (Some(Value::Object(old)), Value::Object(patch)) => {
                let member = self.member(node, &key)?;
                if member.strategy.replace {
                    Some(Value::Object(patch))
                } else {
                    Some(Value::Object(self.map(member.node, old, patch)?))
                }
            }
            (Some(Value::Array(old)), Value::Array(patch)) => {
                let member = self.member(node, &key)?;
                Some(Value::Array(self.list(&member, old, patch, deletes)?))
            }
            (old, other) if deletes => {
                // A deletion list for something that is not a list changes nothing.
                patch = other;
                drop(patch);
                old
            }
            (_, mut new) => {
                discard_nulls(&mut new);
                without_directives(new)
            }
        };
        if let Some(merged) = merged {
            original.insert(key, merged);
        }
        Ok(())
    }

    fn list(&self, member: &Member<'_>, old: Vec<Value>, patch: Vec<Value>, deletes: bool) -> Merged<Vec<Value>> {
        if !member.strategy.merge && !deletes {
            return Ok(patch);
        }
        if old.is_empty() && patch.is_empty() {
            return Ok(old);
        }
        let maps = are_maps(&[&old, &patch])?;
        if !maps {
            if deletes {
                return Ok(old.into_iter().filter(|v| !patch.contains(v)).collect());
            }
            let mut merged: Vec<Value> = Vec::with_capacity(old.len() + patch.len());
            for value in old.iter().chain(&patch) {
                if !merged.contains(value) {
                    merged.push(value.clone());
                }
            }
            return arrange(merged, &patch, &old, "", false);
        }
        let key = member.merge_key;
        if key.is_empty() {
            return internal("cannot merge lists without merge key for struct".to_owned());
        }
        let item = member.node.and_then(|n| self.schema.item(n));
        let (old, patch) = special_items(old, patch, key)?;
        let merged = self.items(item, old.clone(), patch.clone(), key)?;
        arrange(merged, &patch, &old, key, true)
    }

    /// Merges items with the same key, appends the others.
    fn items(&self, item: Option<TypeId>, mut old: Vec<Value>, patch: Vec<Value>, key: &str) -> Merged<Vec<Value>> {
        for value in patch {
            let Value::Object(patch) = value else { continue };
            let Some(wanted) = patch.get(key) else { return Err(no_merge_key(&patch, key)) };
            match position(&old, key, wanted)? {
                Some(at) => {
                    let Value::Object(current) = std::mem::take(&mut old[at]) else { continue };
                    old[at] = Value::Object(self.map(item, current, patch)?);
                }
                None => old.push(Value::Object(patch)),
            }
        }
        Ok(old)
    }

    /// `$setElementOrder/KEY` together with the list it orders.
    fn ordered_lists(&self, node: Option<TypeId>, original: &mut Object, patch: &mut Object) -> Merged<()> {
        let directives: Vec<String> = patch.keys().filter(|k| k.starts_with(SET_ELEMENT_ORDER)).cloned().collect();
        for directive in directives {
            let Some(order) = patch.remove(&directive) else { continue };
            let Value::Array(order) = order else { return Err(bad_argument("[]interface {}", &order)) };
            let key = target(&directive, SET_ELEMENT_ORDER).ok_or_else(bad_order)?;
            let old = take_list(original.get(key))?;
            let new = take_list(patch.get(key))?;
            let member = self.member(node, key)?;
            check_order(new.as_deref().unwrap_or_default(), &order, member.merge_key)?;
            let server_order = old.clone().unwrap_or_default();
            let maps = match (&old, &new) {
                (None, None) => continue,
                (a, b) => are_maps(&[a.as_deref().unwrap_or_default(), b.as_deref().unwrap_or_default()]),
            };
            let merged = match (old, new) {
                (Some(old), None) => old,
                (None, Some(new)) => match without_directives(Value::Array(new)) {
                    Some(Value::Array(new)) => new,
                    _ => continue,
                },
                (Some(old), Some(new)) => self.list(&member, old, new, false)?,
                (None, None) => continue,
            };
            let arranged = arrange(merged, &order, &server_order, member.merge_key, maps?)?;
            original.insert(key.to_owned(), Value::Array(arranged));
            patch.remove(key);
        }
        Ok(())
    }
}

fn bad_patch_type<T>(directive: &Value, patch: &Object) -> Merged<T> {
    let patch = go_print(&Value::Object(patch.clone()));
    internal(format!("unknown patch type: {} in map: {patch}", go_print(directive)))
}

/// `KEY` of `PREFIX/KEY`.
fn target<'a>(key: &'a str, prefix: &str) -> Option<&'a str> {
    key.strip_prefix(prefix)?.strip_prefix('/')
}

fn take_list(value: Option<&Value>) -> Merged<Option<Vec<Value>>> {
    match value {
        None => Ok(None),
        Some(Value::Array(items)) => Ok(Some(items.clone())),
        Some(other) => Err(bad_argument("[]interface {}", other)),
    }
}

/// `$retainKeys`: members of the object that it does not list are cleared; what the patch sets must be listed.
fn retain_keys(original: &mut Object, patch: &mut Object) -> Merged<()> {
    let Some(list) = patch.remove(RETAIN_KEYS) else { return Ok(()) };
    let malformed = || bad("invalid patch format of retainKeys");
    let Value::Array(list) = list else { return Err(malformed()) };
    let listed = |key: &str| list.iter().any(|v| v.as_str() == Some(key));
    for (key, value) in patch.iter() {
        let directive = key.starts_with(DELETE_FROM_PRIMITIVES) || key.starts_with(SET_ELEMENT_ORDER);
        if !value.is_null() && !directive && !listed(key) {
            return Err(malformed());
        }
    }
    original.retain(|key, _| listed(key));
    Ok(())
}

/// Whether the lists hold objects; all items must be of one type and not lists.
fn are_maps(lists: &[&[Value]]) -> Merged<bool> {
    let mut first: Option<&Value> = None;
    for value in lists.iter().flat_map(|l| l.iter()) {
        if value.is_array() {
            return Err(PatchError::Unprocessable("lists of lists are not supported".to_owned()));
        }
        match first {
            None => first = Some(value),
            Some(other) if std::mem::discriminant(other) != std::mem::discriminant(value) => {
                return internal("list element types are not identical".to_owned());
            }
            Some(_) => {}
        }
    }
    match first {
        None => internal("no elements in any of the given slices".to_owned()),
        Some(value) => Ok(value.is_object()),
    }
}

/// Carries out `$patch` directives that stand as items of a list; gives the list and the patch without them.
fn special_items(mut old: Vec<Value>, patch: Vec<Value>, key: &str) -> Merged<(Vec<Value>, Vec<Value>)> {
    let (mut plain, mut replace) = (Vec::with_capacity(patch.len()), false);
    for value in patch {
        let Some(map) = value.as_object() else { continue };
        let Some(directive) = map.get(DIRECTIVE) else {
            plain.push(value);
            continue;
        };
        match directive.as_str() {
            Some("delete") => {
                let Some(wanted) = map.get(key) else { return Err(no_merge_key(map, key)) };
                while let Some(at) = position(&old, key, wanted)? {
                    old.remove(at);
                }
            }
            Some("replace") => replace = true,
            Some("merge") => return internal("merging lists cannot yet be specified in the patch".to_owned()),
            _ => return bad_patch_type(directive, map),
        }
    }
    Ok(if replace { (plain, Vec::new()) } else { (old, plain) })
}

fn position(items: &[Value], key: &str, wanted: &Value) -> Merged<Option<usize>> {
    for (at, item) in items.iter().enumerate() {
        let Some(map) = item.as_object() else { return internal(format!("value for key {at} is not a map")) };
        if map.get(key) == Some(wanted) {
            return Ok(Some(at));
        }
    }
    Ok(None)
}

/// Identity of an item in a list: its merge key, or itself.
fn identity<'v>(item: &'v Value, key: &str) -> Option<&'v Value> {
    if key.is_empty() { Some(item) } else { item.get(key) }
}

fn place(order: &[Value], item: &Value, key: &str) -> Option<usize> {
    let wanted = identity(item, key);
    order.iter().position(|o| identity(o, key) == wanted)
}

/// Orders a merged list: items that the patch names as it names them, the others as the server had them, interleaved by the
/// server's order.
fn arrange(merged: Vec<Value>, order: &[Value], server: &[Value], key: &str, maps: bool) -> Merged<Vec<Value>> {
    if maps {
        for item in merged.iter().chain(order).chain(server) {
            match item.as_object() {
                None => return Err(bad_argument("map[string]interface {}", item)),
                Some(map) if !map.contains_key(key) => return Err(no_merge_key(map, key)),
                Some(_) => {}
            }
        }
    }
    let (mut named, mut rest): (Vec<Value>, Vec<Value>) =
        merged.into_iter().partition(|item| place(order, item, key).is_some());
    named.sort_by_key(|item| place(order, item, key));
    rest.sort_by_key(|item| place(server, item, key).unwrap_or(usize::MAX));
    let mut out = Vec::with_capacity(named.len() + rest.len());
    let (mut named, mut rest) = (named.into_iter().peekable(), rest.into_iter().peekable());
    while let (Some(left), Some(right)) = (rest.peek(), named.peek()) {
        let before = match (place(server, left, key), place(server, right, key)) {
            (Some(l), Some(r)) => l < r,
            _ => false,
        };
        out.extend(if before { rest.next() } else { named.next() });
    }
    out.extend(named);
    out.extend(rest);
    Ok(out)
}

/// The items of the patch must stand in the order that `$setElementOrder` gives.
fn check_order(patch: &[Value], order: &[Value], key: &str) -> Merged<()> {
    if patch.is_empty() || order.is_empty() {
        return Ok(());
    }
    let mut at = 0;
    for item in patch {
        if item.get(DIRECTIVE).is_some() {
            continue;
        }
        if let (false, Some(map)) = (key.is_empty(), item.as_object())
            && !map.contains_key(key)
        {
            return Err(no_merge_key(map, key));
        }
        match order[at..].iter().position(|o| identity(o, key) == identity(item, key)) {
            Some(found) => at += found + 1,
            None => {
                let (patch, order) = (Value::Array(patch.to_vec()), Value::Array(order.to_vec()));
                return internal(format!(
                    "The order in patch list:\n{}\n doesn't match {SET_ELEMENT_ORDER} list:\n{}\n",
                    go_print(&patch),
                    go_print(&order)
                ));
            }
        }
    }
    Ok(())
}

/// Null members of a patch that meets nothing mean nothing.
fn discard_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, v| !v.is_null());
            map.values_mut().for_each(discard_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(discard_nulls),
        _ => {}
    }
}

/// A patch taken over as a value: objects with a directive are left out.
fn without_directives(value: Value) -> Option<Value> {
    match value {
        Value::Object(map) if map.contains_key(DIRECTIVE) => None,
        Value::Object(map) => {
            let kept = map.into_iter().filter_map(|(k, v)| Some((k, without_directives(v)?)));
            Some(Value::Object(kept.collect()))
        }
        Value::Array(items) => Some(Value::Array(items.into_iter().filter_map(without_directives).collect())),
        other => Some(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;
    use serde_json::json;

    fn pod(original: Value, patch: Value) -> Merged<Value> {
        let schema = builtin();
        let id = schema.by_gvk("", "v1", "Pod").unwrap();
        let object = |v: Value| v.as_object().cloned().unwrap();
        apply(schema, id, object(original), object(patch)).map(Value::Object)
    }

    fn spec(original: Value, patch: Value) -> Value {
        pod(json!({"spec": original}), json!({"spec": patch})).unwrap()["spec"].take()
    }

    #[test]
    fn lists_of_objects_merge_by_key_and_new_items_come_first() {
        let original = json!({"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]});
        let merged = spec(original, json!({"containers": [{"name": "c", "image": "3"}, {"name": "a", "image": "2"}]}));
        assert_eq!(
            merged["containers"],
            json!([{"name": "c", "image": "3"}, {"name": "a", "image": "2", "args": ["x"]}, {"name": "b", "image": "1"}])
        );
    }

    #[test]
    fn lists_without_a_strategy_are_replaced() {
        let merged = spec(json!({"tolerations": [{"key": "a"}]}), json!({"tolerations": [{"key": "b"}]}));
        assert_eq!(merged, json!({"tolerations": [{"key": "b"}]}));
    }

    #[test]
    fn directives_delete_and_replace() {
        let original = json!({"containers": [{"name": "a"}, {"name": "b"}], "nodeSelector": {"x": "1"}});
        let merged = spec(original.clone(), json!({"containers": [{"name": "a", "$patch": "delete"}]}));
        assert_eq!(merged["containers"], json!([{"name": "b"}]));
        let merged = spec(original.clone(), json!({"containers": [{"$patch": "replace"}, {"name": "z"}]}));
        assert_eq!(merged["containers"], json!([{"name": "z"}]));
        let merged = spec(original.clone(), json!({"nodeSelector": {"$patch": "replace", "y": "2"}}));
        assert_eq!(merged["nodeSelector"], json!({"y": "2"}));
        let merged = spec(original, json!({"nodeSelector": {"$patch": "delete"}}));
        assert_eq!(merged["nodeSelector"], json!({}));
    }

    #[test]
    fn sets_of_scalars_merge_and_shrink() {
        let metadata = |finalizers: Value| json!({"metadata": {"finalizers": finalizers}});
        let merged = pod(metadata(json!(["a", "b"])), metadata(json!(["c", "a"]))).unwrap();
        assert_eq!(merged["metadata"]["finalizers"], json!(["c", "a", "b"]));
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a"]}});
        let merged = pod(metadata(json!(["a", "b"])), patch).unwrap();
        assert_eq!(merged["metadata"]["finalizers"], json!(["b"]));
    }

    #[test]
    fn set_element_order_orders_and_keeps_what_only_the_server_has() {
        let original = json!({"containers": [{"name": "a"}, {"name": "b"}, {"name": "server"}]});
        let patch = json!({"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}],
            "containers": [{"name": "a", "image": "2"}]});
        let merged = spec(original, patch);
        assert_eq!(merged["containers"], json!([{"name": "b"}, {"name": "a", "image": "2"}, {"name": "server"}]));
    }

    #[test]
    fn retain_keys_clears_the_others() {
        let original = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
        let patch =
            json!({"volumes": [{"name": "v", "configMap": {"name": "c"}, "$retainKeys": ["name", "configMap"]}]});
        assert_eq!(spec(original, patch)["volumes"], json!([{"name": "v", "configMap": {"name": "c"}}]));
        let error = pod(json!({"spec": {"a": 1}}), json!({"spec": {"$retainKeys": [], "b": 1}})).unwrap_err();
        assert_eq!(error, PatchError::BadRequest("invalid patch format of retainKeys".to_owned()));
    }

    #[test]
    fn null_removes_and_absent_null_is_nothing() {
        let merged = spec(
            json!({"nodeName": "n", "hostname": "h"}),
            json!({"nodeName": null, "subdomain": null,
            "securityContext": {"runAsUser": null}}),
        );
        assert_eq!(merged, json!({"hostname": "h", "securityContext": {}}));
    }

    #[test]
    fn an_item_without_its_key_is_refused() {
        let error =
            pod(json!({"spec": {"containers": [{"name": "a"}]}}), json!({"spec": {"containers": [{"image": "x"}]}}));
        assert_eq!(
            error.unwrap_err(),
            PatchError::Internal("map: map[image:x] does not contain declared merge key: name".to_owned())
        );
    }
}
