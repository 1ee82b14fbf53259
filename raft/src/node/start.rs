//! From a data directory to a running member.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::errors::RaftError;
use openraft::{Config, ServerState, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

use super::{Engine, Inner, Node, Options, StartError};
use crate::entry::TypeConfig;
use crate::files;
use crate::forward::Forwards;
use crate::leadership::{Contacts, Follower, LEASE, Leader, Watches, elections};
use crate::log::{Growth, Log};
use crate::machine::{ApplyThread, Snapshots, StateMachine};
use crate::member::{self, Hold, Identity, Member};
use crate::members::{Change, Members};
use crate::membership::Contact;
use crate::offline;
use crate::peers::Peers;
use crate::peers::client::Factory;
use crate::peers::server::Serving;
use crate::pending::Pending;
use crate::propose::{Carrier, Proposer};
use crate::read::{Reads, Rounds};
use crate::snapshot;
use crate::upkeep;
use crate::view;
use crate::wal::{self, SyncFile, Wal, WalOptions};

/// Segments of the log on ordinary disks, and on those below [`SMALL_DISK`], in bytes.
const SEGMENT: u64 = 64 << 20;
const SMALL_SEGMENT: u64 = 8 << 20;
const SMALL_DISK: u64 = 16 << 30;
/// The next segment of the log is not prepared earlier than this after the start.
const QUIET_START: Duration = Duration::from_secs(5);
/// An election of one takes a sync or two.
const ELECTION_PATIENCE: Duration = Duration::from_secs(1);
/// Between two attempts to tell the others of a new address.
const ANNOUNCE_PAUSE: Duration = Duration::from_secs(2);

/// What opening the data directory yields.
struct Opened {
    lock: File,
    identity: Identity,
    wal: Wal,
    snapshots: Snapshots,
    state: view::Opened,
}

impl Node {
    /// Starts this member: a new cluster in an empty directory (or, with [`Options::join`], one that waits to be added),
    /// else where it left off.
    ///
    /// The only member of a cluster returns once every entry of the log that may have been acknowledged is applied and
    /// it leads. One of several returns when its own state is open; whether it is up to date is what
    /// [`Node::read_barrier`] tells.
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
        let Opened { lock, identity, wal, snapshots, state } =
            opened.map_err(|panic| StartError::Engine(panic.to_string()))??;
        let view::Opened { store, writer, applied, view } = state;
        let identity = Arc::new(identity);
        let pending = Arc::new(Pending::new(identity.id, applied.last));
        let growth = snapshots.growth.clone();
        let snapshots = Arc::new(snapshots);
        let (hold, released) = Hold::new(lock);
        let log = Log::new(wal, growth, Some(hold.clone()));
        let broken = view.clone();
        let apply = ApplyThread::start(writer, pending.clone(), move || broken.distrust());
        let apply = Arc::new(apply.map_err(data_dir("starting a thread", &options.data_dir))?);
        let machine = StateMachine::new(apply.clone(), snapshots.clone(), pending.clone(), identity.clone(), applied);
        let own = Contact { name: options.name.clone(), address: options.address.clone() };
        let peers = Arc::new(Peers::new(identity.clone(), own, options.dial.clone()));
        let config = Arc::new(config().map_err(engine)?);
        let factory = Factory { peers: peers.clone() };
        let raft = Engine::new(identity.id, config, factory, log.clone(), machine).await.map_err(engine)?;
        let started = begin(&raft, &peers, &options).await;
        if let Err(error) = started {
            // The first error is the one to report.
            let _ = raft.shutdown().await;
            return Err(error);
        }
        let parts = Parts { raft, store, peers, pending, log, snapshots, apply, view, hold, released };
        Ok(Node::assemble(parts, &options))
    }

    fn assemble(parts: Parts, options: &Options) -> Node {
        let Parts { raft, store, peers, pending, log, snapshots, apply, view, hold, released } = parts;
        let alone = is_sole_voter(&raft);
        let sole = Arc::new(AtomicBool::new(alone));
        let (leads, leads_watch) = watch::channel(alone);
        let first = Leader { term: 0, id: None };
        let (leader, leader_watch) = watch::channel(first);
        let (leader_id, leader_id_watch) = watch::channel(None);
        let (voter, voter_watch) = watch::channel(alone);
        let (stops, stopped) = watch::channel(None);
        let contacts = Arc::new(Contacts::new());
        let members = Arc::new(Members::new(raft.clone(), peers.clone(), leader_watch.clone()));
        let mut tasks = JoinSet::new();

        let watches = Watches { leads, leader, leader_id, voter, sole: sole.clone(), stopped: stops };
        let follower = Follower {
            raft: raft.clone(),
            store: store.clone(),
            peers: peers.clone(),
            pending: pending.clone(),
            log: log.clone(),
            watches,
        };
        follower.look();
        tasks.spawn(follower.run());
        tasks.spawn(elections(raft.clone(), contacts.clone(), peers.clone()));
        tasks.spawn(peers.clone().keep_in_touch());
        tasks.spawn(members.clone().promote());
        tasks.spawn(announce(raft.clone(), peers.clone(), members.clone()));

        let carrier = Carrier {
            raft: raft.clone(),
            peers: peers.clone(),
            pending: pending.clone(),
            leader: leader_watch.clone(),
            sole: sole.clone(),
        };
        let (proposer, gather) = Proposer::new(carrier);
        tasks.spawn(gather);
        let rounds = Rounds {
            raft: raft.clone(),
            peers: peers.clone(),
            pending,
            store: store.clone(),
            leader: leader_watch.clone(),
        };
        let (reads, read) = Reads::new(rounds);
        tasks.spawn(read);

        let lease_granted = Arc::new(Notify::new());
        let (s, p, l) = (store.clone(), proposer.clone(), leads_watch.clone());
        tasks.spawn(upkeep::expire_leases(s, p, l, lease_granted.clone()));
        let (s, p, l) = (store.clone(), proposer.clone(), leads_watch.clone());
        tasks.spawn(upkeep::compact(s, p, l, options.compaction_interval));
        tasks.spawn(upkeep::snapshots(raft.clone(), log.clone(), snapshots.clone(), options.log_kept));
        tasks.spawn(async move {
            tokio::time::sleep(QUIET_START).await;
            log.wal().allow_spares();
        });

        let serving = Serving {
            raft: raft.clone(),
            peers: peers.clone(),
            forwards: Forwards::default(),
            contacts,
            members: members.clone(),
            snapshot_dir: snapshots.dir.clone(),
        };
        let inner = Inner {
            id: peers.identity.id,
            raft,
            store,
            proposer,
            reads,
            peers,
            members,
            serving: Arc::new(serving),
            leads: leads_watch,
            leader: leader_watch,
            leader_id: leader_id_watch,
            voter: voter_watch,
            stopped,
            sole,
            lease_granted,
            apply,
            view,
            tasks: Mutex::new(tasks),
            closing: watch::Sender::new(false),
            hold: Mutex::new(Some(hold)),
            released,
        };
        Node { inner: Arc::new(inner) }
    }
}

