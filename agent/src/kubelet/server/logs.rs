//! `/containerLogs/{namespace}/{pod}/{container}`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use http::{Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use k8s_openapi::api::core::v1::ContainerStatus as ApiStatus;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::sync::broadcast;
use tokio::sync::mpsc;

use super::log_file::{LogReader, Wanted};
use super::query::Query;
use super::{Body, Refusal};
use crate::kubelet::container_status::ID_SCHEME;
use crate::kubelet::context::Context;
use crate::kubelet::worker::Published;
use crate::runtime::{ContainerEvent, ContainerState, Runtime};

/// Chunks that may wait for a slow reader.
const AHEAD: usize = 4;

struct Options {
    follow: bool,
    previous: bool,
    tail: Option<u64>,
    limit: Option<usize>,
    wanted: Wanted,
}

impl Options {
    fn parse(query: &Query) -> Result<Self, Refusal> {
        let number = |key: &str| {
            query.get(key).filter(|text| *text != "all").map(|text| {
                text.parse::<u64>().map_err(|_| Refusal::bad_request("{\"message\": \"Unable to decode query.\"}"))
            })
        };
        let tail = match number("tailLines") {
            Some(tail) => Some(tail?),
            None => number("tail").transpose()?,
        };
        let ago = number("sinceSeconds").transpose()?;
        let ago = ago.and_then(|seconds| i64::try_from(seconds).ok()).map(SignedDuration::from_secs);
        let since = match query.get("sinceTime") {
            Some(text) => {
                Some(text.parse().map_err(|_| Refusal::bad_request("{\"message\": \"Unable to decode query.\"}"))?)
            }
            None => ago.and_then(|ago| Timestamp::now().checked_sub(ago).ok()),
        };
        let stream = match query.get("stream") {
            None | Some("" | "All") => None,
            Some("Stdout") => Some("stdout".to_owned()),
            Some("Stderr") => Some("stderr".to_owned()),
            Some(other) => return Err(Refusal::bad_request(format!("invalid stream type {other:?}"))),
        };
        Ok(Self {
            follow: query.is_set("follow"),
            previous: query.is_set("previous"),
            tail,
            limit: number("limitBytes").transpose()?.and_then(|limit| usize::try_from(limit).ok()),
            wanted: Wanted { since, timestamps: query.is_set("timestamps"), stream },
        })
    }
}

/// Streams the log.
pub async fn answer(
    context: &Arc<Context>,
    published: &Published,
    container: &str,
    query: &Query,
) -> Result<Response<Body>, Refusal> {
    let options = Options::parse(query)?;
    let id = container_id(published, container, options.previous).map_err(Refusal::bad_request)?;
    let events = context.runtime.events();
    let status = context
        .runtime
        .container_status(&id)
        .await
        .map_err(|_| Refusal::bad_request(format!("unable to retrieve container logs for {ID_SCHEME}{id}")))?;
    let reader = LogReader::open(&status.log_path, options.tail);
    let reader = reader.map_err(|error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
    let (sender, receiver) = mpsc::channel(AHEAD);
    let stream =
        Stream { runtime: context.runtime.clone(), id, path: status.log_path, events, sender, left: options.limit };
    tokio::spawn(stream.run(reader, options.wanted, options.follow));
    let frames = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|chunk| (chunk, receiver))
    });
    let body = StreamBody::new(frames.map(|chunk: Bytes| Ok(Frame::data(chunk))));
    let mut response = Response::new(BodyExt::boxed(body));
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    Ok(response)
}

