//! Everything the command line decided for a server, checked.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::Context;
use coracle_agent::kubelet::addresses::default_addresses;
use coracle_agent::net::Backend;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Taint;

/// Everything the command line decided, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder of all state.
    pub data_dir: PathBuf,
    /// Address to listen on.
    pub bind_address: IpAddr,
    /// Port of the API.
    pub port: u16,
    /// Where pods reach the API; the node's address unless given.
    pub advertise_address: Option<IpAddr>,
    /// More names for the serving certificate.
    pub tls_san: Vec<String>,
    /// A server of the cluster to join, `host:port`.
    pub server: Option<String>,
    /// The token to join with, as given.
    pub token: Option<String>,
    /// Addresses of pods, at most one range per family, the primary family first.
    pub cluster_cidr: Vec<IpNet>,
    /// Addresses of Services, likewise.
    pub service_cidr: Vec<IpNet>,
    /// How pods of different nodes reach each other.
    pub backend: Backend,
    /// Ports of NodePort Services.
    pub node_ports: RangeInclusive<u16>,
    /// Addresses of the cluster DNS, in the families of `service_cidr`.
    pub cluster_dns: Vec<IpAddr>,
    /// DNS domain of the cluster.
    pub cluster_domain: String,
    /// Where the administrator's kubeconfig goes.
    pub kubeconfig: PathBuf,
    /// Its mode.
    pub kubeconfig_mode: u32,
    /// Name of this node.
    pub node_name: String,
    /// Addresses of this node; empty to find them.
    pub node_ips: Vec<IpAddr>,
    /// Labels the node registers with.
    pub node_labels: Vec<(String, String)>,
    /// Taints the node registers with.
    pub node_taints: Vec<Taint>,
    /// The host's resolver file.
    pub resolv_conf: PathBuf,
    /// Run a node.
    pub agent: bool,
    /// Run the DNS responder.
    pub dns: bool,
    /// Run the service proxy.
    pub service_proxy: bool,
    /// Snapshots of the store.
    pub snapshots: Snapshots,
    /// Make this one server a cluster again, then end.
    pub cluster_reset: bool,
    /// A snapshot to begin from when resetting.
    pub restore_path: Option<PathBuf>,
}

/// When snapshots are taken, and where they lie.
#[derive(Debug, Clone)]
pub struct Snapshots {
    /// A cron schedule; none: only on demand.
    pub schedule: Option<String>,
    /// How many scheduled ones are kept.
    pub retention: usize,
    /// The folder.
    pub dir: PathBuf,
}

impl Settings {
    /// The folder of the consensus log.
    pub fn db(&self) -> PathBuf {
        db(&self.data_dir)
    }

    /// Where the listener listens.
    pub fn listen(&self) -> SocketAddr {
        SocketAddr::new(self.bind_address, self.port)
    }

    /// Addresses of this node: the given ones or what is found now.
    pub fn node_ips(&self) -> Vec<IpAddr> {
        if !self.node_ips.is_empty() {
            return self.node_ips.clone();
        }
        let mut found = default_addresses(&self.cluster_cidr, &self.service_cidr);
        if found.is_empty() {
            found.push(IpAddr::from([127, 0, 0, 1]));
        }
        found
    }

    /// The URL that clients on this machine use: loopback unless the server listens on one address only.
    pub fn local_url(&self) -> String {
        let host = match self.bind_address {
            ip if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
            ip => ip,
        };
        format!("https://{}", SocketAddr::new(host, self.port))
    }
}

/// The folder of the consensus log of an instance.
pub fn db(data_dir: &Path) -> PathBuf {
    data_dir.join("server/db")
}

/// Where the command line finds the administrator's credential of an instance.
pub fn admin_kubeconfig(data_dir: &Path) -> PathBuf {
    data_dir.join("server/admin.kubeconfig")
}

/// A symbolic link to the kubeconfig that was written for the user, so that uninstalling finds it.
pub fn user_kubeconfig_link(data_dir: &Path) -> PathBuf {
    data_dir.join("server/user.kubeconfig")
}

/// Points [`user_kubeconfig_link`] at the kubeconfig of these settings.
pub(super) fn remember_kubeconfig(settings: &Settings) -> anyhow::Result<()> {
    let link = user_kubeconfig_link(&settings.data_dir);
    let target = std::path::absolute(&settings.kubeconfig)?;
    if std::fs::read_link(&link).is_ok_and(|known| known == target) {
        return Ok(());
    }
    let _ = std::fs::remove_file(&link);
    std::os::unix::fs::symlink(&target, &link).with_context(|| format!("write {}", link.display()))
}
