//! Starts and stops everything a server runs.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`settings`] | what the command line decided |
//! | [`lock`] | one server per data folder |
//! | [`open`] | from a folder to a member: found, join, or go on |
//! | [`anteroom`] | the open port of a server that has no keys yet |
//! | [`keys`] | the cluster's keys, and the files that copy them |
//! | [`peers`], [`peering`] | streams to the other servers; what servers tell each other |
//! | [`cluster`] | who is in the cluster, who may come in |
//! | [`join`] | machines that join, and this server's own way in |
//! | [`raise`] | what follows once there is a leader, and `/readyz` |
//! | [`own_node`] | the agent in this process |
//! | [`identities`] | in-process clients under their own identities |
//! | [`bootstrap`] | what every cluster has from its first second |
//! | [`live`] | the servers behind `default/kubernetes` |
//! | [`snapshots`], [`reset`] | copies of the store on disk; beginning anew from one |
//! | [`admin`] | what the command line asks a running server |
//! | [`upkeep`] | small chores of the leader |
//!
//! # Tasks
//!
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | raft (crate `coracle-raft`) | log and state | first | last |
//! | listener | connections | once the keys are there, before there is a leader | with `shutdown`, after draining |
//! | keys | copies on disk | with the listener | with `shutdown` |
//! | peering | nothing | with the listener | with `shutdown` |
//! | agent (crate `coracle-agent`) | the node | when the API is open, or soon after the start | with `shutdown`; pods go on |
//! | controllers and scheduler | caches, queues | with leadership, once the API is open | with leadership |
//! | live servers | the endpoints of `default/kubernetes` | with leadership, once the API is open | with leadership |
//! | snapshots | scheduled snapshots | with the listener | with `shutdown` |

pub mod admin;
pub mod anteroom;
pub mod bootstrap;
pub mod cluster;
pub mod identities;
pub mod join;
pub mod keys;
pub mod live;
pub mod lock;
pub mod open;
pub mod own_node;
pub mod peering;
pub mod peers;
pub mod raise;
pub mod reset;
pub mod settings;
pub mod snapshots;
pub mod upkeep;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use coracle_agent::servers::resolve::Resolver;
use coracle_raft::Standing;
use futures::future::FutureExt;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tower::util::BoxCloneSyncService;

use self::admin::Admin;
use self::cluster::Cluster;
use self::open::Opened;
use self::raise::Readiness;
use crate::apiserver::protocols::{self, Protocols};
use crate::apiserver::{ApiServer, backend::Backend, service::Parts};
use crate::auth::security::ServingNames;
use crate::auth::{Identity, Security};
use crate::controllers;
use crate::strategy::service::allocation::ServiceNetwork;

pub use self::settings::{Settings, admin_kubeconfig, user_kubeconfig_link};

/// This program's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long each part may take to end after a signal; the whole must be done within 5 s.
const STOP_PATIENCE: Duration = Duration::from_millis(2500);

/// How long the handing over of leadership may take when stopping.
const TRANSFER_PATIENCE: Duration = Duration::from_millis(1000);
/// How long the closing of the store may take; without it the next start has more to read, nothing is lost.
const CLOSE_PATIENCE: Duration = Duration::from_millis(1300);
/// The agent starts this long after the server at the latest, leader or not: its pods need none.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);

/// An error and its causes on one line, leaving out a cause that repeats what was said.
pub fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

/// Where Service addresses and node ports come from.
pub fn service_network(settings: &Settings) -> ServiceNetwork {
    ServiceNetwork { ranges: settings.service_cidr.clone(), node_ports: settings.node_ports.clone() }
}

/// The secret by which the node of this machine proves that it is the one of before.
///
/// # Errors
/// It cannot be read or kept.
pub fn node_secret(data_dir: &Path) -> anyhow::Result<String> {
    let credentials = coracle_agent::join::credentials::Credentials::new(data_dir.join("agent"));
    credentials.node_secret().context("the secret of this machine's node")
}

/// What is to be done with the data folder when this run of the server has ended; then the program starts again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Again {
    /// The cluster began anew without this server: its data is of no use.
    Forget,
    /// The administrator wants the state of a snapshot.
    Restore(PathBuf),
}

