//! Changes of the membership: made by the leader, asked for anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, ServerState};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::entry::{Membership, from_raft_id};
use crate::leadership::{Leader, successor};
use crate::membership::{Contact, Peer};
use crate::node::Engine;
use crate::peers::Peers;

/// Without a leader that does it, a change is given up after this time.
const PATIENCE: Duration = Duration::from_secs(15);
/// One attempt on one leader.
const ATTEMPT: Duration = Duration::from_secs(8);
const PAUSE: Duration = Duration::from_millis(50);
/// Learners are looked at this often; promoted when they are this close, so many times in a row.
const LOOK: Duration = Duration::from_millis(200);
const CLOSE: u64 = 64;
const STEADY: u32 = 3;
/// A member that was lost is noticed within this time.
const SURELY_LOST: Duration = Duration::from_secs(5);
/// How long the transfer of leadership may take.
const TRANSFER: Duration = Duration::from_secs(2);

/// A member of the cluster as this one sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberState {
    /// Its identity.
    pub id: u64,
    /// What people call it.
    pub name: String,
    /// `host:port`.
    pub address: String,
    /// Whether it leads, as far as this member knows.
    pub leader: bool,
    /// It receives the log and has no vote: it was added lately and is catching up.
    pub learner: bool,
    /// On the leader: how much of the log it is known to have (an index).
    pub matched: Option<u64>,
    /// Entries that it lacks; on the leader, and of this member itself.
    pub lag: Option<u64>,
    /// Whether it gave a sign of life lately; always true for this member itself.
    pub reachable: bool,
    /// Bytes done and in all of the snapshot that this member is sending to it.
    pub snapshot: Option<(u64, u64)>,
}

/// The membership was not changed, or it is unknown.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum MembershipError {
    /// Nobody leads, or the leader can't be reached.
    #[error("the cluster has no leader that this member can reach")]
    NoLeader,
    /// There is no such member.
    #[error("there is no member {id:016x}")]
    NotAMember {
        /// Who was asked for.
        id: u64,
    },
    /// The only voter can't be removed.
    #[error("the last member of a cluster can't be removed")]
    LastMember,
    /// A majority of those who would be left can't be reached.
    #[error(
        "without this member only {reachable} of the {voters} members left could be reached, which is no majority: bring \
         the others back first, or remove those that are gone for good"
    )]
    WouldLoseQuorum {
        /// Voters that would be left and can be reached.
        reachable: usize,
        /// Voters that would be left.
        voters: usize,
    },
    /// Another member has this name or address and is alive.
    #[error("the member {id:016x} has the same name or address ({what}) and is alive; give this one another")]
    Taken {
        /// The other member.
        id: u64,
        /// Its name and address.
        what: String,
    },
    /// It was not done in time; it may be done yet.
    #[error("the change was not confirmed in time; look at the members before trying again")]
    TimedOut,
    /// The member has stopped.
    #[error("this member has stopped: {0}")]
    Stopped(String),
}

/// A change of the membership; doing it twice is harmless.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Change {
    /// As a learner. One that had the same name or address and is gone is replaced.
    Add(Peer),
    Remove(u64),
    Contact(Peer),
}

/// Makes changes of the membership, here or on the leader.
pub(crate) struct Members {
    raft: Engine,
    peers: Arc<Peers>,
    leader: watch::Receiver<Leader>,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

impl Members {
    pub fn new(raft: Engine, peers: Arc<Peers>, leader: watch::Receiver<Leader>) -> Members {
        Members { raft, peers, leader, changing: tokio::sync::Mutex::default() }
    }

    /// All members, ordered by name.
    pub fn states(&self) -> Vec<MemberState> {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        let membership = now.membership_config.membership();
        let leader = self.leader.borrow().id;
        let leads = now.state == ServerState::Leader;
        let end = now.last_log_index;
        let state = |(id, contact): (&u64, &Contact)| {
            let own = *id == now.id;
            let of_peer = now.replication.as_ref().and_then(|all| all.get(id).copied()).flatten();
            let matched = if own { end } else { of_peer.map(|position| from_raft_id(position).index) };
            let lag = match (own, leads) {
                (true, _) => now.last_applied.zip(end).map(|(applied, end)| end.saturating_sub(applied.index)),
                (false, true) => end.map(|end| end.saturating_sub(matched.unwrap_or(0))),
                (false, false) => None,
            };
            MemberState {
                id: *id,
                name: contact.name.clone(),
                address: contact.address.clone(),
                leader: leader == Some(*id),
                learner: !membership.voter_ids().any(|voter| voter == *id),
                matched,
                lag,
                reachable: own || self.peers.is_reachable(*id),
                snapshot: if own { None } else { self.peers.transfer_to(*id) },
            }
        };
        let mut states: Vec<MemberState> = membership.nodes().map(state).collect();
        states.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        states
    }

