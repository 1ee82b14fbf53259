//! The status of a pod: computed, shown to the node's HTTP service, written to the API, kept on disk.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use k8s_openapi::api::core::v1::Pod;

use super::{Published, Stage, Worker, version};
use crate::kubelet::api::ApiError;
use crate::kubelet::observed::api_time;
use crate::kubelet::{containers, files, mirror, report, status};
use crate::runtime::ContainerState;

/// How long a status waits that says nothing but that a later generation was seen.
const GENERATION_DELAY: Duration = Duration::from_millis(500);

impl Worker {
    pub(super) fn compute(&mut self) {
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
            now: api_time(SystemTime::now()),
        };
        self.status = status::status(&input);
    }

    /// Shows the status to the node's HTTP service and starts to write it to the API.
    pub(super) fn publish(&mut self) {
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
    pub(super) fn save_copy(&mut self) {
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

    pub(super) fn note_report(&mut self, result: Result<Option<Pod>, ApiError>) {
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

    pub(super) fn note_delete(&mut self, result: Result<(), ApiError>) {
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
}
