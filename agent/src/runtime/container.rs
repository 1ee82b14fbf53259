//! Containers: created, started, stopped, removed.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use coracle_shim::protocol::{CapabilitySets, Create, Exit, LogSpec, Report, Request};
use tokio::sync::watch;

use super::embedded::{Container, Embedded, Phase, no_container, no_sandbox, step, unmount};
use super::record::{self, ContainerRecord, End, ExecTemplate, SandboxRecord};
use super::shim::CallError;
use super::spec::{self, DeviceNode, SpecInput};
use super::user::UserFiles;
use super::{
    ContainerConfig, ContainerEventKind, LinuxContainerResources, NamespaceMode, RuntimeError, RuntimeResult, seccomp,
};
use crate::image::unpack::{open_folder, resolve};
use crate::image::{Image, ImageError};

impl Embedded {
    pub(super) async fn create(&self, sandbox: &str, config: &ContainerConfig) -> RuntimeResult<String> {
        let sandbox = {
            let state = self.inner.state.lock();
            let found = state.sandboxes.get(sandbox).ok_or_else(|| no_sandbox(sandbox))?;
            if !found.ready {
                return Err(RuntimeError::WrongState(format!("sandbox container {sandbox:?} is not running")));
            }
            found.record.clone()
        };
        let (this, config) = (self.clone(), config.clone());
        let work = move || {
            let id = record::new_id();
            let made = this.prepare(&id, &sandbox, config);
            if made.is_err() {
                this.erase(&sandbox.id, &id);
            }
            made
        };
        let joined = tokio::task::spawn_blocking(work).await;
        let record = joined.map_err(|error| RuntimeError::Create(error.to_string()))??;
        let (id, sandbox) = (record.id.clone(), record.sandbox.clone());
        self.insert(record, None);
        self.emit(ContainerEventKind::ContainerCreated, &sandbox, &id);
        Ok(id)
    }

    /// The first process of a running container.
    fn pid_of(&self, id: &str) -> RuntimeResult<i32> {
        let state = self.inner.state.lock();
        let pid = state.containers.get(id).and_then(|container| container.pid);
        pid.ok_or_else(|| RuntimeError::Invalid(format!("target container {id:?} is not running")))
    }

    /// Root filesystem, user, specification: everything that can be wrong without running anything.
    fn prepare(&self, id: &str, sandbox: &SandboxRecord, config: ContainerConfig) -> RuntimeResult<ContainerRecord> {
        let image: Image =
            self.inner.images.find(&config.image)?.ok_or_else(|| ImageError::NotFound(config.image.clone()))?;
        let folder = self.sandbox_dir(&sandbox.id).join(id);
        let rootfs = folder.join("rootfs");
        fs::create_dir_all(&folder).map_err(step("create the container's folder"))?;
        self.inner.images.mount_rootfs(&image.id, id, &self.writable_dir(id), &rootfs)?;
        let context = &config.linux.security_context;
        let files = UserFiles::read(&rootfs).map_err(step("read the image's users"))?;
        let user = files.resolve(context, &image.config.user)?;
        let capabilities = spec::capabilities(&config, self.inner.host_capabilities)?;
        let profile = seccomp::profile(&context.seccomp, capabilities, context.privileged)?;
        for mount in &config.mounts {
            self.check_mount(mount)?;
        }
        let cwd = spec::working_dir(&config, &image.config);
        make_working_dir(&rootfs, &cwd).map_err(step(format!("create working directory {cwd:?}")))?;
        let input = SpecInput {
            config: &config,
            image: &image.config,
            user: &user,
            rootfs: rootfs.clone(),
            hostname: &self.hostname_of(sandbox),
            namespaces: self.sandbox_dir(&sandbox.id).join("ns"),
            pid_target: context.pid_target.as_deref().map(|target| self.pid_of(target)).transpose()?,
            shm: (sandbox.config.linux.namespace_options.ipc != NamespaceMode::Node)
                .then(|| self.sandbox_dir(&sandbox.id).join("shm")),
            cgroup: self.cgroup_of(sandbox, id),
            cgroup_v2: self.inner.cgroups.is_v2(),
            host_capabilities: self.inner.host_capabilities,
            devices: devices_of(&config)?,
            seccomp: profile.as_ref(),
        };
        let text = spec::spec(&input)?.to_string();
        fs::write(folder.join("config.json"), text).map_err(step("write the container's specification"))?;
        if let Some(profile) = &profile {
            let filter = seccomp::compile(profile)?;
            fs::write(folder.join("seccomp.bpf"), filter).map_err(step("write the container's seccomp filter"))?;
        }
        let record = ContainerRecord {
            id: id.to_owned(),
            sandbox: sandbox.id.clone(),
            created_at: record::now(),
            image_id: image.id.clone(),
            image_ref: image.reference().to_owned(),
            layers: self.inner.images.held_by(id).unwrap_or_default(),
            stop_signal: if config.stop_signal.is_empty() {
                image.config.stop_signal.clone()
            } else {
                config.stop_signal.clone()
            },
            cgroup: input.cgroup.clone(),
            exec: ExecTemplate {
                env: spec::environment(&input),
                cwd,
                capabilities: CapabilitySets {
                    bounding: capabilities.0,
                    effective: capabilities.0,
                    permitted: capabilities.0,
                    ..CapabilitySets::default()
                },
                no_new_privileges: context.no_new_privs,
                rlimits: Vec::new(),
                seccomp: profile.is_some(),
            },
            user: user.clone(),
            end: None,
            config: config.clone(),
        };
        record::save(&folder.join("container.json"), &record).map_err(step("record the container"))?;
        Ok(record)
    }

