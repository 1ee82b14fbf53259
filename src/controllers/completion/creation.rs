//! Which pods a Job needs and which it has too many of.

use std::collections::HashSet;
use std::time::Duration;

use super::{BURST, Failures, JobPod, NewPod, Work};

impl Work<'_> {
    pub(super) fn manage(&mut self, active: &[&JobPod], terminating: i32, suspended: bool) {
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

    pub(super) fn create_indexes(&mut self, missing: usize) {
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
    pub(super) fn index_failures(&self, index: i32) -> (i32, i64) {
        let failed = self.pods.iter().filter(|pod| pod.index() == Some(index) && pod.has_failed(self.only_failed));
        failed.map(|pod| (pod.failures_before() + i32::from(self.counts(pod)), pod.ended())).max().unwrap_or((0, 0))
    }

    /// Pods of one index too many, or beyond the completions, and as many as are too many.
    pub(super) fn to_remove(&self, active: &[&JobPod], excess: usize) -> Vec<String> {
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

    pub(super) fn again(&mut self, seconds: i64) {
        let delay = Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(1));
        self.plan.after = Some(self.plan.after.map_or(delay, |planned| planned.min(delay)));
    }
}
