//! The sealed record of the cluster's keys in the replicated store, outside of anything the API can address.

use super::{ClusterKey, ClusterKeys, PkiError};
use bytes::Bytes;
use coracle_store::{Compare, Op, Txn};
use std::time::SystemTime;

/// Where the record lies.
pub const KEYS_RECORD: &str = "/coracle/keys";

/// Opens the cluster's keys; the first server of a new cluster makes them. Of several servers doing so at once exactly
/// one wins, and the others use its keys.
pub async fn load_or_create(
    node: &coracle_raft::Node,
    cluster_key: &ClusterKey,
    now: SystemTime,
) -> Result<ClusterKeys, PkiError> {
    node.read_barrier().await.map_err(PkiError::Propose)?;
    if let Some(keys) = load(node, cluster_key)? {
        return Ok(keys);
    }
    let keys = ClusterKeys::generate(now)?;
    let sealed = cluster_key.seal(KEYS_RECORD, &keys.to_record()?)?;
    let key = Bytes::from_static(KEYS_RECORD.as_bytes());
    let txn = Txn {
        compare: vec![Compare::ModRevision { key: key.clone(), equals: 0 }],
        then: vec![Op::Put { key, value: sealed.into(), lease: 0 }],
        or_else: vec![],
    };
    if node.txn(txn).await.map_err(PkiError::Propose)?.succeeded {
        tracing::info!("cluster keys created");
        return Ok(keys);
    }
    load(node, cluster_key)?.ok_or(PkiError::BadAuthority)
}

fn load(node: &coracle_raft::Node, cluster_key: &ClusterKey) -> Result<Option<ClusterKeys>, PkiError> {
    let Some(row) = node.store().get(KEYS_RECORD.as_bytes()).map_err(PkiError::Store)? else {
        return Ok(None);
    };
    ClusterKeys::from_record(&cluster_key.open(KEYS_RECORD, &row.value)?).map(Some)
}
