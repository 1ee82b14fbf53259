//! `coracle agent`: a node without a server in its process.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use coracle_agent::join::{Membership, Token, Wish};
use coracle_agent::servers::Pool;
use coracle_agent::{Access, AgentConfig};
use k8s_openapi::api::core::v1::Taint;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::server::lock;

/// Everything the command line decided, checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Folder of all state.
    pub data_dir: PathBuf,
    /// `host:port` of a server; may be missing once the node has joined.
    pub server: Option<String>,
    /// What the node joins with; may be missing once it has.
    pub token: Option<Token>,
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
    /// Run the DNS responder.
    pub dns: bool,
    /// Run the service proxy.
    pub service_proxy: bool,
}

/// Runs a node until SIGTERM or SIGINT; its pods go on.
///
/// # Errors
/// What does not heal by itself: a refusal by the cluster, an unusable data directory, a kernel that lacks something.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _lock = lock::DataDirLock::take(&settings.data_dir)?;
    let shutdown = CancellationToken::new();
    let stop = shutdown.clone();
    let signals = tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; pods go on");
        stop.cancel();
    });
    let outcome = Box::pin(run_until(settings, shutdown.clone())).await;
    shutdown.cancel();
    signals.abort();
    outcome
}

async fn run_until(settings: Settings, shutdown: CancellationToken) -> anyhow::Result<()> {
    let mut config = AgentConfig::new(settings.data_dir, settings.node_name.clone());
    let wish = Wish {
        server: settings.server,
        token: settings.token,
        node_name: settings.node_name,
        agent_dir: config.agent_dir(),
        resolv_conf: settings.resolv_conf.clone(),
    };
    // First of all: who doesn't listen to the signal is ended by it.
    let (tasks, rotate) = (TaskTracker::new(), Arc::new(Notify::new()));
    tasks.spawn(rotate_when_asked(rotate.clone(), shutdown.clone())?);
    let membership = match Membership::open(wish, &shutdown).await {
        Ok(membership) => membership,
        Err(coracle_agent::join::MembershipError::Stopped) => return Ok(()),
        Err(error) => return Err(error).context("join the cluster"),
    };
    let cluster = membership.settings.clone();
    config.cluster_cidr = cluster.cluster_cidrs;
    config.service_cidr = cluster.service_cidrs;
    config.cluster_dns = cluster.cluster_dns;
    config.backend = cluster.flannel_backend;
    config.cluster_domain = cluster.cluster_domain;
    config.node_ips = settings.node_ips;
    config.node_labels = settings.node_labels;
    config.node_taints = settings.node_taints;
    config.resolv_conf = settings.resolv_conf;
    config.dns = settings.dns;
    config.service_proxy = settings.service_proxy;
    config.shim = crate::programs::SHIM;
    config.hello = crate::programs::HELLO;

    let servers = membership.servers.clone();
    let pool = Pool::new(servers.clone());
    let client = pool.client();
    tasks.spawn(pool.run(shutdown.clone()));
    tasks.spawn(membership.keep(client.clone(), rotate, shutdown.clone()));
    let access = Access { client, link: None, servers: Some(servers) };
    let outcome = coracle_agent::run(config, access, shutdown.clone()).await.context("run the node");
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
    outcome
}

/// The signal by which `coracle certificate rotate` asks a running agent for another certificate.
pub fn rotate_signal() -> SignalKind {
    SignalKind::user_defined1()
}

fn rotate_when_asked(
    rotate: Arc<Notify>,
    shutdown: CancellationToken,
) -> std::io::Result<impl Future<Output = Option<()>>> {
    let mut asked = signal(rotate_signal())?;
    Ok(shutdown.run_until_cancelled_owned(async move {
        while asked.recv().await.is_some() {
            rotate.notify_one();
        }
    }))
}
