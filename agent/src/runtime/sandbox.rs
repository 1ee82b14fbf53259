//! Sandboxes: made, stopped, removed, and found again by the next agent.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coracle_shim::protocol::{PodSpec, Request};
use nix::mount::{MsFlags, mount};
use tokio::sync::mpsc;

use super::embedded::{Embedded, Sandbox, end_of_orphan, no_sandbox, step, unmount};
use super::record::{self, SandboxRecord};
use super::shim::Shim;
use super::{
    ContainerEventKind, LinuxContainerResources, NamespaceMode, PodSandboxConfig, RuntimeError, RuntimeResult,
};
use crate::net::{self, HostPort, PodNetworkRequest};

/// Size of a pod's `/dev/shm`, as containerd has it.
const SHM_OPTIONS: &str = "mode=1777,size=67108864";

impl Embedded {
    pub(super) async fn run_sandbox(&self, config: &PodSandboxConfig) -> RuntimeResult<String> {
        let record = SandboxRecord {
            id: record::new_id(),
            config: config.clone(),
            created_at: record::now(),
            ..SandboxRecord::default()
        };
        let id = record.id.clone();
        match self.make_sandbox(record).await {
            Ok(()) => Ok(id),
            Err(error) => {
                self.clean_sandbox(&id, &config.linux.cgroup_parent).await;
                let uid = &config.metadata.uid;
                if config.linux.namespace_options.network != NamespaceMode::Node
                    && let Err(error) = self.inner.network.detach(uid).await
                {
                    tracing::warn!(%uid, %error, "network of a failed sandbox could not be given back");
                }
                self.inner.state.lock().sandboxes.remove(&id);
                Err(error)
            }
        }
    }

