//! The embedded runtime: what it knows, and the calls of CRI on it.
//!
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | `follow` (one a sandbox) | the events of one shim, applied in order | with the sandbox, or when it is found again | when the shim is gone |
//!
//! State is one table behind a lock that is never held over an `await`; files are the truth after a restart.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use coracle_shim::protocol::Exit;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{broadcast, mpsc, watch};

use super::capabilities::CapabilitySet;
use super::cgroup::Hierarchy;
use super::record::{self, ContainerRecord, End, SandboxRecord};
use super::shim::{Shim, ShimEvent, ShimProgram};
use super::*;
use crate::image::ImageStore;
use crate::net::PodNetwork;

/// How many events a slow receiver may fall behind.
const EVENTS: usize = 1024;

/// What the runtime is given once.
pub struct RuntimeOptions {
    /// `/run/coracle/<id>`.
    pub run_dir: PathBuf,
    /// `DATA/agent`.
    pub agent_dir: PathBuf,
    /// Top cgroup of the instance: `coracle-<id>`.
    pub cgroup: String,
    /// The shim's program.
    pub shim: &'static [u8],
    /// Rotate container logs beyond this size (bytes; 0 never) and keep so many files.
    pub log_max_bytes: u64,
    pub log_max_files: u32,
}

/// The runtime inside the agent.
#[derive(Clone)]
pub struct Embedded {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub options: RuntimeOptions,
    pub program: ShimProgram,
    /// This program, for helpers; opened at the start, so that replacing the file does not matter.
    pub helper: fs::File,
    pub cgroups: Hierarchy,
    pub host_capabilities: CapabilitySet,
    pub images: Arc<ImageStore>,
    pub network: Arc<dyn PodNetwork>,
    pub state: Mutex<State>,
    pub events: broadcast::Sender<ContainerEvent>,
}

#[derive(Default)]
pub(super) struct State {
    pub sandboxes: BTreeMap<String, Sandbox>,
    pub containers: BTreeMap<String, Container>,
}

pub(super) struct Sandbox {
    pub record: SandboxRecord,
    pub ready: bool,
    pub shim: Option<Arc<Shim>>,
    /// The kubelet is stopping it: the shim's end is no surprise.
    pub stopping: bool,
}

pub(super) struct Container {
    pub record: ContainerRecord,
    pub phase: Phase,
    pub pid: Option<i32>,
    pub started_at: Option<u64>,
    /// Changes to true when it has ended.
    pub ended: watch::Sender<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Created,
    /// The shim is making it.
    Starting,
    Running,
    Exited,
}

