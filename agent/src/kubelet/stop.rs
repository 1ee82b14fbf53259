//! Ending containers the way they asked for: hook, signal, grace, kill; sidecars after the others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::sync::watch;

use super::containers::{self, ContainerKind};
use super::context::Context;
use super::events::EventType;
use super::hooks;
use super::observed::{Observed, ProbeKind};
use super::plan::KillCause;
use crate::runtime::{PodSandboxState, RuntimeError};

/// Containers get at least this long between signal and kill, in seconds.
const MINIMUM_GRACE: u64 = 2;

/// Seconds the pod's containers get: what the deletion says, else the specification.
pub fn grace(pod: &Pod) -> u64 {
    let deletion = pod.metadata.deletion_grace_period_seconds.filter(|_| pod.metadata.deletion_timestamp.is_some());
    let seconds = deletion.or(containers::spec(pod).termination_grace_period_seconds).unwrap_or(30);
    u64::try_from(seconds).unwrap_or(0).max(1)
}

fn grace_after(pod: &Pod, container: &Container, cause: KillCause) -> u64 {
    let probe = match cause {
        KillCause::Probe(ProbeKind::Liveness) => container.liveness_probe.as_ref(),
        KillCause::Probe(ProbeKind::Startup) => container.startup_probe.as_ref(),
        _ => None,
    };
    let own = probe.and_then(|probe| probe.termination_grace_period_seconds);
    own.and_then(|seconds| u64::try_from(seconds).ok()).unwrap_or_else(|| grace(pod))
}

/// Kills one container of a pod that goes on; returns when it has exited.
///
/// # Errors
/// When the runtime could not stop it.
pub async fn kill(
    context: &Context,
    pod: &Pod,
    id: &str,
    name: &str,
    message: &str,
    cause: KillCause,
) -> Result<(), RuntimeError> {
    let Some(found) = containers::find(pod, name) else {
        return context.runtime.stop_container(id, MINIMUM_GRACE).await;
    };
    context.recorder.container(pod, name, EventType::Normal, "Killing", message);
    let grace = grace_after(pod, &found.container, cause);
    end(context, pod, &found.container, id, grace, None).await
}

/// Everything [`pod`] needs.
#[derive(Clone, Copy)]
pub struct StopRequest<'a> {
    /// The node.
    pub context: &'a Arc<Context>,
    /// The pod.
    pub pod: &'a Pod,
    /// What runs.
    pub observed: &'a Observed,
    /// Seconds.
    pub grace: u64,
}

/// Ends all containers at once (sidecars in turn), then the sandboxes.
///
/// # Errors
/// The first failure; the others have been tried, too.
pub async fn pod(request: StopRequest<'_>) -> Result<(), RuntimeError> {
    let StopRequest { context, pod, observed, grace } = request;
    let running: Vec<_> = observed.running().collect();
    let (done, _) = watch::channel(BTreeSet::new());
    let kills = running.iter().map(|status| {
        let name = status.metadata.name.clone();
        let turn =
            Turn { first: before(pod, &name, &running.iter().map(|s| s.metadata.name.clone()).collect()), done: &done };
        async move {
            let result = match containers::find(pod, &name) {
                Some(found) => {
                    let message = format!("Stopping container {name}");
                    context.recorder.container(pod, &name, EventType::Normal, "Killing", message);
                    end(context, pod, &found.container, &status.id, grace, Some(&turn)).await
                }
                None => context.runtime.stop_container(&status.id, MINIMUM_GRACE).await,
            };
            turn.done.send_modify(|done| {
                done.insert(name);
            });
            result
        }
    });
    let mut first = Ok(());
    for result in join_all(kills).await {
        first = first.and(ignore_missing(result));
    }
    for sandbox in observed.sandboxes.iter().filter(|sandbox| sandbox.state == PodSandboxState::Ready) {
        first = first.and(ignore_missing(context.runtime.stop_pod_sandbox(&sandbox.id).await));
    }
    if let Err(error) = &first {
        let message = format!("error killing pod: {error}");
        context.recorder.pod(pod, EventType::Warning, "FailedKillPod", message);
    }
    first
}

