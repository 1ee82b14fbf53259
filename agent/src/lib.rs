//! Everything a node runs: kubelet, container runtime, images, volumes, pod network, service proxy and DNS.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | [`AgentConfig`], what the command line decided for this node |
//! | [`instance`] | the names that keep two instances on one machine apart |
//! | [`node_link`] | how the API server reaches the node's HTTP service without a port |
//! | [`kubelet`] | node registration, one task per pod, status, probes, the node's HTTP API |
//! | [`volume`] | what is mounted into containers |
//! | [`runtime`] | the container runtime: CRI-shaped trait and the embedded one behind it (shim per pod) |
//! | [`image`] | content store, unpacking, import |
//! | [`net`] | pod attachment, addresses, service proxy over nftables |
//! | [`dns`] | the cluster DNS responder |
//! | [`watch`] | list and watch of a collection as raw bytes, for all of the above |

pub mod config;
pub mod dns;
pub mod image;
pub mod instance;
pub mod kubelet;
pub mod net;
pub mod node_link;
pub mod runtime;
pub mod volume;
pub mod watch;

pub use config::AgentConfig;
pub use node_link::{NodeLink, NodeLinkListener, node_link};

use tokio_util::sync::CancellationToken;

/// Why the agent could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A folder of the agent could not be made.
    #[error("create {path}")]
    CreateDir {
        /// The folder.
        path: std::path::PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// Runs the node until `shutdown` is cancelled; pods keep running after it returns.
///
/// `client` carries the node's own identity (`system:node:<name>`), `link` is where the API server's requests to the
/// node arrive. A failure of the API server is waited out, never returned.
///
/// # Errors
/// Only what cannot heal by itself: an unusable data directory or a kernel without what containers need.
pub async fn run(
    config: AgentConfig,
    client: kube::Client,
    link: NodeLinkListener,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let _ = (config, client, link);
    shutdown.cancelled().await;
    Ok(())
}
