//! Who owns which field: `metadata.managedFields`, kept on every write, and server-side apply on top of it.
//! Reference: KEP-555, `apimachinery/pkg/util/managedfields`, `structured-merge-diff/v6/merge`.
//!
//! Call [`update`] as the last step before an object is stored (after admission), [`apply`] to turn an apply patch into the
//! new object. Entries of other versions of the same kind are compared through the version of the request: the built-in kinds
//! name their fields alike in all served versions.

mod managers;
mod set;
mod walk;

use serde_json::{Map, Value};

use super::node::{Schema, TypeId};
use super::{default, typed};
use managers::{ManagerId, Managers, Verb};
pub use set::{Element, Set};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Bound on the sum of all annotations, in bytes.
const MAX_ANNOTATIONS: usize = 256 * 1024;

/// The request that writes.
#[derive(Clone, Copy, Debug)]
pub struct Operation<'a> {
    /// The `fieldManager` parameter; upstream takes the first part of the user agent when there is none.
    pub manager: &'a str,
    /// Version of the request: `v1`, `apps/v1`.
    pub api_version: &'a str,
    /// `status`, `scale`; empty for the object itself.
    pub subresource: &'a str,
    /// RFC 3339 in whole seconds, UTC.
    pub now: &'a str,
    /// Fields that the strategy resets on this path, so that nobody comes to own them; see [`reset_fields`].
    pub reset: &'a Set,
}

/// Why an object cannot be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// 400 `BadRequest`.
    #[error("{0}")]
    BadRequest(String),
    /// 409 `Conflict`; each cause is of type `FieldManagerConflict`.
    #[error("{message}")]
    Conflict { message: String, causes: Vec<Cause> },
    /// 500 without a reason: upstream passes these on as they are.
    #[error("{0}")]
    Internal(String),
}

/// One conflicting field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// `conflict with "kubectl" using apps/v1`
    pub message: String,
    /// `.spec.replicas`
    pub field: String,
}

/// Sets `metadata.managedFields` of an object that is about to be stored. `live` is the stored object, absent on create.
///
/// Never fails: when the fields cannot be compared the object is stored without managed fields, as upstream does.
pub fn update(schema: &Schema, id: TypeId, live: Option<&Value>, new: &mut Value, operation: &Operation<'_>) {
    let sent = take_managed_fields(new);
    let stored = live.map(managed_fields).unwrap_or(&Value::Null);
    let managers = starting_point(sent.as_ref(), stored, !operation.subresource.is_empty());
    let updated = managers.and_then(|m| track(schema, id, live, new, m, operation).ok());
    if let Some(managers) = updated {
        put_managed_fields(new, &managers);
    }
}

/// Merges an applied configuration into the stored object. Gives the new object in Go form, with defaults and managed fields.
///
/// # Errors
/// See [`ApplyError`].
pub fn apply(
    schema: &Schema,
    id: TypeId,
    live: Option<&Value>,
    patch: &Value,
    operation: &Operation<'_>,
    force: bool,
) -> Result<Value, ApplyError> {
    check_patch(schema, id, patch, operation)?;
    let stored = live.map(managed_fields).unwrap_or(&Value::Null);
    let decoded = Managers::decode(stored);
    let mut managers = decoded.map_err(|e| ApplyError::Internal(format!("failed to decode managed fields: {e}")))?;
    let mut base = live.cloned().unwrap_or_else(|| empty(schema, id, patch));
    take_managed_fields(&mut base);
    if managers.is_empty() && live.is_some() {
        let before = Operation { manager: "before-first-apply", ..*operation };
        let tracked = track(schema, id, None, &base, managers, &before);
        managers =
            tracked.map_err(|e| ApplyError::Internal(format!("failed to create manager for existing fields: {e}")))?;
    }
    let kubectl = operation.manager == "kubectl";
    let merged = match merge(schema, id, &base, patch, managers.clone(), operation, force) {
        Err(Failure::Conflicts(conflicts)) if kubectl => {
            let left = match last_applied_fields(schema, id, &base) {
                Some(allowed) => managers::without(&conflicts, &allowed),
                None => conflicts,
            };
            if !left.is_empty() {
                return Err(conflict_error(&left));
            }
            merge(schema, id, &base, patch, managers, operation, true)
        }
        other => other,
    };
    let Merged { object, mut managers } = merged.map_err(Failure::into_error)?;
    let id_of_manager = manager_id(operation, Verb::Apply);
    let mut value = match object {
        Some(object) => {
            managers.touch(&id_of_manager, operation.now);
            let name = describe(patch);
            let mut value = typed::normalize(schema, id, object).map_err(|e| {
                ApplyError::Internal(format!("failed to convert new object ({name}) to proper version: {e}"))
            })?;
            default::apply(schema, id, &mut value);
            value
        }
        None => base,
    };
    managers.strip(&id_of_manager);
    if kubectl {
        refresh_last_applied(&mut value, patch);
    }
    put_managed_fields(&mut value, &managers);
    Ok(value)
}

