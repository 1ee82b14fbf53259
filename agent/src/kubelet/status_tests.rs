use super::*;
use crate::kubelet::observed::{ProbeKind, WaitReason, api_time};
use crate::kubelet::plan::tests::{at, container, pod, sandbox};
use crate::runtime::ContainerState::{Exited, Running};
use crate::runtime::ContainerStatus;
use serde_json::json;

struct World {
    pod: Pod,
    old: PodStatus,
    observed: Observed,
    probes: ProbeResults,
    waiting: WaitReasons,
    stopped: bool,
    failed: Option<(&'static str, &'static str)>,
}

impl World {
    fn new(spec: serde_json::Value, containers: Vec<ContainerStatus>) -> Self {
        Self {
            pod: pod(spec),
            old: PodStatus::default(),
            observed: Observed::new(vec![sandbox(0, true)], containers),
            probes: ProbeResults::default(),
            waiting: WaitReasons::new(),
            stopped: false,
            failed: None,
        }
    }

    fn status(&self) -> PodStatus {
        status(&Input {
            pod: &self.pod,
            old: &self.old,
            observed: &self.observed,
            probes: &self.probes,
            waiting: &self.waiting,
            host_ips: &[[192, 168, 0, 1].into()],
            stopped: self.stopped,
            failed: self.failed,
            now: api_time(at(200)),
        })
    }

    fn phase(&self) -> String {
        self.status().phase.unwrap()
    }
}

fn ready(status: &PodStatus, kind: &str) -> (String, Option<String>, Option<String>) {
    let found = condition(status, kind).unwrap();
    (found.status.clone(), found.reason.clone(), found.message.clone())
}

#[test]
fn a_pod_without_a_sandbox_is_pending() {
    let mut world = World::new(json!({"containers": [{"name": "c", "image": "x"}]}), vec![]);
    world.observed = Observed::default();
    let status = world.status();
    assert_eq!(status.phase.as_deref(), Some("Pending"));
    assert_eq!(status.observed_generation, Some(3));
    assert_eq!(ready(&status, "PodReadyToStartContainers").0, "False");
    assert_eq!(ready(&status, "Initialized").0, "True");
    let expected =
        ("False".into(), Some("ContainersNotReady".into()), Some("containers with unready status: [c]".into()));
    assert_eq!(ready(&status, "Ready"), expected);
    let state = status.container_statuses.unwrap()[0].state.clone().unwrap();
    assert_eq!(state.waiting.unwrap().reason.as_deref(), Some("ContainerCreating"));
}

#[test]
fn a_running_pod_is_ready_and_has_its_addresses() {
    let status = World::new(json!({"containers": [{"name": "c"}]}), vec![container("c", 0, Running, 0)]).status();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    assert_eq!(ready(&status, "Ready").0, "True");
    assert_eq!((status.pod_ip.as_deref(), status.host_ip.as_deref()), (Some("10.42.0.9"), Some("192.168.0.1")));
    let one = &status.container_statuses.unwrap()[0];
    assert_eq!((one.ready, one.started, one.container_id.as_deref()), (true, Some(true), Some("coracle://c-0")));
}

#[test]
fn conditions_keep_the_time_of_their_last_change() {
    let mut world = World::new(json!({"containers": [{"name": "c"}]}), vec![container("c", 0, Running, 0)]);
    world.old = world.status();
    for condition in world.old.conditions.iter_mut().flatten() {
        condition.last_transition_time = Some(api_time(at(1)));
    }
    world.observed = Observed::new(vec![sandbox(0, true)], vec![container("c", 0, Exited, 1)]);
    let status = world.status();
    assert_eq!(condition(&status, "PodScheduled").unwrap().last_transition_time, Some(api_time(at(1))));
    assert_eq!(condition(&status, "Ready").unwrap().last_transition_time, Some(api_time(at(200))));
}

#[test]
fn probes_decide_started_and_ready() {
    let spec = json!({"containers": [{"name": "c", "readinessProbe": {}, "startupProbe": {}}]});
    let mut world = World::new(spec, vec![container("c", 0, Running, 0)]);
    let one = |world: &World| {
        let status = world.status().container_statuses.unwrap().remove(0);
        (status.started, status.ready)
    };
    assert_eq!(one(&world), (Some(false), false));
    world.probes.set("c-0", ProbeKind::Startup, true);
    assert_eq!(one(&world), (Some(true), false));
    world.probes.set("c-0", ProbeKind::Readiness, true);
    assert_eq!(one(&world), (Some(true), true));
}

#[test]
fn a_new_agent_believes_the_readiness_it_reported_before() {
    let spec = json!({"containers": [{"name": "c", "readinessProbe": {}}]});
    let mut world = World::new(spec, vec![container("c", 0, Running, 0)]);
    world.probes.set("c-0", ProbeKind::Readiness, true);
    world.old = world.status();
    world.probes = ProbeResults::default();
    assert!(world.status().container_statuses.unwrap()[0].ready);
}

