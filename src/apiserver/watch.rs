//! The verb watch: one JSON line per event. An event's line is made once and shared by all watchers that want the stored
//! version as plain JSON; other versions and views are made per watcher.

use super::body::Body;
use super::call::{Call, partial_metadata, respond};
use super::codec;
use super::negotiate::{self, Accepted, Format, View};
use super::object;
use super::options::ListOptions;
use super::read::{self, fresh, page};
use super::resources::Resource;
use super::status::Status;
use super::table;
use bytes::{Bytes, BytesMut};
use coracle_store::{Event, EventKind, KeyValue, StoreError, WatchError, WatchRequest, Watcher, prefix_end};
use http::{Response, StatusCode};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

/// Time between bookmarks.
const BOOKMARK_PERIOD: Duration = Duration::from_secs(60);
/// A bookmark comes this long before the end, so that the next watch starts there.
const LAST_BOOKMARK: Duration = Duration::from_secs(2);
/// Shortest time that a watch without `timeoutSeconds` lasts; up to twice as long, so that not all end at once.
const TIMEOUT_MIN: u64 = 1800;
/// Lines gathered into one frame, in bytes.
const FRAME: usize = 64 * 1024;
/// So many watchers of one range are a crowd. Each rests between two frames, for so long that all of them together get so many
/// frames a second, up to the longest rest. What comes meanwhile goes out together: to deliver each change of a busy
/// collection to a thousand clients by itself would leave no processor for those who write. The first change after a rest is
/// never held up.
const CROWD: usize = 50;
const FRAMES_A_SECOND: f64 = 10_000.0;
const REST_MAX: Duration = Duration::from_millis(100);

/// How long a watcher rests after a frame.
fn rest(crowd: usize) -> Duration {
    if crowd < CROWD { Duration::ZERO } else { Duration::from_secs_f64(crowd as f64 / FRAMES_A_SECOND).min(REST_MAX) }
}

/// What all watchers of an event share.
#[derive(Default)]
struct Shared {
    line: OnceLock<Option<Bytes>>,
}

/// What a watcher sees of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Added,
    Modified,
    Deleted,
}

impl Seen {
    fn name(self) -> &'static str {
        match self {
            Seen::Added => "ADDED",
            Seen::Modified => "MODIFIED",
            Seen::Deleted => "DELETED",
        }
    }
}

/// Which change this is for somebody who only sees selected objects.
fn seen(now: bool, before: bool) -> Option<Seen> {
    match (now, before) {
        (true, false) => Some(Seen::Added),
        (true, true) => Some(Seen::Modified),
        (false, true) => Some(Seen::Deleted),
        (false, false) => None,
    }
}

/// Everything that turns store events into lines for one client.
struct Client {
    resource: Arc<Resource>,
    version: String,
    options: ListOptions,
    accepted: Accepted,
    include: table::Include,
    /// Whether the column definitions of a Table have been sent.
    columns_sent: bool,
}

impl Client {
    fn is_plain(&self) -> bool {
        self.accepted.view == View::Object
            && self.accepted.format == Format::Json
            && codec::is_stored_form(&self.resource, &self.version)
    }

    /// The line of a store event; none when the client does not see it.
    fn line(&mut self, event: &Event) -> Option<Bytes> {
        let now = event.kind == EventKind::Put;
        let before = event.prev.is_some();
        let natural = seen(now, before)?;
        if self.is_plain() && !self.options.selects() {
            return self.shared_line(event, natural);
        }
        let selects = self.options.selects();
        let now = now && (!selects || read::selected(&self.options, &event.kv.value));
        let before = event.prev.as_ref().is_some_and(|p| !selects || read::selected(&self.options, &p.value));
        let seen = seen(now, before)?;
        if seen == natural && self.is_plain() {
            return self.shared_line(event, natural);
        }
        let value = value_of(event, seen)?;
        self.own_line(seen.name(), value, event.kv.mod_revision)
    }

