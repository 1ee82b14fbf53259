//! One task owns one pod: it observes, plans, acts, reports, and sleeps until something happens.
//!
//! | stage | what it means | ends when |
//! | --- | --- | --- |
//! | `Running` | containers are kept as the plan says | the pod is deleted, removed, past its deadline or done |
//! | `Stopping` | containers are ended with their grace | nothing runs and the sandbox has stopped |
//! | `Stopped` | volumes are gone, the last status is written | the pod is gone from the API; then nothing is left |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::RwLock;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::api::ApiError;
use super::backoff::{Backoffs, Jitter};
use super::containers;
use super::context::Context;
use super::events::EventType;
use super::observed::{Observed, WaitReasons, api_time};
use super::plan::{self, Step};
use super::probe::{Probes, Verdict};
use super::status;
use super::steps::{Ended, Progress, Run, Tools};
use super::stop::{self, StopRequest};
use super::{admission, files, mirror, report};
use crate::runtime::{ContainerFilter, ContainerState, PodSandboxFilter, RuntimeError};
use crate::volume::pod_volumes;

/// How long a status waits that says nothing but that a later generation was seen.
const GENERATION_DELAY: Duration = Duration::from_millis(500);

/// What the pod should be now. Later ones replace earlier ones.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The pod.
    pub pod: Arc<Pod>,
    /// It is gone from its source: end it whatever it says.
    pub removed: bool,
}

/// What others may read of a pod.
#[derive(Debug, Clone)]
pub struct Published {
    /// The pod.
    pub pod: Arc<Pod>,
    /// The status computed last.
    pub status: Arc<PodStatus>,
}

/// Where a worker publishes.
pub type Board = Arc<RwLock<BTreeMap<String, Published>>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    Stopping,
    Stopped,
}

enum Done {
    Steps(Tools, Ended),
    Stopped(Result<(), RuntimeError>),
    TornDown(bool),
}

