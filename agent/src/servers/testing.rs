//! Servers on loopback with a CA of their own, for tests.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::dial::SERVER_NAME;

/// A CA and what it signs for servers.
pub struct Authority {
    /// Its certificate.
    pub ca: CertificateDer<'static>,
    config: Arc<rustls::ServerConfig>,
}

impl Authority {
    /// A new one.
    pub fn new() -> Authority {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let ca = params.self_signed(&key).unwrap().der().clone();
        let leaf_key = KeyPair::generate().unwrap();
        let leaf = CertificateParams::new(vec![SERVER_NAME.to_owned()]).unwrap();
        let leaf = leaf.signed_by(&leaf_key, &Issuer::new(params, key)).unwrap().der().clone();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(leaf_key.serialize_der()));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![leaf, ca.clone()], key)
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Authority { ca, config: Arc::new(config) }
    }

    /// A server that answers every request with its address, once it is ready.
    pub async fn server(&self) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server {
            address,
            ready: Arc::new(AtomicBool::new(true)),
            requests: Arc::default(),
            stop: CancellationToken::new(),
        };
        let acceptor = TlsAcceptor::from(self.config.clone());
        let running = server.clone();
        tokio::spawn(server.stop.clone().run_until_cancelled_owned(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (acceptor, server) = (acceptor.clone(), running.clone());
                let stop = server.stop.clone();
                tokio::spawn(stop.run_until_cancelled_owned(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = hyper::service::service_fn(move |request| server.clone().answer(request));
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                }));
            }
        }));
        server
    }
}

/// A running server. Clones are one.
#[derive(Clone)]
pub struct Server {
    /// `host:port`.
    pub address: String,
    /// What `/readyz` says.
    pub ready: Arc<AtomicBool>,
    /// How many requests came, without `/readyz`.
    pub requests: Arc<AtomicUsize>,
    stop: CancellationToken,
}

impl Server {
    /// Ends it with all its connections, as a crash would.
    pub fn kill(&self) {
        self.stop.cancel();
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
        let mut response = Response::new(Full::new(Bytes::from(self.address.clone())));
        if request.uri().path() == "/readyz" {
            if !self.ready.load(Ordering::SeqCst) {
                *response.status_mut() = http::StatusCode::INTERNAL_SERVER_ERROR;
            }
            return Ok(response);
        }
        self.requests.fetch_add(1, Ordering::SeqCst);
        if request.uri().path() == "/hang" {
            std::future::pending::<()>().await;
        }
        Ok(response)
    }
}
