//! How far the state is: the last applied entry, the last membership, the cluster it belongs to. Stored with each applied batch and in
//! snapshots, so that state and position can't come apart.

use std::io;

use bytes::{Buf, Bytes};

use crate::entry::{Membership, StoredMembership, cut_short, from_raft_id, to_raft_id, u64_of};
use crate::membership::{decode_membership, encode_membership};
use crate::wal::LogId;

const VERSION: u8 = 1;
const HAS_APPLIED: u8 = 1;
const HAS_MEMBERSHIP: u8 = 2;
const HAS_CLUSTER: u8 = 4;

/// Position of a state in the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    /// The last applied entry.
    pub last: Option<LogId>,
    /// The last applied membership and the entry it came in.
    pub membership: StoredMembership,
    /// The cluster's incarnation (crate::member).
    pub cluster: Option<u64>,
}

impl Applied {
    pub fn encode(&self) -> Bytes {
        let membership = self.membership.log_id().map(from_raft_id);
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        let flags = flag(self.last.is_some(), HAS_APPLIED)
            | flag(membership.is_some(), HAS_MEMBERSHIP)
            | flag(self.cluster.is_some(), HAS_CLUSTER);
        let mut out = vec![VERSION, flags];
        for id in [self.last, membership] {
            let id = id.unwrap_or(LogId { term: 0, index: 0 });
            out.extend(id.term.to_le_bytes());
            out.extend(id.index.to_le_bytes());
        }
        if let Some(cluster) = self.cluster {
            out.extend(cluster.to_le_bytes());
        }
        if membership.is_some() {
            encode_membership(self.membership.membership(), &mut out);
        }
        out.into()
    }

    /// Reads [`Applied::encode`]'s bytes; no bytes at all are a state to which nothing was applied.
    pub fn decode(mut bytes: Bytes) -> io::Result<Applied> {
        if bytes.is_empty() {
            return Ok(Applied::default());
        }
        if bytes.len() < 2 {
            return Err(cut_short());
        }
        let (version, flags) = (bytes.get_u8(), bytes.get_u8());
        if version != VERSION {
            return Err(io::Error::other(format!("position record of unknown version {version}")));
        }
        let mut id = || Ok::<_, io::Error>(LogId { term: u64_of(&mut bytes)?, index: u64_of(&mut bytes)? });
        let (last, membership_id) = (id()?, id()?);
        let cluster = if flags & HAS_CLUSTER != 0 { Some(u64_of(&mut bytes)?) } else { None };
        let membership = match flags & HAS_MEMBERSHIP != 0 {
            true => StoredMembership::new(Some(to_raft_id(membership_id)), decode_membership(&mut bytes)?),
            false => StoredMembership::new(None, Membership::default()),
        };
        Ok(Applied { last: (flags & HAS_APPLIED != 0).then_some(last), membership, cluster })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::membership::Contact;

    #[test]
    fn a_position_survives() {
        let peers = BTreeMap::from([(3, Contact { name: "a".to_owned(), address: "a:1".to_owned() })]);
        let membership = Membership::new(vec![BTreeSet::from([3])], peers).unwrap();
        let id = LogId { term: 2, index: 5 };
        let full = Applied {
            last: Some(LogId { term: 2, index: 9 }),
            membership: StoredMembership::new(Some(to_raft_id(id)), membership),
            cluster: Some(77),
        };
        assert_eq!(Applied::decode(full.encode()).unwrap(), full);
        let unnamed = Applied { cluster: None, ..full.clone() };
        assert_eq!(Applied::decode(unnamed.encode()).unwrap(), unnamed);
        assert_eq!(Applied::decode(Applied::default().encode()).unwrap(), Applied::default());
        assert_eq!(Applied::decode(Bytes::new()).unwrap(), Applied::default());
        assert!(Applied::decode(full.encode().slice(..30)).is_err());
    }
}
