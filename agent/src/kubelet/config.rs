//! What the runtime is asked for: sandbox and container configurations from a pod's specification.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, SeccompProfile, VolumeMount};

use super::containers::{self, ContainerKind};
use super::env::Environment;
use super::expansion::{expand, expand_strict};
use super::{labels, qos};
use crate::image::Image;
use crate::runtime as cri;
use crate::volume::pod_volumes::Mounted;
use crate::volume::subpath;

/// Default of `terminationMessagePath`.
pub const TERMINATION_LOG: &str = "/dev/termination-log";

/// What a sandbox configuration needs beside the pod.
pub struct SandboxInput<'a> {
    /// Sandboxes there were before.
    pub attempt: u32,
    /// `coracle-<id>`.
    pub cgroup_root: &'a str,
    /// Folder of the pod's logs.
    pub log_dir: PathBuf,
    /// What `hostname` prints.
    pub hostname: String,
    /// Resolver settings.
    pub dns: cri::DnsConfig,
}

/// The sandbox of a pod.
pub fn sandbox(pod: &Pod, input: SandboxInput<'_>) -> cri::PodSandboxConfig {
    let spec = containers::spec(pod);
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_ref());
    cri::PodSandboxConfig {
        metadata: cri::PodSandboxMetadata {
            name: containers::name(pod).to_owned(),
            uid: containers::uid(pod).to_owned(),
            namespace: containers::namespace(pod).to_owned(),
            attempt: input.attempt,
        },
        hostname: input.hostname,
        log_directory: input.log_dir,
        dns_config: input.dns,
        port_mappings: if containers::is_host_network(pod) { Vec::new() } else { host_ports(pod).collect() },
        labels: pod_labels(pod),
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        linux: cri::LinuxPodSandboxConfig {
            cgroup_parent: qos::cgroup_parent(input.cgroup_root, pod),
            namespace_options: namespaces(pod),
            sysctls: sysctls.into_iter().flatten().map(|one| (one.name.clone(), one.value.clone())).collect(),
            resources: qos::pod_resources(pod),
        },
    }
}

fn pod_labels(pod: &Pod) -> BTreeMap<String, String> {
    let mut all = pod.metadata.labels.clone().unwrap_or_default();
    all.insert(labels::POD_NAME.to_owned(), containers::name(pod).to_owned());
    all.insert(labels::POD_NAMESPACE.to_owned(), containers::namespace(pod).to_owned());
    all.insert(labels::POD_UID.to_owned(), containers::uid(pod).to_owned());
    all
}

/// Ports of the node that lead to the pod.
pub(super) fn host_ports(pod: &Pod) -> impl Iterator<Item = cri::PortMapping> + '_ {
    let spec = containers::spec(pod);
    let sidecars = spec.init_containers.iter().flatten().filter(|container| containers::is_sidecar(container));
    let ports = spec.containers.iter().chain(sidecars).flat_map(|container| container.ports.iter().flatten());
    ports.filter_map(|port| {
        let host_port = u16::try_from(port.host_port.filter(|port| *port > 0)?).ok()?;
        Some(cri::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => cri::Protocol::Udp,
                Some("SCTP") => cri::Protocol::Sctp,
                _ => cri::Protocol::Tcp,
            },
            container_port: u16::try_from(port.container_port).ok()?,
            host_port,
            host_ip: port.host_ip.clone().unwrap_or_default(),
        })
    })
}

fn namespaces(pod: &Pod) -> cri::NamespaceOptions {
    let spec = containers::spec(pod);
    let node = |on: Option<bool>, otherwise| if on == Some(true) { cri::NamespaceMode::Node } else { otherwise };
    let shared = spec.share_process_namespace == Some(true);
    let pid = if shared { cri::NamespaceMode::Pod } else { cri::NamespaceMode::Container };
    cri::NamespaceOptions {
        network: node(spec.host_network, cri::NamespaceMode::Pod),
        pid: node(spec.host_pid, pid),
        ipc: node(spec.host_ipc, cri::NamespaceMode::Pod),
    }
}

/// What a container configuration needs beside the specification.
pub struct ContainerInput<'a> {
    /// What the container is.
    pub kind: ContainerKind,
    /// Restarts before it.
    pub attempt: u32,
    /// Its image.
    pub image: &'a Image,
    /// Its variables.
    pub environment: &'a Environment,
    /// The pod's volumes.
    pub volumes: &'a BTreeMap<String, Mounted>,
    /// `DATA/agent/pods/<uid>`.
    pub pod_dir: &'a Path,
    /// `DATA/agent/seccomp`: where profiles of type Localhost lie.
    pub seccomp_dir: &'a Path,
    /// Bytes of memory of the machine.
    pub node_memory: i64,
}

