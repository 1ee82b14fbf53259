//! Puts a node together: network, images, runtime, kubelet; and takes it apart in the opposite order.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::image::folder::watch_folder;
use crate::image::{ImageError, ImageStore, Images, LocalImages};
use crate::kubelet::api::ApiClient;
use crate::kubelet::context::Context;
use crate::kubelet::events::Recorder;
use crate::kubelet::field_ref::NodeFacts;
use crate::kubelet::manager::Manager;
use crate::kubelet::node::Machine;
use crate::kubelet::node_sync::NodeSync;
use crate::kubelet::object_watch::ObjectWatches;
use crate::kubelet::server::NodeService;
use crate::kubelet::static_pods::StaticPods;
use crate::kubelet::{addresses, worker};
use crate::net::{Network, NetworkConfig, Parts, PodNetwork};
use crate::runtime::{Embedded, PodSandboxFilter, Runtime, RuntimeOptions};
use crate::servers::Servers;
use crate::volume::VolumeHost;
use crate::{AgentConfig, NodeLinkListener};

/// Size at which a container's log is rotated, and how many files are kept: the kubelet's defaults.
const LOG_BYTES: u64 = 10 << 20;
const LOG_FILES: u32 = 5;

/// Why the agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A folder of the agent could not be made.
    #[error("create {path}")]
    CreateDir {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The image store could not be opened.
    #[error("open the image store")]
    Images(#[source] crate::image::ImageError),
    /// The network could not be prepared.
    #[error("prepare the network")]
    Network(#[source] crate::net::NetworkError),
    /// The container runtime could not be started.
    #[error("start the container runtime")]
    Runtime(#[source] crate::runtime::RuntimeError),
}

/// How the node and the servers of its cluster reach each other.
pub struct Access {
    /// The API under the node's own identity (`system:node:<name>`).
    pub client: kube::Client,
    /// Where requests of the server of this process arrive.
    pub link: Option<NodeLinkListener>,
    /// The servers in other processes, to which tunnels are kept.
    pub servers: Option<Servers>,
}

/// Runs the node until `shutdown` is cancelled; pods keep running after it returns.
///
/// A failure of servers is waited out, never returned.
///
/// # Errors
/// Only what cannot heal by itself: an unusable data directory or a kernel without what containers need.
pub async fn run(mut config: AgentConfig, access: Access, shutdown: CancellationToken) -> Result<(), AgentError> {
    let Access { client, link, servers } = access;
    let agent_dir = config.agent_dir();
    for folder in ["pods", "images", "pod-manifests"] {
        make_dir(agent_dir.join(folder))?;
    }
    // From here on every name derives from the directory that now exists.
    let instance = crate::instance::Instance::of(&config.data_dir);
    if config.node_ips.is_empty() {
        config.node_ips = addresses::default_addresses(&config.cluster_cidr, &config.service_cidr);
    }
    let tasks = TaskTracker::new();

    let network = start_network(&config, &instance, client.clone(), &shutdown).await?;
    let store = open_images(&config).await?;
    tasks.spawn(import_images(store.clone(), agent_dir.clone(), shutdown.clone()));
    let options = RuntimeOptions {
        run_dir: instance.run_dir(),
        agent_dir: agent_dir.clone(),
        cgroup: instance.scoped_name(),
        shim: config.shim,
        log_max_bytes: LOG_BYTES,
        log_max_files: LOG_FILES,
    };
    let pod_network: Arc<dyn PodNetwork> = Arc::new(network.clone());
    let runtime = Embedded::start(options, store.clone(), pod_network).await.map_err(AgentError::Runtime)?;
    let runtime: Arc<dyn Runtime> = Arc::new(runtime);
    forget_lost_pods(&network, runtime.as_ref()).await;

    let context = make_context(&config, &instance, client.clone(), runtime, Arc::new(LocalImages(store)), &shutdown);
    let board: worker::Board = Arc::default();
    let static_pods = StaticPods::new(agent_dir.join("pod-manifests"), config.node_name.clone());
    let machine = Machine::read(&config.data_dir, &context.runtime.version());
    tasks.spawn(NodeSync::new(context.clone(), machine).run(shutdown.clone()));
    let service = NodeService::new(context.clone(), board.clone());
    if let Some(link) = link {
        tasks.spawn(link.serve(service.clone(), shutdown.clone()));
    }
    if let Some(servers) = servers {
        tasks.spawn(crate::servers::learn::run(client.clone(), servers.list.clone(), shutdown.clone()));
        let lost = crate::link::dial::Lost::default();
        tasks.spawn(network.clone().avoid_servers(lost.subscribe(), shutdown.clone()));
        tasks.spawn(crate::link::dial::run(servers, service, lost, shutdown.clone()));
    }
    tasks.spawn(Manager::new(context, board, shutdown.clone()).run(client, static_pods));
    tasks.close();
    tasks.wait().await;
    Ok(())
}

fn make_dir(path: PathBuf) -> Result<(), AgentError> {
    std::fs::create_dir_all(&path).map_err(|source| AgentError::CreateDir { path, source })
}

async fn start_network(
    config: &AgentConfig,
    instance: &crate::instance::Instance,
    client: kube::Client,
    shutdown: &CancellationToken,
) -> Result<Network, AgentError> {
    let network = NetworkConfig {
        instance_id: instance.id().to_owned(),
        agent_dir: config.agent_dir(),
        resolv_conf: config.resolv_conf.clone(),
        node_name: config.node_name.clone(),
        node_ips: config.node_ips.clone(),
        cluster_cidrs: config.cluster_cidr.clone(),
        service_cidrs: config.service_cidr.clone(),
        cluster_dns: config.cluster_dns.clone(),
        cluster_domain: config.cluster_domain.clone(),
        backend: config.backend,
    };
    let parts = Parts { service_proxy: config.service_proxy, dns: config.dns };
    Network::start(network, parts, client, shutdown).await.map_err(AgentError::Network)
}

async fn open_images(config: &AgentConfig) -> Result<Arc<ImageStore>, AgentError> {
    let (folder, hello) = (config.agent_dir().join("store"), config.hello);
    let opened = tokio::task::spawn_blocking(move || {
        let store = ImageStore::open(&folder, true)?;
        if !hello.is_empty() {
            store.add_builtin(hello)?;
        }
        Ok(Arc::new(store))
    });
    let died = |error| ImageError::Io { what: "open the image store".to_owned(), source: std::io::Error::other(error) };
    opened.await.unwrap_or_else(|error| Err(died(error))).map_err(AgentError::Images)
}

/// Archives dropped in `DATA/agent/images`; a folder that cannot be watched does not stop the node.
async fn import_images(store: Arc<ImageStore>, agent_dir: PathBuf, shutdown: CancellationToken) {
    let marks = agent_dir.join("imported.json");
    if let Err(error) = watch_folder(store, agent_dir.join("images"), marks, shutdown).await {
        tracing::error!(%error, "images folder not watched");
    }
}

/// Addresses of pods that did not outlive the last agent go back.
async fn forget_lost_pods(network: &Network, runtime: &dyn Runtime) {
    let sandboxes = runtime.list_pod_sandboxes(&PodSandboxFilter::default()).await.unwrap_or_default();
    let live: BTreeSet<String> = sandboxes.into_iter().map(|sandbox| sandbox.metadata.uid).collect();
    if let Err(error) = network.retain(&live).await {
        tracing::warn!(%error, "addresses of lost pods not given back");
    }
}

fn make_context(
    config: &AgentConfig,
    instance: &crate::instance::Instance,
    client: kube::Client,
    runtime: Arc<dyn Runtime>,
    images: Arc<dyn Images>,
    shutdown: &CancellationToken,
) -> Arc<Context> {
    let api = ApiClient::new(client.clone());
    let machine = Machine::read(&config.data_dir, &runtime.version());
    let node = Arc::new(RwLock::new(NodeFacts {
        host_ips: config.node_ips.clone(),
        allocatable: machine.allocatable(config.max_pods),
    }));
    let volumes = VolumeHost {
        api: api.clone(),
        pods_dir: config.agent_dir().join("pods"),
        memory_dir: instance.run_dir().join("volumes"),
        node: node.clone(),
    };
    Arc::new(Context {
        config: config.clone(),
        cgroup_root: instance.scoped_name(),
        recorder: Recorder::start(api.clone(), config.node_name.clone(), shutdown.clone()),
        watches: ObjectWatches::new(client, shutdown.clone()),
        api,
        runtime,
        images,
        volumes,
        node,
        memory: machine.memory,
    })
}