/// What a running node is made of.
struct Parts {
    raft: Engine,
    store: coracle_store::Store,
    peers: Arc<Peers>,
    pending: Arc<Pending>,
    log: Log,
    snapshots: Arc<Snapshots>,
    apply: Arc<ApplyThread>,
    view: view::View,
    hold: Arc<Hold>,
    released: watch::Receiver<()>,
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
    if let Some(what) = offline::unfinished(dir) {
        return Err(StartError::Unfinished { what, path: dir.clone() });
    }
    let mut member = Member::load(dir).map_err(data_dir("reading the member's identity", dir))?;
    let segment_size = match options.segment_size {
        Some(size) => size,
        None => segment_size(dir).map_err(data_dir("measuring the disk", dir))?,
    };
    let wal_dir = dir.join("wal");
    if member.cluster.is_some() {
        // It had one before it was in a cluster.
        wal::must_exist(&wal_dir)?;
    }
    let wal = Wal::open(&wal_dir, WalOptions { segment_size, sync })?;
    let snapshot_dir = dir.join("snapshot");
    let snapshot = snapshot::newest(&snapshot_dir)?;
    let empty = wal.last().is_none() && snapshot.is_none();
    if member.cluster.is_none() && !(options.join && empty) {
        member.cluster = Some(member::random());
        member.save(dir).map_err(data_dir("writing the member's identity", dir))?;
    }
    let boot_id = options.boot_id.clone().unwrap_or_else(view::boot_id);
    let state = view::open(dir, &options.backend, boot_id, snapshot.as_ref(), &wal)?;
    let growth = Arc::new(Growth::default());
    let snapshots = Snapshots::new(snapshot_dir, options.snapshot_distance, snapshot, growth);
    let (bytes, entries) = wal.size_after(snapshots.covered());
    snapshots.growth.add(bytes, entries);
    Ok(Opened { lock, identity: Identity::new(dir.clone(), member), wal, snapshots, state })
}

fn segment_size(dir: &Path) -> io::Result<u64> {
    let disk = nix::sys::statvfs::statvfs(dir)?;
    let size = disk.blocks() as u64 * disk.fragment_size() as u64;
    Ok(if size < SMALL_DISK { SMALL_SEGMENT } else { SEGMENT })
}

