//! Keeps one tunnel to every known server.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::sync::watch;
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

/// Servers whose tunnel broke and does not stand again yet.
pub type Lost = watch::Sender<BTreeSet<SocketAddr>>;

/// Serves `service` to every server of the list, and follows the list, until shutdown; tells in `lost` who went away.
pub async fn run(servers: Servers, service: NodeService, lost: Lost, shutdown: CancellationToken) {
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
                let mark = Mark { server: address.parse().ok(), lost: lost.clone() };
                let link = keep(servers.clone(), address, service.clone(), mark);
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
async fn keep(servers: Servers, address: String, service: NodeService, mark: Mark) {
    let mut retry = Jitter::new(RETRY.0, RETRY.1);
    let mut identity = servers.dialer.identity().changed();
    loop {
        identity.borrow_and_update();
        let begin = Instant::now();
        match servers.dialer.dial(&address, Protocol::Link).await {
            Ok(stream) => {
                tracing::debug!(server = address, "tunnel stands");
                mark.set(false);
                tokio::select! {
                    result = serve::serve(stream, service.clone()) => {
                        mark.set(true);
                        if let Err(error) = result {
                            tracing::debug!(error = explain(&error), server = address, "tunnel ended");
                        }
                    }
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

/// One server's place among the lost ones; it is given up when nobody keeps a tunnel to it any more.
struct Mark {
    /// None for a server that is configured by name: the endpoints of the API have addresses.
    server: Option<SocketAddr>,
    lost: Lost,
}

impl Mark {
    fn set(&self, is_lost: bool) {
        let Some(server) = self.server else { return };
        self.lost.send_if_modified(|lost| if is_lost { lost.insert(server) } else { lost.remove(&server) });
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.set(false);
    }
}
