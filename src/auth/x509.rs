//! Client certificates: CN is the user, each O a group. The handshake only proves that the client holds the key; the chain is
//! judged afterwards, so that a wrong certificate gets a 401 with a `Status` instead of a broken connection.

use super::UserInfo;
use super::identity::SYSTEM_AUTHENTICATED;
use super::pki::{ClusterKeys, authority::validity, seal::to_hex};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::sync::Arc;
use std::time::SystemTime;

/// Why a certificate names nobody.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("the chain does not verify")]
    Chain(#[source] rustls::Error),
    #[error("the certificate cannot be parsed")]
    Malformed,
    #[error("the certificate has no common name")]
    NoName,
    #[error("the clock is before 1970")]
    Clock,
}

/// The client CA's view on certificates.
#[derive(Debug)]
pub struct ClientCertificates {
    strict: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

impl ClientCertificates {
    pub fn new(keys: &ClusterKeys) -> Result<ClientCertificates, rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(keys.client_ca.certificate().clone())?;
        let strict = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
        Ok(ClientCertificates { strict, provider })
    }

    pub fn tls_verifier(self: &Arc<Self>) -> Arc<dyn ClientCertVerifier> {
        Arc::new(AskForCertificate { certificates: self.clone() })
    }

    /// Verifies the chain (client authentication, signed by the client CA, in its time) and reads the user out of the leaf.
    pub fn verify(
        &self,
        chain: &[CertificateDer<'_>],
        now: SystemTime,
    ) -> Result<(UserInfo, SystemTime), CertificateError> {
        let (leaf, intermediates) = chain.split_first().ok_or(CertificateError::Malformed)?;
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).map_err(|_| CertificateError::Clock)?;
        self.strict
            .verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(since_epoch))
            .map_err(CertificateError::Chain)?;
        let (_, not_after) = validity(leaf).ok_or(CertificateError::Malformed)?;
        Ok((user(leaf)?, not_after))
    }
}

fn user(leaf: &CertificateDer<'_>) -> Result<UserInfo, CertificateError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).map_err(|_| CertificateError::Malformed)?;
    let subject = parsed.subject();
    let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
        attribute.as_str().map(str::to_owned).map_err(|_| CertificateError::Malformed)
    };
    // Of several common names the last counts, as Go's x509 package has it.
    let name = subject.iter_common_name().last().ok_or(CertificateError::NoName).and_then(text)?;
    if name.is_empty() {
        return Err(CertificateError::NoName);
    }
    let mut groups = subject.iter_organization().map(text).collect::<Result<Vec<_>, _>>()?;
    if !groups.iter().any(|group| group == SYSTEM_AUTHENTICATED) {
        groups.push(SYSTEM_AUTHENTICATED.to_owned());
    }
    let fingerprint = to_hex(ring::digest::digest(&ring::digest::SHA256, leaf).as_ref());
    let credential = vec![format!("X509SHA256={fingerprint}")];
    let extra = [("authentication.kubernetes.io/credential-id".to_owned(), credential)].into();
    Ok(UserInfo { name, uid: String::new(), groups, extra })
}

/// Asks for a certificate and checks that the client holds its key. Whether the chain means anything is
/// [`ClientCertificates::verify`]'s to say, after the handshake.
#[derive(Debug)]
struct AskForCertificate {
    certificates: Arc<ClientCertificates>,
}

impl ClientCertVerifier for AskForCertificate {
    fn offer_client_auth(&self) -> bool {
        true
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.certificates.strict.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.certificates.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.certificates.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.certificates.provider.signature_verification_algorithms.supported_schemes()
    }
}
