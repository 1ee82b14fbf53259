//! What a member keeps below `DATA/agent`: who it is, whom it trusts, and the cluster's settings.
//!
//! | file | what it holds | mode |
//! | --- | --- | --- |
//! | `node.secret` | proves that a later join of this name comes from this machine | 0600 |
//! | `client.pem` | client certificate and its key, replaced together | 0600 |
//! | `server-ca.crt` | the CA of the servers | 0644 |
//! | `cluster.json` | address ranges, DNS | 0644 |

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::admission::ClusterSettings;
use crate::files::write_durably;

/// Bytes of randomness in a node secret.
const SECRET_BYTES: usize = 32;

/// What can go wrong with what is kept.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file.
    #[error("access {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the file system said.
        #[source]
        source: std::io::Error,
    },
    /// A key or request could not be made.
    #[error("make a certificate request")]
    Request(#[source] rcgen::Error),
    /// The server sent something that is no certificate for us.
    #[error("the certificate from the server is not one for this node's key and name")]
    Foreign,
}

/// A private key and the request that goes with it.
pub struct FreshKey {
    key: KeyPair,
    /// The certificate request, PEM.
    pub csr: String,
}

impl FreshKey {
    /// A new P-256 key, and a request for `system:node:<name>`.
    ///
    /// # Errors
    /// The name cannot be in a certificate.
    pub fn make(node_name: &str) -> Result<FreshKey, CredentialsError> {
        let key = KeyPair::generate().map_err(CredentialsError::Request)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        params.distinguished_name.push(DnType::CommonName, format!("system:node:{node_name}"));
        let csr =
            params.serialize_request(&key).and_then(|request| request.pem()).map_err(CredentialsError::Request)?;
        Ok(FreshKey { key, csr })
    }
}

/// The certificate that a node has, with its key.
pub struct ClientCertificate {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// Beginning and end.
    pub validity: (SystemTime, SystemTime),
}

impl ClientCertificate {
    /// How long until only a third of its life is left: time for another then.
    #[must_use]
    pub fn due_in(&self, now: SystemTime) -> Duration {
        let life = self.validity.1.duration_since(self.validity.0).unwrap_or_default();
        self.validity.1.duration_since(now + life / 3).unwrap_or_default()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self, now: SystemTime) -> bool {
        now >= self.validity.1
    }

    /// From PEM of certificates and key; must name `node_name`.
    fn parse(pem: &[u8], node_name: &str) -> Option<ClientCertificate> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
        let key = PrivateKeyDer::from_pem_slice(pem).ok()?;
        let (_, leaf) = x509_parser::parse_x509_certificate(chain.first()?).ok()?;
        let name = leaf.subject().iter_common_name().next()?.as_str().ok()?;
        if name.strip_prefix("system:node:") != Some(node_name) {
            return None;
        }
        let at = |time: x509_parser::time::ASN1Time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
        };
        let validity = (at(leaf.validity().not_before), at(leaf.validity().not_after));
        let signing = rustls::crypto::ring::sign::any_supported_type(&key).ok()?;
        // A certificate for another key would fail in every handshake.
        if signing.public_key().is_some_and(|public| public.as_ref() != leaf.public_key().raw) {
            return None;
        }
        Some(ClientCertificate { chain, key, validity })
    }
}

/// The folder.
#[derive(Debug, Clone)]
pub struct Credentials {
    agent_dir: PathBuf,
}

