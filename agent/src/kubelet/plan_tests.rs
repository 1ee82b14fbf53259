use super::*;
use crate::runtime::{ContainerMetadata, PodSandboxMetadata, PodSandboxState, PodSandboxStatus};
use serde_json::json;

pub(in crate::kubelet) fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
}

pub(in crate::kubelet) fn sandbox(attempt: u32, ready: bool) -> PodSandboxStatus {
    PodSandboxStatus {
        id: format!("s{attempt}"),
        metadata: PodSandboxMetadata { attempt, ..PodSandboxMetadata::default() },
        state: if ready { PodSandboxState::Ready } else { PodSandboxState::NotReady },
        created_at: at(0),
        ips: vec![[10, 42, 0, 9].into()],
        labels: Default::default(),
        annotations: Default::default(),
    }
}

pub(in crate::kubelet) fn container(
    name: &str,
    attempt: u32,
    state: ContainerState,
    exit_code: i32,
) -> ContainerStatus {
    let begun = at(10 * u64::from(attempt) + 1);
    ContainerStatus {
        id: format!("{name}-{attempt}"),
        sandbox_id: "s0".into(),
        metadata: ContainerMetadata { name: name.into(), attempt },
        state,
        created_at: begun,
        started_at: (state != ContainerState::Created).then_some(begun),
        finished_at: (state == ContainerState::Exited).then_some(begun + Duration::from_secs(5)),
        exit_code,
        signal: 0,
        reason: if exit_code == 0 { "Completed".into() } else { "Error".into() },
        message: String::new(),
        image: "i".into(),
        image_id: "sha256:1".into(),
        image_ref: "i@sha256:1".into(),
        labels: Default::default(),
        annotations: Default::default(),
        mounts: Vec::new(),
        log_path: Default::default(),
        resources: Default::default(),
        pid: None,
        user: None,
    }
}

pub(in crate::kubelet) fn pod(spec: serde_json::Value) -> Pod {
    serde_json::from_value(
        json!({"metadata": {"name": "p", "namespace": "n", "uid": "u", "generation": 3}, "spec": spec}),
    )
    .unwrap()
}

struct World {
    pod: Pod,
    observed: Observed,
    probes: ProbeResults,
    backoffs: Backoffs,
    held: BTreeSet<String>,
    now: SystemTime,
}

impl World {
    fn new(spec: serde_json::Value, containers: Vec<ContainerStatus>) -> Self {
        Self {
            pod: pod(spec),
            observed: Observed::new(vec![sandbox(0, true)], containers),
            probes: ProbeResults::default(),
            backoffs: Backoffs::default(),
            held: BTreeSet::new(),
            now: at(100),
        }
    }

    fn plan(&self) -> Plan {
        plan(&Input {
            pod: &self.pod,
            observed: &self.observed,
            probes: &self.probes,
            backoffs: &self.backoffs,
            held: &self.held,
            now: self.now,
        })
    }
}

fn start(name: &str, kind: ContainerKind) -> Step {
    Step::Start { name: name.into(), kind }
}

use ContainerState::{Exited, Running};

#[test]
fn a_new_pod_gets_its_sandbox_first() {
    let mut world = World::new(json!({"containers": [{"name": "c"}]}), vec![]);
    world.observed = Observed::default();
    assert_eq!(world.plan().steps, [Step::CreateSandbox { attempt: 0 }]);
}

#[test]
fn all_containers_start_once_the_sandbox_is_ready() {
    let world = World::new(json!({"containers": [{"name": "a"}, {"name": "b"}]}), vec![container("a", 0, Running, 0)]);
    assert_eq!(world.plan().steps, [start("b", ContainerKind::Regular)]);
}

#[test]
fn init_containers_run_one_after_the_other() {
    let spec = json!({"initContainers": [{"name": "i"}, {"name": "j"}], "containers": [{"name": "c"}]});
    let step = |containers| World::new(spec.clone(), containers).plan().steps;
    assert_eq!(step(vec![]), [start("i", ContainerKind::Init)]);
    assert_eq!(step(vec![container("i", 0, Running, 0)]), []);
    assert_eq!(step(vec![container("i", 0, Exited, 0)]), [start("j", ContainerKind::Init)]);
    let done = vec![container("i", 0, Exited, 0), container("j", 0, Exited, 0)];
    assert_eq!(step(done), [start("c", ContainerKind::Regular)]);
}

#[test]
fn a_failed_init_container_ends_a_pod_that_never_restarts() {
    let spec = json!({"restartPolicy": "Never", "initContainers": [{"name": "i"}], "containers": [{"name": "c"}]});
    let world = World::new(spec, vec![container("i", 0, Exited, 1)]);
    assert_eq!(world.plan().steps, [Step::StopPod]);
}

#[test]
fn the_next_init_container_waits_until_a_sidecar_has_started() {
    let spec = json!({"initContainers": [{"name": "s", "restartPolicy": "Always", "startupProbe": {}}, {"name": "i"}],
        "containers": [{"name": "c"}]});
    let mut world = World::new(spec, vec![container("s", 0, Running, 0)]);
    assert_eq!(world.plan().steps, []);
    world.probes.set("s-0", ProbeKind::Startup, true);
    assert_eq!(world.plan().steps, [start("i", ContainerKind::Init)]);
    world.observed = Observed::new(
        vec![sandbox(0, true)],
        vec![container("s", 0, Exited, 1), container("i", 0, Exited, 0), container("c", 0, Running, 0)],
    );
    assert_eq!(world.plan().steps, [start("s", ContainerKind::Sidecar)]);
}

