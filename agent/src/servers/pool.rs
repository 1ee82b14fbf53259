//! The API over whichever server is well.
//!
//! One task ([`Pool::run`]) decides which connection is used and keeps to it while it is healthy; requests only read its
//! choice. A connection that ends is replaced at once from the other servers; one whose server is silent or not ready is
//! closed when another server is ready, so that watches go on there.
//!
//! | request | when its connection fails |
//! | --- | --- |
//! | nothing of it was sent | sent once more, on another server if there is one |
//! | GET, HEAD | asked once more, on another server if there is one |
//! | anything else | the error goes to the caller, who knows whether to repeat |
//!
//! While no server answers, requests fail at once (callers have their own backoff and durable copies), except those that
//! carry [`Patient`]: they wait for a server.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use kube::client::Body;
use rand::seq::SliceRandom;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::channel::{Channel, ChannelError};
use super::{Servers, explain};
use crate::kubelet::backoff::Jitter;

/// A request with this extension waits for a server however long that takes.
#[derive(Debug, Clone, Copy)]
pub struct Patient;

/// How often the server in use is asked whether it is ready.
const PROBE: Duration = Duration::from_secs(10);
/// Servers are dialed this much apart until one answers.
const STAGGER: Duration = Duration::from_millis(250);
/// How long the head of an answer may take: to reads, and to writes (which a server bounds itself, at 60 s).
const ANSWER_WITHIN: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(65));
/// How long a retry waits for another connection than the one that failed.
const ANOTHER_WITHIN: Duration = Duration::from_secs(2);
/// Delays between rounds over all servers while none answers.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// No server can be reached.
    #[error("no server of the cluster answers: {0}")]
    Unreachable(Arc<str>),
    /// The connection broke.
    #[error("connection to {server} broke")]
    Broken {
        /// Whose.
        server: String,
        /// How.
        #[source]
        source: hyper::Error,
    },
    /// Silence.
    #[error("{server} did not answer in time")]
    Timeout {
        /// Who.
        server: String,
    },
    /// The request's body could not be read.
    #[error("read the request")]
    Request(#[source] Box<dyn std::error::Error + Send + Sync>),
}

#[derive(Clone)]
enum State {
    /// The first round is under way.
    Connecting,
    Connected(Channel),
    /// A whole round has failed.
    Unreachable(Arc<str>),
}

/// The pool. Clones are one pool.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    servers: Servers,
    state: watch::Sender<State>,
    /// Somebody doubts the server in use.
    doubt: Notify,
}

impl Pool {
    /// A pool without a connection; [`Pool::run`] makes it work.
    #[must_use]
    pub fn new(servers: Servers) -> Pool {
        let state = watch::Sender::new(State::Connecting);
        Pool { inner: Arc::new(Inner { servers, state, doubt: Notify::new() }) }
    }

    /// The API client over this pool.
    #[must_use]
    pub fn client(&self) -> kube::Client {
        let pool = self.clone();
        kube::Client::new(tower::service_fn(move |request| pool.clone().answer(request)), "default")
    }

