//! The OCI runtime specification of a container, as a pure function of what is wanted and what the node is.
//!
//! Limits are not in it: [`super::cgroup`] writes them. libcontainer 0.7 is told only what it does right.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::capabilities::CapabilitySet;
use super::user::User;
use super::{ContainerConfig, KeyValue, MountPropagation, NamespaceMode, RuntimeError, seccomp};
use crate::image::ImageConfig;

/// Everything that decides the specification.
pub struct SpecInput<'a> {
    pub config: &'a ContainerConfig,
    pub image: &'a ImageConfig,
    pub user: &'a User,
    /// Root filesystem of the container, mounted.
    pub rootfs: PathBuf,
    /// Value of `HOSTNAME`.
    pub hostname: &'a str,
    /// Where the pod's namespaces are pinned.
    pub namespaces: PathBuf,
    /// A process whose process ids the container shares.
    pub pid_target: Option<i32>,
    /// Pod's `/dev/shm`; `None`: the node's.
    pub shm: Option<PathBuf>,
    /// The container's cgroup, relative.
    pub cgroup: String,
    pub cgroup_v2: bool,
    /// What the node may hand on.
    pub host_capabilities: CapabilitySet,
    /// Device nodes as found on the node.
    pub devices: Vec<DeviceNode>,
    /// Compiled from the container's profile.
    pub seccomp: Option<&'a Value>,
}

/// A device node for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceNode {
    pub path: String,
    /// `c`, `b` or `p`.
    pub kind: char,
    pub major: u32,
    pub minor: u32,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Access in the cgroup: `rwm`.
    pub access: String,
}

/// What `/proc` hides unless the pod says `procMount: Unmasked`.
pub const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];

/// What of `/proc` cannot be written.
pub const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Command line: the pod's words where it has them, else the image's.
pub fn arguments(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>, RuntimeError> {
    let (command, args) = (&config.command, &config.args);
    // A command without arguments drops the image's arguments, too.
    let words: Vec<String> = match (command.is_empty(), args.is_empty()) {
        (true, true) => image.entrypoint.iter().chain(&image.cmd).cloned().collect(),
        (true, false) => image.entrypoint.iter().chain(args).cloned().collect(),
        (false, _) => command.iter().chain(args).cloned().collect(),
    };
    if words.is_empty() {
        return Err(RuntimeError::Create("no command specified".to_owned()));
    }
    Ok(words)
}

/// Environment: the image's, then the pod's, each name once; HOME, PATH and HOSTNAME are always there.
pub fn environment(input: &SpecInput<'_>) -> Vec<String> {
    let mut variables: Vec<KeyValue> = vec![variable("PATH", DEFAULT_PATH), variable("HOSTNAME", input.hostname)];
    if input.config.tty {
        variables.push(variable("TERM", "xterm"));
    }
    let image = input.image.env.iter().filter_map(|line| line.split_once('=')).map(|(key, value)| variable(key, value));
    for new in image.chain(input.config.envs.iter().cloned()) {
        match variables.iter_mut().find(|known| known.key == new.key) {
            Some(known) => known.value = new.value,
            None => variables.push(new),
        }
    }
    if !variables.iter().any(|known| known.key == "HOME") {
        variables.push(variable("HOME", &input.user.home));
    }
    variables.into_iter().map(|variable| format!("{}={}", variable.key, variable.value)).collect()
}

fn variable(key: &str, value: &str) -> KeyValue {
    KeyValue { key: key.to_owned(), value: value.to_owned() }
}

/// Working directory: the pod's, else the image's, else `/`.
pub fn working_dir(config: &ContainerConfig, image: &ImageConfig) -> String {
    let chosen = if config.working_dir.is_empty() { &image.working_dir } else { &config.working_dir };
    if chosen.is_empty() { "/".to_owned() } else { chosen.clone() }
}

/// The capabilities that the container has in the end.
pub fn capabilities(config: &ContainerConfig, host: CapabilitySet) -> Result<CapabilitySet, RuntimeError> {
    let context = &config.linux.security_context;
    let wanted = CapabilitySet::of_container(&context.capabilities, context.privileged)?;
    Ok(CapabilitySet(wanted.0 & host.0))
}

/// The specification.
pub fn spec(input: &SpecInput<'_>) -> Result<Value, RuntimeError> {
    let config = input.config;
    let context = &config.linux.security_context;
    let names = capabilities(config, input.host_capabilities)?.names();
    let mut process = json!({
        "terminal": config.tty,
        "user": {
            "uid": input.user.uid,
            "gid": input.user.gid,
            "additionalGids": input.user.groups,
        },
        "args": arguments(config, input.image)?,
        "env": environment(input),
        "cwd": working_dir(config, input.image),
        "capabilities": { "bounding": names, "effective": names, "permitted": names },
    });
    // Present and false makes libcontainer load the filter after the capabilities are gone, which fails.
    if context.no_new_privs {
        process["noNewPrivileges"] = json!(true);
    }
    let mut linux = json!({
        "cgroupsPath": input.cgroup,
        "namespaces": namespaces(input),
        "rootfsPropagation": propagation(config),
    });
    if !context.privileged {
        let list = |wanted: &Option<Vec<String>>, default: &[&str]| match wanted {
            Some(paths) => json!(paths),
            None => json!(default),
        };
        linux["maskedPaths"] = list(&context.masked_paths, &MASKED_PATHS);
        linux["readonlyPaths"] = list(&context.readonly_paths, &READONLY_PATHS);
    }
    if let Some(profile) = input.seccomp {
        linux["seccomp"] = seccomp::for_libcontainer(profile);
    }
    if !input.devices.is_empty() {
        linux["devices"] = input.devices.iter().map(device).collect();
    }
    Ok(json!({
        "ociVersion": "1.2.0",
        "root": { "path": input.rootfs, "readonly": context.readonly_rootfs },
        "process": process,
        "mounts": mounts(input),
        "linux": linux,
    }))
}

fn namespaces(input: &SpecInput<'_>) -> Value {
    let options = input.config.linux.security_context.namespace_options;
    let pinned = |kind: &str, file: &str| json!({"type": kind, "path": input.namespaces.join(file)});
    let mut list = vec![json!({"type": "mount"})];
    match (input.pid_target, options.pid) {
        (Some(pid), _) => list.push(json!({"type": "pid", "path": format!("/proc/{pid}/ns/pid")})),
        (None, NamespaceMode::Container) => list.push(json!({"type": "pid"})),
        (None, NamespaceMode::Pod) => list.push(pinned("pid", "pid")),
        (None, NamespaceMode::Node) => {}
    }
    if options.network != NamespaceMode::Node {
        list.push(pinned("network", "net"));
        list.push(pinned("uts", "uts"));
    }
    if options.ipc != NamespaceMode::Node {
        list.push(pinned("ipc", "ipc"));
    }
    // As containerd has it: own view of the tree on version 2 only, and not for privileged containers.
    if input.cgroup_v2 && !input.config.linux.security_context.privileged {
        list.push(json!({"type": "cgroup"}));
    }
    Value::Array(list)
}

/// Root propagation must let through what the volumes ask for.
fn propagation(config: &ContainerConfig) -> &'static str {
    let any = |wanted| config.mounts.iter().any(|mount| mount.propagation == wanted);
    if any(MountPropagation::Bidirectional) {
        "shared"
    } else if any(MountPropagation::HostToContainer) {
        "slave"
    } else {
        "private"
    }
}

