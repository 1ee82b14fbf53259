//! Informers: one list and watch per resource feeds one cache, which all loops share.
//!
//! There is a single watcher over raw bytes for all resources. Whoever subscribes hears of every change once and in order,
//! whether the watch told it or one of our own writes did.

use std::collections::{BTreeMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::Method;
use http_body_util::BodyExt;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api::{ApiError, open, send};
use super::backoff::Backoff;
use super::cache::{Cache, Delta};
use super::object::{Key, Object, parse};
use super::resource::Resource;

const PAGE: usize = 500;
const JSON: &str = "application/json";
const LIST_METADATA: &str = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
const WATCH_METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json";

/// Why a list or watch ended.
#[derive(Debug, thiserror::Error)]
enum FeedError {
    #[error("the revision is compacted away")]
    Expired,
    #[error("asking the API")]
    Api(#[source] ApiError),
    #[error("reading the watch stream")]
    Stream(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the server ended the watch with an error: {0}")]
    Refused(String),
    #[error("reading an answer")]
    Json(#[from] serde_json::Error),
}

impl From<ApiError> for FeedError {
    fn from(error: ApiError) -> FeedError {
        if error.is_gone() { FeedError::Expired } else { FeedError::Api(error) }
    }
}

type Handler = Box<dyn Fn(&Delta) + Send + Sync>;

/// The cache of one resource and those who want to hear of its changes.
pub struct Informer {
    resource: Resource,
    metadata_only: bool,
    cache: RwLock<Cache>,
    /// Held while a change is made and told, so that all hear of changes in one order.
    handlers: Mutex<Vec<(u64, Handler)>>,
    next_handler: AtomicU64,
    synced: watch::Sender<bool>,
}

/// Ends the subscription when dropped.
pub struct Subscription {
    informer: Arc<Informer>,
    id: u64,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.informer.handlers.lock().retain(|(id, _)| *id != self.id);
    }
}

impl Informer {
    fn new(resource: Resource, metadata_only: bool) -> Arc<Informer> {
        Arc::new(Informer {
            resource,
            metadata_only,
            cache: RwLock::default(),
            handlers: Mutex::default(),
            next_handler: AtomicU64::new(0),
            synced: watch::Sender::new(false),
        })
    }

    /// What is informed about.
    pub fn resource(&self) -> &Resource {
        &self.resource
    }

    /// The cache. Hold it briefly and never over an await.
    pub fn read(&self) -> RwLockReadGuard<'_, Cache> {
        self.cache.read()
    }

    /// The object with this key, if the cache has it.
    pub fn get(&self, key: &Key) -> Option<Arc<Object>> {
        self.cache.read().get(key.as_str()).cloned()
    }

    /// Calls `handler` for every change, beginning with all objects there are. Handlers must not block nor write.
    pub fn subscribe(self: &Arc<Self>, handler: impl Fn(&Delta) + Send + Sync + 'static) -> Subscription {
        let id = self.next_handler.fetch_add(1, Ordering::Relaxed);
        let handler: Handler = Box::new(handler);
        let mut handlers = self.handlers.lock();
        let present: Vec<Arc<Object>> = self.cache.read().iter().cloned().collect();
        for object in present {
            tell(&handler, &Delta { old: None, new: Some(object) });
        }
        handlers.push((id, handler));
        Subscription { informer: self.clone(), id }
    }

    /// Waits until the cache has been filled for the first time.
    pub async fn synced(&self) {
        // The sender lives in self, so the only way out is the value.
        let mut synced = self.synced.subscribe();
        let _closed = synced.wait_for(|synced| *synced).await;
    }

    fn change(&self, change: impl FnOnce(&mut Cache) -> Option<Delta>) {
        let handlers = self.handlers.lock();
        let delta = change(&mut self.cache.write());
        if let Some(delta) = delta {
            handlers.iter().for_each(|(_, handler)| tell(handler, &delta));
        }
    }

    /// Lists and watches until cancelled.
    async fn run(self: Arc<Self>, client: kube::Client, cancel: CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(10));
        let mut revision = None;
        loop {
            let turn = self.turn(&client, &mut revision, &mut backoff);
            let ended = tokio::select! {
                () = cancel.cancelled() => return,
                ended = turn => ended,
            };
            let delay = match ended {
                Ok(()) => Duration::ZERO,
                Err(FeedError::Expired) => {
                    revision = None;
                    backoff.fail()
                }
                Err(error) => {
                    tracing::debug!(resource = %self.resource, error = &error as &dyn std::error::Error, "watch interrupted");
                    backoff.fail()
                }
            };
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(delay) => {}
            }
        }
    }

    /// One list (unless a revision to go on from is known) and one watch to its end.
    async fn turn(
        &self,
        client: &kube::Client,
        revision: &mut Option<u64>,
        backoff: &mut Backoff,
    ) -> Result<(), FeedError> {
        let from = match *revision {
            Some(from) => from,
            None => {
                let listed = self.list(client).await?;
                *revision = Some(listed);
                self.synced.send_replace(true);
                listed
            }
        };
        let path = format!(
            "{}?watch=true&allowWatchBookmarks=true&resourceVersion={from}&timeoutSeconds={}",
            self.resource.collection(""),
            1800 + rand::random::<u16>() % 1800
        );
        let accept = if self.metadata_only { WATCH_METADATA } else { JSON };
        let response = open(client, Method::GET, &path, JSON, accept, Vec::new()).await?;
        let mut body = response.into_body();
        let mut lines = Lines::default();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|error| FeedError::Stream(Box::new(error)))?.into_data() else { continue };
            lines.push(data);
            while let Some(line) = lines.next() {
                let seen = self.event(&line)?;
                *revision = Some(seen.max(revision.unwrap_or(0)));
                backoff.reset();
            }
        }
        Ok(())
    }

    async fn list(&self, client: &kube::Client) -> Result<u64, FeedError> {
        let accept = if self.metadata_only { LIST_METADATA } else { JSON };
        let mut seen = HashSet::new();
        let mut token = String::new();
        loop {
            let path = format!("{}?limit={PAGE}{token}", self.resource.collection(""));
            let bytes = send(client, Method::GET, &path, JSON, accept, Vec::new()).await?;
            let page: ListPage<'_> = serde_json::from_slice(&bytes)?;
            for item in page.items.iter().flatten() {
                let object = Arc::new(parse(&self.resource, item.get().as_bytes(), self.metadata_only)?);
                seen.insert(object.key.clone());
                self.change(|cache| cache.watched(object));
            }
            if page.metadata.continue_token.is_empty() {
                let revision = page.metadata.resource_version.parse().unwrap_or(0);
                self.relisted(&seen, revision);
                return Ok(revision);
            }
            token = format!("&continue={}", page.metadata.continue_token);
        }
    }

    fn relisted(&self, seen: &HashSet<Key>, revision: u64) {
        let handlers = self.handlers.lock();
        let deltas = self.cache.write().relisted(seen, revision);
        for delta in &deltas {
            handlers.iter().for_each(|(_, handler)| tell(handler, delta));
        }
    }

    /// Takes in one line of the watch; answers the revision it brings us to.
    fn event(&self, line: &[u8]) -> Result<u64, FeedError> {
        let event: WatchLine<'_> = serde_json::from_slice(line)?;
        let json = event.object.get().as_bytes();
        match event.kind {
            "ADDED" | "MODIFIED" => {
                let object = Arc::new(parse(&self.resource, json, self.metadata_only)?);
                let revision = object.resource_version;
                self.change(|cache| cache.watched(object));
                Ok(revision)
            }
            "DELETED" => {
                let object = parse(&self.resource, json, true)?;
                self.change(|cache| cache.deleted(&object.key, &object.uid, object.resource_version));
                Ok(object.resource_version)
            }
            "BOOKMARK" => {
                let bookmark: Bookmark<'_> = serde_json::from_slice(json)?;
                let revision = bookmark.metadata.resource_version.parse().unwrap_or(0);
                self.cache.write().advance(revision);
                Ok(revision)
            }
            _ => {
                let status: k8s_openapi::apimachinery::pkg::apis::meta::v1::Status = serde_json::from_slice(json)?;
                if status.code == Some(410) {
                    return Err(FeedError::Expired);
                }
                Err(FeedError::Refused(status.message.unwrap_or_default()))
            }
        }
    }
}