    /// The server in use, for people to read.
    #[must_use]
    pub fn server(&self) -> Option<String> {
        match &*self.inner.state.borrow() {
            State::Connected(channel) => Some(channel.address.clone()),
            _ => None,
        }
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Incoming>, PoolError> {
        let (parts, body) = request.into_parts();
        let patient = parts.extensions.get::<Patient>().is_some();
        let body = body.collect().await.map_err(|error| PoolError::Request(error.into()))?.to_bytes();
        let request = || {
            let mut request = Request::new(Full::new(body.clone()));
            *request.method_mut() = parts.method.clone();
            *request.uri_mut() = parts.uri.clone();
            *request.headers_mut() = parts.headers.clone();
            request
        };
        let safe = matches!(parts.method, Method::GET | Method::HEAD);
        let channel = self.acquire(patient, None).await?;
        match attempt(&channel, request(), safe).await {
            Ok(response) => {
                if matches!(response.status().as_u16(), 500 | 503 | 504) {
                    self.inner.doubt.notify_one();
                }
                Ok(response)
            }
            Err(Failure { error, unsent }) => {
                self.inner.doubt.notify_one();
                if !safe && !unsent {
                    return Err(error);
                }
                tracing::debug!(%error, "request repeated on another server");
                let other = self.acquire(patient, Some(&channel)).await?;
                attempt(&other, request(), safe).await.map_err(|failure| failure.error)
            }
        }
    }

    /// A connection to send on, if possible another one than `not`.
    async fn acquire(&self, patient: bool, not: Option<&Channel>) -> Result<Channel, PoolError> {
        let mut state = self.inner.state.subscribe();
        let deadline = tokio::time::Instant::now() + ANOTHER_WITHIN;
        loop {
            let now = state.borrow_and_update().clone();
            let usable = |channel: &Channel| !channel.is_ended();
            let fresh = |channel: &Channel| not.is_none_or(|not| !channel.is_same(not));
            match now {
                State::Connected(channel) if usable(&channel) && fresh(&channel) => return Ok(channel),
                State::Connected(channel) if usable(&channel) => {
                    // Nothing better came up: the same server may do.
                    match tokio::time::timeout_at(deadline, state.changed()).await {
                        Ok(Ok(())) => {}
                        _ => return Ok(channel),
                    }
                    continue;
                }
                State::Unreachable(why) if !patient => return Err(PoolError::Unreachable(why)),
                _ => {}
            }
            if state.changed().await.is_err() {
                return Err(PoolError::Unreachable("the agent stops".into()));
            }
        }
    }

    /// Keeps a connection until shutdown.
    pub async fn run(self, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(self.keep()).await;
        if let State::Connected(channel) = self.inner.state.send_replace(State::Unreachable("the agent stops".into())) {
            channel.close();
        }
    }

    async fn keep(&self) {
        let mut retry = Jitter::new(RETRY.0, RETRY.1);
        let mut identity = self.inner.servers.dialer.identity().changed();
        let mut list = self.inner.servers.list.changes();
        let mut silent = false;
        loop {
            identity.borrow_and_update();
            match self.connect(None).await {
                Ok((channel, _)) => {
                    tracing::info!(server = channel.address, "connected to the API");
                    retry.reset();
                    silent = false;
                    self.inner.state.send_replace(State::Connected(channel.clone()));
                    self.watch_over(channel, &mut identity).await;
                }
                Err(error) => {
                    let why: Arc<str> = explain(&error).into();
                    if !std::mem::replace(&mut silent, true) {
                        tracing::warn!(error = %why, "no server of the cluster answers; trying on");
                    }
                    self.inner.state.send_replace(State::Unreachable(why));
                    tokio::select! {
                        () = tokio::time::sleep(retry.delay()) => {}
                        () = list.next() => {}
                        _ = identity.changed() => {}
                    }
                }
            }
        }
    }

    /// Returns when another connection is needed.
    async fn watch_over(&self, mut channel: Channel, identity: &mut watch::Receiver<u64>) {
        loop {
            tokio::select! {
                () = channel.ended() => {
                    tracing::info!(server = channel.address, "connection to the API lost");
                    return;
                }
                // Requests under way end where they are; new ones carry the new certificate.
                _ = identity.changed() => return,
                () = self.inner.doubt.notified() => {}
                () = tokio::time::sleep(PROBE) => {}
            }
            let why = match channel.is_ready().await {
                Ok(true) => continue,
                Ok(false) => "it is not ready".to_owned(),
                Err(error) => explain(&error),
            };
            match self.connect(Some(&channel.address)).await {
                Ok((other, true)) => {
                    tracing::info!(from = channel.address, to = other.address, why, "another server is used");
                    self.inner.state.send_replace(State::Connected(other.clone()));
                    channel.close();
                    channel = other;
                }
                Ok((other, false)) => other.close(),
                Err(_) => {}
            }
            // One doubt has been dealt with; a flood of them is one.
            tokio::time::sleep(STAGGER).await;
        }
    }

    /// The first server that is ready; else one that at least answers. Fallbacks are tried after all others.
    async fn connect(&self, not: Option<&str>) -> Result<(Channel, bool), ChannelError> {
        let servers = &self.inner.servers;
        let mut current = servers.list.current();
        current.shuffle(&mut rand::rng());
        let mut answering = None;
        let mut last = ChannelError::Timeout;
        for group in [current, servers.list.fallbacks()] {
            let others = group.iter().filter(|address| Some(address.as_str()) != not);
            let mut attempts: FuturesUnordered<_> =
                others.zip(0u32..).map(|(address, turn)| self.try_one(address, STAGGER * turn)).collect();
            while let Some(result) = attempts.next().await {
                match result {
                    Ok((channel, true)) => return Ok((channel, true)),
                    Ok((channel, false)) => answering = answering.or(Some(channel)),
                    Err(error) => last = error,
                }
            }
        }
        answering.map(|channel| (channel, false)).ok_or(last)
    }

    async fn try_one(&self, address: &str, after: Duration) -> Result<(Channel, bool), ChannelError> {
        tokio::time::sleep(after).await;
        let channel = Channel::open(&self.inner.servers.dialer, address).await.inspect_err(|error| {
            tracing::debug!(error = explain(error), server = address, "server not reached");
        })?;
        let ready = channel.is_ready().await?;
        Ok((channel, ready))
    }
}

struct Failure {
    error: PoolError,
    /// Nothing of the request has left.
    unsent: bool,
}

fn attempt(
    channel: &Channel,
    request: Request<Full<Bytes>>,
    safe: bool,
) -> impl Future<Output = Result<Response<Incoming>, Failure>> {
    let server = channel.address.clone();
    let patience = if safe { ANSWER_WITHIN.0 } else { ANSWER_WITHIN.1 };
    async move {
        match timeout(patience, channel.send(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err((source, back))) => {
                Err(Failure { error: PoolError::Broken { server, source }, unsent: back.is_some() })
            }
            Err(_) => Err(Failure { error: PoolError::Timeout { server }, unsent: false }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::servers::resolve::Resolver;
    use crate::servers::testing::{Authority, Server};
    use crate::servers::{Dialer, NodeIdentity, ServerList};
    use std::sync::atomic::Ordering;

    struct Scene {
        pool: Pool,
        client: kube::Client,
        _dir: tempfile::TempDir,
        _stop: tokio_util::sync::DropGuard,
    }

    fn scene(authority: &Authority, servers: &[&Server]) -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let list = ServerList::open(dir.path(), None);
        list.learn(servers.iter().map(|server| server.address.clone()).collect());
        let resolver = Resolver::new("/nonexistent".into());
        let dialer = Dialer::new(std::slice::from_ref(&authority.ca), NodeIdentity::default(), resolver).unwrap();
        let pool = Pool::new(Servers { list, dialer, own: None });
        let stop = CancellationToken::new();
        tokio::spawn(pool.clone().run(stop.clone()));
        Scene { client: pool.client(), pool, _dir: dir, _stop: stop.drop_guard() }
    }

    async fn get(client: &kube::Client, patient: bool) -> Result<String, kube::Error> {
        let mut request = Request::get("/x").body(Body::empty()).unwrap();
        if patient {
            request.extensions_mut().insert(Patient);
        }
        let body = client.send(request).await?.into_body().collect().await.unwrap().to_bytes();
        Ok(String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_dead_servers_place_is_taken_by_another_without_an_error() {
        let authority = Authority::new();
        let (a, b) = (authority.server().await, authority.server().await);
        let scene = scene(&authority, &[&a, &b]);
        let first = get(&scene.client, false).await.unwrap();
        assert_eq!(get(&scene.client, false).await.unwrap(), first, "it keeps to its server");
        let (used, other) = if first == a.address { (&a, &b) } else { (&b, &a) };
        used.kill();
        assert_eq!(get(&scene.client, false).await.unwrap(), other.address);
        assert_eq!(scene.pool.server().as_deref(), Some(other.address.as_str()));
    }

    #[tokio::test]
    async fn a_server_that_is_not_ready_is_left_when_another_is() {
        let authority = Authority::new();
        let (a, b) = (authority.server().await, authority.server().await);
        b.ready.store(false, Ordering::SeqCst);
        let scene = scene(&authority, &[&a, &b]);
        assert_eq!(get(&scene.client, false).await.unwrap(), a.address);
        a.ready.store(false, Ordering::SeqCst);
        b.ready.store(true, Ordering::SeqCst);
        scene.pool.inner.doubt.notify_one();
        let mut state = scene.pool.inner.state.subscribe();
        let moved = |state: &State| matches!(state, State::Connected(channel) if channel.address == b.address);
        state.wait_for(moved).await.unwrap();
        assert_eq!(get(&scene.client, false).await.unwrap(), b.address);
    }

    #[tokio::test]
    async fn without_servers_requests_fail_at_once_and_patient_ones_wait() {
        let authority = Authority::new();
        let (gone, back) = (authority.server().await, authority.server().await);
        gone.kill();
        let scene = scene(&authority, &[&gone]);
        let text = explain(&get(&scene.client, false).await.unwrap_err());
        assert!(text.contains("no server of the cluster answers"), "{text}");
        let client = scene.client.clone();
        let waiting = tokio::spawn(async move { get(&client, true).await });
        scene.pool.inner.servers.list.learn(vec![back.address.clone()]);
        assert_eq!(waiting.await.unwrap().unwrap(), back.address);
    }

    #[tokio::test]
    async fn a_server_of_another_ca_is_never_spoken_to() {
        let (ours, theirs) = (Authority::new(), Authority::new());
        let stranger = theirs.server().await;
        let scene = scene(&ours, &[&stranger]);
        assert!(get(&scene.client, false).await.is_err());
        assert_eq!(stranger.requests.load(Ordering::SeqCst), 0);
    }
}
