//! What a log entry carries, and its byte form.
//!
//! ```text
//! u8 kind    0 blank | 1 commands | 2 membership
//! commands   for each command: u32 length, then the command as the store encodes it
//! membership u32 number of voter sets, each: u32 size, u64 ids (two sets while the membership changes);
//!            u32 number of peers, each: u64 id, u32 length, address
//! ```
//! openraft's types end here: its version may change, the bytes do not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use coracle_store::codec::DecodeError;
use coracle_store::{Command, Response};
use openraft::EntryPayload;
use openraft::impls::leader_id_std::{self, LeaderId};
use openraft::vote::leader_id_std::CommittedLeaderId;
use parking_lot::Mutex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tokio::sync::oneshot;

use crate::propose::ProposeError;
use crate::wal::{LogId, NewEntry};

openraft::declare_raft_types!(
    /// openraft with our types.
    pub(crate) TypeConfig:
        D = Proposal,
        R = (),
        Node = Peer,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(crate) type RaftLogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub(crate) type RaftVote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Peer>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;

/// How another member is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// `host:port`; empty while the cluster has one member that nobody needs to reach.
    pub address: String,
}

/// Where the answer to one command goes, on the member that proposed it.
pub(crate) type Reply = oneshot::Sender<Result<Response, ProposeError>>;

/// One command of a proposal.
pub(crate) struct Item {
    /// Length and command, as in the entry.
    pub encoded: Bytes,
    /// Taken once the command is applied. Not part of the entry: entries from disk or peers have none.
    pub reply: Mutex<Option<Reply>>,
}

impl Item {
    /// Encodes a command behind its length.
    pub fn new(command: &Command, reply: Reply) -> Item {
        let mut encoded = vec![0; 4];
        command.encode(&mut encoded);
        let length = (encoded.len() - 4) as u32;
        encoded[..4].copy_from_slice(&length.to_le_bytes());
        Item { encoded: encoded.into(), reply: Mutex::new(Some(reply)) }
    }

    /// The command; keys and values share the memory of the entry.
    pub fn command(&self) -> Result<Command, DecodeError> {
        Command::decode(self.encoded.slice(4..))
    }
}

/// Commands that travel in one log entry. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Proposal {
    pub items: Arc<[Item]>,
}

impl Proposal {
    pub fn size(&self) -> usize {
        self.items.iter().map(|item| item.encoded.len()).sum()
    }

    fn decode(mut bytes: Bytes) -> io::Result<Proposal> {
        let mut items = Vec::new();
        while !bytes.is_empty() {
            let length = bytes.get(..4).map(|mut raw| raw.get_u32_le() as usize);
            let end = length.map(|length| length + 4).filter(|end| *end <= bytes.len());
            let encoded = bytes.split_to(end.ok_or_else(cut_short)?);
            items.push(Item { encoded, reply: Mutex::new(None) });
        }
        Ok(Proposal { items: items.into() })
    }
}

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands, {} bytes", self.items.len(), self.size())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl PartialEq for Proposal {
    fn eq(&self, other: &Self) -> bool {
        self.items.iter().map(|item| &item.encoded).eq(other.items.iter().map(|item| &item.encoded))
    }
}

impl Serialize for Proposal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes: Vec<u8> = self.items.iter().flat_map(|item| item.encoded.iter().copied()).collect();
        bytes.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Proposal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        Proposal::decode(bytes.into()).map_err(serde::de::Error::custom)
    }
}

const BLANK: u8 = 0;
const COMMANDS: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// The entry as the log stores it; the commands are not copied.
pub(crate) fn to_wal(entry: &Entry) -> NewEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => vec![Bytes::from_static(&[BLANK])],
        EntryPayload::Normal(proposal) => {
            let items = proposal.items.iter().map(|item| item.encoded.clone());
            std::iter::once(Bytes::from_static(&[COMMANDS])).chain(items).collect()
        }
        EntryPayload::Membership(membership) => {
            let mut out = vec![MEMBERSHIP];
            encode_membership(membership, &mut out);
            vec![out.into()]
        }
    };
    NewEntry { id: from_raft_id(entry.log_id), payload }
}

/// The entry with this payload.
///
/// # Errors
/// The payload is none that this program writes.
pub(crate) fn from_wal(id: LogId, mut payload: Bytes) -> io::Result<Entry> {
    if payload.is_empty() {
        return Err(cut_short());
    }
    let payload = match payload.get_u8() {
        BLANK => EntryPayload::Blank,
        COMMANDS => EntryPayload::Normal(Proposal::decode(payload)?),
        MEMBERSHIP => EntryPayload::Membership(decode_membership(&mut payload)?),
        other => return Err(io::Error::other(format!("log entry {id} has an unknown kind {other}"))),
    };
    Ok(openraft::Entry { log_id: to_raft_id(id), payload })
}

