//! One ReplicaSet of a Deployment: its size, its place in the history and the annotations that tell them.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde_json::Value;

use super::super::template::canonical;
use super::{DESIRED_REPLICAS, LAST_APPLIED, MAX_HISTORY_CHARS, MAX_REPLICAS, REVISION, REVISION_HISTORY, ROLLBACK_TO};

pub(super) struct SetStatus {
    pub(super) replicas: i32,
    pub(super) ready: i32,
    pub(super) available: i32,
    pub(super) terminating: i32,
    pub(super) observed_generation: Option<i64>,
}

pub(super) fn status_of(set: &ReplicaSet) -> SetStatus {
    let status = set.status.as_ref();
    SetStatus {
        replicas: status.map_or(0, |status| status.replicas),
        ready: status.and_then(|status| status.ready_replicas).unwrap_or(0),
        available: status.and_then(|status| status.available_replicas).unwrap_or(0),
        terminating: status.and_then(|status| status.terminating_replicas).unwrap_or(0),
        observed_generation: status.and_then(|status| status.observed_generation),
    }
}

pub(super) fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().map_or(0, |spec| spec.replicas.unwrap_or(1))
}

pub(super) fn available(set: &ReplicaSet) -> i32 {
    status_of(set).available
}

pub(super) fn min_ready_seconds(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.min_ready_seconds).unwrap_or(0)
}

pub(super) fn set_replicas(set: &mut ReplicaSet, size: i32) {
    set.spec.get_or_insert_default().replicas = Some(size);
}

pub(super) fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}

pub(super) fn age(set: &ReplicaSet) -> (Option<&Time>, &str) {
    (set.metadata.creation_timestamp.as_ref(), name(&set.metadata))
}

pub(super) fn owned_age(set: &ReplicaSet) -> (Option<Time>, String) {
    (set.metadata.creation_timestamp.clone(), name(&set.metadata).to_owned())
}

pub(super) fn annotation<'a>(set: &'a ReplicaSet, key: &str) -> Option<&'a str> {
    set.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

pub(super) fn revision(set: &ReplicaSet) -> i64 {
    annotation(set, REVISION).and_then(|revision| revision.parse().ok()).unwrap_or(0)
}

pub(super) fn set_template(set: &ReplicaSet) -> Result<Value, serde_json::Error> {
    set.spec.as_ref().and_then(|spec| spec.template.as_ref()).map_or(Ok(Value::Null), canonical)
}

/// `<deployment>-<hash>`, the first part cut so that the whole is a valid name.
pub(super) fn set_name(deployment: &str, suffix: &str) -> String {
    let room = 253 - 1 - suffix.len();
    format!("{}-{suffix}", &deployment[..deployment.len().min(room)])
}

/// Changes size and replica annotations; `None` when nothing differs.
pub(super) fn resized(set: &mut ReplicaSet, size: i32, wanted: i32, max: i32) -> Option<(Box<ReplicaSet>, i32)> {
    let from = replicas(set);
    let annotated = annotate_replicas(set, wanted, max);
    if from == size && !annotated {
        return None;
    }
    set_replicas(set, size);
    Some((Box::new(set.clone()), from))
}

pub(super) fn annotate_replicas(set: &mut ReplicaSet, wanted: i32, max: i32) -> bool {
    let annotations = set.metadata.annotations.get_or_insert_default();
    let mut changed = false;
    for (key, value) in [(DESIRED_REPLICAS, wanted), (MAX_REPLICAS, max)] {
        let value = value.to_string();
        if annotations.get(key) != Some(&value) {
            annotations.insert(key.to_owned(), value);
            changed = true;
        }
    }
    changed
}

/// Copies the Deployment's annotations and raises the revision, keeping the former ones as history.
pub(super) fn annotate(deployment: &Deployment, set: &mut ReplicaSet, next: i64) -> bool {
    let annotations = set.metadata.annotations.get_or_insert_default();
    let mut changed = copy_annotations(deployment, annotations);
    let former = annotations.get(REVISION).cloned();
    let current = match former.as_deref().unwrap_or("0").parse::<i64>() {
        Ok(current) => current,
        Err(_not_ours) => return changed,
    };
    if current < next {
        annotations.insert(REVISION.to_owned(), next.to_string());
        changed = true;
        if let Some(former) = former {
            remember(annotations, &former);
        }
    }
    changed
}

pub(super) fn copy_annotations(deployment: &Deployment, annotations: &mut BTreeMap<String, String>) -> bool {
    let own = [LAST_APPLIED, REVISION, REVISION_HISTORY, DESIRED_REPLICAS, MAX_REPLICAS, ROLLBACK_TO];
    let mut changed = false;
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !own.contains(&key.as_str()) && annotations.get(key) != Some(value) {
            annotations.insert(key.clone(), value.clone());
            changed = true;
        }
    }
    changed
}

pub(super) fn remember(annotations: &mut BTreeMap<String, String>, revision: &str) {
    let history = annotations.get(REVISION_HISTORY).cloned().unwrap_or_default();
    let mut revisions: Vec<&str> = history.split(',').filter(|revision| !revision.is_empty()).collect();
    revisions.push(revision);
    let length = |revisions: &[&str]| revisions.iter().map(|revision| revision.len() + 1).sum::<usize>();
    while revisions.len() > 1 && length(&revisions) > MAX_HISTORY_CHARS {
        revisions.remove(0);
    }
    annotations.insert(REVISION_HISTORY.to_owned(), revisions.join(","));
}
