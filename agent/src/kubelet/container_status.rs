//! `status.containerStatuses[]`: what was observed of each container, and what it was before.

use k8s_openapi::api::core::v1 as api;
use k8s_openapi::api::core::v1::{
    Container, ContainerState as ApiState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    ContainerStatus as ApiStatus, Pod, VolumeMountStatus,
};

use super::containers::{self, ContainerKind};
use super::observed::{Observed, ProbeKind, ProbeResults, WaitReasons, api_time};
use super::quantity::{bytes_quantity, cpu_quantity};
use crate::runtime::{ContainerState, ContainerStatus};

/// Prefix of container ids in the API.
pub const ID_SCHEME: &str = "coracle://";
/// Exit code of what was lost.
const LOST_EXIT_CODE: i32 = 137;
const LOST_REASON: &str = "ContainerStatusUnknown";

/// Everything the statuses of one list of containers follow from.
pub(super) struct Input<'a> {
    pub pod: &'a Pod,
    pub observed: &'a Observed,
    pub probes: &'a ProbeResults,
    pub waiting: &'a WaitReasons,
}

/// The statuses of `list`, in the order of the API: init containers as specified, the others by name.
pub(super) fn statuses<'a>(
    input: &Input<'_>,
    kinds: impl Iterator<Item = (ContainerKind, &'a Container)>,
    old: &[ApiStatus],
) -> Vec<ApiStatus> {
    kinds
        .map(|(kind, container)| status(input, kind, container, old.iter().find(|s| s.name == container.name)))
        .collect()
}

fn status(input: &Input<'_>, kind: ContainerKind, container: &Container, old: Option<&ApiStatus>) -> ApiStatus {
    let mut all = input.observed.of(&container.name);
    let mut status = match all.next() {
        Some(newest) => {
            let mut status = convert(newest, container, old);
            status.last_state = Some(match all.next() {
                Some(previous) => convert(previous, container, None).state.unwrap_or_default(),
                None => old.and_then(|old| carried_last_state(old, newest)).unwrap_or_default(),
            });
            status
        }
        None => missing(input, container, old),
    };
    apply_waiting(input, kind, container, &mut status);
    status.started = Some(started(input, kind, container, &status, old));
    status.ready = ready(input, kind, container, &status, old);
    status
}

/// What the API knew of the container before this one, when the runtime has forgotten it.
fn carried_last_state(old: &ApiStatus, newest: &ContainerStatus) -> Option<ApiState> {
    let same = old.container_id.as_deref().and_then(|id| id.strip_prefix(ID_SCHEME)) == Some(newest.id.as_str());
    if same {
        return old.last_state.clone();
    }
    old.state.as_ref().filter(|state| state.terminated.is_some()).cloned()
}

/// A container the runtime does not know: not made yet, or lost.
fn missing(input: &Input<'_>, container: &Container, old: Option<&ApiStatus>) -> ApiStatus {
    let initializing = !containers::init_containers(input.pod).is_empty();
    let reason = if initializing { "PodInitializing" } else { "ContainerCreating" };
    let mut status = ApiStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        state: Some(waiting(reason, "")),
        last_state: Some(ApiState::default()),
        volume_mounts: mounts(container),
        ..ApiStatus::default()
    };
    let Some(old) = old else { return status };
    if old.state.as_ref().is_some_and(|state| state.terminated.is_some()) {
        return old.clone();
    }
    status.restart_count = old.restart_count;
    status.last_state.clone_from(&old.last_state);
    let was_running = old.state.as_ref().is_some_and(|state| state.running.is_some());
    if was_running && old.last_state.as_ref().is_none_or(|state| state.terminated.is_none()) {
        let message = "The container could not be located when the pod was deleted.  The container used to be Running";
        status.last_state = Some(lost(message));
        if input.pod.metadata.deletion_timestamp.is_none() {
            status.restart_count += 1;
        }
    }
    status
}