fn ignore_missing(result: Result<(), RuntimeError>) -> Result<(), RuntimeError> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        other => other,
    }
}

/// Containers that must end before `name` is signalled: sidecars wait for the main ones and for later sidecars.
fn before(pod: &Pod, name: &str, running: &BTreeSet<String>) -> BTreeSet<String> {
    let all = containers::containers(pod);
    let Some(at) = all.iter().position(|found| found.container.name == name) else { return BTreeSet::new() };
    if all[at].kind != ContainerKind::Sidecar {
        return BTreeSet::new();
    }
    let later_sidecars = all[at + 1..].iter().filter(|found| found.kind == ContainerKind::Sidecar);
    let main = all.iter().filter(|found| found.kind == ContainerKind::Regular);
    later_sidecars.chain(main).map(|found| found.container.name.clone()).filter(|name| running.contains(name)).collect()
}

struct Turn<'a> {
    first: BTreeSet<String>,
    done: &'a watch::Sender<BTreeSet<String>>,
}

impl Turn<'_> {
    async fn wait(&self, at_most: Duration) {
        let mut done = self.done.subscribe();
        let ready = done.wait_for(|done| self.first.is_subset(done));
        let _ = tokio::time::timeout(at_most, ready).await;
    }
}

/// Hook, turn, signal, grace, kill.
async fn end(
    context: &Context,
    pod: &Pod,
    container: &Container,
    id: &str,
    grace: u64,
    turn: Option<&Turn<'_>>,
) -> Result<(), RuntimeError> {
    let begun = Instant::now();
    let left = |begun: Instant| Duration::from_secs(grace).saturating_sub(begun.elapsed());
    if let Some(hook) = container.lifecycle.as_ref().and_then(|hooks| hooks.pre_stop.as_ref()) {
        let ip = pod_ip(context, pod, id).await;
        let target = hooks::Target { runtime: context.runtime.as_ref(), container, id, ip };
        match tokio::time::timeout(left(begun), hooks::run(hook, &target)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, pod = containers::describe(pod), "preStop hook failed");
                let name = &container.name;
                context.recorder.container(pod, name, EventType::Warning, "FailedPreStopHook", "PreStopHook failed");
            }
            Err(_) => tracing::info!(pod = containers::describe(pod), "preStop hook took the whole grace period"),
        }
    }
    if let Some(turn) = turn {
        turn.wait(left(begun)).await;
    }
    let seconds = left(begun).as_secs_f64().ceil();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 <= seconds <= grace")]
    let seconds = (seconds as u64).max(MINIMUM_GRACE);
    context.runtime.stop_container(id, seconds).await
}

async fn pod_ip(context: &Context, pod: &Pod, id: &str) -> Option<std::net::IpAddr> {
    if containers::is_host_network(pod) {
        return context.host_ips().first().copied();
    }
    let sandbox = context.runtime.container_status(id).await.ok()?.sandbox_id;
    context.runtime.pod_sandbox_status(&sandbox).await.ok()?.ips.first().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sidecars_end_after_the_main_containers_in_reverse_order() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"spec": {
            "initContainers": [{"name": "a", "restartPolicy": "Always"}, {"name": "i"}, {"name": "b", "restartPolicy": "Always"}],
            "containers": [{"name": "m"}, {"name": "n"}]
        }}))
        .unwrap();
        let running: BTreeSet<String> = ["a", "b", "m"].map(str::to_owned).into();
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        assert_eq!(before(&pod, "m", &running), set(&[]));
        assert_eq!(before(&pod, "b", &running), set(&["m"]));
        assert_eq!(before(&pod, "a", &running), set(&["b", "m"]));
    }
}