impl Embedded {
    /// Takes up the runtime: finds the pods of an earlier agent and cleans up what is left of dead ones.
    pub async fn start(
        options: RuntimeOptions,
        images: Arc<ImageStore>,
        network: Arc<dyn PodNetwork>,
    ) -> RuntimeResult<Self> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |source| RuntimeError::Io { what, source }
        };
        fs::create_dir_all(options.run_dir.join("pods")).map_err(failed("create the runtime's folder"))?;
        fs::create_dir_all(options.agent_dir.join("containers")).map_err(failed("create the containers' folder"))?;
        let cgroups = Hierarchy::detect().map_err(failed("find the cgroups"))?;
        cgroups.create(&options.cgroup, true).map_err(failed("create the instance's cgroup"))?;
        let shims = format!("{}/shims", options.cgroup);
        cgroups.create(&shims, false).map_err(failed("create the shims' cgroup"))?;
        let program = ShimProgram::new(options.shim).map_err(failed("prepare the shim's program"))?;
        let helper = fs::File::open("/proc/self/exe").map_err(failed("open this program"))?;
        let (events, _) = broadcast::channel(EVENTS);
        let runtime = Self {
            inner: Arc::new(Inner {
                options,
                program,
                helper,
                cgroups,
                host_capabilities: CapabilitySet::of_host(),
                images,
                network,
                state: Mutex::default(),
                events,
            }),
        };
        if !runtime.inner.host_capabilities.contains("SYS_RESOURCE") {
            tracing::info!(
                "this machine forbids lowering oom_score_adj: containers keep the agent's value where they ask for less"
            );
        }
        runtime.adopt().await?;
        // Now that it is known which layers containers use, the others can go.
        let images = Arc::clone(&runtime.inner.images);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || images.sweep()).await {
            tracing::warn!(%error, "unused image layers stay");
        }
        Ok(runtime)
    }

    pub(super) fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.inner.options.run_dir.join("pods").join(id)
    }

    pub(super) fn container_dir(&self, record: &ContainerRecord) -> PathBuf {
        self.sandbox_dir(&record.sandbox).join(&record.id)
    }

    pub(super) fn writable_dir(&self, container: &str) -> PathBuf {
        self.inner.options.agent_dir.join("containers").join(container)
    }

    /// The record of a container, or that there is none.
    pub(super) fn record(&self, id: &str) -> RuntimeResult<ContainerRecord> {
        let state = self.inner.state.lock();
        state.containers.get(id).map(|container| container.record.clone()).ok_or_else(|| no_container(id))
    }

    /// The shim of a container's pod.
    pub(super) fn shim_of(&self, id: &str) -> RuntimeResult<(ContainerRecord, Arc<Shim>)> {
        let state = self.inner.state.lock();
        let container = state.containers.get(id).ok_or_else(|| no_container(id))?;
        let shim = state.sandboxes.get(&container.record.sandbox).and_then(|sandbox| sandbox.shim.clone());
        match (container.phase, shim) {
            (Phase::Running, Some(shim)) => Ok((container.record.clone(), shim)),
            _ => Err(RuntimeError::WrongState("container is not running".to_owned())),
        }
    }

    pub(super) fn emit(&self, kind: ContainerEventKind, sandbox: &str, container: &str) {
        let pod_uid = {
            let state = self.inner.state.lock();
            state.sandboxes.get(sandbox).map(|s| s.record.config.metadata.uid.clone()).unwrap_or_default()
        };
        let event = ContainerEvent {
            kind,
            sandbox_id: sandbox.to_owned(),
            pod_uid,
            container_id: container.to_owned(),
            at: SystemTime::now(),
        };
        let _ = self.inner.events.send(event);
    }

    /// Applies what a shim tells, in order, until it is gone.
    pub(super) async fn follow(self, sandbox: String, mut events: mpsc::UnboundedReceiver<ShimEvent>) {
        while let Some(event) = events.recv().await {
            match event {
                ShimEvent::Exit { container, exit } => self.ended(&container, exit).await,
                ShimEvent::Lost => {
                    self.lost(&sandbox).await;
                    return;
                }
            }
        }
    }

    /// A container's first process has ended: finds out why, ends the rest of it, tells the kubelet.
    pub(super) async fn ended(&self, id: &str, exit: Exit) {
        let Some(cgroup) = ({
            let state = self.inner.state.lock();
            // One that never executed its program is dealt with by who starts it.
            let running = |container: &&Container| container.phase == Phase::Running;
            state.containers.get(id).filter(running).map(|container| container.record.cgroup.clone())
        }) else {
            return;
        };
        let inner = Arc::clone(&self.inner);
        let out_of_memory = tokio::task::spawn_blocking(move || {
            let killed = inner.cgroups.oom_kills(&cgroup) > 0;
            inner.cgroups.kill(&cgroup, Duration::from_secs(5));
            if let Err(error) = inner.cgroups.remove(&cgroup) {
                tracing::debug!(%cgroup, %error, "cgroup of an ended container stays");
            }
            killed
        })
        .await
        .unwrap_or(false);
        self.finish(id, end_of(exit, out_of_memory));
    }

    /// Records the end of a container and tells it.
    pub(super) fn finish(&self, id: &str, end: End) {
        let (record, ended) = {
            let mut state = self.inner.state.lock();
            let Some(container) = state.containers.get_mut(id) else { return };
            if container.phase == Phase::Exited {
                return;
            }
            container.phase = Phase::Exited;
            container.pid = None;
            container.started_at = container.started_at.or(end.exit.started_at);
            container.record.end = Some(end);
            (container.record.clone(), container.ended.clone())
        };
        if let Err(error) = record::save(&self.container_dir(&record).join("container.json"), &record) {
            tracing::warn!(container = %id, %error, "the end of a container could not be recorded");
        }
        ended.send_replace(true);
        self.emit(ContainerEventKind::ContainerStopped, &record.sandbox, id);
    }

    /// The shim has died: its containers have no parent any more, so they end.
    async fn lost(&self, sandbox: &str) {
        let (cgroup, orphans) = {
            let mut state = self.inner.state.lock();
            let Some(found) = state.sandboxes.get_mut(sandbox) else { return };
            found.shim = None;
            if found.stopping {
                return;
            }
            found.ready = false;
            let cgroup = found.record.config.linux.cgroup_parent.clone();
            let orphans: Vec<String> = state
                .containers
                .values()
                .filter(|c| c.record.sandbox == sandbox && matches!(c.phase, Phase::Running | Phase::Starting))
                .map(|container| container.record.id.clone())
                .collect();
            (cgroup, orphans)
        };
        tracing::warn!(%sandbox, containers = orphans.len(), "the shim of a pod has died");
        self.kill_cgroup(cgroup).await;
        for id in orphans {
            // What the shim still wrote is better than a guess.
            let file = self.sandbox_dir(sandbox).join(format!("{id}.exit"));
            let end = record::load::<Exit>(&file).map_or_else(|_| end_of_orphan(), |exit| end_of(exit, false));
            self.finish(&id, end);
        }
        self.emit(ContainerEventKind::SandboxLost, sandbox, "");
    }

    pub(super) async fn kill_cgroup(&self, cgroup: String) {
        if cgroup.is_empty() {
            return;
        }
        let inner = Arc::clone(&self.inner);
        let _ = tokio::task::spawn_blocking(move || inner.cgroups.kill(&cgroup, Duration::from_secs(10))).await;
    }

    /// Status of one container.
    fn status_of(container: &Container) -> ContainerStatus {
        let record = &container.record;
        let end = record.end.clone().unwrap_or_default();
        let exited = container.phase == Phase::Exited;
        ContainerStatus {
            id: record.id.clone(),
            sandbox_id: record.sandbox.clone(),
            metadata: record.config.metadata.clone(),
            state: match container.phase {
                Phase::Created | Phase::Starting => ContainerState::Created,
                Phase::Running => ContainerState::Running,
                Phase::Exited => ContainerState::Exited,
            },
            created_at: record::time(record.created_at),
            started_at: container.started_at.map(record::time),
            finished_at: exited.then(|| record::time(end.exit.finished_at)),
            exit_code: end.exit.code,
            signal: end.exit.signal,
            reason: end.reason,
            message: end.message,
            image: record.config.user_specified_image.clone(),
            image_id: record.image_id.clone(),
            image_ref: record.image_ref.clone(),
            labels: record.config.labels.clone(),
            annotations: record.config.annotations.clone(),
            mounts: record.config.mounts.clone(),
            log_path: record.config.log_path.clone(),
            resources: record.config.linux.resources.clone(),
            pid: container.pid,
            user: Some(ContainerUser {
                uid: record.user.uid,
                gid: record.user.gid,
                supplemental_groups: record.user.groups.clone(),
            }),
        }
    }
}

