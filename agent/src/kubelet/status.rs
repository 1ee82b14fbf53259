//! `status` of a pod, computed from what was observed: phase, conditions, containers, addresses.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ContainerStatus as ApiStatus, HostIP, Pod, PodCondition, PodIP, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::container_status;
use super::containers::{self, ContainerKind};
use super::observed::{Observed, ProbeResults, WaitReasons};
use super::{conditions, qos};

/// Everything a status follows from.
#[derive(Debug)]
pub struct Input<'a> {
    /// The pod as the API has it.
    pub pod: &'a Pod,
    /// The status last reported, by default the one in `pod`.
    pub old: &'a PodStatus,
    /// What the runtime says.
    pub observed: &'a Observed,
    /// What the probes say.
    pub probes: &'a ProbeResults,
    /// Why containers could not be started.
    pub waiting: &'a WaitReasons,
    /// The node's addresses, one per family.
    pub host_ips: &'a [IpAddr],
    /// All containers have stopped and none will start.
    pub stopped: bool,
    /// The node ended the pod: (reason, message).
    pub failed: Option<(&'a str, &'a str)>,
    /// The clock, whole seconds.
    pub now: Time,
}

/// Computes the status.
pub fn status(input: &Input<'_>) -> PodStatus {
    let pod = input.pod;
    let mut status = PodStatus {
        observed_generation: pod.metadata.generation,
        qos_class: Some(qos::class(pod).to_owned()),
        start_time: input.old.start_time.clone().or_else(|| Some(input.now.clone())),
        nominated_node_name: input.old.nominated_node_name.clone(),
        resource_claim_statuses: pod.status.as_ref().and_then(|status| status.resource_claim_statuses.clone()),
        ..PodStatus::default()
    };
    container_statuses(input, &mut status);
    phase(input, &mut status);
    if input.stopped {
        terminate(input, &mut status);
    }
    addresses(input, &mut status);
    status.conditions = Some(conditions::conditions(input, &status));
    status
}

fn container_statuses(input: &Input<'_>, status: &mut PodStatus) {
    let source = container_status::Input {
        pod: input.pod,
        observed: input.observed,
        probes: input.probes,
        waiting: input.waiting,
    };
    let all = containers::containers(input.pod);
    let of = |ephemeral: bool, init: bool, old: &Option<Vec<ApiStatus>>| {
        let chosen = all.iter().filter(move |found| {
            (found.kind == ContainerKind::Ephemeral) == ephemeral
                && matches!(found.kind, ContainerKind::Init | ContainerKind::Sidecar) == init
        });
        let chosen = chosen.map(|found| (found.kind, found.container.as_ref()));
        let mut list = container_status::statuses(&source, chosen, old.as_deref().unwrap_or_default());
        if !init {
            list.sort_by(|a, b| a.name.cmp(&b.name));
        }
        (!list.is_empty()).then_some(list)
    };
    status.init_container_statuses = of(false, true, &input.old.init_container_statuses);
    status.container_statuses = of(false, false, &input.old.container_statuses);
    status.ephemeral_container_statuses = of(true, false, &input.old.ephemeral_container_statuses);
    if input.failed.is_some() || input.stopped {
        for list in [&mut status.container_statuses, &mut status.init_container_statuses].into_iter().flatten() {
            for one in list.iter_mut().filter(|one| !is_terminated(one)) {
                one.ready = false;
            }
        }
    }
}

fn is_terminated(status: &ApiStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.terminated.is_some())
}

fn is_running(status: &ApiStatus) -> bool {
    status.state.as_ref().is_some_and(|state| state.running.is_some())
}

