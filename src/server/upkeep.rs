//! Small chores of the leader that are no controllers: they look at the store, not at objects' specs.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::bootstrap::delete;
use crate::apiserver::{ApiServer, client};
use crate::auth::Identity;
use crate::auth::bootstrap_token::BootstrapTokens;
use crate::strategy::service::allocation;

/// How often reservations of addresses and ports are compared with Services, and tokens with the clock.
const SWEEP: Duration = Duration::from_secs(60);
/// Expired bootstrap tokens stay so long, so that whoever still shows one is told that it expired.
const EXPIRED_KEPT: SignedDuration = SignedDuration::from_hours(1);

/// Runs until shutdown; works while this server leads.
pub async fn run(api: ApiServer, leadership: watch::Receiver<bool>, shutdown: CancellationToken) {
    let mut suspects = Vec::new();
    let cleaner = client(&api, Identity::controller("token-cleaner"));
    let tokens = BootstrapTokens::new(api.authorizer().objects().clone());
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
        if !*leadership.borrow() {
            continue;
        }
        if let Err(status) = allocation::sweep(&api, &mut suspects).await {
            tracing::warn!(error = status.message(), "comparing reservations with Services failed");
        }
        if let Err(error) = clean(&cleaner, &tokens).await {
            tracing::warn!(error = format!("{error:#}"), "deleting expired bootstrap tokens failed");
        }
    }
}

async fn clean(cleaner: &kube::Client, tokens: &BootstrapTokens) -> anyhow::Result<()> {
    for name in tokens.expired_before(Timestamp::now() - EXPIRED_KEPT)? {
        delete(cleaner, &format!("/api/v1/namespaces/kube-system/secrets/{name}")).await?;
    }
    Ok(())
}
