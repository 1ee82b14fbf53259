//! Images: what is in the store, what a reference means, import of archives.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`reference`] | names of images and how short ones are completed |
//! | [`archive`] | reading OCI layouts and docker archives |
//! | [`config`] | reading an image's configuration |
//! | [`unpack`] | one layer's tar into one folder, whiteouts included, nothing outside of it |
//! | [`store`] | the content-addressed store, root filesystems of containers |
//! | [`builtin`] | the image inside the program |
//! | [`command`] | what `coracle images` does |
//! | [`folder`] | the watched folder of archives |

pub mod archive;
mod builtin;
pub mod command;
pub mod config;
pub mod folder;
pub mod reference;
pub mod store;
pub mod unpack;

pub use folder::watch_folder;
pub use reference::Reference;
pub use store::{BUILTIN_PREFIX, ImageStore};

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// What an [`Images`] call answers with.
pub type ImageResult<T> = Result<T, ImageError>;

/// Why an image is not to be had. [`ImageError::reason`] is the container's waiting reason.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Not in the store, and `imagePullPolicy: Never` forbids fetching it.
    #[error("Container image {image:?} is not present with pull policy of Never")]
    NeverPull { image: String },
    /// Fetching it failed; the text says why.
    #[error("failed to pull image {image:?}: {why}")]
    Pull { image: String, why: String },
    /// The reference does not follow the grammar of image names.
    #[error("Failed to apply default image tag {image:?}: couldn't parse image name {image:?}: {why}")]
    InvalidName { image: String, why: &'static str },
    /// No such image.
    #[error("image {0:?} not found")]
    NotFound(String),
    /// An archive, manifest, configuration or layer is damaged or not what it claims to be.
    #[error("{what}: {why}")]
    Damaged { what: String, why: String },
    /// Reading or writing the store failed.
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
}

impl ImageError {
    /// The reason as upstream spells it in `state.waiting.reason`.
    pub fn reason(&self) -> &'static str {
        match self {
            ImageError::NeverPull { .. } => "ErrImageNeverPull",
            ImageError::InvalidName { .. } => "InvalidImageName",
            ImageError::Damaged { .. } | ImageError::Io { .. } => "ImageInspectError",
            ImageError::Pull { .. } | ImageError::NotFound(_) => "ErrImagePull",
        }
    }
}

/// `imagePullPolicy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PullPolicy {
    Always,
    #[default]
    IfNotPresent,
    Never,
}

/// An image in the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Image {
    /// Digest of its configuration, `sha256:…`.
    pub id: String,
    /// Full names with tags, `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// Full names with digests, `docker.io/library/busybox@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Bytes of the unpacked layers.
    pub size: u64,
    /// Never removed by garbage collection (`coracle.local/*`).
    pub pinned: bool,
    pub config: ImageConfig,
}

impl Image {
    /// What `status.containerStatuses[].imageID` shows: the first digest reference, else the id.
    pub fn reference(&self) -> &str {
        self.repo_digests.first().map_or(&self.id, |digest| digest)
    }
}

/// The part of an image's configuration that running it needs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group`, `uid:gid`; empty is root.
    pub user: String,
    pub env: Vec<String>,
    pub entrypoint: Vec<String>,
    pub cmd: Vec<String>,
    pub working_dir: String,
    pub stop_signal: String,
    pub volumes: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

impl ImageConfig {
    /// The user as a number when it is written as one (CRI's `uid`), for the kubelet's `runAsNonRoot` check.
    pub fn uid(&self) -> Option<i64> {
        let user = self.user.split(':').next().unwrap_or("");
        if user.is_empty() { Some(0) } else { user.parse().ok() }
    }

    /// The user's name when it is not a number (CRI's `username`).
    pub fn username(&self) -> &str {
        if self.uid().is_some() { "" } else { self.user.split(':').next().unwrap_or("") }
    }
}

/// What an import did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imported {
    pub archive: PathBuf,
    /// Names (or ids of nameless images) that now are in the store.
    pub names: Vec<String>,
}

/// The images of a node. Calls may run in parallel.
pub trait Images: Send + Sync + 'static {
    fn list(&self) -> BoxFuture<'_, ImageResult<Vec<Image>>>;

    /// Looks an image up by any name, digest reference or id (also a unique prefix of at least 12 digits).
    fn status<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, ImageResult<Option<Image>>>;

    /// Makes sure that the image is there, as the policy says. What is not there fails with
    /// [`ImageError::NeverPull`] or [`ImageError::Pull`]; `coracle.local/*` is there whatever the policy.
    fn resolve<'a>(&'a self, reference: &'a str, policy: PullPolicy) -> BoxFuture<'a, ImageResult<Image>>;

    /// Imports an archive (OCI layout or docker; tar, gzip or zstd; one or many images). All or nothing per image.
    fn import<'a>(&'a self, archive: &'a Path) -> BoxFuture<'a, ImageResult<Imported>>;

    /// Removes a name, or by id the whole image with all its names. Layers that nothing uses any more go, too.
    /// An image used by a container stays on disk until the container is removed.
    fn remove<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, ImageResult<()>>;
}

/// The asynchronous face of an [`ImageStore`].
#[derive(Clone)]
pub struct LocalImages(pub Arc<ImageStore>);

impl LocalImages {
    fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ImageStore) -> ImageResult<T> + Send + 'static,
    ) -> BoxFuture<'static, ImageResult<T>> {
        let store = self.0.clone();
        Box::pin(async move {
            tokio::task::spawn_blocking(move || work(&store)).await.unwrap_or_else(|error| {
                Err(ImageError::Io { what: "image store".to_owned(), source: std::io::Error::other(error) })
            })
        })
    }
}

impl Images for LocalImages {
    fn list(&self) -> BoxFuture<'_, ImageResult<Vec<Image>>> {
        Box::pin(std::future::ready(self.0.list()))
    }

    fn status<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, ImageResult<Option<Image>>> {
        Box::pin(std::future::ready(self.0.find(reference)))
    }

    fn resolve<'a>(&'a self, reference: &'a str, policy: PullPolicy) -> BoxFuture<'a, ImageResult<Image>> {
        Box::pin(std::future::ready(self.0.resolve(reference, policy)))
    }

    fn import<'a>(&'a self, archive: &'a Path) -> BoxFuture<'a, ImageResult<Imported>> {
        let archive = archive.to_owned();
        self.blocking(move |store| store.import(&archive))
    }

    fn remove<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, ImageResult<()>> {
        let reference = reference.to_owned();
        self.blocking(move |store| store.remove(&reference))
    }
}
