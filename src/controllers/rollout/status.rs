//! A Deployment's status: what its ReplicaSets add up to, and whether the rollout makes progress.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::replica_set::{SetStatus, name, status_of};
use super::{Change, NEW_AVAILABLE, PROGRESSING, Rollout, TIMED_OUT};

impl Rollout<'_> {
    pub(super) fn finish_status(&mut self, estimate_progress: bool) {
        let stored = self.deployment.status.clone().unwrap_or_default();
        self.count();
        if estimate_progress {
            self.progress(&stored);
        }
        if self.status != stored {
            self.plan.changes.push(Change::Status(Box::new(self.status.clone())));
        }
        if estimate_progress {
            self.plan.after = self.next_check();
        }
    }

    pub(super) fn count(&mut self) {
        let sum = |field: fn(&SetStatus) -> i32| self.all().map(|set| field(&status_of(set))).sum::<i32>();
        let (total, available) = (sum(|status| status.replicas), sum(|status| status.available));
        let (ready, terminating) = (sum(|status| status.ready), sum(|status| status.terminating));
        let updated = self.current.as_ref().map_or(0, |set| status_of(set).replicas);
        let unavailable = (self.total() - available).max(0);
        let some = |count: i32| (count != 0).then_some(count);
        self.status.observed_generation = self.deployment.metadata.generation;
        self.status.replicas = some(total);
        self.status.updated_replicas = some(updated);
        self.status.ready_replicas = some(ready);
        self.status.available_replicas = some(available);
        self.status.unavailable_replicas = some(unavailable);
        self.status.terminating_replicas = Some(terminating);
        if available >= self.wanted() - self.max_unavailable() {
            let message = "Deployment has minimum availability.".to_owned();
            self.set_condition("Available", "True", "MinimumReplicasAvailable", message);
        } else {
            let message = "Deployment does not have minimum availability.".to_owned();
            self.set_condition("Available", "False", "MinimumReplicasUnavailable", message);
        }
    }

    pub(super) fn progress(&mut self, stored: &DeploymentStatus) {
        if !self.has_deadline() {
            self.remove_condition(PROGRESSING);
        }
        let reason = find(stored, PROGRESSING).and_then(|condition| condition.reason.clone());
        let settled = self.status.replicas == self.status.updated_replicas && reason.as_deref() == Some(NEW_AVAILABLE);
        if self.has_deadline() && !settled {
            let what = match &self.current {
                Some(set) => format!("ReplicaSet \"{}\"", name(&set.metadata)),
                None => format!("Deployment \"{}\"", name(&self.deployment.metadata)),
            };
            if complete(self.deployment, &self.status) {
                self.set_condition(PROGRESSING, "True", NEW_AVAILABLE, format!("{what} has successfully progressed."));
            } else if progressed(stored, &self.status) {
                let previous = find(&self.status, PROGRESSING).filter(|condition| condition.status == "True");
                let since = previous.and_then(|condition| condition.last_transition_time.clone());
                self.remove_condition(PROGRESSING);
                self.set_condition(PROGRESSING, "True", "ReplicaSetUpdated", format!("{what} is progressing."));
                if let (Some(since), Some(condition)) = (since, self.condition_mut(PROGRESSING)) {
                    condition.last_transition_time = Some(since);
                }
            } else if self.timed_out() {
                self.set_condition(PROGRESSING, "False", TIMED_OUT, format!("{what} has timed out progressing."));
            }
        }
        match self.failure() {
            Some(failure) => set_condition(&mut self.status, failure),
            None => self.remove_condition("ReplicaFailure"),
        }
    }

    pub(super) fn failure(&self) -> Option<DeploymentCondition> {
        let condition = self.current.iter().chain(&self.old).find_map(|set| {
            let conditions = set.status.as_ref()?.conditions.as_ref()?;
            conditions.iter().find(|condition| condition.type_ == "ReplicaFailure")
        })?;
        Some(DeploymentCondition {
            type_: condition.type_.clone(),
            status: condition.status.clone(),
            reason: condition.reason.clone(),
            message: condition.message.clone(),
            last_transition_time: condition.last_transition_time.clone(),
            last_update_time: condition.last_transition_time.clone(),
        })
    }

    pub(super) fn timed_out(&self) -> bool {
        let Some(condition) = self.condition(PROGRESSING) else { return false };
        match condition.reason.as_deref() {
            Some(NEW_AVAILABLE) => false,
            Some(TIMED_OUT) => true,
            _ => self.deadline().is_some_and(|deadline| deadline < self.now),
        }
    }

    /// When progress is overdue, by the condition in the status.
    pub(super) fn deadline(&self) -> Option<Timestamp> {
        let seconds = self.spec.progress_deadline_seconds?;
        let updated = self.condition(PROGRESSING)?.last_update_time.as_ref()?.0;
        Some(updated + jiff::SignedDuration::from_secs(i64::from(seconds)))
    }

    pub(super) fn next_check(&self) -> Option<Duration> {
        if !self.has_deadline() || complete(self.deployment, &self.status) {
            return None;
        }
        let reason = self.condition(PROGRESSING)?.reason.as_deref();
        if reason == Some(TIMED_OUT) || reason == Some(NEW_AVAILABLE) {
            return None;
        }
        let left = self.deadline()?.as_second() - self.now.as_second();
        Some(Duration::from_secs(u64::try_from(left).unwrap_or(0) + 1))
    }

    pub(super) fn note_pause(&mut self) {
        if !self.has_deadline() {
            return;
        }
        let reason = self.condition(PROGRESSING).and_then(|condition| condition.reason.clone());
        if reason.as_deref() == Some(TIMED_OUT) {
            return;
        }
        let noted = reason.as_deref() == Some("DeploymentPaused");
        match (self.spec.paused == Some(true), noted) {
            (true, false) => {
                self.set_condition(PROGRESSING, "Unknown", "DeploymentPaused", "Deployment is paused".to_owned());
            }
            (false, true) => {
                self.set_condition(PROGRESSING, "Unknown", "DeploymentResumed", "Deployment is resumed".to_owned());
            }
            _ => {}
        }
    }

    pub(super) fn has_deadline(&self) -> bool {
        self.spec.progress_deadline_seconds.is_some_and(|seconds| seconds != i32::MAX)
    }

    pub(super) fn condition(&self, kind: &str) -> Option<&DeploymentCondition> {
        find(&self.status, kind)
    }

    pub(super) fn condition_mut(&mut self, kind: &str) -> Option<&mut DeploymentCondition> {
        self.status.conditions.as_mut()?.iter_mut().find(|condition| condition.type_ == kind)
    }

    pub(super) fn set_condition(&mut self, kind: &str, status: &str, reason: &str, message: String) {
        set_condition(&mut self.status, new_condition(kind, status, reason, message, self.now));
    }

    pub(super) fn remove_condition(&mut self, kind: &str) {
        if let Some(conditions) = self.status.conditions.as_mut() {
            conditions.retain(|condition| condition.type_ != kind);
        }
    }
}

