//! Keeps one tunnel to every known server.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::serve;
use crate::kubelet::backoff::Jitter;
use crate::kubelet::server::NodeService;
use crate::servers::dial::Protocol;
use crate::servers::{Servers, explain};

/// Delays between attempts at one server.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// A tunnel that stood this long was good: the next attempt comes soon.
const STABLE: Duration = Duration::from_secs(30);

/// Serves `service` to every server of the list, and follows the list, until shutdown.
pub async fn run(servers: Servers, service: NodeService, shutdown: CancellationToken) {
    let tasks = TaskTracker::new();
    let mut changes = servers.list.changes();
    let mut links: BTreeMap<String, CancellationToken> = BTreeMap::new();
    loop {
        let mut wanted = servers.list.current();
        wanted.retain(|address| Some(address) != servers.own.as_ref());
        links.retain(|address, stop| {
            let keep = wanted.contains(address);
            if !keep {
                stop.cancel();
            }
            keep
        });
        for address in wanted {
            links.entry(address.clone()).or_insert_with(|| {
                let stop = shutdown.child_token();
                let link = keep(servers.clone(), address, service.clone());
                tasks.spawn(stop.clone().run_until_cancelled_owned(link));
                stop
            });
        }
        tokio::select! {
            () = changes.next() => {}
            () = shutdown.cancelled() => break,
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// The tunnel to one server, for ever.
async fn keep(servers: Servers, address: String, service: NodeService) {
    let mut retry = Jitter::new(RETRY.0, RETRY.1);
    let mut identity = servers.dialer.identity().changed();
    loop {
        identity.borrow_and_update();
        let begin = Instant::now();
        match servers.dialer.dial(&address, Protocol::Link).await {
            Ok(stream) => {
                tracing::debug!(server = address, "tunnel stands");
                tokio::select! {
                    result = serve::serve(stream, service.clone()) => if let Err(error) = result {
                        tracing::debug!(error = explain(&error), server = address, "tunnel ended");
                    },
                    // The old certificate would outlive its end.
                    _ = identity.changed() => {}
                }
            }
            Err(error) => tracing::debug!(error = explain(&error), server = address, "tunnel not made"),
        }
        if begin.elapsed() >= STABLE {
            retry.reset();
        }
        tokio::time::sleep(retry.delay()).await;
    }
}