pub(crate) fn to_raft_id(id: LogId) -> RaftLogId {
    RaftLogId::new(CommittedLeaderId::new(id.term), id.index)
}

pub(crate) fn from_raft_id(id: RaftLogId) -> LogId {
    LogId { term: id.leader_id.term, index: id.index }
}

pub(crate) fn to_raft_vote(vote: crate::wal::Vote) -> RaftVote {
    let leader_id = LeaderId { term: vote.term, voted_for: vote.member };
    RaftVote { leader_id, committed: vote.committed }
}

pub(crate) fn from_raft_vote(vote: &RaftVote) -> crate::wal::Vote {
    let LeaderId { term, voted_for } = vote.leader_id;
    crate::wal::Vote { term, member: voted_for, committed: vote.committed }
}

pub(crate) fn encode_membership(membership: &Membership, out: &mut Vec<u8>) {
    let sets = membership.get_joint_config();
    out.extend((sets.len() as u32).to_le_bytes());
    for set in sets {
        out.extend((set.len() as u32).to_le_bytes());
        out.extend(set.iter().flat_map(|id| id.to_le_bytes()));
    }
    let peers: Vec<_> = membership.nodes().collect();
    out.extend((peers.len() as u32).to_le_bytes());
    for (id, peer) in peers {
        out.extend(id.to_le_bytes());
        out.extend((peer.address.len() as u32).to_le_bytes());
        out.extend(peer.address.as_bytes());
    }
}

pub(crate) fn decode_membership(bytes: &mut Bytes) -> io::Result<Membership> {
    let mut sets = Vec::new();
    for _ in 0..u32_of(bytes)? {
        let mut set = BTreeSet::new();
        for _ in 0..u32_of(bytes)? {
            set.insert(u64_of(bytes)?);
        }
        sets.push(set);
    }
    let mut peers = BTreeMap::new();
    for _ in 0..u32_of(bytes)? {
        let id = u64_of(bytes)?;
        let length = u32_of(bytes)? as usize;
        if bytes.len() < length {
            return Err(cut_short());
        }
        let address = String::from_utf8(bytes.split_to(length).into()).map_err(io::Error::other)?;
        peers.insert(id, Peer { address });
    }
    Membership::new(sets, peers).map_err(io::Error::other)
}

pub(crate) fn u32_of(bytes: &mut Bytes) -> io::Result<u32> {
    bytes.try_get_u32_le().map_err(|_| cut_short())
}

pub(crate) fn u64_of(bytes: &mut Bytes) -> io::Result<u64> {
    bytes.try_get_u64_le().map_err(|_| cut_short())
}

pub(crate) fn cut_short() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the record is cut short")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(payload: EntryPayload<Proposal, u64, Peer>) -> Entry {
        let id = LogId { term: 4, index: 9 };
        let written = to_wal(&openraft::Entry { log_id: to_raft_id(id), payload });
        assert_eq!(written.id, id);
        from_wal(id, written.payload.concat().into()).unwrap()
    }

    #[test]
    fn commands_survive() {
        let items = [Command::Compact { revision: 7 }, Command::LeaseRevoke { id: 3 }];
        let items = items.map(|command| Item::new(&command, oneshot::channel().0));
        let read = round_trip(EntryPayload::Normal(Proposal { items: Arc::new(items) }));
        let EntryPayload::Normal(proposal) = read.payload else { panic!("{read:?}") };
        let commands: Vec<Command> = proposal.items.iter().map(|item| item.command().unwrap()).collect();
        assert_eq!(commands, [Command::Compact { revision: 7 }, Command::LeaseRevoke { id: 3 }]);
        let json = serde_json::to_string(&proposal).unwrap();
        assert_eq!(serde_json::from_str::<Proposal>(&json).unwrap().size(), proposal.size());
    }

    #[test]
    fn a_membership_in_change_survives() {
        let peer = |n: u64| (n, Peer { address: format!("10.0.0.{n}:6443") });
        let sets = vec![BTreeSet::from([1]), BTreeSet::from([1, 2, 3])];
        let membership = Membership::new(sets, BTreeMap::from([peer(1), peer(2), peer(3), peer(9)])).unwrap();
        let read = round_trip(EntryPayload::Membership(membership.clone()));
        assert_eq!(read.payload, EntryPayload::Membership(membership));
    }

    #[test]
    fn foreign_bytes_are_an_error() {
        let id = LogId { term: 1, index: 1 };
        for bytes in [&[][..], &[9], &[1, 200, 0, 0, 0, 1], &[1, 2], &[2, 1, 0, 0, 0, 255, 255, 0, 0]] {
            assert!(from_wal(id, Bytes::copy_from_slice(bytes)).is_err(), "{bytes:?}");
        }
    }
}
