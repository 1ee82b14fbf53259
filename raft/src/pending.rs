//! Commands on their way: who waits for which answer, on the member that took them from its clients.
//!
//! Every log entry with commands carries a [`Ticket`]. When it is applied *here*, whoever led when it was proposed, the
//! clients get their answers. When a leader is lost, what became of an entry is told without guessing: an entry of term
//! T that has not been applied by the time an entry of a later term is, never will be, for terms don't fall along the
//! log. Such commands are proposed again; only what can't be told is reported as unknown.

use std::collections::HashMap;

use coracle_store::Response;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::entry::Ticket;
use crate::propose::ProposeError;
use crate::wal::LogId;

/// Where the answer to one command goes.
pub(crate) type Reply = oneshot::Sender<Result<Response, ProposeError>>;

/// The waiting clients of one member, and how far it has applied the log.
pub(crate) struct Pending {
    member: u64,
    waiting: Mutex<HashMap<u64, Waiting>>,
    applied: watch::Sender<Option<LogId>>,
}

struct Waiting {
    replies: Vec<Reply>,
    /// Ends with the entry.
    _open: oneshot::Sender<()>,
}

/// Completes when the entry with the ticket is applied here, or its answers are lost.
pub(crate) type Answered = oneshot::Receiver<()>;

impl Pending {
    pub fn new(member: u64, applied: Option<LogId>) -> Pending {
        Pending { member, waiting: Mutex::default(), applied: watch::Sender::new(applied) }
    }

    /// Registers the clients of an entry, before it is proposed.
    pub fn register(&self, replies: Vec<Reply>) -> (Ticket, Answered) {
        let (open, answered) = oneshot::channel();
        let ticket = Ticket { origin: self.member, number: rand::random() };
        self.waiting.lock().insert(ticket.number, Waiting { replies, _open: open });
        (ticket, answered)
    }

    /// Takes the clients back, in the order they were registered; None when they have their answers.
    pub fn take_back(&self, ticket: Ticket) -> Option<Vec<Reply>> {
        self.waiting.lock().remove(&ticket.number).map(|waiting| waiting.replies)
    }

    /// Answers the clients of an applied entry; one of another member has none here.
    pub fn answer(&self, ticket: Ticket, responses: impl Iterator<Item = Response>) {
        if ticket.origin != self.member {
            return;
        }
        let Some(waiting) = self.take_back(ticket) else { return };
        for (reply, response) in waiting.into_iter().zip(responses) {
            // A client that went away doesn't want its answer.
            let _ = reply.send(Ok(response));
        }
    }

    /// A snapshot took the place of entries: which of them were in it can't be told any more.
    pub fn forget_all(&self) {
        for (_, waiting) in self.waiting.lock().drain() {
            for reply in waiting.replies {
                let _ = reply.send(Err(ProposeError::OutcomeUnknown));
            }
        }
    }

    /// Everything up to `id` is applied, and answered.
    pub fn advance(&self, id: Option<LogId>) {
        self.applied.send_replace(id);
    }

    /// How far the log is applied, and its changes.
    pub fn applied(&self) -> watch::Receiver<Option<LogId>> {
        self.applied.subscribe()
    }

    /// Returns when entries up to `index` are applied; false when this member stops first.
    pub async fn applied_at_least(&self, index: u64) -> bool {
        let mut applied = self.applied.subscribe();
        applied.wait_for(|id| id.is_some_and(|id| id.index >= index)).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn done() -> Response {
        Response::Done { revision: 5 }
    }

    #[tokio::test]
    async fn an_applied_entry_answers_its_clients_once() {
        let pending = Pending::new(7, None);
        let (reply, answer) = oneshot::channel();
        let (ticket, answered) = pending.register(vec![reply]);
        pending.answer(Ticket { origin: 8, ..ticket }, std::iter::once(done()));
        assert!(pending.waiting.lock().contains_key(&ticket.number), "another member's entry is none of ours");
        pending.answer(ticket, std::iter::once(done()));
        assert!(matches!(answer.await.unwrap(), Ok(Response::Done { revision: 5 })));
        assert!(answered.await.is_err());
        assert!(pending.take_back(ticket).is_none());
    }

    #[tokio::test]
    async fn a_snapshot_leaves_outcomes_unknown() {
        let pending = Pending::new(7, None);
        let (reply, answer) = oneshot::channel();
        let _ = pending.register(vec![reply]);
        pending.forget_all();
        assert_eq!(answer.await.unwrap().unwrap_err(), ProposeError::OutcomeUnknown);
    }
}