fn lost(message: &str) -> ApiState {
    ApiState {
        terminated: Some(ContainerStateTerminated {
            exit_code: LOST_EXIT_CODE,
            reason: Some(LOST_REASON.to_owned()),
            message: Some(message.to_owned()),
            ..ContainerStateTerminated::default()
        }),
        ..ApiState::default()
    }
}

fn waiting(reason: &str, message: &str) -> ApiState {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ApiState {
        waiting: Some(ContainerStateWaiting { reason: some(reason), message: some(message) }),
        ..ApiState::default()
    }
}

fn convert(found: &ContainerStatus, container: &Container, old: Option<&ApiStatus>) -> ApiStatus {
    let id = format!("{ID_SCHEME}{}", found.id);
    let count = i32::try_from(found.metadata.attempt).unwrap_or(i32::MAX);
    let mut restart_count = old.map_or(count, |old| count.max(old.restart_count));
    let mut state = ApiState::default();
    match found.state {
        ContainerState::Running => {
            state.running = Some(ContainerStateRunning { started_at: found.started_at.map(api_time) });
        }
        ContainerState::Exited => state.terminated = Some(terminated(found, &id)),
        ContainerState::Unknown if old.and_then(|old| old.state.as_ref()).is_some_and(|old| old.running.is_some()) => {
            state = lost("The container could not be located when the pod was terminated");
            restart_count = old.map_or(count, |old| old.restart_count + 1);
        }
        ContainerState::Created | ContainerState::Unknown => state.waiting = Some(ContainerStateWaiting::default()),
    }
    ApiStatus {
        name: container.name.clone(),
        restart_count,
        image: if found.image.is_empty() { container.image.clone().unwrap_or_default() } else { found.image.clone() },
        image_id: found.image_ref.clone(),
        container_id: Some(id),
        state: Some(state),
        volume_mounts: mounts(container),
        resources: container.resources.as_ref().map(|wanted| actual_resources(wanted, found)),
        allocated_resources: container.resources.as_ref().and_then(|resources| resources.requests.clone()),
        user: found.user.as_ref().map(|user| api::ContainerUser {
            linux: Some(api::LinuxContainerUser {
                uid: i64::from(user.uid),
                gid: i64::from(user.gid),
                supplemental_groups: Some(user.supplemental_groups.iter().copied().map(i64::from).collect()),
            }),
        }),
        ..ApiStatus::default()
    }
}

fn terminated(found: &ContainerStatus, id: &str) -> ContainerStateTerminated {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ContainerStateTerminated {
        exit_code: found.exit_code,
        // The API shows the signal only for runtimes that don't fold it into the exit code.
        signal: None,
        reason: some(&found.reason),
        message: some(&found.message),
        started_at: Some(found.started_at.map_or_else(|| api_time(std::time::UNIX_EPOCH), api_time)),
        finished_at: Some(found.finished_at.map_or_else(|| api_time(std::time::UNIX_EPOCH), api_time)),
        container_id: Some(id.to_owned()),
    }
}

/// The wanted resources, with what the cgroup says for a running container.
fn actual_resources(wanted: &api::ResourceRequirements, found: &ContainerStatus) -> api::ResourceRequirements {
    let mut actual = wanted.clone();
    if found.state != ContainerState::Running {
        return actual;
    }
    let cgroup = &found.resources;
    if let Some(limits) = actual.limits.as_mut() {
        if let (Some(quota), Some(period)) = (cgroup.cpu_quota.filter(|quota| *quota > 0), cgroup.cpu_period)
            && let Ok(period) = i64::try_from(period)
            && period > 0
            && let Some(cpu) = limits.get_mut("cpu")
        {
            let milli = quota * 1000 / period;
            let wanted = super::quantity::milli_value(cpu);
            if milli != wanted && (milli > 10 || wanted > 10) {
                *cpu = cpu_quantity(milli);
            }
        }
        if let Some(bytes) = cgroup.memory_limit_in_bytes.filter(|bytes| *bytes > 0)
            && let Some(memory) = limits.get_mut("memory")
            && super::quantity::value(memory) != bytes
        {
            *memory = bytes_quantity(bytes);
        }
    }
    if let Some(requests) = actual.requests.as_mut()
        && let Some(shares) = cgroup.cpu_shares
        && let Some(cpu) = requests.get_mut("cpu")
        && super::qos::shares(super::quantity::milli_value(cpu)) != shares
        && shares > 2
    {
        *cpu = cpu_quantity(i64::try_from(shares * 1000).unwrap_or(i64::MAX).div_euclid(1024) + 1);
    }
    actual
}

