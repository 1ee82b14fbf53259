//! The first word with a server of which only the hash of its CA is known. The server sends its root along with its
//! certificate; the handshake succeeds only when that root has the token's hash and has signed the certificate, so that
//! nothing can be said to anybody else.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::credentials::to_pem;
use crate::servers::dial::SERVER_NAME;
use crate::servers::resolve::{ResolveError, Resolver};

/// Why a server was not spoken to.
#[derive(Debug, thiserror::Error)]
pub enum IntroductionError {
    /// No address.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Not reached.
    #[error("connect to {0}")]
    Connect(String, #[source] std::io::Error),
    /// Another cluster, or an impostor.
    #[error(
        "{0} belongs to another cluster than the token: its CA does not have the hash that the token names. Nothing was \
         sent to it. Check the address and take the token from a server of that cluster"
    )]
    OtherCluster(String),
    /// The certificate is not good.
    #[error("{0} shows a certificate that does not hold")]
    Certificate(String, #[source] std::io::Error),
    /// TLS cannot be prepared.
    #[error("prepare TLS")]
    Tls(#[source] rustls::Error),
}

impl IntroductionError {
    /// Whether trying again cannot help.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, IntroductionError::OtherCluster(_))
    }
}

/// A connection to a server that the token has proved, and its CA. ALPN is `http/1.1`.
pub struct Introduced {
    /// After the handshake.
    pub stream: TlsStream<TcpStream>,
    /// The root whose hash the token names.
    pub ca: CertificateDer<'static>,
}

/// Connects to `address` (`host:port`) and proves it by the hash.
///
/// # Errors
/// See [`IntroductionError`].
pub async fn introduce(resolver: &Resolver, address: &str, ca_hash: [u8; 32]) -> Result<Introduced, IntroductionError> {
    let verifier = Arc::new(ByHash {
        hash: ca_hash,
        provider: Arc::new(rustls::crypto::ring::default_provider()),
        root: OnceLock::new(),
    });
    let mut config = ClientConfig::builder_with_provider(verifier.provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(IntroductionError::Tls)?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name =
        ServerName::try_from(SERVER_NAME).map_err(|_| IntroductionError::Tls(rustls::Error::HandshakeNotComplete))?;
    let mut stream = Err(std::io::ErrorKind::AddrNotAvailable.into());
    for ip in resolver.resolve(address).await? {
        stream = TcpStream::connect(ip).await;
        if stream.is_ok() {
            break;
        }
    }
    let stream = stream.map_err(|error| IntroductionError::Connect(address.to_owned(), error))?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| {
        let of_tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match of_tls {
            Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) if other.0.is::<WrongHash>() => {
                IntroductionError::OtherCluster(address.to_owned())
            }
            Some(rustls::Error::InvalidCertificate(_)) => IntroductionError::Certificate(address.to_owned(), error),
            _ => IntroductionError::Connect(address.to_owned(), error),
        }
    })?;
    let ca = verifier.root.get().cloned();
    let ca = ca.ok_or(IntroductionError::Tls(rustls::Error::HandshakeNotComplete))?;
    Ok(Introduced { stream, ca })
}

/// Hash of a CA as tokens carry it: over its PEM.
#[must_use]
pub fn ca_hash(ca: &CertificateDer<'_>) -> [u8; 32] {
    Sha256::digest(to_pem("CERTIFICATE", ca).as_bytes()).into()
}

#[derive(Debug, thiserror::Error)]
#[error("the CA does not have the hash of the token")]
struct WrongHash;

/// Trusts the one root that has the hash.
#[derive(Debug)]
struct ByHash {
    hash: [u8; 32],
    provider: Arc<CryptoProvider>,
    root: OnceLock<CertificateDer<'static>>,
}

impl ServerCertVerifier for ByHash {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let wrong = || CertificateError::Other(OtherError(Arc::new(WrongHash)));
        let root = intermediates.iter().find(|ca| ca_hash(ca) == self.hash).ok_or_else(wrong)?;
        let mut roots = RootCertStore::empty();
        roots.add(root.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        let verified = verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)?;
        self.root.get_or_init(|| root.clone().into_owned());
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::join::request::{RequestError, post};
    use crate::servers::testing::Authority;
    use std::sync::atomic::Ordering;

    #[tokio::test]
    async fn only_the_server_whose_ca_has_the_hash_is_spoken_to() {
        let authority = Authority::new();
        let server = authority.server().await;
        let resolver = Resolver::new("/nonexistent".into());
        let hash = ca_hash(&authority.ca);
        let introduced = introduce(&resolver, &server.address, hash).await.unwrap();
        assert_eq!(introduced.ca, authority.ca);
        // The server answers with text, which is no JSON: the exchange itself stands.
        let answer = post::<serde_json::Value>(introduced, "/x", "Basic eA==", &serde_json::json!({})).await;
        assert!(matches!(answer, Err(RequestError::Answer(_))), "{answer:?}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 1);

        let refused = introduce(&resolver, &server.address, [7; 32]).await.err().unwrap();
        assert!(refused.is_final() && refused.to_string().contains("Nothing was sent"), "{refused}");
        assert_eq!(server.requests.load(Ordering::SeqCst), 1);
    }
}
