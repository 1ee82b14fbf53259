//! The pod conditions that the kubelet owns.

use k8s_openapi::api::core::v1::{Container, ContainerStatus as ApiStatus, PodCondition, PodStatus};

use super::containers;
use super::status::Input;

/// Conditions the kubelet writes; all others belong to somebody else and are kept.
pub const OWNED: [&str; 5] = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"];

#[derive(Default)]
struct Verdict {
    met: bool,
    reason: &'static str,
    message: String,
}

impl Verdict {
    fn met() -> Self {
        Self { met: true, ..Self::default() }
    }

    fn unmet(reason: &'static str, message: String) -> Self {
        Self { met: false, reason, message }
    }
}

/// Foreign conditions first, then the kubelet's own in upstream's order.
pub(super) fn conditions(input: &Input<'_>, status: &PodStatus) -> Vec<PodCondition> {
    let foreign = input.pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let mut all: Vec<_> = foreign.iter().filter(|other| !OWNED.contains(&other.type_.as_str())).cloned().collect();
    let containers_ready = containers_ready(input, status);
    let ready = ready(input, &all, &containers_ready);
    let sandbox = input.observed.sandbox_change(input.pod).is_none();
    let own = [
        ("PodReadyToStartContainers", Verdict { met: sandbox, ..Verdict::default() }),
        ("Initialized", initialized(input, status)),
        ("Ready", ready),
        ("ContainersReady", containers_ready),
        ("PodScheduled", Verdict::met()),
    ];
    for (kind, verdict) in own {
        let condition = build(input, kind, verdict);
        all.push(condition);
    }
    all
}

fn build(input: &Input<'_>, kind: &str, verdict: Verdict) -> PodCondition {
    let status = if verdict.met { "True" } else { "False" };
    let old = super::status::condition(input.old, kind)
        .or_else(|| input.pod.status.as_ref().and_then(|status| super::status::condition(status, kind)));
    let since = old.filter(|old| old.status == status).and_then(|old| old.last_transition_time.clone());
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    PodCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: some(verdict.reason),
        message: some(&verdict.message),
        last_transition_time: since.or_else(|| Some(input.now.clone())),
        observed_generation: input.pod.metadata.generation,
        ..PodCondition::default()
    }
}

fn find<'a>(list: Option<&'a Vec<ApiStatus>>, container: &Container) -> Option<&'a ApiStatus> {
    list?.iter().find(|status| status.name == container.name)
}

/// Names as Go prints a slice: `[a b]`.
fn list(names: &[&str]) -> String {
    format!("[{}]", names.join(" "))
}

fn explain(reason: &'static str, unknown: &[&str], unready: &[&str], word: &str) -> Option<Verdict> {
    let mut parts = Vec::new();
    if !unknown.is_empty() {
        parts.push(format!("containers with unknown status: {}", list(unknown)));
    }
    if !unready.is_empty() {
        parts.push(format!("containers with {word} status: {}", list(unready)));
    }
    (!parts.is_empty()).then(|| Verdict::unmet(reason, parts.join(", ")))
}

fn containers_ready(input: &Input<'_>, status: &PodStatus) -> Verdict {
    let mut unknown = Vec::new();
    let mut unready = Vec::new();
    let sidecars = containers::init_containers(input.pod)
        .iter()
        .filter(|container| containers::is_sidecar(container))
        .map(|container| (container, status.init_container_statuses.as_ref()));
    let regular =
        containers::spec(input.pod).containers.iter().map(|container| (container, status.container_statuses.as_ref()));
    for (container, list) in sidecars.chain(regular) {
        match find(list, container) {
            None => unknown.push(container.name.as_str()),
            Some(found) if !found.ready => unready.push(container.name.as_str()),
            Some(_) => {}
        }
    }
    match status.phase.as_deref() {
        Some("Succeeded") if unknown.is_empty() => Verdict::unmet("PodCompleted", String::new()),
        Some("Failed") => Verdict::unmet("PodFailed", String::new()),
        _ => explain("ContainersNotReady", &unknown, &unready, "unready").unwrap_or_else(Verdict::met),
    }
}

fn ready(input: &Input<'_>, foreign: &[PodCondition], containers_ready: &Verdict) -> Verdict {
    if !containers_ready.met {
        return Verdict::unmet(containers_ready.reason, containers_ready.message.clone());
    }
    let mut missing = Vec::new();
    for gate in containers::spec(input.pod).readiness_gates.iter().flatten() {
        let kind = &gate.condition_type;
        match foreign.iter().find(|condition| condition.type_ == *kind) {
            None => missing.push(format!("corresponding condition of pod readiness gate {kind:?} does not exist.")),
            Some(found) if found.status != "True" => {
                missing
                    .push(format!("the status of pod readiness gate {kind:?} is not \"True\", but {}", found.status));
            }
            Some(_) => {}
        }
    }
    if missing.is_empty() { Verdict::met() } else { Verdict::unmet("ReadinessGatesNotReady", missing.join(", ")) }
}

fn initialized(input: &Input<'_>, status: &PodStatus) -> Verdict {
    let mut unknown = Vec::new();
    let mut incomplete = Vec::new();
    for container in containers::init_containers(input.pod) {
        let Some(found) = find(status.init_container_statuses.as_ref(), container) else {
            unknown.push(container.name.as_str());
            continue;
        };
        let done = if containers::is_sidecar(container) { found.started == Some(true) } else { found.ready };
        if !done {
            incomplete.push(container.name.as_str());
        }
    }
    if status.phase.as_deref() == Some("Succeeded") && unknown.is_empty() {
        return Verdict { met: true, reason: "PodCompleted", message: String::new() };
    }
    let started = status.container_statuses.iter().flatten().any(|found| {
        let ran = |state: &Option<k8s_openapi::api::core::v1::ContainerState>| {
            state.as_ref().is_some_and(|state| state.running.is_some() || state.terminated.is_some())
        };
        ran(&found.state) || ran(&found.last_state)
    });
    if started && !containers::spec(input.pod).containers.is_empty() {
        return Verdict::met();
    }
    explain("ContainersNotInitialized", &unknown, &incomplete, "incomplete").unwrap_or_else(Verdict::met)
}
