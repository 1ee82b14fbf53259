//! Everything a node runs: kubelet, container runtime, images, volumes, pod network, service proxy and DNS.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | [`run`]: puts the parts below together |
//! | [`config`] | [`AgentConfig`], what the command line decided for this node |
//! | [`instance`] | the names that keep two instances on one machine apart |
//! | [`node_link`] | how the API server reaches the node's HTTP service without a port |
//! | [`kubelet`] | node registration, one task per pod, status, probes, the node's HTTP API |
//! | [`volume`] | what is mounted into containers |
//! | [`runtime`] | the container runtime: CRI-shaped trait and the embedded one behind it (shim per pod) |
//! | [`image`] | content store, unpacking, import |
//! | [`net`] | pod attachment, addresses, service proxy over nftables |
//! | [`dns`] | the cluster DNS responder |
//! | [`memory`] | settings of the allocator |
//! | [`watch`] | list and watch of a collection as raw bytes, for all of the above |

pub mod agent;
pub mod config;
pub mod dns;
pub mod image;
pub mod instance;
pub mod kubelet;
pub mod memory;
pub mod net;
pub mod node_link;
pub mod runtime;
pub mod volume;
pub mod watch;

pub use agent::{AgentError, run};
pub use config::AgentConfig;
pub use node_link::{NodeLink, NodeLinkListener, node_link};
