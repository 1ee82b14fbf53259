//! Service account tokens: requested for the pod, renewed long before they expire, kept for times without a server.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::Pod;

use super::VolumeError;
use super::payload::TokenWish;
use crate::kubelet::api::ApiClient;
use crate::kubelet::containers;
use crate::kubelet::reads::Reads;

/// No token is used longer than this before it is renewed.
const MAX_AGE: Duration = Duration::from_secs(24 * 3600);

/// When a renewal that failed is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// Where a token is kept for times without a server.
fn file(wish: &TokenWish) -> String {
    format!("token/{}/{}", wish.audience, wish.expiration_seconds)
}

#[derive(Debug, Clone)]
struct Issued {
    token: String,
    renew_at: SystemTime,
}

/// The tokens of one pod.
#[derive(Debug, Default)]
pub struct Tokens {
    issued: BTreeMap<TokenWish, Issued>,
}

impl Tokens {
    /// A token that is good for a while.
    ///
    /// # Errors
    /// When the API refuses and there is no token yet; a failed renewal keeps the old one, which a restarted agent finds
    /// among the pod's copies.
    pub async fn get(&mut self, reads: &Reads, pod: &Pod, wish: &TokenWish) -> Result<String, VolumeError> {
        let now = SystemTime::now();
        if let Some(issued) = self.issued.get(wish).filter(|issued| issued.renew_at > now) {
            return Ok(issued.token.clone());
        }
        match request(&reads.api, pod, wish).await {
            Ok(issued) => {
                let token = issued.token.clone();
                reads.keep(&file(wish), &token).await;
                self.issued.insert(wish.clone(), issued);
                Ok(token)
            }
            Err(error) => {
                let known = self.issued.get(wish).map(|issued| issued.token.clone());
                let known = match known {
                    None if error.is_no_answer() => reads.recall(&file(wish)).await,
                    known => known,
                };
                let Some(token) = known else { return Err(error) };
                tracing::warn!(%error, pod = containers::describe(pod), "token not renewed");
                self.issued.insert(wish.clone(), Issued { token: token.clone(), renew_at: now + RETRY });
                Ok(token)
            }
        }
    }

    /// When the first token wants to be renewed.
    pub fn renew_at(&self) -> Option<SystemTime> {
        self.issued.values().map(|issued| issued.renew_at).min()
    }
}

async fn request(api: &ApiClient, pod: &Pod, wish: &TokenWish) -> Result<Issued, VolumeError> {
    let namespace = containers::namespace(pod);
    let account =
        containers::spec(pod).service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default");
    let audiences: Vec<&str> = if wish.audience.is_empty() { Vec::new() } else { vec![&wish.audience] };
    let body = serde_json::json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "metadata": {"name": account, "namespace": namespace},
        "spec": {
            "audiences": audiences, "expirationSeconds": wish.expiration_seconds,
            "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": containers::name(pod), "uid": containers::uid(pod)},
        },
    });
    let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
    let answer: TokenRequest = api.create(&path, &body).await?;
    let status =
        answer.status.ok_or_else(|| VolumeError::Invalid("the API server answered without a token".to_owned()))?;
    let now = SystemTime::now();
    let life = SystemTime::from(status.expiration_timestamp.0).duration_since(now).unwrap_or_default();
    // Spread, so that a thousand pods don't renew together.
    let renew_in = life.mul_f64(rand::random_range(0.78..0.8)).min(MAX_AGE);
    Ok(Issued { token: status.token, renew_at: now + renew_in })
}
