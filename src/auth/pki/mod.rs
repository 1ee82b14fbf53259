//! Keys and certificates of the cluster.
//!
//! Three authorities (server, client, request-header), the service-account signing key and the two join tokens are one
//! system record, sealed with the cluster key that every server holds on disk. Leaves live a year and are made anew
//! by each process, in process; nothing on disk is needed to renew them.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`authority`] | [`Authority`]: a CA that issues leaves |
//! | [`cluster_keys`] | [`ClusterKeys`]: everything secret the cluster shares, and its record form |
//! | [`seal`] | [`ClusterKey`]: the AEAD key in `DATA/server/cluster.key` |
//! | [`record`] | the sealed record in the store and its copy on disk |
//! | [`server_leaf`] | the listener's certificate, swapped while connections live |
//! | [`files`] | what is written under the data dir: CA copies, tokens, kubeconfigs |
//! | [`server_name`] | the names of servers among themselves |
//! | [`join_token`] | `K10<hash>::<user>:<secret>` |
//! | [`sign`] | certificates for the keys of others |
//! | [`clock`] | waits out a clock that cannot be right |

pub mod authority;
pub mod clock;
pub mod cluster_keys;
pub mod files;
pub mod join_token;
pub mod record;
pub mod seal;
pub mod server_leaf;
pub mod server_name;
pub mod sign;

pub use authority::{Authority, Leaf, LeafRequest, Usage};
pub use cluster_keys::ClusterKeys;
pub use join_token::JoinToken;
pub use seal::ClusterKey;
pub use server_leaf::ServerLeaf;

/// Where the cluster key lies under the data dir.
pub const CLUSTER_KEY: &str = "server/cluster.key";

/// What can go wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("making or reading a certificate")]
    Certificate(#[source] rcgen::Error),
    #[error("the certificate of an authority cannot be parsed")]
    BadAuthority,
    #[error("a key was refused")]
    BadKey,
    #[error("the system's random number generator failed")]
    Random,
    #[error("accessing {}", path.display())]
    File {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not a cluster key (64 hexadecimal digits): restore it from a backup or another server", .0.display())]
    BadClusterKey(std::path::PathBuf),
    #[error(
        "the cluster's keys cannot be opened with {}: restore that file from a backup or another server of this cluster",
        .0.display()
    )]
    WrongClusterKey(std::path::PathBuf),
    #[error("the record of the cluster's keys is not readable")]
    BadRecord(#[source] serde_json::Error),
    #[error("reading the cluster's keys")]
    Store(#[source] coracle_store::StoreError),
    #[error("storing the cluster's keys")]
    Propose(#[source] coracle_raft::ProposeError),
    #[error("the cluster's keys are being changed by somebody else all the time")]
    Busy,
    #[error("`{0}` is neither a DNS name nor an IP address")]
    BadName(String),
    #[error("the TLS library refused our certificate")]
    Tls(#[source] rustls::Error),
}

impl From<rcgen::Error> for PkiError {
    fn from(error: rcgen::Error) -> PkiError {
        PkiError::Certificate(error)
    }
}
