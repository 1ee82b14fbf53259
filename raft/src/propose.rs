//! Proposals: concurrent commands travel together in one log entry, to whoever leads.
//!
//! One task proposes whatever waits as one entry, and meanwhile the next one gathers: a lone command never waits for
//! company, and under load entries grow by themselves. What is proposed is carried to its end by [`Carrier`]: through
//! changes of leadership, never twice, answered when it is applied on this member (see [`crate::pending`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use coracle_store::types::Refusal;
use coracle_store::{Command, Response};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use openraft::errors::ClientWriteError;
use openraft::impls::ProgressResponder;
use openraft::vote::leader_id_std::CommittedLeaderId;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::entry::{Proposal, Ticket, TypeConfig, frame_command};
use crate::forward::{Forward, forward};
use crate::leadership::Leader;
use crate::node::Engine;
use crate::peers::Peers;
use crate::pending::{Answered, Pending, Reply};

/// An entry is not made longer than this in commands or bytes, but a single command may be.
const MAX_COMMANDS: usize = 1024;
const MAX_BYTES: usize = 2 << 20;
/// Commands that may wait; beyond it callers do.
const MAX_WAITING: usize = 4096;
/// Longest command in bytes.
pub(crate) const MAX_COMMAND: usize = 8 << 20;
/// Entries of one member under way at once. A second one would only split what one sync and one batch of the engine do
/// for all (measured alone: 70 us of processor time a put with one, 130 with three), so with peers it follows only after
/// a time that says that somebody is far away or slow.
const DEPTH_ALONE: usize = 1;
const DEPTH: usize = 3;
const STAGGER: Duration = Duration::from_millis(20);
/// Without a leader that takes it, or without an end in sight, a command is given up after this time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Before a command is offered again after it was refused for lack of a leader.
const PAUSE: Duration = Duration::from_millis(20);

/// A command was not done, or it is unknown whether it was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Nobody leads, or the leader can't be reached; nothing was done.
    #[error("the cluster has no leader that this member can reach; nothing was done")]
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
    /// The command was on its way when this member lost sight of it: it may or may not be done, or be done later. It
    /// must not be repeated unless doing it twice is harmless.
    #[error("contact was lost while the command was on its way: it may or may not take effect")]
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

struct Item {
    framed: Bytes,
    reply: Reply,
}

impl Proposer {
    /// The handle, and the task that must be spawned.
    pub fn new(carrier: Carrier) -> (Proposer, impl Future<Output = ()> + Send) {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        (Proposer { queue }, run(Arc::new(carrier), waiting))
    }

    /// Returns when the command is committed and applied here.
    pub async fn propose(&self, command: &Command) -> Result<Response, ProposeError> {
        let framed = frame_command(command);
        let size = framed.len();
        if size > MAX_COMMAND {
            return Err(ProposeError::TooLarge { size, limit: MAX_COMMAND });
        }
        let (reply, answer) = oneshot::channel();
        let stopped = || ProposeError::Stopped { reason: "it was shut down".to_owned() };
        self.queue.send(Item { framed, reply }).await.map_err(|_| stopped())?;
        answer.await.unwrap_or(Err(ProposeError::OutcomeUnknown))
    }
}

async fn run(carrier: Arc<Carrier>, mut queue: mpsc::Receiver<Item>) {
    let mut waiting: VecDeque<Item> = VecDeque::new();
    let mut received = Vec::new();
    let mut under_way = FuturesUnordered::new();
    let mut next_at = Instant::now();
    loop {
        let depth = if carrier.sole.load(Ordering::Relaxed) { DEPTH_ALONE } else { DEPTH };
        let may_follow = under_way.len() < depth;
        let free = under_way.is_empty() || (may_follow && Instant::now() >= next_at);
        if free && !waiting.is_empty() {
            while waiting.len() < MAX_COMMANDS
                && let Ok(item) = queue.try_recv()
            {
                waiting.push_back(item);
            }
            let carrier = carrier.clone();
            let (commands, replies) = next_entry(&mut waiting);
            next_at = Instant::now() + STAGGER;
            under_way.push(async move { carrier.carry(commands, replies).await });
            continue;
        }
        tokio::select! {
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            count = queue.recv_many(&mut received, MAX_COMMANDS), if waiting.is_empty() => {
                if count == 0 {
                    while under_way.next().await.is_some() {}
                    return;
                }
                waiting.extend(received.drain(..));
            }
            () = tokio::time::sleep_until(next_at), if may_follow && !waiting.is_empty() => {}
        }
    }
}

fn next_entry(waiting: &mut VecDeque<Item>) -> (Arc<[Bytes]>, Vec<Reply>) {
    let (mut commands, mut replies) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    while let Some(item) = waiting.front() {
        bytes += item.framed.len();
        if !commands.is_empty() && (bytes > MAX_BYTES || commands.len() == MAX_COMMANDS) {
            break;
        }
        let Some(item) = waiting.pop_front() else { break };
        commands.push(item.framed);
        replies.push(item.reply);
    }
    (commands.into(), replies)
}

/// What became of an entry that was handed to this member's own consensus engine.
#[derive(Debug)]
pub(crate) enum Submitted {
    /// Committed and applied.
    Applied,
    /// It did not get into the log.
    NotDone,
    /// It is in the log, and no longer this member's to commit.
    Unknown,
    /// The engine has stopped.
    Stopped(String),
}

