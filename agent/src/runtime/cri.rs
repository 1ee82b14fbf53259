//! The types of the runtime's calls; names and meanings of CRI v1.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::RuntimeResult;

/// Name and version of a runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeVersion {
    pub runtime_name: String,
    pub runtime_version: String,
}

/// Readiness of the runtime. A message says why when a condition is not met.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeStatus {
    pub runtime_ready: bool,
    pub network_ready: bool,
    pub message: String,
}

/// Identity of a pod's sandbox; `attempt` counts the sandboxes made for one pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSandboxMetadata {
    pub name: String,
    pub uid: String,
    pub namespace: String,
    pub attempt: u32,
}

/// Identity of a container in its pod; `attempt` counts its restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerMetadata {
    pub name: String,
    pub attempt: u32,
}

/// What a pod's sandbox should be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodSandboxConfig {
    pub metadata: PodSandboxMetadata,
    /// Set as the UTS hostname unless the pod uses the host's network.
    pub hostname: String,
    /// Absolute folder below which the containers' `log_path`s lie, `/var/log/pods/<ns>_<name>_<uid>` upstream.
    pub log_directory: PathBuf,
    /// Resolver settings. The kubelet mounts the file it writes as `/etc/resolv.conf`; kept for CRI runtimes.
    pub dns_config: DnsConfig,
    pub port_mappings: Vec<PortMapping>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub linux: LinuxPodSandboxConfig,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DnsConfig {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

/// Protocol of a port mapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

/// A `hostPort`: `host_ip` empty means every address of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    pub host_ip: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinuxPodSandboxConfig {
    /// The pod's cgroup, relative to the controllers' roots: `coracle-<id>/kubepods/<qos>/pod<uid>`.
    /// The runtime creates it (with the QoS levels above it) and removes it with the sandbox.
    pub cgroup_parent: String,
    pub namespace_options: NamespaceOptions,
    /// Namespaced sysctls, `kernel.shm_rmid_forced` or `net.ipv4.ip_local_port_range`.
    pub sysctls: BTreeMap<String, String>,
    /// Limits of the pod's cgroup as a whole.
    pub resources: LinuxContainerResources,
}

/// Whose namespace to use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceMode {
    /// One for all containers of the pod.
    #[default]
    Pod,
    /// One for each container (process ids only).
    Container,
    /// The node's.
    Node,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NamespaceOptions {
    pub network: NamespaceMode,
    /// `Container` unless `shareProcessNamespace` (`Pod`) or `hostPID` (`Node`).
    pub pid: NamespaceMode,
    pub ipc: NamespaceMode,
}

impl Default for NamespaceOptions {
    fn default() -> Self {
        Self { network: NamespaceMode::Pod, pid: NamespaceMode::Container, ipc: NamespaceMode::Pod }
    }
}

/// State of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodSandboxState {
    Ready,
    NotReady,
}

/// A sandbox as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct PodSandboxStatus {
    pub id: String,
    pub metadata: PodSandboxMetadata,
    pub state: PodSandboxState,
    pub created_at: SystemTime,
    /// Addresses of the pod, primary first; empty with the host's network.
    pub ips: Vec<IpAddr>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

/// Which sandboxes to list; `None` and empty match all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodSandboxFilter {
    pub id: Option<String>,
    pub pod_uid: Option<String>,
    pub state: Option<PodSandboxState>,
    pub label_selector: BTreeMap<String, String>,
}

