//! The pure core of Jobs: which pods to create and delete, what has been counted, and when a Job has ended.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | this | one pass over a Job, and the counting of ended pods |
//! | [`pod`] | a pod of a Job |
//! | [`indexes`] | sets of completion indexes |
//! | [`ending`] | whether and how the Job ends |
//! | [`creation`] | pods to create and to delete |

mod creation;
mod ending;
mod indexes;
mod pod;

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus, PodFailurePolicyRule};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::event::EventType;
use ending::rule_matches;
pub use indexes::Indexes;
pub use pod::JobPod;

/// Keeps a pod until its end has been counted.
pub const TRACKING: &str = "batch.kubernetes.io/job-tracking";
/// Annotation and label with the index of a pod of an indexed Job.
pub const INDEX: &str = "batch.kubernetes.io/job-completion-index";
/// Annotation that counts the failures of an index before this pod.
pub const INDEX_FAILURES: &str = "batch.kubernetes.io/job-index-failure-count";

const MAX_UNCOUNTED: usize = 500;
const BURST: usize = 500;
const BACKOFF_BASE: i64 = 10;
const BACKOFF_CAP: i64 = 600;

/// Failures since the last success, for the backoff before the next pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failures {
    /// How many in a row.
    pub count: u32,
    /// When the last one was, seconds since the epoch.
    pub last: i64,
}

impl Failures {
    fn remaining(self, now: i64) -> i64 {
        if self.count == 0 {
            return 0;
        }
        let delay = BACKOFF_BASE.saturating_mul(1 << (self.count - 1).min(10)).min(BACKOFF_CAP);
        (self.last + delay - now).max(0)
    }
}

/// A pod to create.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewPod {
    /// Its index in an indexed Job.
    pub index: Option<i32>,
    /// Failures of the index so far, when they are limited per index.
    pub failures: Option<i32>,
}

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// Pods to create.
    pub create: Vec<NewPod>,
    /// Names of pods to delete.
    pub delete: Vec<String>,
    /// The new status.
    pub status: JobStatus,
    /// Names of pods whose end is counted once the status is written.
    pub untrack: Vec<String>,
    /// Events to tell once the status is written.
    pub events: Vec<(EventType, String, String)>,
    /// When to look again without being asked.
    pub after: Option<Duration>,
    /// The backoff from here on.
    pub failures: Failures,
}

struct Work<'a> {
    job: &'a Job,
    spec: &'a JobSpec,
    pods: &'a [JobPod],
    now: Timestamp,
    only_failed: bool,
    indexed: bool,
    completions: i32,
    plan: Plan,
    succeeded: Indexes,
    failed: Option<Indexes>,
}

/// Plans one pass over a Job that has not ended.
pub fn plan(job: &Job, pods: &[JobPod], failures: Failures, now: Timestamp) -> Plan {
    let Some(spec) = job.spec.as_ref() else { return Plan::default() };
    let policy = spec.pod_replacement_policy.as_deref();
    let completions = spec.completions.unwrap_or(i32::MAX);
    let mut work = Work {
        job,
        spec,
        pods,
        now,
        only_failed: policy == Some("Failed") || (policy.is_none() && spec.pod_failure_policy.is_some()),
        indexed: spec.completion_mode.as_deref() == Some("Indexed"),
        completions,
        plan: Plan { status: job.status.clone().unwrap_or_default(), failures, ..Plan::default() },
        succeeded: Indexes::default(),
        failed: None,
    };
    work.run();
    work.plan
}

fn condition<'a>(status: &'a JobStatus, kind: &str) -> Option<&'a JobCondition> {
    status.conditions.as_ref()?.iter().find(|condition| condition.type_ == kind && condition.status == "True")
}

/// Whether a Job has ended.
pub fn is_finished(status: Option<&JobStatus>) -> bool {
    status.is_some_and(|status| condition(status, "Complete").is_some() || condition(status, "Failed").is_some())
}