    /// Has a change made by whoever leads.
    pub async fn change(&self, change: Change) -> Result<(), MembershipError> {
        let deadline = Instant::now() + PATIENCE;
        let mut repeated = false;
        loop {
            let now = *self.leader.borrow();
            let attempt = async {
                match now.id {
                    None => Err(MembershipError::NoLeader),
                    Some(id) if id == self.peers.identity.id => self.change_as_leader(change.clone()).await,
                    Some(id) => self.ask(id, &change).await,
                }
            };
            match tokio::time::timeout(ATTEMPT, attempt).await.unwrap_or(Err(MembershipError::TimedOut)) {
                // An attempt without an answer may have done it.
                Err(MembershipError::NotAMember { .. }) if repeated => return Ok(()),
                Err(MembershipError::NoLeader | MembershipError::TimedOut) if Instant::now() < deadline => {
                    repeated = true;
                    let mut changes = self.leader.clone();
                    let _ = tokio::time::timeout(PAUSE, changes.wait_for(|leader| *leader != now)).await;
                }
                result => return result,
            }
        }
    }

    async fn ask(&self, leader: u64, change: &Change) -> Result<(), MembershipError> {
        let body = serde_json::to_vec(change).map_err(|error| MembershipError::Stopped(error.to_string()))?;
        match self.peers.call(leader, "/members", body.into()).await {
            Ok(answer) => serde_json::from_slice(&answer).unwrap_or(Err(MembershipError::TimedOut)),
            Err(error) => {
                tracing::debug!(%error, leader, "asking for a change of the membership failed");
                Err(MembershipError::NoLeader)
            }
        }
    }

    fn membership(&self) -> Membership {
        self.raft.server_metrics().borrow_watched().membership_config.membership().clone()
    }

    /// Makes a change as the leader.
    pub async fn change_as_leader(&self, change: Change) -> Result<(), MembershipError> {
        let _alone = self.changing.lock().await;
        let membership = self.membership();
        let changes = match change {
            Change::Add(peer) => match self.plan_add(&membership, &peer).await? {
                Some(changes) => changes,
                None => return Ok(()),
            },
            Change::Remove(id) => {
                let changes = plan_remove(&membership, id, |id| self.is_alive(id))?;
                if id == self.peers.identity.id {
                    // The next leader does it: a leader that removes itself would be missed.
                    transfer(&self.raft, &self.peers, self.leader.clone()).await;
                    return Err(MembershipError::NoLeader);
                }
                changes
            }
            Change::Contact(peer) => match membership.get_node(&peer.id) {
                None => return Err(MembershipError::NotAMember { id: peer.id }),
                Some(known) if *known == peer.contact() => return Ok(()),
                Some(_) => ChangeMembers::SetNodes(BTreeMap::from([(peer.id, peer.contact())])),
            },
        };
        self.apply(changes).await
    }

    /// One that was lost just now seems alive for some seconds.
    async fn plan_add(
        &self,
        membership: &Membership,
        peer: &Peer,
    ) -> Result<Option<ChangeMembers<u64, Contact>>, MembershipError> {
        let deadline = Instant::now() + SURELY_LOST;
        loop {
            match plan_add(membership, peer, |id| self.is_alive(id)) {
                Err(MembershipError::Taken { .. }) if Instant::now() < deadline => tokio::time::sleep(LOOK).await,
                planned => return planned,
            }
        }
    }

    fn is_alive(&self, id: u64) -> bool {
        id == self.peers.identity.id || self.peers.is_reachable(id)
    }

