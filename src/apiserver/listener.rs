//! The TLS listener: HTTP/1.1, HTTP/2 and [protocols of our own](super::protocols) on one port, credentials checked before
//! anything else sees the request, and bounds on all that a stranger can make us hold.
//!
//! | bound | value |
//! | --- | --- |
//! | connections | [`Limits::connections`]; more wait in the kernel's backlog |
//! | TLS handshake | 10 s |
//! | request head | 30 s, 64 KiB |
//! | request body | 3 MiB, as upstream |
//! | a request that is not a watch, log, exec, attach, port-forward or proxy | 60 s |

use super::body::Body;
use super::protocols::{self, Protocols, TlsStream};
use super::status::Status;
use crate::auth::pki::{PkiError, ServerLeaf};
use crate::auth::{Authenticator, Authorizer, PeerCertificate, impersonation};
use futures::FutureExt;
use http::{HeaderMap, Method, Request, Response, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tower::Service;
use tower::util::BoxCloneSyncService;

/// The largest request body, in bytes; upstream's `limit is 3145728`.
pub const MAX_BODY: usize = 3 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_HEAD: usize = 64 * 1024;
const MAX_STREAMS: u32 = 1000;
/// How often an idle HTTP/2 peer is asked whether it lives, and how long it may take to answer.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(15));
/// Pause after `accept` failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How much the listener takes on at once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// How long open connections may go on after shutdown began.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { connections: 8192, drain: Duration::from_secs(3) }
    }
}

/// What the listener serves: [`super::ApiServer`], or a fake in tests.
pub type ApiService = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// Address of the caller; a request extension of everything that came over the network.
#[derive(Clone, Copy, Debug)]
pub struct RemoteAddress(pub SocketAddr);

