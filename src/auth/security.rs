//! Puts the parts together: what the server calls at start, in order.
//!
//! 1. [`Security::assemble`] over the cluster's keys, which `server::keys` opens or creates.
//! 2. `ApiServer::new` with [`Security::authorizer`] and [`Security::admission`], then [`Security::attach`].
//! 3. [`Security::listen`], and `Listener::serve` as a task.
//! 4. Namespaces `kube-system`, `kube-public`, `default`, `kube-node-lease`; then `rbac::bootstrap::reconcile` with a client
//!    as [`Identity::apiserver`](super::Identity::apiserver).
//! 5. [`Security::write_admin_kubeconfig`], and the server is ready.

use super::follow::{Client, follow};
use super::pki::{ClusterKeys, PkiError, ServerLeaf, files, server_leaf, server_name};
use super::reviews::Answers;
use super::signer::{self, Signer};
use super::{Authenticator, Authorizer, Identity, ServiceAccountTokens};
use crate::admission::Admission;
use crate::apiserver::ApiServer;
use crate::apiserver::backend::Backend;
use crate::apiserver::body::Body;
use crate::apiserver::listener::{Limits, ListenError, Listener};
use crate::apiserver::protocols::Protocols;
use futures::FutureExt;
use http::{HeaderValue, Response, header};
use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    #[error(transparent)]
    Pki(#[from] PkiError),
    #[error("preparing client authentication")]
    Tls(#[source] rustls::Error),
}

/// Names and addresses that the serving certificate must carry, besides those every in-cluster client uses.
#[derive(Clone, Debug)]
pub struct ServingNames<'a> {
    pub cluster_domain: &'a str,
    pub node_name: &'a str,
    /// This server's id among servers.
    pub server_id: u64,
    /// Advertised address, bind address, first address of the service range, ...
    pub addresses: &'a [IpAddr],
    /// `--tls-san`.
    pub configured: &'a [String],
}

/// Keys and everything that decides by them. Cheap to clone.
#[derive(Clone)]
pub struct Security {
    pub keys: Arc<ClusterKeys>,
    pub authenticator: Authenticator,
    pub authorizer: Authorizer,
    pub admission: Admission,
    pub tokens: ServiceAccountTokens,
}

impl Security {
    /// The parts over keys that are open.
    pub fn assemble(keys: Arc<ClusterKeys>, backend: Backend, cluster_domain: &str) -> Result<Security, SecurityError> {
        let authorizer = Authorizer::new(backend.store().clone());
        let objects = authorizer.objects().clone();
        let issuer = format!("https://kubernetes.default.svc.{cluster_domain}");
        let tokens = ServiceAccountTokens::new(keys.clone(), objects.clone(), &issuer);
        let authenticator = Authenticator::new(&keys, tokens.clone(), objects).map_err(SecurityError::Tls)?;
        let admission = Admission::new(backend, authorizer.clone());
        Ok(Security { keys, authenticator, authorizer, admission, tokens })
    }

    /// Answers reviews, issues tokens and serves the issuer's documents through `server`. `address` is the advertised
    /// `host:port`.
    pub fn attach(&self, server: &ApiServer, address: &str) {
        server.set_reviews(Arc::new(Answers {
            authenticator: self.authenticator.clone(),
            authorizer: self.authorizer.clone(),
            admission: self.admission.clone(),
            tokens: self.tokens.clone(),
        }));
        let configuration = json!({
            "issuer": self.tokens.issuer(),
            "jwks_uri": format!("https://{address}/openid/v1/jwks"),
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
        });
        let keys: Vec<_> = self.keys.service_account.iter().map(|key| key.jwk()).collect();
        serve_document(server, "/.well-known/openid-configuration", "application/json", configuration.to_string());
        serve_document(server, "/openid/v1/jwks", "application/jwk-set+json", json!({ "keys": keys }).to_string());
    }

    /// Runs the built-in certificate signers, whenever this server leads, until `shutdown`.
    pub fn spawn_signer(
        &self,
        server: &ApiServer,
        leadership: watch::Receiver<bool>,
        shutdown: &tokio_util::sync::CancellationToken,
    ) -> tokio::task::JoinHandle<()> {
        let objects = self.authorizer.objects().clone();
        let signer = Arc::new(Signer {
            keys: self.keys.clone(),
            authorizer: self.authorizer.clone(),
            client: Client::new(crate::apiserver::client(server, Identity::controller("certificate-controller"))),
        });
        let store = objects.store().clone();
        let sweep = move || {
            let (signer, objects) = (signer.clone(), objects.clone());
            async move { signer.sweep(&objects).await }.boxed()
        };
        tokio::spawn(follow(store, signer::PREFIX, leadership, shutdown.clone(), sweep))
    }

    /// Binds the TLS listener; its certificate, which is returned too, is the caller's to renew. What is no HTTP goes to `protocols`.
    pub async fn listen(
        &self,
        address: SocketAddr,
        names: &ServingNames<'_>,
        protocols: Protocols,
    ) -> Result<(Listener, Arc<ServerLeaf>), ListenError> {
        let server = server_name::dns_name(names.server_id);
        let configured = &[std::slice::from_ref(&server), names.configured].concat();
        let names = server_leaf::server_names(names.cluster_domain, names.node_name, names.addresses, configured);
        let leaf = ServerLeaf::issue(self.keys.clone(), names, protocols.now())?;
        let (authenticator, authorizer) = (self.authenticator.clone(), self.authorizer.clone());
        let listener = Listener::bind(address, leaf.clone(), authenticator, authorizer, Limits::default(), protocols);
        let listener = listener.await?;
        Ok((listener, leaf))
    }

    /// Writes the administrator's kubeconfig, by rename.
    pub fn write_admin_kubeconfig(&self, path: &Path, mode: u32, server_url: &str) -> Result<(), PkiError> {
        files::write_kubeconfig(path, mode, &self.keys, server_url, &files::ADMIN, SystemTime::now())
    }
}

fn serve_document(server: &ApiServer, path: &str, media_type: &'static str, text: String) {
    let text = bytes::Bytes::from(text);
    let handler = move |_| {
        let mut response = Response::new(Body::full(text.clone()));
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, max-age=3600"));
        let answer: futures::future::BoxFuture<'static, Response<Body>> = Box::pin(std::future::ready(response));
        answer
    };
    server.add_path(path, Arc::new(handler));
}
