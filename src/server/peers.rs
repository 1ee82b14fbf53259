//! Streams to the other servers. A server is proved by the name that only its own certificate carries, wherever it is reached;
//! where that is, the consensus engine knows.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use coracle_raft::{Connection, Dial, Peer};
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use parking_lot::RwLock;
use rustls::ClientConfig;
use rustls_pki_types::{ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::apiserver::protocols;
use crate::auth::pki::{ClusterKeys, LeafRequest, PkiError, Usage, server_name};

/// How long TCP and TLS may take together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long one request may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// The name that every server's certificate carries.
const ANY_SERVER: &str = "kubernetes";

/// Dials servers under this server's identity.
#[derive(Debug)]
pub struct Peers {
    id: u64,
    earliest: SystemTime,
    tls: RwLock<Option<Tls>>,
}

/// What a connection is to carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speaks {
    Raft,
    Http,
}

struct Tls {
    keys: Arc<ClusterKeys>,
    raft: Arc<ClientConfig>,
    http: Arc<ClientConfig>,
    issued: SystemTime,
    not_after: SystemTime,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// The clock, but never before the time at which this server is known to have run.
#[derive(Debug)]
struct Plausible(SystemTime);

impl rustls::time_provider::TimeProvider for Plausible {
    fn current_time(&self) -> Option<UnixTime> {
        let now = SystemTime::now().max(self.0).duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(UnixTime::since_unix_epoch(now))
    }
}

impl Peers {
    /// A dialer without keys: every dial fails until [`Peers::set_keys`]. Certificates are judged as of now, but not as of a
    /// time before `earliest`.
    pub fn new(id: u64, earliest: SystemTime) -> Arc<Peers> {
        Arc::new(Peers { id, earliest, tls: RwLock::default() })
    }

    /// From now on dials show a certificate by these keys.
    ///
    /// # Errors
    /// The keys are of no use to TLS.
    pub fn set_keys(&self, keys: &Arc<ClusterKeys>) -> Result<(), PkiError> {
        *self.tls.write() = Some(self.make(keys)?);
        Ok(())
    }

    /// Makes the certificate anew.
    ///
    /// # Errors
    /// It cannot be issued.
    pub fn renew(&self) -> Result<(), PkiError> {
        let keys = self.tls.read().as_ref().map(|tls| tls.keys.clone());
        keys.map_or(Ok(()), |keys| self.set_keys(&keys))
    }

    /// Makes the certificate anew when two thirds of its life are over.
    ///
    /// # Errors
    /// It cannot be issued.
    pub fn renew_if_due(&self) -> Result<(), PkiError> {
        let due = self.tls.read().as_ref().is_some_and(|tls| {
            let life = tls.not_after.duration_since(tls.issued).unwrap_or_default();
            SystemTime::now() > tls.issued + life * 2 / 3
        });
        if due { self.renew() } else { Ok(()) }
    }

    /// When this server's client certificate ends.
    pub fn not_after(&self) -> Option<SystemTime> {
        self.tls.read().as_ref().map(|tls| tls.not_after)
    }

    fn make(&self, keys: &Arc<ClusterKeys>) -> Result<Tls, PkiError> {
        let now = SystemTime::now().max(self.earliest);
        let user = server_name::user(self.id);
        let request = LeafRequest {
            common_name: &user,
            organization: Some(server_name::GROUP),
            names: &[],
            usage: Usage::Client,
        };
        let leaf = keys.client_ca.issue(&request, now)?;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(keys.server_ca.certificate().clone()).map_err(PkiError::Tls)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut raft = ClientConfig::builder_with_details(provider, Arc::new(Plausible(self.earliest)))
            .with_safe_default_protocol_versions()
            .map_err(PkiError::Tls)?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![leaf.certificate.clone()], leaf.key_der())
            .map_err(PkiError::Tls)?;
        // A resumed session would go on with the certificate of before a renewal.
        raft.resumption = rustls::client::Resumption::disabled();
        let mut http = raft.clone();
        raft.alpn_protocols = vec![protocols::PEER.to_vec()];
        http.alpn_protocols = vec![b"http/1.1".to_vec()];
        let (raft, http) = (Arc::new(raft), Arc::new(http));
        Ok(Tls { keys: keys.clone(), raft, http, issued: now, not_after: leaf.not_after })
    }

