//! Proposals: concurrent commands travel together in one log entry.
//!
//! One task proposes whatever waits as one entry, and meanwhile the next one gathers: a lone command never waits for
//! company, and under load entries grow by themselves. A second entry on its way at the same time would only split what
//! one sync and one batch of the engine do for all (measured: 70 us of processor time a put with one, 130 with three).

use std::collections::VecDeque;
use std::sync::Arc;

use coracle_store::types::Refusal;
use coracle_store::{Command, Response};
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use tokio::sync::{mpsc, oneshot};

use crate::entry::{Item, Proposal, TypeConfig};
use crate::node::Engine;

/// An entry is not made longer than this in commands or bytes, but a single command may be.
const MAX_COMMANDS: usize = 1024;
const MAX_BYTES: usize = 2 << 20;
/// Commands that may wait; beyond it callers do.
const MAX_WAITING: usize = 4096;
/// Longest command in bytes.
pub(crate) const MAX_COMMAND: usize = 8 << 20;

/// A command was not done, or it is unknown whether it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Another member leads; nothing was done.
    #[error("this member is not the leader")]
    NotLeader {
        /// Where the leader is reached, if known.
        leader: Option<String>,
    },
    /// Nothing was done: the command is too long for the log.
    #[error("the command has {size} bytes, more than the {limit} that a log entry may have")]
    TooLarge {
        /// Its length in bytes.
        size: usize,
        /// The greatest length allowed.
        limit: usize,
    },
    /// The command was applied and refused by the state; it changed nothing.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The member lost leadership or stopped with the command on its way: it may or may not be done.
    #[error("leadership was lost while the command was on its way: it may or may not take effect")]
    OutcomeUnknown,
    /// The member has stopped.
    #[error("this member has stopped: {reason}")]
    Stopped {
        /// Why.
        reason: String,
    },
}

/// Where commands are handed in; cheap to clone.
#[derive(Clone)]
pub(crate) struct Proposer {
    queue: mpsc::Sender<Item>,
}

impl Proposer {
    /// The handle, and the task that must be spawned.
    pub fn new(raft: Engine) -> (Proposer, impl Future<Output = ()> + Send) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        (Proposer { queue }, run(raft, waiting))
    }

    /// Returns when the command is committed and applied.
    pub async fn propose(&self, command: &Command) -> Result<Response, ProposeError> {
        let (reply, answer) = oneshot::channel();
        let item = Item::new(command, reply);
        let size = item.encoded.len();
        if size > MAX_COMMAND {
            return Err(ProposeError::TooLarge { size, limit: MAX_COMMAND });
        }
        let stopped = || ProposeError::Stopped { reason: "it was shut down".to_owned() };
        self.queue.send(item).await.map_err(|_| stopped())?;
        answer.await.unwrap_or(Err(ProposeError::OutcomeUnknown))
    }
}

async fn run(raft: Engine, mut queue: mpsc::Receiver<Item>) {
    let mut waiting: VecDeque<Item> = VecDeque::new();
    let mut received = Vec::new();
    loop {
        if waiting.is_empty() && queue.recv_many(&mut received, MAX_COMMANDS).await == 0 {
            return;
        }
        waiting.extend(received.drain(..));
        while waiting.len() < MAX_COMMANDS
            && let Ok(item) = queue.try_recv()
        {
            waiting.push_back(item);
        }
        propose(&raft, next_proposal(&mut waiting)).await;
    }
}

fn next_proposal(waiting: &mut VecDeque<Item>) -> Proposal {
    let mut items = Vec::new();
    let mut bytes = 0;
    while let Some(item) = waiting.front() {
        bytes += item.encoded.len();
        if !items.is_empty() && (bytes > MAX_BYTES || items.len() == MAX_COMMANDS) {
            break;
        }
        items.extend(waiting.pop_front());
    }
    Proposal { items: items.into() }
}

/// Proposes one entry and waits for its end. The apply thread has answered by then if all went well.
async fn propose(raft: &Engine, proposal: Proposal) {
    let items = Arc::clone(&proposal.items);
    let (responder, done) = ProgressResponder::<TypeConfig, _>::complete_only();
    let error = match raft.client_write_ff(proposal, Some(responder)).await {
        Err(fatal) => ProposeError::Stopped { reason: fatal.to_string() },
        Ok(()) => match done.await {
            Ok(Ok(_)) => ProposeError::OutcomeUnknown,
            Ok(Err(ClientWriteError::ForwardToLeader(to))) => {
                ProposeError::NotLeader { leader: to.leader_node.map(|peer| peer.address) }
            }
            Ok(Err(_)) => ProposeError::OutcomeUnknown,
            Err(_) => ProposeError::OutcomeUnknown,
        },
    };
    for item in items.iter() {
        if let Some(reply) = item.reply.lock().take() {
            // The caller may have gone away.
            let _ = reply.send(Err(error.clone()));
        }
    }
}
