//! The pure core of Jobs: which pods to create and delete, what has been counted, and when a Job has ended.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus, PodFailurePolicyRule};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::event::EventType;
use super::object::PodFacts;

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

/// A pod of a Job.
pub struct JobPod {
    /// The decoded pod.
    pub pod: Pod,
    /// What the cache knows of its readiness.
    pub facts: PodFacts,
}

impl JobPod {
    fn uid(&self) -> &str {
        self.pod.metadata.uid.as_deref().unwrap_or_default()
    }

    fn name(&self) -> &str {
        self.pod.metadata.name.as_deref().unwrap_or_default()
    }

    fn phase(&self) -> &str {
        self.pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
    }

    fn is_deleting(&self) -> bool {
        self.pod.metadata.deletion_timestamp.is_some()
    }

    fn is_active(&self) -> bool {
        !matches!(self.phase(), "Succeeded" | "Failed") && !self.is_deleting()
    }

    fn is_tracked(&self) -> bool {
        self.pod.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == TRACKING)
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
    }

    fn index(&self) -> Option<i32> {
        self.annotation(INDEX)?.parse().ok().filter(|index| *index >= 0)
    }

    fn failures_before(&self) -> i32 {
        self.annotation(INDEX_FAILURES).and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    fn has_failed(&self, only_failed: bool) -> bool {
        self.phase() == "Failed" || (!only_failed && self.is_deleting() && self.phase() != "Succeeded")
    }

    fn restarts(&self) -> i32 {
        let status = self.pod.status.as_ref();
        let init = status.and_then(|status| status.init_container_statuses.as_ref()).into_iter().flatten();
        let main = status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
        init.chain(main).map(|container| container.restart_count).sum()
    }

    /// When its last container ended.
    fn ended(&self) -> i64 {
        let status = self.pod.status.as_ref();
        let containers = status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten();
        let ends = containers.filter_map(|container| {
            let terminated = container.state.as_ref()?.terminated.as_ref()?;
            terminated.finished_at.as_ref().map(|time| time.0.as_second())
        });
        ends.max().or(Some(self.facts.ready_since).filter(|since| *since > 0)).unwrap_or(0)
    }
}

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

/// A set of indexes, as in `0,2-4`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Indexes(BTreeSet<i32>);

impl Indexes {
    /// Reads the text; what is no index below `limit` is left out.
    pub fn parse(text: &str, limit: i32) -> Indexes {
        let ranges = text.split(',').filter_map(|part| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some(first.trim().parse::<i32>().ok()?..=last.trim().parse::<i32>().ok()?.min(limit - 1))
        });
        Indexes(ranges.flatten().filter(|index| *index >= 0).collect())
    }

    fn has(&self, index: i32) -> bool {
        self.0.contains(&index)
    }

    fn len(&self) -> i32 {
        i32::try_from(self.0.len()).unwrap_or(i32::MAX)
    }
}