/// What a container should be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerConfig {
    pub metadata: ContainerMetadata,
    /// Id (`sha256:…`) of an image in the store, as answered by `Images::resolve`.
    pub image: String,
    /// The reference the user wrote; only reported back.
    pub user_specified_image: String,
    /// Replaces the image's entrypoint when not empty; then the image's arguments are not used either.
    pub command: Vec<String>,
    /// Replaces the image's arguments when not empty.
    pub args: Vec<String>,
    /// Empty: the image's, else `/`.
    pub working_dir: String,
    /// Later entries win; the image's environment comes first.
    pub envs: Vec<KeyValue>,
    pub mounts: Vec<Mount>,
    pub devices: Vec<Device>,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Relative to the sandbox's `log_directory`: `<container>/<attempt>.log`.
    pub log_path: PathBuf,
    /// Keep a standard input open for `attach`.
    pub stdin: bool,
    /// Close standard input when the first attached client has gone.
    pub stdin_once: bool,
    pub tty: bool,
    /// Signal that asks the container to stop (`SIGTERM`, `SIGRTMIN+3`, `15`); empty: the image's, else `SIGTERM`.
    pub stop_signal: String,
    pub linux: LinuxContainerConfig,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyValue {
    pub key: String,
    pub value: String,
}

/// How mounts travel between the node and a container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountPropagation {
    #[default]
    Private,
    HostToContainer,
    Bidirectional,
}

/// A bind mount of a file or folder of the node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mount {
    pub container_path: String,
    pub host_path: PathBuf,
    pub readonly: bool,
    /// With `readonly`: the mounts below become read-only too (`recursiveReadOnly`).
    pub recursive_read_only: bool,
    pub propagation: MountPropagation,
}

/// A device node of the node made available; `permissions` of `r`, `w`, `m`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    pub container_path: String,
    pub host_path: PathBuf,
    pub permissions: String,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinuxContainerConfig {
    pub resources: LinuxContainerResources,
    pub security_context: LinuxContainerSecurityContext,
}

/// Cgroup limits; `None` leaves the kernel's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinuxContainerResources {
    /// Microseconds.
    pub cpu_period: Option<u64>,
    /// Microseconds of CPU time per period; -1 is no limit.
    pub cpu_quota: Option<i64>,
    /// Relative weight, 2..=262144 (cgroup v1 scale; converted for v2).
    pub cpu_shares: Option<u64>,
    /// Bytes; -1 is no limit.
    pub memory_limit_in_bytes: Option<i64>,
    /// Bytes of memory and swap together; -1 is no limit.
    pub memory_swap_limit_in_bytes: Option<i64>,
    /// -1000..=1000; raised to what the host allows when it forbids lowering.
    pub oom_score_adj: Option<i64>,
    pub cpuset_cpus: String,
    pub cpuset_mems: String,
    /// Page size (`2MB`) to bytes.
    pub hugepage_limits: BTreeMap<String, u64>,
    pub pids_limit: Option<i64>,
    /// Raw cgroup v2 files (`memory.high`), ignored on v1.
    pub unified: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LinuxContainerSecurityContext {
    pub capabilities: Capabilities,
    pub privileged: bool,
    pub namespace_options: NamespaceOptions,
    /// Id of a running container whose process ids this one shares, whatever `namespace_options.pid` says.
    pub pid_target: Option<String>,
    /// Wins over `run_as_username`; both unset: the image's user.
    pub run_as_user: Option<i64>,
    pub run_as_group: Option<i64>,
    /// A name in the image's `/etc/passwd`.
    pub run_as_username: String,
    pub readonly_rootfs: bool,
    pub supplemental_groups: Vec<i64>,
    pub supplemental_groups_policy: SupplementalGroupsPolicy,
    pub no_new_privs: bool,
    /// `None`: the runtime's default list (`procMount: Default`); an empty list masks nothing (`Unmasked`).
    pub masked_paths: Option<Vec<String>>,
    pub readonly_paths: Option<Vec<String>>,
    pub seccomp: SecurityProfile,
}

/// Whether groups of the image's `/etc/group` are added.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SupplementalGroupsPolicy {
    #[default]
    Merge,
    Strict,
}

/// Names with or without `CAP_`; `ALL` is understood.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
}

/// A seccomp profile. Kubernetes' default is `Unconfined` unless the kubelet is told otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SecurityProfile {
    RuntimeDefault,
    #[default]
    Unconfined,
    /// Absolute path of a JSON profile on the node.
    Localhost(PathBuf),
}

/// State of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerState {
    Created,
    Running,
    Exited,
    Unknown,
}

