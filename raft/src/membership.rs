//! Who is in the cluster and how each member is reached: [`Peer`], and the byte form of a membership.
//!
//! ```text
//! u32 number of voter sets, each: u32 size, u64 ids (two sets while the membership changes);
//! u32 number of members, each: u64 id, u32 length, address;
//! for each member in the same order: u32 length, name (missing in records of the first version)
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::entry::{Membership, cut_short, u32_of, u64_of};

/// A member as others see it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Peer {
    /// Its identity ([`crate::member_id`]).
    pub id: u64,
    /// What people call it.
    pub name: String,
    /// `host:port` with an IP literal; empty while the cluster has one member that nobody needs to reach.
    pub address: String,
}

impl Peer {
    pub(crate) fn new(id: u64, contact: &Contact) -> Peer {
        Peer { id, name: contact.name.clone(), address: contact.address.clone() }
    }

    pub(crate) fn contact(&self) -> Contact {
        Contact { name: self.name.clone(), address: self.address.clone() }
    }
}

/// What the membership holds about each id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Contact {
    pub name: String,
    pub address: String,
}

pub(crate) fn encode_membership(membership: &Membership, out: &mut Vec<u8>) {
    let sets = membership.get_joint_config();
    out.extend((sets.len() as u32).to_le_bytes());
    for set in sets {
        out.extend((set.len() as u32).to_le_bytes());
        out.extend(set.iter().flat_map(|id| id.to_le_bytes()));
    }
    let contacts: Vec<_> = membership.nodes().collect();
    out.extend((contacts.len() as u32).to_le_bytes());
    for (id, contact) in &contacts {
        out.extend(id.to_le_bytes());
        put_text(&contact.address, out);
    }
    for (_, contact) in &contacts {
        put_text(&contact.name, out);
    }
}

fn put_text(text: &str, out: &mut Vec<u8>) {
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn text_of(bytes: &mut Bytes) -> io::Result<String> {
    let length = u32_of(bytes)? as usize;
    if bytes.len() < length {
        return Err(cut_short());
    }
    String::from_utf8(bytes.split_to(length).into()).map_err(io::Error::other)
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
    let mut ids = Vec::new();
    let mut contacts = BTreeMap::new();
    for _ in 0..u32_of(bytes)? {
        let id = u64_of(bytes)?;
        ids.push(id);
        contacts.insert(id, Contact { name: String::new(), address: text_of(bytes)? });
    }
    if !bytes.is_empty() {
        for id in ids {
            let name = text_of(bytes)?;
            if let Some(contact) = contacts.get_mut(&id) {
                contact.name = name;
            }
        }
    }
    Membership::new(sets, contacts).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn membership() -> Membership {
        let contact = |n: u64| (n, Contact { name: format!("n{n}"), address: format!("10.0.0.{n}:6443") });
        let sets = vec![BTreeSet::from([1]), BTreeSet::from([1, 2, 3])];
        Membership::new(sets, BTreeMap::from([contact(1), contact(2), contact(3), contact(9)])).unwrap()
    }

    #[test]
    fn a_membership_in_change_survives() {
        let mut out = Vec::new();
        encode_membership(&membership(), &mut out);
        let mut bytes = Bytes::from(out);
        assert_eq!(decode_membership(&mut bytes).unwrap(), membership());
        assert!(bytes.is_empty());
    }

    #[test]
    fn a_record_without_names_is_read_and_one_cut_short_is_not() {
        let mut out = Vec::new();
        encode_membership(&membership(), &mut out);
        let names = 4 * (4 + "n1".len());
        let old = decode_membership(&mut Bytes::from(out[..out.len() - names].to_vec())).unwrap();
        assert_eq!(old.get_node(&9).unwrap(), &Contact { name: String::new(), address: "10.0.0.9:6443".to_owned() });
        assert!(decode_membership(&mut Bytes::from(out[..out.len() - 1].to_vec())).is_err());
    }
}
