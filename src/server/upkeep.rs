//! Small chores of the leader that are no controllers: they look at the store, not at objects' specs.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::apiserver::ApiServer;
use crate::strategy::service::allocation;

/// How often reservations of addresses and ports are compared with Services.
const SWEEP: Duration = Duration::from_secs(60);

/// Runs until shutdown; works while this server leads.
pub async fn run(api: ApiServer, leadership: watch::Receiver<bool>, shutdown: CancellationToken) {
    let mut suspects = Vec::new();
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
    }
}