/// The fields that upstream's strategies reset on a path (`GetResetFields`): the object itself does not take `status`, `status`
/// takes nothing else.
pub fn reset_fields(schema: &Schema, id: TypeId, group: &str, kind: &str, subresource: &str) -> Set {
    let (spec, status) = (schema.field(id, "spec").is_some(), schema.field(id, "status").is_some());
    if !status || group == "networking.k8s.io" && kind == "ServiceCIDR" {
        return Set::default();
    }
    let csr = kind == "CertificateSigningRequest";
    match subresource {
        "" if csr => Set::paths(&[&["spec"], &["status"]]),
        "" | "finalize" => Set::path(&["status"]),
        "approval" => Set::paths(&[&["spec"], &["status", "certificate"]]),
        "status" if csr => Set::paths(&[&["spec"], &["status", "conditions"]]),
        "status" => {
            let mut set = if spec { Set::path(&["spec"]) } else { Set::default() };
            let more: &[&[&str]] = match (group, kind) {
                ("", "Pod") => &[&["metadata", "deletionTimestamp"], &["metadata", "ownerReferences"]],
                ("apps", "Deployment") => &[&["metadata", "labels"]],
                ("flowcontrol.apiserver.k8s.io", _)
                | ("storage.k8s.io", "VolumeAttachment")
                | ("resource.k8s.io", _)
                | ("internal.apiserver.k8s.io", _)
                | ("storagemigration.k8s.io", _)
                | ("apiextensions.k8s.io", _)
                | ("apiregistration.k8s.io", _) => &[&["metadata"]],
                _ => &[],
            };
            set = set.union(&Set::paths(more));
            set
        }
        _ => Set::default(),
    }
}

fn manager_id(operation: &Operation<'_>, verb: Verb) -> ManagerId {
    let manager = if operation.manager.is_empty() { "unknown" } else { operation.manager };
    ManagerId {
        verb,
        manager: manager.to_owned(),
        api_version: if verb == Verb::Update { operation.api_version.to_owned() } else { String::new() },
        subresource: operation.subresource.to_owned(),
    }
}

/// An object of the kind with nothing set, as Go makes it.
fn empty(schema: &Schema, id: TypeId, like: &Value) -> Value {
    let mut value = typed::zero(schema, id);
    if let Value::Object(map) = &mut value {
        for key in ["apiVersion", "kind"] {
            if let Some(text) = like.get(key) {
                map.insert(key.to_owned(), text.clone());
            }
        }
    }
    value
}

fn managed_fields(object: &Value) -> &Value {
    object.get("metadata").and_then(|m| m.get("managedFields")).unwrap_or(&Value::Null)
}

fn take_managed_fields(object: &mut Value) -> Option<Value> {
    object.get_mut("metadata")?.as_object_mut()?.remove("managedFields")
}

fn put_managed_fields(object: &mut Value, managers: &Managers) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        match managers.encode() {
            Value::Array(entries) if entries.is_empty() => metadata.remove("managedFields"),
            entries => metadata.insert("managedFields".to_owned(), entries),
        };
    }
}

