//! One raw-bytes watcher for every part of the agent.
//!
//! [`Watcher`] lists a collection and follows it from there for ever: it relists when the server says `410 Gone`,
//! resumes when a connection ends, and backs off (jittered, bounded) when the server cannot be reached. Objects stay
//! bytes; only the few metadata fields that a cache needs are read. Not one watcher per type: a type is a path.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use kube::client::Body;
use serde::Deserialize;
use serde_json::value::RawValue;

/// Objects per page of a list.
const PAGE: u32 = 500;
/// The longest object line that a watch may carry; longer ones end the connection and force a new list.
const MAX_LINE: usize = 16 << 20;
/// Seconds after which the server ends a watch; a fresh one begins where it ended.
const WATCH_SECONDS: u32 = 590;

/// An object as the server sent it, with what a cache needs to file it.
#[derive(Debug, Clone)]
pub struct Object {
    /// `metadata.namespace`, empty for cluster scope.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// `metadata.uid`.
    pub uid: String,
    /// The whole object as JSON.
    pub json: Bytes,
}

/// What happened to the collection. A list shows as `Restarted`, its objects as `Applied`, then `Synced`: a cache drops
/// what it does not see between `Restarted` and `Synced`.
#[derive(Debug, Clone)]
pub enum Event {
    /// A new list begins; the cache may hold objects that are gone.
    Restarted,
    /// An object exists or has changed.
    Applied(Object),
    /// An object is gone; carries its last state.
    Deleted(Object),
    /// The list is complete.
    Synced,
}

/// What to watch.
#[derive(Debug, Clone, Default)]
pub struct Target {
    /// Path of the collection, e.g. `/api/v1/services` or `/api/v1/namespaces/a/secrets`.
    pub path: String,
    /// `labelSelector`, empty for all.
    pub labels: String,
    /// `fieldSelector`, empty for all, e.g. `spec.nodeName=a`.
    pub fields: String,
}

impl Target {
    /// All objects of a collection.
    pub fn all(path: impl Into<String>) -> Self {
        Self { path: path.into(), ..Self::default() }
    }

    /// Narrows by `fieldSelector`.
    pub fn with_fields(mut self, fields: impl Into<String>) -> Self {
        self.fields = fields.into();
        self
    }

    /// Narrows by `labelSelector`.
    pub fn with_labels(mut self, labels: impl Into<String>) -> Self {
        self.labels = labels.into();
        self
    }

    fn uri(&self, more: &[(&str, &str)]) -> String {
        let mut uri = format!("{}?", self.path);
        let selectors = [("labelSelector", self.labels.as_str()), ("fieldSelector", self.fields.as_str())];
        for (key, value) in selectors.iter().chain(more).filter(|(_, value)| !value.is_empty()) {
            uri.push_str(key);
            uri.push('=');
            escape(&mut uri, value);
            uri.push('&');
        }
        uri.pop();
        uri
    }
}

/// Percent-encodes all but unreserved characters (RFC 3986 section 2.3).
fn escape(out: &mut String, value: &str) {
    const HEX: &[u8; 16] = b"0123456789ABCDEF";
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push(char::from(HEX[usize::from(byte >> 4)]));
            out.push(char::from(HEX[usize::from(byte & 15)]));
        }
    }
}

/// Follows one collection; see the module.
pub struct Watcher {
    client: kube::Client,
    target: Target,
    state: State,
    /// Failures in a row; 0 after anything arrived.
    failures: u32,
    /// Events decoded and not yet handed out.
    ready: std::collections::VecDeque<Event>,
}

enum State {
    /// Nothing is known: list.
    List,
    /// In the middle of a list.
    Page { token: String },
    /// Everything up to the revision was seen; no connection.
    Idle { revision: String },
    /// Connected.
    Watching { revision: String, body: Body, buffer: BytesMut },
}

