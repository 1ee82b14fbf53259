//! The entries of `metadata.managedFields`.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Map, Value, json};

use super::Operation;
use super::set::Set;
use crate::schema::node::Schema;

/// More update entries than this are merged into one, the oldest first.
const MAX_UPDATE_MANAGERS: usize = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Verb {
    Apply,
    Update,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Verb::Apply => "Apply",
            Verb::Update => "Update",
        }
    }
}

/// What tells two entries apart. Appliers are the same in all versions: `api_version` is empty.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ManagerId {
    pub verb: Verb,
    pub manager: String,
    pub api_version: String,
    pub subresource: String,
}

/// As conflicts name it: `"kubectl" with subresource "status" using v1`.
impl fmt::Display for ManagerId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:?}", self.manager)?;
        if !self.subresource.is_empty() {
            write!(out, " with subresource {:?}", self.subresource)?;
        }
        if self.verb == Verb::Update {
            write!(out, " using {}", self.api_version)?;
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
struct Owned {
    /// Version that the fields are named in.
    api_version: String,
    time: Option<String>,
    fields: Set,
}

/// All entries of one object.
#[derive(Clone, Debug, Default)]
pub(super) struct Managers {
    entries: BTreeMap<ManagerId, Owned>,
}

impl Managers {
    /// # Errors
    /// Upstream's text for the first malformed entry.
    pub fn decode(list: &Value) -> Result<Managers, String> {
        let mut entries = BTreeMap::new();
        for (index, entry) in list.as_array().into_iter().flatten().enumerate() {
            let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let verb = match text("operation").as_str() {
                "Apply" => Verb::Apply,
                "Update" => Verb::Update,
                _ => return Err("operation must be `Apply` or `Update`".to_owned()),
            };
            let api_version = text("apiVersion");
            if api_version.is_empty() {
                return Err("apiVersion must not be empty".to_owned());
            }
            match text("fieldsType").as_str() {
                "FieldsV1" => {}
                "" => return Err(format!("missing fieldsType in managed fields entry {index}")),
                other => return Err(format!("invalid fieldsType {other:?} in managed fields entry {index}")),
            }
            let fields = Set::parse(entry.get("fieldsV1").unwrap_or(&Value::Null))
                .map_err(|e| format!("error decoding versioned set: error decoding set: {e}"))?;
            let id = ManagerId {
                verb,
                manager: text("manager"),
                api_version: if verb == Verb::Update { api_version.clone() } else { String::new() },
                subresource: text("subresource"),
            };
            let time = entry.get("time").and_then(Value::as_str).map(str::to_owned);
            entries.insert(id, Owned { api_version, time, fields });
        }
        Ok(Managers { entries })
    }

    /// Sorted as upstream does: appliers first, then by time, name, version, subresource.
    pub fn encode(&self) -> Value {
        let mut entries: Vec<(&ManagerId, &Owned)> = self.entries.iter().collect();
        entries.sort_by(|(a, x), (b, y)| {
            let left = (a.verb, &x.time, &a.manager, &x.api_version, &a.subresource);
            left.cmp(&(b.verb, &y.time, &b.manager, &y.api_version, &b.subresource))
        });
        let entry = |(id, owned): (&ManagerId, &Owned)| {
            let mut map = Map::new();
            let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
            put("apiVersion", json!(owned.api_version));
            put("fieldsType", json!("FieldsV1"));
            put("fieldsV1", owned.fields.write());
            put("operation", json!(id.verb.name()));
            if !id.manager.is_empty() {
                put("manager", json!(id.manager));
            }
            if !id.subresource.is_empty() {
                put("subresource", json!(id.subresource));
            }
            if let Some(time) = &owned.time {
                put("time", json!(time));
            }
            Value::Object(map)
        };
        Value::Array(entries.into_iter().map(entry).collect())
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Fields that anybody owns.
    pub fn all(&self) -> Set {
        self.entries.values().fold(Set::default(), |all, owned| all.union(&owned.fields))
    }

    pub fn set_of(&self, id: &ManagerId) -> Option<Set> {
        self.entries.get(id).map(|owned| owned.fields.clone())
    }

    /// Replaces what a manager owns.
    pub fn own(&mut self, id: ManagerId, api_version: &str, fields: Set) {
        let time = self.entries.get(&id).and_then(|owned| owned.time.clone());
        self.entries.insert(id, Owned { api_version: api_version.to_owned(), time, fields });
    }

    pub fn touch(&mut self, id: &ManagerId, now: &str) {
        if let Some(owned) = self.entries.get_mut(id) {
            owned.time = Some(now.to_owned());
        }
    }

    /// Entries in a version of the kind that is not served any more say nothing.
    pub fn drop_unknown_versions(&mut self, schema: &Schema, object: &Value) {
        let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
        let (own, kind) = (text("apiVersion"), text("kind"));
        self.entries.retain(|_, owned| {
            let (group, version) = owned.api_version.split_once('/').unwrap_or(("", &owned.api_version));
            owned.api_version == own || schema.by_gvk(group, version, kind).is_some()
        });
    }

    /// What others than `own` have of the changed fields.
    pub fn conflicts(&self, changed: &Set, own: &ManagerId) -> Vec<(ManagerId, Set)> {
        let others = self.entries.iter().filter(|(id, _)| *id != own);
        let shared = others.map(|(id, owned)| (id.clone(), owned.fields.intersection(changed)));
        shared.filter(|(_, set)| !set.is_empty()).collect()
    }

    /// Takes changed and removed fields away from all managers but `own`.
    pub fn disown(&mut self, changed: &Set, removed: &Set, own: Option<&ManagerId>) {
        for (id, owned) in &mut self.entries {
            if Some(id) != own {
                owned.fields = owned.fields.difference(&owned.fields.intersection(changed)).difference(removed);
            }
        }
        self.entries.retain(|_, owned| !owned.fields.is_empty());
    }

    /// Adds changed fields to a manager, less those that nobody owns.
    pub fn take(&mut self, id: ManagerId, operation: &Operation<'_>, changed: &Set) {
        let taken = changed.difference(&never_owned());
        if taken.is_empty() {
            return;
        }
        let before = self.set_of(&id).unwrap_or_default();
        let time = Some(operation.now.to_owned());
        let api_version = operation.api_version.to_owned();
        self.entries.insert(id, Owned { api_version, time, fields: taken.union(&before) });
    }

    /// Removes from a manager what nobody owns.
    pub fn strip(&mut self, id: &ManagerId) {
        if let Some(owned) = self.entries.get_mut(id) {
            owned.fields = owned.fields.difference(&never_owned());
        }
        self.entries.retain(|_, owned| !owned.fields.is_empty());
    }

    /// Merges the oldest update entries until there are few enough.
    pub fn cap(&mut self) {
        let mut updaters: Vec<(Option<String>, ManagerId)> = self
            .entries
            .iter()
            .filter(|(id, _)| id.verb == Verb::Update)
            .map(|(id, owned)| (owned.time.clone(), id.clone()))
            .collect();
        let mut count = updaters.len();
        updaters.sort();
        let mut firsts: BTreeMap<String, ManagerId> = BTreeMap::new();
        for (time, id) in updaters {
            if count <= MAX_UPDATE_MANAGERS {
                return;
            }
            let Some(first) = firsts.get(&id.api_version).cloned() else {
                firsts.insert(id.api_version.clone(), id);
                continue;
            };
            let bucket = ManagerId {
                verb: Verb::Update,
                manager: "ancient-changes".to_owned(),
                api_version: id.api_version.clone(),
                subresource: String::new(),
            };
            if !self.entries.contains_key(&bucket)
                && let Some(owned) = self.entries.remove(&first)
            {
                self.entries.insert(bucket.clone(), owned);
            }
            if let Some(owned) = self.entries.remove(&id) {
                if let Some(target) = self.entries.get_mut(&bucket) {
                    target.fields = target.fields.union(&owned.fields);
                    target.time = time;
                }
                count -= 1;
            }
        }
    }
}

/// Fields that belong to the system.
fn never_owned() -> Set {
    Set::paths(&[
        &["apiVersion"],
        &["kind"],
        &["metadata"],
        &["metadata", "name"],
        &["metadata", "namespace"],
        &["metadata", "creationTimestamp"],
        &["metadata", "selfLink"],
        &["metadata", "uid"],
        &["metadata", "clusterName"],
        &["metadata", "generation"],
        &["metadata", "managedFields"],
        &["metadata", "resourceVersion"],
    ])
}

/// Conflicts less a set of fields.
pub(super) fn without(conflicts: &[(ManagerId, Set)], allowed: &Set) -> Vec<(ManagerId, Set)> {
    let left = conflicts.iter().map(|(id, set)| (id.clone(), set.difference(allowed)));
    left.filter(|(_, set)| !set.is_empty()).collect()
}
