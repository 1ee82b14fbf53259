//! What is done to a data directory while no process works in it: restore a snapshot, make one survivor a cluster again,
//! forget everything but who one is.
//!
//! Each makes a new incarnation of the cluster, or leaves the old one (see [`crate::member`]). A marker file lies in the
//! directory while one is under way: a member doesn't start on what a power cut left half done.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use coracle_store::SnapshotMeta;
use openraft::EntryPayload;

use crate::applied::Applied;
use crate::entry::{Membership, StoredMembership, from_wal, to_raft_id, to_wal};
use crate::files;
use crate::member::{self, Member};
use crate::membership::Contact;
use crate::node::start::snapshot_dir;
use crate::snapshot::{self, Reader, SnapshotError};
use crate::view;
use crate::wal::{self, LogId, Vote, Wal, WalError, WalOptions};

const MARKER: &str = "unfinished";
const RESTORED: &str = "restored.tmp";
/// How far the revision jumps at a restore: more than any cluster writes between a snapshot and its end, so that no
/// revision ever stands for two states.
const JUMP: u64 = 1_000_000_000;

/// Nothing was done, or it must be done again.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// A process works in the directory.
    #[error("the data directory {} is in use: stop the server first", .0.display())]
    InUse(PathBuf),
    /// There is nothing in it.
    #[error("the data directory {} holds no data of a cluster", .0.display())]
    NoData(PathBuf),
    /// The member has no vote, so it may lack what was acknowledged.
    #[error(
        "this member was a learner or had been removed: it may lack writes that were acknowledged. Reset a member that \
         had a vote, or restore a snapshot"
    )]
    NoVote,
    /// It is a cluster of one already.
    #[error("this member is a cluster of its own already; there is nothing to reset")]
    Alone,
    /// The snapshot file is not what was written.
    #[error("the snapshot {} can't be restored: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The operating system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The member's own snapshot can't be read.
    #[error("reading the snapshot")]
    Snapshot(#[from] SnapshotError),
    /// The log can't be read or written.
    #[error("reading the log")]
    Wal(#[from] WalError),
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OfflineError {
    let path = path.to_path_buf();
    move |source| OfflineError::Io { action, path, source }
}

/// What [`restore`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The member, which is a cluster of its own now.
    pub id: u64,
    /// The revision that the cluster goes on from.
    pub revision: u64,
    /// Keys.
    pub keys: u64,
}

/// Replaces everything in a data directory by a snapshot, as a new cluster of this one member (whose identity stays).
/// The revision jumps far ahead and all history is gone: every watch has to start over. The other members of the old
/// cluster have to [`forget`] what they have.
///
/// # Errors
/// The directory is in use, or the file isn't a whole snapshot; then nothing was done. If the disk fails half-way the
/// member doesn't start until it is done again.
pub fn restore(data_dir: &Path, snapshot_file: &Path) -> Result<Restored, OfflineError> {
    let damaged = |error: SnapshotError| match error {
        SnapshotError::Damaged { path, what } => OfflineError::Damaged { path, what: what.to_owned() },
        other => OfflineError::Snapshot(other),
    };
    let mut keys = 0;
    let checked = Reader::open(snapshot_file).map_err(damaged)?;
    for row in checked {
        row.map_err(damaged)?;
        keys += 1;
    }
    files::create_dir(data_dir).map_err(io_error("creating", data_dir))?;
    let _lock = lock(data_dir)?;
    let mut member = Member::load(data_dir).map_err(io_error("reading the identity in", data_dir))?;
    let reader = Reader::open(snapshot_file).map_err(damaged)?;
    member.reincarnate(reader.file.applied.cluster);
    let known = reader.file.applied.membership.membership().get_node(&member.id).cloned();
    let position = LogId { term: 1, index: 1 };
    let applied = Applied {
        last: Some(position),
        membership: StoredMembership::new(Some(to_raft_id(position)), alone(member.id, known.unwrap_or_default())?),
        cluster: member.cluster,
    };
    let revision = reader.meta.revision + JUMP;
    let meta = SnapshotMeta { revision, leases: reader.meta.leases.clone(), meta: applied.encode() };
    let restored = data_dir.join(RESTORED);
    snapshot::write_rows(&restored, &meta, applied, reader)?;
    let unfinished = begin(data_dir, "a restore")?;
    wipe(data_dir)?;
    let dir = snapshot_dir(data_dir);
    files::create_dir(&dir).map_err(io_error("creating", &dir))?;
    snapshot::adopt(&dir, &restored)?;
    // A member of a cluster has a log, be it empty.
    open_log(data_dir)?;
    member.save(data_dir).map_err(io_error("writing the identity in", data_dir))?;
    remove(&restored)?;
    end(data_dir, &unfinished)?;
    Ok(Restored { id: member.id, revision, keys })
}

/// Makes the member of a data directory a cluster of its own, with everything in its log, whether the others had
/// confirmed it or not. For the case that a majority of the members is gone for good.
///
/// # Errors
/// The directory is in use or empty, or the member had no vote, or is alone already.
pub fn reset(data_dir: &Path) -> Result<u64, OfflineError> {
    if !data_dir.join("wal").is_dir() {
        return Err(OfflineError::NoData(data_dir.to_path_buf()));
    }
    let _lock = lock(data_dir)?;
    let mut member = Member::load(data_dir).map_err(io_error("reading the identity in", data_dir))?;
    let snapshot = snapshot::newest(&snapshot_dir(data_dir))?;
    if member.cluster.is_some() {
        wal::must_exist(&data_dir.join("wal"))?;
    }
    let wal = open_log(data_dir)?;
    let wrong = || io_error("reading or writing the log in", data_dir);
    let membership = last_membership(&wal).map_err(wrong())?;
    let stored = snapshot.as_ref().map(|file| file.applied.membership.membership().clone());
    let membership = membership.or(stored).ok_or_else(|| OfflineError::NoData(data_dir.to_path_buf()))?;
    if !membership.voter_ids().any(|id| id == member.id) {
        return Err(OfflineError::NoVote);
    }
    if membership.nodes().count() == 1 {
        return Err(OfflineError::Alone);
    }
    let unfinished = begin(data_dir, "a reset")?;
    let contact = membership.get_node(&member.id).cloned().unwrap_or_default();
    let last = wal.last().or(snapshot.and_then(|file| file.applied.last));
    let term = last.map_or(0, |last| last.term).max(wal.vote().map_or(0, |vote| vote.term)) + 1;
    let id = LogId { term, index: last.map_or(0, |last| last.index + 1) };
    let entry =
        openraft::Entry { log_id: to_raft_id(id), payload: EntryPayload::Membership(alone(member.id, contact)?) };
    let vote = Vote { term, member: member.id, committed: false };
    wait(|done| wal.save_vote(vote, done)).map_err(wrong())?;
    wait(|done| {
        // An entry that doesn't fit drops `done`, which is an error to whoever waits.
        let _ = wal.append(vec![to_wal(&entry)], done);
    })
    .map_err(wrong())?;
    member.reincarnate(None);
    member.save(data_dir).map_err(io_error("writing the identity in", data_dir))?;
    end(data_dir, &unfinished)?;
    Ok(member.id)
}

/// Removes everything from a data directory but the member's identity, so that it can join a cluster anew. Does nothing
/// where there is nothing.
///
/// # Errors
/// The directory is in use, or the disk failed; then it must be done again.
pub fn forget(data_dir: &Path) -> Result<(), OfflineError> {
    if !data_dir.is_dir() {
        return Ok(());
    }
    let _lock = lock(data_dir)?;
    let mut member = Member::load(data_dir).map_err(io_error("reading the identity in", data_dir))?;
    let unfinished = begin(data_dir, "forgetting the data of a former cluster")?;
    wipe(data_dir)?;
    // It must not be drawn back in by those who haven't forgotten yet.
    member.leave();
    member.save(data_dir).map_err(io_error("writing the identity in", data_dir))?;
    end(data_dir, &unfinished)
}

fn open_log(data_dir: &Path) -> Result<Wal, WalError> {
    let sync = std::sync::Arc::new(|file: &File| file.sync_data());
    Wal::open(&data_dir.join("wal"), WalOptions { segment_size: 8 << 20, sync })
}

/// What was left half done in a data directory, if anything.
pub(crate) fn unfinished(data_dir: &Path) -> Option<String> {
    fs::read_to_string(data_dir.join(MARKER)).ok()
}

fn lock(data_dir: &Path) -> Result<File, OfflineError> {
    let lock = member::lock(data_dir).map_err(io_error("locking", data_dir))?;
    lock.ok_or_else(|| OfflineError::InUse(data_dir.to_path_buf()))
}

fn begin(data_dir: &Path, what: &str) -> Result<PathBuf, OfflineError> {
    let path = data_dir.join(MARKER);
    files::write(&path, what.as_bytes()).map_err(io_error("writing", &path))?;
    Ok(path)
}

fn end(data_dir: &Path, unfinished: &Path) -> Result<(), OfflineError> {
    remove(unfinished)?;
    files::sync_dir(data_dir).map_err(io_error("syncing", data_dir))
}

fn remove(path: &Path) -> Result<(), OfflineError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Log, snapshots and state go.
fn wipe(data_dir: &Path) -> Result<(), OfflineError> {
    view::remove_all(data_dir).map_err(io_error("removing the state in", data_dir))?;
    for name in ["wal", "snapshot"] {
        let path = data_dir.join(name);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("removing", &path)(error)),
            _ => {}
        }
    }
    files::sync_dir(data_dir).map_err(io_error("syncing", data_dir))
}

fn alone(id: u64, contact: Contact) -> Result<Membership, OfflineError> {
    let membership = Membership::new(vec![BTreeSet::from([id])], BTreeMap::from([(id, contact)]));
    membership.map_err(|error| io_error("making a membership for", Path::new(""))(io::Error::other(error)))
}

/// The newest membership in the log.
fn last_membership(wal: &Wal) -> io::Result<Option<Membership>> {
    let (first, end) = wal.bounds();
    for index in (first..end).rev() {
        let Some((id, payload)) = wal.read(index)? else { continue };
        if let EntryPayload::Membership(membership) = from_wal(id, payload)?.payload {
            return Ok(Some(membership));
        }
    }
    Ok(None)
}

fn wait(request: impl FnOnce(crate::wal::Done)) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel();
    request(Box::new(move |result| drop(sender.send(result))));
    receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the log took no entry")))
}
