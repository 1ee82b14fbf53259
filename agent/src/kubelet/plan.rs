//! What to do next for a pod that should run: a pure function of its specification and what was observed.
//!
//! The rules are upstream's `computePodActions`; the worker carries the steps out in order and plans again.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::{Container, Pod};

use super::backoff::{Backoffs, go_duration};
use super::containers::{self, ContainerKind};
use super::observed::{Observed, ProbeKind, ProbeResults, WaitReason, WaitReasons};
use super::qos;
use crate::runtime::{ContainerState, ContainerStatus};

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Kill every container, then stop every ready sandbox: all is done, or a new sandbox is needed.
    StopPod,
    /// Remove dead containers that would be mistaken for those of the new sandbox, or that are superseded.
    Remove {
        /// Container id.
        id: String,
    },
    /// Make the sandbox.
    CreateSandbox {
        /// How many there were before.
        attempt: u32,
    },
    /// Kill one container.
    Kill {
        /// Container id.
        id: String,
        /// Container name.
        name: String,
        /// The event's text.
        message: String,
        /// A failed probe may have a grace period of its own.
        cause: KillCause,
    },
    /// Bring the cgroups of the pod and of these running containers to what the specification says.
    Resize {
        /// (Container id, container name).
        containers: Vec<(String, String)>,
    },
    /// Create and start one container.
    Start {
        /// Container name.
        name: String,
        /// What it is.
        kind: ContainerKind,
    },
}

/// Why a container is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillCause {
    /// The pod stops, or the definition has changed.
    Other,
    /// A probe with this verdict.
    Probe(ProbeKind),
}

/// Whether a container is killed to be started anew at once.
pub fn replaces(steps: &[Step]) -> bool {
    let started = |name: &String| steps.iter().any(|step| matches!(step, Step::Start { name: n, .. } if n == name));
    steps.iter().any(|step| matches!(step, Step::Kill { name, cause: KillCause::Other, .. } if started(name)))
}

/// What to do now, and when to look again.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In order.
    pub steps: Vec<Step>,
    /// Containers that wait for their restart delay.
    pub waiting: WaitReasons,
    /// Time until the first of them may start.
    pub wake: Option<Duration>,
}

/// Everything [`plan`] looks at.
#[derive(Debug)]
pub struct Input<'a> {
    /// The wanted pod.
    pub pod: &'a Pod,
    /// What the runtime says.
    pub observed: &'a Observed,
    /// What the probes say.
    pub probes: &'a ProbeResults,
    /// Restart delays by container name.
    pub backoffs: &'a Backoffs,
    /// Containers that could not be started just now and are not to be tried yet.
    pub held: &'a BTreeSet<String>,
    /// The clock.
    pub now: SystemTime,
}

/// Decides the next steps.
pub fn plan(input: &Input<'_>) -> Plan {
    if let Some(attempt) = input.observed.sandbox_change(input.pod) {
        return plan_new_sandbox(input, attempt);
    }
    let mut draft = Draft { input, kills: Vec::new(), resizes: Vec::new(), starts: Vec::new() };
    for found in containers::containers(input.pod) {
        if found.kind == ContainerKind::Ephemeral && input.observed.latest(&found.container.name).is_none() {
            draft.start(&found.container, ContainerKind::Ephemeral);
        }
    }
    let stop = match draft.init_containers() {
        Progress::Failed => true,
        Progress::Initializing => false,
        Progress::Initialized => draft.regular_containers(),
    };
    if stop {
        let stopped = input.observed.ready_sandbox().is_none() && input.observed.running().next().is_none();
        return Plan { steps: if stopped { Vec::new() } else { vec![Step::StopPod] }, ..Plan::default() };
    }
    draft.finish()
}

/// No usable sandbox: everything starts over unless the pod is done.
fn plan_new_sandbox(input: &Input<'_>, attempt: u32) -> Plan {
    let pod = input.pod;
    let mut steps = Vec::new();
    let leftovers = input.observed.running().next().is_some() || input.observed.ready_sandbox().is_some();
    if leftovers {
        steps.push(Step::StopPod);
    }
    let never = containers::restart_policy(pod) == "Never"
        && containers::spec(pod).containers.iter().all(|container| container.restart_policy.is_none());
    if never && attempt != 0 && !input.observed.containers.is_empty() {
        return Plan { steps, ..Plan::default() };
    }
    let wanted: Vec<&Container> = containers::spec(pod)
        .containers
        .iter()
        .filter(|container| {
            let policy = container.restart_policy.as_deref().unwrap_or_else(|| containers::restart_policy(pod));
            !(policy == "OnFailure" && input.observed.latest(&container.name).is_some_and(succeeded))
        })
        .collect();
    let initialized =
        containers::spec(pod).containers.iter().any(|container| input.observed.latest(&container.name).is_some());
    if wanted.is_empty() && initialized {
        return Plan { steps, ..Plan::default() };
    }
    // A new sandbox initializes anew: dead init containers must not count as done.
    for container in containers::init_containers(pod) {
        steps.extend(input.observed.of(&container.name).map(|found| Step::Remove { id: found.id.clone() }));
    }
    steps.push(Step::CreateSandbox { attempt });
    Plan { steps, ..Plan::default() }
}