    fn hostname_of(&self, sandbox: &SandboxRecord) -> String {
        if sandbox.config.hostname.is_empty() || sandbox.config.linux.namespace_options.network == NamespaceMode::Node {
            return fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        }
        sandbox.config.hostname.clone()
    }

    fn cgroup_of(&self, sandbox: &SandboxRecord, id: &str) -> String {
        let parent = &sandbox.config.linux.cgroup_parent;
        let parent = if parent.is_empty() { format!("{}/pods", self.inner.options.cgroup) } else { parent.clone() };
        format!("{parent}/{id}")
    }

    /// What is mounted must be there; a folder of the node is made, as upstream's runtimes do.
    fn check_mount(&self, mount: &super::Mount) -> RuntimeResult<()> {
        if mount.container_path.is_empty() || mount.container_path.trim_matches('/').is_empty() {
            return Err(RuntimeError::Invalid(format!("mount path {:?} is not possible", mount.container_path)));
        }
        match fs::symlink_metadata(&mount.host_path) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&mount.host_path).map_err(step(format!("failed to mkdir {:?}", mount.host_path)))
            }
            Err(error) => Err(RuntimeError::Create(format!("failed to stat {:?}: {error}", mount.host_path))),
        }
    }

    pub(super) fn insert(&self, record: ContainerRecord, report: Option<&Report>) {
        let phase = match (&record.end, report) {
            (Some(_), _) => Phase::Exited,
            // Its end, if it has one, is applied next.
            (None, Some(_)) => Phase::Running,
            (None, None) => Phase::Created,
        };
        let started_at = record.end.as_ref().and_then(|end| end.exit.started_at).or(report.and_then(|r| r.started_at));
        let container = Container {
            phase,
            pid: report.map(|report| report.pid),
            started_at,
            ended: watch::Sender::new(phase == Phase::Exited),
            record,
        };
        self.inner.state.lock().containers.insert(container.record.id.clone(), container);
    }

    /// True for a container whose program was never executed.
    pub(super) fn never_started(&self, id: &str) -> bool {
        let state = self.inner.state.lock();
        let Some(container) = state.containers.get(id) else { return true };
        !self.container_dir(&container.record).join("state").exists()
    }

    pub(super) async fn launch(&self, id: &str) -> RuntimeResult<()> {
        let (record, shim, log) = {
            let mut state = self.inner.state.lock();
            let container = state.containers.get_mut(id).ok_or_else(|| no_container(id))?;
            if container.phase != Phase::Created {
                return Err(RuntimeError::WrongState(format!("container {id:?} is not in created state")));
            }
            container.phase = Phase::Starting;
            let record = container.record.clone();
            let sandbox = state.sandboxes.get(&record.sandbox).ok_or_else(|| no_sandbox(&record.sandbox))?;
            let shim = sandbox.shim.clone().filter(|_| sandbox.ready);
            let log = sandbox.record.config.log_directory.join(&record.config.log_path);
            (record, shim, log)
        };
        let result = match shim {
            Some(shim) => self.execute(&record, &shim, &log).await,
            None => Err(RuntimeError::WrongState("sandbox is not ready".to_owned())),
        };
        match result {
            Ok((pid, at)) => {
                {
                    let mut state = self.inner.state.lock();
                    if let Some(container) = state.containers.get_mut(id)
                        && container.phase == Phase::Starting
                    {
                        container.phase = Phase::Running;
                        container.pid = Some(pid);
                        container.started_at = Some(at);
                    }
                }
                self.emit(ContainerEventKind::ContainerStarted, &record.sandbox, id);
                // An end that came before the phase changed was put aside.
                let file = self.sandbox_dir(&record.sandbox).join(format!("{id}.exit"));
                if let Ok(exit) = record::load::<Exit>(&file) {
                    self.ended(id, exit).await;
                }
                Ok(())
            }
            Err(error) => {
                self.kill_cgroup(record.cgroup.clone()).await;
                let _ = self.inner.cgroups.remove(&record.cgroup);
                // What containerd reports for a container that could not be started.
                let exit = Exit { code: 128, signal: 0, started_at: None, finished_at: record::now() };
                self.finish(id, End { exit, reason: "StartError".to_owned(), message: error.to_string() });
                Err(error)
            }
        }
    }

    /// Has the shim create the container and execute its program; its pid and when.
    async fn execute(
        &self,
        record: &ContainerRecord,
        shim: &super::shim::Shim,
        log: &Path,
    ) -> RuntimeResult<(i32, u64)> {
        let cgroups = &self.inner.cgroups;
        let config = &record.config;
        cgroups.create(&record.cgroup, false).map_err(step("create the container's cgroup"))?;
        cgroups.apply(&record.cgroup, &config.linux.resources).map_err(step("limit the container"))?;
        let devices = devices_of(config)?;
        let all = config.linux.security_context.privileged;
        cgroups
            .allow_devices(&record.cgroup, &spec::device_rules(&devices), all)
            .map_err(step("give the container its devices"))?;
        let log = (!config.log_path.as_os_str().is_empty()).then(|| LogSpec {
            path: log.to_owned(),
            max_bytes: self.inner.options.log_max_bytes,
            max_files: self.inner.options.log_max_files,
        });
        let request = Create {
            container: record.id.clone(),
            bundle: self.container_dir(record),
            stdin: config.stdin,
            stdin_once: config.stdin_once,
            tty: config.tty,
            uid: record.user.uid,
            oom_score_adj: config.linux.resources.oom_score_adj.and_then(|value| i32::try_from(value).ok()),
            cgroup_procs: Vec::new(),
            log,
        };
        let program = OwnedFd::from(self.inner.helper.try_clone().map_err(step("open this program"))?);
        let created = shim.call(Request::Create(request), vec![program]).await.map_err(start_error)?;
        let started = shim.call(Request::Start { container: record.id.clone() }, Vec::new()).await;
        let started = started.map_err(start_error)?;
        Ok((created.pid.unwrap_or(0), started.at.unwrap_or_else(record::now)))
    }

    pub(super) async fn stop(&self, id: &str, grace: Duration) -> RuntimeResult<()> {
        let (record, mut ended, phase) = {
            let state = self.inner.state.lock();
            let Some(container) = state.containers.get(id) else { return Ok(()) };
            (container.record.clone(), container.ended.subscribe(), container.phase)
        };
        match phase {
            Phase::Exited => return Ok(()),
            Phase::Created => {
                // Never executed: it ends without a process.
                let exit = Exit { code: 137, signal: 9, started_at: None, finished_at: record::now() };
                self.finish(id, super::embedded::end_of(exit, false));
                return Ok(());
            }
            Phase::Starting | Phase::Running => {}
        }
        let Ok((_, shim)) = self.shim_of(id) else {
            self.kill_cgroup(record.cgroup).await;
            return Ok(());
        };
        if !grace.is_zero() {
            let signal = signal_number(&record.stop_signal);
            self.signal(&shim, id, signal).await?;
            if tokio::time::timeout(grace, ended.wait_for(|ended| *ended)).await.is_ok() {
                return Ok(());
            }
        }
        self.signal(&shim, id, libc::SIGKILL).await?;
        // Processes of a container without process-id namespace of its own do not go with their first one.
        for patience in [1, 30] {
            if tokio::time::timeout(Duration::from_secs(patience), ended.wait_for(|ended| *ended)).await.is_ok() {
                return Ok(());
            }
            self.kill_cgroup(record.cgroup.clone()).await;
        }
        Err(RuntimeError::WrongState(format!("container {id:?} does not end after SIGKILL")))
    }

    async fn signal(&self, shim: &super::shim::Shim, id: &str, signal: i32) -> RuntimeResult<()> {
        match shim.call(Request::Kill { container: id.to_owned(), signal }, Vec::new()).await {
            // It has ended meanwhile.
            Ok(_) | Err(CallError::Refused(_) | CallError::Gone(_)) => Ok(()),
        }
    }

    pub(super) async fn remove(&self, id: &str) -> RuntimeResult<()> {
        if self.record(id).is_err() {
            return Ok(());
        }
        self.stop(id, Duration::ZERO).await?;
        let record = self.record(id)?;
        let shim = {
            let state = self.inner.state.lock();
            state.sandboxes.get(&record.sandbox).and_then(|sandbox| sandbox.shim.clone())
        };
        if let Some(shim) = shim {
            let _ = shim.call(Request::Forget { container: id.to_owned() }, Vec::new()).await;
        }
        let (this, sandbox, container) = (self.clone(), record.sandbox.clone(), id.to_owned());
        let cgroup = record.cgroup.clone();
        let _ = tokio::task::spawn_blocking(move || {
            let _ = this.inner.cgroups.remove(&cgroup);
            this.erase(&sandbox, &container);
        })
        .await;
        self.inner.state.lock().containers.remove(id);
        self.emit(ContainerEventKind::ContainerDeleted, &record.sandbox, id);
        Ok(())
    }

    /// Removes a container's mounts and files.
    fn erase(&self, sandbox: &str, id: &str) {
        let folder = self.sandbox_dir(sandbox).join(id);
        unmount(&folder.join("rootfs"));
        for path in [folder.clone(), self.writable_dir(id)] {
            if let Err(error) = fs::remove_dir_all(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(container = %id, path = %path.display(), %error, "files of a container stay");
            }
        }
        let _ = fs::remove_file(folder.with_file_name(format!("{id}.exit")));
        self.inner.images.release(id);
    }

    pub(super) async fn update_resources(&self, id: &str, resources: &LinuxContainerResources) -> RuntimeResult<()> {
        let record = {
            let mut state = self.inner.state.lock();
            let container = state.containers.get_mut(id).ok_or_else(|| no_container(id))?;
            if container.phase == Phase::Running {
                self.inner.cgroups.apply(&container.record.cgroup, resources).map_err(step("limit the container"))?;
            } else if container.phase == Phase::Exited {
                return Err(RuntimeError::WrongState(format!("container {id:?} is not running")));
            }
            merge(&mut container.record.config.linux.resources, resources);
            container.record.clone()
        };
        record::save(&self.container_dir(&record).join("container.json"), &record).map_err(step("record the container"))
    }

    pub(super) async fn reopen_log(&self, id: &str) -> RuntimeResult<()> {
        let (_, shim) = self.shim_of(id)?;
        shim.call(Request::ReopenLog { container: id.to_owned() }, Vec::new()).await?;
        Ok(())
    }
}

