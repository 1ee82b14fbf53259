//! [`Node`]: one member of the cluster, ready to take commands.
//!
//! | file | what |
//! | --- | --- |
//! | [`options`] | how to start one |
//! | [`start`] | from a data directory to a running member |

mod options;
pub(crate) mod start;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_store::{Command, Response, Store, Txn, TxnResponse};
#[cfg(test)]
use openraft::async_runtime::WatchReceiver;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

pub use self::options::{Options, StartError};
use crate::entry::TypeConfig;
use crate::leadership::Leader;
use crate::machine::{ApplyThread, StateMachine};
use crate::member::Hold;
use crate::members::{Change, MemberState, Members, MembershipError, transfer};
use crate::membership::Peer;
use crate::peers::server::{Serving, serve};
use crate::peers::{Connection, Peers, Standing};
use crate::propose::{ProposeError, Proposer};
use crate::read::Reads;
use crate::snapshot::{self, SnapshotError};
use crate::view::View;

/// So long a stopped member waits for the log's thread.
const RELEASE: Duration = Duration::from_secs(2);

/// openraft over our log, state and network.
pub(crate) type Engine = openraft::Raft<TypeConfig, StateMachine>;

/// One member of the cluster. Clones share it.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

pub(crate) struct Inner {
    id: u64,
    raft: Engine,
    store: Store,
    proposer: Proposer,
    reads: Reads,
    peers: Arc<Peers>,
    members: Arc<Members>,
    serving: Arc<Serving>,
    leads: watch::Receiver<bool>,
    leader: watch::Receiver<Leader>,
    leader_id: watch::Receiver<Option<u64>>,
    voter: watch::Receiver<bool>,
    stopped: watch::Receiver<Option<String>>,
    sole: Arc<AtomicBool>,
    lease_granted: Arc<Notify>,
    apply: Arc<ApplyThread>,
    view: View,
    tasks: Mutex<JoinSet<()>>,
    /// Set when the node is being stopped: connections end.
    closing: watch::Sender<bool>,
    /// None once this member has stopped.
    hold: Mutex<Option<Arc<Hold>>>,
    released: watch::Receiver<()>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.inner.id).finish_non_exhaustive()
    }
}

/// What [`Node::save_snapshot`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The file.
    pub path: PathBuf,
    /// Its length in bytes.
    pub bytes: u64,
    /// Revision of the state in it.
    pub revision: u64,
    /// Index of the last log entry in it.
    pub index: u64,
}

impl Node {
    /// The state, for reading.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Runs a transaction; returns when it is committed and applied.
    ///
    /// # Errors
    /// [`ProposeError::Refused`] when the state refused it; see the others.
    pub async fn txn(&self, txn: Txn) -> Result<TxnResponse, ProposeError> {
        match self.propose(Command::Txn(txn)).await? {
            Response::Txn(response) => Ok(response),
            Response::Refused(refusal) => Err(refusal.into()),
            Response::Done { .. } => Err(ProposeError::OutcomeUnknown),
        }
    }

