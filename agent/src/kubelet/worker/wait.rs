//! Sleeps until something happens to a pod, and notes it.

use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;

use super::{Done, Stage, Worker, version};
use crate::kubelet::containers;
use crate::kubelet::steps::{Ended, Progress};

impl Worker {
    /// Waits for something to happen and notes it.
    pub(super) async fn next(&mut self) {
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

    pub(super) fn wake_at(&self) -> Option<Instant> {
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

    pub(super) fn take_mail(&mut self) {
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

    pub(super) fn note(&mut self, progress: Progress) {
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

    pub(super) fn note_done(&mut self, done: Done) {
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