/// A refusal in the words that upstream's events have.
fn start_error(error: CallError) -> RuntimeError {
    RuntimeError::Start(summary(&error.message()))
}

/// The helper says its log first, deepest cause on top, and the error last.
fn summary(said: &str) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match (lines.first(), lines.last()) {
        (Some(first), Some(last)) => match last.find("exec: ").or_else(|| last.find("stat ")) {
            // What is wrong with the command needs no history.
            Some(at) => last[at..].to_owned(),
            None if lines.len() > 1 && !last.contains(first) => format!("{last}: {first}"),
            None => (*last).to_owned(),
        },
        _ => "the container could not be created".to_owned(),
    }
}

fn merge(known: &mut LinuxContainerResources, new: &LinuxContainerResources) {
    macro_rules! take {
        ($($field:ident),*) => { $( if new.$field.is_some() { known.$field = new.$field; } )* };
    }
    take!(
        cpu_period,
        cpu_quota,
        cpu_shares,
        memory_limit_in_bytes,
        memory_swap_limit_in_bytes,
        oom_score_adj,
        pids_limit
    );
    for (known, new) in [(&mut known.cpuset_cpus, &new.cpuset_cpus), (&mut known.cpuset_mems, &new.cpuset_mems)] {
        if !new.is_empty() {
            known.clone_from(new);
        }
    }
    known.hugepage_limits.extend(new.hugepage_limits.clone());
    known.unified.extend(new.unified.clone());
}

