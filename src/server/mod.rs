//! Starts and stops everything a server runs.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`lock`] | one server per data folder |
//! | [`address`] | the address of this machine |
//! | [`identities`] | in-process clients under their own identities |
//! | [`bootstrap`] | what every cluster has from its first second |
//! | [`own_node`] | the agent in this process |
//! | [`upkeep`] | small chores of the leader |
//!
//! # Tasks
//!
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | raft (crate `coracle-raft`) | log and state | first | last |
//! | listener | connections | once the keys are there | with `shutdown`, after draining |
//! | controllers and scheduler | caches, queues | with leadership | with leadership |
//! | agent (crate `coracle-agent`) | the node | when the API is ready inside | with `shutdown`; pods go on |

pub mod address;
pub mod bootstrap;
pub mod identities;
pub mod lock;
pub mod own_node;
pub mod upkeep;

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Taint;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tower::util::BoxCloneSyncService;

use crate::apiserver::{ApiServer, backend::Backend, protocols::{self, Protocols}, service::Parts};
use crate::auth::security::ServingNames;
use crate::auth::{Identity, Security, rbac};
use crate::controllers;
use crate::strategy::service::allocation::ServiceNetwork;

/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long each part may take to end after a signal; the whole must be done within 5 s.
const STOP_PATIENCE: Duration = Duration::from_millis(3500);

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
    /// Addresses of pods.
    pub cluster_cidr: IpNet,
    /// Addresses of Services.
    pub service_cidr: IpNet,
    /// Ports of NodePort Services.
    pub node_ports: RangeInclusive<u16>,
    /// Address of the cluster DNS.
    pub cluster_dns: IpAddr,
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
}

/// Where the command line finds the administrator's credential of an instance.
pub fn admin_kubeconfig(data_dir: &Path) -> PathBuf {
    data_dir.join("server/admin.kubeconfig")
}

/// Runs a server until SIGTERM or SIGINT, or until something happens that it must not survive.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let _lock = lock::DataDirLock::take(&settings.data_dir)?;
    let listen = SocketAddr::new(settings.bind_address, settings.port);
    check_port(listen)?;
    let shutdown = CancellationToken::new();
    let server = Server::start(settings, listen, shutdown.clone()).await?;
    let fatal = server.raft.clone();
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        why = fatal.stopped() => Err(anyhow::anyhow!("the store has stopped: {why}")),
    };
    tracing::info!("stopping; pods go on");
    shutdown.cancel();
    server.stop().await;
    outcome
}

/// An early look, so that a port in use is reported before anything is written.
fn check_port(listen: SocketAddr) -> anyhow::Result<()> {
    match std::net::TcpListener::bind(listen) {
        Ok(_) => Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::AddrInUse => {
            bail!("--https-listen-port {}: {listen} is in use by another program; choose another port", listen.port())
        }
        Err(e) => Err(e).with_context(|| format!("--bind-address {}: cannot listen on {listen}", listen.ip())),
    }
}

