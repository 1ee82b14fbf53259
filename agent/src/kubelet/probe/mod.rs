//! Probes: one task per running container and question; only changes of the verdict reach the pod's worker.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`check`] | one attempt over HTTP, TCP, gRPC or by a command |
//! | [`grpc`] | the gRPC health protocol, as much of it as one question needs |

pub mod check;
pub mod grpc;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::config;
use super::containers::{self, ContainerKind};
use super::context::Context;
use super::events::EventType;
use super::observed::{Observed, ProbeKind, ProbeResults};
use check::Outcome;

/// A verdict has changed.
#[derive(Debug)]
pub struct Verdict {
    /// Container id.
    pub id: String,
    /// The question.
    pub kind: ProbeKind,
    /// The answer.
    pub success: bool,
}

/// The running probes of one pod.
pub struct Probes {
    context: Arc<Context>,
    tasks: HashMap<(String, ProbeKind), DropGuard>,
    verdicts: mpsc::UnboundedSender<Verdict>,
    /// What they said last.
    pub results: ProbeResults,
}

impl Probes {
    /// None yet; changes arrive at the receiver.
    pub fn new(context: Arc<Context>) -> (Self, mpsc::UnboundedReceiver<Verdict>) {
        let (verdicts, receiver) = mpsc::unbounded_channel();
        (Self { context, tasks: HashMap::new(), verdicts, results: ProbeResults::default() }, receiver)
    }

    /// Starts the probes that should run and ends the others. `stopping` pods keep only their readiness probes.
    pub fn sync(&mut self, pod: &Arc<Pod>, observed: &Observed, stopping: bool) {
        let mut wanted = HashMap::new();
        for found in containers::containers(pod) {
            if !matches!(found.kind, ContainerKind::Sidecar | ContainerKind::Regular) {
                continue;
            }
            let Some(status) = observed.latest(&found.container.name) else { continue };
            if status.state != crate::runtime::ContainerState::Running {
                continue;
            }
            for kind in self.questions(&found.container, &status.id, stopping) {
                wanted.insert((status.id.clone(), kind), (found.container.clone().into_owned(), status.started_at));
            }
        }
        self.tasks.retain(|key, _| wanted.contains_key(key));
        self.results.retain(|id| observed.by_id(id).is_some());
        for (key, (container, started_at)) in wanted {
            if self.tasks.contains_key(&key) {
                continue;
            }
            let stop = CancellationToken::new();
            let task = Task {
                context: self.context.clone(),
                pod: pod.clone(),
                container,
                id: key.0.clone(),
                kind: key.1,
                ip: self.address(pod, observed),
                started_at,
                verdicts: self.verdicts.clone(),
            };
            tokio::spawn(task.run(stop.clone()));
            self.tasks.insert(key, stop.drop_guard());
        }
    }

    /// Startup first and alone, then the others.
    fn questions(&self, container: &Container, id: &str, stopping: bool) -> Vec<ProbeKind> {
        let started = self.results.get(id, ProbeKind::Startup);
        if container.startup_probe.is_some() && started != Some(true) {
            return if stopping || started == Some(false) { Vec::new() } else { vec![ProbeKind::Startup] };
        }
        let failed = self.results.get(id, ProbeKind::Liveness) == Some(false);
        let liveness = container.liveness_probe.is_some() && !stopping && !failed;
        let all = [(ProbeKind::Liveness, liveness), (ProbeKind::Readiness, container.readiness_probe.is_some())];
        all.into_iter().filter_map(|(kind, on)| on.then_some(kind)).collect()
    }

    fn address(&self, pod: &Pod, observed: &Observed) -> Option<IpAddr> {
        let host = self.context.host_ips();
        config::pod_ips(pod, observed.ips(), &host).first().copied()
    }
}

struct Task {
    context: Arc<Context>,
    pod: Arc<Pod>,
    container: Container,
    id: String,
    kind: ProbeKind,
    ip: Option<IpAddr>,
    started_at: Option<SystemTime>,
    verdicts: mpsc::UnboundedSender<Verdict>,
}

impl Task {
    fn spec(&self) -> Probe {
        let probe = match self.kind {
            ProbeKind::Liveness => &self.container.liveness_probe,
            ProbeKind::Readiness => &self.container.readiness_probe,
            ProbeKind::Startup => &self.container.startup_probe,
        };
        probe.clone().unwrap_or_default()
    }

    async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = self.probe_on() => {}
            () = stop.cancelled() => {}
        }
    }

    async fn probe_on(&self) {
        let spec = self.spec();
        let seconds =
            |value: Option<i32>, otherwise: u64| value.and_then(|value| u64::try_from(value).ok()).unwrap_or(otherwise);
        let delay = Duration::from_secs(seconds(spec.initial_delay_seconds, 0));
        let age = self.started_at.and_then(|at| at.elapsed().ok()).unwrap_or_default();
        tokio::time::sleep(delay.saturating_sub(age)).await;
        let period = Duration::from_secs(seconds(spec.period_seconds, 10).max(1));
        let timeout = Duration::from_secs(seconds(spec.timeout_seconds, 1).max(1));
        let mut counter = Counter::new(spec.success_threshold.unwrap_or(1), spec.failure_threshold.unwrap_or(3));
        let mut ticks = tokio::time::interval(period);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reported = None;
        loop {
            ticks.tick().await;
            let success = self.once(&spec, timeout).await;
            let Some(verdict) = counter.count(success) else { continue };
            if reported.replace(verdict) != Some(verdict) {
                let verdict = Verdict { id: self.id.clone(), kind: self.kind, success: verdict };
                if self.verdicts.send(verdict).is_err() {
                    return;
                }
            }
        }
    }

    async fn once(&self, spec: &Probe, timeout: Duration) -> bool {
        let target = check::Target {
            runtime: self.context.runtime.as_ref(),
            container: &self.container,
            id: &self.id,
            ip: self.ip,
        };
        let title = self.kind.title();
        let (reason, message) = match check::check(spec, &target, timeout).await {
            Outcome::Success => return true,
            Outcome::Warning(text) => {
                let message = format!("{title} probe warning: {text}");
                let recorder = &self.context.recorder;
                recorder.container(&self.pod, &self.container.name, EventType::Warning, "ProbeWarning", message);
                return true;
            }
            Outcome::Failure(text) => ("Unhealthy", format!("{title} probe failed: {text}")),
            Outcome::Error(text) => {
                ("Unhealthy", format!("{title} probe errored and resulted in unknown state: {text}"))
            }
        };
        let name = &self.container.name;
        self.context.recorder.container(&self.pod, name, EventType::Warning, reason, message);
        false
    }
}

/// Thresholds: a verdict changes after so many equal answers in a row.
struct Counter {
    success_threshold: i32,
    failure_threshold: i32,
    last: Option<bool>,
    run: i32,
}

impl Counter {
    fn new(success_threshold: i32, failure_threshold: i32) -> Self {
        Self { success_threshold, failure_threshold, last: None, run: 0 }
    }

    /// The verdict, when the threshold is reached.
    fn count(&mut self, success: bool) -> Option<bool> {
        self.run = if self.last == Some(success) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        (self.run >= threshold.max(1)).then_some(success)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_count_equal_answers_in_a_row() {
        let mut counter = Counter::new(2, 3);
        let answers = [true, true, false, false, true, false, false, false, false];
        let verdicts: Vec<_> = answers.into_iter().map(|answer| counter.count(answer)).collect();
        assert_eq!(verdicts, [None, Some(true), None, None, None, None, None, Some(false), Some(false)]);
    }
}