    fn shared_line(&mut self, event: &Event, seen: Seen) -> Option<Bytes> {
        let shared = event.derived(|_| Shared::default());
        let Some(shared) = shared else {
            return self.own_line(seen.name(), value_of(event, seen)?, event.kv.mod_revision);
        };
        shared
            .line
            .get_or_init(|| plain_line(&self.resource, seen.name(), value_of(event, seen)?, event.kv.mod_revision))
            .clone()
    }

    /// A line for this client alone.
    fn own_line(&mut self, kind: &str, value: &[u8], revision: u64) -> Option<Bytes> {
        if self.is_plain() {
            return plain_line(&self.resource, kind, value, revision);
        }
        let mut object = object::decode(value, revision).ok()?;
        codec::from_storage(&self.resource, &self.version, &mut object);
        let shown = match self.accepted.view {
            View::Object => object,
            View::Metadata => partial_metadata(&object, self.accepted.meta_version),
            View::Table => {
                let meta = json!({ "resourceVersion": revision.to_string() });
                let mut shown =
                    table::render(&self.resource, &[object], meta, self.include, self.accepted.meta_version);
                if std::mem::replace(&mut self.columns_sent, true) {
                    shown["columnDefinitions"] = Value::Null;
                }
                shown
            }
        };
        Some(self.wrap(kind, &shown))
    }

    /// An event around an object, in the client's format.
    fn wrap(&self, kind: &str, object: &Value) -> Bytes {
        if self.accepted.format == Format::Protobuf
            && let Some(body) = codec::to_protobuf(object)
        {
            return crate::schema::proto::watch_frame(kind, &body).into();
        }
        object_line(kind, object)
    }

    /// The content type of the stream.
    fn media_type(&self) -> &'static str {
        match self.accepted.format {
            Format::Protobuf => "application/vnd.kubernetes.protobuf;stream=watch",
            _ => negotiate::JSON,
        }
    }

    /// A bookmark; `initial` marks the end of the initial events.
    fn bookmark(&self, revision: u64, initial: bool) -> Bytes {
        let mut object = match self.accepted.view {
            View::Metadata => json!({ "kind": "PartialObjectMetadata",
                "apiVersion": format!("meta.k8s.io/{}", self.accepted.meta_version) }),
            _ => json!({ "kind": self.resource.kind, "apiVersion": self.resource.api_version(&self.version) }),
        };
        object["metadata"] = json!({ "resourceVersion": revision.to_string(), "creationTimestamp": null });
        if initial {
            object["metadata"]["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
        }
        if self.accepted.view == View::Table {
            let meta = json!({ "resourceVersion": revision.to_string() });
            let mut shown = table::render(&self.resource, &[], meta, self.include, self.accepted.meta_version);
            shown["rows"] = json!([{ "cells": [], "object": {
                "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"] } }]);
            shown["columnDefinitions"] = Value::Null;
            object = shown;
        }
        self.wrap("BOOKMARK", &object)
    }
}

/// The stored bytes that an event shows: the object as it is, or as it last was.
fn value_of(event: &Event, seen: Seen) -> Option<&[u8]> {
    match seen {
        Seen::Deleted => event.prev.as_ref().map(|p| &p.value[..]),
        _ => Some(&event.kv.value[..]),
    }
}

fn plain_line(resource: &Resource, kind: &str, value: &[u8], revision: u64) -> Option<Bytes> {
    let mut out = BytesMut::with_capacity(value.len() + 96);
    out.extend_from_slice(b"{\"type\":\"");
    out.extend_from_slice(kind.as_bytes());
    out.extend_from_slice(b"\",\"object\":");
    if !object::splice(resource, value, revision, &mut out) {
        // Written under another storage version.
        let object = object::decode(value, revision).ok()?;
        out.extend_from_slice(object.to_string().as_bytes());
    }
    out.extend_from_slice(b"}\n");
    Some(out.freeze())
}

fn object_line(kind: &str, object: &Value) -> Bytes {
    format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into()
}

