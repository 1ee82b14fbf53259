//! What a log entry carries, and its byte form.
//!
//! ```text
//! u8 kind    0 blank | 1 commands | 2 membership | 3 ticket and commands
//! ticket     u64 member that waits for the answers, u64 number by which it knows them (crate::pending)
//! commands   for each command: u32 length, then the command as the store encodes it
//! membership see crate::membership
//! ```
//! openraft's types end here: its version may change, the bytes do not.

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use coracle_store::Command;
use coracle_store::codec::DecodeError;
use openraft::EntryPayload;
use openraft::impls::leader_id_std::{self, LeaderId};
use openraft::vote::leader_id_std::CommittedLeaderId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::membership::{Contact, decode_membership, encode_membership};
use crate::wal::{LogId, NewEntry};

openraft::declare_raft_types!(
    /// openraft with our types.
    pub(crate) TypeConfig:
        D = Proposal,
        R = (),
        Node = Contact,
        LeaderId = leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
pub(crate) type RaftLogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
pub(crate) type RaftVote = openraft::type_config::alias::VoteOf<TypeConfig>;
pub(crate) type Membership = openraft::Membership<u64, Contact>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;

/// A command behind its length, as in an entry.
pub(crate) fn frame_command(command: &Command) -> Bytes {
    let mut framed = vec![0; 4];
    command.encode(&mut framed);
    let length = (framed.len() - 4) as u32;
    framed[..4].copy_from_slice(&length.to_le_bytes());
    framed.into()
}

/// Who waits for the answers to the commands of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Ticket {
    /// The member that took the commands from its clients.
    pub origin: u64,
    /// Random; never used twice.
    pub number: u64,
}

/// Commands that travel in one log entry. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Proposal {
    pub ticket: Option<Ticket>,
    /// Each behind its length.
    pub commands: Arc<[Bytes]>,
}

impl Proposal {
    pub fn size(&self) -> usize {
        self.commands.iter().map(Bytes::len).sum()
    }

    /// The commands; keys and values share the memory of the entry.
    pub fn decoded(&self) -> impl Iterator<Item = Result<Command, DecodeError>> + '_ {
        self.commands.iter().map(|framed| Command::decode(framed.slice(4..)))
    }

    /// Reads commands that lie one behind the other.
    pub fn decode(ticket: Option<Ticket>, mut bytes: Bytes) -> io::Result<Proposal> {
        let mut commands = Vec::new();
        while !bytes.is_empty() {
            let length = bytes.get(..4).map(|mut raw| raw.get_u32_le() as usize);
            let end = length.and_then(|length| length.checked_add(4)).filter(|end| *end <= bytes.len());
            commands.push(bytes.split_to(end.ok_or_else(cut_short)?));
        }
        Ok(Proposal { ticket, commands: commands.into() })
    }
}

impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} commands, {} bytes", self.commands.len(), self.size())
    }
}

impl fmt::Display for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl PartialEq for Proposal {
    fn eq(&self, other: &Self) -> bool {
        self.ticket == other.ticket && self.commands == other.commands
    }
}

// openraft asks for these; nothing of ours is stored or sent by them.
impl Serialize for Proposal {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.commands.concat().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Proposal {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        Proposal::decode(None, bytes.into()).map_err(serde::de::Error::custom)
    }
}

const BLANK: u8 = 0;
const COMMANDS: u8 = 1;
const MEMBERSHIP: u8 = 2;
const TICKET: u8 = 3;

/// The entry as the log stores it; the commands are not copied.
pub(crate) fn to_wal(entry: &Entry) -> NewEntry {
    let payload = match &entry.payload {
        EntryPayload::Blank => vec![Bytes::from_static(&[BLANK])],
        EntryPayload::Normal(proposal) => {
            let head = match proposal.ticket {
                None => Bytes::from_static(&[COMMANDS]),
                Some(Ticket { origin, number }) => {
                    [&[TICKET][..], &origin.to_le_bytes(), &number.to_le_bytes()].concat().into()
                }
            };
            std::iter::once(head).chain(proposal.commands.iter().cloned()).collect()
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
        COMMANDS => EntryPayload::Normal(Proposal::decode(None, payload)?),
        TICKET => {
            let ticket = Ticket { origin: u64_of(&mut payload)?, number: u64_of(&mut payload)? };
            EntryPayload::Normal(Proposal::decode(Some(ticket), payload)?)
        }
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
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    fn round_trip(payload: EntryPayload<Proposal, u64, Contact>) -> Entry {
        let id = LogId { term: 4, index: 9 };
        let written = to_wal(&openraft::Entry { log_id: to_raft_id(id), payload });
        assert_eq!(written.id, id);
        from_wal(id, written.payload.concat().into()).unwrap()
    }

    #[test]
    fn commands_survive() {
        for ticket in [None, Some(Ticket { origin: 3, number: 99 })] {
            let commands = [Command::Compact { revision: 7 }, Command::LeaseRevoke { id: 3 }];
            let framed = commands.iter().map(frame_command).collect();
            let read = round_trip(EntryPayload::Normal(Proposal { ticket, commands: framed }));
            let EntryPayload::Normal(proposal) = read.payload else { panic!("{read:?}") };
            assert_eq!(proposal.ticket, ticket);
            assert_eq!(proposal.decoded().map(Result::unwrap).collect::<Vec<_>>(), commands);
            let json = serde_json::to_string(&proposal).unwrap();
            assert_eq!(serde_json::from_str::<Proposal>(&json).unwrap().size(), proposal.size());
        }
    }

    #[test]
    fn a_membership_survives() {
        let contact = Contact { name: "b".to_owned(), address: "10.0.0.1:6443".to_owned() };
        let membership = Membership::new(vec![BTreeSet::from([1])], BTreeMap::from([(1, contact)])).unwrap();
        let read = round_trip(EntryPayload::Membership(membership.clone()));
        assert_eq!(read.payload, EntryPayload::Membership(membership));
    }

    #[test]
    fn foreign_bytes_are_an_error() {
        let id = LogId { term: 1, index: 1 };
        for bytes in [&[][..], &[9], &[1, 200, 0, 0, 0, 1], &[1, 2], &[2, 1, 0, 0, 0, 255, 255, 0, 0], &[3, 1, 2]] {
            assert!(from_wal(id, Bytes::copy_from_slice(bytes)).is_err(), "{bytes:?}");
        }
    }
}
