//! Whether a Job ends, and how: policies, limits, deadlines, conditions.

use k8s_openapi::api::batch::v1::{JobCondition, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::super::event::EventType;
use super::{Indexes, JobPod, Work, condition};

impl Work<'_> {
    pub(super) fn ending(&mut self, suspended: bool) -> Option<(&'static str, &'static str, String)> {
        let status = &self.plan.status;
        let restored = |condition: &JobCondition| {
            let reason = condition.reason.as_deref().unwrap_or_default();
            let known = [
                "PodFailurePolicy",
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "MaxFailedIndexesExceeded",
                "FailedIndexes",
                "SuccessPolicy",
                "CompletionsReached",
            ];
            let reason = known.into_iter().find(|known| *known == reason).unwrap_or("BackoffLimitExceeded");
            (reason, condition.message.clone().unwrap_or_default())
        };
        if let Some((reason, message)) = condition(status, "SuccessCriteriaMet").map(restored) {
            return Some(("SuccessCriteriaMet", reason, message));
        }
        if let Some((reason, message)) = condition(status, "FailureTarget").map(restored) {
            return Some(("FailureTarget", reason, message));
        }
        let by_policy = self.pods.iter().filter(|pod| pod.has_failed(self.only_failed)).find_map(|pod| {
            self.matching_rule(pod).filter(|(_, rule, _)| rule.action == "FailJob").map(|(_, _, message)| message)
        });
        if let Some(message) = by_policy {
            return Some(("FailureTarget", "PodFailurePolicy", message));
        }
        let limit = self.spec.backoff_limit.unwrap_or(6);
        if self.failed_total() > limit || self.restarts_exceed(limit) {
            let message = "Job has reached the specified backoff limit".to_owned();
            return Some(("FailureTarget", "BackoffLimitExceeded", message));
        }
        if let (Some(seconds), Some(start), false) =
            (self.spec.active_deadline_seconds, &self.plan.status.start_time, suspended)
        {
            let left = start.0.as_second() + seconds - self.now.as_second();
            if left <= 0 {
                let message = "Job was active longer than specified deadline".to_owned();
                return Some(("FailureTarget", "DeadlineExceeded", message));
            }
            self.again(left);
        }
        if let Some(failed) = &self.failed {
            if self.spec.max_failed_indexes.is_some_and(|max| failed.len() > max) {
                let message = "Job has exceeded the specified maximal number of failed indexes".to_owned();
                return Some(("FailureTarget", "MaxFailedIndexesExceeded", message));
            }
            if failed.len() > 0 && failed.len() + self.succeeded.len() >= self.completions {
                return Some(("FailureTarget", "FailedIndexes", "Job has failed indexes".to_owned()));
            }
        }
        self.success_rule()
            .map(|index| ("SuccessCriteriaMet", "SuccessPolicy", format!("Matched rules at index {index}")))
    }

    pub(super) fn restarts_exceed(&self, limit: i32) -> bool {
        let template = self.spec.template.spec.as_ref();
        if template.and_then(|spec| spec.restart_policy.as_deref()) != Some("OnFailure") {
            return false;
        }
        let running = self.pods.iter().filter(|pod| matches!(pod.phase(), "Running" | "Pending"));
        let restarts: i32 = running.map(JobPod::restarts).sum();
        if limit == 0 { restarts > 0 } else { restarts >= limit }
    }

    pub(super) fn success_rule(&self) -> Option<usize> {
        let policy = self.spec.success_policy.as_ref().filter(|_| self.indexed)?;
        policy.rules.iter().position(|rule| {
            let matching = match &rule.succeeded_indexes {
                Some(text) => {
                    let wanted = Indexes::parse(text, self.completions);
                    let done = wanted.0.iter().filter(|index| self.succeeded.has(**index)).count();
                    if rule.succeeded_count.is_none() {
                        return !wanted.0.is_empty() && done == wanted.0.len();
                    }
                    i32::try_from(done).unwrap_or(0)
                }
                None => self.succeeded.len(),
            };
            rule.succeeded_count.is_some_and(|count| matching >= count)
        })
    }

    pub(super) fn is_complete(&self, active: i32) -> bool {
        match self.spec.completions {
            None => self.succeeded_total() > 0 && active == 0,
            Some(completions) => self.succeeded_total() >= completions && active == 0,
        }
    }

    pub(super) fn end(&mut self, kind: &'static str, reason: &'static str, message: &str, terminating: i32) {
        self.set_condition(kind, "True", reason, message);
        let (succeeded, failed) = self.uncounted();
        if succeeded + failed > 0 || terminating > 0 {
            return;
        }
        if kind == "SuccessCriteriaMet" {
            self.set_condition("Complete", "True", reason, message);
            self.plan.status.completion_time = Some(Time(self.now));
            if self.spec.completions.is_some_and(|completions| self.plan.status.succeeded.unwrap_or(0) > completions) {
                let message = "Too many succeeded pods running after completion count reached".to_owned();
                self.plan.events.push((EventType::Warning, "TooManySucceededPods".to_owned(), message));
            }
            self.plan.events.push((EventType::Normal, "Completed".to_owned(), "Job completed".to_owned()));
        } else {
            self.set_condition("Failed", "True", reason, message);
            self.plan.events.push((EventType::Warning, reason.to_owned(), message.to_owned()));
        }
    }

    pub(super) fn note_suspension(&mut self, suspended: bool) {
        let present = self.plan.status.conditions.iter().flatten().find(|condition| condition.type_ == "Suspended");
        let is = present.is_some_and(|condition| condition.status == "True");
        if suspended && !is {
            self.set_condition("Suspended", "True", "JobSuspended", "Job suspended");
            self.plan.status.start_time = None;
            self.plan.events.push((EventType::Normal, "Suspended".to_owned(), "Job suspended".to_owned()));
        } else if !suspended && is {
            self.set_condition("Suspended", "False", "JobResumed", "Job resumed");
            self.plan.status.start_time = Some(Time(self.now));
            self.plan.events.push((EventType::Normal, "Resumed".to_owned(), "Job resumed".to_owned()));
        }
    }

    pub(super) fn set_condition(&mut self, kind: &str, status: &str, reason: &str, message: &str) {
        let conditions = self.plan.status.conditions.get_or_insert_default();
        let condition = JobCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_probe_time: Some(Time(self.now)),
            last_transition_time: Some(Time(self.now)),
        };
        match conditions.iter_mut().find(|present| present.type_ == kind) {
            Some(present) if present.status == status && present.reason.as_deref() == Some(reason) => {}
            Some(present) => *present = condition,
            None => conditions.push(condition),
        }
    }
}

/// Why a rule is about this failed pod.
pub(super) fn rule_matches(rule: &PodFailurePolicyRule, pod: &Pod, place: &str) -> Option<String> {
    let status = pod.status.as_ref()?;
    if let Some(codes) = &rule.on_exit_codes {
        let init = status.init_container_statuses.iter().flatten();
        return status.container_statuses.iter().flatten().chain(init).find_map(|container| {
            let wanted = codes.container_name.as_ref().is_none_or(|name| *name == container.name);
            let code = container.state.as_ref()?.terminated.as_ref()?.exit_code;
            let listed = codes.values.contains(&code);
            let hit = wanted && code != 0 && (listed == (codes.operator == "In"));
            hit.then(|| format!("Container {} for pod {place} failed with exit code {code}", container.name))
        });
    }
    rule.on_pod_conditions.iter().flatten().find_map(|pattern| {
        let present = status.conditions.iter().flatten().find(|condition| condition.type_ == pattern.type_)?;
        let wanted = pattern.status.as_deref().unwrap_or("True");
        (present.status == wanted).then(|| format!("Pod {place} has condition {}", pattern.type_))
    })
}
