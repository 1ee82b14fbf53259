//! One cached object: its stored bytes and the few facts that loops look at without decoding it.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;

use super::resource::Resource;
use super::selector::{Labels, Selector};

/// `namespace/name`, or `name` for cluster-scoped objects; cheap to clone, ordered by namespace.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(Arc<str>);

impl Key {
    /// The key of an object; `namespace` is empty for cluster-scoped ones.
    pub fn new(namespace: &str, name: &str) -> Key {
        if namespace.is_empty() { Key(name.into()) } else { Key(format!("{namespace}/{name}").into()) }
    }

    /// Namespace, empty for cluster-scoped objects.
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// Name of the object.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or(&self.0, |(_, name)| name)
    }

    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What became of a pod, without decoding it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodFacts {
    /// Condition `Ready` is `True`.
    pub ready: bool,
    /// Since when the condition has its status, seconds since the epoch.
    pub ready_since: i64,
    /// `status.podIP`.
    pub ip: Option<Box<str>>,
}

/// A cached object.
#[derive(Debug)]
pub struct Object {
    /// Where it is.
    pub key: Key,
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `metadata.resourceVersion` as the number it is.
    pub resource_version: u64,
    /// `metadata.generation`, 0 when the kind has none.
    pub generation: i64,
    /// `metadata.labels`.
    pub labels: Labels,
    /// `metadata.ownerReferences`.
    pub owners: Box<[OwnerReference]>,
    /// `metadata.finalizers`.
    pub finalizers: Box<[Box<str>]>,
    /// `metadata.creationTimestamp`, seconds since the epoch.
    pub created: i64,
    /// `metadata.deletionTimestamp`.
    pub deleting: Option<Timestamp>,
    /// `spec.nodeName`.
    pub node: Option<Box<str>>,
    /// `status.phase`.
    pub phase: Option<Box<str>>,
    /// `spec.selector`, parsed once.
    pub selector: Option<Box<Selector>>,
    /// Pods only.
    pub pod: PodFacts,
    /// The object as the API sent it; empty in caches of metadata.
    pub bytes: Bytes,
}

impl Object {
    /// Decodes the whole object.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&self.bytes)
    }

    /// The owner reference with `controller: true`.
    pub fn controller(&self) -> Option<&OwnerReference> {
        self.owners.iter().find(|owner| owner.controller == Some(true))
    }

    /// Whether this object's controller has the uid.
    pub fn is_controlled_by(&self, uid: &str) -> bool {
        self.controller().is_some_and(|owner| owner.uid == uid)
    }

    /// `status.phase`, empty when there is none.
    pub fn phase(&self) -> &str {
        self.phase.as_deref().unwrap_or_default()
    }

    /// A pod that has ended.
    pub fn is_finished(&self) -> bool {
        matches!(self.phase(), "Succeeded" | "Failed")
    }

    /// A pod that neither ended nor is being deleted.
    pub fn is_active(&self) -> bool {
        !self.is_finished() && self.deleting.is_none()
    }

    /// A pod that is ready, and has been for `min_ready_seconds`.
    pub fn is_available(&self, min_ready_seconds: i32, now: Timestamp) -> bool {
        self.pod.ready
            && (min_ready_seconds == 0 || self.pod.ready_since + i64::from(min_ready_seconds) <= now.as_second())
    }
}

/// Reads an object; keeps its bytes unless only the metadata is wanted.
pub fn parse(resource: &Resource, json: &[u8], metadata_only: bool) -> Result<Object, serde_json::Error> {
    if metadata_only {
        let raw: RawObject<'_> = serde_json::from_slice(json)?;
        return Ok(raw.metadata.into_object(Bytes::new()));
    }
    let raw: RawFull<'_> = serde_json::from_slice(json)?;
    let mut object = raw.metadata.into_object(Bytes::copy_from_slice(json));
    if let Some(spec) = raw.spec {
        object.node = spec.node_name.filter(|name| !name.is_empty()).map(|name| name.into_owned().into());
        if let Some(selector) = spec.selector {
            object.selector = match &*resource.kind {
                "Service" | "ReplicationController" => Selector::of_map_json(selector.get()).map(Box::new),
                "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "Job" | "PodDisruptionBudget" => {
                    Selector::of_label_selector_json(selector.get()).map(Box::new)
                }
                _ => None,
            };
        }
    }
    if let Some(status) = raw.status {
        object.phase = status.phase.filter(|phase| !phase.is_empty()).map(|phase| phase.into_owned().into());
        if resource.kind == "Pod" {
            object.pod = status.conditions.map(|conditions| pod_facts(conditions.get())).unwrap_or_default();
            object.pod.ip = status.pod_ip.filter(|ip| !ip.is_empty()).map(|ip| ip.into_owned().into());
        }
    }
    Ok(object)
}