/// The container whose log is meant, or upstream's words for why there is none.
fn container_id(published: &Published, container: &str, previous: bool) -> Result<String, String> {
    let status = &published.status;
    let pod = published.pod.metadata.name.as_deref().unwrap_or_default();
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    let found: Option<&ApiStatus> = lists.into_iter().flatten().flatten().find(|status| status.name == container);
    let found = found.ok_or_else(|| format!("container {container:?} in pod {pod:?} is not available"))?;
    let strip = |id: &Option<String>| id.as_deref().and_then(|id| id.strip_prefix(ID_SCHEME)).map(ToOwned::to_owned);
    let last = found.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    let last_id = last.and_then(|last| strip(&last.container_id));
    let state = found.state.clone().unwrap_or_default();
    if previous {
        return last_id.ok_or_else(|| format!("previous terminated container {container:?} in pod {pod:?} not found"));
    }
    let ended = || format!("container {container:?} in pod {pod:?} is terminated");
    if state.running.is_some() {
        return strip(&found.container_id).ok_or_else(ended);
    }
    if let Some(terminated) = &state.terminated {
        return strip(&terminated.container_id).or(last_id).ok_or_else(ended);
    }
    if last.is_some() {
        return last_id.ok_or_else(ended);
    }
    let why = match state.waiting.and_then(|waiting| waiting.reason).as_deref() {
        Some("ErrImagePull") => "image can't be pulled".to_owned(),
        Some("ImagePullBackOff") => "trying and failing to pull image".to_owned(),
        Some(reason) => reason.to_owned(),
        None => return Err(format!("container {container:?} in pod {pod:?} is waiting to start - no logs yet")),
    };
    Err(format!("container {container:?} in pod {pod:?} is waiting to start: {why}"))
}

struct Stream {
    runtime: Arc<dyn Runtime>,
    id: String,
    path: PathBuf,
    events: broadcast::Receiver<ContainerEvent>,
    sender: mpsc::Sender<Bytes>,
    left: Option<usize>,
}

impl Stream {
    async fn run(mut self, mut reader: LogReader, wanted: Wanted, follow: bool) {
        let changes = if follow { self.path.parent().and_then(|folder| watch(folder).ok()) } else { None };
        loop {
            // Asked before the last read: what was written before it ended is still read.
            let ended = !follow || self.has_ended().await;
            loop {
                let mut chunk = Vec::new();
                let more = match reader.read(|line| wanted.append(line, &mut chunk)) {
                    Ok(more) => more,
                    Err(error) => {
                        tracing::debug!(%error, path = %self.path.display(), "log not read");
                        return;
                    }
                };
                if !self.send(chunk).await {
                    return;
                }
                if !more {
                    break;
                }
            }
            if ended {
                return;
            }
            self.wait(changes.as_ref()).await;
        }
    }

    /// False when the reader is gone or has got all it wanted.
    async fn send(&mut self, mut chunk: Vec<u8>) -> bool {
        if let Some(left) = &mut self.left {
            chunk.truncate(*left);
            *left -= chunk.len();
        }
        if !chunk.is_empty() && self.sender.send(chunk.into()).await.is_err() {
            return false;
        }
        self.left != Some(0)
    }

    async fn has_ended(&self) -> bool {
        match self.runtime.container_status(&self.id).await {
            Ok(status) => matches!(status.state, ContainerState::Exited | ContainerState::Unknown),
            Err(_) => true,
        }
    }

    /// Until the file or the container changes, or the reader goes.
    async fn wait(&mut self, changes: Option<&AsyncFd<OwnedFd>>) {
        let file = async {
            match changes {
                Some(changes) => {
                    if let Ok(mut ready) = changes.readable().await {
                        let mut buffer = [0; 4096];
                        while nix::unistd::read(ready.get_inner(), &mut buffer).is_ok_and(|read| read > 0) {}
                        ready.clear_ready();
                    }
                }
                None => std::future::pending().await,
            }
        };
        let (id, events) = (&self.id, &mut self.events);
        let container = async { while events.recv().await.is_ok_and(|event| event.container_id != *id) {} };
        tokio::select! {
            () = file => {}
            () = container => {}
            () = self.sender.closed() => {}
        }
    }
}

fn watch(folder: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    inotify.add_watch(folder, AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
    #[allow(deprecated, reason = "an OwnedFd keeps its descriptor; the safe constructor is not out yet")]
    AsyncFd::new(OwnedFd::from(inotify))
}