fn mounts(container: &Container) -> Option<Vec<VolumeMountStatus>> {
    let mounts: Vec<_> = container
        .volume_mounts
        .iter()
        .flatten()
        .map(|mount| VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: mount.read_only.filter(|read_only| *read_only),
            recursive_read_only: (mount.read_only == Some(true)).then(|| {
                let wanted = matches!(mount.recursive_read_only.as_deref(), Some("Enabled" | "IfPossible"));
                if wanted { "Enabled" } else { "Disabled" }.to_owned()
            }),
        })
        .collect();
    (!mounts.is_empty()).then_some(mounts)
}

/// A container that will be started again is waiting, and what it was is its last state.
fn apply_waiting(input: &Input<'_>, kind: ContainerKind, container: &Container, status: &mut ApiStatus) {
    let Some(reason) = input.waiting.get(&container.name) else { return };
    if input.pod.metadata.deletion_timestamp.is_some() {
        return;
    }
    let restarts = match input.observed.latest(&container.name) {
        None => true,
        Some(found) => match found.state {
            ContainerState::Running => false,
            ContainerState::Exited => containers::restarts_after_exit(input.pod, kind, container, found.exit_code),
            ContainerState::Created | ContainerState::Unknown => true,
        },
    };
    if !restarts {
        return;
    }
    if let Some(state) = status.state.take().filter(|state| state.terminated.is_some()) {
        status.last_state = Some(state);
    }
    status.state = Some(waiting(&reason.reason, &reason.message));
}

fn started(
    input: &Input<'_>,
    _: ContainerKind,
    container: &Container,
    status: &ApiStatus,
    old: Option<&ApiStatus>,
) -> bool {
    if status.state.as_ref().is_none_or(|state| state.running.is_none()) {
        return false;
    }
    if container.startup_probe.is_none() {
        return true;
    }
    let id = container_id(status);
    match input.probes.get(id, ProbeKind::Startup) {
        Some(success) => success,
        // An agent that has just started believes what it reported before.
        None => same_container(status, old).is_some_and(|old| old.started == Some(true)),
    }
}

fn ready(
    input: &Input<'_>,
    kind: ContainerKind,
    container: &Container,
    status: &ApiStatus,
    old: Option<&ApiStatus>,
) -> bool {
    let state = status.state.as_ref();
    match kind {
        ContainerKind::Init => {
            return state.and_then(|state| state.terminated.as_ref()).is_some_and(|ended| ended.exit_code == 0);
        }
        ContainerKind::Ephemeral => return false,
        ContainerKind::Sidecar | ContainerKind::Regular => {}
    }
    if status.started != Some(true) || state.is_none_or(|state| state.running.is_none()) {
        return false;
    }
    if container.readiness_probe.is_none() {
        return true;
    }
    match input.probes.get(container_id(status), ProbeKind::Readiness) {
        Some(success) => success,
        None => same_container(status, old).is_some_and(|old| old.ready),
    }
}

fn container_id(status: &ApiStatus) -> &str {
    status.container_id.as_deref().and_then(|id| id.strip_prefix(ID_SCHEME)).unwrap_or_default()
}

fn same_container<'a>(status: &ApiStatus, old: Option<&'a ApiStatus>) -> Option<&'a ApiStatus> {
    old.filter(|old| old.container_id == status.container_id)
}

/// The pod has stopped for good: whatever has no end gets one.
pub(super) fn terminate(statuses: &mut [ApiStatus]) {
    for status in statuses {
        if status.state.as_ref().is_none_or(|state| state.terminated.is_none()) {
            status.state = Some(lost("The container could not be located when the pod was terminated"));
            status.ready = false;
            status.started = Some(false);
        }
    }
}
