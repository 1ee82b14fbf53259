//! Events: written by one task, repeated ones counted, floods held back as upstream does.

use std::borrow::Cow;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::api::{ApiClient, PatchType};
use super::containers::{self, ContainerKind};

/// Events that wait to be written; more are dropped.
const QUEUE: usize = 1000;
/// Distinct events that are remembered for counting.
const REMEMBERED: usize = 1024;
/// Events an object may have at once, and how often one more.
const BURST: f64 = 25.0;
const REFILL_PER_SECOND: f64 = 1.0 / 300.0;
/// Similar events (all but the message equal) after which they are written as one.
const SIMILAR: u32 = 10;
const SIMILAR_WINDOW: Duration = Duration::from_secs(600);

/// `type` of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EventType {
    /// As it should be.
    Normal,
    /// Somebody should look.
    Warning,
}

#[derive(Debug)]
struct Occurrence {
    object: ObjectReference,
    kind: EventType,
    reason: Cow<'static, str>,
    message: String,
    at: Timestamp,
}

/// Accepts events from everywhere; never waits.
#[derive(Clone)]
pub struct Recorder {
    sender: mpsc::Sender<Occurrence>,
}

impl Recorder {
    /// Starts the writing task.
    pub fn start(api: ApiClient, node_name: String, shutdown: CancellationToken) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(write_all(api, node_name, receiver, shutdown));
        Self { sender }
    }

    /// An event about any object.
    pub fn record(&self, object: ObjectReference, kind: EventType, reason: &'static str, message: impl Into<String>) {
        self.send(object, kind, Cow::Borrowed(reason), message.into());
    }

    /// A warning about a pod whose reason is only known at run time.
    pub fn record_named(&self, pod: &Pod, reason: String, message: String) {
        self.send(pod_reference(pod, None), EventType::Warning, Cow::Owned(reason), message);
    }

    fn send(&self, object: ObjectReference, kind: EventType, reason: Cow<'static, str>, message: String) {
        let event = Occurrence { object, kind, reason, message, at: Timestamp::now() };
        if let Err(error) = self.sender.try_send(event) {
            tracing::debug!(%error, "event dropped");
        }
    }

    /// An event about a pod.
    pub fn pod(&self, pod: &Pod, kind: EventType, reason: &'static str, message: impl Into<String>) {
        self.record(pod_reference(pod, None), kind, reason, message);
    }

    /// An event about a container of a pod.
    pub fn container(&self, pod: &Pod, name: &str, kind: EventType, reason: &'static str, message: impl Into<String>) {
        let list = match containers::find(pod, name).map(|found| found.kind) {
            Some(ContainerKind::Init | ContainerKind::Sidecar) => "spec.initContainers",
            Some(ContainerKind::Ephemeral) => "spec.ephemeralContainers",
            _ => "spec.containers",
        };
        self.record(pod_reference(pod, Some(format!("{list}{{{name}}}"))), kind, reason, message);
    }
}

