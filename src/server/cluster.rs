//! The cluster as this server's own endpoints see it: who is in it, who may come in, who was sent away.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use coracle_raft::{MemberState, MembershipError, Node, Peer};
use coracle_store::{Op, Txn};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use super::join::agreement::Agreement;
use super::keys::Keyring;
use super::peers::Peers;
use crate::apiserver::status::Status;
use crate::auth::pki::files;

/// Keys of the records of servers that were removed.
const REMOVED: &str = "/coracle/removed/";

/// A server as it is told to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// 16 hexadecimal digits.
    pub id: String,
    /// Name of the server's node.
    pub name: String,
    /// `host:port`.
    pub address: String,
}

impl Member {
    /// Of an id.
    pub fn new(id: u64, name: &str, address: &str) -> Member {
        Member { id: to_text(id), name: name.to_owned(), address: address.to_owned() }
    }

    /// As the consensus engine has it.
    pub fn peer(&self) -> Option<Peer> {
        let id = from_text(&self.id)?;
        Some(Peer { id, name: self.name.clone(), address: self.address.clone() })
    }
}

/// An id as people and wires see it.
pub fn to_text(id: u64) -> String {
    format!("{id:016x}")
}

/// The id in a text of 16 hexadecimal digits.
pub fn from_text(text: &str) -> Option<u64> {
    let plain = text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if plain { u64::from_str_radix(text, 16).ok() } else { None }
}

/// Everything that the endpoints between servers, for joiners and for the administrator work on. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    /// Consensus.
    pub node: Node,
    /// Keys.
    pub keyring: Keyring,
    /// The way to the others.
    pub peers: Arc<Peers>,
    /// This server's name.
    pub name: String,
    /// Where this server is reached, `host:port`.
    pub address: String,
    /// What all servers share.
    pub agreement: Arc<Agreement>,
}

impl Cluster {
    /// All servers.
    pub fn members(&self) -> Vec<Member> {
        self.node.members().iter().map(|m| Member::new(m.id, &m.name, &m.address)).collect()
    }

    /// This server as the membership has it.
    pub fn own_state(&self) -> Option<MemberState> {
        self.node.members().into_iter().find(|member| member.id == self.node.id())
    }

    /// The leader, as far as this server knows.
    pub fn leader(&self) -> Option<u64> {
        *self.node.leader().borrow()
    }

    /// Whether the cluster is this server alone.
    pub fn is_alone(&self) -> bool {
        let members = self.node.members();
        matches!(&members[..], [only] if only.id == self.node.id())
    }

    /// Lets a server in, or notes its new address. Repeatable.
    ///
    /// # Errors
    /// 403 when it was removed, 409 when a living server has its name or address, 503 without a leader.
    pub async fn admit(&self, peer: Peer) -> Result<(), Status> {
        if self.is_removed(peer.id)? {
            let why = "this server was removed from the cluster; to join again it has to begin anew: `coracle uninstall \
                       --data-dir` there, then start it with --server and --token";
            return Err(Status::new(StatusCode::FORBIDDEN, "Forbidden", why));
        }
        let members = self.node.members();
        if let Some(known) = members.iter().find(|member| member.id == peer.id) {
            if known.address == peer.address {
                return Ok(());
            }
            tracing::info!(name = peer.name, from = known.address, to = peer.address, "a server has another address");
            return self.node.set_address(peer.id, peer.address).await.map_err(unchanged);
        }
        tracing::info!(name = peer.name, address = peer.address, "a server joins");
        self.node.add_member(peer).await.map_err(unchanged)
    }

    /// Sends a server away for good.
    ///
    /// # Errors
    /// 503 without a leader; what the consensus engine refuses.
    pub async fn remove(&self, id: u64) -> Result<(), Status> {
        self.node.remove_member(id).await.map_err(unchanged)?;
        let key = Bytes::from(format!("{REMOVED}{}", to_text(id)));
        let note = Op::Put { key, value: Bytes::from_static(b"{}"), lease: 0 };
        let txn = Txn { then: vec![note], ..Txn::default() };
        self.node.txn(txn).await.map(drop).map_err(|error| Status::unavailable(error.to_string()))
    }

    /// Whether a server was sent away.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn is_removed(&self, id: u64) -> Result<bool, Status> {
        let key = format!("{REMOVED}{}", to_text(id));
        Ok(self.node.store().get(key.as_bytes()).map_err(Status::internal)?.is_some())
    }
}

/// What a refused change of the membership means to whoever asked for it.
fn unchanged(error: MembershipError) -> Status {
    let text = super::explain(&error);
    match error {
        MembershipError::Taken { .. } => Status::new(StatusCode::CONFLICT, "AlreadyExists", text),
        MembershipError::NotAMember { .. } => Status::new(StatusCode::NOT_FOUND, "NotFound", text),
        MembershipError::LastMember | MembershipError::WouldLoseQuorum { .. } => {
            Status::new(StatusCode::CONFLICT, "Conflict", text)
        }
        MembershipError::NoLeader | MembershipError::TimedOut | MembershipError::Stopped(_) => {
            Status::unavailable(text)
        }
    }
}

/// The servers that were there when this one last ran: whom a reset must not contradict, and whom to look for.
pub mod remembered {
    use super::{Member, files};
    use std::path::{Path, PathBuf};

    fn path(data_dir: &Path) -> PathBuf {
        data_dir.join("server/members.json")
    }

    /// Reads them; none when there is no such file or it is damaged.
    pub fn read(data_dir: &Path) -> Vec<Member> {
        let bytes = std::fs::read(path(data_dir)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Keeps them.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(data_dir: &Path, members: &[Member]) -> Result<(), crate::auth::pki::PkiError> {
        let bytes = serde_json::to_vec_pretty(members).unwrap_or_default();
        files::write_if_changed(&path(data_dir), &bytes, 0o600)
    }
}

/// Keeps [`remembered`] equal to the membership.
pub fn remember(cluster: &Cluster, data_dir: &Path) {
    let members = cluster.members();
    if members.is_empty() {
        return;
    }
    if let Err(error) = remembered::write(data_dir, &members) {
        tracing::warn!(error = super::explain(&error), "noting the servers of the cluster");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_sixteen_digits() {
        assert_eq!(from_text(&to_text(0xab)), Some(0xab));
        for bad in ["", "ab", "00000000000000zz", "+000000000000001"] {
            assert_eq!(from_text(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_members_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        assert!(remembered::read(dir.path()).is_empty());
        let members = vec![Member::new(1, "n1", "10.0.0.1:6443")];
        remembered::write(dir.path(), &members).unwrap();
        assert_eq!(remembered::read(dir.path()), members);
    }
}