#[test]
fn a_container_that_keeps_failing_waits_longer_each_time() {
    let mut world = World::new(
        json!({"containers": [{"name": "c"}]}),
        vec![container("c", 1, Exited, 1), container("c", 0, Exited, 1)],
    );
    let dead = world.observed.latest("c").unwrap().finished_at.unwrap();
    assert_eq!(world.plan().steps, [Step::Remove { id: "c-0".into() }, start("c", ContainerKind::Regular)]);
    world.backoffs.escalate("c", dead, dead);
    world.now = dead + Duration::from_secs(4);
    let plan = world.plan();
    assert_eq!(plan.steps, []);
    assert_eq!(plan.wake, Some(Duration::from_secs(6)));
    assert_eq!(plan.waiting["c"].reason, "CrashLoopBackOff");
    assert_eq!(plan.waiting["c"].message, "back-off 10s restarting failed container=c pod=p_n(u)");
}

#[test]
fn restart_policies_decide_what_runs_again() {
    let steps = |policy: &str, code: i32| {
        World::new(
            json!({"restartPolicy": policy, "containers": [{"name": "c"}]}),
            vec![container("c", 0, Exited, code)],
        )
        .plan()
        .steps
    };
    assert_eq!(steps("Always", 0), [start("c", ContainerKind::Regular)]);
    assert_eq!(steps("OnFailure", 1), [start("c", ContainerKind::Regular)]);
    for (policy, code) in [("OnFailure", 0), ("Never", 1), ("Never", 0)] {
        assert_eq!(steps(policy, code), [Step::StopPod], "{policy} {code}");
    }
}

#[test]
fn a_failed_liveness_probe_kills_and_restarts() {
    let mut world =
        World::new(json!({"containers": [{"name": "c", "livenessProbe": {}}]}), vec![container("c", 0, Running, 0)]);
    world.probes.set("c-0", ProbeKind::Liveness, false);
    let message = "Container c failed liveness probe, will be restarted".to_owned();
    let kill = Step::Kill { id: "c-0".into(), name: "c".into(), message, cause: KillCause::Probe(ProbeKind::Liveness) };
    assert_eq!(world.plan().steps, [kill, start("c", ContainerKind::Regular)]);
}

#[test]
fn another_image_is_another_container() {
    let mut running = container("c", 0, Running, 0);
    let spec = json!({"containers": [{"name": "c", "image": "old"}]});
    running
        .annotations
        .insert(super::super::labels::HASH.into(), containers::hash(&pod(spec).spec.unwrap().containers[0]));
    let same = World::new(json!({"containers": [{"name": "c", "image": "old"}]}), vec![running.clone()]);
    assert_eq!(same.plan().steps, []);
    let other = World::new(json!({"containers": [{"name": "c", "image": "new"}]}), vec![running]);
    assert!(
        matches!(&other.plan().steps[0], Step::Kill { message, .. } if message == "Container c definition changed, will be restarted")
    );
}

#[test]
fn a_lost_sandbox_is_made_anew_unless_the_pod_never_restarts() {
    let lost = |policy: &str| {
        let mut world = World::new(
            json!({"restartPolicy": policy, "initContainers": [{"name": "i"}], "containers": [{"name": "c"}]}),
            vec![container("i", 0, Exited, 0), container("c", 0, Exited, 137)],
        );
        world.observed.sandboxes = vec![sandbox(0, false)];
        world.plan().steps
    };
    assert_eq!(lost("Always"), [Step::Remove { id: "i-0".into() }, Step::CreateSandbox { attempt: 1 }]);
    assert_eq!(lost("Never"), []);
}

#[test]
fn ephemeral_containers_start_once() {
    let spec = json!({"containers": [{"name": "c"}], "ephemeralContainers": [{"name": "e"}]});
    let steps = |containers| World::new(spec.clone(), containers).plan().steps;
    assert_eq!(steps(vec![container("c", 0, Running, 0)]), [start("e", ContainerKind::Ephemeral)]);
    assert_eq!(steps(vec![container("c", 0, Running, 0), container("e", 0, Exited, 1)]), []);
}

#[test]
fn changed_limits_are_applied_in_place_unless_the_policy_asks_for_a_restart() {
    let limited = |cpu: &str| json!({"name": "c", "resources": {"limits": {"cpu": cpu, "memory": "64Mi"}}});
    let steps = |policy: &str| {
        let before = pod(json!({"containers": [limited("1")]}));
        let mut running = container("c", 0, Running, 0);
        running.resources = qos::container_resources(&before, &before.spec.as_ref().unwrap().containers[0], 0);
        let mut after = limited("2");
        after["resizePolicy"] = json!([{"resourceName": "cpu", "restartPolicy": policy}]);
        World::new(json!({"containers": [after]}), vec![running]).plan().steps
    };
    assert_eq!(steps("NotRequired"), [Step::Resize { containers: vec![("c-0".into(), "c".into())] }]);
    let message = "Container c resize requires restart, will be restarted".to_owned();
    let kill = Step::Kill { id: "c-0".into(), name: "c".into(), message, cause: KillCause::Other };
    assert_eq!(steps("RestartContainer"), [kill, start("c", ContainerKind::Regular)]);
    assert!(replaces(&steps("RestartContainer")) && !replaces(&steps("NotRequired")));
}

#[test]
fn a_container_that_cannot_start_holds_up_only_itself() {
    let mut world = World::new(json!({"containers": [{"name": "a"}, {"name": "b"}]}), vec![]);
    world.held.insert("a".into());
    assert_eq!(world.plan().steps, [start("b", ContainerKind::Regular)]);
}