impl Credentials {
    /// What is kept in `DATA/agent`.
    #[must_use]
    pub fn new(agent_dir: PathBuf) -> Credentials {
        Credentials { agent_dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.agent_dir.join(name)
    }

    fn write(&self, name: &str, bytes: &[u8], mode: u32) -> Result<(), CredentialsError> {
        let path = self.path(name);
        write_durably(&path, bytes, mode).map_err(|source| CredentialsError::File { path, source })
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, CredentialsError> {
        let path = self.path(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(CredentialsError::File { path, source }),
        }
    }

    /// The node's secret; made at the first call.
    ///
    /// # Errors
    /// The file cannot be read or written.
    pub fn node_secret(&self) -> Result<String, CredentialsError> {
        if let Some(known) = self.read("node.secret")? {
            let known = String::from_utf8_lossy(&known).trim().to_owned();
            if !known.is_empty() {
                return Ok(known);
            }
        }
        let bytes: [u8; SECRET_BYTES] = rand::random();
        let secret: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.write("node.secret", secret.as_bytes(), 0o600)?;
        Ok(secret)
    }

    /// The certificate for this name, if there is one; it may have ended.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn certificate(&self, node_name: &str) -> Result<Option<ClientCertificate>, CredentialsError> {
        Ok(self.read("client.pem")?.and_then(|pem| ClientCertificate::parse(&pem, node_name)))
    }

    /// Keeps a certificate with the key that it was made for.
    ///
    /// # Errors
    /// It is not for this key and name, or cannot be written.
    pub fn keep_certificate(
        &self,
        key: &FreshKey,
        certificate: &str,
        node_name: &str,
    ) -> Result<ClientCertificate, CredentialsError> {
        let pem = format!("{}\n{}", certificate.trim_end(), key.key.serialize_pem());
        let parsed = ClientCertificate::parse(pem.as_bytes(), node_name).ok_or(CredentialsError::Foreign)?;
        self.write("client.pem", pem.as_bytes(), 0o600)?;
        Ok(parsed)
    }

    /// The CAs of the servers; empty before the first admission.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn roots(&self) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
        let pem = self.read("server-ca.crt")?.unwrap_or_default();
        Ok(CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).collect())
    }

    /// Keeps the CA of the servers.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep_root(&self, ca: &CertificateDer<'_>) -> Result<(), CredentialsError> {
        self.write("server-ca.crt", to_pem("CERTIFICATE", ca).as_bytes(), 0o644)
    }

    /// The settings of the cluster; `None` before the first admission or when they are damaged.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn cluster(&self) -> Result<Option<ClusterSettings>, CredentialsError> {
        Ok(self.read("cluster.json")?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }

    /// Keeps the settings of the cluster.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn keep_cluster(&self, settings: &ClusterSettings) -> Result<(), CredentialsError> {
        let bytes = serde_json::to_vec_pretty(settings).unwrap_or_default();
        self.write("cluster.json", &bytes, 0o644)
    }

    /// The folder.
    #[must_use]
    pub fn agent_dir(&self) -> &Path {
        &self.agent_dir
    }
}

/// PEM (RFC 7468) as servers write it: lines of 64 characters.
#[must_use]
pub fn to_pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn issue(csr: &str, seconds: u64) -> String {
        let ca_key = KeyPair::generate().unwrap();
        let issuer = rcgen::Issuer::new(CertificateParams::default(), ca_key);
        let mut request = rcgen::CertificateSigningRequestParams::from_pem(csr).unwrap();
        let now = std::time::SystemTime::now();
        request.params.not_before = now.into();
        request.params.not_after = (now + Duration::from_secs(seconds)).into();
        request.signed_by(&issuer).unwrap().pem()
    }

    #[test]
    fn a_certificate_is_kept_with_its_key_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Credentials::new(dir.path().to_owned());
        assert!(kept.certificate("n1").unwrap().is_none());
        let key = FreshKey::make("n1").unwrap();
        let pem = issue(&key.csr, 3000);
        kept.keep_certificate(&key, &pem, "n1").unwrap();
        let found = kept.certificate("n1").unwrap().unwrap();
        let now = SystemTime::now();
        let due = found.due_in(now).as_secs();
        assert!((1990..=2000).contains(&due), "{due}");
        assert!(found.due_in(now + Duration::from_secs(2100)).is_zero());
        assert!(!found.is_over(now) && found.is_over(now + Duration::from_secs(3001)));
        assert!(kept.certificate("n2").unwrap().is_none(), "a renamed node needs another");
        let other = FreshKey::make("n1").unwrap();
        assert!(matches!(kept.keep_certificate(&other, &pem, "n1"), Err(CredentialsError::Foreign)));
        assert!(kept.certificate("n1").unwrap().is_some());
        let mode = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("client.pem"), 0o600);
        let secret = kept.node_secret().unwrap();
        assert_eq!((secret.len(), kept.node_secret().unwrap(), mode("node.secret")), (64, secret.clone(), 0o600));
    }

    #[test]
    fn pem_is_what_others_write() {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::default().self_signed(&key).unwrap();
        assert_eq!(to_pem("CERTIFICATE", certificate.der()), certificate.pem());
    }
}