/// A container as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerStatus {
    pub id: String,
    pub sandbox_id: String,
    pub metadata: ContainerMetadata,
    pub state: ContainerState,
    pub created_at: SystemTime,
    pub started_at: Option<SystemTime>,
    pub finished_at: Option<SystemTime>,
    /// 128 + signal when killed by one.
    pub exit_code: i32,
    /// Signal that ended it, 0 when none did.
    pub signal: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `ContainerStatusUnknown`; empty while it runs.
    pub reason: String,
    pub message: String,
    pub image: String,
    pub image_id: String,
    /// The image's first digest reference, as in `status.containerStatuses[].imageID`; else the image id.
    pub image_ref: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub mounts: Vec<Mount>,
    pub log_path: PathBuf,
    pub resources: LinuxContainerResources,
    /// Process id on the node while it runs.
    pub pid: Option<i32>,
    /// Effective user, group and supplementary groups.
    pub user: Option<ContainerUser>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    pub uid: u32,
    pub gid: u32,
    pub supplemental_groups: Vec<u32>,
}

/// Which containers to list; `None` and empty match all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerFilter {
    pub id: Option<String>,
    pub sandbox_id: Option<String>,
    pub state: Option<ContainerState>,
    pub label_selector: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecSyncResponse {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit_code: i32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    pub container_id: String,
    pub command: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    /// Not possible together with `tty`, where both streams are one.
    pub stderr: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AttachRequest {
    pub container_id: String,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    pub width: u16,
    pub height: u16,
}

pub type BoxRead = Pin<Box<dyn AsyncRead + Send>>;
pub type BoxWrite = Pin<Box<dyn AsyncWrite + Send>>;

/// The caller's ends of an exec or attach. Streams that were not asked for are `None`.
pub struct StreamSession {
    /// Shut it down (or drop it) to give the process end of file.
    pub stdin: Option<BoxWrite>,
    pub stdout: Option<BoxRead>,
    pub stderr: Option<BoxRead>,
    /// Ignored without a terminal.
    pub resize: mpsc::Sender<TerminalSize>,
    /// Ends with the exit code of the command (exec) or the container (attach). Dropping it ends the session; output
    /// may still be in the streams when it completes.
    pub exit: BoxFuture<'static, RuntimeResult<i32>>,
}

/// Statistics of one container, read from its cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStats {
    pub id: String,
    pub metadata: ContainerMetadata,
    pub labels: BTreeMap<String, String>,
    pub usage: CgroupStats,
    /// Bytes and inodes of the writable layer.
    pub writable_layer: FilesystemUsage,
    /// Bytes and inodes of the log files.
    pub logs: FilesystemUsage,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FilesystemUsage {
    pub used_bytes: u64,
    pub inodes_used: u64,
}

/// What a cgroup counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupStats {
    pub at: SystemTime,
    /// Cumulated CPU time.
    pub cpu: Duration,
    pub memory_usage_bytes: u64,
    /// Usage less inactive file pages: what eviction looks at.
    pub memory_working_set_bytes: u64,
    pub memory_rss_bytes: u64,
    /// `None` without a limit.
    pub memory_limit_bytes: Option<u64>,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub process_count: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSandboxStats {
    pub id: String,
    pub metadata: PodSandboxMetadata,
    pub usage: CgroupStats,
    pub network: Vec<NetworkInterfaceUsage>,
    pub containers: Vec<ContainerStats>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkInterfaceUsage {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub tx_bytes: u64,
    pub tx_errors: u64,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerEventKind {
    ContainerCreated,
    ContainerStarted,
    ContainerStopped,
    ContainerDeleted,
    /// The sandbox is no longer ready although nobody stopped it (its shim died).
    SandboxLost,
}

/// Something changed; the receiver looks up the state itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerEvent {
    pub kind: ContainerEventKind,
    pub sandbox_id: String,
    pub pod_uid: String,
    /// Empty for events of the sandbox.
    pub container_id: String,
    pub at: SystemTime,
}
