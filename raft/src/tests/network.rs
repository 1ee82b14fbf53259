//! A network in memory: streams with delay, partitions in either direction, and machines that vanish.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::{Connection, Dial, Node, Peer};

const BUFFER: usize = 256 << 10;
/// A connection that nothing answers fails after this time.
const CONNECT: Duration = Duration::from_secs(2);

#[derive(Clone, Default)]
struct Rules {
    /// (from, to): bytes of that direction wait.
    blocked: HashSet<(u64, u64)>,
    delay: Duration,
}

struct Host {
    id: u64,
    node: Node,
}

/// The network; shared by all members.
pub struct Network {
    rules: watch::Sender<Rules>,
    hosts: Mutex<HashMap<String, Host>>,
    /// What carries the bytes of a member's connections.
    pipes: Mutex<HashMap<u64, Vec<AbortHandle>>>,
}

impl Network {
    pub fn new() -> Arc<Network> {
        Arc::new(Network {
            rules: watch::Sender::new(Rules::default()),
            hosts: Mutex::default(),
            pipes: Mutex::default(),
        })
    }

    pub fn listen(&self, address: &str, node: &Node) {
        self.hosts.lock().insert(address.to_owned(), Host { id: node.id(), node: node.clone() });
    }

    /// The member is gone: its connections break.
    pub fn vanish(&self, id: u64) {
        self.hosts.lock().retain(|_, host| host.id != id);
        self.sever(id);
    }

    /// The connections of a member break, as those of one that was away for long; it may open new ones.
    pub fn sever(&self, id: u64) {
        for pipe in self.pipes.lock().remove(&id).unwrap_or_default() {
            pipe.abort();
        }
    }

    pub fn set_delay(&self, delay: Duration) {
        self.rules.send_modify(|rules| rules.delay = delay);
    }

    /// Nothing gets from one to the other.
    pub fn block(&self, from: u64, to: u64) {
        self.rules.send_modify(|rules| {
            rules.blocked.insert((from, to));
        });
    }

    /// Nothing gets from one side to the other, either way.
    pub fn part(&self, one: &[u64], other: &[u64]) {
        for a in one {
            for b in other {
                self.block(*a, *b);
                self.block(*b, *a);
            }
        }
    }

    pub fn heal(&self) {
        self.rules.send_modify(|rules| rules.blocked.clear());
    }

    async fn open(self: Arc<Self>, from: u64, peer: Peer) -> io::Result<Box<dyn Connection>> {
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let mut rules = self.rules.subscribe();
        let passes =
            rules.wait_for(|now| !now.blocked.contains(&(from, peer.id)) && !now.blocked.contains(&(peer.id, from)));
        let delay = match tokio::time::timeout(CONNECT, passes).await {
            Ok(Ok(now)) => now.delay,
            _ => return Err(io::ErrorKind::TimedOut.into()),
        };
        tokio::time::sleep(2 * delay).await;
        let node = {
            let hosts = self.hosts.lock();
            let host = hosts.get(&peer.address).filter(|host| host.id == peer.id);
            host.map(|host| host.node.clone()).ok_or_else(refused)?
        };
        let (near, near_end) = tokio::io::duplex(BUFFER);
        let (far, far_end) = tokio::io::duplex(BUFFER);
        let (near_read, near_write) = tokio::io::split(near_end);
        let (far_read, far_write) = tokio::io::split(far_end);
        let there = tokio::spawn(pipe(self.rules.subscribe(), (from, peer.id), near_read, far_write));
        let back = tokio::spawn(pipe(self.rules.subscribe(), (peer.id, from), far_read, near_write));
        let serving = tokio::spawn(async move { node.serve_peer(Box::new(far), from).await });
        let mut pipes = self.pipes.lock();
        for id in [from, peer.id] {
            let handles = [there.abort_handle(), back.abort_handle(), serving.abort_handle()];
            pipes.entry(id).or_default().extend(handles);
        }
        Ok(Box::new(near))
    }
}

/// Carries the bytes of one direction.
async fn pipe(
    mut rules: watch::Receiver<Rules>,
    direction: (u64, u64),
    mut from: ReadHalf<DuplexStream>,
    mut to: WriteHalf<DuplexStream>,
) {
    let (sender, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(256);
    let delays = rules.clone();
    let reading = async move {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let arrives = Instant::now() + delays.borrow().delay;
            if sender.send((arrives, buffer[..count].to_vec())).await.is_err() {
                break;
            }
        }
    };
    let writing = async move {
        while let Some((arrives, bytes)) = arriving.recv().await {
            tokio::time::sleep_until(arrives).await;
            if rules.wait_for(|now| !now.blocked.contains(&direction)).await.is_err() {
                break;
            }
            if to.write_all(&bytes).await.is_err() {
                break;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

/// How one member reaches the others.
pub struct Dialler {
    pub network: Arc<Network>,
    pub from: u64,
}

impl Dial for Dialler {
    fn dial(&self, peer: &Peer) -> BoxFuture<'static, io::Result<Box<dyn Connection>>> {
        Box::pin(self.network.clone().open(self.from, peer.clone()))
    }
}