struct Server {
    raft: coracle_raft::Node,
    tasks: Vec<(&'static str, tokio::task::JoinHandle<()>)>,
}

impl Server {
    async fn start(settings: Settings, listen: SocketAddr, shutdown: CancellationToken) -> anyhow::Result<Server> {
        let begin = std::time::Instant::now();
        let node_ips = if settings.node_ips.is_empty() { vec![address::detect()] } else { settings.node_ips.clone() };
        let advertise = settings.advertise_address.unwrap_or(node_ips[0]);
        let raft = coracle_raft::Node::start(coracle_raft::Options {
            address: SocketAddr::new(advertise, settings.port).to_string(),
            ..coracle_raft::Options::new(settings.data_dir.join("server/db"))
        })
        .await
        .context("start the store")?;
        let (clock_state, clock_problem) = tokio::sync::watch::channel(None);
        let security = Security::open(&raft, &settings.data_dir, &settings.cluster_domain, &clock_state).await;
        let security = security.context("open the keys of the cluster")?;
        let network = ServiceNetwork { range: settings.service_cidr, node_ports: settings.node_ports.clone() };
        let service_ip = network.first();
        let address = SocketAddr::new(advertise, settings.port).to_string();
        let api = ApiServer::new(Parts {
            backend: Backend::new(raft.store().clone(), Arc::new(raft.clone())),
            authorizer: security.authorizer.clone(),
            admission: security.admission.clone(),
            address: address.clone(),
            services: network,
            shutdown: shutdown.clone(),
        });
        security.attach(&api, &address);
        let started = Arc::new(AtomicBool::new(false));
        add_health_checks(&api, &raft, &started, clock_problem);

        let protocols = Protocols::default();
        protocols.on(protocols::LINK, api.links().handler());
        let mut addresses = node_ips.clone();
        addresses.extend([advertise, settings.bind_address, service_ip]);
        let names = ServingNames {
            cluster_domain: &settings.cluster_domain,
            node_name: &settings.node_name,
            server_id: raft.id(),
            addresses: &addresses,
            configured: &settings.tls_san,
        };
        let listener = security.listen(listen, &names, protocols, &shutdown).await?;
        let service = BoxCloneSyncService::new(api.clone());
        let mut tasks = vec![("listener", tokio::spawn(listener.serve(service, shutdown.clone())))];

        let own = crate::apiserver::client(&api, Identity::apiserver());
        bootstrap::namespaces(&own).await?;
        rbac::bootstrap::reconcile(&own).await.context("write the bootstrap policy")?;
        bootstrap::ensure(&own, &settings, advertise, service_ip).await?;
        write_kubeconfigs(&settings, &security, listen)?;

        tasks.push((
            "controllers",
            controllers::spawn_all(controllers::Context {
                client_for: identities::client_for(&api),
                leadership: raft.leadership(),
                cluster_cidrs: vec![settings.cluster_cidr],
                root_ca_pem: security.keys.server_ca.certificate_pem().into(),
                shutdown: shutdown.clone(),
            }),
        ));
        tasks.push(("certificate signer", security.spawn_signer(&api, raft.leadership(), &shutdown)));
        tasks.push(("upkeep", tokio::spawn(upkeep::run(api.clone(), raft.leadership(), shutdown.clone()))));
        if settings.agent {
            tasks.push(("agent", own_node::start(&api, &security, &settings, node_ips, &address, &shutdown)));
        }
        started.store(true, Ordering::Release);
        tracing::info!(address = %listen, milliseconds = begin.elapsed().as_millis() as u64, "the API is ready");
        Ok(Server { raft, tasks })
    }

    /// Waits for every task, a bounded time in all, then closes the store.
    async fn stop(self) {
        let deadline = tokio::time::Instant::now() + STOP_PATIENCE;
        for (name, mut task) in self.tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                tracing::warn!(task = name, "did not end in time");
                task.abort();
            }
        }
        self.raft.shutdown().await;
    }
}

fn add_health_checks(
    api: &ApiServer,
    raft: &coracle_raft::Node,
    started: &Arc<AtomicBool>,
    clock_problem: tokio::sync::watch::Receiver<Option<String>>,
) {
    let health = api.health();
    let leads = raft.leadership();
    health.add_ready("store", Arc::new(move || if *leads.borrow() { Ok(()) } else { Err("no leader".to_owned()) }));
    let started = started.clone();
    health.add_ready(
        "bootstrap",
        Arc::new(move || {
            if started.load(Ordering::Acquire) { Ok(()) } else { Err("system objects are being made".to_owned()) }
        }),
    );
    health.add_ready("clock", Arc::new(move || clock_problem.borrow().clone().map_or(Ok(()), Err)));
}

fn write_kubeconfigs(settings: &Settings, security: &Security, listen: SocketAddr) -> anyhow::Result<()> {
    // The loopback address unless the server listens on one address only.
    let host = match listen.ip() {
        ip if ip.is_unspecified() => IpAddr::from([127, 0, 0, 1]),
        ip => ip,
    };
    let url = format!("https://{}", SocketAddr::new(host, listen.port()));
    security.write_admin_kubeconfig(&admin_kubeconfig(&settings.data_dir), 0o600, &url)?;
    let path = &settings.kubeconfig;
    security
        .write_admin_kubeconfig(path, settings.kubeconfig_mode, &url)
        .with_context(|| format!("--write-kubeconfig {:?}", path.display()))
}
