//! The containers of a pod by kind, and the rules that follow from the specification alone.

use std::borrow::Cow;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};
use sha2::{Digest, Sha256};

/// What a container is in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerKind {
    /// Runs to its end before the next one starts.
    Init,
    /// An init container with `restartPolicy: Always`: runs beside the others.
    Sidecar,
    /// What the pod is for.
    Regular,
    /// Added for debugging, never restarted.
    Ephemeral,
}

/// A container with its kind.
#[derive(Debug, Clone)]
pub struct PodContainer<'a> {
    /// What it is.
    pub kind: ContainerKind,
    /// Its specification.
    pub container: Cow<'a, Container>,
}

/// The specification; pods of the API always have one.
pub fn spec(pod: &Pod) -> &PodSpec {
    static NOTHING: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&NOTHING)
}

/// All containers: init (with sidecars), regular, ephemeral.
pub fn containers(pod: &Pod) -> Vec<PodContainer<'_>> {
    let spec = spec(pod);
    let init = init_containers(pod).iter().map(|container| PodContainer {
        kind: if is_sidecar(container) { ContainerKind::Sidecar } else { ContainerKind::Init },
        container: Cow::Borrowed(container),
    });
    let regular = spec
        .containers
        .iter()
        .map(|container| PodContainer { kind: ContainerKind::Regular, container: Cow::Borrowed(container) });
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|container| PodContainer {
        kind: ContainerKind::Ephemeral,
        container: Cow::Owned(from_ephemeral(container)),
    });
    init.chain(regular).chain(ephemeral).collect()
}

/// `spec.initContainers`.
pub fn init_containers(pod: &Pod) -> &[Container] {
    spec(pod).init_containers.as_deref().unwrap_or_default()
}

/// The container whose process ids an ephemeral one shares.
pub fn target<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let ephemeral = spec(pod).ephemeral_containers.iter().flatten().find(|container| container.name == name)?;
    ephemeral.target_container_name.as_deref().filter(|target| !target.is_empty())
}

/// The container of this name, of any kind.
pub fn find<'a>(pod: &'a Pod, name: &str) -> Option<PodContainer<'a>> {
    containers(pod).into_iter().find(|found| found.container.name == name)
}

/// An init container that runs beside the others.
pub fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

fn from_ephemeral(container: &EphemeralContainer) -> Container {
    let EphemeralContainer {
        args,
        command,
        env,
        env_from,
        image,
        image_pull_policy,
        lifecycle,
        liveness_probe,
        name,
        ports,
        readiness_probe,
        resize_policy,
        resources,
        restart_policy,
        restart_policy_rules,
        security_context,
        startup_probe,
        stdin,
        stdin_once,
        target_container_name: _,
        termination_message_path,
        termination_message_policy,
        tty,
        volume_devices,
        volume_mounts,
        working_dir,
    } = container.clone();
    Container {
        args,
        command,
        env,
        env_from,
        image,
        image_pull_policy,
        lifecycle,
        liveness_probe,
        name,
        ports,
        readiness_probe,
        resize_policy,
        resources,
        restart_policy,
        restart_policy_rules,
        security_context,
        startup_probe,
        stdin,
        stdin_once,
        termination_message_path,
        termination_message_policy,
        tty,
        volume_devices,
        volume_mounts,
        working_dir,
    }
}

/// `spec.restartPolicy`, by default `Always`.
pub fn restart_policy(pod: &Pod) -> &str {
    spec(pod).restart_policy.as_deref().unwrap_or("Always")
}

/// Whether a container that ended with `exit_code` runs again: its own rules, its own policy, the pod's policy.
pub fn restarts_after_exit(pod: &Pod, kind: ContainerKind, container: &Container, exit_code: i32) -> bool {
    match kind {
        ContainerKind::Ephemeral => return false,
        ContainerKind::Sidecar => return true,
        ContainerKind::Init | ContainerKind::Regular => {}
    }
    for rule in container.restart_policy_rules.iter().flatten() {
        let Some(codes) = &rule.exit_codes else { continue };
        let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
        let matches = match codes.operator.as_str() {
            "In" => listed,
            "NotIn" => !listed,
            _ => false,
        };
        if matches {
            return rule.action == "Restart";
        }
    }
    let policy = container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(pod));
    match policy {
        "Never" => false,
        "OnFailure" => exit_code != 0,
        // An init container that succeeded is done, whatever the policy.
        _ => kind == ContainerKind::Regular || exit_code != 0,
    }
}

/// Whether a running container that a probe failed is started again.
pub fn restarts_after_kill(pod: &Pod, container: &Container) -> bool {
    container.restart_policy.as_deref().unwrap_or_else(|| restart_policy(pod)) != "Never"
}

/// What makes a running container another one: its name and image (everything else of it cannot change).
pub fn hash(container: &Container) -> String {
    let mut digest = Sha256::new();
    digest.update(container.name.as_bytes());
    digest.update([0]);
    digest.update(container.image.as_deref().unwrap_or_default().as_bytes());
    digest.finalize()[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `name_namespace(uid)`: a pod in upstream's messages.
pub fn describe(pod: &Pod) -> String {
    let meta = &pod.metadata;
    format!(
        "{}_{}({})",
        meta.name.as_deref().unwrap_or_default(),
        meta.namespace.as_deref().unwrap_or_default(),
        meta.uid.as_deref().unwrap_or_default()
    )
}

/// `metadata.uid`.
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// `metadata.namespace`.
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or_default()
}

/// `metadata.name`.
pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// An annotation's value.
pub fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Whether the pod comes from a file on this node.
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, "kubernetes.io/config.source").is_some_and(|source| source != "api")
}

/// Whether the pod uses the node's network.
pub fn is_host_network(pod: &Pod) -> bool {
    spec(pod).host_network == Some(true)
}