fn expired(wanted: u64, oldest: u64) -> Status {
    Status::expired(format!("too old resource version: {wanted} ({oldest})"))
}

/// The verb watch.
pub async fn watch(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let options = ListOptions::new(call.query, call.resource, true)?;
    let accepted = negotiate::negotiate(call.headers, true)?;
    if accepted.format == Format::Yaml {
        return Err(Status::not_acceptable(&["application/json;stream=watch"]));
    }
    // Custom resources have no protobuf form: their clients get JSON.
    let accepted = match codec::type_of(call.kind()) {
        Err(_) => Accepted { format: Format::Json, ..accepted },
        Ok(_) => accepted,
    };
    let include = table::Include::of(call.query)?;
    let wanted = options.revision()?;
    let store = call.server.backend().store().clone();
    let (start, end) = range(call, &options);
    let initial = match (options.send_initial_events, wanted) {
        (Some(send), _) => send,
        (None, None | Some(0)) => true,
        (None, Some(_)) => false,
    };
    let mut view = Client {
        resource: call.resource.clone(),
        version: call.info.version.to_owned(),
        options: options.clone(),
        accepted,
        include,
        columns_sent: false,
    };
    let mut pending = VecDeque::new();
    let from = if initial {
        let page = initial_state(call, &options, wanted).await?;
        for kv in &page.kvs {
            pending.extend(view.own_line("ADDED", &kv.value, kv.mod_revision));
        }
        if options.send_initial_events == Some(true) && options.bookmarks {
            pending.push_back(view.bookmark(page.revision, true));
        }
        page.revision
    } else {
        match wanted {
            Some(revision) if revision > 0 => revision,
            // Without a revision a watch begins with what was acknowledged before it.
            Some(_) => store.revision(),
            None => {
                fresh(call, None).await?;
                store.revision()
            }
        }
    };
    let watcher = match store.watch(WatchRequest { start, end, from_revision: Some(from + 1) }) {
        Ok(watcher) => watcher,
        Err(StoreError::Compacted { compacted }) => {
            let line = view.wrap("ERROR", &expired(from, compacted).to_value());
            return Ok(respond(StatusCode::OK, view.media_type(), Body::full(line)));
        }
        Err(error) => return Err(Status::internal(error)),
    };
    let media_type = view.media_type();
    let seconds = options.timeout_seconds.unwrap_or_else(|| TIMEOUT_MIN + rand::random_range(0..TIMEOUT_MIN));
    let now = Instant::now();
    let deadline = now + Duration::from_secs(seconds);
    let mut next_bookmark = now + BOOKMARK_PERIOD;
    if let Some(last) = deadline.checked_sub(LAST_BOOKMARK).filter(|last| *last > now) {
        next_bookmark = next_bookmark.min(last);
    }
    let stream = Stream { view, watcher, pending, from, deadline, next_bookmark, rested: now, ended: false };
    let shutdown = call.server.shutdown();
    let lines = futures::stream::unfold((stream, shutdown), async |(mut stream, shutdown)| {
        let frame = tokio::select! {
            frame = stream.next_frame() => frame?,
            () = shutdown.cancelled() => return None,
        };
        Some((Ok(frame), (stream, shutdown)))
    });
    Ok(respond(StatusCode::OK, media_type, Body::stream(lines)))
}

/// The keys to watch: one object when the selector or the path names it.
fn range(call: &Call<'_>, options: &ListOptions) -> (Bytes, Bytes) {
    let namespace = call.namespace();
    let name = match options.fields.exact("metadata.name") {
        Some(name) => name,
        None => &call.info.name,
    };
    if !name.is_empty() && (!call.resource.is_namespaced() || !namespace.is_empty()) {
        let key = call.resource.key(namespace, name);
        let mut end = BytesMut::from(&key[..]);
        end.extend_from_slice(b"\x01");
        return (key, end.freeze());
    }
    let prefix = call.resource.collection_key(namespace);
    let end = prefix_end(&prefix);
    (prefix, end)
}

