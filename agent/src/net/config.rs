//! What a node's network is told once, at start.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use super::overlay::Backend;

/// Configuration of the node's network. The node's own pod ranges are not here: they come from `Node.spec.podCIDRs`
/// after registration.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// First 8 hex digits of the SHA-256 of the canonical data directory; names links and tables.
    pub instance_id: String,
    /// `DATA/agent`; addresses are kept in `ipam/` below it, changed sysctls in `sysctl.json`.
    pub agent_dir: PathBuf,
    /// Name of the Node object.
    pub node_name: String,
    /// Addresses of the node, at most one per family, the primary family first.
    pub node_ips: Vec<IpAddr>,
    /// `--cluster-cidr`: where all pods of the cluster live, at most one per family.
    pub cluster_cidrs: Vec<IpNet>,
    /// `--service-cidr`, at most one per family.
    pub service_cidrs: Vec<IpNet>,
    /// `--cluster-dns`, at most one per family.
    pub cluster_dns: Vec<IpAddr>,
    /// The host's resolver configuration: where the DNS responder asks for other names.
    pub resolv_conf: PathBuf,
    /// `--cluster-domain`, without a final dot.
    pub cluster_domain: String,
    /// `--flannel-backend`: how pods of different nodes reach each other.
    pub backend: Backend,
}