    async fn make_sandbox(&self, mut record: SandboxRecord) -> RuntimeResult<()> {
        let folder = self.sandbox_dir(&record.id);
        let config = &record.config;
        let options = config.linux.namespace_options;
        fs::create_dir_all(folder.join("shm")).map_err(step("create the sandbox's folder"))?;
        if !config.log_directory.as_os_str().is_empty() {
            fs::create_dir_all(&config.log_directory).map_err(step("create the pod's log folder"))?;
        }
        // Recorded first: whatever follows is found and cleaned up after a crash.
        record::save(&folder.join("sandbox.json"), &record).map_err(step("record the sandbox"))?;
        if options.ipc != NamespaceMode::Node {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("shm"), &folder.join("shm"), Some("tmpfs"), flags, Some(SHM_OPTIONS))
                .map_err(|errno| step("mount the pod's /dev/shm")(errno.into()))?;
        }
        let cgroup = &config.linux.cgroup_parent;
        if !cgroup.is_empty() {
            self.check_cgroup(cgroup)?;
            let cgroups = &self.inner.cgroups;
            cgroups.create(cgroup, true).map_err(step("create the pod's cgroup"))?;
            cgroups.apply(cgroup, &config.linux.resources).map_err(step("limit the pod's cgroup"))?;
        }
        self.inner.program.start(&self.pod_spec(&record)?).await?;
        let (shim, events) = connect(&folder).await?;
        {
            let sandbox = Sandbox { record: record.clone(), ready: false, shim: Some(shim), stopping: false };
            self.inner.state.lock().sandboxes.insert(record.id.clone(), sandbox);
        }
        tokio::spawn(self.clone().follow(record.id.clone(), events));
        if options.network != NamespaceMode::Node {
            let request = network_request(&record.config, &folder.join("ns/net"));
            let addresses = self.inner.network.attach(&request).await;
            record.ips = addresses.map_err(|error| RuntimeError::Network(explain(&error)))?.ips;
            record::save(&folder.join("sandbox.json"), &record).map_err(step("record the sandbox"))?;
        }
        let mut state = self.inner.state.lock();
        let sandbox = state.sandboxes.get_mut(&record.id).ok_or_else(|| no_sandbox(&record.id))?;
        if sandbox.shim.is_none() {
            return Err(RuntimeError::Shim(std::io::ErrorKind::ConnectionReset.into()));
        }
        sandbox.record = record;
        sandbox.ready = true;
        Ok(())
    }

    /// A cgroup outside of the instance's own is never touched.
    fn check_cgroup(&self, cgroup: &str) -> RuntimeResult<()> {
        let path = Path::new(cgroup);
        let ours = path.starts_with(&self.inner.options.cgroup)
            && path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if ours {
            Ok(())
        } else {
            Err(RuntimeError::Invalid(format!("cgroup parent {cgroup:?} is not one of this node's")))
        }
    }

    fn pod_spec(&self, record: &SandboxRecord) -> RuntimeResult<PodSpec> {
        let options = record.config.linux.namespace_options;
        let mut namespaces = Vec::new();
        if options.network != NamespaceMode::Node {
            namespaces.extend(["net".to_owned(), "uts".to_owned()]);
        }
        if options.ipc != NamespaceMode::Node {
            namespaces.push("ipc".to_owned());
        }
        for name in record.config.linux.sysctls.keys() {
            let kind = sysctl_namespace(name)
                .ok_or_else(|| RuntimeError::Invalid(format!("sysctl {name:?} is not namespaced")))?;
            if !namespaces.iter().any(|namespace| namespace == kind) {
                return Err(RuntimeError::Invalid(format!(
                    "sysctl {name:?} is not allowed with the host's {kind} namespace"
                )));
            }
        }
        let cgroup = &record.config.linux.cgroup_parent;
        let shared_pid = options.pid == NamespaceMode::Pod;
        let mut init_cgroup_procs = Vec::new();
        if shared_pid && !cgroup.is_empty() {
            let init = format!("{cgroup}/init");
            self.inner.cgroups.create(&init, false).map_err(step("create the cgroup of the pod's init"))?;
            init_cgroup_procs = self.inner.cgroups.procs(&init);
        }
        Ok(PodSpec {
            dir: self.sandbox_dir(&record.id),
            hostname: record.config.hostname.clone(),
            namespaces,
            shared_pid,
            sysctls: record.config.linux.sysctls.clone(),
            cgroup_procs: self.inner.cgroups.procs(&format!("{}/shims", self.inner.options.cgroup)),
            init_cgroup_procs,
        })
    }

    /// New limits for the pod as a whole.
    pub(super) fn limit_pod(&self, id: &str, resources: &LinuxContainerResources) -> RuntimeResult<()> {
        let cgroup = {
            let state = self.inner.state.lock();
            let sandbox = state.sandboxes.get(id).ok_or_else(|| no_sandbox(id))?;
            sandbox.record.config.linux.cgroup_parent.clone()
        };
        self.inner.cgroups.apply(&cgroup, resources).map_err(step("limit the pod"))
    }

    pub(super) async fn stop_sandbox(&self, id: &str) -> RuntimeResult<()> {
        let (record, shim, containers) = {
            let mut state = self.inner.state.lock();
            // Stopping what is gone succeeds.
            let Some(sandbox) = state.sandboxes.get_mut(id) else { return Ok(()) };
            sandbox.stopping = true;
            sandbox.ready = false;
            let (record, shim) = (sandbox.record.clone(), sandbox.shim.clone());
            let in_it = state.containers.values().filter(|container| container.record.sandbox == id);
            (record, shim, in_it.map(|container| container.record.id.clone()).collect::<Vec<_>>())
        };
        futures::future::join_all(containers.iter().map(|container| self.stop(container, Duration::ZERO)))
            .await
            .into_iter()
            .collect::<RuntimeResult<Vec<()>>>()?;
        if record.config.linux.namespace_options.network != NamespaceMode::Node && !record.stopped {
            let detached = self.inner.network.detach(&record.config.metadata.uid).await;
            detached.map_err(|error| RuntimeError::Network(explain(&error)))?;
        }
        if let Some(shim) = shim {
            // Containers that were created and never started have no process; the others have ended.
            if let Err(error) = shim.call(Request::Shutdown, Vec::new()).await {
                tracing::debug!(sandbox = %id, error = %error.message(), "shim does not shut down");
            }
        }
        self.kill_cgroup(record.config.linux.cgroup_parent.clone()).await;
        self.release_sandbox(id, &record.config.linux.cgroup_parent).await;
        let stopped = {
            let mut state = self.inner.state.lock();
            let Some(sandbox) = state.sandboxes.get_mut(id) else { return Ok(()) };
            sandbox.shim = None;
            sandbox.record.stopped = true;
            sandbox.record.clone()
        };
        record::save(&self.sandbox_dir(id).join("sandbox.json"), &stopped).map_err(step("record the sandbox"))
    }

    pub(super) async fn remove_sandbox(&self, id: &str) -> RuntimeResult<()> {
        self.stop_sandbox(id).await?;
        let (containers, cgroup) = {
            let state = self.inner.state.lock();
            let Some(sandbox) = state.sandboxes.get(id) else { return Ok(()) };
            let in_it = state.containers.values().filter(|container| container.record.sandbox == id);
            let containers: Vec<String> = in_it.map(|container| container.record.id.clone()).collect();
            (containers, sandbox.record.config.linux.cgroup_parent.clone())
        };
        for container in containers {
            self.remove(&container).await?;
        }
        self.clean_sandbox(id, &cgroup).await;
        self.inner.state.lock().sandboxes.remove(id);
        Ok(())
    }

    /// Lets go of everything of a sandbox that the kernel holds.
    async fn release_sandbox(&self, id: &str, cgroup: &str) {
        let folder = self.sandbox_dir(id);
        let (inner, cgroup) = (Arc::clone(&self.inner), cgroup.to_owned());
        let work = move || {
            for name in ["net", "ipc", "uts", "pid"] {
                unmount(&folder.join("ns").join(name));
            }
            unmount(&folder.join("shm"));
            if !cgroup.is_empty() {
                if let Err(error) = inner.cgroups.remove(&cgroup) {
                    tracing::debug!(%cgroup, %error, "cgroup of a pod stays");
                }
                inner.cgroups.remove_empty_above(&cgroup, &format!("{}/kubepods", inner.options.cgroup));
            }
        };
        let _ = tokio::task::spawn_blocking(work).await;
    }

    /// Removes every trace of a sandbox. Nothing of it may run any more, or it is killed.
    async fn clean_sandbox(&self, id: &str, cgroup: &str) {
        let shim = {
            let mut state = self.inner.state.lock();
            state.sandboxes.get_mut(id).and_then(|sandbox| {
                sandbox.stopping = true;
                sandbox.shim.take()
            })
        };
        if let Some(shim) = shim {
            let _ = shim.call(Request::Shutdown, Vec::new()).await;
        }
        self.kill_cgroup(cgroup.to_owned()).await;
        self.release_sandbox(id, cgroup).await;
        let folder = self.sandbox_dir(id);
        let removed = tokio::task::spawn_blocking(move || {
            unmount_below(&folder);
            fs::remove_dir_all(&folder)
        });
        if let Ok(Err(error)) = removed.await
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(sandbox = %id, %error, "folder of a sandbox stays");
        }
    }

    /// Finds the pods that an earlier agent started.
    pub(super) async fn adopt(&self) -> RuntimeResult<()> {
        let run_dir = self.inner.options.run_dir.clone();
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let mark = run_dir.join("boot_id");
        // `/run` may be on disk: what another start of the kernel left there is rubbish.
        let same_boot = fs::read_to_string(&mark).is_ok_and(|known| known == boot);
        for entry in fs::read_dir(run_dir.join("pods")).map_err(step("look for running pods"))?.flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            match record::load::<SandboxRecord>(&entry.path().join("sandbox.json")) {
                Ok(record) if same_boot && record.id == id => self.adopt_sandbox(record).await,
                Ok(record) => self.clean_sandbox(&id, &record.config.linux.cgroup_parent).await,
                Err(error) => {
                    tracing::warn!(sandbox = %id, %error, "a sandbox without record is removed");
                    self.clean_sandbox(&id, "").await;
                }
            }
        }
        fs::write(&mark, boot).map_err(step("mark the start of the kernel"))?;
        // Writable layers that no container owns.
        for entry in fs::read_dir(self.inner.options.agent_dir.join("containers")).into_iter().flatten().flatten() {
            let id = entry.file_name().to_string_lossy().into_owned();
            if !self.inner.state.lock().containers.contains_key(&id) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let live = self.inner.state.lock().sandboxes.len();
        if live > 0 {
            tracing::info!(pods = live, "pods of an earlier start found");
        }
        Ok(())
    }

    async fn adopt_sandbox(&self, record: SandboxRecord) {
        let folder = self.sandbox_dir(&record.id);
        let id = record.id.clone();
        let connection = if record.stopped { None } else { connect(&folder).await.ok() };
        let mut reports = Vec::new();
        let mut shim = None;
        let mut follow = None;
        if let Some((connected, events)) = connection {
            match tokio::time::timeout(Duration::from_secs(5), connected.call(Request::Hello, Vec::new())).await {
                Ok(Ok(answer)) => {
                    reports = answer.containers;
                    (shim, follow) = (Some(connected), Some(events));
                }
                _ => tracing::warn!(sandbox = %id, "the shim of a pod does not answer"),
            }
        }
        let alive = shim.is_some();
        let cgroup = record.config.linux.cgroup_parent.clone();
        let stopped = record.stopped;
        let sandbox = Sandbox { record, ready: alive && !stopped, shim, stopping: stopped };
        self.inner.state.lock().sandboxes.insert(id.clone(), sandbox);
        if !alive && !stopped {
            // Its processes have lost their parent; nobody would see them end.
            self.kill_cgroup(cgroup).await;
        }
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.path().join("container.json").exists() {
                self.adopt_container(&entry.path(), &reports, alive).await;
            }
        }
        if let Some(events) = follow {
            tokio::spawn(self.clone().follow(id.clone(), events));
        } else if !stopped {
            self.emit(ContainerEventKind::SandboxLost, &id, "");
        }
    }

    async fn adopt_container(&self, folder: &Path, reports: &[coracle_shim::protocol::Report], alive: bool) {
        let record: record::ContainerRecord = match record::load(&folder.join("container.json")) {
            Ok(record) => record,
            Err(error) => {
                tracing::warn!(folder = %folder.display(), %error, "a container without record is ignored");
                return;
            }
        };
        let id = record.id.clone();
        let report = reports.iter().find(|report| report.container == id);
        let file = folder.with_file_name(format!("{id}.exit"));
        let known_end = record.end.is_some();
        self.inner.images.hold_layers(&id, &record.layers);
        self.insert(record, report);
        if known_end {
            return;
        }
        match report {
            Some(report) => match (report.exit, report.started_at) {
                (Some(exit), _) => self.ended(&id, exit).await,
                (None, Some(_)) => {}
                // The agent died between creating it and starting it: nobody would start it now.
                (None, None) => {
                    let cgroup = self.record(&id).map(|record| record.cgroup).unwrap_or_default();
                    self.kill_cgroup(cgroup).await;
                    self.finish(&id, end_of_orphan());
                }
            },
            None if alive => {}
            None => match record::load(&file) {
                Ok(exit) => self.finish(&id, super::embedded::end_of(exit, false)),
                Err(_) if self.never_started(&id) => {}
                Err(_) => self.finish(&id, end_of_orphan()),
            },
        }
    }
}

