//! The sealed record of the cluster's keys in the replicated store, outside of anything the API can address, and its copy under
//! the data dir: a server needs its keys to talk to the others, before it knows what they have agreed on.

use super::{ClusterKey, ClusterKeys, PkiError, files};
use bytes::Bytes;
use coracle_store::{Compare, Op, Store, Txn};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Where the record lies.
pub const KEYS_RECORD: &str = "/coracle/keys";
/// Attempts at changing the record when others change it too.
const ATTEMPTS: usize = 5;

/// The copy under the data dir; sealed as in the store.
pub fn cache_path(data_dir: &Path) -> PathBuf {
    data_dir.join("server/keys.sealed")
}

/// Keeps a copy of the sealed record.
pub fn write_cache(data_dir: &Path, sealed: &[u8]) -> Result<(), PkiError> {
    files::write_if_changed(&cache_path(data_dir), sealed, 0o600)
}

/// What the copy holds; none when there is no copy.
pub fn read_cache(data_dir: &Path, cluster_key: &ClusterKey) -> Result<Option<ClusterKeys>, PkiError> {
    let path = cache_path(data_dir);
    match std::fs::read(&path) {
        Ok(sealed) => open(cluster_key, &sealed).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::File { path, source }),
    }
}

/// Opens a sealed record.
pub fn open(cluster_key: &ClusterKey, sealed: &[u8]) -> Result<ClusterKeys, PkiError> {
    ClusterKeys::from_record(&cluster_key.open(KEYS_RECORD, sealed)?)
}

/// Seals a record.
pub fn seal(cluster_key: &ClusterKey, keys: &ClusterKeys) -> Result<Vec<u8>, PkiError> {
    cluster_key.seal(KEYS_RECORD, &keys.to_record()?)
}

/// The sealed record as this server's store has it.
pub fn sealed(store: &Store) -> Result<Option<Bytes>, PkiError> {
    Ok(store.get(KEYS_RECORD.as_bytes()).map_err(PkiError::Store)?.map(|row| row.value))
}

/// The keys as this server's store has them.
pub fn load(store: &Store, cluster_key: &ClusterKey) -> Result<Option<ClusterKeys>, PkiError> {
    sealed(store)?.map(|sealed| open(cluster_key, &sealed)).transpose()
}

/// Makes the keys of a new cluster, unless they are there.
pub async fn create(
    node: &coracle_raft::Node,
    cluster_key: &ClusterKey,
    now: SystemTime,
) -> Result<ClusterKeys, PkiError> {
    let keys = ClusterKeys::generate(now)?;
    if write(node, cluster_key, &keys, 0).await? {
        tracing::info!("cluster keys created");
        return Ok(keys);
    }
    load(node.store(), cluster_key)?.ok_or(PkiError::BadAuthority)
}

/// Gives both join tokens new secrets. Nothing else changes, so nothing restarts.
pub async fn rotate_secrets(node: &coracle_raft::Node, cluster_key: &ClusterKey) -> Result<(), PkiError> {
    for _ in 0..ATTEMPTS {
        node.read_barrier().await.map_err(PkiError::Propose)?;
        let row = node.store().get(KEYS_RECORD.as_bytes()).map_err(PkiError::Store)?.ok_or(PkiError::BadAuthority)?;
        let mut keys = open(cluster_key, &row.value)?;
        keys.renew_secrets()?;
        if write(node, cluster_key, &keys, row.mod_revision).await? {
            return Ok(());
        }
    }
    Err(PkiError::Busy)
}

/// Writes the record over the one of `revision`; false when that is no longer the newest.
async fn write(
    node: &coracle_raft::Node,
    cluster_key: &ClusterKey,
    keys: &ClusterKeys,
    revision: u64,
) -> Result<bool, PkiError> {
    let sealed = seal(cluster_key, keys)?;
    let key = Bytes::from_static(KEYS_RECORD.as_bytes());
    let txn = Txn {
        compare: vec![Compare::ModRevision { key: key.clone(), equals: revision }],
        then: vec![Op::Put { key, value: sealed.into(), lease: 0 }],
        or_else: vec![],
    };
    Ok(node.txn(txn).await.map_err(PkiError::Propose)?.succeeded)
}
