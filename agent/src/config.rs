//! What the command line decided for this node.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Taint;

use crate::net::Backend;

/// The checked configuration of one agent. Values are used as they are; the command line has validated them.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The instance's data directory (`/var/lib/coracle`); the agent's own state lives in `agent/` below it.
    pub data_dir: PathBuf,
    /// `metadata.name` of this node.
    pub node_name: String,
    /// Addresses to register; empty means the address the default route uses, else the first global one.
    pub node_ips: Vec<IpAddr>,
    /// `--node-label`, set when the node registers.
    pub node_labels: Vec<(String, String)>,
    /// `--node-taint`, set when the node registers.
    pub node_taints: Vec<Taint>,
    /// Address ranges of pods, one per family.
    pub cluster_cidr: Vec<IpNet>,
    /// Address ranges of Services, one per family.
    pub service_cidr: Vec<IpNet>,
    /// Addresses of the cluster DNS; the responder binds them and pods get them.
    pub cluster_dns: Vec<IpAddr>,
    /// The DNS domain of the cluster, `cluster.local`.
    pub cluster_domain: String,
    /// The host's resolver configuration, followed by pods with `dnsPolicy: Default` and by the DNS relay.
    pub resolv_conf: PathBuf,
    /// The shim's program; the agent runs it from memory.
    pub shim: &'static [u8],
    /// Program of the built-in image `coracle.local/hello`.
    pub hello: &'static [u8],
    /// How many pods the node admits.
    pub max_pods: u32,
    /// Run the service proxy (`false` with `--disable-kube-proxy`).
    pub service_proxy: bool,
    /// `--flannel-backend`: how pods of different nodes reach each other.
    pub backend: Backend,
    /// Run the DNS responder (`false` with `--disable coredns`).
    pub dns: bool,
}

impl AgentConfig {
    /// Defaults of k3s for everything that has one.
    #[must_use]
    pub fn new(data_dir: PathBuf, node_name: String) -> Self {
        Self {
            data_dir,
            node_name,
            node_ips: Vec::new(),
            node_labels: Vec::new(),
            node_taints: Vec::new(),
            cluster_cidr: "10.42.0.0/16".parse().into_iter().collect(),
            service_cidr: "10.43.0.0/16".parse().into_iter().collect(),
            cluster_dns: vec![IpAddr::from([10, 43, 0, 10])],
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            shim: &[],
            hello: &[],
            max_pods: 110,
            service_proxy: true,
            backend: Backend::default(),
            dns: true,
        }
    }

    /// Where the agent keeps its state.
    #[must_use]
    pub fn agent_dir(&self) -> PathBuf {
        self.data_dir.join("agent")
    }
}
