//! Everything a node runs: kubelet, container runtime, images, volumes, pod network, service proxy and DNS.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`kubelet`] | node registration, one task per pod, status, probes, the node's HTTP API |
//! | [`volume`] | what is mounted into containers |
//! | [`runtime`] | the container runtime: CRI-shaped trait and the embedded one behind it (shim per pod) |
//! | [`image`] | content store, unpacking, import |
//! | [`net`] | pod attachment, addresses, service proxy over nftables |
//! | [`dns`] | the cluster DNS responder |

pub mod dns;
pub mod image;
pub mod kubelet;
pub mod net;
pub mod runtime;
pub mod volume;
