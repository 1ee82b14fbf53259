//! Who leads: followed for everyone who asks, elections called in time, leadership given up when this member's disk
//! doesn't answer. Only monotonic time counts.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use coracle_store::Store;
use openraft::async_runtime::WatchReceiver;
use openraft::{Instant as _, ServerState};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::log::Log;
use crate::node::Engine;
use crate::peers::Peers;
use crate::pending::Pending;

/// For this time after it heard a leader, a member helps no other to power; and a leader that heard no majority for this
/// time doesn't act as one.
pub(crate) const LEASE: Duration = Duration::from_millis(1100);
/// When the lease is over, a member waits a random time of this range before it calls an election, so that few do at
/// once; less when the leader's connections broke, which is what a dead process looks like.
const SPREAD: (f64, f64) = (0.05, 0.4);
const SPREAD_LOST: (f64, f64) = (0.0, 0.15);
/// Before the next election when one brought no leader; doubled each time up to [`MOST_AGAIN`], for a disk that takes
/// long to keep a vote must not be asked for the next one meanwhile.
const AGAIN: (f64, f64) = (0.5, 1.0);
const MOST_AGAIN: u32 = 3;
/// A leader looks at its disk and its lease this often; one that is about to act as such, more often.
const LOOK: Duration = Duration::from_millis(200);
const LOOK_NEW: Duration = Duration::from_millis(20);
/// Between two heartbeats; the lease outlasts two of them and some delay.
const HEARTBEAT: Duration = Duration::from_millis(400);
/// A disk that takes longer for one write stalls.
const STALL: Duration = Duration::from_millis(1000);
/// From the attempt to hand leadership over because of a stall until nothing is said as leader any more.
const MUTE_AFTER: Duration = Duration::from_millis(300);

/// Who leads, as far as this member knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leader {
    pub term: u64,
    pub id: Option<u64>,
}

/// When the leader was heard last.
pub(crate) struct Contacts {
    state: Mutex<Contact>,
    changed: Notify,
}

struct Contact {
    leader: Option<u64>,
    term: u64,
    heard: Instant,
    /// A connection of the leader broke since it was heard.
    lost: bool,
    /// Part of the spread that this member waits; drawn anew for each election.
    patience: f64,
    /// Elections since a leader was heard.
    attempts: u32,
    /// No election before this.
    not_before: Instant,
    connections: HashMap<u64, usize>,
}

fn draw((from, to): (f64, f64), part: f64) -> Duration {
    Duration::from_secs_f64(from + (to - from) * part)
}

impl Contacts {
    pub fn new() -> Contacts {
        let now = Instant::now();
        let state = Contact {
            leader: None,
            term: 0,
            heard: now,
            lost: false,
            patience: rand::random(),
            attempts: 0,
            not_before: now,
            connections: HashMap::new(),
        };
        Contacts { state: Mutex::new(state), changed: Notify::new() }
    }

    /// A peer spoke as the leader of a term.
    pub fn heard_from_leader(&self, peer: u64, term: u64) {
        let mut state = self.state.lock();
        if term < state.term {
            return;
        }
        state.leader = Some(peer);
        state.term = term;
        state.heard = Instant::now();
        state.lost = false;
        state.attempts = 0;
    }

    pub fn connected(&self, peer: u64) {
        *self.state.lock().connections.entry(peer).or_default() += 1;
    }