impl std::fmt::Display for Indexes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut all = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = all.next() {
            let mut last = first;
            while all.peek() == Some(&(last + 1)) {
                last += 1;
                all.next();
            }
            match last - first {
                0 => write!(f, "{separator}{first}")?,
                1 => write!(f, "{separator}{first},{last}")?,
                _ => write!(f, "{separator}{first}-{last}")?,
            }
            separator = ",";
        }
        Ok(())
    }
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

    // ---- ending

    fn ending(&mut self, suspended: bool) -> Option<(&'static str, &'static str, String)> {
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

    fn restarts_exceed(&self, limit: i32) -> bool {
        let template = self.spec.template.spec.as_ref();
        if template.and_then(|spec| spec.restart_policy.as_deref()) != Some("OnFailure") {
            return false;
        }
        let running = self.pods.iter().filter(|pod| matches!(pod.phase(), "Running" | "Pending"));
        let restarts: i32 = running.map(JobPod::restarts).sum();
        if limit == 0 { restarts > 0 } else { restarts >= limit }
    }

    fn success_rule(&self) -> Option<usize> {
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

    fn is_complete(&self, active: i32) -> bool {
        match self.spec.completions {
            None => self.succeeded_total() > 0 && active == 0,
            Some(completions) => self.succeeded_total() >= completions && active == 0,
        }
    }

    fn end(&mut self, kind: &'static str, reason: &'static str, message: &str, terminating: i32) {
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

    fn note_suspension(&mut self, suspended: bool) {
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

    fn set_condition(&mut self, kind: &str, status: &str, reason: &str, message: &str) {
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

    // ---- pods

    fn manage(&mut self, active: &[&JobPod], terminating: i32, suspended: bool) {
        let count = i32::try_from(active.len()).unwrap_or(i32::MAX);
        let parallelism = self.spec.parallelism.unwrap_or(1);
        let wanted = match self.spec.completions {
            _ if suspended => 0,
            None if self.succeeded_total() > 0 => count,
            None => parallelism,
            Some(completions) => (completions - self.succeeded_total()).clamp(0, parallelism),
        };
        let excess = usize::try_from(count - wanted).unwrap_or(0);
        let doomed = self.to_remove(active, excess);
        if !doomed.is_empty() {
            self.plan.delete = doomed;
            return;
        }
        let waiting = if self.only_failed { terminating } else { 0 };
        let missing = usize::try_from(wanted - count - waiting).unwrap_or(0).min(BURST);
        if missing == 0 {
            return;
        }
        if self.failed.is_none() {
            let rest = self.plan.failures.remaining(self.now.as_second());
            if rest > 0 {
                return self.again(rest);
            }
        }
        if self.indexed {
            self.create_indexes(missing)
        } else {
            self.plan.create = vec![NewPod { index: None, failures: None }; missing]
        }
    }

    fn create_indexes(&mut self, missing: usize) {
        let taken: HashSet<i32> = self
            .pods
            .iter()
            .filter(|pod| {
                pod.is_active()
                    || (self.only_failed && pod.is_deleting() && !matches!(pod.phase(), "Failed" | "Succeeded"))
            })
            .filter_map(JobPod::index)
            .collect();
        let free: Vec<i32> = (0..self.completions)
            .filter(|index| !self.succeeded.has(*index) && !taken.contains(index))
            .filter(|index| self.failed.as_ref().is_none_or(|failed| !failed.has(*index)))
            .take(missing)
            .collect();
        for index in free {
            let failures = self.failed.is_some().then(|| self.index_failures(index));
            if let Some((count, last)) = failures {
                let rest = Failures { count: u32::try_from(count).unwrap_or(0), last }.remaining(self.now.as_second());
                if rest > 0 {
                    self.again(rest);
                    continue;
                }
            }
            self.plan.create.push(NewPod { index: Some(index), failures: failures.map(|(count, _)| count) });
        }
    }

    /// Failures of an index so far, and when the last one was.
    fn index_failures(&self, index: i32) -> (i32, i64) {
        let failed = self.pods.iter().filter(|pod| pod.index() == Some(index) && pod.has_failed(self.only_failed));
        failed.map(|pod| (pod.failures_before() + i32::from(self.counts(pod)), pod.ended())).max().unwrap_or((0, 0))
    }

    /// Pods of one index too many, or beyond the completions, and as many as are too many.
    fn to_remove(&self, active: &[&JobPod], excess: usize) -> Vec<String> {
        let mut order: Vec<&&JobPod> = active.iter().collect();
        order.sort_by_key(|pod| {
            (pod.phase() == "Running", pod.facts.ready, std::cmp::Reverse(pod.pod.metadata.creation_timestamp.clone()))
        });
        let mut doomed: Vec<String> = Vec::new();
        if self.indexed {
            let mut seen = HashSet::new();
            for pod in order.iter().rev() {
                let valid = pod.index().is_some_and(|index| index < self.completions && seen.insert(index));
                if !valid {
                    doomed.push(pod.name().to_owned());
                }
            }
        }
        for pod in order {
            if doomed.len() >= excess {
                break;
            }
            if !doomed.iter().any(|name| name == pod.name()) {
                doomed.push(pod.name().to_owned());
            }
        }
        doomed.truncate(BURST);
        doomed
    }

    fn again(&mut self, seconds: i64) {
        let delay = Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(1));
        self.plan.after = Some(self.plan.after.map_or(delay, |planned| planned.min(delay)));
    }
}

/// Why a rule is about this failed pod.
fn rule_matches(rule: &PodFailurePolicyRule, pod: &Pod, place: &str) -> Option<String> {
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

#[cfg(test)]
#[path = "completion_tests.rs"]
mod tests;