/// Runs a server until SIGTERM or SIGINT, or until something happens that it must not survive.
///
/// # Errors
/// It cannot start, or the store has failed.
pub async fn run(settings: Settings) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let lock = lock::DataDirLock::take(&settings.data_dir)?;
    if settings.cluster_reset || settings.restore_path.is_some() {
        return reset::run(&settings).await;
    }
    check_port(settings.listen())?;
    reset::act_on_note(&settings.data_dir).await?;
    let (shutdown, again) = (CancellationToken::new(), Arc::new(watch::Sender::new(None)));
    let started = tokio::select! {
        started = Server::start(settings.clone(), again.clone(), shutdown.clone()) => started?,
        () = signals.any() => {
            tracing::info!("told to stop before the start was done");
            return Ok(());
        }
    };
    let fatal = started.cluster.node.clone();
    let mut restart = again.subscribe();
    let outcome = tokio::select! {
        () = signals.any() => Ok(()),
        why = fatal.stopped() => Err(anyhow::anyhow!("the store has stopped: {why}")),
        () = started.failed.cancelled() => Err(anyhow::anyhow!("the server cannot start; the log says why")),
        wanted = restart.wait_for(Option::is_some) => wanted.map(drop).map_err(Into::into),
    };
    tracing::info!("stopping; pods go on");
    started.stop(shutdown).await;
    let again = again.borrow().clone();
    if let (Ok(()), Some(again)) = (&outcome, again) {
        reset::note(&settings.data_dir, &again)?;
        drop(lock);
        return start_again();
    }
    outcome
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Becomes a fresh run of the same program with the same arguments and pid, as a supervisor would start it.
fn start_again() -> anyhow::Result<()> {
    use std::os::unix::process::CommandExt;
    let mut args = std::env::args_os();
    let name = args.next().unwrap_or_else(|| "coracle".into());
    tracing::info!("starting again");
    let error = std::process::Command::new("/proc/self/exe").arg0(name).args(args).exec();
    Err(error).context("start again")
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
    cluster: Cluster,
    readiness: Readiness,
    /// Cancelled when something that must be there cannot be made.
    failed: CancellationToken,
    tasks: Vec<(&'static str, tokio::task::JoinHandle<()>)>,
}

/// What the tasks of a server that is open share.
#[derive(Clone)]
struct Running {
    settings: Settings,
    cluster: Cluster,
    security: Security,
    api: ApiServer,
    readiness: Readiness,
    shutdown: CancellationToken,
}

impl Server {
    async fn start(
        settings: Settings,
        again: Arc<watch::Sender<Option<Again>>>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<Server> {
        let begin = std::time::Instant::now();
        let clock = Arc::new(watch::Sender::new(None));
        let Opened { cluster, earliest } = open::open(&settings, &clock).await?;
        let backend = Backend::new(cluster.node.store().clone(), Arc::new(cluster.node.clone()));
        let security = Security::assemble(cluster.keyring.keys.clone(), backend.clone(), &settings.cluster_domain)?;
        let api = ApiServer::new(Parts {
            backend,
            authorizer: security.authorizer.clone(),
            admission: security.admission.clone(),
            address: cluster.address.clone(),
            services: service_network(&settings),
            shutdown: shutdown.clone(),
        });
        api.close("the server is starting and does not know the newest state of its cluster yet");
        security.attach(&api, &cluster.address);
        let readiness = Readiness::new(clock);
        readiness.register(api.health(), &cluster);
        let (failed, protocols) = (CancellationToken::new(), Protocols::new(earliest));
        protocols.on(protocols::PEER, serve_peers(&cluster));
        protocols.on(protocols::LINK, api.links().handler());
        protocols.on_path(join::PREFIX, join::door::doorkeeper(cluster.clone()));
        protocols.on_path(peering::PREFIX, peering::doorkeeper(cluster.clone()));
        let (listener, leaf) = listen(&settings, &security, &cluster, protocols).await?;
        let admin = Admin { cluster: cluster.clone(), settings: settings.clone(), leaf, again: again.clone() };
        admin.clone().attach(&api);
        cluster.keyring.write_files()?;
        let path = admin_kubeconfig(&settings.data_dir);
        security.write_admin_kubeconfig(&path, 0o600, &settings.local_url())?;

        let service = BoxCloneSyncService::new(api.clone());
        let keep = shutdown.clone().run_until_cancelled_owned(admin::certificates::keep(admin));
        let keep = async move { keep.await.unwrap_or_default() };
        let mut tasks = vec![
            ("listener", tokio::spawn(listener.serve(service, shutdown.clone()))),
            ("certificates", tokio::spawn(keep)),
        ];
        let running = Running { settings, cluster, security, api, readiness, shutdown };
        running.start_background(&again, &mut tasks);
        let (raised, failing) = (running.clone(), failed.clone());
        tasks.push((
            "start",
            tokio::spawn(async move {
                match raised.shutdown.clone().run_until_cancelled(raised.raise(begin)).await {
                    None => {}
                    Some(Ok(tasks)) => drop(futures::future::join_all(tasks).await),
                    Some(Err(error)) => {
                        tracing::error!(error = format!("{error:#}"), "the server cannot start");
                        failing.cancel();
                    }
                }
            }),
        ));
        Ok(Server { cluster: running.cluster, readiness: running.readiness, failed, tasks })
    }

    /// Hands leadership over while requests are still served, then ends every task, a bounded time in all, then closes the store.
    async fn stop(self, shutdown: CancellationToken) {
        let begin = std::time::Instant::now();
        self.readiness.stopping.store(true, Ordering::Release);
        let standing = *self.cluster.node.standing().borrow();
        if !self.cluster.is_alone() && standing == Standing::Member {
            let node = self.cluster.node.clone();
            let leave = async {
                if let Err(error) = live::set_leaving(&node, true).await {
                    tracing::debug!(%error, "saying that this server leaves");
                }
                node.transfer_leadership().await
            };
            if tokio::time::timeout(TRANSFER_PATIENCE, leave).await.is_err() {
                tracing::info!("leadership was not handed over in time");
            }
        }
        shutdown.cancel();
        let deadline = tokio::time::Instant::now() + STOP_PATIENCE;
        for (name, mut task) in self.tasks {
            if tokio::time::timeout_at(deadline, &mut task).await.is_err() {
                tracing::warn!(task = name, "did not end in time");
                task.abort();
            }
        }
        let closing = std::time::Instant::now();
        if tokio::time::timeout(CLOSE_PATIENCE, self.cluster.node.shutdown()).await.is_err() {
            tracing::warn!("the store did not close in time; the next start reads its log");
        }
        tracing::info!(
            milliseconds = begin.elapsed().as_millis() as u64,
            of_the_store = closing.elapsed().as_millis() as u64,
            "stopped"
        );
    }
}

/// Binds the port under the names that this server answers to.
async fn listen(
    settings: &Settings,
    security: &Security,
    cluster: &Cluster,
    protocols: Protocols,
) -> anyhow::Result<(crate::apiserver::listener::Listener, Arc<crate::auth::pki::ServerLeaf>)> {
    let mut addresses = settings.node_ips();
    addresses.extend(cluster.address.parse::<SocketAddr>().ok().map(|address| address.ip()));
    addresses.push(settings.bind_address);
    addresses.extend(service_network(settings).first());
    let names = ServingNames {
        cluster_domain: &settings.cluster_domain,
        node_name: &settings.node_name,
        server_id: cluster.node.id(),
        addresses: &addresses,
        configured: &settings.tls_san,
    };
    Ok(security.listen(settings.listen(), &names, protocols).await?)
}

/// Connections of other servers go to the consensus engine, which tells those that were sent away so.
fn serve_peers(cluster: &Cluster) -> protocols::Handler {
    let cluster = cluster.clone();
    Arc::new(move |tls, identity, address| {
        let cluster = cluster.clone();
        async move {
            let Some(id) = identity.server_id() else {
                return tracing::warn!(user = identity.user.name, %address, "only servers may speak to servers");
            };
            cluster.node.serve_peer(Box::new(tls), id).await;
        }
        .boxed()
    })
}

impl Running {
    /// What runs from the opened port on, whether there is a leader or not.
    fn start_background(
        &self,
        again: &Arc<watch::Sender<Option<Again>>>,
        tasks: &mut Vec<(&'static str, tokio::task::JoinHandle<()>)>,
    ) {
        let (cluster, settings, shutdown) = (self.cluster.clone(), self.settings.clone(), self.shutdown.clone());
        tasks.push(("keys", tokio::spawn(cluster.keyring.clone().follow(shutdown.clone()))));
        let server = settings.server.clone().map(|server| (Resolver::new(settings.resolv_conf.clone()), server));
        let known = peering::stay_known(cluster.clone(), settings.data_dir.clone(), server, shutdown.clone());
        tasks.push(("peering", tokio::spawn(known)));
        let scheduled = snapshots::run(cluster.clone(), settings.snapshots.clone(), shutdown.clone());
        tasks.push(("snapshots", tokio::spawn(scheduled)));
        let superseded = CancellationToken::new();
        let (api, readiness) = (self.api.clone(), self.readiness.clone());
        let follow =
            raise::follow_membership(cluster, api, settings.data_dir.clone(), readiness, superseded.clone(), shutdown);
        let again = again.clone();
        tasks.push((
            "membership",
            tokio::spawn(async move {
                follow.await;
                if superseded.is_cancelled() {
                    again.send_replace(Some(Again::Forget));
                }
            }),
        ));
        if settings.agent {
            tasks.push(("agent", tokio::spawn(self.clone().run_agent())));
        }
    }

    /// From the open port to readiness; returns what was started on the way.
    async fn raise(self, begin: std::time::Instant) -> anyhow::Result<Vec<tokio::task::JoinHandle<()>>> {
        let Running { settings, cluster, security, api, readiness, shutdown } = self;
        raise::open_api(&api, &cluster, &readiness).await;
        let own = crate::apiserver::client(&api, Identity::apiserver());
        let leadership = cluster.node.leadership();
        raise::namespaces(&own, &readiness).await;
        let live = live::run(own.clone(), cluster.node.clone(), leadership.clone(), shutdown.clone());
        let live = tokio::spawn(live);
        raise::bootstrap(&own, &settings, &cluster, &readiness).await;
        let path = &settings.kubeconfig;
        security
            .write_admin_kubeconfig(path, settings.kubeconfig_mode, &settings.local_url())
            .with_context(|| format!("--write-kubeconfig {:?}", path.display()))?;
        settings::remember_kubeconfig(&settings)?;
        let controllers = controllers::spawn_all(controllers::Context {
            client_for: identities::client_for(&api),
            leadership: leadership.clone(),
            cluster_cidrs: settings.cluster_cidr.clone(),
            root_ca_pem: security.keys.server_ca.certificate_pem().into(),
            shutdown: shutdown.clone(),
        });
        let signer = security.spawn_signer(&api, leadership.clone(), &shutdown);
        let upkeep = tokio::spawn(upkeep::run(api.clone(), leadership, shutdown.clone()));
        readiness.waiting.send_replace(None);
        tracing::info!(
            address = %settings.listen(),
            milliseconds = begin.elapsed().as_millis() as u64,
            "the API is ready"
        );
        Ok(vec![live, controllers, signer, upkeep])
    }

    /// The name of this machine's node is nobody else's. Without a leader that cannot be asked, and the node of before goes on.
    async fn claim_node_name(&self) -> anyhow::Result<()> {
        let secret = node_secret(&self.settings.data_dir)?;
        let claimed = join::claims::claim(&self.cluster.node, &self.settings.node_name, &secret);
        match tokio::time::timeout(AGENT_PATIENCE, claimed).await {
            Ok(Err(status)) if status.code() == 403 => bail!("{}", status.message()),
            Ok(Err(status)) => tracing::warn!(error = status.message(), "the name of the node was not confirmed"),
            Ok(Ok(())) | Err(_) => {}
        }
        Ok(())
    }

    /// Runs the node of this machine.
    async fn run_agent(self) {
        let mut waiting = self.readiness.waiting.subscribe();
        let ready = tokio::time::timeout(AGENT_PATIENCE, waiting.wait_for(Option::is_none));
        if self.shutdown.run_until_cancelled(ready).await.is_none() {
            return;
        }
        let (settings, shutdown) = (&self.settings, &self.shutdown);
        if let Err(error) = self.claim_node_name().await {
            return tracing::error!(error = explain(error.as_ref()), "the server goes on without a node");
        }
        let agent =
            own_node::start(&self.api, &self.security, settings, settings.node_ips(), &self.cluster.address, shutdown);
        if let Err(error) = agent.await {
            tracing::error!(%error, "the agent panicked; the server goes on without a node");
        }
    }
}
