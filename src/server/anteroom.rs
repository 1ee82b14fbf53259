//! Before a server has keys: it waits for a plausible clock, or for a cluster that lets it in. Meanwhile its port is open under
//! a certificate that nobody trusts, and the health paths say what it waits for; everything else is refused.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use http::Request;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::service_fn;

use crate::apiserver::body::Body;
use crate::apiserver::health::Health;
use crate::apiserver::listener::{ApiService, Limits, Listener};
use crate::apiserver::protocols::Protocols;
use crate::apiserver::query::Query;
use crate::apiserver::status::Status;
use crate::auth::objects::Objects;
use crate::auth::pki::{ClusterKeys, ServerLeaf, clock, server_leaf};
use crate::auth::{Authenticator, Authorizer, ServiceAccountTokens};

/// Connections at once: only health checks come.
const CONNECTIONS: usize = 64;

/// The open port.
pub struct Anteroom {
    shutdown: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Anteroom {
    /// Opens the port. `why` holds what is waited for.
    ///
    /// # Errors
    /// The port cannot be used.
    pub async fn open(listen: SocketAddr, why: watch::Receiver<Option<String>>) -> anyhow::Result<Anteroom> {
        let now = SystemTime::now().max(clock::earliest(None));
        // Keys for a few minutes; nothing that they sign is ever believed.
        let keys = Arc::new(ClusterKeys::generate(now)?);
        let (store, _writer) = coracle_store::Store::open(coracle_store::Options::memory())?;
        let authorizer = Authorizer::new(store.clone());
        let objects = Objects::new(store);
        let tokens = ServiceAccountTokens::new(keys.clone(), objects.clone(), "https://nowhere.invalid");
        let authenticator = Authenticator::new(&keys, tokens, objects)?;
        let names = server_leaf::server_names("cluster.local", "", &[listen.ip()], &[]);
        let leaf = ServerLeaf::issue(keys, names, now)?;
        let limits = Limits { connections: CONNECTIONS, ..Limits::default() };
        let listener = Listener::bind(listen, leaf, authenticator, authorizer, limits, Protocols::default()).await?;
        let health = Arc::new(Health::default());
        health.add_ready("start", Arc::new(move || Err(why.borrow().clone().unwrap_or_else(|| "starting".to_owned()))));
        let service = ApiService::new(service_fn(move |request: Request<Body>| {
            let health = health.clone();
            async move {
                let answer = health.answer(request.uri().path(), &Query::parse(request.uri().query()));
                Ok(answer.unwrap_or_else(|| Status::unavailable("the server is starting").into_response()))
            }
        }));
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(listener.serve(service, shutdown.clone()));
        Ok(Anteroom { shutdown, task })
    }

    /// Closes the port again.
    pub async fn close(self) {
        self.shutdown.cancel();
        let _ = self.task.await;
    }
}