    /// Proposes a command; returns the state's answer when it is committed and applied. A refusal is an answer here.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(&self, command: Command) -> Result<Response, ProposeError> {
        if self.stop_reason().is_some() {
            return Err(self.stop_error());
        }
        let grants = matches!(command, Command::LeaseGrant { .. });
        let answer = self.inner.proposer.propose(&command).await;
        if grants {
            self.inner.lease_granted.notify_one();
        }
        match answer {
            Err(ProposeError::OutcomeUnknown | ProposeError::NotLeader { .. }) if self.stop_reason().is_some() => {
                Err(self.stop_error())
            }
            other => other,
        }
    }

    /// Returns a revision such that a read at it (or later) is linearizable: it sees every write that was acknowledged
    /// before this call. Free of charge for a sole member; otherwise one round with the leader and a majority, shared
    /// with concurrent calls. Works on every member.
    ///
    /// # Errors
    /// No leader could be confirmed in time, or this member has stopped.
    pub async fn read_barrier(&self) -> Result<u64, ProposeError> {
        if self.inner.sole.load(Ordering::Acquire) {
            return Ok(self.inner.store.revision());
        }
        if self.stop_reason().is_some() {
            return Err(self.stop_error());
        }
        match self.inner.reads.barrier().await {
            Err(ProposeError::Stopped { .. }) => Err(self.stop_error()),
            other => other,
        }
    }

    /// Who this member is.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// Whether this member leads.
    pub fn is_leader(&self) -> bool {
        *self.inner.leads.borrow()
    }

    /// Whether this member leads, and its changes: it has a majority behind it, its disk answers, and it has applied
    /// everything that was acknowledged before.
    pub fn leadership(&self) -> watch::Receiver<bool> {
        self.inner.leads.clone()
    }

    /// Who leads as far as this member knows, and its changes.
    pub fn leader(&self) -> watch::Receiver<Option<u64>> {
        self.inner.leader_id.clone()
    }

    /// Whether this member has a vote (not before it was added and has caught up), and its changes.
    pub fn voter(&self) -> watch::Receiver<bool> {
        self.inner.voter.clone()
    }

    /// What the other members think of this one, and its changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.inner.peers.standing()
    }

    /// The incarnation of the cluster that this member belongs to: a new one after each restore or reset. None before
    /// it was added.
    pub fn cluster(&self) -> Option<u64> {
        self.inner.peers.identity.cluster()
    }

    /// All members as this one knows them, ordered by name.
    pub fn members(&self) -> Vec<MemberState> {
        self.inner.members.states()
    }

    /// Adds a member, as a learner; the leader gives it a vote when it has caught up. A member of the same name or
    /// address that can't be reached is replaced: it lost its disk. Does nothing when it is a member already.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn add_member(&self, peer: Peer) -> Result<(), MembershipError> {
        self.inner.members.change(Change::Add(peer)).await
    }

    /// Removes a member.
    ///
    /// # Errors
    /// It is none, or too few would be left; see [`MembershipError`].
    pub async fn remove_member(&self, id: u64) -> Result<(), MembershipError> {
        self.inner.members.change(Change::Remove(id)).await
    }

    /// Says where a member is reached from now on. Members announce their own changes at start by themselves.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn set_address(&self, id: u64, address: String) -> Result<(), MembershipError> {
        let known = self.members().into_iter().find(|member| member.id == id);
        let name = known.ok_or(MembershipError::NotAMember { id })?.name;
        self.inner.members.change(Change::Contact(Peer { id, name, address })).await
    }

    /// Where a peer is reached, heard elsewhere; used until the membership says otherwise. For a start in which every
    /// member has a new address.
    pub fn learn_address(&self, id: u64, address: &str) {
        self.inner.peers.announce(id, address);
    }

    /// Hands leadership over, if this member leads and another can take it; returns when it is done, or after two
    /// seconds. True when this member doesn't lead then.
    pub async fn transfer_leadership(&self) -> bool {
        transfer(&self.inner.raft, &self.inner.peers, self.inner.leader.clone()).await
    }

    /// Serves one connection of a peer until it ends or this node stops. The caller has verified that the other end is
    /// this peer.
    pub async fn serve_peer(&self, stream: Box<dyn Connection>, peer: u64) {
        let mut closing = self.inner.closing.subscribe();
        let serving = self.inner.serving.clone();
        tokio::select! {
            () = serve(serving, stream, peer) => {}
            // An error means that the node is gone.
            _ = closing.wait_for(|closing| *closing) => {}
        }
    }

    /// Writes the state as it is now to a file that [`crate::restore`] takes: everything acknowledged before, if a leader
    /// can be asked; without one, what this member has.
    ///
    /// # Errors
    /// The member has stopped, or the file can't be written; what is there then is no snapshot.
    pub async fn save_snapshot(&self, path: impl Into<PathBuf>) -> Result<SnapshotInfo, SaveError> {
        let path: PathBuf = path.into();
        if let Err(error) = self.read_barrier().await {
            tracing::warn!(%error, "saving a snapshot that may lack the latest writes");
        }
        let pinned = self.inner.apply.pin().await.map_err(|_| SaveError::Stopped)?;
        let revision = pinned.meta().revision;
        let written = tokio::task::spawn_blocking(move || write_snapshot(&path, &pinned)).await;
        let (file, bytes) = written.map_err(|_| SaveError::Stopped)??;
        let index = file.applied.last.map_or(0, |id| id.index);
        Ok(SnapshotInfo { path: file.path, bytes, revision, index })
    }

    /// Returns why this member has stopped for good (a failed disk, say), as soon as it has.
    pub async fn stopped(&self) -> String {
        let mut stopped = self.inner.stopped.clone();
        match stopped.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "it was shut down".to_owned(),
        }
    }

    /// Index of the last entry of the log.
    #[cfg(test)]
    pub(crate) async fn log_end(&self) -> u64 {
        self.inner.raft.metrics().borrow_watched().last_log_index.unwrap_or(0)
    }

    /// The term that this member is in.
    #[cfg(test)]
    pub(crate) async fn term(&self) -> u64 {
        self.inner.raft.metrics().borrow_watched().current_term
    }

    /// Index of the first entry of the log.
    #[cfg(test)]
    pub(crate) async fn log_start(&self) -> u64 {
        self.inner.raft.metrics().borrow_watched().purged.map_or(0, |id| id.index + 1)
    }

    fn stop_reason(&self) -> Option<String> {
        self.inner.stopped.borrow().clone()
    }

    fn stop_error(&self) -> ProposeError {
        ProposeError::Stopped { reason: self.stop_reason().unwrap_or_else(|| "it was shut down".to_owned()) }
    }

    /// Writes a snapshot of the state now and forgets the log before it.
    ///
    /// # Errors
    /// The member has stopped.
    pub async fn trigger_snapshot(&self) -> Result<(), ProposeError> {
        let stopped = |fatal: openraft::errors::Fatal<TypeConfig>| ProposeError::Stopped { reason: fatal.to_string() };
        self.inner.raft.trigger().snapshot().await.map_err(stopped)
    }

    /// Stops this member: leadership is handed over first, what is acknowledged is durable, and the next start is quick.
    /// Other clones then get errors.
    pub async fn shutdown(self) {
        self.transfer_leadership().await;
        // From here on this member must not pass for a leader: peers that it no longer answers would wait for it.
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "the consensus engine did not end well");
        }
        self.inner.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.inner.tasks.lock());
        tasks.shutdown().await;
        self.inner.peers.close().await;
        let (apply, view) = (self.inner.apply.clone(), self.inner.view.clone());
        let close = move || match apply.stop() {
            Ok(()) => view.close_cleanly().map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match tokio::task::spawn_blocking(close).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(error, "the state was not closed cleanly; the next start rebuilds it"),
            Err(error) => tracing::warn!(%error, "the state was not closed cleanly; the next start rebuilds it"),
        }
        self.release().await;
    }

    /// Waits until the data directory is free: the engine's last tasks and the log's thread may end a moment later. On a
    /// disk that doesn't answer they don't.
    async fn release(&self) {
        self.inner.hold.lock().take();
        let mut released = self.inner.released.clone();
        if tokio::time::timeout(RELEASE, released.changed()).await.is_err() {
            tracing::warn!("the log is still being written; the data directory stays locked until the process ends");
        }
    }
}

#[cfg(test)]
impl Node {
    /// Ends this member as if its process were killed: nothing is handed over, nothing closed.
    pub(crate) async fn kill(self) {
        self.inner.closing.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.inner.tasks.lock());
        tasks.shutdown().await;
        let _ = self.inner.raft.shutdown().await;
        self.inner.peers.close().await;
        let apply = self.inner.apply.clone();
        let _ = tokio::task::spawn_blocking(move || apply.stop()).await;
        self.release().await;
    }
}

fn write_snapshot(path: &Path, pinned: &coracle_store::Pinned) -> Result<(snapshot::SnapshotFile, u64), SnapshotError> {
    let file = snapshot::write_file(path, pinned)?;
    let bytes = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    Ok((file, bytes))
}

/// A snapshot was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The member has stopped.
    #[error("this member has stopped")]
    Stopped,
    /// The file can't be written.
    #[error("saving the snapshot")]
    Snapshot(#[from] SnapshotError),
}