#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("request failed")]
    Request(#[source] kube::Error),
    #[error("cannot build the request")]
    Build(#[source] http::Error),
    #[error("server answered {0}")]
    Status(http::StatusCode),
    #[error("answer ended early")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("answer is no valid JSON")]
    Json(#[source] serde_json::Error),
    #[error("server reported {code} {reason}")]
    Event { code: u16, reason: String },
    #[error("a line of more than {MAX_LINE} bytes")]
    LongLine,
}

impl WatchError {
    /// The revision is too old to go on from.
    fn is_gone(&self) -> bool {
        matches!(self, Self::Status(http::StatusCode::GONE) | Self::Event { code: 410, .. } | Self::LongLine)
    }
}

#[derive(Deserialize)]
struct RawList<'a> {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(borrow, default)]
    items: Vec<&'a RawValue>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ListMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    token: Option<String>,
}

#[derive(Deserialize)]
struct RawEvent<'a> {
    #[serde(rename = "type")]
    kind: &'a str,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Partial {
    #[serde(default)]
    metadata: Meta,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Meta {
    namespace: String,
    name: String,
    uid: String,
    resource_version: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Status {
    code: u16,
    reason: String,
}

impl Watcher {
    /// A watcher that has not asked anything yet.
    pub fn new(client: kube::Client, target: Target) -> Self {
        Self { client, target, state: State::List, failures: 0, ready: std::collections::VecDeque::new() }
    }

    /// The next event; never ends, waits through failures. Safe to drop and call again (`select!`).
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            if self.failures > 0 {
                tokio::time::sleep(backoff(self.failures)).await;
            }
            match self.step().await {
                Ok(()) => self.failures = 0,
                Err(error) => {
                    self.failures = self.failures.saturating_add(1);
                    self.state = match std::mem::replace(&mut self.state, State::List) {
                        State::Watching { revision, .. } | State::Idle { revision } if !error.is_gone() => {
                            State::Idle { revision }
                        }
                        _ => State::List,
                    };
                    tracing::debug!(path = %self.target.path, failures = self.failures, error = %Chain(&error), "watch interrupted");
                }
            }
        }
    }

    /// One request or one chunk. Cancel safe: state changes only after the await.
    async fn step(&mut self) -> Result<(), WatchError> {
        match &mut self.state {
            State::List => self.page(String::new()).await,
            State::Page { token } => {
                let token = token.clone();
                self.page(token).await
            }
            State::Idle { revision } => {
                let revision = revision.clone();
                let seconds = WATCH_SECONDS.to_string();
                let uri = self.target.uri(&[
                    ("watch", "1"),
                    ("allowWatchBookmarks", "true"),
                    ("timeoutSeconds", &seconds),
                    ("resourceVersion", &revision),
                ]);
                let body = get(&self.client, uri).await?;
                self.state = State::Watching { revision, body, buffer: BytesMut::new() };
                Ok(())
            }
            State::Watching { revision, body, buffer } => {
                let Some(frame) = body.frame().await else {
                    let revision = std::mem::take(revision);
                    self.state = State::Idle { revision };
                    return Ok(());
                };
                let frame = frame.map_err(|error| WatchError::Body(error.into()))?;
                if let Ok(data) = frame.into_data() {
                    let scanned = buffer.len();
                    buffer.extend_from_slice(&data);
                    take_lines(buffer, scanned, revision, &mut self.ready)?;
                }
                Ok(())
            }
        }
    }

    async fn page(&mut self, token: String) -> Result<(), WatchError> {
        let limit = PAGE.to_string();
        let uri = self.target.uri(&[("limit", &limit), ("continue", &token)]);
        let bytes =
            get(&self.client, uri).await?.collect().await.map_err(|error| WatchError::Body(error.into()))?.to_bytes();
        let list: RawList<'_> = serde_json::from_slice(&bytes).map_err(WatchError::Json)?;
        let mut objects = Vec::with_capacity(list.items.len());
        for item in list.items {
            objects.push(Event::Applied(object(item)?.0));
        }
        if token.is_empty() {
            self.ready.push_back(Event::Restarted);
        }
        self.ready.extend(objects);
        self.state = match list.metadata.token.filter(|token| !token.is_empty()) {
            Some(token) => State::Page { token },
            None => {
                self.ready.push_back(Event::Synced);
                State::Idle { revision: list.metadata.resource_version }
            }
        };
        Ok(())
    }
}

/// Not a method: an open body in the watcher's state is not `Sync`, and the task must be `Send`.
async fn get(client: &kube::Client, uri: String) -> Result<Body, WatchError> {
    let request = http::Request::get(uri)
        .header(http::header::ACCEPT, "application/json")
        .extension(crate::servers::pool::Patient)
        .body(Body::empty())
        .map_err(WatchError::Build)?;
    let response = client.send(request).await.map_err(WatchError::Request)?;
    if response.status().is_success() { Ok(response.into_body()) } else { Err(WatchError::Status(response.status())) }
}

/// Decodes every whole line of `buffer`, whose first `scanned` bytes are known to hold no line end.
fn take_lines(
    buffer: &mut BytesMut,
    scanned: usize,
    revision: &mut String,
    ready: &mut std::collections::VecDeque<Event>,
) -> Result<(), WatchError> {
    let mut from = scanned;
    while let Some(end) = buffer[from..].iter().position(|byte| *byte == b'\n') {
        let line = buffer.split_to(from + end + 1);
        from = 0;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let event: RawEvent<'_> = serde_json::from_slice(&line).map_err(WatchError::Json)?;
        if event.kind == "ERROR" {
            let status: Status = serde_json::from_str(event.object.get()).map_err(WatchError::Json)?;
            return Err(WatchError::Event { code: status.code, reason: status.reason });
        }
        let (object, seen) = object(event.object)?;
        if !seen.is_empty() {
            *revision = seen;
        }
        match event.kind {
            "ADDED" | "MODIFIED" => ready.push_back(Event::Applied(object)),
            "DELETED" => ready.push_back(Event::Deleted(object)),
            _ => {} // BOOKMARK
        }
    }
    if buffer.len() > MAX_LINE { Err(WatchError::LongLine) } else { Ok(()) }
}