/// The entries to go on from: those the client sent, unless it sent none or nonsense. `None`: the client asked for a reset.
fn starting_point(sent: Option<&Value>, stored: &Value, subresource: bool) -> Option<Managers> {
    let stored = || Managers::decode(stored).unwrap_or_default();
    let Some(sent) = sent.and_then(Value::as_array).filter(|_| !subresource) else { return Some(stored()) };
    let reset = match sent.as_slice() {
        [] => true,
        [single] => single.as_object().is_some_and(Map::is_empty),
        _ => false,
    };
    if reset {
        return None;
    }
    match Managers::decode(&Value::Array(sent.clone())) {
        Ok(managers) if !managers.is_empty() => Some(managers),
        _ => Some(stored()),
    }
}

/// Gives what changed between `live` and `new` to the manager of the request.
fn track(
    schema: &Schema,
    id: TypeId,
    live: Option<&Value>,
    new: &Value,
    mut managers: Managers,
    operation: &Operation<'_>,
) -> Result<Managers, String> {
    if managers.is_empty() && live.is_some() {
        // An object that was never tracked is not tracked from its middle on.
        return Ok(managers);
    }
    let blank;
    let old = match live {
        Some(live) => live,
        None => {
            blank = empty(schema, id, new);
            &blank
        }
    };
    managers.drop_unknown_versions(schema, new);
    let comparison = walk::compare(schema, id, old, new)?.without(operation.reset);
    let changed = comparison.modified.union(&comparison.added);
    managers.disown(&changed, &comparison.removed, None);
    managers.take(manager_id(operation, Verb::Update), operation, &changed);
    managers.cap();
    Ok(managers)
}

/// The outcome of a merge. No object: nothing changed.
struct Merged {
    object: Option<Value>,
    managers: Managers,
}

enum Failure {
    Conflicts(Vec<(ManagerId, Set)>),
    Internal(String),
}

impl Failure {
    fn into_error(self) -> ApplyError {
        match self {
            Failure::Conflicts(conflicts) => conflict_error(&conflicts),
            Failure::Internal(text) => ApplyError::Internal(text),
        }
    }
}

fn merge(
    schema: &Schema,
    id: TypeId,
    live: &Value,
    patch: &Value,
    mut managers: Managers,
    operation: &Operation<'_>,
    force: bool,
) -> Result<Merged, Failure> {
    managers.drop_unknown_versions(schema, patch);
    let internal = |what: &str, e: String| Failure::Internal(format!("{what}: {e}"));
    let merged = walk::merge(schema, id, Some(live), Some(patch))
        .map_err(|e| internal("failed to merge config", e))?
        .unwrap_or_else(|| Value::Object(Map::new()));
    let own = manager_id(operation, Verb::Apply);
    let last = managers.set_of(&own);
    managers.own(own.clone(), operation.api_version, walk::fields(schema, id, patch).without(operation.reset));
    let new = match last.filter(|l| !l.is_empty()) {
        Some(last) => prune(schema, id, merged, &managers, &last),
        None => merged,
    };
    let comparison = walk::compare(schema, id, live, &new)
        .map_err(|e| internal("failed to compare objects", e))?
        .without(operation.reset);
    let changed = comparison.modified.union(&comparison.added);
    let conflicts = managers.conflicts(&changed, &own);
    if !force && !conflicts.is_empty() {
        return Err(Failure::Conflicts(conflicts));
    }
    managers.disown(&changed, &comparison.removed, Some(&own));
    Ok(Merged { object: (*live != new).then_some(new), managers })
}

/// Takes out what this manager applied the last time and not now, unless somebody else owns it.
fn prune(schema: &Schema, id: TypeId, merged: Value, managers: &Managers, last: &Set) -> Value {
    let named = |set: &Set| walk::with_named_fields(schema, Some(id), set);
    let fields = |value: &Value| named(&walk::fields(schema, id, value));
    let last = named(last);
    let all = fields(&merged);
    let pruned = walk::remove(schema, id, &merged, &last);
    let kept = fields(&pruned).union(&named(&managers.all()));
    let pruned = walk::remove(schema, id, &merged, &all.difference(&kept));
    walk::remove(schema, id, &merged, &all.difference(&fields(&pruned)).intersection(&last))
}