fn tell(handler: &Handler, delta: &Delta) {
    if catch_unwind(AssertUnwindSafe(|| handler(delta))).is_err() {
        tracing::error!("a subscriber of an informer panicked");
    }
}

/// Cuts a stream of bytes into lines.
#[derive(Default)]
struct Lines {
    buffer: BytesMut,
    scanned: usize,
}

impl Lines {
    fn push(&mut self, data: Bytes) {
        self.buffer.extend_from_slice(&data);
    }

    fn next(&mut self) -> Option<Bytes> {
        loop {
            let Some(end) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') else {
                self.scanned = self.buffer.len();
                return None;
            };
            let line = self.buffer.split_to(self.scanned + end).freeze();
            self.buffer.advance(1);
            self.scanned = 0;
            if !line.is_empty() {
                return Some(line);
            }
        }
    }
}

#[derive(Deserialize)]
struct WatchLine<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Bookmark<'a> {
    #[serde(borrow)]
    metadata: ListMetadata<'a>,
}

#[derive(Deserialize)]
struct ListPage<'a> {
    #[serde(borrow)]
    metadata: ListMetadata<'a>,
    #[serde(borrow, default)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ListMetadata<'a> {
    #[serde(borrow, default)]
    resource_version: std::borrow::Cow<'a, str>,
    #[serde(borrow, default, rename = "continue")]
    continue_token: std::borrow::Cow<'a, str>,
}

