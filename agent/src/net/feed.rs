//! One watch per collection for all who follow it: the service proxy and the DNS responder.

use tokio_util::sync::CancellationToken;

use crate::watch::{Event, Target, Watcher};

/// Gets every event; must not block.
pub(super) type Follower = Box<dyn Fn(Event) + Send>;

/// Watches a collection until shutdown and hands every event to all followers.
pub(super) fn follow(
    client: &kube::Client,
    path: &'static str,
    followers: Vec<Follower>,
    shutdown: &CancellationToken,
) {
    if followers.is_empty() {
        return;
    }
    let mut watcher = Watcher::new(client.clone(), Target::all(path));
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                () = shutdown.cancelled() => return,
                event = watcher.next() => event,
            };
            for follower in &followers {
                follower(event.clone());
            }
        }
    });
}
