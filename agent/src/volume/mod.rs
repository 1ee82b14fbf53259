//! Volumes: what is made on the node for a pod's containers to mount.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`pod_volumes`] | [`PodVolumes`]: all volumes of one pod, set up, kept current, torn down |
//! | [`payload`] | the files of configMap, secret, downwardAPI and projected volumes, computed purely |
//! | [`atomic_writer`] | files that change all at once, behind the `..data` link |
//! | [`token`] | service account tokens and their renewal |
//! | [`empty_dir`] | scratch space on disk or in memory |
//! | [`host_path`] | files and folders of the node |
//! | [`persistent`] | claims bound to hostPath and local volumes |
//! | [`ownership`] | fsGroup |
//! | [`subpath`] | one entry of a volume, never anything outside of it |
//!
//! Secrets, tokens and downward API files lie below `/run`, so that they never reach a disk.

pub mod atomic_writer;
pub mod empty_dir;
pub mod host_path;
pub mod ownership;
pub mod payload;
pub mod persistent;
pub mod pod_volumes;
pub mod subpath;
pub mod token;

use std::path::PathBuf;

pub use pod_volumes::{PodVolumes, VolumeHost};

/// Why a volume cannot be mounted. The text follows `MountVolume.SetUp failed for volume "x" : ` in events.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// An object that must exist does not.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap`, `secret`, ...
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// An object lacks a key that is asked for.
    #[error("references non-existent {kind} key: {key}")]
    NoKey {
        /// `config` or `secret`.
        kind: &'static str,
        /// The key.
        key: String,
    },
    /// A downward API field cannot be read.
    #[error(transparent)]
    Field(#[from] crate::kubelet::field_ref::FieldError),
    /// A hostPath is not of its type, or a path leads out of its volume.
    #[error("{0}")]
    Invalid(String),
    /// The node cannot do this kind of volume.
    #[error("{0} is not supported by this node")]
    Unsupported(String),
    /// The API could not be asked or said no.
    #[error(transparent)]
    Api(#[from] crate::kubelet::api::ApiError),
    /// The file system said no.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

impl VolumeError {
    /// Nobody who can decide has answered.
    pub(crate) fn is_no_answer(&self) -> bool {
        matches!(self, Self::Api(error) if error.is_no_answer())
    }

    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