/// Proposes an entry as the leader of `term`, and of no other.
pub(crate) async fn submit(raft: &Engine, term: u64, proposal: Proposal) -> Submitted {
    let (responder, done) = ProgressResponder::<TypeConfig, _>::complete_only();
    let leader = CommittedLeaderId::new(term);
    match raft.write(proposal).with_leader(leader).responder(responder).await {
        Err(fatal) => Submitted::Stopped(fatal.to_string()),
        Ok(()) => match done.await {
            Ok(Ok(_)) => Submitted::Applied,
            Ok(Err(ClientWriteError::LogEntryDiscarded(_))) | Err(_) => Submitted::Unknown,
            Ok(Err(_)) => Submitted::NotDone,
        },
    }
}

/// Carries entries to their end.
pub(crate) struct Carrier {
    pub raft: Engine,
    pub peers: Arc<Peers>,
    pub pending: Arc<Pending>,
    pub leader: watch::Receiver<Leader>,
    /// True while this member leads and is the only voter.
    pub sole: Arc<AtomicBool>,
}

/// How an attempt ended.
enum Attempt {
    Answered,
    /// Not done, and it never will be: the clients, to try again for.
    Never(Vec<Reply>),
    /// Given up: the clients, if they are still waiting, and what to tell them.
    Failed(Vec<Reply>, ProposeError),
}

impl Carrier {
    /// Proposes commands as one entry, again if need be; returns when every client has its answer.
    async fn carry(&self, commands: Arc<[Bytes]>, mut replies: Vec<Reply>) {
        let started = Instant::now();
        loop {
            let deadline = started + PATIENCE;
            let Some((term, leader)) = self.leader_by(deadline).await else {
                return fail(replies, &ProposeError::NotLeader { leader: None });
            };
            let refused_at = Instant::now();
            match self.attempt(term, leader, commands.clone(), replies, deadline).await {
                Attempt::Answered => return,
                Attempt::Failed(replies, error) => return fail(replies, &error),
                Attempt::Never(back) => replies = back,
            }
            if Instant::now() > deadline {
                return fail(replies, &ProposeError::NotLeader { leader: None });
            }
            // A change of leader is worth a new attempt at once.
            let mut changes = self.leader.clone();
            let changed = changes.wait_for(|now| now.term != term || now.id != Some(leader));
            let _ = tokio::time::timeout_at(refused_at + PAUSE, changed).await;
        }
    }

    async fn leader_by(&self, deadline: Instant) -> Option<(u64, u64)> {
        let mut leader = self.leader.clone();
        let known = tokio::time::timeout_at(deadline, leader.wait_for(|now| now.id.is_some())).await;
        let now = *known.ok()?.ok()?;
        now.id.map(|id| (now.term, id))
    }

    async fn attempt(
        &self,
        term: u64,
        leader: u64,
        commands: Arc<[Bytes]>,
        replies: Vec<Reply>,
        deadline: Instant,
    ) -> Attempt {
        let (ticket, mut answered) = self.pending.register(replies);
        if leader == self.peers.identity.id {
            let submitting = submit(&self.raft, term, Proposal { ticket: Some(ticket), commands });
            // A sole member waits for its disk however long that takes: nobody else could do better.
            let submitted = if self.sole.load(Ordering::Relaxed) {
                Ok(submitting.await)
            } else {
                tokio::time::timeout_at(deadline, submitting).await
            };
            match submitted {
                Ok(Submitted::Applied) => {}
                Ok(Submitted::NotDone) => return self.take_back(ticket),
                Ok(Submitted::Unknown) => {}
                Ok(Submitted::Stopped(reason)) => return self.give_up(ticket, ProposeError::Stopped { reason }),
                Err(_) => return self.give_up(ticket, ProposeError::OutcomeUnknown),
            }
        } else {
            let request = Forward { term, leader, ticket: ticket.number, commands };
            let forwarding = forward(self.peers.clone(), request, self.leader.clone());
            // A task of its own, because the entry is often applied here before the leader's answer comes: a request
            // dropped then would reset its stream, and HTTP/2 ends a connection after so many answers to nobody.
            let forwarding = tokio::spawn(tokio::time::timeout_at(deadline, forwarding));
            tokio::select! {
                _ = &mut answered => return Attempt::Answered,
                forwarded = forwarding => match forwarded {
                    Ok(Ok(true)) => {}
                    Ok(Ok(false)) => return self.take_back(ticket),
                    Ok(Err(_)) | Err(_) => return self.give_up(ticket, ProposeError::OutcomeUnknown),
                }
            }
        }
        self.settle(ticket, term, answered, deadline).await
    }

    /// Waits for the entry to be applied here, or for proof that it never will be.
    async fn settle(&self, ticket: Ticket, term: u64, answered: Answered, deadline: Instant) -> Attempt {
        let mut applied = self.pending.applied();
        tokio::select! {
            _ = answered => Attempt::Answered,
            later = applied.wait_for(|id| id.is_some_and(|id| id.term > term)) => match later {
                Ok(_) => self.take_back(ticket),
                Err(_) => self.give_up(ticket, ProposeError::OutcomeUnknown),
            },
            () = tokio::time::sleep_until(deadline) => self.give_up(ticket, ProposeError::OutcomeUnknown),
        }
    }

    fn take_back(&self, ticket: Ticket) -> Attempt {
        self.pending.take_back(ticket).map_or(Attempt::Answered, Attempt::Never)
    }

    fn give_up(&self, ticket: Ticket, error: ProposeError) -> Attempt {
        self.pending.take_back(ticket).map_or(Attempt::Answered, |replies| Attempt::Failed(replies, error))
    }
}

fn fail(replies: Vec<Reply>, error: &ProposeError) {
    for reply in replies {
        // The caller may have gone away.
        let _ = reply.send(Err(error.clone()));
    }
}
