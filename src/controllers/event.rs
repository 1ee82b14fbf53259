//! Events: what loops tell people. Repeats of an event raise its count instead of making a new one.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use serde_json::json;
use tokio::sync::mpsc;

use super::api::{Api, PatchKind};
use super::object::{Key, Object};
use super::resource::{EVENTS, Resource};

/// Events that may wait to be written; more are dropped.
const BACKLOG: usize = 1024;
/// Events whose repeats are recognised.
const REMEMBERED: usize = 2048;

/// Kind of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventType {
    /// All is well.
    Normal,
    /// Someone should look.
    Warning,
}

impl EventType {
    fn as_str(self) -> &'static str {
        match self {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Identity {
    component: &'static str,
    uid: Box<str>,
    kind: EventType,
    reason: &'static str,
    message: String,
}

struct Record {
    api: Api,
    about: ObjectReference,
    identity: Identity,
    at: Timestamp,
}

/// Takes events of all loops to the API, in the background.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Record>,
}

/// A loop's way to tell events: its identity and its component name.
#[derive(Clone)]
pub struct Events {
    recorder: Recorder,
    api: Api,
    component: &'static str,
}

impl Recorder {
    /// A recorder and the task that writes what it is given.
    pub fn new() -> (Recorder, impl Future<Output = ()> + Send) {
        let (queue, records) = mpsc::channel(BACKLOG);
        (Recorder { queue }, write_all(records))
    }

    /// A loop's own view of the recorder.
    pub fn events(&self, api: &Api, component: &'static str) -> Events {
        Events { recorder: self.clone(), api: api.clone(), component }
    }
}

impl Events {
    /// Tells an event about an object. Never waits; what does not fit the backlog is dropped.
    pub fn tell(&self, resource: &Resource, object: &Object, kind: EventType, reason: &'static str, message: String) {
        self.tell_about(reference(resource, object), kind, reason, message);
    }

    /// Tells an event about what a reference names.
    pub fn tell_about(&self, about: ObjectReference, kind: EventType, reason: &'static str, message: String) {
        let uid = about.uid.clone().unwrap_or_default().into();
        let identity = Identity { component: self.component, uid, kind, reason, message: truncated(message) };
        let record = Record { api: self.api.clone(), about, identity, at: Timestamp::now() };
        if self.recorder.queue.try_send(record).is_err() {
            tracing::debug!(reason, "an event was dropped");
        }
    }
}

/// A reference to a cached object.
pub fn reference(resource: &Resource, object: &Object) -> ObjectReference {
    ObjectReference {
        api_version: Some(resource.api_version()),
        kind: Some(resource.kind.to_string()),
        name: Some(object.key.name().to_owned()),
        namespace: Some(object.key.namespace().to_owned()).filter(|namespace| !namespace.is_empty()),
        uid: Some(object.uid.to_string()),
        resource_version: Some(object.resource_version.to_string()),
        field_path: None,
    }
}

/// Upstream's limit for messages is 1,024 bytes.
fn truncated(mut message: String) -> String {
    if message.len() > 1024 {
        let end = (0..=1021).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
        message.push_str("...");
    }
    message
}

async fn write_all(mut records: mpsc::Receiver<Record>) {
    let mut known: HashMap<Identity, (Key, i32)> = HashMap::new();
    while let Some(record) = records.recv().await {
        if known.len() >= REMEMBERED {
            known.clear();
        }
        if let Err(error) = write(&record, &mut known).await {
            tracing::debug!(error = &error as &dyn std::error::Error, "an event could not be written");
        }
    }
}

async fn write(record: &Record, known: &mut HashMap<Identity, (Key, i32)>) -> Result<(), super::api::ApiError> {
    if let Some((key, count)) = known.get_mut(&record.identity) {
        *count += 1;
        let patch = json!({"count": *count, "lastTimestamp": Time(record.at)});
        match record.api.patch(&EVENTS, key, "", PatchKind::Merge, &patch).await {
            Ok(_) => return Ok(()),
            Err(error) if !error.is_not_found() => return Err(error),
            Err(_expired) => {}
        }
    }
    let event = new_event(record);
    let namespace = event.metadata.namespace.clone().unwrap_or_default();
    let written = record.api.create(&EVENTS, &namespace, &event).await?;
    known.insert(record.identity.clone(), (written.key.clone(), 1));
    Ok(())
}

fn new_event(record: &Record) -> Event {
    let about = &record.about;
    let name = format!("{}.{:x}", about.name.as_deref().unwrap_or_default(), record.at.as_nanosecond());
    let namespace = about.namespace.clone().unwrap_or_else(|| "default".to_owned());
    Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(namespace), ..ObjectMeta::default() },
        involved_object: about.clone(),
        type_: Some(record.identity.kind.as_str().to_owned()),
        reason: Some(record.identity.reason.to_owned()),
        message: Some(record.identity.message.clone()),
        source: Some(EventSource { component: Some(record.identity.component.to_owned()), host: None }),
        reporting_component: Some(record.identity.component.to_owned()),
        reporting_instance: Some(String::new()),
        first_timestamp: Some(Time(record.at)),
        last_timestamp: Some(Time(record.at)),
        count: Some(1),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_at_a_character() {
        let cut = truncated("ä".repeat(1000));
        assert!(cut.len() <= 1024 && cut.ends_with("..."));
        assert_eq!(truncated("short".to_owned()), "short");
    }
}
