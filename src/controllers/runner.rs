//! Runs a loop: takes keys from its queue, reconciles several at once, retries what failed and contains what panics.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::api::ApiError;
use super::backoff::Backoff;
use super::informer::{Informer, Subscription};
use super::object::Key;
use super::queue::Queue;

/// What a loop wants next for a key that went well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing until something changes.
    Done,
    /// A look after this time.
    After(Duration),
}

/// Why a reconcile failed. The key is retried with backoff.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// The API refused or did not answer.
    #[error("talking to the API")]
    Api(#[from] ApiError),
    /// An object in the cache cannot be decoded.
    #[error("decoding a cached object")]
    Decode(#[from] serde_json::Error),
    /// The world is not ready yet; said in the loop's own words.
    #[error("{0}")]
    NotYet(String),
}

/// A control loop: works on one key at a time of each object.
pub trait Reconcile: Send + Sync + 'static {
    /// Brings the world nearer to what the object with this key asks for.
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>>;
}

/// A loop with its inputs.
pub struct Controller {
    /// Name in logs.
    pub name: &'static str,
    /// What is to be done.
    pub queue: Arc<Queue>,
    /// How many keys are worked on at once.
    pub concurrency: usize,
    /// Caches that must be filled before the first key is taken.
    pub needs: Vec<Arc<Informer>>,
    /// Kept as long as the loop runs.
    pub subscriptions: Vec<Subscription>,
    /// The work.
    pub reconcile: Arc<dyn Reconcile>,
}

impl Controller {
    /// Runs until cancelled.
    pub async fn run(&self, cancel: CancellationToken) {
        for informer in &self.needs {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = informer.synced() => {}
            }
        }
        // A run that panicked left keys behind.
        self.queue.recover();
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                Some((key, outcome)) = running.next(), if !running.is_empty() => self.finish(&key, outcome),
                key = self.queue.next(), if running.len() < self.concurrency => running.push(self.work(key)),
            }
        }
    }

    fn work(&self, key: Key) -> BoxFuture<'static, (Key, Option<Result<Next, ReconcileError>>)> {
        let reconcile = self.reconcile.clone();
        let span = tracing::debug_span!("reconcile", controller = self.name, key = %key);
        async move {
            let outcome = AssertUnwindSafe(reconcile.reconcile(&key)).catch_unwind().await.ok();
            (key, outcome)
        }
        .instrument(span)
        .boxed()
    }

    fn finish(&self, key: &Key, outcome: Option<Result<Next, ReconcileError>>) {
        match outcome {
            Some(Ok(next)) => {
                self.queue.succeeded(key);
                if let Next::After(delay) = next {
                    self.queue.add_after(key.clone(), delay);
                }
            }
            Some(Err(error)) => {
                match &error {
                    // Someone was faster, or what it was about has gone: the next pass sees it.
                    ReconcileError::Api(api)
                        if api.is_conflict() || api.is_not_found() || api.is_namespace_terminating() =>
                    {
                        tracing::debug!(controller = self.name, %key, %api, "reconcile will be repeated");
                    }
                    _ => tracing::warn!(
                        controller = self.name,
                        %key,
                        error = &error as &dyn std::error::Error,
                        "reconcile failed and will be repeated"
                    ),
                }
                self.queue.retry(key.clone());
            }
            None => {
                tracing::error!(controller = self.name, %key, "reconcile panicked and will be repeated");
                self.queue.retry(key.clone());
            }
        }
        self.queue.done(key);
    }
}

/// Runs a task until cancelled, again after it panicked or ended.
pub async fn supervise<F>(name: &'static str, cancel: CancellationToken, mut start: impl FnMut() -> F)
where
    F: Future<Output = ()> + Send,
{
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
    loop {
        let ended = tokio::select! {
            () = cancel.cancelled() => return,
            ended = AssertUnwindSafe(start()).catch_unwind() => ended,
        };
        if cancel.is_cancelled() {
            return;
        }
        if ended.is_err() {
            tracing::error!(task = name, "a control loop panicked and starts again");
        }
        tokio::time::sleep(backoff.fail()).await;
    }
}