/// Connects to a shim.
async fn connect(folder: &Path) -> RuntimeResult<(Arc<Shim>, mpsc::UnboundedReceiver<super::shim::ShimEvent>)> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let shim = Shim::connect(folder, sender).await.map_err(RuntimeError::Shim)?;
    Ok((shim, receiver))
}

fn network_request(config: &PodSandboxConfig, netns: &Path) -> PodNetworkRequest {
    let host_ports = config.port_mappings.iter().filter(|mapping| mapping.host_port != 0).map(|mapping| HostPort {
        protocol: match mapping.protocol {
            super::Protocol::Tcp => net::Protocol::Tcp,
            super::Protocol::Udp => net::Protocol::Udp,
            super::Protocol::Sctp => net::Protocol::Sctp,
        },
        host_ip: mapping.host_ip.parse().ok(),
        host_port: mapping.host_port,
        container_port: mapping.container_port,
    });
    PodNetworkRequest {
        uid: config.metadata.uid.clone(),
        namespace: config.metadata.namespace.clone(),
        name: config.metadata.name.clone(),
        netns: netns.to_owned(),
        host_ports: host_ports.collect(),
    }
}

/// The namespace that a sysctl belongs to, as upstream's list of them.
fn sysctl_namespace(name: &str) -> Option<&'static str> {
    let name = name.replace('/', ".");
    match name.as_str() {
        "kernel.sem" => Some("ipc"),
        "kernel.hostname" | "kernel.domainname" => Some("uts"),
        _ if name.starts_with("kernel.shm") || name.starts_with("kernel.msg") || name.starts_with("fs.mqueue.") => {
            Some("ipc")
        }
        _ if name.starts_with("net.") => Some("net"),
        _ => None,
    }
}

/// Unmounts everything below a folder, innermost first.
pub(super) fn unmount_below(folder: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut points: Vec<std::path::PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| std::path::PathBuf::from(path.replace("\\040", " ")))
        .filter(|path| path.starts_with(folder))
        .collect();
    points.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for point in points {
        unmount(&point);
    }
}

/// The error with its causes.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    text
}
