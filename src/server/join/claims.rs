//! A node's name belongs to the machine that had it first. The machine proves itself by a secret it made; the cluster keeps the
//! secret's hash. A name is free again when its Node object was deleted.

use std::time::Duration;

use bytes::Bytes;
use coracle_store::{Compare, Op, Txn};
use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::apiserver::status::Status;
use crate::auth::bootstrap_token::same;
use crate::auth::objects::{Metadata, Objects};
use crate::auth::pki::seal::to_hex;

/// What the records' keys begin with.
pub const PREFIX: &str = "/coracle/nodes/";
/// So long a machine that was let in may take to register its Node; until then nobody else gets the name.
const GRACE: Duration = Duration::from_secs(300);
/// Bounds on the length of a secret, in bytes.
const LENGTHS: std::ops::RangeInclusive<usize> = 16..=256;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Claim {
    /// SHA-256 of the secret, hexadecimal.
    secret: String,
    /// When the machine was let in.
    at: jiff::Timestamp,
}

/// What is to be done about a claim.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It stands already.
    Known,
    /// It is to be written.
    New,
    /// The name is another machine's.
    Taken,
}

fn hash(secret: &str) -> String {
    to_hex(ring::digest::digest(&ring::digest::SHA256, secret.as_bytes()).as_ref())
}

fn judge(stored: Option<&Claim>, node_exists: bool, secret: &str, now: jiff::Timestamp) -> Verdict {
    match stored {
        None => Verdict::New,
        Some(claim) if same(&claim.secret, &hash(secret)) => Verdict::Known,
        Some(claim) => {
            let fresh = now.duration_since(claim.at).unsigned_abs() < GRACE;
            if node_exists || fresh { Verdict::Taken } else { Verdict::New }
        }
    }
}

/// Claims a node's name for the machine with this secret.
///
/// # Errors
/// 403 when the name is another machine's, 400 for a secret that is none, 503 without a leader.
pub async fn claim(node: &coracle_raft::Node, name: &str, secret: &str) -> Result<(), Status> {
    if !LENGTHS.contains(&secret.len()) {
        return Err(Status::bad_request("nodeSecret: expected 16 to 256 characters"));
    }
    let unavailable = |error: coracle_raft::ProposeError| Status::unavailable(error.to_string());
    node.read_barrier().await.map_err(unavailable)?;
    let objects = Objects::new(node.store().clone());
    let now = jiff::Timestamp::now();
    let key = Bytes::from(format!("{PREFIX}{name}"));
    let row = node.store().get(&key).map_err(Status::internal)?;
    // A record that cannot be read must not give the name away.
    let stored: Option<Claim> =
        row.as_ref().map(|row| serde_json::from_slice(&row.value)).transpose().map_err(Status::internal)?;
    let exists = objects.get::<Metadata>("", "nodes", "", name).map_err(Status::internal)?.is_some();
    let taken = || {
        let why = format!(
            "the node name {name:?} belongs to another machine: choose another --node-name, or delete that node \
             (kubectl delete node {name}) if the machine is gone"
        );
        Status::new(StatusCode::FORBIDDEN, "Forbidden", why)
    };
    match judge(stored.as_ref(), exists, secret, now) {
        Verdict::Known => return Ok(()),
        Verdict::Taken => return Err(taken()),
        Verdict::New => {}
    }
    let value = serde_json::to_vec(&Claim { secret: hash(secret), at: now }).map_err(Status::internal)?;
    let txn = Txn {
        compare: vec![Compare::ModRevision { key: key.clone(), equals: row.map_or(0, |row| row.mod_revision) }],
        then: vec![Op::Put { key, value: value.into(), lease: 0 }],
        or_else: vec![],
    };
    // Somebody else was faster with this very name.
    if node.txn(txn).await.map_err(unavailable)?.succeeded { Ok(()) } else { Err(taken()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stays_with_its_machine_until_the_node_is_deleted() {
        let now: jiff::Timestamp = "2026-01-01T01:00:00Z".parse().unwrap();
        let claim = |at: &str| Claim { secret: hash("mine"), at: at.parse().unwrap() };
        let old = claim("2026-01-01T00:00:00Z");
        assert_eq!(judge(None, false, "mine", now), Verdict::New);
        assert_eq!(judge(Some(&old), true, "mine", now), Verdict::Known);
        assert_eq!(judge(Some(&old), true, "other", now), Verdict::Taken);
        assert_eq!(judge(Some(&old), false, "other", now), Verdict::New);
        let fresh = claim("2026-01-01T00:59:00Z");
        assert_eq!(judge(Some(&fresh), false, "other", now), Verdict::Taken, "it may still be registering");
    }
}
