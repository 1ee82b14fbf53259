//! [`Node`]: one member of the cluster, ready to take commands.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_store::{Command, Response, Store, Txn, TxnResponse};
use openraft::async_runtime::WatchReceiver;
use openraft::errors::{LinearizableReadError, RaftError};
use openraft::{Config, ReadPolicy, ServerState, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use crate::entry::{Peer, TypeConfig};
use crate::files;
use crate::log::{Growth, Log};
use crate::machine::{ApplyThread, Snapshots, StateMachine};
use crate::member::{self, Member};
use crate::propose::{ProposeError, Proposer};
use crate::snapshot::{self, SnapshotError};
use crate::transport::Alone;
use crate::upkeep;
use crate::view::{self, Backend, View, ViewError};
use crate::wal::{SyncFile, Wal, WalError, WalOptions};

/// openraft over our log, state and network.
pub(crate) type Engine = openraft::Raft<TypeConfig, StateMachine>;

/// Segments of the log on ordinary disks, and on those below [`SMALL_DISK`], in bytes.
const SEGMENT: u64 = 64 << 20;
const SMALL_SEGMENT: u64 = 8 << 20;
const SMALL_DISK: u64 = 16 << 30;
/// The next segment of the log is not prepared earlier than this after the start.
const QUIET_START: Duration = Duration::from_secs(5);
/// Between two attempts to lead at the start: an election of one takes a sync or two.
const ELECTION_PAUSE: Duration = Duration::from_millis(5);

/// How to start a [`Node`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of everything durable; made with mode 0700.
    pub data_dir: PathBuf,
    /// Where the state lives.
    pub backend: Backend,
    /// `host:port` at which peers reach this member.
    pub address: String,
    /// Bytes of a log segment; None chooses by the size of the disk.
    pub segment_size: Option<u64>,
    /// Bytes of log after which a snapshot is written (more when the state itself is larger).
    pub snapshot_distance: u64,
    /// How often history is compacted; as much of it is kept.
    pub compaction_interval: Duration,
    /// The kernel's id of this boot, by which a state left by a killed process is told from one left by a power cut;
    /// None asks the kernel. For tests of power cuts.
    pub boot_id: Option<String>,
}

impl Options {
    /// sled with a page cache of 32 MiB, history of five minutes.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Options {
            data_dir: data_dir.into(),
            backend: Backend::Sled { cache_capacity: 32 << 20 },
            address: String::new(),
            segment_size: None,
            snapshot_distance: 32 << 20,
            compaction_interval: Duration::from_secs(300),
            boot_id: None,
        }
    }
}