/// The number of a signal as images and pods write it; SIGTERM for what is unknown, as upstream.
pub(super) fn signal_number(name: &str) -> i32 {
    if let Ok(number) = name.parse::<i32>() {
        return if (1..=64).contains(&number) { number } else { libc::SIGTERM };
    }
    let upper = name.to_ascii_uppercase();
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    for (base, prefix) in [(34, "RTMIN+"), (34, "RTMIN"), (64, "RTMAX-"), (64, "RTMAX")] {
        if let Some(offset) = bare.strip_prefix(prefix) {
            let offset = if offset.is_empty() { 0 } else { offset.parse().unwrap_or(0) };
            let number = if base == 34 { base + offset } else { base - offset };
            return if (34..=64).contains(&number) { number } else { libc::SIGTERM };
        }
    }
    format!("SIG{bare}").parse::<nix::sys::signal::Signal>().map_or(libc::SIGTERM, |signal| signal as i32)
}

/// The working directory is made inside of the root filesystem when the image lacks it, as runc does.
fn make_working_dir(rootfs: &Path, cwd: &str) -> io::Result<()> {
    let mut folder = open_folder(rootfs)?;
    let root = open_folder(rootfs)?;
    let mut path = std::path::PathBuf::new();
    for part in Path::new(cwd).components() {
        let std::path::Component::Normal(name) = part else { continue };
        path.push(name);
        folder = match resolve(&root, &path, libc::O_DIRECTORY | libc::O_PATH) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                nix::sys::stat::mkdirat(&folder, name, nix::sys::stat::Mode::from_bits_truncate(0o755))?;
                resolve(&root, &path, libc::O_DIRECTORY | libc::O_PATH)?
            }
            Err(error) => return Err(error),
        };
    }
    Ok(())
}

