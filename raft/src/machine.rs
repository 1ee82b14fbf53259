//! The state machine: committed entries go to the apply thread, which owns the store's writer.
//!
//! The async side ([`StateMachine`]) is what openraft talks to; it gathers entries into batches. The thread applies each
//! batch with one atomic write that also holds the new position, answers the waiting clients, and uses idle moments to
//! remove compacted history.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::JoinHandle;

use bytes::Bytes;
use coracle_store::{Command, Pinned, StoreError, Writer};
use futures::{Stream, StreamExt};
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::applied::Applied;
use crate::entry::{Proposal, RaftLogId, SnapshotMeta, StoredMembership, TypeConfig, from_raft_id, to_raft_id};
use crate::log::Growth;
use crate::member::Identity;
use crate::pending::Pending;
use crate::snapshot::{self, Reader, SnapshotError, SnapshotFile};

/// Commands in one batch, about: more means fewer writes to the engine, fewer means answers sooner.
const BATCH: usize = 1024;
/// Events removed by one step of a compaction; a step takes well under a millisecond.
const COMPACT_STEP: usize = 128;

/// What the snapshot files and everyone who needs them share.
pub(crate) struct Snapshots {
    pub dir: PathBuf,
    pub current: Mutex<Option<SnapshotFile>>,
    pub growth: Arc<Growth>,
    /// Bytes of log from one snapshot to the next, at least.
    distance: u64,
}

impl Snapshots {
    pub fn new(dir: PathBuf, distance: u64, current: Option<SnapshotFile>, growth: Arc<Growth>) -> Self {
        let snapshots = Snapshots { dir, current: Mutex::new(None), growth, distance };
        snapshots.growth.set_limit(distance);
        if let Some(current) = current {
            snapshots.advance(current);
        }
        snapshots
    }

    /// Index of the last entry that the current snapshot covers.
    pub fn covered(&self) -> Option<u64> {
        self.current.lock().as_ref().and_then(|file| file.applied.last).map(|id| id.index)
    }

    /// A file was completed: it becomes the current one and takes the place of older ones. A build that began before a
    /// newer snapshot came from the leader may end after it; its file goes.
    fn advance(&self, file: SnapshotFile) {
        let newest = {
            let mut current = self.current.lock();
            if current.as_ref().is_none_or(|known| known.applied.last <= file.applied.last) {
                self.growth.set_limit(self.distance.max(file.live_bytes));
                *current = Some(file);
            }
            current.as_ref().map(|newest| newest.path.clone())
        };
        // Without the lock: the disk may take its time, and nothing as new as the current one goes.
        if let Some(newest) = newest
            && let Err(error) = snapshot::remove_before(&self.dir, &newest)
        {
            tracing::warn!(%error, "removing old snapshots failed");
        }
    }
}

enum Job {
    Apply { proposals: Vec<Proposal>, meta: Bytes, done: oneshot::Sender<io::Result<()>> },
    Pin(oneshot::Sender<Pinned>),
    Restore { path: PathBuf, done: oneshot::Sender<io::Result<()>> },
    Stop,
}

/// Handle to the apply thread.
pub(crate) struct ApplyThread {
    jobs: Sender<Job>,
    thread: Mutex<Option<JoinHandle<io::Result<()>>>>,
}

impl ApplyThread {
    /// Starts the thread. `broken` is called once if the engine fails: the state must not be used after a restart.
    pub fn start(
        writer: Writer,
        pending: Arc<Pending>,
        broken: impl FnOnce() + Send + 'static,
    ) -> io::Result<ApplyThread> {
        let (jobs, queue) = mpsc::channel();
        let thread = std::thread::Builder::new().name("coracle-apply".to_owned()).spawn(move || {
            let served = catch_unwind(AssertUnwindSafe(|| serve(writer, &pending, &queue)));
            let served = served.unwrap_or_else(|_| Err(io::Error::other("the engine panicked")));
            if let Err(error) = &served {
                tracing::error!(%error, "the state engine failed; the state is rebuilt at the next start");
                broken();
            }
            served
        })?;
        Ok(ApplyThread { jobs, thread: Mutex::new(Some(thread)) })
    }

