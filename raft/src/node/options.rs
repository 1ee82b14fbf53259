//! How a node is started, and why it couldn't be.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::peers::Dial;
use crate::snapshot::SnapshotError;
use crate::view::{Backend, ViewError};
use crate::wal::WalError;

/// How to start a [`crate::Node`].
#[derive(Clone)]
pub struct Options {
    /// Directory of everything durable; made with mode 0700.
    pub data_dir: PathBuf,
    /// Where the state lives.
    pub backend: Backend,
    /// What people call this member.
    pub name: String,
    /// `host:port` (an IP literal) at which peers reach this member.
    pub address: String,
    /// How peers are reached; None for a cluster that never has more than one member.
    pub dial: Option<Arc<dyn Dial>>,
    /// With an empty data directory: wait to be added to a cluster ([`crate::Node::add_member`]) instead of founding one.
    pub join: bool,
    /// Bytes of a log segment; None chooses by the size of the disk.
    pub segment_size: Option<u64>,
    /// Bytes of log after which a snapshot is written (more when the state itself is larger).
    pub snapshot_distance: u64,
    /// Bytes of log that are kept behind a snapshot while there are peers, so that one that was away for a short time
    /// needs no snapshot.
    pub log_kept: u64,
    /// How often history is compacted; as much of it is kept.
    pub compaction_interval: Duration,
    /// The kernel's id of this boot, by which a state left by a killed process is told from one left by a power cut;
    /// None asks the kernel. For tests of power cuts.
    pub boot_id: Option<String>,
}

impl Options {
    /// sled with a page cache of 32 MiB, history of five minutes.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Options {
            data_dir: data_dir.into(),
            backend: Backend::Sled { cache_capacity: 32 << 20 },
            name: String::new(),
            address: String::new(),
            dial: None,
            join: false,
            segment_size: None,
            snapshot_distance: 32 << 20,
            log_kept: 16 << 20,
            compaction_interval: Duration::from_secs(300),
            boot_id: None,
        }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("data_dir", &self.data_dir)
            .field("name", &self.name)
            .field("address", &self.address)
            .field("join", &self.join)
            .finish_non_exhaustive()
    }
}

/// A node couldn't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The data directory can't be used.
    #[error("{action} in the data directory {}", path.display())]
    DataDir {
        /// What was being done.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Another process works in it.
    #[error("the data directory {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// A restore, a reset or the like was cut off; it has to be done again.
    #[error("{what} was not finished in the data directory {}: do it again", path.display())]
    Unfinished {
        /// What was.
        what: String,
        /// The directory.
        path: PathBuf,
    },
    /// The log can't be read.
    #[error("opening the log")]
    Wal(#[from] WalError),
    /// The snapshot can't be read.
    #[error("opening the snapshot")]
    Snapshot(#[from] SnapshotError),
    /// The state can't be opened or rebuilt.
    #[error("opening the state")]
    View(#[from] ViewError),
    /// The consensus engine stopped.
    #[error("starting consensus: {0}")]
    Engine(String),
}
