//! Starts what a stage asks for. One action at a time.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use tokio_util::sync::CancellationToken;

use super::{Done, Stage, Worker};
use crate::kubelet::events::EventType;
use crate::kubelet::plan::{self, Step};
use crate::kubelet::steps::{Ended, Run, Tools};
use crate::kubelet::stop::{self, StopRequest};
use crate::kubelet::{containers, report};
use crate::runtime::ContainerState;
use crate::volume::pod_volumes;

/// How long a status is held back while a container is replaced because its definition changed. Upstream looks at
/// containers once a second, so such a pod seldom shows that it was not ready in between, and its Services keep it.
const REPLACEMENT_DELAY: Duration = Duration::from_secs(1);

impl Worker {
    pub(super) fn plan(&mut self) {
        let now = SystemTime::now();
        let instant = Instant::now();
        self.not_before.retain(|_, at| *at > instant);
        let held: BTreeSet<String> = self.not_before.keys().cloned().collect();
        let input = plan::Input {
            pod: &self.pod,
            observed: &self.observed,
            probes: &self.probes.results,
            backoffs: &self.backoffs,
            held: &held,
            now,
        };
        let plan = plan::plan(&input);
        for name in plan.waiting.keys().filter(|name| !self.held_back.contains_key(*name)) {
            let message =
                format!("Back-off restarting failed container {name} in pod {}", containers::describe(&self.pod));
            self.context.recorder.container(&self.pod, name, EventType::Warning, "BackOff", message);
        }
        self.held_back = plan.waiting;
        self.plan_at = plan.wake.map(|wake| instant + wake);
        if plan.steps.is_empty() {
            self.refresh_volumes();
            return;
        }
        for step in &plan.steps {
            if let Step::Start { name, .. } = step
                && let Some(dead) = self.observed.of(name).find(|found| found.state == ContainerState::Exited)
            {
                self.backoffs.escalate(name, dead.finished_at.unwrap_or(dead.created_at), now);
            }
        }
        if plan::replaces(&plan.steps) {
            self.report_at.get_or_insert(instant + REPLACEMENT_DELAY);
        }
        let Some(mut tools) = self.tools.take() else { return };
        let cancel = CancellationToken::new();
        let run = Run {
            context: self.context.clone(),
            pod: self.pod.clone(),
            observed: self.observed.clone(),
            progress: self.progress.0.clone(),
            cancel: cancel.clone(),
        };
        let task = tokio::spawn(async move {
            let ended = run.steps(plan.steps, &mut tools).await;
            (tools, ended)
        });
        let action = async move {
            match task.await {
                Ok((tools, ended)) => Done::Steps(tools, ended),
                Err(error) => {
                    tracing::error!(%error, "pod steps died");
                    Done::Steps(Tools::default(), Ended::Failed)
                }
            }
        };
        self.action = Some((Box::pin(action), cancel));
    }

    /// Files of ConfigMaps, Secrets, labels and tokens follow their sources.
    pub(super) fn refresh_volumes(&mut self) {
        let due = |tools: &Tools| tools.volumes.renew_at().is_some_and(|at| at <= SystemTime::now());
        let wanted = self.stale_volumes || self.tools.as_ref().is_some_and(due);
        if !wanted {
            return;
        }
        let Some(mut tools) = self.tools.take() else { return };
        self.stale_volumes = false;
        let (context, pod, ips) = (self.context.clone(), self.pod.clone(), self.observed.ips().to_vec());
        let task = tokio::spawn(async move {
            let failures = tools.volumes.refresh(&context.volumes, &pod, &ips).await;
            for (volume, error) in &failures {
                let message = format!("MountVolume.SetUp failed for volume {volume:?} : {error}");
                context.recorder.pod(&pod, EventType::Warning, "FailedMount", message);
            }
            (tools, if failures.is_empty() { Ended::Complete } else { Ended::Failed })
        });
        let action = async move {
            match task.await {
                Ok((tools, ended)) => Done::Steps(tools, ended),
                Err(_) => Done::Steps(Tools::default(), Ended::Failed),
            }
        };
        self.action = Some((Box::pin(action), CancellationToken::new()));
    }

    pub(super) fn stop(&mut self) {
        let busy = self.observed.running().next().is_some() || self.observed.ready_sandbox().is_some();
        if !busy {
            self.stage = Stage::Stopped;
            self.compute();
            self.settle();
            return;
        }
        self.stop_grace = stop::grace(&self.pod);
        let (context, pod, observed, grace) =
            (self.context.clone(), self.pod.clone(), self.observed.clone(), self.stop_grace);
        let cancel = CancellationToken::new();
        let cancelled = cancel.clone();
        let task = tokio::spawn(async move {
            let request = StopRequest { context: &context, pod: &pod, observed: &observed, grace };
            tokio::select! {
                result = stop::pod(request) => result,
                () = cancelled.cancelled() => Ok(()),
            }
        });
        let action = async move { Done::Stopped(task.await.unwrap_or(Ok(()))) };
        self.action = Some((Box::pin(action), cancel));
    }

    /// Nothing runs: volumes go, then the pod may go from the API.
    pub(super) fn settle(&mut self) {
        if !self.torn_down {
            let host = &self.context.volumes;
            let (pods, memory, uid) =
                (host.pods_dir.clone(), host.memory_dir.clone(), containers::uid(&self.pod).to_owned());
            self.context.watches.forget(&uid);
            let task = tokio::task::spawn_blocking(move || {
                pod_volumes::tear_down(&pods, &memory, &uid)
                    .inspect_err(|error| tracing::warn!(%error, uid, "volumes not torn down"))
                    .is_ok()
            });
            let action = async move { Done::TornDown(task.await.unwrap_or(false)) };
            self.action = Some((Box::pin(action), CancellationToken::new()));
            return;
        }
        let wanted = self.pod.metadata.deletion_timestamp.is_some() && !self.removed && !self.deleted;
        let settled =
            self.report.is_none() && !report::differs(containers::uid(&self.pod), &self.reported, &self.status);
        if wanted && settled && self.delete.is_none() {
            let (api, pod) = (self.context.api.clone(), self.pod.clone());
            self.delete = Some(Box::pin(async move {
                let path =
                    format!("/api/v1/namespaces/{}/pods/{}", containers::namespace(&pod), containers::name(&pod));
                api.delete_now(&path, containers::uid(&pod)).await
            }));
        }
    }
}