/// A subPath mount that must be bound before the container is created.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubPath {
    /// Index in the configuration's mounts.
    pub mount: usize,
    /// Name of the volume mount, for messages.
    pub name: String,
    /// Root of the volume.
    pub root: PathBuf,
    /// Entry of the volume.
    pub path: String,
    /// Where to bind it.
    pub target: PathBuf,
}

/// A container's configuration and what it still needs on the node.
#[derive(Debug)]
pub struct ContainerSetup {
    /// For the runtime.
    pub config: cri::ContainerConfig,
    /// To bind first.
    pub sub_paths: Vec<SubPath>,
    /// The file behind `terminationMessagePath`, to be made first.
    pub termination_message: PathBuf,
}

/// The configuration of a container.
///
/// # Errors
/// The message of `CreateContainerConfigError`.
pub fn container(pod: &Pod, container: &Container, input: &ContainerInput<'_>) -> Result<ContainerSetup, String> {
    verify_non_root(pod, container, input.image)?;
    let (mut mounts, sub_paths) = volume_mounts(container, input)?;
    let termination_message =
        input.pod_dir.join("containers").join(&container.name).join(format!("{}.message", input.attempt));
    add_managed_files(container, input, &termination_message, &mut mounts);
    let expand_all = |texts: Option<&Vec<String>>| {
        texts.into_iter().flatten().map(|text| expand(text, |name| input.environment.get(name))).collect::<Vec<_>>()
    };
    let config = cri::ContainerConfig {
        metadata: cri::ContainerMetadata { name: container.name.clone(), attempt: input.attempt },
        image: input.image.id.clone(),
        user_specified_image: container.image.clone().unwrap_or_default(),
        command: expand_all(container.command.as_ref()),
        args: expand_all(container.args.as_ref()),
        working_dir: container.working_dir.clone().unwrap_or_default(),
        envs: input.environment.variables.clone(),
        mounts,
        devices: Vec::new(),
        labels: container_labels(pod, container),
        annotations: container_annotations(pod, container, input, &termination_message),
        log_path: Path::new(&container.name).join(format!("{}.log", input.attempt)),
        stdin: container.stdin == Some(true),
        stdin_once: container.stdin_once == Some(true),
        tty: container.tty == Some(true),
        stop_signal: container.lifecycle.as_ref().and_then(|hooks| hooks.stop_signal.clone()).unwrap_or_default(),
        linux: cri::LinuxContainerConfig {
            resources: qos::container_resources(pod, container, input.node_memory),
            security_context: security_context(pod, container, input.seccomp_dir),
        },
    };
    Ok(ContainerSetup { config, sub_paths, termination_message })
}

