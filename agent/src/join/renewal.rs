//! Another client certificate while the old one is good: a request that the cluster's signer approves and signs, as the
//! kubelet rotates its own.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use serde_json::json;

use super::credentials::{CredentialsError, FreshKey};
use crate::kubelet::api::{ApiClient, ApiError};

const COLLECTION: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
/// How often and how long the answer is looked for.
const POLL: Duration = Duration::from_secs(1);
const ROUNDS: u32 = 60;

/// Why there is no other certificate.
#[derive(Debug, thiserror::Error)]
pub enum RenewalError {
    /// Key or request.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The API.
    #[error("request a certificate")]
    Api(#[from] ApiError),
    /// Somebody said no.
    #[error("the certificate request was denied: {0}")]
    Denied(String),
    /// Nobody signed it.
    #[error("the certificate request {0} was not signed within a minute")]
    Unsigned(String),
}

/// A new key and the certificate for it, PEM.
///
/// # Errors
/// See [`RenewalError`].
pub async fn renew(api: &ApiClient, node_name: &str) -> Result<(FreshKey, String), RenewalError> {
    let key = FreshKey::make(node_name)?;
    let name = format!("csr-{:016x}", rand::random::<u64>());
    let request = json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": name},
        "spec": {
            "request": ByteString(key.csr.clone().into_bytes()),
            "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
            "usages": ["digital signature", "client auth"],
        },
    });
    let mut answer: CertificateSigningRequest = api.create(COLLECTION, &request).await?;
    for _ in 0..ROUNDS {
        let status = answer.status.unwrap_or_default();
        if let Some(certificate) = status.certificate {
            return Ok((key, String::from_utf8_lossy(&certificate.0).into_owned()));
        }
        let refusal = status.conditions.iter().flatten().find(|it| matches!(it.type_.as_str(), "Denied" | "Failed"));
        if let Some(refusal) = refusal {
            return Err(RenewalError::Denied(refusal.message.clone().unwrap_or_default()));
        }
        tokio::time::sleep(POLL).await;
        answer = api.get(&format!("{COLLECTION}/{name}")).await?;
    }
    Err(RenewalError::Unsigned(name))
}
