//! A pod of a Job, as the plan asks it.

use k8s_openapi::api::core::v1::Pod;

use super::super::object::PodFacts;
use super::{INDEX, INDEX_FAILURES, TRACKING};

/// A pod of a Job.
pub struct JobPod {
    /// The decoded pod.
    pub pod: Pod,
    /// What the cache knows of its readiness.
    pub facts: PodFacts,
}

impl JobPod {
    pub(super) fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    pub(super) fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    pub(super) fn phase(&self) -> &str {
        self.pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
    }

    pub(super) fn is_deleting(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    pub(super) fn is_active(&self) -> bool {
        !matches!(self.phase(), "Succeeded" | "Failed") && !self.is_deleting()
    }

    pub(super) fn is_tracked(&self) -> bool {
        self.pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == TRACKING)
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
    }

    pub(super) fn index(&self) -> Option<i32> {
        self.annotation(INDEX)?.parse().ok().filter(|index| *index >= 0)
    }

    pub(super) fn failures_before(&self) -> i32 {
        self.annotation(INDEX_FAILURES).and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    pub(super) fn has_failed(&self, only_failed: bool) -> bool {
        self.phase() == "Failed" || (!only_failed && self.is_deleting() && self.phase() != "Succeeded")
    }

    pub(super) fn restarts(&self) -> i32 {
        let status = self.pod.status.as_ref();
        let init = status.and_then(|status| status.init_container_statuses.as_ref()).into_iter().flatten();
        let main = status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
        init.chain(main).map(|container| container.restart_count).sum()
    }

    /// When its last container ended.
    pub(super) fn ended(&self) -> i64 {
        let status = self.pod.status.as_ref();
        let containers = status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
        let ends = containers.filter_map(|container| {
            let terminated = container.state.as_ref()?.terminated.as_ref()?;
            terminated.finished_at.as_ref().map(|time| time.0.as_second())
        });
        ends.max().or(Some(self.facts.ready_since).filter(|since| *since > 0)).unwrap_or(0)
    }
}
