//! The node's client certificate. It is replaced in process; connections that live on keep the one they shook hands
//! with until their owners see [`NodeIdentity::changed`].

use std::sync::Arc;

use parking_lot::RwLock;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{SignatureScheme, crypto};
use tokio::sync::watch;

/// What the agent shows to servers; nothing until there is a certificate. Clones are one identity.
#[derive(Debug, Clone)]
pub struct NodeIdentity {
    current: Arc<RwLock<Option<Arc<CertifiedKey>>>>,
    version: Arc<watch::Sender<u64>>,
}

impl Default for NodeIdentity {
    fn default() -> Self {
        NodeIdentity { current: Arc::default(), version: Arc::new(watch::Sender::new(0)) }
    }
}

impl NodeIdentity {
    /// From now on new connections show this certificate.
    ///
    /// # Errors
    /// The key is of no known kind.
    pub fn set(&self, chain: Vec<CertificateDer<'static>>, key: &PrivateKeyDer<'static>) -> Result<(), rustls::Error> {
        let key = crypto::ring::sign::any_supported_type(key)?;
        *self.current.write() = Some(Arc::new(CertifiedKey::new(chain, key)));
        self.version.send_modify(|version| *version += 1);
        Ok(())
    }

    /// Whether there is a certificate at all.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.current.read().is_some()
    }

    /// Tells of every [`NodeIdentity::set`].
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }
}

impl ResolvesClientCert for NodeIdentity {
    fn resolve(&self, _root_hint_subjects: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current.read().clone()
    }

    fn has_certs(&self) -> bool {
        self.is_set()
    }
}