    pub fn disconnected(&self, peer: u64) {
        let mut state = self.state.lock();
        if let Some(count) = state.connections.get_mut(&peer) {
            *count -= 1;
            if *count == 0 {
                state.connections.remove(&peer);
            }
        }
        if state.leader == Some(peer) && !state.connections.contains_key(&peer) {
            state.lost = true;
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Whether a leader other than this peer was heard within the lease.
    pub fn has_leader_besides(&self, peer: u64) -> bool {
        let state = self.state.lock();
        state.leader.is_some_and(|leader| leader != peer) && state.heard.elapsed() < LEASE
    }

    /// From now on a leader should be heard.
    fn begin(&self) {
        let mut state = self.state.lock();
        state.heard = Instant::now();
        state.lost = false;
    }

    /// When this member should call an election if nobody is heard until then.
    fn deadline(&self) -> Instant {
        let state = self.state.lock();
        let spread = if state.lost { SPREAD_LOST } else { SPREAD };
        (state.heard + LEASE + draw(spread, state.patience)).max(state.not_before)
    }

    fn called(&self) {
        let mut state = self.state.lock();
        state.not_before = Instant::now() + draw(AGAIN, rand::random()) * (1 << state.attempts);
        state.attempts = (state.attempts + 1).min(MOST_AGAIN);
        state.patience = rand::random();
    }
}

/// Calls elections. openraft would too, but only after twice the lease.
pub(crate) async fn elections(raft: Engine, contacts: Arc<Contacts>, peers: Arc<Peers>) {
    let mut metrics = raft.server_metrics();
    let mut stood = false;
    loop {
        let stands = {
            let now = metrics.borrow_watched();
            let voters = now.membership_config.voter_ids().collect::<Vec<_>>();
            now.state != ServerState::Leader && voters.len() > 1 && voters.contains(&now.id)
        };
        if !stands {
            stood = false;
            if metrics.changed().await.is_err() {
                return;
            }
            continue;
        }
        if !stood {
            // Whoever took leadership from this member will be heard.
            stood = true;
            contacts.begin();
        }
        let deadline = contacts.deadline();
        if Instant::now() < deadline {
            tokio::select! {
                () = tokio::time::sleep_until(deadline.into()) => {}
                () = contacts.changed.notified() => {}
            }
            continue;
        }
        contacts.called();
        if !peers.muted.load(Ordering::Relaxed) {
            tracing::debug!("no leader was heard; calling an election");
            if raft.trigger().elect(true).await.is_err() {
                return;
            }
        }
    }
}

/// What is told about leadership.
pub(crate) struct Watches {
    /// This member leads, with a majority behind it, and has applied everything that was acknowledged before.
    pub leads: watch::Sender<bool>,
    pub leader: watch::Sender<Leader>,
    pub leader_id: watch::Sender<Option<u64>>,
    /// It has a vote by a membership that is committed.
    pub voter: watch::Sender<bool>,
    /// True while this member leads and is the only voter: then everything acknowledged anywhere is applied here.
    pub sole: Arc<AtomicBool>,
    /// Why the member has stopped for good.
    pub stopped: watch::Sender<Option<String>>,
}

/// Follows openraft's metrics; ends when it has ended, and says why.
pub(crate) struct Follower {
    pub raft: Engine,
    pub store: Store,
    pub peers: Arc<Peers>,
    pub pending: Arc<Pending>,
    pub log: Log,
    pub watches: Watches,
}

/// What one look at the metrics found.
pub(crate) struct Seen {
    leading: bool,
    alone: bool,
    with_others: bool,
    term: u64,
}

impl Follower {
    pub async fn run(self) {
        let mut metrics = self.raft.server_metrics();
        let mut applied = self.pending.applied();
        let mut stalled_since = None;
        let mut beaten: Option<Instant> = None;
        loop {
            let seen = self.look();
            let acts = seen.leading && (seen.alone || self.has_majority(seen.term));
            let busy = seen.leading && seen.with_others;
            if busy || self.peers.muted.load(Ordering::Relaxed) {
                self.watch_disk(&mut stalled_since, seen.leading).await;
            }
            if busy && beaten.is_none_or(|at| at.elapsed() >= HEARTBEAT) {
                beaten = Some(Instant::now());
                if self.raft.trigger().heartbeat().await.is_err() {
                    break;
                }
            }
            if self.watches.leads.send_replace(acts) != acts && acts {
                self.store.renew_leases();
            }
            let muted = self.peers.muted.load(Ordering::Relaxed);
            let pause = if busy && !acts && !muted { LOOK_NEW } else { LOOK };
            tokio::select! {
                changed = metrics.changed() => if changed.is_err() { break },
                _ = applied.changed(), if busy && !acts => {}
                () = tokio::time::sleep(pause), if busy || muted => {}
            }
        }
        self.end();
    }

    pub fn look(&self) -> Seen {
        let metrics = self.raft.server_metrics();
        let now = metrics.borrow_watched();
        let membership = now.membership_config.membership();
        let leading = now.state == ServerState::Leader;
        let alone = membership.voter_ids().all(|id| id == now.id);
        let with_others = membership.nodes().any(|(id, _)| *id != now.id);
        let term = now.vote.leader_id.term;
        let id = now.current_leader.filter(|id| *id != now.id || leading);
        let leader = Leader { term, id };
        self.watches.leader.send_if_modified(|known| std::mem::replace(known, leader) != leader);
        self.watches.leader_id.send_if_modified(|known| std::mem::replace(known, id) != id);
        // Not before the change that gave the vote is through: until then the others may not do without it.
        let settled = now.committed_membership_config.membership();
        let voter = settled.get_joint_config().len() == 1 && settled.voter_ids().any(|id| id == now.id);
        self.watches.voter.send_if_modified(|known| std::mem::replace(known, voter) != voter);
        self.peers.update(membership, now.membership_config.log_id().map_or(0, |id| id.index));
        self.watches.sole.store(leading && alone, Ordering::Release);
        // A sole leader has nobody to send heartbeats to, and nobody who could take its place.
        self.raft.runtime_config().tick(!(leading && alone && !with_others));
        Seen { leading, alone, with_others, term }
    }

    /// As the leader of `term`: whether a majority was heard lately and the state is up to date.
    fn has_majority(&self, term: u64) -> bool {
        let metrics = self.raft.metrics();
        let acknowledged = metrics.borrow_watched().last_quorum_acked.as_ref().map(|at| at.elapsed());
        let applied = *self.pending.applied().borrow();
        acknowledged.is_some_and(|age| age < LEASE)
            && applied.is_some_and(|id| id.term == term)
            && !self.peers.muted.load(Ordering::Relaxed)
    }

    /// A leader whose disk doesn't answer hands over, and then falls silent: heartbeats must not hide a dead disk.
    async fn watch_disk(&self, stalled_since: &mut Option<Instant>, leading: bool) {
        let stalled = self.log.wal().stalled() > STALL;
        match (stalled, *stalled_since) {
            (true, None) if leading => {
                tracing::warn!("the disk of the log does not answer; giving leadership up");
                *stalled_since = Some(Instant::now());
                if let Some(to) = successor(&self.raft, &self.peers) {
                    // An error means that the engine has stopped, which shows by itself.
                    let _ = self.raft.trigger().transfer_leader(to).await;
                }
            }
            (true, Some(since)) if since.elapsed() > MUTE_AFTER => self.peers.muted.store(true, Ordering::Relaxed),
            (true, _) => {}
            (false, Some(since)) => {
                let seconds = since.elapsed().as_secs_f64();
                tracing::warn!(seconds, "the disk of the log answers again");
                *stalled_since = None;
                self.peers.muted.store(false, Ordering::Relaxed);
            }
            (false, None) => {}
        }
    }

    fn end(&self) {
        self.watches.sole.store(false, Ordering::Release);
        self.watches.leads.send_replace(false);
        self.watches.leader.send_modify(|leader| leader.id = None);
        self.watches.leader_id.send_replace(None);
        let reason = self.raft.metrics().borrow_watched().running_state.as_ref().err().map(ToString::to_string);
        let reason = reason.unwrap_or_else(|| "the consensus engine ended".to_owned());
        tracing::error!(reason, "this member has stopped");
        self.watches.stopped.send_replace(Some(reason));
    }
}

/// The voter that could take over from this leader with the least delay.
pub(crate) fn successor(raft: &Engine, peers: &Peers) -> Option<u64> {
    let metrics = raft.metrics();
    let now = metrics.borrow_watched();
    let replication = now.replication.as_ref()?;
    let voters = now.membership_config.voter_ids().filter(|id| *id != now.id && peers.is_reachable(*id));
    voters.max_by_key(|id| replication.get(id).copied().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_shortens_the_wait_and_a_word_restarts_it() {
        let contacts = Contacts::new();
        contacts.connected(3);
        contacts.connected(3);
        contacts.heard_from_leader(3, 7);
        let calm = contacts.deadline();
        contacts.disconnected(3);
        assert_eq!(contacts.deadline(), calm, "one connection is left");
        contacts.disconnected(3);
        assert!(contacts.deadline() < calm);
        assert!(contacts.deadline() >= contacts.state.lock().heard + LEASE, "the lease is always waited out");
        contacts.heard_from_leader(3, 7);
        assert!(contacts.deadline() >= calm);
        assert!(contacts.has_leader_besides(9) && !contacts.has_leader_besides(3));
        contacts.heard_from_leader(9, 6);
        assert_eq!(contacts.state.lock().leader, Some(3), "an old leader is none");
    }
}