/// The end as statuses word it.
pub(super) fn end_of(exit: Exit, out_of_memory: bool) -> End {
    let reason = match exit.code {
        _ if out_of_memory => "OOMKilled",
        0 => "Completed",
        _ => "Error",
    };
    End { exit, reason: reason.to_owned(), message: String::new() }
}

/// The end of a container whose shim died: nobody saw how it ended.
pub(super) fn end_of_orphan() -> End {
    End {
        exit: Exit { code: 137, signal: 9, started_at: None, finished_at: record::now() },
        reason: "Error".to_owned(),
        message: "the process that looks after the pod has died".to_owned(),
    }
}

pub(super) fn no_container(id: &str) -> RuntimeError {
    RuntimeError::NotFound { kind: "container", id: id.to_owned() }
}

pub(super) fn no_sandbox(id: &str) -> RuntimeError {
    RuntimeError::NotFound { kind: "pod sandbox", id: id.to_owned() }
}

/// True when `wanted` is a subset of `labels`.
fn selected(wanted: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn sandbox_status(sandbox: &Sandbox) -> PodSandboxStatus {
    let record = &sandbox.record;
    PodSandboxStatus {
        id: record.id.clone(),
        metadata: record.config.metadata.clone(),
        state: if sandbox.ready { PodSandboxState::Ready } else { PodSandboxState::NotReady },
        created_at: record::time(record.created_at),
        ips: record.ips.clone(),
        labels: record.config.labels.clone(),
        annotations: record.config.annotations.clone(),
    }
}

pub(super) fn matches(filter: &PodSandboxFilter, status: &PodSandboxStatus) -> bool {
    filter.id.as_ref().is_none_or(|id| *id == status.id)
        && filter.pod_uid.as_ref().is_none_or(|uid| *uid == status.metadata.uid)
        && filter.state.is_none_or(|state| state == status.state)
        && selected(&filter.label_selector, &status.labels)
}

impl Runtime for Embedded {
    fn version(&self) -> RuntimeVersion {
        RuntimeVersion { runtime_name: "coracle".to_owned(), runtime_version: env!("CARGO_PKG_VERSION").to_owned() }
    }

    fn status(&self) -> BoxFuture<'_, RuntimeResult<RuntimeStatus>> {
        let status = RuntimeStatus { runtime_ready: true, network_ready: true, message: String::new() };
        Box::pin(std::future::ready(Ok(status)))
    }

    fn run_pod_sandbox<'a>(&'a self, config: &'a PodSandboxConfig) -> BoxFuture<'a, RuntimeResult<String>> {
        Box::pin(self.run_sandbox(config))
    }

    fn stop_pod_sandbox<'a>(&'a self, sandbox_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.stop_sandbox(sandbox_id))
    }

    fn remove_pod_sandbox<'a>(&'a self, sandbox_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.remove_sandbox(sandbox_id))
    }

    fn pod_sandbox_status<'a>(&'a self, sandbox_id: &'a str) -> BoxFuture<'a, RuntimeResult<PodSandboxStatus>> {
        let state = self.inner.state.lock();
        let found = state.sandboxes.get(sandbox_id).map(sandbox_status).ok_or_else(|| no_sandbox(sandbox_id));
        Box::pin(std::future::ready(found))
    }

    fn list_pod_sandboxes<'a>(
        &'a self,
        filter: &'a PodSandboxFilter,
    ) -> BoxFuture<'a, RuntimeResult<Vec<PodSandboxStatus>>> {
        let state = self.inner.state.lock();
        let found = state.sandboxes.values().map(sandbox_status).filter(|status| matches(filter, status)).collect();
        Box::pin(std::future::ready(Ok(found)))
    }

    fn create_container<'a>(
        &'a self,
        sandbox_id: &'a str,
        config: &'a ContainerConfig,
    ) -> BoxFuture<'a, RuntimeResult<String>> {
        Box::pin(self.create(sandbox_id, config))
    }

    fn start_container<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.launch(container_id))
    }

    fn stop_container<'a>(&'a self, container_id: &'a str, grace_seconds: u64) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.stop(container_id, Duration::from_secs(grace_seconds)))
    }

    fn remove_container<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.remove(container_id))
    }

    fn list_containers<'a>(
        &'a self,
        filter: &'a ContainerFilter,
    ) -> BoxFuture<'a, RuntimeResult<Vec<ContainerStatus>>> {
        let fits = |status: &ContainerStatus| {
            filter.id.as_ref().is_none_or(|id| *id == status.id)
                && filter.sandbox_id.as_ref().is_none_or(|id| *id == status.sandbox_id)
                && filter.state.is_none_or(|state| state == status.state)
                && selected(&filter.label_selector, &status.labels)
        };
        let mut found = self.statuses();
        found.retain(fits);
        Box::pin(std::future::ready(Ok(found)))
    }

    fn container_status<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<ContainerStatus>> {
        let state = self.inner.state.lock();
        let found = state
            .containers
            .get(container_id)
            .map(|container| Self::complete(&state, Self::status_of(container)))
            .ok_or_else(|| no_container(container_id));
        Box::pin(std::future::ready(found))
    }

    fn update_container_resources<'a>(
        &'a self,
        container_id: &'a str,
        resources: &'a LinuxContainerResources,
    ) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.update_resources(container_id, resources))
    }

    fn update_pod_sandbox_resources<'a>(
        &'a self,
        sandbox_id: &'a str,
        resources: &'a LinuxContainerResources,
    ) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(std::future::ready(self.limit_pod(sandbox_id, resources)))
    }

    fn reopen_container_log<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<()>> {
        Box::pin(self.reopen_log(container_id))
    }

    fn exec_sync<'a>(
        &'a self,
        container_id: &'a str,
        command: &'a [String],
        timeout: Option<Duration>,
    ) -> BoxFuture<'a, RuntimeResult<ExecSyncResponse>> {
        Box::pin(self.run_command(container_id, command, timeout))
    }

    fn exec<'a>(&'a self, request: &'a ExecRequest) -> BoxFuture<'a, RuntimeResult<StreamSession>> {
        Box::pin(self.start_command(request))
    }

    fn attach<'a>(&'a self, request: &'a AttachRequest) -> BoxFuture<'a, RuntimeResult<StreamSession>> {
        Box::pin(self.attach_streams(request))
    }

    fn port_forward<'a>(
        &'a self,
        sandbox_id: &'a str,
        port: u16,
    ) -> BoxFuture<'a, RuntimeResult<tokio::net::TcpStream>> {
        Box::pin(self.connect_to_port(sandbox_id, port))
    }

    fn container_stats<'a>(&'a self, container_id: &'a str) -> BoxFuture<'a, RuntimeResult<ContainerStats>> {
        Box::pin(self.stats_of(container_id))
    }

    fn list_pod_sandbox_stats<'a>(
        &'a self,
        filter: &'a PodSandboxFilter,
    ) -> BoxFuture<'a, RuntimeResult<Vec<PodSandboxStats>>> {
        Box::pin(self.sandbox_stats(filter))
    }

    fn events(&self) -> broadcast::Receiver<ContainerEvent> {
        self.inner.events.subscribe()
    }
}

impl Embedded {
    fn statuses(&self) -> Vec<ContainerStatus> {
        let state = self.inner.state.lock();
        state.containers.values().map(|container| Self::complete(&state, Self::status_of(container))).collect()
    }

    /// Fills in what only the sandbox knows.
    fn complete(state: &State, mut status: ContainerStatus) -> ContainerStatus {
        if let Some(sandbox) = state.sandboxes.get(&status.sandbox_id) {
            status.log_path = sandbox.record.config.log_directory.join(&status.log_path);
        }
        status
    }
}

/// An error of a step on files.
pub(super) fn step(what: impl Into<String>) -> impl FnOnce(io::Error) -> RuntimeError {
    let what = what.into();
    move |source| RuntimeError::Io { what, source }
}

/// Takes a mount away with all that is stacked there; fine when there is none.
pub(super) fn unmount(path: &Path) {
    use nix::mount::{MntFlags, umount2};
    for _ in 0..8 {
        if umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).is_err() {
            return;
        }
    }
}
