//! Loops that keep something right whenever objects under one key prefix change: they sweep everything once, then again after
//! each change. For resources of which there are few.

use bytes::Bytes;
use coracle_store::{Store, WatchRequest, prefix_end};
use futures::future::BoxFuture;
use http::{Method, Request};
use serde_json::Value;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Changes that come within this time are worked on together.
const GATHER: Duration = Duration::from_millis(20);
/// Pause before a watch that ended begins anew.
const AGAIN: Duration = Duration::from_millis(500);

/// Writes of a loop, under its own identity.
#[derive(Clone)]
pub struct Client(Option<kube::Client>);

impl Client {
    pub fn new(client: kube::Client) -> Client {
        Client(Some(client))
    }

    /// A client for tests that write nothing.
    #[cfg(test)]
    pub fn none() -> Client {
        Client(None)
    }

    /// PUT of an object that carries the resource version it was read at.
    pub async fn replace(&self, path: &str, object: &Value) -> Result<(), kube::Error> {
        let Some(client) = &self.0 else { return Ok(()) };
        let request = Request::builder().method(Method::PUT).uri(path).header("content-type", "application/json");
        let request = request.body(object.to_string().into_bytes()).map_err(kube::Error::HttpError)?;
        client.request::<Value>(request).await.map(drop)
    }
}

/// Runs `sweep` at the begin of every term of leadership and after changes under `prefix`, until `shutdown`.
pub async fn follow(
    store: Store,
    prefix: &'static str,
    mut leadership: watch::Receiver<bool>,
    shutdown: CancellationToken,
    sweep: impl Fn() -> BoxFuture<'static, ()> + Send,
) {
    let request = WatchRequest {
        start: Bytes::from_static(prefix.as_bytes()),
        end: prefix_end(prefix.as_bytes()),
        from_revision: None,
    };
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            lead = leadership.wait_for(|lead| *lead) => if lead.is_err() { return },
        }
        // The watch begins before the sweep, so that no change falls between them.
        let watcher = store.watch(request.clone());
        sweep().await;
        let Ok(mut watcher) = watcher else {
            tokio::time::sleep(AGAIN).await;
            continue;
        };
        let changed = tokio::select! {
            () = shutdown.cancelled() => return,
            batch = watcher.next() => batch.is_ok(),
            lost = leadership.wait_for(|lead| !*lead) => if lost.is_err() { return } else { true },
        };
        tokio::time::sleep(if changed { GATHER } else { AGAIN }).await;
    }
}