/// The object and its resourceVersion.
fn object(raw: &RawValue) -> Result<(Object, String), WatchError> {
    let Partial { metadata } = serde_json::from_str(raw.get()).map_err(WatchError::Json)?;
    let json = Bytes::copy_from_slice(raw.get().as_bytes());
    let object = Object { namespace: metadata.namespace, name: metadata.name, uid: metadata.uid, json };
    Ok((object, metadata.resource_version))
}

/// 50 ms doubling to 10 s, of which a random half.
fn backoff(failures: u32) -> Duration {
    let ceiling = (50_u64 << failures.saturating_sub(1).min(8)).min(10_000);
    Duration::from_millis(ceiling / 2 + rand::random_range(0..=ceiling / 2))
}

/// Prints an error with its causes.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            write!(f, ": {error}")?;
            next = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::sync::{Arc, Mutex};

    type Script = Arc<Mutex<Vec<(&'static str, u16, String)>>>;

    /// A client whose server expects these requests (a part of the URI) in order.
    fn client(script: &[(&'static str, u16, &str)]) -> kube::Client {
        let script: Script = Arc::new(Mutex::new(
            script.iter().rev().map(|(part, code, body)| (*part, *code, (*body).to_owned())).collect(),
        ));
        let service = tower::service_fn(move |request: http::Request<Body>| {
            let next = script.lock().unwrap().pop();
            async move {
                let Some((part, code, body)) = next else { return std::future::pending().await };
                let uri = request.uri().to_string();
                assert!(uri.contains(part), "{uri} lacks {part}");
                let body = http_body_util::Full::new(Bytes::from(body));
                Ok::<_, Infallible>(http::Response::builder().status(code).body(body).unwrap())
            }
        });
        kube::Client::new(service, "default")
    }

    fn show(event: &Event) -> String {
        match event {
            Event::Restarted => "restarted".into(),
            Event::Synced => "synced".into(),
            Event::Applied(object) => format!("+{}/{}", object.namespace, object.name),
            Event::Deleted(object) => format!("-{}/{}", object.namespace, object.name),
        }
    }

    async fn take(watcher: &mut Watcher, count: usize) -> Vec<String> {
        let mut out = Vec::new();
        for _ in 0..count {
            out.push(show(&watcher.next().await));
        }
        out
    }

    const A: &str = r#"{"metadata":{"namespace":"n","name":"a","uid":"1","resourceVersion":"5"},"spec":{"x":1}}"#;

    #[tokio::test(start_paused = true)]
    async fn lists_pages_then_watches_from_the_lists_revision_and_relists_when_gone() {
        let first = format!(r#"{{"metadata":{{"resourceVersion":"7","continue":"t/1"}},"items":[{A}]}}"#);
        let second = r#"{"metadata":{"resourceVersion":"7"},"items":[{"metadata":{"name":"b"}}]}"#;
        let events = format!(
            "{}\n{}\n{}\n",
            r#"{"type":"MODIFIED","object":{"metadata":{"name":"b","resourceVersion":"8"}}}"#,
            r#"{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"20"}}}"#,
            r#"{"type":"DELETED","object":{"metadata":{"name":"b","resourceVersion":"21"}}}"#,
        );
        let gone = "{\"type\":\"ERROR\",\"object\":{\"kind\":\"Status\",\"code\":410,\"reason\":\"Expired\"}}\n";
        let client = client(&[
            ("limit=500", 200, &first),
            ("continue=t%2F1", 200, second),
            ("resourceVersion=7", 200, &events),
            ("resourceVersion=21", 500, ""),
            ("resourceVersion=21", 200, gone),
            ("limit=500", 200, r#"{"metadata":{"resourceVersion":"30"},"items":[]}"#),
        ]);
        let mut watcher = Watcher::new(client, Target::all("/api/v1/services").with_fields("spec.nodeName=a"));
        let seen = take(&mut watcher, 8).await;
        assert_eq!(seen, ["restarted", "+n/a", "+/b", "synced", "+/b", "-/b", "restarted", "synced"]);
    }

    #[test]
    fn lines_split_anywhere_are_put_together() {
        let text = format!("{{\"type\":\"ADDED\",\"object\":{A}}}\n{{\"type\":\"DELETED\",\"object\":{A}}}\n");
        for size in [1, 7, 64, text.len()] {
            let (mut buffer, mut revision, mut ready) = (BytesMut::new(), String::new(), Default::default());
            for chunk in text.as_bytes().chunks(size) {
                let scanned = buffer.len();
                buffer.extend_from_slice(chunk);
                take_lines(&mut buffer, scanned, &mut revision, &mut ready).unwrap();
            }
            let seen: Vec<String> = ready.iter().map(show).collect();
            assert_eq!((seen, revision.as_str()), (vec!["+n/a".to_owned(), "-n/a".to_owned()], "5"));
        }
    }

    #[test]
    fn selectors_are_escaped() {
        let target = Target::all("/p").with_labels("a in (b,c)");
        assert_eq!(target.uri(&[("limit", "1")]), "/p?labelSelector=a%20in%20%28b%2Cc%29&limit=1");
        assert_eq!(Target::all("/p").uri(&[]), "/p");
    }
}