/// A condition that begins now.
pub fn new_condition(kind: &str, status: &str, reason: &str, message: String, now: Timestamp) -> DeploymentCondition {
    DeploymentCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    }
}

/// Puts a condition in, unless one of its type with the same status and reason is there.
pub fn set_condition(status: &mut DeploymentStatus, mut condition: DeploymentCondition) {
    let conditions = status.conditions.get_or_insert_default();
    if let Some(index) = conditions.iter().position(|present| present.type_ == condition.type_) {
        let present = &conditions[index];
        if present.status == condition.status && present.reason == condition.reason {
            return;
        }
        if present.status == condition.status {
            condition.last_transition_time = present.last_transition_time.clone();
        }
        conditions.remove(index);
    }
    conditions.push(condition);
}

pub(super) fn find<'a>(status: &'a DeploymentStatus, kind: &str) -> Option<&'a DeploymentCondition> {
    status.conditions.as_ref()?.iter().find(|condition| condition.type_ == kind)
}

pub(super) fn complete(deployment: &Deployment, status: &DeploymentStatus) -> bool {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
        && status.observed_generation >= deployment.metadata.generation
}

pub(super) fn progressed(before: &DeploymentStatus, now: &DeploymentStatus) -> bool {
    let old = |status: &DeploymentStatus| status.replicas.unwrap_or(0) - status.updated_replicas.unwrap_or(0);
    now.updated_replicas.unwrap_or(0) > before.updated_replicas.unwrap_or(0)
        || old(now) < old(before)
        || now.ready_replicas.unwrap_or(0) > before.ready_replicas.unwrap_or(0)
        || now.available_replicas.unwrap_or(0) > before.available_replicas.unwrap_or(0)
}