/// The device nodes of a container: those that it names; all of the node's when it is privileged.
fn devices_of(config: &ContainerConfig) -> RuntimeResult<Vec<DeviceNode>> {
    let mut found = Vec::new();
    for device in &config.devices {
        let access = if device.permissions.is_empty() { "rwm" } else { &device.permissions };
        let node = device_node(&device.host_path, &device.container_path, access)
            .map_err(step(format!("failed to inspect device {:?}", device.host_path)))?;
        found.push(node.ok_or_else(|| RuntimeError::Invalid(format!("{:?} is not a device", device.host_path)))?);
    }
    if config.linux.security_context.privileged {
        host_devices(Path::new("/dev"), &mut found);
    }
    Ok(found)
}

fn device_node(host: &Path, path: &str, access: &str) -> io::Result<Option<DeviceNode>> {
    let data = fs::metadata(host)?;
    let kind = match data.file_type() {
        kind if kind.is_char_device() => 'c',
        kind if kind.is_block_device() => 'b',
        _ => return Ok(None),
    };
    Ok(Some(DeviceNode {
        path: path.to_owned(),
        kind,
        major: nix::sys::stat::major(data.rdev()) as u32,
        minor: nix::sys::stat::minor(data.rdev()) as u32,
        mode: data.mode() & 0o7777,
        uid: data.uid(),
        gid: data.gid(),
        access: access.to_owned(),
    }))
}

/// Every device of the node, less terminals, shared memory and what is mounted anew in containers.
fn host_devices(folder: &Path, found: &mut Vec<DeviceNode>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let Ok(kind) = entry.file_type() else { continue };
        let skipped = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console", "ptmx", "tty"];
        if skipped.iter().any(|skip| *skip == name) {
            continue;
        }
        if kind.is_dir() {
            host_devices(&path, found);
        } else if !kind.is_symlink()
            && let Ok(Some(node)) = device_node(&path, &path.to_string_lossy(), "rwm")
            && !found.iter().any(|known| known.path == node.path)
        {
            found.push(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_understood_in_every_spelling() {
        for (name, number) in [
            ("SIGTERM", 15),
            ("term", 15),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("SIGRTMIN", 34),
            ("SIGQUIT", 3),
            ("", 15),
            ("SIGNOPE", 15),
            ("0", 15),
            ("99", 15),
            ("SIGRTMIN+99", 15),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
    }
}
