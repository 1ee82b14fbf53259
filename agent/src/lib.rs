//! Everything a node runs: kubelet, container runtime, images, volumes, pod network, service proxy and DNS.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`agent`] | [`run`]: puts the parts below together |
//! | [`config`] | [`AgentConfig`], what the command line decided for this node |
//! | [`instance`] | the names that keep two instances on one machine apart |
//! | [`join`] | becoming a member: token, client certificate, renewal |
//! | [`servers`] | the servers of the cluster: where they are, connections to them, the API over whichever is well |
//! | [`link`] | how servers reach the node's HTTP service without a port |
//! | [`kubelet`] | node registration, one task per pod, status, probes, the node's HTTP API |
//! | [`volume`] | what is mounted into containers |
//! | [`runtime`] | the container runtime: CRI-shaped trait and the embedded one behind it (shim per pod) |
//! | [`image`] | content store, unpacking, import |
//! | [`net`] | pod attachment, addresses, service proxy over nftables |
//! | [`dns`] | the cluster DNS responder |
//! | [`memory`] | settings of the allocator |
//! | [`websocket`] | the server's side of the handshake |
//! | `files` | files that must be whole or not there |
//! | [`watch`] | list and watch of a collection as raw bytes, for all of the above |

pub mod agent;
pub mod config;
pub mod dns;
mod files;
pub mod image;
pub mod instance;
pub mod join;
pub mod kubelet;
pub mod link;
pub mod memory;
pub mod net;
pub mod runtime;
pub mod servers;
pub mod volume;
pub mod watch;
pub mod websocket;

pub use agent::{Access, AgentError, run};
pub use config::AgentConfig;
pub use link::{NodeLink, NodeLinkListener, node_link};
