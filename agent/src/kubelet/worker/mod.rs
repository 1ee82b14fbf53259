//! One task owns one pod: it observes, plans, acts, reports, and sleeps until something happens.
//!
//! | stage | what it means | ends when |
//! | --- | --- | --- |
//! | `Running` | containers are kept as the plan says | the pod is deleted, removed, past its deadline or done |
//! | `Stopping` | containers are ended with their grace | nothing runs and the sandbox has stopped |
//! | `Stopped` | volumes are gone, the last status is written | the pod is gone from the API; then nothing is left |
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | here | the turn: observe, move to the next stage, clean up |
//! | [`act`] | starts what a stage asks for |
//! | [`publish`] | the status: computed, shown, written, kept |
//! | [`wait`] | sleeps until something happens, and notes it |

mod act;
mod publish;
mod wait;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use parking_lot::RwLock;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::api::ApiError;
use super::backoff::{Backoffs, Jitter};
use super::context::Context;
use super::events::EventType;
use super::observed::{Observed, WaitReasons};
use super::probe::{Probes, Verdict};
use super::steps::{Ended, Progress, Tools};
use super::{admission, containers, files, mirror, status, stop};
use crate::runtime::{ContainerFilter, PodSandboxFilter, RuntimeError};
use crate::volume::pod_volumes;

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

    /// The specification is new: write it down anew, follow what its volumes show.
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

    fn is_finished(&self) -> bool {
        self.stage == Stage::Stopped && self.torn_down && self.action.is_none() && self.removed
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
