//! TLS to one server. Every server is verified by the cluster's CA under a name that each of them carries, so that an
//! address may change, be a load balancer's or be translated on the way.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::identity::NodeIdentity;
use super::resolve::{ResolveError, Resolver};

/// A name that the serving certificate of every server carries.
pub const SERVER_NAME: &str = "kubernetes";
/// How long TCP and TLS may take together.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// What is to be spoken after the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The API, HTTP/2.
    Api,
    /// The tunnel.
    Link,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No address.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// TCP or TLS failed.
    #[error("connect to {address}")]
    Connect {
        /// Where.
        address: SocketAddr,
        /// What the kernel or TLS said.
        #[source]
        source: std::io::Error,
    },
    /// Silence.
    #[error("{0} did not answer within 5 s")]
    Timeout(String),
    /// It speaks something else.
    #[error("{0} does not speak the protocol; is it a Coracle server of this version?")]
    Protocol(SocketAddr),
}

/// Dials servers under the node's identity. Cheap to clone.
#[derive(Clone)]
pub struct Dialer {
    api: Arc<ClientConfig>,
    link: Arc<ClientConfig>,
    identity: NodeIdentity,
    resolver: Resolver,
}

impl Dialer {
    /// Trusts servers whose certificate one of `roots` has signed.
    ///
    /// # Errors
    /// A root is no certificate.
    pub fn new(
        roots: &[CertificateDer<'static>],
        identity: NodeIdentity,
        resolver: Resolver,
    ) -> Result<Dialer, rustls::Error> {
        let mut store = RootCertStore::empty();
        for root in roots {
            store.add(root.clone())?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut api = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(store)
            .with_client_cert_resolver(Arc::new(identity.clone()));
        // A resumed session would go on with the certificate of before a renewal.
        api.resumption = rustls::client::Resumption::disabled();
        let mut link = api.clone();
        api.alpn_protocols = vec![b"h2".to_vec()];
        link.alpn_protocols = vec![b"coracle-link/1".to_vec()];
        Ok(Dialer { api: Arc::new(api), link: Arc::new(link), identity, resolver })
    }

    /// Whose certificate is shown.
    #[must_use]
    pub fn identity(&self) -> &NodeIdentity {
        &self.identity
    }

    /// A connection to `address` (`host:port`) after its handshake.
    ///
    /// # Errors
    /// See [`DialError`].
    pub async fn dial(&self, address: &str, protocol: Protocol) -> Result<TlsStream<TcpStream>, DialError> {
        let config = match protocol {
            Protocol::Api => &self.api,
            Protocol::Link => &self.link,
        };
        let work = async {
            let mut failed = ResolveError::Unknown(address.to_owned()).into();
            for ip in self.resolver.resolve(address).await? {
                match connect(config, ip).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => failed = error,
                }
            }
            Err(failed)
        };
        let timeout = |_| Err(DialError::Timeout(address.to_owned()));
        tokio::time::timeout(DIAL_TIMEOUT, work).await.unwrap_or_else(timeout)
    }
}

async fn connect(config: &Arc<ClientConfig>, address: SocketAddr) -> Result<TlsStream<TcpStream>, DialError> {
    let failed = |source| DialError::Connect { address, source };
    let stream = TcpStream::connect(address).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let name = ServerName::try_from(SERVER_NAME).map_err(|error| failed(std::io::Error::other(error)))?;
    let stream = TlsConnector::from(config.clone()).connect(name, stream).await.map_err(failed)?;
    let agreed = stream.get_ref().1.alpn_protocol();
    if agreed != config.alpn_protocols.first().map(Vec::as_slice) {
        return Err(DialError::Protocol(address));
    }
    Ok(stream)
}