/// A phase that never changes again.
pub fn is_terminal(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn phase(input: &Input<'_>, status: &mut PodStatus) {
    let api_phase = input.pod.status.as_ref().and_then(|status| status.phase.as_deref());
    let old_phase = input.old.phase.as_deref();
    let mut phase = computed_phase(input, status).to_owned();
    if !is_terminal(Some(&phase))
        && let Some(terminal) = [old_phase, api_phase].into_iter().flatten().find(|phase| is_terminal(Some(phase)))
    {
        phase = terminal.to_owned();
    }
    if old_phase == Some(phase.as_str()) {
        let api = input.pod.status.as_ref();
        status.reason = input.old.reason.clone().or_else(|| api.and_then(|status| status.reason.clone()));
        status.message = input.old.message.clone().or_else(|| api.and_then(|status| status.message.clone()));
    }
    if let Some((reason, message)) = input.failed {
        "Failed".clone_into(&mut phase);
        status.reason = Some(reason.to_owned());
        status.message = Some(message.to_owned());
    }
    if let Some(terminal) = api_phase.filter(|phase| is_terminal(Some(phase))) {
        terminal.clone_into(&mut phase);
    }
    // A phase is final only when nothing runs any more.
    if !input.stopped
        && is_terminal(Some(&phase))
        && !is_terminal(old_phase)
        && input.observed.running().next().is_some()
    {
        phase = old_phase.unwrap_or("Pending").to_owned();
        status.reason.clone_from(&input.old.reason);
        status.message.clone_from(&input.old.message);
    }
    status.phase = Some(phase);
}

/// The phase that the container statuses alone imply; `stopped` pods restart nothing.
fn computed_phase(input: &Input<'_>, status: &PodStatus) -> &'static str {
    let pod = input.pod;
    let find = |list: &Option<Vec<ApiStatus>>, name: &str| {
        list.as_deref().unwrap_or_default().iter().find(|status| status.name == name).cloned()
    };
    let mut count = Count::default();
    for container in containers::init_containers(pod) {
        let found = find(&status.init_container_statuses, &container.name);
        if containers::is_sidecar(container) {
            count.sidecar(found.as_ref());
        } else {
            count.init(found.as_ref(), |code| {
                containers::restarts_after_exit(pod, ContainerKind::Init, container, code)
            });
        }
    }
    for container in &containers::spec(pod).containers {
        let found = find(&status.container_statuses, &container.name);
        count.regular(found.as_ref(), |code| {
            containers::restarts_after_exit(pod, ContainerKind::Regular, container, code)
        });
    }
    let has_initialized = containers::spec(pod)
        .containers
        .iter()
        .any(|container| input.observed.latest(&container.name).is_some_and(|found| found.started_at.is_some()));
    count.phase(input.stopped && !containers::is_static(pod), has_initialized)
}

#[derive(Default)]
struct Count {
    pending_init: u32,
    pending_sidecars: u32,
    failed_init: u32,
    unknown: u32,
    running: u32,
    waiting: u32,
    stopped: u32,
    not_restartable: u32,
    succeeded: u32,
}

impl Count {
    fn init(&mut self, status: Option<&ApiStatus>, restarts: impl Fn(i32) -> bool) {
        match status.and_then(ended) {
            Some(code) if code != 0 => self.failed_init += u32::from(!restarts(code)),
            Some(_) if status.is_some_and(is_terminated) => {}
            _ => self.pending_init += 1,
        }
    }

    fn sidecar(&mut self, status: Option<&ApiStatus>) {
        let Some(status) = status else {
            self.unknown += 1;
            return;
        };
        if is_running(status) {
            self.pending_sidecars += u32::from(status.started != Some(true));
            self.running += 1;
        } else if ended(status).is_none() {
            self.pending_sidecars += 1;
            self.waiting += 1;
        }
    }

    fn regular(&mut self, status: Option<&ApiStatus>, restarts: impl Fn(i32) -> bool) {
        let Some(status) = status else {
            self.unknown += 1;
            return;
        };
        if is_running(status) {
            self.running += 1;
        } else if let Some(code) = ended(status) {
            self.stopped += 1;
            self.not_restartable += u32::from(!restarts(code));
            self.succeeded += u32::from(code == 0 && is_terminated(status));
        } else {
            self.waiting += 1;
        }
    }

    fn phase(&self, stopped_for_good: bool, has_initialized: bool) -> &'static str {
        if self.failed_init > 0 {
            return "Failed";
        }
        if self.pending_init > 0 || (self.pending_sidecars > 0 && !has_initialized) || self.waiting > 0 {
            return "Pending";
        }
        if self.running > 0 && self.unknown == 0 {
            return "Running";
        }
        if self.running > 0 || self.stopped == 0 || self.unknown > 0 {
            return "Pending";
        }
        let ended = if self.stopped == self.succeeded { "Succeeded" } else { "Failed" };
        if stopped_for_good || self.stopped == self.not_restartable { ended } else { "Running" }
    }
}

/// Exit code of a container that has ended, also of one that waits to be started again.
fn ended(status: &ApiStatus) -> Option<i32> {
    let state = status.state.as_ref()?;
    if let Some(terminated) = &state.terminated {
        return Some(terminated.exit_code);
    }
    state.waiting.as_ref()?;
    status.last_state.as_ref()?.terminated.as_ref().map(|terminated| terminated.exit_code)
}

/// Nothing runs and nothing will: every container has an end and the phase is final.
fn terminate(input: &Input<'_>, status: &mut PodStatus) {
    for list in [&mut status.container_statuses, &mut status.ephemeral_container_statuses].into_iter().flatten() {
        container_status::terminate(list);
    }
    let initialized =
        containers::spec(input.pod).containers.iter().any(|container| input.observed.latest(&container.name).is_some());
    if let Some(list) = &mut status.init_container_statuses
        && !initialized
    {
        container_status::terminate(list);
    }
    if !is_terminal(status.phase.as_deref()) && !containers::is_static(input.pod) {
        status.phase = Some("Failed".to_owned());
    }
}

fn addresses(input: &Input<'_>, status: &mut PodStatus) {
    let texts = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>();
    let host = texts(input.host_ips);
    status.host_ip = host.first().cloned();
    status.host_ips = (!host.is_empty()).then(|| host.iter().map(|ip| HostIP { ip: ip.clone() }).collect());
    let pod = if containers::is_host_network(input.pod) { host } else { texts(input.observed.ips()) };
    if pod.is_empty() {
        // The sandbox is gone; the addresses of a finished pod stay known.
        if is_terminal(status.phase.as_deref()) || input.pod.metadata.deletion_timestamp.is_some() {
            status.pod_ip.clone_from(&input.old.pod_ip);
            status.pod_ips.clone_from(&input.old.pod_ips);
        }
        return;
    }
    status.pod_ip = pod.first().cloned();
    status.pod_ips = Some(pod.into_iter().map(|ip| PodIP { ip }).collect());
}

/// The condition of this type.
pub fn condition<'a>(status: &'a PodStatus, kind: &str) -> Option<&'a PodCondition> {
    status.conditions.as_deref().unwrap_or_default().iter().find(|condition| condition.type_ == kind)
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