/// All informers of one term of leadership, started as they are first asked for.
pub struct Informers {
    client: kube::Client,
    cancel: CancellationToken,
    tasks: TaskTracker,
    full: Mutex<BTreeMap<Resource, Arc<Informer>>>,
    metadata: Mutex<BTreeMap<Resource, (Arc<Informer>, CancellationToken)>>,
}

impl Informers {
    /// No informer yet. `client` must be allowed to list and watch what will be asked for.
    pub fn new(client: kube::Client, cancel: CancellationToken, tasks: TaskTracker) -> Arc<Informers> {
        Arc::new(Informers { client, cancel, tasks, full: Mutex::default(), metadata: Mutex::default() })
    }

    /// The informer of a resource, with the objects' bytes.
    pub fn of(&self, resource: &Resource) -> Arc<Informer> {
        let mut full = self.full.lock();
        if let Some(informer) = full.get(resource) {
            return informer.clone();
        }
        let informer = Informer::new(resource.clone(), false);
        full.insert(resource.clone(), informer.clone());
        self.tasks.spawn(informer.clone().run(self.client.clone(), self.cancel.clone()));
        informer
    }

    /// An informer that knows at least the metadata: the full one when there is one, else one that keeps no bytes.
    pub fn metadata_of(&self, resource: &Resource) -> Arc<Informer> {
        if let Some(informer) = self.full.lock().get(resource) {
            return informer.clone();
        }
        let mut metadata = self.metadata.lock();
        if let Some((informer, _)) = metadata.get(resource) {
            return informer.clone();
        }
        let informer = Informer::new(resource.clone(), true);
        let cancel = self.cancel.child_token();
        metadata.insert(resource.clone(), (informer.clone(), cancel.clone()));
        self.tasks.spawn(informer.clone().run(self.client.clone(), cancel));
        informer
    }

    /// Ends the metadata informer of a resource that the API no longer serves.
    pub fn drop_metadata(&self, resource: &Resource) {
        if let Some((_, cancel)) = self.metadata.lock().remove(resource) {
            cancel.cancel();
        }
    }

    /// Takes in the answer to a write, as bytes.
    pub fn observe(&self, resource: &Resource, bytes: &[u8]) {
        match parse(resource, bytes, false) {
            Ok(object) => self.observe_object(resource, &Arc::new(object)),
            Err(error) => tracing::debug!(%resource, %error, "an answer to a write is not an object"),
        }
    }

    /// Takes in the answer to a write.
    pub fn observe_object(&self, resource: &Resource, object: &Arc<Object>) {
        let informer = self.full.lock().get(resource).cloned();
        if let Some(informer) = informer {
            informer.change(|cache| cache.written(object.clone()));
        }
    }

    /// Takes in that a deletion took effect at once.
    pub fn forget(&self, resource: &Resource, key: &Key, uid: &str) {
        let informer = self.full.lock().get(resource).cloned();
        if let Some(informer) = informer {
            informer.change(|cache| cache.forget(key, uid));
        }
    }
}

#[cfg(test)]
#[path = "informer_tests.rs"]
mod tests;
