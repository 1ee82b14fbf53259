//! Commands of a follower on their way to the leader.
//!
//! The request names the term it is meant for, so that a message that was held up never gets into the log of a later
//! leader; and the leader remembers the tickets of its term, so that a request may be repeated when its connection broke
//! and is still done once.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::entry::{Proposal, Ticket};
use crate::leadership::Leader;
use crate::node::Engine;
use crate::peers::Peers;
use crate::peers::link::CallError;
use crate::peers::wire::Forwarded;
use crate::propose::{Submitted, submit};

/// Tickets that a leader remembers: many times what its peers can have under way.
const REMEMBERED: usize = 1024;
/// Before a request is repeated on a new connection.
const PAUSE: Duration = Duration::from_millis(30);

/// Commands to forward.
pub(crate) struct Forward {
    pub term: u64,
    pub leader: u64,
    pub ticket: u64,
    pub commands: Arc<[Bytes]>,
}

/// Hands commands to the leader of a term. Returns true when they are (or may be) in its log, false when they certainly
/// aren't and never will be by this call.
pub(crate) async fn forward(peers: Arc<Peers>, request: Forward, mut leader: watch::Receiver<Leader>) -> bool {
    let body = Forwarded::encode(request.term, request.ticket, &request.commands);
    let mut sent = false;
    loop {
        match peers.call(request.leader, "/propose", body.clone()).await {
            Ok(_) => return true,
            Err(CallError::Refused { status, .. }) if status == StatusCode::INTERNAL_SERVER_ERROR => return true,
            Err(error) => {
                tracing::debug!(%error, leader = request.leader, "forwarding commands failed");
                sent |= matches!(error, CallError::Lost(_));
                // Even a refusal is no proof once a request is on a connection that broke: it may still arrive.
                if !sent {
                    return false;
                }
            }
        }
        // The leader of this very term tells a repeated request from a new one.
        let changed = leader.wait_for(|now| now.term != request.term || now.id != Some(request.leader));
        if tokio::time::timeout(PAUSE, changed).await.is_ok() {
            return true;
        }
    }
}

/// The commands are not in the log and will not be.
const NOT_DONE: StatusCode = StatusCode::CONFLICT;

/// Forwarded commands were not done, or it is unknown.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    #[error("this member does not lead in that term")]
    NotDone,
    #[error("leadership was lost with the commands in the log")]
    Unknown,
    #[error("this member has stopped: {0}")]
    Stopped(String),
}

impl ForwardError {
    pub fn status(&self) -> StatusCode {
        match self {
            ForwardError::NotDone => NOT_DONE,
            // The caller waits for what it applies itself.
            ForwardError::Unknown | ForwardError::Stopped(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    UnderWay,
    Taken,
    NotDone,
}

/// The leader's memory of what was forwarded to it.
#[derive(Default)]
pub(crate) struct Forwards {
    seen: Arc<Mutex<Seen>>,
}

#[derive(Default)]
struct Seen {
    term: u64,
    fates: HashMap<Ticket, watch::Receiver<Fate>>,
    order: VecDeque<Ticket>,
}

impl Seen {
    /// The fate of a ticket that is known already; else it is noted, with the means to tell its fate.
    fn note(&mut self, term: u64, ticket: Ticket) -> Result<watch::Sender<Fate>, watch::Receiver<Fate>> {
        if term != self.term {
            *self = Seen { term, ..Seen::default() };
        }
        if let Some(fate) = self.fates.get(&ticket)
            && *fate.borrow() != Fate::NotDone
        {
            return Err(fate.clone());
        }
        let (tell, fate) = watch::channel(Fate::UnderWay);
        if self.fates.insert(ticket, fate).is_none() {
            self.order.push_back(ticket);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.fates.remove(&oldest);
        }
        Ok(tell)
    }
}

impl Forwards {
    /// Proposes commands of another member; returns when they are committed and applied.
    pub async fn propose(&self, raft: &Engine, origin: u64, forwarded: Forwarded) -> Result<(), ForwardError> {
        let Forwarded { term, ticket, commands } = forwarded;
        let ticket = Ticket { origin, number: ticket };
        let proposal = Proposal::decode(Some(ticket), commands).map_err(|_| ForwardError::NotDone)?;
        let noted = self.seen.lock().note(term, ticket);
        let tell = match noted {
            Ok(tell) => tell,
            Err(mut known) => {
                let fate = known.wait_for(|fate| *fate != Fate::UnderWay).await.map(|fate| *fate);
                return if matches!(fate, Ok(Fate::NotDone)) { Err(ForwardError::NotDone) } else { Ok(()) };
            }
        };
        let raft = raft.clone();
        // Goes on when the connection of the caller breaks: its fate must be told to whoever asks again.
        let submitting = tokio::spawn(async move {
            let submitted = submit(&raft, term, proposal).await;
            tell.send_replace(if matches!(submitted, Submitted::NotDone) { Fate::NotDone } else { Fate::Taken });
            submitted
        });
        match submitting.await {
            Ok(Submitted::Applied) => Ok(()),
            Ok(Submitted::NotDone) => Err(ForwardError::NotDone),
            Ok(Submitted::Unknown) | Err(_) => Err(ForwardError::Unknown),
            Ok(Submitted::Stopped(reason)) => Err(ForwardError::Stopped(reason)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_is_taken_once_in_a_term() {
        let mut seen = Seen::default();
        let ticket = Ticket { origin: 1, number: 2 };
        let tell = seen.note(5, ticket).unwrap();
        assert!(seen.note(5, ticket).is_err());
        tell.send_replace(Fate::Taken);
        assert!(seen.note(5, ticket).is_err());
        let again = seen.note(6, ticket).expect("another term has another log");
        again.send_replace(Fate::NotDone);
        assert!(seen.note(6, ticket).is_ok(), "what was not done may be asked for again");
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut seen = Seen::default();
        for number in 0..3 * REMEMBERED as u64 {
            assert!(seen.note(5, Ticket { origin: 1, number }).is_ok());
        }
        assert_eq!(seen.fates.len(), REMEMBERED);
    }
}