    /// The state as it is now, held readable.
    pub async fn pin(&self) -> io::Result<Pinned> {
        self.ask(Job::Pin).await
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> io::Result<T> {
        let (sender, receiver) = oneshot::channel();
        let gone = || io::Error::other("the apply thread is gone");
        self.jobs.send(job(sender)).map_err(|_| gone())?;
        receiver.await.map_err(|_| gone())
    }

    /// Ends the thread after what is queued; the state is handed to the operating system. Blocks.
    pub fn stop(&self) -> io::Result<()> {
        // An error means that it ended already; joining says why.
        let _ = self.jobs.send(Job::Stop);
        match self.thread.lock().take() {
            Some(thread) => thread.join().unwrap_or_else(|_| Err(io::Error::other("the apply thread panicked"))),
            None => Ok(()),
        }
    }
}

fn serve(mut writer: Writer, pending: &Pending, jobs: &Receiver<Job>) -> io::Result<()> {
    // History may be left over from a compaction that the last run didn't finish.
    let mut compacting = true;
    loop {
        let job = match jobs.try_recv() {
            Ok(job) => job,
            Err(TryRecvError::Empty) if compacting => {
                compacting = writer.compact_step(COMPACT_STEP).map_err(io::Error::other)?;
                continue;
            }
            Err(TryRecvError::Empty) => match jobs.recv() {
                Ok(job) => job,
                Err(_) => return Ok(()),
            },
            Err(TryRecvError::Disconnected) => return Ok(()),
        };
        match job {
            Job::Apply { proposals, meta, done } => {
                let applied = apply(&mut writer, pending, &proposals, meta);
                let failed = applied.is_err();
                compacting |= matches!(applied, Ok(true));
                // Nobody waits when the node is being stopped.
                let _ = done.send(applied.map(|_| ()));
                if failed {
                    return Err(io::Error::other("a batch could not be applied"));
                }
                if compacting {
                    compacting = writer.compact_step(COMPACT_STEP).map_err(io::Error::other)?;
                }
            }
            Job::Pin(done) => {
                // The log before the snapshot will go: the state on disk must not stay behind it.
                writer.lower().map_err(io::Error::other)?;
                drop(done.send(writer.pin()));
            }
            Job::Restore { path, done } => drop(done.send(restore(&mut writer, &path))),
            Job::Stop => return writer.flush().map_err(io::Error::other),
        }
    }
}

/// Applies and answers; true when the history floor moved.
fn apply(writer: &mut Writer, pending: &Pending, proposals: &[Proposal], meta: Bytes) -> io::Result<bool> {
    let commands = proposals.iter().flat_map(Proposal::decoded);
    let commands = commands.collect::<Result<Vec<_>, _>>().map_err(io::Error::other)?;
    let compacted = commands.iter().any(|c| matches!(c, Command::Compact { .. } | Command::BumpRevision { .. }));
    let mut responses = writer.apply(commands, meta).map_err(io::Error::other)?.into_iter();
    for proposal in proposals {
        let mut own = responses.by_ref().take(proposal.commands.len());
        if let Some(ticket) = proposal.ticket {
            pending.answer(ticket, own.by_ref());
        }
        own.for_each(drop);
    }
    Ok(compacted)
}

/// Replaces the state by a snapshot.
pub(crate) fn restore(writer: &mut Writer, path: &Path) -> io::Result<()> {
    let reader = Reader::open(path).map_err(io::Error::other)?;
    writer.restore(reader.meta.clone(), reader).map_err(io::Error::other)
}

/// openraft's side of the state.
pub(crate) struct StateMachine {
    thread: Arc<ApplyThread>,
    snapshots: Arc<Snapshots>,
    pending: Arc<Pending>,
    identity: Arc<Identity>,
    applied: Applied,
}

impl StateMachine {
    pub fn new(
        thread: Arc<ApplyThread>,
        snapshots: Arc<Snapshots>,
        pending: Arc<Pending>,
        identity: Arc<Identity>,
        applied: Applied,
    ) -> Self {
        StateMachine { thread, snapshots, pending, identity, applied }
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> Result<(Option<RaftLogId>, StoredMembership), io::Error> {
        Ok((self.applied.last.map(to_raft_id), self.applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut ended = false;
        while !ended {
            let (mut proposals, mut responders, mut commands, mut any) = (Vec::new(), Vec::new(), 0, false);
            let mut applied = Applied { cluster: self.identity.cluster(), ..self.applied.clone() };
            while commands < BATCH {
                let Some(next) = entries.next().await else {
                    ended = true;
                    break;
                };
                let (entry, responder) = next?;
                any = true;
                applied.last = Some(from_raft_id(entry.log_id));
                match entry.payload {
                    EntryPayload::Blank => {}
                    EntryPayload::Normal(proposal) => {
                        commands += proposal.commands.len();
                        proposals.push(proposal);
                    }
                    EntryPayload::Membership(membership) => {
                        applied.membership = StoredMembership::new(Some(entry.log_id), membership);
                    }
                }
                responders.extend(responder);
            }
            if !any {
                break;
            }
            let meta = applied.encode();
            self.thread.ask(|done| Job::Apply { proposals, meta, done }).await??;
            self.applied = applied;
            self.pending.advance(self.applied.last);
            for responder in responders {
                responder.send(());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        // Pinned here, between two batches; an apply thread that is gone shows when the snapshot is built.
        let grown = self.snapshots.growth.now();
        let pinned = self.thread.ask(Job::Pin).await;
        SnapshotBuilder { pinned: Some(pinned), grown, snapshots: self.snapshots.clone() }
    }

    async fn install_snapshot(&mut self, _meta: &SnapshotMeta, snapshot: SnapshotFile) -> Result<(), io::Error> {
        let dir = self.snapshots.dir.clone();
        let file = if snapshot::is_kept(&dir, &snapshot.path) {
            snapshot
        } else {
            let adopt = move || snapshot::adopt(&dir, &snapshot.path);
            tokio::task::spawn_blocking(adopt).await.map_err(io::Error::other)?.map_err(io::Error::other)?
        };
        // It is durable, so it is the current one: whoever reads the state while it is replaced falls back on the file.
        self.snapshots.advance(file.clone());
        let path = file.path.clone();
        self.thread.ask(|done| Job::Restore { path, done }).await??;
        self.pending.forget_all();
        self.applied = file.applied.clone();
        self.pending.advance(self.applied.last);
        tracing::info!(file = %file.path.display(), bytes = file.live_bytes, "the state was replaced by a snapshot");
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.snapshots.current.lock().clone().map(to_raft))
    }
}

pub(crate) type Snapshot = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotFile>;

pub(crate) fn to_raft(file: SnapshotFile) -> Snapshot {
    let last_log_id = file.applied.last.map(to_raft_id);
    let meta = SnapshotMeta { last_log_id, last_membership: file.applied.membership.clone() };
    Snapshot { meta, snapshot: file }
}

/// Writes the state, as it was when this was made, to a file.
pub(crate) struct SnapshotBuilder {
    pinned: Option<io::Result<Pinned>>,
    /// How far the log had grown by then.
    grown: (u64, u64),
    snapshots: Arc<Snapshots>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotFile;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let pinned = self.pinned.take().ok_or_else(|| io::Error::other("the snapshot was built already"))??;
        let dir = self.snapshots.dir.clone();
        let write = move || snapshot::write(&dir, &pinned);
        let file = match tokio::task::spawn_blocking(write).await.map_err(io::Error::other)? {
            Ok(file) => {
                tracing::info!(file = %file.path.display(), bytes = file.live_bytes, "snapshot written");
                self.snapshots.advance(file.clone());
                file
            }
            // One of the leader's, which holds more, takes the state's place.
            Err(error @ SnapshotError::Store(StoreError::Restoring)) => {
                self.snapshots.current.lock().clone().ok_or_else(|| io::Error::other(error))?
            }
            Err(error) => return Err(io::Error::other(error)),
        };
        self.snapshots.growth.forget(self.grown);
        Ok(to_raft(file))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use coracle_store::{Options, Store};

    use super::*;

    #[test]
    fn a_build_that_ends_late_leaves_the_newer_snapshot_alone() {
        let dir = tempfile::tempdir().unwrap();
        let taken = |index| {
            let (_store, mut writer) = Store::open(Options::memory()).unwrap();
            let last = Some(crate::wal::LogId { term: 2, index });
            writer.apply(Vec::new(), Applied { last, ..Applied::default() }.encode()).unwrap();
            snapshot::write(dir.path(), &writer.pin()).unwrap()
        };
        let snapshots = Snapshots::new(dir.path().to_owned(), 1 << 20, None, Arc::default());
        let (own, from_leader) = (taken(29), taken(196));
        // The leader's has its name already, but is not the current one yet.
        snapshots.advance(own.clone());
        assert!(from_leader.path.exists());
        snapshots.advance(from_leader.clone());
        assert!(!own.path.exists());
        // Or it is.
        snapshots.advance(taken(29));
        assert_eq!(snapshots.covered(), Some(196));
        assert_eq!(snapshot::newest(dir.path()).unwrap().unwrap().path, from_leader.path);
        assert!(!own.path.exists());
    }

    #[tokio::test]
    async fn a_build_whose_state_is_replaced_yields_what_replaced_it() {
        let dir = tempfile::tempdir().unwrap();
        let position = |index| Applied { last: Some(crate::wal::LogId { term: 2, index }), ..Applied::default() };
        let (_other, mut leaders) = Store::open(Options::memory()).unwrap();
        leaders.apply(Vec::new(), position(196).encode()).unwrap();
        let from_leader = snapshot::write(dir.path(), &leaders.pin()).unwrap();
        let (_store, mut writer) = Store::open(Options::memory()).unwrap();
        writer.apply(Vec::new(), position(29).encode()).unwrap();
        let snapshots = Arc::new(Snapshots::new(dir.path().to_owned(), 1 << 20, None, Arc::default()));
        let pinned = Some(Ok(writer.pin()));
        snapshots.advance(from_leader.clone());
        restore(&mut writer, &from_leader.path).unwrap();
        let mut builder = SnapshotBuilder { pinned, grown: (0, 0), snapshots };
        let built = builder.build_snapshot().await.unwrap();
        assert_eq!(built.snapshot.path, from_leader.path);
    }

    #[tokio::test]
    async fn what_can_not_be_applied_ends_the_thread_and_the_trust_in_its_state() {
        let (_store, writer) = Store::open(Options::memory()).unwrap();
        let broken = Arc::new(AtomicBool::new(false));
        let thread = {
            let broken = broken.clone();
            ApplyThread::start(writer, Arc::new(Pending::new(1, None)), move || broken.store(true, Ordering::SeqCst))
                .unwrap()
        };
        let unknown = Bytes::from_static(&[2, 0, 0, 0, 77, 0]);
        let proposals = vec![Proposal { ticket: None, commands: Arc::new([unknown]) }];
        let job = |done| Job::Apply { proposals, meta: Bytes::new(), done };
        let error = thread.ask(job).await.unwrap().unwrap_err();
        assert!(error.to_string().contains("newer version"), "{error}");
        assert!(thread.ask(Job::Pin).await.is_err());
        assert!(thread.stop().is_err());
        assert!(broken.load(Ordering::SeqCst));
    }
}