fn pod_reference(pod: &Pod, field_path: Option<String>) -> ObjectReference {
    ObjectReference {
        api_version: Some("v1".to_owned()),
        kind: Some("Pod".to_owned()),
        namespace: pod.metadata.namespace.clone(),
        name: pod.metadata.name.clone(),
        uid: pod.metadata.uid.clone(),
        resource_version: pod.metadata.resource_version.clone(),
        field_path,
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    field_path: String,
    kind: EventType,
    reason: Cow<'static, str>,
    /// Empty once similar events are written as one.
    message: String,
}

struct Written {
    path: String,
    count: i32,
    seen: Instant,
}

/// What the writer remembers; a pure decision per event.
#[derive(Default)]
struct Correlator {
    written: HashMap<Key, Written>,
    similar: HashMap<Key, (u32, Instant)>,
    buckets: HashMap<String, (f64, Instant)>,
}

impl Correlator {
    /// The event's key and message, or `None` when it is held back.
    fn admit(&mut self, event: &Occurrence, now: Instant) -> Option<(Key, String)> {
        let uid = event.object.uid.clone().or_else(|| event.object.name.clone()).unwrap_or_default();
        let bucket = self.buckets.entry(uid.clone()).or_insert((BURST, now));
        bucket.0 = (bucket.0 + now.duration_since(bucket.1).as_secs_f64() * REFILL_PER_SECOND).min(BURST);
        bucket.1 = now;
        if bucket.0 < 1.0 {
            return None;
        }
        bucket.0 -= 1.0;
        let field_path = event.object.field_path.clone().unwrap_or_default();
        let mut key = Key { uid, field_path, kind: event.kind, reason: event.reason.clone(), message: String::new() };
        let similar = self.similar.entry(key.clone()).or_insert((0, now));
        if now.duration_since(similar.1) > SIMILAR_WINDOW {
            *similar = (0, now);
        }
        let mut exact = key.clone();
        exact.message.clone_from(&event.message);
        if !self.written.contains_key(&exact) {
            similar.0 += 1;
        }
        if similar.0 > SIMILAR {
            return Some((key, format!("(combined from similar events): {}", event.message)));
        }
        key.message.clone_from(&event.message);
        Some((key, event.message.clone()))
    }

    /// Bounded: the oldest half goes when there are too many.
    fn trim(&mut self, now: Instant) {
        if self.written.len() > REMEMBERED {
            let mut ages: Vec<Instant> = self.written.values().map(|written| written.seen).collect();
            ages.sort_unstable();
            let cut = ages[ages.len() / 2];
            self.written.retain(|_, written| written.seen > cut);
        }
        if self.similar.len() > REMEMBERED {
            self.similar.retain(|_, (_, since)| now.duration_since(*since) < SIMILAR_WINDOW / 2);
        }
        if self.buckets.len() > REMEMBERED {
            self.buckets.retain(|_, (_, since)| now.duration_since(*since) < SIMILAR_WINDOW);
        }
    }
}

async fn write_all(
    api: ApiClient,
    node_name: String,
    mut receiver: mpsc::Receiver<Occurrence>,
    shutdown: CancellationToken,
) {
    let mut correlator = Correlator::default();
    loop {
        let event = tokio::select! {
            event = receiver.recv() => match event { Some(event) => event, None => return },
            () = shutdown.cancelled() => return,
        };
        let now = Instant::now();
        correlator.trim(now);
        let Some((key, message)) = correlator.admit(&event, now) else { continue };
        if let Err(error) = write(&api, &node_name, &mut correlator, event, key, message).await {
            tracing::debug!(%error, "event not written");
        }
    }
}

async fn write(
    api: &ApiClient,
    node_name: &str,
    correlator: &mut Correlator,
    event: Occurrence,
    key: Key,
    message: String,
) -> Result<(), super::api::ApiError> {
    let at = Time(Timestamp::from_second(event.at.as_second()).unwrap_or(event.at));
    if let Some(written) = correlator.written.get_mut(&key) {
        written.count += 1;
        written.seen = Instant::now();
        let body = serde_json::json!({"count": written.count, "lastTimestamp": at, "message": message});
        let result: Result<serde::de::IgnoredAny, _> = api.patch(&written.path, PatchType::Strategic, &body).await;
        match result {
            Err(error) if error.is_not_found() => {}
            other => return other.map(|_| ()),
        }
    }
    let namespace = event.object.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let nanos = u64::try_from(event.at.as_nanosecond()).unwrap_or_default();
    let name = format!("{}.{nanos:x}", event.object.name.as_deref().unwrap_or_default());
    let object = Event {
        metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace.clone()), ..ObjectMeta::default() },
        involved_object: event.object,
        reason: Some(event.reason.into_owned()),
        message: Some(message),
        source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(node_name.to_owned()) }),
        first_timestamp: Some(at.clone()),
        last_timestamp: Some(at),
        count: Some(1),
        type_: Some(match event.kind {
            EventType::Normal => "Normal".to_owned(),
            EventType::Warning => "Warning".to_owned(),
        }),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        ..Event::default()
    };
    let collection = format!("/api/v1/namespaces/{namespace}/events");
    let _: serde::de::IgnoredAny = api.create(&collection, &object).await?;
    let path = format!("{collection}/{name}");
    correlator.written.insert(key, Written { path, count: 1, seen: Instant::now() });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(message: &str) -> Occurrence {
        Occurrence {
            object: ObjectReference { uid: Some("u".into()), ..ObjectReference::default() },
            kind: EventType::Warning,
            reason: Cow::Borrowed("Failed"),
            message: message.into(),
            at: Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn similar_events_are_combined_and_floods_held_back() {
        let mut correlator = Correlator::default();
        let now = Instant::now();
        for index in 0..10 {
            assert_eq!(correlator.admit(&event(&index.to_string()), now).unwrap().1, index.to_string());
        }
        assert!(correlator.admit(&event("11"), now).unwrap().1.starts_with("(combined from similar events): "));
        for _ in 0..14 {
            assert!(correlator.admit(&event("more"), now).is_some());
        }
        assert!(correlator.admit(&event("more"), now).is_none());
        assert!(correlator.admit(&event("more"), now + Duration::from_secs(301)).is_some());
    }
}