/// The objects a watch begins with.
async fn initial_state(call: &Call<'_>, options: &ListOptions, wanted: Option<u64>) -> Result<read::Page, Status> {
    let mut options = ListOptions { limit: 0, continue_token: String::new(), ..options.clone() };
    // "At least this revision": the newest state is.
    fresh(call, wanted.filter(|_| options.send_initial_events.is_none() || wanted != Some(0))).await?;
    options.resource_version = "0".to_owned();
    let mut page = page(call, &options).await?;
    if !call.info.name.is_empty() && options.fields.exact("metadata.name").is_none() {
        let key = call.key();
        page.kvs.retain(|kv: &KeyValue| kv.key == key);
    }
    Ok(page)
}

struct Stream {
    view: Client,
    watcher: Watcher,
    pending: VecDeque<Bytes>,
    /// Where the watch began, for the text of its failure.
    from: u64,
    deadline: Instant,
    next_bookmark: Instant,
    /// No frame is made of new events before this.
    rested: Instant,
    ended: bool,
}

impl Stream {
    /// The next piece of the body; none at its end.
    async fn next_frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.gather() {
                return Some(frame);
            }
            if self.ended {
                return None;
            }
            let now = Instant::now();
            if self.rested > now {
                tokio::time::sleep_until(self.rested.min(self.deadline)).await;
            }
            let wake = if self.view.options.bookmarks { self.next_bookmark.min(self.deadline) } else { self.deadline };
            tokio::select! {
                biased;
                batch = self.watcher.next() => match batch {
                    Ok(batch) => {
                        for event in &batch.events {
                            self.pending.extend(self.view.line(event));
                        }
                        self.rested = Instant::now() + rest(self.watcher.crowd());
                    }
                    Err(error) => self.fail(&error),
                },
                () = tokio::time::sleep_until(wake) => self.tick(),
            }
        }
    }

    /// Waiting lines as one frame: a single line as it is (shared), several copied together.
    fn gather(&mut self) -> Option<Bytes> {
        let first = self.pending.pop_front()?;
        if self.pending.is_empty() || first.len() >= FRAME {
            return Some(first);
        }
        let mut out = BytesMut::with_capacity(FRAME.min(first.len() * (self.pending.len() + 1)));
        out.extend_from_slice(&first);
        while let Some(line) = self.pending.front() {
            if out.len() + line.len() > FRAME {
                break;
            }
            out.extend_from_slice(line);
            self.pending.pop_front();
        }
        Some(out.freeze())
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if now >= self.deadline {
            self.ended = true;
            return;
        }
        self.next_bookmark = now + BOOKMARK_PERIOD;
        if let Some(last) = self.deadline.checked_sub(LAST_BOOKMARK).filter(|last| *last > now) {
            self.next_bookmark = self.next_bookmark.min(last);
        }
        if let Some(revision) = self.watcher.progress().filter(|r| *r >= self.from) {
            self.pending.push_back(self.view.bookmark(revision, false));
        }
    }

    fn fail(&mut self, error: &WatchError) {
        self.ended = true;
        let status = match error {
            WatchError::Compacted { compacted } => expired(self.from, *compacted),
            // The server stops: the client starts again elsewhere.
            WatchError::Closed => return,
            WatchError::Store(error) => Status::internal(error),
        };
        self.pending.push_back(self.view.wrap("ERROR", &status.to_value()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_crowd_rests() {
        for (crowd, milliseconds) in [(1, 0), (49, 0), (50, 5), (1000, 100), (100_000, 100)] {
            assert_eq!(rest(crowd), Duration::from_millis(milliseconds), "{crowd}");
        }
    }

    #[test]
    fn selectors_turn_changes_into_additions_and_deletions() {
        assert_eq!(seen(true, false), Some(Seen::Added));
        assert_eq!(seen(true, true), Some(Seen::Modified));
        assert_eq!(seen(false, true), Some(Seen::Deleted));
        assert_eq!(seen(false, false), None);
    }
}