    fn config(&self, speaks: Speaks) -> io::Result<Arc<ClientConfig>> {
        if let Err(error) = self.renew_if_due() {
            tracing::error!(%error, "renewing the certificate towards the other servers");
        }
        let tls = self.tls.read();
        let tls = tls.as_ref().ok_or_else(|| io::Error::other("this server has no keys yet"))?;
        Ok(if speaks == Speaks::Raft { tls.raft.clone() } else { tls.http.clone() })
    }

    async fn reach(&self, id: u64, address: &str, speaks: Speaks) -> io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from(server_name::dns_name(id)).map_err(io::Error::other)?;
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        self.connect(address, name, speaks).await
    }

    async fn connect(
        &self,
        address: SocketAddr,
        name: ServerName<'static>,
        speaks: Speaks,
    ) -> io::Result<TlsStream<TcpStream>> {
        let config = self.config(speaks)?;
        let work = async {
            let stream = TcpStream::connect(address).await?;
            stream.set_nodelay(true)?;
            let stream = TlsConnector::from(config.clone()).connect(name, stream).await?;
            if stream.get_ref().1.alpn_protocol() != config.alpn_protocols.first().map(Vec::as_slice) {
                return Err(io::Error::other("it does not speak the protocol of servers"));
            }
            Ok(stream)
        };
        let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within 3 s"));
        tokio::time::timeout(DIAL_TIMEOUT, work).await.unwrap_or_else(late)
    }

    /// One request to the server with this id.
    ///
    /// # Errors
    /// It is not reached or does not answer.
    pub async fn ask(&self, id: u64, address: &str, request: Request<Full<Bytes>>) -> io::Result<Response<Bytes>> {
        exchange(self.reach(id, address, Speaks::Http).await?, request).await
    }

    /// One request to whichever server of the cluster is at this address.
    ///
    /// # Errors
    /// There is none, or it does not answer.
    pub async fn ask_any(&self, address: SocketAddr, request: Request<Full<Bytes>>) -> io::Result<Response<Bytes>> {
        let name = ServerName::try_from(ANY_SERVER).map_err(io::Error::other)?;
        exchange(self.connect(address, name, Speaks::Http).await?, request).await
    }
}

/// [`Peers`] as the consensus engine dials.
#[derive(Clone, Debug)]
pub struct RaftDialer(pub Arc<Peers>);

impl Dial for RaftDialer {
    fn dial(&self, peer: &Peer) -> BoxFuture<'static, io::Result<Box<dyn Connection>>> {
        let (peers, peer) = (self.0.clone(), peer.clone());
        Box::pin(async move {
            let stream = peers.reach(peer.id, &peer.address, Speaks::Raft).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }
}

/// One HTTP/1.1 request on a fresh connection; the answer is read whole.
///
/// # Errors
/// The exchange breaks or takes too long.
pub async fn exchange(stream: TlsStream<TcpStream>, request: Request<Full<Bytes>>) -> io::Result<Response<Bytes>> {
    let work = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let driver = tokio::spawn(connection);
        let answer = async {
            let response = sender.send_request(request).await.map_err(io::Error::other)?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, MAX_ANSWER).collect().await.map_err(io::Error::other)?.to_bytes();
            Ok(Response::from_parts(parts, body))
        };
        let answer = answer.await;
        driver.abort();
        answer
    };
    let late = |_| Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
    tokio::time::timeout(REQUEST_TIMEOUT, work).await.unwrap_or_else(late)
}