    async fn apply(&self, changes: ChangeMembers<u64, Contact>) -> Result<(), MembershipError> {
        loop {
            match self.raft.change_membership(changes.clone(), false).await {
                Ok(_) => return Ok(()),
                Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_),
                ))) => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_))) => {
                    return Err(MembershipError::NoLeader);
                }
                Err(RaftError::APIError(error)) => {
                    tracing::warn!(%error, "changing the membership failed");
                    return Err(MembershipError::TimedOut);
                }
                Err(RaftError::Fatal(fatal)) => return Err(MembershipError::Stopped(fatal.to_string())),
            }
        }
    }

    /// As the leader: gives learners that have caught up their vote, and ends changes that a former leader left half
    /// done. Runs until the engine ends.
    pub async fn promote(self: Arc<Self>) {
        let mut metrics = self.raft.server_metrics();
        let mut steady: BTreeMap<u64, u32> = BTreeMap::new();
        loop {
            let (leads, joint, learners) = {
                let now = metrics.borrow_watched();
                let membership = now.membership_config.membership();
                let learners: Vec<u64> = membership.learner_ids().collect();
                (now.state == ServerState::Leader, membership.get_joint_config().len() > 1, learners)
            };
            if !leads || (learners.is_empty() && !joint) {
                steady.clear();
                if metrics.changed().await.is_err() {
                    return;
                }
                continue;
            }
            tokio::time::sleep(LOOK).await;
            if joint {
                self.finish_joint().await;
                continue;
            }
            for learner in learners {
                let close = self.is_close(learner);
                let count = steady.entry(learner).and_modify(|count| *count += 1).or_insert(1);
                if !close {
                    *count = 0;
                } else if *count >= STEADY {
                    steady.remove(&learner);
                    self.give_vote(learner).await;
                }
            }
        }
    }

    async fn finish_joint(&self) {
        let Ok(_alone) = self.changing.try_lock() else { return };
        if self.membership().get_joint_config().len() > 1 {
            tracing::info!("ending a change of the membership that was left half done");
            if let Err(error) = self.apply(ChangeMembers::AddVoterIds(BTreeSet::new())).await {
                tracing::warn!(%error, "the change of the membership is not ended yet");
            }
        }
    }

    async fn give_vote(&self, learner: u64) {
        let _alone = self.changing.lock().await;
        if self.membership().get_node(&learner).is_none() {
            return;
        }
        match self.apply(ChangeMembers::AddVoterIds(BTreeSet::from([learner]))).await {
            Ok(()) => tracing::info!(member = format_args!("{learner:016x}"), "a learner has caught up: it votes now"),
            Err(error) => tracing::warn!(%error, member = format_args!("{learner:016x}"), "no vote for a learner yet"),
        }
    }

    fn is_close(&self, learner: u64) -> bool {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        let matched = now.replication.as_ref().and_then(|all| all.get(&learner).copied()).flatten();
        let lag = matched.zip(now.last_log_index).map(|(matched, end)| end.saturating_sub(matched.index));
        lag.is_some_and(|lag| lag <= CLOSE) && self.peers.is_reachable(learner)
    }
}

/// What adding a member takes; None when it is one already.
fn plan_add(
    membership: &Membership,
    peer: &Peer,
    is_alive: impl Fn(u64) -> bool,
) -> Result<Option<ChangeMembers<u64, Contact>>, MembershipError> {
    let contact = peer.contact();
    if let Some(known) = membership.get_node(&peer.id) {
        let set = || ChangeMembers::SetNodes(BTreeMap::from([(peer.id, contact.clone())]));
        return Ok((*known != contact).then(set));
    }
    let same = |a: &str, b: &str| !a.is_empty() && a == b;
    let doubles =
        membership.nodes().filter(|(_, known)| same(&known.name, &peer.name) || same(&known.address, &peer.address));
    let mut changes = Vec::new();
    for (id, known) in doubles {
        if is_alive(*id) {
            return Err(MembershipError::Taken { id: *id, what: format!("{} at {}", known.name, known.address) });
        }
        changes.push(removal(membership, *id));
    }
    changes.push(ChangeMembers::AddNodes(BTreeMap::from([(peer.id, contact)])));
    Ok(Some(if changes.len() == 1 { changes.remove(0) } else { ChangeMembers::Batch(changes) }))
}