fn mounts(input: &SpecInput<'_>) -> Value {
    let context = &input.config.linux.security_context;
    let cgroup_and_sys = if context.privileged { "rw" } else { "ro" };
    let entry = |path: &str, kind: &str, options: &[&str]| json!({"destination": path, "type": kind, "source": kind, "options": options});
    let mut list = vec![
        entry("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        entry("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        entry("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        entry("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        entry("/sys", "sysfs", &["nosuid", "noexec", "nodev", cgroup_and_sys]),
        entry("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", cgroup_and_sys]),
    ];
    let shm = input.shm.clone().unwrap_or_else(|| PathBuf::from("/dev/shm"));
    list.push(json!({"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rw", "nosuid", "noexec", "nodev"]}));
    // What the pod mounts itself replaces the default of the same place.
    let clean = |path: &str| format!("/{}", path.trim_matches('/'));
    list.retain(|default| {
        let place = default["destination"].as_str().unwrap_or("");
        !input.config.mounts.iter().any(|mount| clean(&mount.container_path) == place)
    });
    let mut wanted: Vec<_> = input.config.mounts.iter().collect();
    // Outer before inner, so that none is hidden.
    wanted.sort_by_key(|mount| clean(&mount.container_path).matches('/').count());
    for mount in wanted {
        let mut options = vec!["rbind"];
        options.push(match mount.propagation {
            MountPropagation::Private => "rprivate",
            MountPropagation::HostToContainer => "rslave",
            MountPropagation::Bidirectional => "rshared",
        });
        options.push(match (mount.readonly, mount.recursive_read_only) {
            (true, true) => "rro",
            (true, false) => "ro",
            _ => "rw",
        });
        list.push(json!({
            "destination": clean(&mount.container_path), "type": "bind", "source": mount.host_path, "options": options,
        }));
    }
    Value::Array(list)
}

fn device(node: &DeviceNode) -> Value {
    json!({
        "path": node.path, "type": node.kind.to_string(), "major": node.major, "minor": node.minor,
        "fileMode": node.mode, "uid": node.uid, "gid": node.gid,
    })
}

/// Lines for `devices.allow`: what every container may use, and its own devices.
pub fn device_rules(devices: &[DeviceNode]) -> Vec<String> {
    // Making nodes is harmless; null, zero, full, random, urandom, tty, console, ptmx and the terminals may be used.
    let mut rules: Vec<String> = [
        "c *:* m",
        "b *:* m",
        "c 1:3 rwm",
        "c 1:5 rwm",
        "c 1:7 rwm",
        "c 1:8 rwm",
        "c 1:9 rwm",
        "c 5:0 rwm",
        "c 5:1 rwm",
        "c 5:2 rwm",
        "c 136:* rwm",
    ]
    .map(str::to_owned)
    .into();
    rules.extend(
        devices
            .iter()
            .filter(|node| node.kind != 'p')
            .map(|node| format!("{} {}:{} {}", node.kind, node.major, node.minor, node.access)),
    );
    rules
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
