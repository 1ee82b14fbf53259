//! Several members in one process, over a network in memory, each with a data directory and a disk that can be stopped.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_store::{Op, Txn};
use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;

use super::network::{Dialler, Network};
use crate::view::Backend;
use crate::wal::SyncFile;
use crate::{Node, Options, Peer, ProposeError, member_id};

/// Longest wait for anything; a wait ends when what is waited for holds.
pub const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum Health {
    #[default]
    Fine,
    Stalled,
    Broken,
}

/// A disk that answers syncs late or never.
#[derive(Default)]
pub struct Disk {
    health: Mutex<Health>,
    changed: Condvar,
}

impl Disk {
    pub fn stall(&self) {
        *self.health.lock() = Health::Stalled;
    }

    pub fn break_down(&self) {
        *self.health.lock() = Health::Broken;
        self.changed.notify_all();
    }

    pub fn recover(&self) {
        *self.health.lock() = Health::Fine;
        self.changed.notify_all();
    }

    fn sync_file(self: &Arc<Self>) -> SyncFile {
        let disk = self.clone();
        Arc::new(move |file| {
            let mut health = disk.health.lock();
            while *health == Health::Stalled {
                disk.changed.wait(&mut health);
            }
            if *health == Health::Broken {
                return Err(io::Error::from_raw_os_error(5));
            }
            drop(health);
            file.sync_data()
        })
    }
}

/// One member, running or not.
pub struct Member {
    pub id: u64,
    pub name: String,
    pub address: String,
    pub dir: TempDir,
    pub disk: Arc<Disk>,
    pub join: bool,
    pub node: Option<Node>,
}

impl Member {
    pub fn data(&self) -> &Path {
        self.dir.path()
    }

    pub fn peer(&self) -> Peer {
        Peer { id: self.id, name: self.name.clone(), address: self.address.clone() }
    }
}

/// The cluster under test.
pub struct Cluster {
    pub network: Arc<Network>,
    pub members: Vec<Member>,
    /// For all members; data directory, name, address and dial are set for each.
    pub options: Options,
}

pub fn small() -> Options {
    Options { backend: Backend::Memory, segment_size: Some(1 << 20), ..Options::new("") }
}

pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn put(key: &str, value: &str) -> Txn {
    let put = Op::Put { key: key.to_owned().into(), value: value.to_owned().into(), lease: 0 };
    Txn { then: vec![put], ..Txn::default() }
}

pub fn value(node: &Node, key: &str) -> Option<String> {
    let kv = node.store().get(key.as_bytes()).unwrap()?;
    Some(String::from_utf8(kv.value.to_vec()).unwrap())
}

impl Cluster {
    /// Started, joined, everyone a voter.
    pub async fn of(count: usize) -> Cluster {
        Cluster::with(count, small()).await
    }

    pub async fn with(count: usize, options: Options) -> Cluster {
        // Quiet unless CORACLE_TEST_LOG asks for something.
        let filter = tracing_subscriber::EnvFilter::from_env("CORACLE_TEST_LOG");
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_test_writer().try_init();
        let mut cluster = Cluster { network: Network::new(), members: Vec::new(), options };
        cluster.new_member(false);
        cluster.start(0).await;
        for at in 1..count {
            cluster.new_member(true);
            cluster.start(at).await;
            let peer = cluster.members[at].peer();
            cluster.node(0).add_member(peer).await.unwrap();
            cluster.voter(at).await;
        }
        cluster
    }

    /// A member that was never started. Returns its place.
    pub fn new_member(&mut self, join: bool) -> usize {
        let dir = tempfile::tempdir().unwrap();
        let at = self.members.len();
        self.members.push(Member {
            id: member_id(dir.path()).unwrap(),
            name: format!("n{at}"),
            address: format!("10.0.0.{at}:6443"),
            dir,
            disk: Arc::default(),
            join,
            node: None,
        });
        at
    }

    pub async fn start(&mut self, at: usize) {
        let member = &mut self.members[at];
        let dial = Dialler { network: self.network.clone(), from: member.id };
        let options = Options {
            data_dir: member.data().to_path_buf(),
            name: member.name.clone(),
            address: member.address.clone(),
            dial: Some(Arc::new(dial)),
            join: member.join,
            ..self.options.clone()
        };
        let node = Node::start_on(options, member.disk.sync_file()).await.unwrap();
        self.network.listen(&member.address, &node);
        member.node = Some(node);
    }

    /// The process is gone at once.
    pub async fn kill(&mut self, at: usize) {
        self.network.vanish(self.members[at].id);
        if let Some(node) = self.members[at].node.take() {
            node.kill().await;
        }
    }

    pub async fn stop(&mut self, at: usize) {
        if let Some(node) = self.members[at].node.take() {
            node.shutdown().await;
            self.network.vanish(self.members[at].id);
        }
    }

    pub fn node(&self, at: usize) -> &Node {
        self.members[at].node.as_ref().expect("it is not running")
    }

    pub fn id(&self, at: usize) -> u64 {
        self.members[at].id
    }

    pub fn running(&self) -> Vec<usize> {
        (0..self.members.len()).filter(|at| self.members[*at].node.is_some()).collect()
    }

    /// Cuts one member off from all others.
    pub fn isolate(&self, at: usize) {
        let others: Vec<u64> = self.members.iter().map(|member| member.id).filter(|id| *id != self.id(at)).collect();
        self.network.part(&[self.id(at)], &others);
    }

    /// The place of the member that leads, once exactly one acts as leader.
    pub async fn leader(&self) -> usize {
        let mut found = 0;
        eventually("one leader", async || {
            let leaders: Vec<usize> = self.running().into_iter().filter(|at| self.node(*at).is_leader()).collect();
            found = *leaders.first().unwrap_or(&0);
            leaders.len() == 1
        })
        .await;
        found
    }

    /// Some running member that doesn't lead.
    pub async fn follower(&self) -> usize {
        let leader = self.leader().await;
        self.running().into_iter().find(|at| *at != leader).unwrap()
    }

    pub async fn voter(&self, at: usize) {
        let mut voter = self.node(at).voter();
        tokio::time::timeout(PATIENCE, voter.wait_for(|votes| *votes)).await.expect("it became no voter").unwrap();
    }

    /// Writes through a member, trying again only when nothing was done.
    pub async fn put(&self, at: usize, key: &str, to: &str) {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            match self.node(at).txn(put(key, to)).await {
                Ok(_) => return,
                Err(ProposeError::NotLeader { .. }) if tokio::time::Instant::now() < deadline => {}
                Err(error) => panic!("writing {key} through {at}: {error}"),
            }
        }
    }

    /// Reads what every running member must agree on.
    pub async fn get(&self, at: usize, key: &str) -> Option<String> {
        self.node(at).read_barrier().await.unwrap();
        value(self.node(at), key)
    }

    pub async fn agree(&self, key: &str, on: &str) {
        for at in self.running() {
            assert_eq!(self.get(at, key).await.as_deref(), Some(on), "member {at}");
        }
    }

    pub async fn end(mut self) {
        self.network.heal();
        for at in self.running() {
            self.members[at].disk.recover();
            self.kill(at).await;
        }
    }
}