/// Why the listener could not start.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address}")]
    Bind {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("preparing TLS")]
    Tls(#[source] rustls::Error),
    #[error("preparing the serving certificate")]
    Pki(#[from] PkiError),
}

/// A bound socket with everything needed to serve on it.
pub struct Listener {
    socket: TcpListener,
    shared: Arc<Shared>,
    acceptor: TlsAcceptor,
}

struct Shared {
    authenticator: Authenticator,
    authorizer: Authorizer,
    limits: Limits,
    protocols: Protocols,
    connections: Arc<Semaphore>,
    /// Connections that may carry requests of the API; these are drained.
    draining: TaskTracker,
}

impl Listener {
    /// Binds `address` (an error is the operator's to see, before anything is served).
    pub async fn bind(
        address: SocketAddr,
        leaf: Arc<ServerLeaf>,
        authenticator: Authenticator,
        authorizer: Authorizer,
        limits: Limits,
        protocols: Protocols,
    ) -> Result<Listener, ListenError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(ListenError::Tls)?
            .with_client_cert_verifier(authenticator.tls_verifier())
            .with_cert_resolver(leaf);
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.alpn_protocols.extend(protocols::ALL.map(<[u8]>::to_vec));
        // A resumed session would carry a verdict on a certificate that was never shown again.
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        let socket = TcpListener::bind(address).await.map_err(|source| ListenError::Bind { address, source })?;
        let shared = Shared {
            authenticator,
            authorizer,
            limits,
            protocols,
            connections: Arc::new(Semaphore::new(limits.connections)),
            draining: TaskTracker::new(),
        };
        Ok(Listener { socket, shared: Arc::new(shared), acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Where it listens; tells the port when 0 was asked for.
    pub fn local_address(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Serves until `shutdown`; then takes nothing new, lets open requests finish for [`Limits::drain`], cuts connections of
    /// other protocols and returns.
    pub async fn serve(self, service: ApiService, shutdown: CancellationToken) {
        let mut open = JoinSet::new();
        loop {
            while open.try_join_next().is_some() {}
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                accepted = self.accept() => accepted,
            };
            let Some((stream, address, permit)) = accepted else { continue };
            let connection = Connection {
                shared: self.shared.clone(),
                acceptor: self.acceptor.clone(),
                address,
                shutdown: shutdown.clone(),
                draining: self.shared.draining.token(),
            };
            let service = service.clone();
            open.spawn(async move {
                connection.run(stream, service).await;
                drop(permit);
            });
        }
        drop(self.socket);
        self.shared.draining.close();
        if tokio::time::timeout(self.shared.limits.drain, self.shared.draining.wait()).await.is_err() {
            tracing::info!(connections = self.shared.draining.len(), "closing connections that are still busy");
        }
        open.shutdown().await;
    }

    async fn accept(&self) -> Option<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = self.shared.connections.clone().acquire_owned().await.ok()?;
        match self.socket.accept().await {
            Ok((stream, mut address)) => {
                // On a socket of both families an IPv4 peer has a mapped address.
                address.set_ip(address.ip().to_canonical());
                Some((stream, address, permit))
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                None
            }
        }
    }
}

/// One accepted connection.
struct Connection {
    shared: Arc<Shared>,
    acceptor: TlsAcceptor,
    address: SocketAddr,
    shutdown: CancellationToken,
    draining: TaskTrackerToken,
}

impl Connection {
    async fn run(self, stream: TcpStream, service: ApiService) {
        let _ = stream.set_nodelay(true);
        let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(stream));
        let tls = tokio::select! {
            () = self.shutdown.cancelled() => return,
            result = handshake => match result {
                Ok(Ok(tls)) => tls,
                Ok(Err(error)) => return tracing::debug!(%error, address = %self.address, "TLS handshake failed"),
                Err(_) => return tracing::debug!(address = %self.address, "TLS handshake timed out"),
            },
        };
        if let Some(alpn) = tls.get_ref().1.alpn_protocol().filter(|alpn| protocols::ALL.contains(alpn)) {
            let alpn = alpn.to_vec();
            return self.hand_over(&alpn, tls).await;
        }
        let peer = self.judge(&tls);
        let door = Arc::new(Door { shared: self.shared.clone(), peer, address: self.address });
        let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
            let (door, service) = (door.clone(), service.clone());
            async move { Ok::<_, Infallible>(door.answer(request.map(Body::new), service).await) }
        });
        let mut builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
        builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(MAX_HEAD);
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEAD as u32)
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1);
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(tls), service);
        tokio::pin!(connection);
        let mut draining = false;
        loop {
            tokio::select! {
                result = connection.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(%error, address = %self.address, "connection ended with an error");
                    }
                    return;
                }
                () = self.shutdown.cancelled(), if !draining => {
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

impl Connection {
    fn judge(&self, tls: &TlsStream) -> PeerCertificate {
        self.shared.authenticator.judge(tls.get_ref().1.peer_certificates(), self.shared.protocols.now())
    }

    /// Gives a connection that is no HTTP to its handler, if the peer's certificate is good.
    async fn hand_over(self, alpn: &[u8], tls: TlsStream) {
        let (peer, address) = (self.judge(&tls), self.address);
        let Some(identity) = protocols::identity(peer) else {
            return tracing::debug!(%address, "a connection that needs a client certificate came without a good one");
        };
        let Some(handler) = self.shared.protocols.handler(alpn) else { return };
        drop(self.draining);
        if AssertUnwindSafe(handler(tls, identity, address)).catch_unwind().await.is_err() {
            tracing::error!(%address, "the handler of a connection panicked");
        }
    }
}

/// What every request of one connection passes before the API sees it.
struct Door {
    shared: Arc<Shared>,
    peer: PeerCertificate,
    address: SocketAddr,
}

impl Door {
    async fn answer(&self, mut request: Request<Body>, mut service: ApiService) -> Response<Body> {
        if let Some(keeper) = self.shared.protocols.doorkeeper(request.uri().path()) {
            let answer = keeper(request, self.peer.clone(), self.address);
            return match tokio::time::timeout(REQUEST_TIMEOUT, AssertUnwindSafe(answer).catch_unwind()).await {
                Ok(Ok(response)) => response,
                Ok(Err(_)) => Status::internal("the request handler panicked").into_response(),
                Err(_) => timed_out(),
            };
        }
        if let Err(refused) = self.enter(&mut request) {
            return refused.into_response();
        }
        let long_running = is_long_running(&request);
        // A panic in a handler ends that request alone.
        let handled = AssertUnwindSafe(async { service.call(request).await }).catch_unwind();
        let handled = if long_running {
            handled.await
        } else {
            match tokio::time::timeout(REQUEST_TIMEOUT, handled).await {
                Ok(handled) => handled,
                Err(_) => return timed_out(),
            }
        };
        match handled {
            Ok(Ok(response)) => response,
            Ok(Err(never)) => match never {},
            Err(_) => {
                tracing::error!("a request handler panicked");
                let text = "This request caused apiserver to panic. Look in the logs for details.";
                Status::internal(text).into_response()
            }
        }
    }

    /// Size, credentials, impersonation; leaves identity and address in the request's extensions.
    fn enter(&self, request: &mut Request<Body>) -> Result<(), Status> {
        // Extensions are ours alone: hyper puts its upgrade handle there and nothing of the peer's.
        let caller = self
            .shared
            .authenticator
            .authenticate(&self.peer, request.headers(), request.uri().path(), SystemTime::now())
            .map_err(|_| Status::unauthorized())?;
        let caller = impersonation::impersonate(caller, request.headers_mut(), &self.shared.authorizer)?;
        if declared_length(request.headers()).is_some_and(|length| length > MAX_BODY as u64) {
            return Err(Status::too_large(format_args!("limit is {MAX_BODY}")));
        }
        // The credential has done its work; nothing behind this door can leak it.
        request.headers_mut().remove(header::AUTHORIZATION);
        request.extensions_mut().insert(caller);
        request.extensions_mut().insert(RemoteAddress(self.address));
        Ok(())
    }
}

fn timed_out() -> Response<Body> {
    Status::timeout("request did not complete within the allotted timeout", 0).into_response()
}

fn declared_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Whether the request may last: watches, and what upstream's `--long-running-request-regexp` takes in.
fn is_long_running(request: &Request<Body>) -> bool {
    let uri = request.uri();
    let path = uri.path();
    let watches = uri.query().unwrap_or("").split('&').any(|pair| matches!(pair, "watch" | "watch=true" | "watch=1"));
    if watches && request.method() == Method::GET {
        return true;
    }
    // /api/v1/... or /apis/<group>/<version>/...
    let skip = if path.starts_with("/apis/") { 3 } else { 2 };
    let mut parts = path.split('/').filter(|part| !part.is_empty()).skip(skip);
    let (first, mut rest) = (parts.next(), parts.collect::<Vec<_>>());
    if matches!(first, Some("watch" | "proxy")) {
        return true;
    }
    if first == Some("namespaces") && rest.len() > 2 {
        rest.remove(0);
        rest.remove(0);
    } else if first == Some("namespaces") {
        rest.clear();
    }
    // What is left is a name and a subresource.
    matches!(rest.get(1), Some(&("attach" | "exec" | "log" | "portforward" | "proxy")))
}

#[cfg(test)]
#[path = "listener_tests.rs"]
mod tests;
