//! What a member does unasked: compaction and the end of leases (as leader, through the log), snapshots when the log has
//! grown (each for itself). An idle cluster proposes nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_store::{Command, Store};
use openraft::async_runtime::WatchReceiver;
use tokio::sync::{Notify, watch};

use crate::log::Log;
use crate::machine::Snapshots;
use crate::node::Engine;
use crate::propose::Proposer;

/// With leases about, their deadlines are looked at this often at least.
const LEASE_LOOK: Duration = Duration::from_secs(1);
/// Parts of the time between two compactions after which the newest revision is noted.
const NOTES: u32 = 10;

/// Every `interval`, forgets the history before the revision that was the newest one interval ago. Every member notes how
/// far the store is, so that whoever comes to lead knows what is old, however short the reigns are.
pub(crate) async fn compact(store: Store, proposer: Proposer, leader: watch::Receiver<bool>, interval: Duration) {
    let mut notes = VecDeque::from([store.revision()]);
    let (mut last, mut turns) = (store.compacted_revision(), 0);
    loop {
        tokio::time::sleep(interval / NOTES).await;
        let compacted = store.compacted_revision();
        turns = if compacted == last { turns + 1 } else { 1 };
        last = compacted;
        notes.push_back(store.revision());
        if notes.len() <= NOTES as usize {
            continue;
        }
        let Some(due) = notes.pop_front() else { continue };
        if *leader.borrow() && turns >= NOTES && due > compacted {
            match proposer.propose(&Command::Compact { revision: due }).await {
                Ok(_) => tracing::debug!(revision = due, "compacted"),
                Err(error) => tracing::warn!(%error, "compaction was not done; the next one covers it"),
            }
        }
    }
}

/// Ends leases whose time is up, with the keys bound to them.
pub(crate) async fn expire_leases(
    store: Store,
    proposer: Proposer,
    mut leader: watch::Receiver<bool>,
    granted: Arc<Notify>,
) {
    loop {
        if leader.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        let now = Instant::now();
        for id in store.expired_leases(now) {
            if let Err(error) = proposer.propose(&Command::LeaseRevoke { id }).await {
                tracing::warn!(%error, lease = id, "ending a lease failed; it is tried again");
                tokio::time::sleep(LEASE_LOOK).await;
                break;
            }
        }
        match store.next_lease_deadline() {
            None => granted.notified().await,
            Some(deadline) => {
                let wait = deadline.saturating_duration_since(now).min(LEASE_LOOK);
                tokio::time::sleep(wait.max(Duration::from_millis(10))).await;
            }
        }
    }
}

/// Writes a snapshot whenever the log has grown enough, and then purges the log behind it; with peers, all but the last
/// `kept` bytes of it.
pub(crate) async fn snapshots(raft: Engine, log: Log, snapshots: Arc<Snapshots>, kept: u64) {
    let growth = snapshots.growth.clone();
    loop {
        tokio::select! {
            // Also one that was asked for, or came from the leader.
            () = growth.taken.notified() => {}
            () = growth.due.notified(), if !growth.is_due() => continue,
            () = std::future::ready(()), if growth.is_due() => {
                if raft.trigger().snapshot().await.is_err() {
                    return; // the engine has stopped
                }
                growth.taken.notified().await;
            }
        }
        let Some(covered) = snapshots.covered() else { continue };
        let alone = raft.server_metrics().borrow_watched().membership_config.membership().nodes().count() <= 1;
        let upto = if alone { Some(covered) } else { log.wal().purgeable(covered, kept) };
        if let Some(upto) = upto
            && raft.trigger().purge_log(upto).await.is_err()
        {
            return;
        }
    }
}
