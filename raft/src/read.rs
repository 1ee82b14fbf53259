//! Linearizable reads: the leader confirms that it still leads and says how far the log is committed, the reader waits
//! until it has applied as much. One round serves everyone who waits for it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_store::Store;
use openraft::ReadPolicy;
use openraft::errors::RaftError;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::entry::{RaftLogId, from_raft_id};
use crate::leadership::Leader;
use crate::node::Engine;
use crate::peers::Peers;
use crate::peers::wire;
use crate::pending::Pending;
use crate::propose::ProposeError;

/// Readers that may wait; beyond it callers do.
const MAX_WAITING: usize = 8192;
/// Without a confirmed leader a read is given up after this time.
const PATIENCE: Duration = Duration::from_secs(5);
/// One round.
const ROUND: Duration = Duration::from_millis(1500);
/// Before the next round after one that failed.
const PAUSE: Duration = Duration::from_millis(20);

type Waiting = oneshot::Sender<Result<u64, ProposeError>>;

/// Where readers ask; cheap to clone.
#[derive(Clone)]
pub(crate) struct Reads {
    queue: mpsc::Sender<Waiting>,
}

/// What a round needs.
pub(crate) struct Rounds {
    pub raft: Engine,
    pub peers: Arc<Peers>,
    pub pending: Arc<Pending>,
    pub store: Store,
    pub leader: watch::Receiver<Leader>,
}

impl Reads {
    /// The handle, and the task that must be spawned.
    pub fn new(rounds: Rounds) -> (Reads, impl Future<Output = ()> + Send) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        (Reads { queue }, run(rounds, waiting))
    }

    /// A revision that includes everything acknowledged before this call.
    pub async fn barrier(&self) -> Result<u64, ProposeError> {
        let stopped = || ProposeError::Stopped { reason: "it was shut down".to_owned() };
        let (waiting, answer) = oneshot::channel();
        self.queue.send(waiting).await.map_err(|_| stopped())?;
        answer.await.unwrap_or_else(|_| Err(stopped()))
    }
}

async fn run(rounds: Rounds, mut queue: mpsc::Receiver<Waiting>) {
    let mut waiting = Vec::new();
    // Readers that come while a round is under way can't rely on it: they wait for the next.
    while queue.recv_many(&mut waiting, MAX_WAITING).await > 0 {
        let answer = rounds.round().await;
        for reader in waiting.drain(..) {
            // A reader that went away needs no answer.
            let _ = reader.send(answer.clone());
        }
    }
}

impl Rounds {
    async fn round(&self) -> Result<u64, ProposeError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = *self.leader.borrow();
            let asked = async {
                match now.id {
                    None => Err(ProposeError::NotLeader { leader: None }),
                    Some(id) if id == self.peers.identity.id => read_index(&self.raft).await,
                    Some(id) => self.ask(id).await,
                }
            };
            let begun = Instant::now();
            let position = tokio::time::timeout(ROUND, asked).await;
            match position.unwrap_or(Err(ProposeError::NotLeader { leader: None })) {
                Ok(position) => {
                    let index = from_raft_id(position).index;
                    let applied = self.pending.applied_at_least(index);
                    return match tokio::time::timeout_at(deadline + PATIENCE, applied).await {
                        Ok(true) => Ok(self.store.revision()),
                        Ok(false) => Err(ProposeError::Stopped { reason: "it was shut down".to_owned() }),
                        Err(_) => Err(ProposeError::NotLeader { leader: None }),
                    };
                }
                Err(ProposeError::Stopped { reason }) => return Err(ProposeError::Stopped { reason }),
                Err(error) if begun > deadline => return Err(error),
                Err(_) => {}
            }
            let mut changes = self.leader.clone();
            let _ = tokio::time::timeout(PAUSE, changes.wait_for(|leader| *leader != now)).await;
        }
    }

    async fn ask(&self, leader: u64) -> Result<RaftLogId, ProposeError> {
        let not_leader = || ProposeError::NotLeader { leader: None };
        let mut answer = self.peers.call(leader, "/read", Bytes::new()).await.map_err(|error| {
            tracing::debug!(%error, leader, "asking for a read position failed");
            not_leader()
        })?;
        wire::take_position(&mut answer).ok().flatten().ok_or_else(not_leader)
    }
}

/// As the leader: a position that includes everything acknowledged before this call.
pub(crate) async fn read_index(raft: &Engine) -> Result<RaftLogId, ProposeError> {
    match raft.get_read_log_id(ReadPolicy::ReadIndex).await {
        Ok((position, _)) => Ok(*position.log_id()),
        Err(RaftError::APIError(_)) => Err(ProposeError::NotLeader { leader: None }),
        Err(RaftError::Fatal(fatal)) => Err(ProposeError::Stopped { reason: fatal.to_string() }),
    }
}