/// `default/web; apps/v1, Kind=Deployment`
fn describe(object: &Value) -> String {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    format!("{}/{}; {}", text("/metadata/namespace"), text("/metadata/name"), describe_kind(object))
}

/// `apps/v1, Kind=Deployment`
fn describe_kind(object: &Value) -> String {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let version = text("apiVersion");
    let slash = if version.contains('/') { "" } else { "/" };
    format!("{slash}{version}, Kind={}", text("kind"))
}

fn check_patch(schema: &Schema, id: TypeId, patch: &Value, operation: &Operation<'_>) -> Result<(), ApplyError> {
    let text = |key: &str| patch.get(key).and_then(Value::as_str).unwrap_or_default();
    let (group, version) = operation.api_version.split_once('/').unwrap_or(("", operation.api_version));
    let of_kind = schema.by_gvk(group, version, text("kind")) == Some(id);
    if text("apiVersion") != operation.api_version || !of_kind {
        return Err(ApplyError::BadRequest(format!("invalid object type: {}", describe_kind(patch))));
    }
    if !managed_fields(patch).is_null() {
        return Err(ApplyError::BadRequest("metadata.managedFields must be nil".to_owned()));
    }
    walk::validate(schema, id, patch).map_err(|faults| {
        let text = match faults.as_slice() {
            [single] => single.clone(),
            many => format!("errors:\n{}", many.iter().map(|f| format!("  {f}")).collect::<Vec<_>>().join("\n")),
        };
        ApplyError::Internal(format!("failed to create typed patch object ({}): {text}", describe(patch)))
    })
}

fn conflict_error(conflicts: &[(ManagerId, Set)]) -> ApplyError {
    let mut causes = Vec::new();
    for (manager, set) in conflicts {
        let message = format!("conflict with {manager}");
        causes.extend(set.printed().into_iter().map(|field| Cause { message: message.clone(), field }));
    }
    let message = match causes.as_slice() {
        [single] => format!("Apply failed with 1 conflict: {}: {}", single.message, single.field),
        many => {
            let mut lines = Vec::new();
            for (manager, set) in conflicts {
                lines.push(format!("conflicts with {manager}:"));
                lines.extend(set.printed().into_iter().map(|field| format!("- {field}")));
            }
            format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n"))
        }
    };
    ApplyError::Conflict { message, causes }
}

/// The fields that client-side apply set and that nobody changed since: `kubectl apply --server-side` may take them over.
fn last_applied_fields(schema: &Schema, id: TypeId, live: &Value) -> Option<Set> {
    let text = live.get("metadata")?.get("annotations")?.get(LAST_APPLIED)?.as_str()?;
    let last: Value = serde_json::from_str(text).ok()?;
    if last.get("apiVersion") != live.get("apiVersion") || walk::validate(schema, id, &last).is_err() {
        return None;
    }
    let comparison = walk::compare(schema, id, &last, live).ok()?;
    let fields = walk::fields(schema, id, &last);
    Some(fields.difference(&comparison.modified).difference(&comparison.added).difference(&comparison.removed))
}

/// Keeps the annotation of client-side apply in step, when the object has it.
fn refresh_last_applied(object: &mut Value, patch: &Value) {
    let annotations = object.get_mut("metadata").and_then(|m| m.get_mut("annotations")).and_then(Value::as_object_mut);
    let Some(annotations) = annotations else { return };
    if annotations.get(LAST_APPLIED).and_then(Value::as_str).unwrap_or_default().is_empty() {
        return;
    }
    let mut applied = patch.clone();
    let own = applied.get_mut("metadata").and_then(|m| m.get_mut("annotations")).and_then(Value::as_object_mut);
    if let Some(own) = own {
        own.remove(LAST_APPLIED);
    }
    annotations.insert(LAST_APPLIED.to_owned(), Value::String(format!("{applied}\n")));
    let size: usize = annotations.iter().map(|(k, v)| k.len() + v.as_str().map_or(0, str::len)).sum();
    if size > MAX_ANNOTATIONS {
        annotations.remove(LAST_APPLIED);
    }
}

#[cfg(test)]
mod tests;