/// A node couldn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory can't be used.
    #[error("{action} in the data directory {}", path.display())]
    DataDir {
        /// What was being done.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another process works in it.
    #[error("the data directory {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The log can't be read.
    #[error("opening the log")]
    Wal(#[from] WalError),
    /// The snapshot can't be read.
    #[error("opening the snapshot")]
    Snapshot(#[from] SnapshotError),
    /// The state can't be opened or rebuilt.
    #[error("opening the state")]
    View(#[from] ViewError),
    /// The data belongs to a cluster of several members.
    #[error("the cluster in {} has {members} members; this version runs clusters of one", path.display())]
    HasPeers {
        /// The data directory.
        path: PathBuf,
        /// Voters and learners.
        members: usize,
    },
    /// The consensus engine stopped.
    #[error("starting consensus: {0}")]
    Engine(String),
}

/// One member of the cluster. Clones share it.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    raft: Engine,
    store: Store,
    proposer: Proposer,
    leader: watch::Receiver<bool>,
    stopped: watch::Receiver<Option<String>>,
    /// True while this member leads and is the only voter: then everything acknowledged anywhere is applied here.
    sole: Arc<AtomicBool>,
    lease_granted: Arc<Notify>,
    apply: Arc<ApplyThread>,
    view: View,
    tasks: Mutex<JoinSet<()>>,
    _lock: File,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", self.inner.raft.node_id()).finish_non_exhaustive()
    }
}

/// What opening the data directory yields.
struct Opened {
    lock: File,
    member: Member,
    wal: Wal,
    snapshots: Snapshots,
    state: view::Opened,
}

impl Node {
    /// Starts this member: a new cluster in an empty directory, else where it left off. Returns once every entry of the
    /// log that may have been acknowledged is applied and this member leads.
    ///
    /// # Errors
    /// The data directory is unusable, in use or damaged; see [`StartError`].
    pub async fn start(options: Options) -> Result<Node, StartError> {
        Node::start_on(options, Arc::new(|file| file.sync_data())).await
    }

    /// As [`Node::start`], with the log made durable by `sync`.
    pub(crate) async fn start_on(options: Options, sync: SyncFile) -> Result<Node, StartError> {
        let opening = options.clone();
        let opened = tokio::task::spawn_blocking(move || open(&opening, sync)).await;
        let Opened { lock, member, wal, snapshots, state } =
            opened.map_err(|panic| StartError::Engine(panic.to_string()))??;
        let view::Opened { store, writer, applied, view } = state;
        let growth = snapshots.growth.clone();
        let log = Log::new(wal, growth.clone());
        let broken = view.clone();
        let apply = ApplyThread::start(writer, move || broken.distrust());
        let apply = Arc::new(apply.map_err(data_dir("starting a thread", &options.data_dir))?);
        let machine = StateMachine::new(apply.clone(), Arc::new(snapshots), applied);
        let config = Arc::new(config().map_err(|e| StartError::Engine(e.to_string()))?);
        let raft = Engine::new(member.id, config, Alone, log.clone(), machine).await.map_err(engine)?;
        let started = lead(&raft, &member, &options).await;
        if let Err(error) = started {
            // The first error is the one to report.
            let _ = raft.shutdown().await;
            return Err(error);
        }
        let node = Node::assemble(raft, store, apply, view, lock, &options);
        let mut tasks = node.inner.tasks.lock();
        tasks.spawn(async move {
            tokio::time::sleep(QUIET_START).await;
            log.wal().allow_spares();
        });
        tasks.spawn(upkeep::snapshots(node.inner.raft.clone(), growth));
        drop(tasks);
        Ok(node)
    }

    fn assemble(
        raft: Engine,
        store: Store,
        apply: Arc<ApplyThread>,
        view: View,
        lock: File,
        options: &Options,
    ) -> Node {
        let mut tasks = JoinSet::new();
        let (proposer, gather) = Proposer::new(raft.clone());
        tasks.spawn(gather);
        let sole = Arc::new(AtomicBool::new(true));
        let (leads, leader) = watch::channel(true);
        let (stops, stopped) = watch::channel(None);
        tasks.spawn(watch_leadership(raft.clone(), store.clone(), leads, sole.clone(), stops));
        let lease_granted = Arc::new(Notify::new());
        let (s, p, l) = (store.clone(), proposer.clone(), leader.clone());
        tasks.spawn(upkeep::expire_leases(s, p, l, lease_granted.clone()));
        let (s, p, l) = (store.clone(), proposer.clone(), leader.clone());
        tasks.spawn(upkeep::compact(s, p, l, options.compaction_interval));
        let tasks = Mutex::new(tasks);
        let inner =
            Inner { raft, store, proposer, leader, stopped, sole, lease_granted, apply, view, tasks, _lock: lock };
        Node { inner: Arc::new(inner) }
    }

    /// This member's id.
    pub fn id(&self) -> u64 {
        *self.inner.raft.node_id()
    }

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
        let grants = matches!(command, Command::LeaseGrant { .. });
        let answer = self.inner.proposer.propose(&command).await;
        if grants {
            self.inner.lease_granted.notify_one();
        }
        match answer {
            Err(ProposeError::OutcomeUnknown) if self.stop_reason().is_some() => Err(self.stop_error()),
            other => other,
        }
    }

    /// Returns a revision such that a read at it (or later) is linearizable: it sees every write that was acknowledged
    /// before this call. Free of charge for a sole member; otherwise a ReadIndex round, shared with concurrent calls.
    ///
    /// # Errors
    /// This member can't confirm that it leads, or has stopped.
    pub async fn read_barrier(&self) -> Result<u64, ProposeError> {
        if self.inner.sole.load(Ordering::Acquire) {
            return Ok(self.inner.store.revision());
        }
        match self.inner.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(_) => Ok(self.inner.store.revision()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(to))) => {
                Err(ProposeError::NotLeader { leader: to.leader_node.map(|peer| peer.address) })
            }
            Err(RaftError::APIError(_)) => Err(ProposeError::NotLeader { leader: None }),
            Err(RaftError::Fatal(fatal)) => Err(ProposeError::Stopped { reason: fatal.to_string() }),
        }
    }

    /// Whether this member leads.
    pub fn is_leader(&self) -> bool {
        *self.inner.leader.borrow()
    }

    /// Whether this member leads, and its changes.
    pub fn leadership(&self) -> watch::Receiver<bool> {
        self.inner.leader.clone()
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

    /// Stops this member: what is acknowledged is durable, and the next start is quick. Other clones then get errors.
    pub async fn shutdown(self) {
        self.inner.tasks.lock().abort_all();
        if let Err(error) = self.inner.raft.shutdown().await {
            tracing::warn!(%error, "the consensus engine did not end well");
        }
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
    }
}