fn pod_facts(conditions: &str) -> PodFacts {
    let conditions: Vec<RawCondition<'_>> = serde_json::from_str(conditions).unwrap_or_default();
    conditions.iter().find(|condition| condition.kind == "Ready").map_or_else(PodFacts::default, |condition| PodFacts {
        ready: condition.status == "True",
        ready_since: condition.last_transition_time.map_or(0, Timestamp::as_second),
        ip: None,
    })
}

#[derive(Deserialize)]
struct RawObject<'a> {
    #[serde(borrow)]
    metadata: RawMetadata<'a>,
}

#[derive(Deserialize)]
struct RawFull<'a> {
    #[serde(borrow)]
    metadata: RawMetadata<'a>,
    #[serde(borrow, default)]
    spec: Option<RawSpec<'a>>,
    #[serde(borrow, default)]
    status: Option<RawStatus<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMetadata<'a> {
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow, default)]
    namespace: Cow<'a, str>,
    #[serde(borrow, default)]
    uid: Cow<'a, str>,
    #[serde(borrow, default)]
    resource_version: Cow<'a, str>,
    #[serde(default)]
    generation: i64,
    #[serde(default)]
    labels: Option<Labels>,
    #[serde(default)]
    owner_references: Option<Vec<OwnerReference>>,
    #[serde(default)]
    finalizers: Option<Vec<Box<str>>>,
    #[serde(default)]
    creation_timestamp: Option<Timestamp>,
    #[serde(default)]
    deletion_timestamp: Option<Timestamp>,
}

impl RawMetadata<'_> {
    fn into_object(self, bytes: Bytes) -> Object {
        Object {
            key: Key::new(&self.namespace, &self.name),
            uid: self.uid.into_owned().into(),
            resource_version: self.resource_version.parse().unwrap_or(0),
            generation: self.generation,
            labels: self.labels.unwrap_or_default(),
            owners: self.owner_references.unwrap_or_default().into(),
            finalizers: self.finalizers.unwrap_or_default().into(),
            created: self.creation_timestamp.map_or(0, Timestamp::as_second),
            deleting: self.deletion_timestamp,
            node: None,
            phase: None,
            selector: None,
            pod: PodFacts::default(),
            bytes,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawSpec<'a> {
    #[serde(borrow, default)]
    node_name: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    selector: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct RawStatus<'a> {
    #[serde(borrow, default, rename = "podIP")]
    pod_ip: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    phase: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    conditions: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawCondition<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    status: Cow<'a, str>,
    #[serde(default)]
    last_transition_time: Option<Timestamp>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::resource::{PODS, SERVICES};

    #[test]
    fn a_pod_keeps_its_bytes_and_the_facts_loops_ask_for() {
        let json = br#"{"metadata":{"name":"a","namespace":"n","uid":"u","resourceVersion":"7","labels":{"b":"2","a":"1"},
            "ownerReferences":[{"apiVersion":"apps/v1","kind":"ReplicaSet","name":"r","uid":"o","controller":true}],
            "deletionTimestamp":"2026-01-01T00:00:00Z"},"spec":{"nodeName":"node"},
            "status":{"phase":"Running","conditions":[{"type":"Ready","status":"True","lastTransitionTime":"1970-01-01T00:00:10Z"}]}}"#;
        let pod = parse(&PODS, json, false).unwrap();
        assert_eq!((pod.key.namespace(), pod.key.name(), pod.resource_version), ("n", "a", 7));
        assert_eq!((pod.node.as_deref(), pod.phase()), (Some("node"), "Running"));
        assert!(pod.is_controlled_by("o") && pod.deleting.is_some() && !pod.is_active());
        assert_eq!(pod.labels.get("b"), Some("2"));
        assert!(pod.is_available(0, Timestamp::UNIX_EPOCH));
        assert!(!pod.is_available(5, "1970-01-01T00:00:14Z".parse().unwrap()));
        assert!(pod.is_available(5, "1970-01-01T00:00:15Z".parse().unwrap()));
        assert_eq!(&pod.bytes[..], json);
    }

    #[test]
    fn a_services_selector_is_parsed_once_and_metadata_caches_keep_no_bytes() {
        let json = br#"{"metadata":{"name":"s","namespace":"n"},"spec":{"selector":{"app":"web"}}}"#;
        let service = parse(&SERVICES, json, false).unwrap();
        assert!(service.selector.unwrap().matches(&Labels::from_pairs([("app", "web")])));
        assert!(parse(&SERVICES, json, true).unwrap().bytes.is_empty());
    }
}
