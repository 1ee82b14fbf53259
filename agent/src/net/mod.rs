//! The node's network: pod attachment, addresses, the way to other nodes' pods, and the service proxy over nftables.
//!
//! The runtime sees [`PodNetwork`]; the kubelet starts it all and tells the node's pod ranges.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`config`] | [`NetworkConfig`]: what a node's network is told once |
//! | [`network`] | [`Network`]: the handle behind [`PodNetwork`] |
//! | [`host`] | forwarding, the route to Services, the DNS address |
//! | [`sysctl`] | changed kernel settings and what they were |
//! | [`ipam`] | pod addresses and attachments on disk |
//! | [`attach`] | one pod's veth pair |
//! | [`nodes`] | what is kept of Node objects |
//! | [`overlay`] | the way to pods of other nodes |
//! | [`proxy`] | Services and EndpointSlices to nftables |
//! | [`nft`] | nftables transactions |
//! | [`netlink`] | sockets, messages, links, routes, conntrack |
//! | `feed` | one watch per collection for all who follow it |
//! | [`recall`] | last known objects on disk, for a start without a server |
//! | `mailbox` | how threads are told things |
//! | `contain` | threads that outlive a panic |
//! | [`names`] | names of links and tables, gateway addresses |
//! | [`teardown`] | what `coracle uninstall` calls |
//! | [`check`] | what the kernel must have |

pub mod attach;
pub mod check;
pub mod config;
mod contain;
mod feed;
pub mod host;
pub mod ipam;
mod mailbox;
pub mod names;
pub mod netlink;
pub mod network;
pub mod nft;
pub mod nodes;
pub mod overlay;
pub mod proxy;
pub mod recall;
pub mod sysctl;
pub mod teardown;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;

use futures::future::BoxFuture;

pub use config::NetworkConfig;
pub use network::{Network, Parts};
pub use overlay::{Backend, BackendError};
pub use teardown::teardown;

/// What the runtime asks for when a sandbox's network namespace exists and is pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodNetworkRequest {
    /// `metadata.uid` of the pod; the key of the attachment.
    pub uid: String,
    /// `metadata.namespace` of the pod.
    pub namespace: String,
    /// `metadata.name` of the pod.
    pub name: String,
    /// Path of the pinned network namespace (a bind mount of `/proc/<pid>/ns/net`).
    pub netns: PathBuf,
    /// `containers[].ports[]` that have a `hostPort`.
    pub host_ports: Vec<HostPort>,
}

/// Transport protocols that a port can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Protocol {
    /// `TCP`, the default.
    #[serde(rename = "TCP")]
    Tcp,
    /// `UDP`.
    #[serde(rename = "UDP")]
    Udp,
    /// `SCTP`.
    #[serde(rename = "SCTP")]
    Sctp,
}

/// One `hostPort` of a container.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostPort {
    /// Transport protocol.
    pub protocol: Protocol,
    /// `hostIP`; `None` (or an unspecified address) means every address of the node.
    pub host_ip: Option<IpAddr>,
    /// Port on the node.
    pub host_port: u16,
    /// Port of the container.
    pub container_port: u16,
}

/// Where an attached pod can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodAddresses {
    /// `status.podIPs` in order; the first one is `status.podIP`.
    pub ips: Vec<IpAddr>,
}

/// Joins pods to the network. [`Network`] is the one of nodes; tests of others have fakes.
///
/// Every method is idempotent: `attach` of an attached pod gives the same addresses again (and mends what is
/// missing), `detach` of an unknown pod is no error.
pub trait PodNetwork: Send + Sync {
    /// Gives the namespace an interface, addresses and routes. Waits for the node's pod range when it is not known yet.
    fn attach<'a>(&'a self, request: &'a PodNetworkRequest) -> BoxFuture<'a, Result<PodAddresses, NetworkError>>;

    /// Takes the pod off the network and gives its addresses back. The namespace may be gone already.
    fn detach<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), NetworkError>>;

    /// Detaches every pod that is not in `live`: called once at start, after the runtime has found its sandboxes.
    fn retain<'a>(&'a self, live: &'a BTreeSet<String>) -> BoxFuture<'a, Result<(), NetworkError>>;
}

/// What can go wrong with a pod's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// No pod range came within the time a sandbox may wait.
    #[error("the node has no pod CIDR yet")]
    NoPodCidr,
    /// Every address of the node's range is taken.
    #[error("no free address in {range}")]
    Exhausted {
        /// The range that is full.
        range: ipnet::IpNet,
    },
    /// The namespace could not be opened or entered.
    #[error("cannot enter network namespace {path}")]
    Namespace {
        /// Path of the namespace.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused a step.
    #[error("cannot {step}")]
    Kernel {
        /// What was being done.
        step: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// A file below the agent's data directory could not be read or written.
    #[error("cannot {step} {path}")]
    Storage {
        /// `read`, `write` or `remove`.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// An error with its causes.
pub(crate) fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
