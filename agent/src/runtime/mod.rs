//! The container runtime behind one trait with the shape of CRI v1.
//!
//! The kubelet decides what should run; a [`Runtime`] makes it so and says what is. Names and meanings are those of
//! `k8s.io/cri-api/pkg/apis/runtime/v1`, so that a second implementation can speak CRI to containerd or CRI-O.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`cri`] | the types: sandbox and container configurations, statuses, statistics, events |
//! | [`embedded`] | the runtime inside the agent: its table of sandboxes and containers, the calls of the trait |
//! | `sandbox`, `container`, `stream`, `stats` | what those calls do |
//! | [`devices`] | which devices a cgroup of version 2 may open |
//! | [`purge()`] | the end of an instance: nothing of it stays |
//! | [`record`] | the files that the next agent finds everything by |
//! | [`shim`] | starting and asking a pod's shim |
//! | [`helper`] | this program run once more to create one container with libcontainer |
//! | [`spec`] | the OCI specification of a container, as a pure function |
//! | [`capabilities`], [`seccomp`], [`user`] | parts of that specification |
//! | [`cgroup`] | limits, statistics and the end of control groups: version 1, hybrid and 2 |

pub mod capabilities;
pub mod cgroup;
mod container;
pub mod cri;
pub mod devices;
pub mod embedded;
pub mod helper;
mod purge;
pub mod record;
mod sandbox;
pub mod seccomp;
pub mod shim;
pub mod spec;
mod stats;
mod stream;
pub mod user;

pub use cri::*;
pub use embedded::{Embedded, RuntimeOptions};
pub use helper::helper_main_if_requested;
pub use purge::purge;

use futures::future::BoxFuture;
use tokio::sync::broadcast;

/// What a [`Runtime`] call answers with.
pub type RuntimeResult<T> = Result<T, RuntimeError>;

