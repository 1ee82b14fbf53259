//! The keys of the cluster as a running server has them: opened from the store or its copy on disk, and what is written under
//! the data dir kept equal to the record while servers change it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use coracle_store::{Store, WatchRequest, prefix_end};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use crate::auth::pki::{CLUSTER_KEY, ClusterKey, ClusterKeys, PkiError, files, record};

/// Pause before a watch that ended begins anew.
const AGAIN: Duration = Duration::from_millis(500);

/// The cluster key and what it opens.
#[derive(Clone)]
pub struct Keyring {
    /// Seals the record.
    pub cluster_key: Arc<ClusterKey>,
    /// Authorities and signing keys; the secrets of the tokens in here are those of the start, see [`Keyring::current`].
    pub keys: Arc<ClusterKeys>,
    store: Store,
    data_dir: PathBuf,
    /// One writer of the files at a time.
    writing: Arc<Mutex<()>>,
}

impl Keyring {
    /// What the copy on disk holds, for a server that has no store yet.
    ///
    /// # Errors
    /// The copy is there and cannot be opened.
    pub fn cached(data_dir: &Path) -> Result<Option<ClusterKeys>, PkiError> {
        match ClusterKey::load(&data_dir.join(CLUSTER_KEY))? {
            Some(key) => record::read_cache(data_dir, &key),
            None => Ok(None),
        }
    }

    /// Opens the record of this server's store, else the copy, else makes the keys of a new cluster.
    ///
    /// # Errors
    /// They cannot be opened, or not be stored.
    pub async fn open(data_dir: &Path, node: &coracle_raft::Node) -> Result<Keyring, PkiError> {
        let cluster_key = ClusterKey::load_or_create(&data_dir.join(CLUSTER_KEY))?;
        let keys = match record::load(node.store(), &cluster_key)? {
            Some(keys) => keys,
            None => match record::read_cache(data_dir, &cluster_key)? {
                Some(keys) => keys,
                None => record::create(node, &cluster_key, SystemTime::now()).await?,
            },
        };
        Ok(Keyring {
            cluster_key: Arc::new(cluster_key),
            keys: Arc::new(keys),
            store: node.store().clone(),
            data_dir: data_dir.to_owned(),
            writing: Arc::default(),
        })
    }

    /// The keys with the secrets that are good now.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn current(&self) -> Result<ClusterKeys, PkiError> {
        record::load(&self.store, &self.cluster_key)?.ok_or(PkiError::BadAuthority)
    }

    /// The sealed record, for a server that joins.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn sealed(&self) -> Result<Bytes, PkiError> {
        record::sealed(&self.store)?.ok_or(PkiError::BadAuthority)
    }

    /// Writes tokens, certificates of the authorities and the copy of the record.
    ///
    /// # Errors
    /// The record cannot be read, or a file not be written.
    pub fn write_files(&self) -> Result<(), PkiError> {
        let _turn = self.writing.lock();
        let Some(sealed) = record::sealed(&self.store)? else { return Ok(()) };
        files::write_data_dir(&self.data_dir, &record::open(&self.cluster_key, &sealed)?)?;
        record::write_cache(&self.data_dir, &sealed)
    }

    /// Keeps the files equal to the record until `shutdown`.
    pub async fn follow(self, shutdown: CancellationToken) {
        let key = record::KEYS_RECORD.as_bytes();
        let request = WatchRequest { start: Bytes::from_static(key), end: prefix_end(key), from_revision: None };
        loop {
            // The watch begins before the look, so that no change falls between them.
            let watcher = self.store.watch(request.clone());
            let ring = self.clone();
            match tokio::task::spawn_blocking(move || ring.write_files()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(error = super::explain(&error), "writing tokens and certificates"),
                Err(error) => tracing::error!(%error, "writing tokens and certificates"),
            }
            let changed = async {
                match watcher {
                    Ok(mut watcher) => watcher.next().await.is_ok(),
                    Err(_) => false,
                }
            };
            let Some(changed) = shutdown.run_until_cancelled(changed).await else { return };
            if !changed && shutdown.run_until_cancelled(tokio::time::sleep(AGAIN)).await.is_none() {
                return;
            }
        }
    }
}