fn data_dir(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StartError {
    let path = path.to_path_buf();
    move |source| StartError::DataDir { action, path, source }
}

fn engine(error: impl std::fmt::Display) -> StartError {
    StartError::Engine(error.to_string())
}

/// Opens everything on disk. Blocks.
fn open(options: &Options, sync: SyncFile) -> Result<Opened, StartError> {
    let dir = &options.data_dir;
    files::create_dir(dir).map_err(data_dir("creating", dir))?;
    let lock = member::lock(dir).map_err(data_dir("locking", dir))?;
    let lock = lock.ok_or_else(|| StartError::InUse(dir.clone()))?;
    let member = Member::load(dir).map_err(data_dir("reading the member's identity", dir))?;
    let segment_size = match options.segment_size {
        Some(size) => size,
        None => segment_size(dir).map_err(data_dir("measuring the disk", dir))?,
    };
    let wal = Wal::open(&dir.join("wal"), WalOptions { segment_size, sync })?;
    let snapshot_dir = dir.join("snapshot");
    let snapshot = snapshot::newest(&snapshot_dir)?;
    let boot_id = options.boot_id.clone().unwrap_or_else(view::boot_id);
    let state = view::open(dir, &options.backend, boot_id, snapshot.as_ref(), &wal)?;
    let growth = Arc::new(Growth::default());
    let snapshots = Snapshots::new(snapshot_dir, options.snapshot_distance, snapshot, growth);
    let (bytes, entries) = wal.size_after(snapshots.covered());
    snapshots.growth.add(bytes, entries);
    Ok(Opened { lock, member, wal, snapshots, state })
}

fn segment_size(dir: &Path) -> io::Result<u64> {
    let disk = nix::sys::statvfs::statvfs(dir)?;
    let size = disk.blocks() as u64 * disk.fragment_size() as u64;
    Ok(if size < SMALL_DISK { SMALL_SEGMENT } else { SEGMENT })
}

/// A lost leader is replaced in under two seconds; ticks come every 60 ms. Snapshots are triggered by
/// [`upkeep::snapshots`]; no entry need stay behind them, there is no member that could lag.
fn config() -> Result<Config, openraft::ConfigError> {
    Config {
        cluster_name: "coracle".to_owned(),
        heartbeat_interval: 300,
        election_timeout_min: 900,
        election_timeout_max: 1500,
        install_snapshot_timeout: 60_000,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 0,
        enable_pre_vote: Some(true),
        // Proposals come gathered: a deep queue would only cost memory.
        api_batch_capacity: 64,
        ..Config::default()
    }
    .validate()
}

/// Makes this member the leader of its cluster of one, and waits until everything in its log is applied.
async fn lead(raft: &Engine, member: &Member, options: &Options) -> Result<(), StartError> {
    if !raft.is_initialized().await.map_err(engine)? {
        let me = Peer { address: options.address.clone() };
        raft.initialize(BTreeMap::from([(member.id, me)])).await.map_err(engine)?;
    }
    let count = |state: &openraft::RaftState<TypeConfig>| state.membership_state.effective().nodes().count();
    let members = raft.with_raft_state(count).await.map_err(engine)?;
    if members != 1 {
        return Err(StartError::HasPeers { path: options.data_dir.clone(), members });
    }
    // A member that led when it ended leads again at once. An entry of this run: once it is applied, so is everything
    // before it.
    loop {
        match raft.write_blank().await {
            Ok(_) => return Ok(()),
            Err(RaftError::Fatal(fatal)) => return Err(engine(fatal)),
            Err(RaftError::APIError(not_leader)) => tracing::debug!(%not_leader, "asking for an election"),
        }
        raft.trigger().elect(false).await.map_err(engine)?;
        tokio::time::sleep(ELECTION_PAUSE).await;
    }
}

/// Follows openraft's metrics; ends when it has ended, and says why.
async fn watch_leadership(
    raft: Engine,
    store: Store,
    leads: watch::Sender<bool>,
    sole: Arc<AtomicBool>,
    stops: watch::Sender<Option<String>>,
) {
    let mut metrics = raft.server_metrics();
    loop {
        let (leading, alone) = {
            let now = metrics.borrow_watched();
            let alone = now.membership_config.voter_ids().all(|id| id == now.id);
            (now.state == ServerState::Leader, alone)
        };
        sole.store(leading && alone, Ordering::Release);
        // A sole leader has nobody to send heartbeats to, and nobody who could take its place.
        raft.runtime_config().tick(!(leading && alone));
        if leads.send_replace(leading) != leading && leading {
            store.renew_leases();
        }
        if metrics.changed().await.is_err() {
            break;
        }
    }
    sole.store(false, Ordering::Release);
    leads.send_replace(false);
    let reason = raft.metrics().borrow_watched().running_state.as_ref().err().map(ToString::to_string);
    let reason = reason.unwrap_or_else(|| "the consensus engine ended".to_owned());
    tracing::error!(reason, "this member has stopped");
    stops.send_replace(Some(reason));
}