/// Why a runtime call failed. The texts reach users in pod events and container statuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeError {
    /// The sandbox or container does not exist (gRPC `NotFound` in CRI).
    #[error("{kind} {id:?} not found")]
    NotFound { kind: &'static str, id: String },
    /// The request itself cannot be honoured; trying again without changing it will not help.
    /// The kubelet reports it as `CreateContainerConfigError`.
    #[error("{0}")]
    Invalid(String),
    /// The object is not in a state that allows the call, such as exec in a stopped container.
    #[error("{0}")]
    WrongState(String),
    /// The image of a container is not in the store.
    #[error(transparent)]
    Image(#[from] crate::image::ImageError),
    /// Attaching or detaching the pod's network failed.
    #[error("failed to set up sandbox network: {0}")]
    Network(String),
    /// The container could not be created; the kubelet reports it as `CreateContainerError`.
    #[error("failed to create container: {0}")]
    Create(String),
    /// The program of the container could not be started; the kubelet reports it as `RunContainerError`.
    #[error("failed to start container: {0}")]
    Start(String),
    /// A command did not finish within its timeout and was killed.
    #[error("command {command:?} timed out")]
    Timeout { command: String },
    /// The pod's shim is gone or does not answer.
    #[error("the pod's shim does not answer")]
    Shim(#[source] std::io::Error),
    /// A file, mount or cgroup operation failed.
    #[error("{what}: {source}")]
    Io { what: String, source: std::io::Error },
}

impl RuntimeError {
    /// True when the object named in the call does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, RuntimeError::NotFound { .. })
    }
}

/// A container runtime with the calls of CRI v1 (`RuntimeService`).
///
/// Every call may be repeated: stopping what is stopped and removing what is gone succeed. Calls about different pods
/// run in parallel; the caller never runs two calls about one pod at once, except `exec*`, `attach`, status and stats.
pub trait Runtime: Send + Sync + 'static {
    /// Name and version, as shown in `status.nodeInfo.containerRuntimeVersion` (`name://version`).
    fn version(&self) -> RuntimeVersion;

    /// Whether the runtime and the pod network are ready; the node's `Ready` condition depends on it.
    fn status(&self) -> BoxFuture<'_, RuntimeResult<RuntimeStatus>>;

    /// Creates and starts a pod's sandbox: shim, namespaces, cgroup, network. Answers the sandbox's id.
    /// When it fails nothing is left behind.
    fn run_pod_sandbox<'a>(&'a self, config: &'a PodSandboxConfig) -> BoxFuture<'a, RuntimeResult<String>>;

    /// Kills the containers that still run and gives the network back. The sandbox stays listed as not ready.
    fn stop_pod_sandbox<'a>(&'a self, sandbox_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>>;

    /// Removes a sandbox and its containers; stops it first when needed.
    fn remove_pod_sandbox<'a>(&'a self, sandbox_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>>;

    fn pod_sandbox_status<'a>(&'a self, sandbox_id: &'a str) -> BoxFuture<'a, RuntimeResult<PodSandboxStatus>>;

    fn list_pod_sandboxes<'a>(
        &'a self,
        filter: &'a PodSandboxFilter,
    ) -> BoxFuture<'a, RuntimeResult<Vec<PodSandboxStatus>>>;

    /// Creates a container in a ready sandbox and answers its id. Its program does not run yet.
    fn create_container<'a>(
        &'a self,
        sandbox_id: &'a str,
        config: &'a ContainerConfig,
    ) -> BoxFuture<'a, RuntimeResult<String>>;

    fn start_container<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>>;

    /// Sends the stop signal, waits up to `grace_seconds`, then kills everything in the container's cgroup.
    /// Returns once the container has exited.
    fn stop_container<'a>(&'a self, container_id: &'a str, grace_seconds: u64) -> BoxFuture<'a, RuntimeResult<()>>;

    /// Removes a container with its root filesystem (not its log file); kills it first when it still runs.
    fn remove_container<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>>;

    fn list_containers<'a>(&'a self, filter: &'a ContainerFilter)
    -> BoxFuture<'a, RuntimeResult<Vec<ContainerStatus>>>;

    fn container_status<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<ContainerStatus>>;

    /// Changes the cgroup limits of a running container; `None` fields stay as they are.
    fn update_container_resources<'a>(
        &'a self,
        container_id: &'a str,
        resources: &'a LinuxContainerResources,
    ) -> BoxFuture<'a, RuntimeResult<()>>;

    /// Changes the limits of the pod's cgroup as a whole; `None` fields stay as they are.
    fn update_pod_sandbox_resources<'a>(
        &'a self,
        sandbox_id: &'a str,
        resources: &'a LinuxContainerResources,
    ) -> BoxFuture<'a, RuntimeResult<()>>;

    /// Opens the log file anew after somebody else has rotated it away.
    fn reopen_container_log<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>>;

    /// Runs a command to its end and answers its output (each stream cut at 16 MiB) and exit code.
    /// After `timeout` the command is killed and the error is [`RuntimeError::Timeout`].
    fn exec_sync<'a>(
        &'a self,
        container_id: &'a str,
        command: &'a [String],
        timeout: Option<std::time::Duration>,
    ) -> BoxFuture<'a, RuntimeResult<ExecSyncResponse>>;

    /// Starts a command with streams connected to the caller. Dropping the session kills the command.
    fn exec<'a>(&'a self, request: &'a ExecRequest) -> BoxFuture<'a, RuntimeResult<StreamSession>>;

    /// Connects to the streams of a container's own process. Dropping the session disconnects.
    fn attach<'a>(&'a self, request: &'a AttachRequest) -> BoxFuture<'a, RuntimeResult<StreamSession>>;

    /// Opens a TCP connection to `port` on the loopback of the pod's network namespace (port-forward).
    fn port_forward<'a>(
        &'a self,
        sandbox_id: &'a str,
        port: u16,
    ) -> BoxFuture<'a, RuntimeResult<tokio::net::TcpStream>>;

    fn container_stats<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<ContainerStats>>;

    /// Statistics of all pods, with their running containers.
    fn list_pod_sandbox_stats<'a>(
        &'a self,
        filter: &'a PodSandboxFilter,
    ) -> BoxFuture<'a, RuntimeResult<Vec<PodSandboxStats>>>;

    /// What happens from now on. A receiver that lags must list again.
    fn events(&self) -> broadcast::Receiver<ContainerEvent>;
}