impl Work<'_> {
    fn run(&mut self) {
        let suspended = self.spec.suspend == Some(true);
        if self.plan.status.start_time.is_none() && !suspended {
            self.plan.status.start_time = Some(Time(self.now));
        }
        self.settle_uncounted();
        self.count_ended();
        let mut ending = self.ending(suspended);
        let active: Vec<&JobPod> = self.pods.iter().filter(|pod| pod.is_active()).collect();
        let mut active_count = i32::try_from(active.len()).unwrap_or(i32::MAX);
        let mut ready = i32::try_from(active.iter().filter(|pod| pod.facts.ready).count()).unwrap_or(0);
        let leaving =
            self.pods.iter().filter(|pod| pod.is_deleting() && !matches!(pod.phase(), "Succeeded" | "Failed"));
        let mut terminating = i32::try_from(leaving.count()).unwrap_or(0);
        if ending.is_some() {
            self.plan.delete = active.iter().map(|pod| pod.name().to_owned()).collect();
        } else if self.job.metadata.deletion_timestamp.is_none() {
            self.manage(&active, terminating, suspended);
        }
        let removed = i32::try_from(self.plan.delete.len()).unwrap_or(0);
        let removed_ready =
            active.iter().filter(|pod| pod.facts.ready && self.plan.delete.iter().any(|name| name == pod.name()));
        ready -= i32::try_from(removed_ready.count()).unwrap_or(0);
        active_count += i32::try_from(self.plan.create.len()).unwrap_or(0) - removed;
        terminating += removed;
        if ending.is_none() && self.is_complete(active_count) {
            ending = Some((
                "SuccessCriteriaMet",
                "CompletionsReached",
                "Reached expected number of succeeded pods".to_owned(),
            ));
        } else if ending.is_none() && self.job.metadata.deletion_timestamp.is_none() {
            self.note_suspension(suspended);
        }
        self.plan.status.active = (active_count != 0).then_some(active_count);
        self.plan.status.ready = Some(ready);
        self.plan.status.terminating = Some(terminating);
        if let Some((kind, reason, message)) = ending {
            self.end(kind, reason, &message, terminating);
        }
    }

    /// Uncounted pods that are gone, or have lost the finalizer, are counted for good.
    fn settle_uncounted(&mut self) {
        let tracked: HashSet<&str> = self.pods.iter().filter(|pod| pod.is_tracked()).map(JobPod::uid).collect();
        let status = &mut self.plan.status;
        let Some(uncounted) = status.uncounted_terminated_pods.as_mut() else { return };
        let settle = |uids: &mut Option<Vec<String>>| {
            let Some(uids) = uids else { return 0 };
            let before = uids.len();
            uids.retain(|uid| tracked.contains(uid.as_str()));
            i32::try_from(before - uids.len()).unwrap_or(0)
        };
        let (succeeded, failed) = (settle(&mut uncounted.succeeded), settle(&mut uncounted.failed));
        if succeeded > 0 {
            status.succeeded = Some(status.succeeded.unwrap_or(0) + succeeded);
        }
        if failed > 0 {
            status.failed = Some(status.failed.unwrap_or(0) + failed);
        }
    }

    fn count_ended(&mut self) {
        if self.indexed {
            let text = self.plan.status.completed_indexes.clone().unwrap_or_default();
            self.succeeded = Indexes::parse(&text, self.completions);
        }
        if self.indexed && self.spec.backoff_limit_per_index.is_some() {
            self.failed = Some(self.failed_indexes());
        }
        let mut uncounted = self.plan.status.uncounted_terminated_pods.take().unwrap_or_default();
        let (mut failures, mut last_success) = (0u32, 0);
        let keep = self.kept_for_index();
        for pod in self.pods.iter().filter(|pod| pod.is_tracked()) {
            let gathered =
                uncounted.succeeded.as_ref().map_or(0, Vec::len) + uncounted.failed.as_ref().map_or(0, Vec::len);
            if gathered >= MAX_UNCOUNTED {
                break;
            }
            let known = |uids: &Option<Vec<String>>| uids.iter().flatten().any(|uid| uid == pod.uid());
            if pod.phase() == "Succeeded" {
                last_success = last_success.max(pod.ended());
                match pod.index().filter(|index| self.indexed && *index < self.completions) {
                    Some(index) => drop(self.succeeded.0.insert(index)),
                    None if self.indexed => {}
                    None if known(&uncounted.succeeded) || known(&uncounted.failed) => {}
                    None => uncounted.succeeded.get_or_insert_default().push(pod.uid().to_owned()),
                }
                self.plan.untrack.push(pod.name().to_owned());
            } else if pod.has_failed(self.only_failed)
                || (pod.is_deleting() && self.job.metadata.deletion_timestamp.is_some())
            {
                let in_range = !self.indexed || pod.index().is_some_and(|index| index < self.completions);
                if !known(&uncounted.failed) && in_range && self.counts(pod) {
                    uncounted.failed.get_or_insert_default().push(pod.uid().to_owned());
                    failures += 1;
                    self.plan.failures.last = self.plan.failures.last.max(pod.ended().max(self.now.as_second() - 1));
                }
                if !keep.contains(pod.uid()) {
                    self.plan.untrack.push(pod.name().to_owned());
                }
            }
        }
        if last_success > self.plan.failures.last {
            self.plan.failures = Failures::default();
        }
        self.plan.failures.count += failures;
        if self.indexed {
            self.plan.status.succeeded = Some(self.succeeded.len()).filter(|count| *count > 0);
            self.plan.status.completed_indexes = Some(self.succeeded.to_string()).filter(|text| !text.is_empty());
            self.plan.status.failed_indexes = self.failed.as_ref().map(ToString::to_string);
        }
        self.plan.status.uncounted_terminated_pods = Some(uncounted);
    }

    fn uncounted(&self) -> (i32, i32) {
        let count = |uids: &Option<Vec<String>>| i32::try_from(uids.iter().flatten().count()).unwrap_or(0);
        let uncounted = self.plan.status.uncounted_terminated_pods.as_ref();
        uncounted.map_or((0, 0), |uncounted| (count(&uncounted.succeeded), count(&uncounted.failed)))
    }

    fn succeeded_total(&self) -> i32 {
        if self.indexed { self.succeeded.len() } else { self.plan.status.succeeded.unwrap_or(0) + self.uncounted().0 }
    }

    fn failed_total(&self) -> i32 {
        self.plan.status.failed.unwrap_or(0) + self.uncounted().1
    }

    // ---- failure policies

    fn counts(&self, pod: &JobPod) -> bool {
        self.matching_rule(pod).is_none_or(|(_, rule, _)| rule.action != "Ignore")
    }

    fn matching_rule(&self, pod: &JobPod) -> Option<(usize, &PodFailurePolicyRule, String)> {
        let policy = self.spec.pod_failure_policy.as_ref()?;
        let place = format!("{}/{}", pod.pod.metadata.namespace.as_deref().unwrap_or_default(), pod.name());
        policy.rules.iter().enumerate().find_map(|(index, rule)| {
            let why = rule_matches(rule, &pod.pod, &place)?;
            let message = format!("{why} matching {} rule at index {index}", rule.action);
            Some((index, rule, message))
        })
    }

    fn failed_indexes(&self) -> Indexes {
        let text = self.plan.status.failed_indexes.clone().unwrap_or_default();
        let mut failed = Indexes::parse(&text, self.completions);
        let limit = self.spec.backoff_limit_per_index.unwrap_or(i32::MAX);
        for pod in self.pods.iter().filter(|pod| pod.is_tracked() && pod.has_failed(self.only_failed)) {
            let Some(index) = pod.index().filter(|index| *index < self.completions) else { continue };
            let rule = self.matching_rule(pod).map(|(_, rule, _)| rule.action.as_str());
            let counted = i32::from(rule != Some("Ignore"));
            if pod.failures_before() + counted > limit || rule == Some("FailIndex") {
                failed.0.insert(index);
            }
        }
        failed
    }

    /// With a limit per index the last failed pod of an index stays until another takes over its count.
    fn kept_for_index(&self) -> HashSet<String> {
        let mut newest: BTreeMap<i32, &JobPod> = BTreeMap::new();
        let Some(failed) = &self.failed else { return HashSet::new() };
        for pod in self.pods.iter().filter(|pod| pod.is_tracked() && pod.has_failed(self.only_failed)) {
            let Some(index) = pod.index() else { continue };
            let done = failed.has(index) || self.succeeded.has(index);
            let taken_over = self.pods.iter().any(|other| other.index() == Some(index) && other.is_active());
            if !done
                && !taken_over
                && newest.get(&index).is_none_or(|best| best.failures_before() <= pod.failures_before())
            {
                newest.insert(index, pod);
            }
        }
        newest.values().map(|pod| pod.uid().to_owned()).collect()
    }
}

#[cfg(test)]
mod tests;