fn succeeded(status: &ContainerStatus) -> bool {
    status.state == ContainerState::Exited && status.exit_code == 0
}

enum Progress {
    Failed,
    Initializing,
    Initialized,
}

struct Draft<'a> {
    input: &'a Input<'a>,
    kills: Vec<Step>,
    resizes: Vec<(String, String)>,
    starts: Vec<(Container, ContainerKind)>,
}

impl Draft<'_> {
    fn start(&mut self, container: &Container, kind: ContainerKind) {
        if self.starts.iter().all(|(other, _)| other.name != container.name) {
            self.starts.push((container.clone(), kind));
        }
    }

    fn kill(&mut self, status: &ContainerStatus, message: String, cause: KillCause) {
        self.kills.push(Step::Kill { id: status.id.clone(), name: status.metadata.name.clone(), message, cause });
    }

    /// Walks the init containers from the last one: what completed earlier may have been removed since.
    fn init_containers(&mut self) -> Progress {
        let pod = self.input.pod;
        let init = containers::init_containers(pod);
        if init.is_empty() {
            return Progress::Initialized;
        }
        let mut initialized = containers::spec(pod).containers.iter().any(|container| {
            self.input
                .observed
                .latest(&container.name)
                .is_some_and(|status| matches!(status.state, ContainerState::Created | ContainerState::Running))
        });
        let mut previously = initialized;
        let mut starts: Vec<usize> = Vec::new();
        for (index, container) in init.iter().enumerate().rev() {
            let sidecar = containers::is_sidecar(container);
            let Some(status) = self.input.observed.latest(&container.name) else {
                if previously && sidecar {
                    starts.push(index);
                }
                continue;
            };
            if previously && !sidecar {
                continue;
            }
            let is_last = index == init.len() - 1;
            let mut done = |starts: &mut Vec<usize>| {
                if is_last {
                    initialized = true;
                } else if !previously {
                    starts.push(index + 1);
                }
            };
            match status.state {
                ContainerState::Created => starts.push(index),
                ContainerState::Running if sidecar => {
                    match self.startup(container, status) {
                        Startup::Done => done(&mut starts),
                        Startup::Waiting => {}
                        Startup::Failed => {
                            let message = format!("Init container {} failed startup probe", container.name);
                            self.kill(status, message, KillCause::Probe(ProbeKind::Startup));
                            starts.push(index);
                        }
                    }
                    if self.startup(container, status) == Startup::Done {
                        match self.kill_reason(container, status, "Init container") {
                            Some((message, cause)) => {
                                self.kill(status, message, cause);
                                starts.push(index);
                            }
                            None => self.resize(container, status),
                        }
                    }
                }
                ContainerState::Running => {}
                ContainerState::Exited if sidecar => starts.push(index),
                ContainerState::Exited if status.exit_code == 0 => done(&mut starts),
                ContainerState::Exited => {
                    if !containers::restarts_after_exit(pod, ContainerKind::Init, container, status.exit_code) {
                        self.starts.clear();
                        return Progress::Failed;
                    }
                    starts.push(index);
                }
                ContainerState::Unknown => {
                    if !sidecar && !containers::restarts_after_kill(pod, container) {
                        self.starts.clear();
                        return Progress::Failed;
                    }
                    let message = "Init container is in \"unknown\" state, try killing it before restart".to_owned();
                    self.kill(status, message, KillCause::Other);
                    starts.push(index);
                }
            }
            previously = true;
        }
        if !previously {
            starts.push(0);
        }
        for index in starts.into_iter().rev() {
            let container = &init[index];
            let kind = if containers::is_sidecar(container) { ContainerKind::Sidecar } else { ContainerKind::Init };
            self.start(container, kind);
        }
        if initialized { Progress::Initialized } else { Progress::Initializing }
    }

    /// True when nothing is left to keep or start: the pod is done.
    fn regular_containers(&mut self) -> bool {
        let pod = self.input.pod;
        let mut kept = 0;
        let mut wanted = 0;
        for container in &containers::spec(pod).containers {
            let status = self.input.observed.latest(&container.name);
            match status {
                Some(status) if status.state == ContainerState::Running => {
                    let Some((message, cause)) = self.kill_reason(container, status, "Container") else {
                        self.resize(container, status);
                        kept += 1;
                        continue;
                    };
                    let changed = cause == KillCause::Other;
                    if changed || containers::restarts_after_kill(pod, container) {
                        self.kill(status, format!("{message}, will be restarted"), cause);
                        self.start(container, ContainerKind::Regular);
                        wanted += 1;
                    } else {
                        self.kill(status, message, cause);
                    }
                }
                Some(status) if status.state == ContainerState::Exited => {
                    if containers::restarts_after_exit(pod, ContainerKind::Regular, container, status.exit_code) {
                        self.start(container, ContainerKind::Regular);
                        wanted += 1;
                    }
                }
                Some(status) => {
                    if status.state == ContainerState::Unknown {
                        let message = "Container is in \"unknown\" state, try killing it before restart".to_owned();
                        self.kill(status, message, KillCause::Other);
                    }
                    self.start(container, ContainerKind::Regular);
                    wanted += 1;
                }
                None => {
                    self.start(container, ContainerKind::Regular);
                    wanted += 1;
                }
            }
        }
        kept == 0 && wanted == 0 && self.kills.is_empty()
    }

    /// A running container whose limits are not those of the specification any more.
    fn resize(&mut self, container: &Container, status: &ContainerStatus) {
        if resized(self.input.pod, container, status) != Resized::default() {
            self.resizes.push((status.id.clone(), container.name.clone()));
        }
    }

    fn startup(&self, container: &Container, status: &ContainerStatus) -> Startup {
        if container.startup_probe.is_none() {
            return Startup::Done;
        }
        match self.input.probes.get(&status.id, ProbeKind::Startup) {
            Some(true) => Startup::Done,
            Some(false) => Startup::Failed,
            None => Startup::Waiting,
        }
    }

    /// Why a running container must go.
    fn kill_reason(&self, container: &Container, status: &ContainerStatus, what: &str) -> Option<(String, KillCause)> {
        let name = &container.name;
        let recorded = status.annotations.get(super::labels::HASH);
        if recorded.is_some_and(|recorded| *recorded != containers::hash(container)) {
            return Some((format!("{what} {name} definition changed"), KillCause::Other));
        }
        let resized = resized(self.input.pod, container, status);
        let policy = |resource: &str| {
            let policies = container.resize_policy.iter().flatten();
            policies.filter(|policy| policy.resource_name == resource).any(|it| it.restart_policy == "RestartContainer")
        };
        if (resized.cpu && policy("cpu")) || (resized.memory && policy("memory")) {
            return Some((format!("{what} {name} resize requires restart"), KillCause::Other));
        }
        for (kind, word) in [(ProbeKind::Liveness, "liveness"), (ProbeKind::Startup, "startup")] {
            if self.input.probes.get(&status.id, kind) == Some(false) {
                return Some((format!("{what} {name} failed {word} probe"), KillCause::Probe(kind)));
            }
        }
        None
    }

    /// Holds back what is in its restart delay; old dead containers go before a new one comes.
    fn finish(self) -> Plan {
        let mut plan = Plan { steps: self.kills, ..Plan::default() };
        if !self.resizes.is_empty() {
            plan.steps.push(Step::Resize { containers: self.resizes });
        }
        let mut blocked = false;
        for (container, kind) in self.starts {
            if self.input.held.contains(&container.name) {
                blocked |= kind == ContainerKind::Init;
                continue;
            }
            let dead = self.input.observed.of(&container.name).find(|status| status.state == ContainerState::Exited);
            let since = dead.and_then(|status| status.finished_at.or(Some(status.created_at)));
            let waiting = since.and_then(|since| self.input.backoffs.waiting(&container.name, since, self.input.now));
            if let Some(waiting) = waiting {
                plan.wake = Some(plan.wake.map_or(waiting.left, |wake| wake.min(waiting.left)));
                plan.waiting.insert(
                    container.name.clone(),
                    WaitReason {
                        reason: "CrashLoopBackOff".to_owned(),
                        message: format!(
                            "back-off {} restarting failed container={} pod={}",
                            go_duration(waiting.delay),
                            container.name,
                            containers::describe(self.input.pod)
                        ),
                    },
                );
                // Init containers run in order; regular ones don't wait for each other.
                blocked |= kind == ContainerKind::Init;
                continue;
            }
            if blocked && matches!(kind, ContainerKind::Init | ContainerKind::Sidecar) {
                continue;
            }
            let superseded = self.input.observed.of(&container.name).skip(1);
            plan.steps.extend(superseded.map(|status| Step::Remove { id: status.id.clone() }));
            plan.steps.push(Step::Start { name: container.name.clone(), kind });
        }
        plan
    }
}

/// What of a running container's limits has changed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Resized {
    cpu: bool,
    memory: bool,
}

fn resized(pod: &Pod, container: &Container, status: &ContainerStatus) -> Resized {
    let wanted = qos::container_resources(pod, container, 0);
    let actual = &status.resources;
    // A runtime that does not say what it limits is left alone.
    let differs = |wanted: Option<i64>, actual: Option<i64>| actual.is_some_and(|actual| Some(actual) != wanted);
    let shares = actual.cpu_shares.is_some_and(|actual| Some(actual) != wanted.cpu_shares);
    Resized {
        cpu: shares || differs(wanted.cpu_quota, actual.cpu_quota),
        memory: differs(wanted.memory_limit_in_bytes, actual.memory_limit_in_bytes),
    }
}

#[derive(PartialEq, Eq)]
enum Startup {
    Done,
    Waiting,
    Failed,
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(in crate::kubelet) mod tests;
