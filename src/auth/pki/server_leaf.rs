//! The certificate the listener serves. It is made in process at start and replaced in process when two thirds of its
//! life are over or when the names change; connections that live on keep the one they shook hands with.

use super::{ClusterKeys, LeafRequest, PkiError, Usage};
use parking_lot::RwLock;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The current serving certificate.
pub struct ServerLeaf {
    keys: Arc<ClusterKeys>,
    names: Vec<String>,
    current: RwLock<Current>,
}

struct Current {
    certified: Arc<CertifiedKey>,
    issued: SystemTime,
    not_after: SystemTime,
}

impl std::fmt::Debug for ServerLeaf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerLeaf").field("names", &self.names).finish_non_exhaustive()
    }
}

/// The names a server answers to: those every in-cluster client uses, its own, and the configured ones.
pub fn server_names(domain: &str, node_name: &str, addresses: &[IpAddr], configured: &[String]) -> Vec<String> {
    let mut names: Vec<String> =
        ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(str::to_owned).into();
    names.push(format!("kubernetes.default.svc.{domain}"));
    names.push(node_name.to_owned());
    names.extend(["127.0.0.1".to_owned(), "::1".to_owned()]);
    names.extend(addresses.iter().filter(|address| !address.is_unspecified()).map(IpAddr::to_string));
    names.extend(configured.iter().cloned());
    let mut seen = std::collections::HashSet::new();
    names.retain(|name| !name.is_empty() && seen.insert(name.clone()));
    names
}

impl ServerLeaf {
    /// Issues the first leaf for `names` (see [`server_names`]).
    pub fn issue(keys: Arc<ClusterKeys>, names: Vec<String>, now: SystemTime) -> Result<Arc<ServerLeaf>, PkiError> {
        let current = RwLock::new(make(&keys, &names, now)?);
        Ok(Arc::new(ServerLeaf { keys, names, current }))
    }

    /// Replaces the leaf when it is due; returns whether it did.
    pub fn renew_if_due(&self, now: SystemTime) -> Result<bool, PkiError> {
        let (issued, not_after) = {
            let current = self.current.read();
            (current.issued, current.not_after)
        };
        let life = not_after.duration_since(issued).unwrap_or_default();
        if now < issued + life * 2 / 3 && now + Duration::from_secs(3600) > issued {
            return Ok(false);
        }
        self.renew(now)?;
        Ok(true)
    }

    /// Replaces the leaf now.
    pub fn renew(&self, now: SystemTime) -> Result<(), PkiError> {
        *self.current.write() = make(&self.keys, &self.names, now)?;
        tracing::info!("serving certificate renewed");
        Ok(())
    }

    /// When the leaf ends.
    pub fn not_after(&self) -> SystemTime {
        self.current.read().not_after
    }
}

fn make(keys: &ClusterKeys, names: &[String], now: SystemTime) -> Result<Current, PkiError> {
    let request = LeafRequest { common_name: "coracle", organization: Some("coracle"), names, usage: Usage::Server };
    let leaf = keys.server_ca.issue(&request, now)?;
    let key = rustls::crypto::ring::sign::any_supported_type(&leaf.key_der()).map_err(PkiError::Tls)?;
    // The root goes along: a joiner checks its hash against the token before it trusts anything.
    let chain = vec![leaf.certificate.clone(), keys.server_ca.certificate().clone()];
    Ok(Current { certified: Arc::new(CertifiedKey::new(chain, key)), issued: now, not_after: leaf.not_after })
}

impl ResolvesServerCert for ServerLeaf {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.read().certified.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_renewed_after_two_thirds_of_its_life() {
        let now = SystemTime::now();
        let keys = Arc::new(ClusterKeys::generate(now).unwrap());
        let names = server_names("cluster.local", "n1", &["10.43.0.1".parse().unwrap()], &["api.example".into()]);
        assert!(names.contains(&"kubernetes.default.svc.cluster.local".to_owned()));
        let leaf = ServerLeaf::issue(keys, names, now).unwrap();
        let day = Duration::from_secs(86_400);
        assert!(!leaf.renew_if_due(now + 200 * day).unwrap());
        assert!(leaf.renew_if_due(now + 250 * day).unwrap());
        assert!(!leaf.renew_if_due(now + 251 * day).unwrap());
    }

    #[test]
    fn a_name_that_is_none_is_refused() {
        let keys = Arc::new(ClusterKeys::generate(SystemTime::now()).unwrap());
        let names = vec!["\u{e4}\u{f6}".to_owned()];
        assert!(matches!(ServerLeaf::issue(keys, names, SystemTime::now()), Err(PkiError::BadName(_))));
    }
}