fn container_labels(pod: &Pod, container: &Container) -> BTreeMap<String, String> {
    [
        (labels::POD_NAME, containers::name(pod)),
        (labels::POD_NAMESPACE, containers::namespace(pod)),
        (labels::POD_UID, containers::uid(pod)),
        (labels::CONTAINER_NAME, container.name.as_str()),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn container_annotations(
    pod: &Pod,
    container: &Container,
    input: &ContainerInput<'_>,
    termination_message: &Path,
) -> BTreeMap<String, String> {
    let grace = containers::spec(pod).termination_grace_period_seconds.unwrap_or(30);
    [
        (labels::HASH, containers::hash(container)),
        (labels::RESTART_COUNT, input.attempt.to_string()),
        (labels::TERMINATION_MESSAGE, termination_message.display().to_string()),
        (
            labels::TERMINATION_MESSAGE_POLICY,
            container.termination_message_policy.clone().unwrap_or_else(|| "File".to_owned()),
        ),
        (labels::POD_GRACE, grace.to_string()),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into()
}

fn volume_mounts(container: &Container, input: &ContainerInput<'_>) -> Result<(Vec<cri::Mount>, Vec<SubPath>), String> {
    let mut mounts = Vec::new();
    let mut sub_paths = Vec::new();
    for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let volume = input.volumes.get(&mount.name).ok_or_else(|| {
            format!("cannot find volume {:?} to mount into container {:?}", mount.name, container.name)
        })?;
        let mut host_path = volume.path.clone();
        let path = sub_path(mount, input.environment)?;
        if !path.is_empty() {
            subpath::check(&path)?;
            let target =
                input.pod_dir.join("volume-subpaths").join(&mount.name).join(&container.name).join(index.to_string());
            sub_paths.push(SubPath {
                mount: mounts.len(),
                name: mount.name.clone(),
                root: host_path,
                path,
                target: target.clone(),
            });
            host_path = target;
        }
        let read_only = mount.read_only == Some(true) || volume.read_only;
        let recursive = matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible"));
        mounts.push(cri::Mount {
            container_path: absolute(&mount.mount_path),
            host_path,
            readonly: read_only,
            recursive_read_only: recursive && mount.read_only == Some(true),
            propagation: match mount.mount_propagation.as_deref() {
                Some("HostToContainer") => cri::MountPropagation::HostToContainer,
                Some("Bidirectional") => cri::MountPropagation::Bidirectional,
                _ => cri::MountPropagation::Private,
            },
        });
    }
    Ok((mounts, sub_paths))
}

fn sub_path(mount: &VolumeMount, environment: &Environment) -> Result<String, String> {
    match mount.sub_path_expr.as_deref().filter(|expression| !expression.is_empty()) {
        None => Ok(mount.sub_path.clone().unwrap_or_default()),
        Some(expression) => expand_strict(expression, |name| environment.get(name))
            .map_err(|name| format!("missing value for {name:?}")),
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// Files the kubelet writes, unless the container mounts something of its own there.
fn add_managed_files(
    container: &Container,
    input: &ContainerInput<'_>,
    termination_message: &Path,
    mounts: &mut Vec<cri::Mount>,
) {
    let message_path = container.termination_message_path.as_deref().filter(|path| !path.is_empty());
    let files = [
        ("/etc/hosts", input.pod_dir.join("etc-hosts")),
        ("/etc/resolv.conf", input.pod_dir.join("resolv.conf")),
        ("/etc/hostname", input.pod_dir.join("hostname")),
        (message_path.unwrap_or(TERMINATION_LOG), termination_message.to_owned()),
    ];
    for (path, host_path) in files {
        if mounts.iter().all(|mount| mount.container_path.trim_end_matches('/') != path) {
            mounts.push(cri::Mount { container_path: path.to_owned(), host_path, ..cri::Mount::default() });
        }
    }
}

/// `runAsNonRoot` is checked against what will really run.
fn verify_non_root(pod: &Pod, container: &Container, image: &Image) -> Result<(), String> {
    let own = container.security_context.as_ref();
    let shared = containers::spec(pod).security_context.as_ref();
    let wanted = own.and_then(|own| own.run_as_non_root).or_else(|| shared.and_then(|shared| shared.run_as_non_root));
    if wanted != Some(true) {
        return Ok(());
    }
    let user = own.and_then(|own| own.run_as_user).or_else(|| shared.and_then(|shared| shared.run_as_user));
    let (described, name) = (containers::describe(pod), &container.name);
    match (user, image.config.uid()) {
        (Some(0), _) => {
            Err(format!("container's runAsUser breaks non-root policy (pod: {described:?}, container: {name})"))
        }
        (Some(_), _) => Ok(()),
        (None, Some(0)) => Err(format!(
            "container has runAsNonRoot and image will run as root (pod: {described:?}, container: {name})"
        )),
        (None, Some(_)) => Ok(()),
        (None, None) => Err(format!(
            "container has runAsNonRoot and image has non-numeric user ({}), cannot verify user is non-root (pod: {described:?}, container: {name})",
            image.config.username()
        )),
    }
}

fn security_context(pod: &Pod, container: &Container, seccomp_dir: &Path) -> cri::LinuxContainerSecurityContext {
    let own = container.security_context.clone().unwrap_or_default();
    let shared = containers::spec(pod).security_context.clone().unwrap_or_default();
    let capabilities = own.capabilities.unwrap_or_default();
    let privileged = own.privileged == Some(true);
    let mut groups = shared.supplemental_groups.unwrap_or_default();
    groups.extend(shared.fs_group);
    let unmasked = own.proc_mount.as_deref() == Some("Unmasked");
    cri::LinuxContainerSecurityContext {
        capabilities: cri::Capabilities {
            add_capabilities: capabilities.add.unwrap_or_default(),
            drop_capabilities: capabilities.drop.unwrap_or_default(),
        },
        privileged,
        namespace_options: namespaces(pod),
        pid_target: None,
        run_as_user: own.run_as_user.or(shared.run_as_user),
        run_as_group: own.run_as_group.or(shared.run_as_group),
        run_as_username: String::new(),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: groups,
        supplemental_groups_policy: match shared.supplemental_groups_policy.as_deref() {
            Some("Strict") => cri::SupplementalGroupsPolicy::Strict,
            _ => cri::SupplementalGroupsPolicy::Merge,
        },
        no_new_privs: own.allow_privilege_escalation == Some(false) && !privileged,
        masked_paths: unmasked.then(Vec::new),
        readonly_paths: unmasked.then(Vec::new),
        seccomp: if privileged {
            cri::SecurityProfile::Unconfined
        } else {
            seccomp(own.seccomp_profile.as_ref().or(shared.seccomp_profile.as_ref()), seccomp_dir)
        },
    }
}

fn seccomp(profile: Option<&SeccompProfile>, folder: &Path) -> cri::SecurityProfile {
    match profile.map(|profile| profile.type_.as_str()) {
        Some("RuntimeDefault") => cri::SecurityProfile::RuntimeDefault,
        Some("Localhost") => {
            let name = profile.and_then(|profile| profile.localhost_profile.as_deref()).unwrap_or_default();
            cri::SecurityProfile::Localhost(folder.join(name.trim_start_matches('/')))
        }
        _ => cri::SecurityProfile::Unconfined,
    }
}

/// The addresses a container may show before its pod has any of its own.
pub fn pod_ips<'a>(pod: &Pod, own: &'a [IpAddr], host: &'a [IpAddr]) -> &'a [IpAddr] {
    if containers::is_host_network(pod) { host } else { own }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn setup(spec: serde_json::Value, image: &Image) -> Result<ContainerSetup, String> {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec}))
                .unwrap();
        let environment = Environment {
            variables: vec![cri::KeyValue { key: "WHO".into(), value: "me".into() }],
            ..Environment::default()
        };
        let volumes = [("v".to_owned(), Mounted { path: PathBuf::from("/pods/u/v"), read_only: false })].into();
        let input = ContainerInput {
            kind: ContainerKind::Regular,
            attempt: 2,
            image,
            environment: &environment,
            volumes: &volumes,
            pod_dir: Path::new("/pods/u"),
            seccomp_dir: Path::new("/seccomp"),
            node_memory: 1 << 30,
        };
        container(&pod, &containers::spec(&pod).containers[0], &input)
    }

    #[test]
    fn commands_expand_and_managed_files_are_mounted() {
        let spec = json!({"containers": [{"name": "c", "image": "i", "command": ["echo", "$(WHO)"],
            "volumeMounts": [{"name": "v", "mountPath": "data", "subPathExpr": "$(WHO)/x"}, {"name": "v", "mountPath": "/etc/hosts"}]}]});
        let made = setup(spec, &Image::default()).unwrap();
        assert_eq!(made.config.command, ["echo", "me"]);
        assert_eq!(made.config.log_path, Path::new("c/2.log"));
        assert_eq!(made.sub_paths[0].path, "me/x");
        assert_eq!(made.config.mounts[0].container_path, "/data");
        assert_eq!(made.config.mounts[0].host_path, Path::new("/pods/u/volume-subpaths/v/c/0"));
        let targets: Vec<_> = made.config.mounts.iter().map(|mount| mount.container_path.as_str()).collect();
        assert_eq!(targets, ["/data", "/etc/hosts", "/etc/resolv.conf", "/etc/hostname", TERMINATION_LOG]);
    }

    #[test]
    fn root_is_refused_where_it_must_not_run() {
        let spec = json!({"containers": [{"name": "c", "securityContext": {"runAsNonRoot": true}}]});
        let refused = setup(spec.clone(), &Image::default()).unwrap_err();
        assert_eq!(refused, "container has runAsNonRoot and image will run as root (pod: \"p_n(u)\", container: c)");
        let mut image = Image::default();
        image.config.user = "web".into();
        assert!(setup(spec.clone(), &image).unwrap_err().contains("non-numeric user (web)"));
        image.config.user = "1000".into();
        assert!(setup(spec, &image).is_ok());
    }

    #[test]
    fn a_sub_path_cannot_be_absolute_or_lead_up() {
        let refuse = |path: &str| {
            let spec = json!({"containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/d", "subPath": path}]}]});
            setup(spec, &Image::default()).unwrap_err()
        };
        assert!(refuse("/x").contains("must not be an absolute path"));
        assert!(refuse("../x").contains("must not contain '..'"));
    }
}