/// One pod's task.
pub struct Worker {
    context: Arc<Context>,
    board: Board,
    mailbox: watch::Receiver<Wanted>,
    /// The runtime has news about the pod.
    wake: Arc<Notify>,
    /// An object in a volume has changed.
    object_wake: Arc<Notify>,
    shutdown: CancellationToken,
    pod: Arc<Pod>,
    removed: bool,
    stage: Stage,
    observed: Observed,
    tools: Option<Tools>,
    probes: Probes,
    verdicts: mpsc::UnboundedReceiver<Verdict>,
    waiting: WaitReasons,
    held_back: WaitReasons,
    progress: (mpsc::UnboundedSender<Progress>, mpsc::UnboundedReceiver<Progress>),
    backoffs: Backoffs,
    failed: Option<(String, String)>,
    /// The status computed last.
    status: PodStatus,
    /// The status the API is known to have, and the version of the pod that showed it.
    reported: PodStatus,
    reported_version: u64,
    action: Option<(BoxFuture<'static, Done>, CancellationToken)>,
    stop_grace: u64,
    report: Option<BoxFuture<'static, Result<Option<Pod>, ApiError>>>,
    in_report: PodStatus,
    delete: Option<BoxFuture<'static, Result<(), ApiError>>>,
    deleted: bool,
    torn_down: bool,
    stale_volumes: bool,
    /// The phase in the durable copy; `None` when the copy is out of date.
    copied: Option<Option<String>>,
    retry: Jitter,
    report_retry: Jitter,
    /// The node failed: nothing is done before.
    act_at: Option<Instant>,
    /// A restart delay ends.
    plan_at: Option<Instant>,
    /// When containers that could not be started are tried again.
    not_before: BTreeMap<String, Instant>,
    report_at: Option<Instant>,
    /// When a status that is new only in its generation is written.
    minor_report_at: Option<Instant>,
}

fn version(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

impl Worker {
    /// A worker for the pod in the mailbox.
    pub fn new(
        context: Arc<Context>,
        board: Board,
        mut mailbox: watch::Receiver<Wanted>,
        wake: Arc<Notify>,
        shutdown: CancellationToken,
    ) -> Self {
        let wanted = mailbox.borrow_and_update().clone();
        let reported = wanted.pod.status.clone().unwrap_or_default();
        let (probes, verdicts) = Probes::new(context.clone());
        Self {
            board,
            mailbox,
            wake,
            object_wake: Arc::new(Notify::new()),
            shutdown,
            removed: wanted.removed,
            stage: Stage::Running,
            observed: Observed::default(),
            tools: Some(Tools::default()),
            probes,
            verdicts,
            waiting: WaitReasons::new(),
            held_back: WaitReasons::new(),
            progress: mpsc::unbounded_channel(),
            backoffs: Backoffs::default(),
            failed: None,
            status: reported.clone(),
            reported_version: version(&wanted.pod),
            reported,
            action: None,
            stop_grace: 0,
            report: None,
            in_report: PodStatus::default(),
            delete: None,
            deleted: false,
            torn_down: false,
            stale_volumes: false,
            copied: None,
            retry: Jitter::new(Duration::from_millis(500), Duration::from_secs(120)),
            report_retry: Jitter::new(Duration::from_millis(200), Duration::from_secs(30)),
            act_at: None,
            plan_at: None,
            not_before: BTreeMap::new(),
            report_at: None,
            minor_report_at: None,
            pod: wanted.pod,
            context,
        }
    }

    /// Runs until nothing of the pod is left, or until the agent stops (the pod then goes on without it).
    pub async fn run(mut self) {
        self.accept_pod();
        if self.stage == Stage::Running
            && let Some((reason, message)) = admission::refuse(&self.pod).or_else(|| self.claim_ports())
        {
            self.context.recorder.record_named(&self.pod, reason.clone(), message.clone());
            self.failed = Some((reason, format!("Pod was rejected: {message}")));
        }
        let shutdown = self.shutdown.clone();
        loop {
            self.observe().await;
            self.advance();
            self.publish();
            if self.is_finished() {
                self.clean().await;
                return;
            }
            tokio::select! {
                () = self.next() => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    /// The specification is new: write it down anew, follow what its volumes show.
    /// Shows the pod to the others at once, so that of two pods with one host port exactly one gets it; the other is told
    /// why not. One that runs already has its ports.
    fn claim_ports(&self) -> Option<(String, String)> {
        let phase = self.pod.status.as_ref().and_then(|status| status.phase.as_deref());
        let mut board = self.board.write();
        let live = |published: &&Published| !status::is_terminal(published.status.phase.as_deref());
        let others = board.values().filter(live).map(|published| &*published.pod);
        let conflict = if phase == Some("Running") { None } else { admission::conflict(&self.pod, others) };
        if conflict.is_none() {
            let published = Published { pod: self.pod.clone(), status: Arc::new(self.status.clone()) };
            board.insert(containers::uid(&self.pod).to_owned(), published);
        }
        conflict
    }

    fn accept_pod(&mut self) {
        if self.stage == Stage::Running && !self.removed {
            self.copied = None;
            let watched = pod_volumes::watched(&self.pod);
            self.context.watches.follow(containers::uid(&self.pod), &watched, &self.object_wake);
        }
    }

    async fn observe(&mut self) {
        let uid = containers::uid(&self.pod).to_owned();
        let sandboxes = PodSandboxFilter { pod_uid: Some(uid.clone()), ..PodSandboxFilter::default() };
        let selector = [(super::labels::POD_UID.to_owned(), uid)].into();
        let containers = ContainerFilter { label_selector: selector, ..ContainerFilter::default() };
        let sandboxes = self.context.runtime.list_pod_sandboxes(&sandboxes).await;
        let containers = self.context.runtime.list_containers(&containers).await;
        match (sandboxes, containers) {
            (Ok(sandboxes), Ok(mut containers)) => {
                files::fill_messages(&mut containers);
                self.observed = Observed::new(sandboxes, containers);
            }
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(%error, pod = containers::describe(&self.pod), "runtime does not answer");
                self.act_at = Some(Instant::now() + self.retry.delay());
            }
        }
    }

    /// Moves to the next stage and starts what it asks for. One action at a time.
    fn advance(&mut self) {
        self.check_deadline();
        let leave = self.removed || self.pod.metadata.deletion_timestamp.is_some() || self.failed.is_some();
        let over = leave || status::is_terminal(self.pod.status.as_ref().and_then(|status| status.phase.as_deref()));
        if self.stage == Stage::Running && (over || status::is_terminal(self.status.phase.as_deref())) {
            self.stage = Stage::Stopping;
            self.act_at = None;
            if let Some((_, cancel)) = &self.action {
                cancel.cancel();
            }
        }
        self.probes.sync(&self.pod, &self.observed, self.stage != Stage::Running);
        self.compute();
        // What ran to its end just now stops in the same turn.
        if self.stage == Stage::Running && status::is_terminal(self.status.phase.as_deref()) {
            self.stage = Stage::Stopping;
        }
        if let Some((_, cancel)) = &self.action {
            if self.stage == Stage::Stopping && stop::grace(&self.pod) < self.stop_grace {
                // A second deletion with less grace: stop anew with what is left.
                cancel.cancel();
            }
            return;
        }
        if self.act_at.is_some_and(|at| at > Instant::now()) {
            return;
        }
        self.act_at = None;
        match self.stage {
            Stage::Running => self.plan(),
            Stage::Stopping => self.stop(),
            Stage::Stopped => self.settle(),
        }
    }

    fn check_deadline(&mut self) {
        let spec = containers::spec(&self.pod);
        let (Some(seconds), Some(start)) = (spec.active_deadline_seconds, &self.status.start_time) else { return };
        if self.stage != Stage::Running || self.failed.is_some() {
            return;
        }
        let deadline = SystemTime::from(start.0) + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
        if let Ok(passed) = SystemTime::now().duration_since(deadline) {
            tracing::debug!(?passed, "pod past its deadline");
            let message = "Pod was active on the node longer than the specified deadline";
            self.context.recorder.pod(&self.pod, EventType::Normal, "DeadlineExceeded", message);
            self.failed = Some(("DeadlineExceeded".to_owned(), message.to_owned()));
        }
    }

    fn plan(&mut self) {
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
    fn refresh_volumes(&mut self) {
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

    fn stop(&mut self) {
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
    fn settle(&mut self) {
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

    fn compute(&mut self) {
        // Between create and start a container is neither what it was nor what it will be.
        let mut shown = self.observed.clone();
        if self.action.is_some() {
            shown.containers.retain(|container| container.state != ContainerState::Created);
        }
        let mut waiting = self.waiting.clone();
        waiting.extend(self.held_back.clone());
        let input = status::Input {
            pod: &self.pod,
            old: &self.status,
            observed: &shown,
            probes: &self.probes.results,
            waiting: &waiting,
            host_ips: &self.context.host_ips(),
            stopped: self.stage == Stage::Stopped,
            failed: self.failed.as_ref().map(|(reason, message)| (reason.as_str(), message.as_str())),
            now: now(),
        };
        self.status = status::status(&input);
    }

    /// Shows the status to the node's HTTP service and starts to write it to the API.
    fn publish(&mut self) {
        self.save_copy();
        let published = Published { pod: self.pod.clone(), status: Arc::new(self.status.clone()) };
        self.board.write().insert(containers::uid(&self.pod).to_owned(), published);
        let may_write = self.report.is_none() && !self.removed && !self.deleted;
        if !may_write || self.report_at.is_some_and(|at| at > Instant::now()) {
            return;
        }
        let due = self.report_at.take().is_some();
        let minor_due = self.minor_report_at.is_some_and(|at| at <= Instant::now());
        if !report::differs(containers::uid(&self.pod), &self.reported, &self.status) {
            self.minor_report_at = None;
            return;
        }
        // A writer of the specification would lose a race against each of these.
        if !due && !minor_due && report::is_only_newer(&self.reported, &self.status) {
            self.minor_report_at.get_or_insert_with(|| Instant::now() + GENERATION_DELAY);
            return;
        }
        self.minor_report_at = None;
        let (api, pod) = (self.context.api.clone(), self.pod.clone());
        let (old, new) = (self.reported.clone(), self.status.clone());
        self.in_report = new.clone();
        if containers::is_static(&pod) {
            let node = self.context.config.node_name.clone();
            let show = async move { mirror::show(&api, &node, &pod, &new).await.map(|()| None) };
            self.report = Some(Box::pin(show));
            return;
        }
        self.report = Some(Box::pin(async move { report::write(&api, &pod, &old, &new).await }));
    }

    /// Keeps what the next agent needs without an API server: the specification, when the pod began, how it ended.
    fn save_copy(&mut self) {
        let phase = self.status.phase.clone();
        if self.removed || self.copied == Some(phase.clone()) {
            return;
        }
        let pod = Pod { status: Some(self.status.clone()), ..(*self.pod).clone() };
        match files::save_durable(&self.context.volumes.pods_dir, &pod) {
            Ok(()) => self.copied = Some(phase),
            Err(error) => tracing::warn!(%error, pod = containers::describe(&pod), "durable copy not written"),
        }
    }

    fn is_finished(&self) -> bool {
        self.stage == Stage::Stopped && self.torn_down && self.action.is_none() && self.removed
    }

    /// Waits for something to happen and notes it.
    async fn next(&mut self) {
        let wake_at = self.wake_at();
        let action = self.action.as_mut().map(|(action, _)| action);
        tokio::select! {
            changed = self.mailbox.changed() => match changed {
                Ok(()) => self.take_mail(),
                // The manager is gone: the agent stops.
                Err(_) => self.shutdown.cancelled().await,
            },
            () = self.wake.notified() => {}
            () = self.object_wake.notified() => {
                self.stale_volumes = true;
                self.act_at = None;
            }
            Some(verdict) = self.verdicts.recv() => {
                self.probes.results.set(&verdict.id, verdict.kind, verdict.success);
                while let Ok(verdict) = self.verdicts.try_recv() {
                    self.probes.results.set(&verdict.id, verdict.kind, verdict.success);
                }
            }
            Some(progress) = self.progress.1.recv() => self.note(progress),
            done = poll_opt(action) => self.note_done(done),
            result = poll_opt(self.report.as_mut()) => self.note_report(result),
            result = poll_opt(self.delete.as_mut()) => self.note_delete(result),
            () = sleep_until(wake_at) => {}
        }
    }

    fn wake_at(&self) -> Option<Instant> {
        let renew = self.tools.as_ref().and_then(|tools| tools.volumes.renew_at());
        let renew = renew.filter(|_| self.stage == Stage::Running && self.action.is_none()).map(|at| {
            Instant::now() + at.duration_since(SystemTime::now()).unwrap_or_default().max(Duration::from_millis(1))
        });
        let seconds = containers::spec(&self.pod).active_deadline_seconds.filter(|_| self.stage == Stage::Running);
        let deadline = seconds.zip(self.status.start_time.as_ref()).map(|(seconds, start)| {
            let at = SystemTime::from(start.0) + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            Instant::now() + at.duration_since(SystemTime::now()).unwrap_or_default()
        });
        let act = self.act_at.filter(|_| self.action.is_none());
        let report = self.report_at.into_iter().chain(self.minor_report_at).min().filter(|_| self.report.is_none());
        let idle = self.action.is_none() && self.stage == Stage::Running;
        let plan = self.not_before.values().copied().chain(self.plan_at).min().filter(|_| idle);
        [renew, deadline, act, report, plan].into_iter().flatten().min()
    }

    fn take_mail(&mut self) {
        let wanted = self.mailbox.borrow_and_update().clone();
        self.removed |= wanted.removed;
        let changed = wanted.pod.metadata.generation != self.pod.metadata.generation
            || wanted.pod.metadata.labels != self.pod.metadata.labels
            || wanted.pod.metadata.annotations != self.pod.metadata.annotations;
        // An event from before our own last write says nothing new about the status.
        if version(&wanted.pod) >= self.reported_version {
            self.reported_version = version(&wanted.pod);
            if self.report.is_none() {
                self.reported = wanted.pod.status.clone().unwrap_or_default();
            }
        }
        self.pod = wanted.pod;
        if changed {
            self.stale_volumes = true;
            self.act_at = None;
            self.not_before.clear();
            self.accept_pod();
        }
    }

    fn note(&mut self, progress: Progress) {
        match progress {
            Progress::Started(name) => {
                self.waiting.remove(&name);
                self.not_before.remove(&name);
            }
            Progress::Failed(name, reason, delay) => {
                self.not_before.insert(name.clone(), Instant::now() + delay);
                self.waiting.insert(name, reason);
            }
        }
    }

    fn note_done(&mut self, done: Done) {
        self.action = None;
        match done {
            Done::Steps(tools, ended) => {
                self.tools = Some(tools);
                match ended {
                    Ended::Complete => self.retry.reset(),
                    Ended::Failed => self.act_at = Some(Instant::now() + self.retry.delay()),
                    Ended::Cancelled => {}
                }
                while let Ok(progress) = self.progress.1.try_recv() {
                    self.note(progress);
                }
            }
            Done::Stopped(Ok(())) => self.retry.reset(),
            Done::Stopped(Err(error)) => {
                tracing::warn!(%error, pod = containers::describe(&self.pod), "pod not stopped");
                self.act_at = Some(Instant::now() + self.retry.delay());
            }
            Done::TornDown(true) => self.torn_down = true,
            Done::TornDown(false) => self.act_at = Some(Instant::now() + self.retry.delay()),
        }
    }

    fn note_report(&mut self, result: Result<Option<Pod>, ApiError>) {
        self.report = None;
        match result {
            Ok(answer) => {
                self.report_retry.reset();
                self.reported = std::mem::take(&mut self.in_report);
                if let Some(pod) = answer {
                    self.reported_version = self.reported_version.max(version(&pod));
                    // What the API made of it: foreign conditions, dropped fields.
                    self.reported = pod.status.unwrap_or_default();
                }
            }
            Err(error) if (error.is_not_found() || error.is_conflict()) && !containers::is_static(&self.pod) => {
                // Gone, or another pod of this name: the watch will say so, too.
                self.deleted |= error.is_not_found();
                self.removed |= error.is_not_found();
                self.report_at = Some(Instant::now() + self.report_retry.delay());
            }
            Err(error) => {
                tracing::debug!(%error, pod = containers::describe(&self.pod), "status not written");
                self.report_at = Some(Instant::now() + self.report_retry.delay());
            }
        }
    }

    fn note_delete(&mut self, result: Result<(), ApiError>) {
        self.delete = None;
        match result {
            Ok(()) => self.deleted = true,
            Err(error) if error.is_not_found() || error.is_conflict() => self.deleted = true,
            Err(error) => {
                tracing::debug!(%error, pod = containers::describe(&self.pod), "pod not deleted");
                self.act_at = Some(Instant::now() + self.retry.delay());
            }
        }
    }

    /// The pod is gone: sandboxes, logs, folder.
    async fn clean(self) {
        let uid = containers::uid(&self.pod);
        let live: BTreeSet<&str> = self.observed.sandboxes.iter().map(|sandbox| sandbox.id.as_str()).collect();
        for id in live {
            if let Err(error) = self.context.runtime.remove_pod_sandbox(id).await
                && !error.is_not_found()
            {
                tracing::warn!(%error, sandbox = id, "sandbox not removed");
            }
        }
        let folders = [self.context.log_dir(&self.pod), self.context.pod_dir(&self.pod)];
        let removed = tokio::task::spawn_blocking(move || {
            for folder in folders {
                if let Err(error) = std::fs::remove_dir_all(&folder)
                    && error.kind() != std::io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, path = %folder.display(), "folder of a pod not removed");
                }
            }
        });
        let _ = removed.await;
        if containers::is_static(&self.pod)
            && let Err(error) = mirror::remove(&self.context.api, &self.pod).await
        {
            tracing::debug!(%error, pod = containers::describe(&self.pod), "mirror pod not removed");
        }
        self.board.write().remove(uid);
    }
}

fn now() -> Time {
    api_time(SystemTime::now())
}

async fn poll_opt<T>(future: Option<&mut BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