/// Elections are called by [`elections`]; the engine's own timeouts are the second line, and its lease is ours.
/// Snapshots are triggered, and the log is purged, by [`upkeep::snapshots`].
fn config() -> Result<Config, openraft::ConfigError> {
    let lease = LEASE.as_millis() as u64;
    Config {
        cluster_name: "coracle".to_owned(),
        // For the engine mostly the time that an answer to a heartbeat may take: more than a slow network needs there
        // and back. Heartbeats are triggered by [`Follower`].
        heartbeat_interval: 900,
        heartbeat_min_interval: None,
        election_timeout_min: lease - 100,
        election_timeout_max: lease,
        install_snapshot_timeout: 60_000,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX,
        replication_lag_threshold: u64::MAX,
        enable_pre_vote: Some(true),
        // A leader whose heartbeats arrive while no answer comes back must not hold the others off for ever.
        quorum_loss_probe_interval: Some(2 * lease + 500),
        // A leader that was killed may have sent entries that its own log lost: only a new term makes them distinct.
        enable_leader_restore: Some(false),
        // A member without its log doesn't start ([`wal::must_exist`]). One whose directory somebody replaced by an older
        // copy is filled again: else its emptiness would stop the leader.
        allow_log_reversion: Some(true),
        // Proposals come gathered: a deep queue would only cost memory.
        api_batch_capacity: 64,
        backoff: "50ms 100ms 200ms ...800ms".to_owned(),
        ..Config::default()
    }
    .validate()
}

fn is_sole_voter(raft: &Engine) -> bool {
    let metrics = raft.server_metrics();
    let now = metrics.borrow_watched();
    let mut voters = now.membership_config.voter_ids().peekable();
    voters.peek().is_some() && voters.all(|id| id == now.id)
}

/// Founds a cluster where there is none. The only voter becomes the leader, and everything in its log is applied.
async fn begin(raft: &Engine, peers: &Peers, options: &Options) -> Result<(), StartError> {
    if !raft.is_initialized().await.map_err(engine)? {
        if options.join {
            return Ok(());
        }
        let own = peers.own();
        raft.initialize(BTreeMap::from([(own.id, own.contact())])).await.map_err(engine)?;
    }
    let me = peers.identity.id;
    let alone = move |state: &openraft::RaftState<TypeConfig>| {
        let mut voters = state.membership_state.effective().voter_ids().peekable();
        voters.peek().is_some() && voters.all(|id| id == me)
    };
    if raft.with_raft_state(alone).await.map_err(engine)? {
        lead(raft).await?;
    }
    Ok(())
}

/// Makes the only voter the leader, and waits until everything in its log is applied.
async fn lead(raft: &Engine) -> Result<(), StartError> {
    // An entry of this run: once it is applied, so is everything before it.
    loop {
        match raft.write_blank().await {
            Ok(_) => return Ok(()),
            Err(RaftError::Fatal(fatal)) => return Err(engine(fatal)),
            Err(RaftError::APIError(not_leader)) => tracing::debug!(%not_leader, "asking for an election"),
        }
        raft.trigger().elect(false).await.map_err(engine)?;
        let mut metrics = raft.server_metrics();
        let elected = async {
            while metrics.borrow_watched().state != ServerState::Leader {
                if metrics.changed().await.is_err() {
                    break;
                }
            }
        };
        // Another election would only cost more syncs; the disk may be slow.
        let _ = tokio::time::timeout(ELECTION_PATIENCE, elected).await;
    }
}

/// Tells the others when this member has a new name or address.
async fn announce(raft: Engine, peers: Arc<Peers>, members: Arc<Members>) {
    let own = peers.own();
    let mut metrics = raft.server_metrics();
    loop {
        let differs = {
            let now = metrics.borrow_watched();
            let known = now.membership_config.membership().get_node(&own.id);
            known.is_some_and(|known| *known != own.contact())
        };
        if !differs {
            if metrics.changed().await.is_err() {
                return;
            }
            continue;
        }
        match members.change(Change::Contact(own.clone())).await {
            Ok(()) => {
                tracing::info!(address = own.address, name = own.name, "the cluster knows this member's address");
                // It gets here with the log.
                let _ = tokio::time::timeout(ANNOUNCE_PAUSE, metrics.changed()).await;
            }
            Err(error) => {
                tracing::warn!(%error, "the others don't know this member's new address yet");
                tokio::time::sleep(ANNOUNCE_PAUSE).await;
            }
        }
    }
}

/// The directory that holds the snapshots of a data directory.
pub(crate) fn snapshot_dir(data_dir: &Path) -> PathBuf {
    data_dir.join("snapshot")
}
