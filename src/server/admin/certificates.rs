//! When certificates end, and new ones.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::Admin;
use crate::auth::pki::{PkiError, authority, files};
use crate::server::admin_kubeconfig;

/// Less than this left is worth a warning; everything of ours is renewed long before.
const SOON: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How often certificates are compared with the clock, which may jump, or have gone on while the machine slept.
const CHECK: Duration = Duration::from_secs(60);

/// A certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// What it is for.
    pub name: String,
    /// When it ends.
    pub expires: String,
    /// Seconds until then; negative afterwards.
    pub seconds_left: i64,
    /// `ok`, `expires soon` or `expired`.
    pub state: String,
}

impl CertificateView {
    /// Of a certificate that ends at `not_after`.
    pub fn new(name: &str, not_after: SystemTime, now: SystemTime) -> CertificateView {
        let seconds_left = match not_after.duration_since(now) {
            Ok(left) => i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            Err(over) => -i64::try_from(over.duration().as_secs()).unwrap_or(i64::MAX),
        };
        let soon = i64::try_from(SOON.as_secs()).unwrap_or(i64::MAX);
        let state = match seconds_left {
            ..=0 => "expired",
            left if left < soon => "expires soon",
            _ => "ok",
        };
        let expires = jiff::Timestamp::try_from(not_after).ok();
        let expires = expires.and_then(|at| jiff::Timestamp::from_second(at.as_second()).ok());
        let expires = expires.map(|at| at.to_string()).unwrap_or_default();
        CertificateView { name: name.to_owned(), expires, seconds_left, state: state.to_owned() }
    }

    /// Of the first certificate in a PEM text.
    pub fn of_pem(name: &str, pem: &[u8], now: SystemTime) -> Option<CertificateView> {
        let der = CertificateDer::from_pem_slice(pem).ok()?;
        Some(CertificateView::new(name, authority::validity(&der)?.1, now))
    }
}

/// Every certificate of this server.
pub fn list(admin: &Admin) -> Vec<CertificateView> {
    let now = SystemTime::now();
    let keys = &admin.cluster.keyring.keys;
    let mut all = vec![
        CertificateView::new("server CA", keys.server_ca.not_after(), now),
        CertificateView::new("client CA", keys.client_ca.not_after(), now),
        CertificateView::new("request-header CA", keys.request_header_ca.not_after(), now),
        CertificateView::new("API server", admin.leaf.not_after(), now),
    ];
    all.extend(admin.cluster.peers.not_after().map(|end| CertificateView::new("to other servers", end, now)));
    for (path, _) in kubeconfigs(admin) {
        let name = format!("administrator in {}", path.display());
        all.extend(kubeconfig_certificate(&path).and_then(|pem| CertificateView::of_pem(&name, &pem, now)));
    }
    all
}

/// PEM of the client certificate in a kubeconfig of ours.
pub fn kubeconfig_certificate(path: &std::path::Path) -> Option<Vec<u8>> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let text = std::fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.trim().strip_prefix("client-certificate-data:"))?;
    STANDARD.decode(value.trim()).ok()
}

/// Makes every leaf of this server anew; connections that are open keep the one they began with.
///
/// # Errors
/// One cannot be issued or written.
pub fn rotate(admin: &Admin) -> Result<(), PkiError> {
    admin.leaf.renew(SystemTime::now())?;
    admin.cluster.peers.renew()?;
    let url = admin.settings.local_url();
    for (path, mode) in kubeconfigs(admin) {
        let text = files::kubeconfig(&admin.cluster.keyring.keys, &url, &files::ADMIN, SystemTime::now())?;
        files::write_durably(&path, text.as_bytes(), mode)?;
    }
    Ok(())
}

/// The administrator's files, and their modes.
fn kubeconfigs(admin: &Admin) -> [(PathBuf, u32); 2] {
    let settings = &admin.settings;
    [(admin_kubeconfig(&settings.data_dir), 0o600), (settings.kubeconfig.clone(), settings.kubeconfig_mode)]
}

/// Keeps what this server serves and shows, and what its administrator holds, good.
pub async fn keep(admin: Admin) {
    let admin = Arc::new(admin);
    loop {
        tokio::time::sleep(CHECK).await;
        let admin = admin.clone();
        // Files: a disk that hangs must not hold up a worker.
        let renewed = tokio::task::spawn_blocking(move || renew_due(&admin, SystemTime::now())).await;
        if let Ok(Err(error)) = renewed {
            tracing::error!(error = format!("{error:#}"), "renewing certificates; trying on");
        }
    }
}

fn renew_due(admin: &Admin, now: SystemTime) -> anyhow::Result<()> {
    admin.leaf.renew_if_due(now)?;
    admin.cluster.peers.renew_if_due()?;
    let url = admin.settings.local_url();
    for (path, mode) in kubeconfigs(admin) {
        files::renew_kubeconfig(&path, mode, &admin.cluster.keyring.keys, &url, &files::ADMIN, now)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_soon_is_told_apart() {
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        let state = |end| CertificateView::new("x", end, now).state;
        assert_eq!((state(now + 31 * day).as_str(), state(now + day).as_str()), ("ok", "expires soon"));
        assert_eq!(state(now - day), "expired");
        assert!(CertificateView::new("x", now - day, now).seconds_left < 0);
    }
}