fn plan_remove(
    membership: &Membership,
    id: u64,
    is_alive: impl Fn(u64) -> bool,
) -> Result<ChangeMembers<u64, Contact>, MembershipError> {
    if membership.get_node(&id).is_none() {
        return Err(MembershipError::NotAMember { id });
    }
    let left: Vec<u64> = membership.voter_ids().filter(|voter| *voter != id).collect();
    if left.is_empty() {
        return Err(MembershipError::LastMember);
    }
    let (voters, reachable) = (left.len(), left.iter().filter(|voter| is_alive(**voter)).count());
    if reachable <= voters / 2 && membership.voter_ids().any(|voter| voter == id) {
        return Err(MembershipError::WouldLoseQuorum { reachable, voters });
    }
    Ok(removal(membership, id))
}

fn removal(membership: &Membership, id: u64) -> ChangeMembers<u64, Contact> {
    match membership.voter_ids().any(|voter| voter == id) {
        true => ChangeMembers::RemoveVoters(BTreeSet::from([id])),
        false => ChangeMembers::RemoveNodes(BTreeSet::from([id])),
    }
}

/// Hands leadership over and waits, a bounded time, until somebody else leads. True when nobody needs to be feared for:
/// this member doesn't lead.
pub(crate) async fn transfer(raft: &Engine, peers: &Peers, mut leader: watch::Receiver<Leader>) -> bool {
    let own = peers.identity.id;
    let deadline = Instant::now() + TRANSFER;
    while leader.borrow().id == Some(own) {
        let Some(to) = successor(raft, peers) else { return false };
        tracing::info!(to = format_args!("{to:016x}"), "handing leadership over");
        if raft.trigger().transfer_leader(to).await.is_err() {
            return true;
        }
        let other = leader.wait_for(|now| now.id.is_some_and(|id| id != own));
        if tokio::time::timeout_at(deadline, other).await.is_err() {
            tracing::warn!("leadership was not taken over in time");
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership(voters: &[u64], learners: &[u64]) -> Membership {
        let contact = |id: &u64| (*id, Contact { name: format!("n{id}"), address: format!("10.0.0.{id}:1") });
        let contacts = voters.iter().chain(learners).map(contact).collect::<BTreeMap<_, _>>();
        Membership::new(vec![voters.iter().copied().collect()], contacts).unwrap()
    }

    fn peer(id: u64, name: u64) -> Peer {
        Peer { id, name: format!("n{name}"), address: format!("10.0.0.{name}:1") }
    }

    #[test]
    fn adding_is_idempotent_and_replaces_a_member_that_lost_its_disk() {
        let now = membership(&[1, 2, 3], &[]);
        assert_eq!(plan_add(&now, &peer(2, 2), |_| true).unwrap(), None);
        let added = plan_add(&now, &peer(4, 4), |_| true).unwrap().unwrap();
        assert!(matches!(added, ChangeMembers::AddNodes(_)));
        let moved = plan_add(&now, &Peer { address: "10.9.9.9:1".to_owned(), ..peer(2, 2) }, |_| true).unwrap();
        assert!(matches!(moved, Some(ChangeMembers::SetNodes(_))));
        assert!(matches!(plan_add(&now, &peer(9, 3), |_| true), Err(MembershipError::Taken { id: 3, .. })));
        let Some(ChangeMembers::Batch(changes)) = plan_add(&now, &peer(9, 3), |id| id != 3).unwrap() else { panic!() };
        assert!(matches!(&changes[0], ChangeMembers::RemoveVoters(gone) if gone.contains(&3)));
        assert!(matches!(&changes[1], ChangeMembers::AddNodes(new) if new.contains_key(&9)));
    }

    #[test]
    fn a_removal_keeps_a_majority() {
        let now = membership(&[1, 2, 3], &[4]);
        assert!(matches!(plan_remove(&now, 3, |id| id != 3), Ok(ChangeMembers::RemoveVoters(_))));
        let error = plan_remove(&now, 2, |id| id != 3).unwrap_err();
        assert_eq!(error, MembershipError::WouldLoseQuorum { reachable: 1, voters: 2 });
        assert!(matches!(plan_remove(&now, 4, |_| true), Ok(ChangeMembers::RemoveNodes(_))));
        assert_eq!(plan_remove(&now, 8, |_| true).unwrap_err(), MembershipError::NotAMember { id: 8 });
        assert_eq!(plan_remove(&membership(&[1], &[]), 1, |_| true).unwrap_err(), MembershipError::LastMember);
    }
}