#[test]
fn restarts_show_the_last_state_and_waiting_its_reason() {
    let both = vec![container("c", 1, Exited, 2), container("c", 0, Exited, 1)];
    let mut world = World::new(json!({"containers": [{"name": "c"}]}), both);
    world.waiting.insert("c".into(), WaitReason { reason: "CrashLoopBackOff".into(), message: "back-off".into() });
    let status = world.status();
    assert_eq!(status.phase.as_deref(), Some("Running"));
    let one = &status.container_statuses.unwrap()[0];
    assert_eq!(one.restart_count, 1);
    assert_eq!(one.state.clone().unwrap().waiting.unwrap().reason.as_deref(), Some("CrashLoopBackOff"));
    assert_eq!(one.last_state.clone().unwrap().terminated.unwrap().exit_code, 2);
}

#[test]
fn phases_follow_containers_and_policy() {
    let phase = |policy: &str, codes: &[i32]| {
        let names = ["a", "b"];
        let spec: Vec<_> = names[..codes.len()].iter().map(|name| json!({"name": name})).collect();
        let statuses = codes.iter().zip(names).map(|(code, name)| container(name, 0, Exited, *code)).collect();
        World::new(json!({"restartPolicy": policy, "containers": spec}), statuses).phase()
    };
    assert_eq!(phase("Never", &[0, 0]), "Succeeded");
    assert_eq!(phase("Never", &[0, 1]), "Failed");
    assert_eq!(phase("OnFailure", &[0]), "Succeeded");
    assert_eq!(phase("OnFailure", &[1]), "Running");
    assert_eq!(phase("Always", &[0]), "Running");
}

#[test]
fn init_containers_hold_the_pod_pending_or_fail_it() {
    let spec = |policy: &str| json!({"restartPolicy": policy, "initContainers": [{"name": "i"}], "containers": [{"name": "c"}]});
    let running = World::new(spec("Always"), vec![container("i", 0, Running, 0)]).status();
    assert_eq!(running.phase.as_deref(), Some("Pending"));
    let expected = (
        "False".into(),
        Some("ContainersNotInitialized".into()),
        Some("containers with incomplete status: [i]".into()),
    );
    assert_eq!(ready(&running, "Initialized"), expected);
    let waiting = running.container_statuses.unwrap()[0].state.clone().unwrap().waiting.unwrap();
    assert_eq!(waiting.reason.as_deref(), Some("PodInitializing"));
    assert_eq!(World::new(spec("Never"), vec![container("i", 0, Exited, 1)]).phase(), "Failed");
    assert_eq!(World::new(spec("Always"), vec![container("i", 0, Exited, 1)]).phase(), "Pending");
}

#[test]
fn a_pod_past_its_deadline_fails_only_when_nothing_runs_any_more() {
    let mut world = World::new(json!({"containers": [{"name": "c"}]}), vec![container("c", 0, Running, 0)]);
    world.old = world.status();
    world.failed = Some(("DeadlineExceeded", "too long"));
    assert_eq!(world.phase(), "Running");
    world.observed = Observed::new(vec![sandbox(0, false)], vec![container("c", 0, Exited, 137)]);
    world.stopped = true;
    let status = world.status();
    assert_eq!((status.phase.as_deref(), status.reason.as_deref()), (Some("Failed"), Some("DeadlineExceeded")));
    assert_eq!(ready(&status, "Ready"), ("False".into(), Some("PodFailed".into()), None));
}

#[test]
fn a_container_that_was_lost_is_told_apart_from_one_that_never_ran() {
    let mut world = World::new(json!({"containers": [{"name": "c"}]}), vec![container("c", 0, Running, 0)]);
    world.old = world.status();
    world.observed = Observed::default();
    let one = world.status().container_statuses.unwrap().remove(0);
    assert_eq!(one.restart_count, 1);
    assert_eq!(one.last_state.unwrap().terminated.unwrap().reason.as_deref(), Some("ContainerStatusUnknown"));
}

#[test]
fn readiness_gates_wait_for_their_conditions() {
    let mut world = World::new(
        json!({"containers": [{"name": "c"}], "readinessGates": [{"conditionType": "a/b"}]}),
        vec![container("c", 0, Running, 0)],
    );
    let expected = "corresponding condition of pod readiness gate \"a/b\" does not exist.";
    assert_eq!(ready(&world.status(), "Ready").2.as_deref(), Some(expected));
    world.pod.status = serde_json::from_value(json!({"conditions": [{"type": "a/b", "status": "True"}]})).unwrap();
    let status = world.status();
    assert_eq!(ready(&status, "Ready").0, "True");
    assert!(condition(&status, "a/b").is_some());
}
