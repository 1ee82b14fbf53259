//! Pods that wait for a node: ready to be tried, waiting out a backoff, or waiting for the cluster to change.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::filter::Plugin;
use super::pod_info::PodInfo;

const BACKOFF_BASE: Duration = Duration::from_secs(1);
const BACKOFF_CAP: Duration = Duration::from_secs(10);
/// No pod waits longer than this without another try.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// What happened in the cluster, as far as it can make a pod schedulable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hint {
    /// A node came, or its labels, taints or capacity changed.
    Node,
    /// A pod left a node or shrank.
    PodGone,
    /// A pod came to a node or changed its labels.
    PodPlaced,
    /// Labels of a namespace changed.
    Namespace,
    /// A claim, volume or storage class came or changed.
    Storage,
}

impl Hint {
    fn helps(self, plugin: Plugin) -> bool {
        match self {
            Hint::Node => true,
            Hint::PodGone => matches!(
                plugin,
                Plugin::NodePorts | Plugin::NodeResourcesFit | Plugin::PodTopologySpread | Plugin::InterPodAffinity
            ),
            Hint::PodPlaced => matches!(plugin, Plugin::InterPodAffinity | Plugin::PodTopologySpread),
            Hint::Namespace => plugin == Plugin::InterPodAffinity,
            Hint::Storage => plugin == Plugin::VolumeBinding,
        }
    }
}

enum Place {
    Active(Rank),
    /// `hasty`: need not be waited out when nothing else waits.
    Backoff {
        until: Instant,
        hasty: bool,
    },
    Unschedulable {
        plugins: HashSet<Plugin>,
        since: Instant,
    },
    Gated,
    /// Taken out, a decision or binding under way.
    Taken,
}

/// Higher priority first, then who waits longer.
type Rank = (Reverse<i32>, u64);

struct Entry {
    pod: Arc<PodInfo>,
    place: Place,
    attempts: u32,
    arrival: u64,
    last_try: Instant,
}

/// The queue. One task owns it.
#[derive(Default)]
pub struct SchedulingQueue {
    entries: HashMap<Box<str>, Entry>,
    active: BTreeMap<Rank, Box<str>>,
    arrivals: u64,
    /// Number of pods that wait for a change.
    unschedulable: usize,
    /// Nothing is due before.
    earliest: Option<Instant>,
}

impl SchedulingQueue {
    /// Takes in a pod without a node, or its new state.
    pub fn put(&mut self, pod: Arc<PodInfo>, now: Instant) {
        if let Some(entry) = self.entries.get_mut(&pod.uid) {
            let changed = entry.pod.resource_version != pod.resource_version && relevant(&entry.pod, &pod);
            let uid = pod.uid.clone();
            let gated = pod.gated;
            entry.pod = pod;
            match entry.place {
                Place::Gated if !gated => self.activate(&uid),
                Place::Unschedulable { .. } if changed => self.wake(&uid, now),
                _ => {}
            }
            return;
        }
        self.arrivals += 1;
        let (uid, gated) = (pod.uid.clone(), pod.gated);
        let entry = Entry { pod, place: Place::Gated, attempts: 0, arrival: self.arrivals, last_try: now };
        self.entries.insert(uid.clone(), entry);
        if !gated {
            self.activate(&uid);
        }
    }

    /// The pod needs no node any more.
    pub fn remove(&mut self, uid: &str) -> bool {
        let Some(entry) = self.entries.remove(uid) else { return false };
        self.left(&entry.place);
        true
    }

    /// The next pod to try: of the ready ones, else one whose backoff need not be waited out because nothing else waits.
    pub fn pop(&mut self, now: Instant) -> Option<Arc<PodInfo>> {
        self.promote(now);
        let uid = self.active.pop_first().map(|(_, uid)| uid).or_else(|| self.hasty())?;
        let entry = self.entries.get_mut(&uid)?;
        entry.place = Place::Taken;
        entry.attempts += 1;
        entry.last_try = now;
        Some(entry.pod.clone())
    }

    /// The pod fits nowhere now: it waits for a change.
    pub fn unschedulable(&mut self, uid: &str, plugins: HashSet<Plugin>, now: Instant) {
        if let Some(entry) = self.entries.get_mut(uid) {
            entry.place = Place::Unschedulable { plugins, since: now };
            self.unschedulable += 1;
            self.note_due(now + LONGEST_WAIT);
        }
    }

    /// Something went wrong; the pod is tried again after its backoff.
    pub fn failed(&mut self, uid: &str) {
        if let Some(entry) = self.entries.get_mut(uid) {
            let until = entry.last_try + backoff(entry.attempts);
            entry.place = Place::Backoff { until, hasty: false };
            self.note_due(until);
        }
    }

    /// Something happened: pods that it may help are tried again, after their backoff.
    pub fn hint(&mut self, hint: Hint, now: Instant) {
        self.wake_all(now, |plugins, _| plugins.is_empty() || plugins.iter().any(|plugin| hint.helps(*plugin)));
    }

    /// Whether a pod can be tried now.
    pub fn has_active(&self) -> bool {
        !self.active.is_empty() || self.hasty().is_some()
    }

    /// The pod with the shortest rest of a backoff that need not be waited out.
    fn hasty(&self) -> Option<Box<str>> {
        self.earliest?;
        let candidates = self.entries.iter().filter_map(|(uid, entry)| match entry.place {
            Place::Backoff { until, hasty: true } => Some((until, uid)),
            _ => None,
        });
        candidates.min_by_key(|(until, _)| *until).map(|(_, uid)| uid.clone())
    }

    fn note_due(&mut self, due: Instant) {
        self.earliest = Some(self.earliest.map_or(due, |earliest| earliest.min(due)));
    }

    fn left(&mut self, place: &Place) {
        match place {
            Place::Active(rank) => drop(self.active.remove(rank)),
            Place::Unschedulable { .. } => self.unschedulable -= 1,
            _ => {}
        }
    }

    /// When something is to be done without being asked.
    pub fn next_due(&self) -> Option<Instant> {
        self.entries
            .values()
            .filter_map(|entry| match entry.place {
                Place::Backoff { until, .. } => Some(until),
                Place::Unschedulable { since, .. } => Some(since + LONGEST_WAIT),
                _ => None,
            })
            .min()
    }

    /// Number of pods in the queue, those being decided about among them.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether no pod waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn promote(&mut self, now: Instant) {
        if self.earliest.is_none_or(|earliest| earliest > now) {
            return;
        }
        self.wake_all(now, |_, since| since + LONGEST_WAIT <= now);
        let due: Vec<Box<str>> = self
            .entries
            .iter()
            .filter(|(_, entry)| matches!(entry.place, Place::Backoff { until, .. } if until <= now))
            .map(|(uid, _)| uid.clone())
            .collect();
        due.iter().for_each(|uid| self.activate(uid));
        self.earliest = self.next_due();
    }

    fn wake_all(&mut self, now: Instant, wanted: impl Fn(&HashSet<Plugin>, Instant) -> bool) {
        if self.unschedulable == 0 {
            return;
        }
        let woken: Vec<Box<str>> = self
            .entries
            .iter()
            .filter(|(_, entry)| match &entry.place {
                Place::Unschedulable { plugins, since } => wanted(plugins, *since),
                _ => false,
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        woken.iter().for_each(|uid| self.wake(uid, now));
    }

    fn wake(&mut self, uid: &str, now: Instant) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        let until = entry.last_try + backoff(entry.attempts);
        if until <= now {
            return self.activate(uid);
        }
        let before = std::mem::replace(&mut entry.place, Place::Backoff { until, hasty: true });
        self.left(&before);
        self.note_due(until);
    }

    fn activate(&mut self, uid: &str) {
        let Some(entry) = self.entries.get_mut(uid) else { return };
        let rank = (Reverse(entry.pod.priority), entry.arrival);
        let before = std::mem::replace(&mut entry.place, Place::Active(rank));
        self.left(&before);
        self.active.insert(rank, uid.into());
    }
}

fn backoff(attempts: u32) -> Duration {
    BACKOFF_BASE.saturating_mul(1 << attempts.saturating_sub(1).min(10)).min(BACKOFF_CAP)
}

/// Whether an update of a waiting pod can change where it fits. Its status does not.
fn relevant(old: &PodInfo, new: &PodInfo) -> bool {
    old.labels != new.labels
        || old.requests != new.requests
        || old.tolerations != new.tolerations
        || old.gated != new.gated
        || old.node_selector != new.node_selector
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::testing::pod;
    use serde_json::json;

    fn waiting(name: &str, priority: i32) -> Arc<PodInfo> {
        pod(name, json!({"spec": {"priority": priority}}))
    }

    fn popped(queue: &mut SchedulingQueue, now: Instant) -> Option<String> {
        queue.pop(now).map(|pod| pod.uid.to_string())
    }

    #[test]
    fn the_most_important_pod_comes_first_then_who_waits_longest() {
        let now = Instant::now();
        let mut queue = SchedulingQueue::default();
        for (name, priority) in [("a", 0), ("b", 5), ("c", 0)] {
            queue.put(waiting(name, priority), now);
        }
        let order: Vec<_> = std::iter::from_fn(|| popped(&mut queue, now)).collect();
        assert_eq!(order, ["b", "a", "c"]);
    }

    #[test]
    fn only_what_may_help_wakes_a_pod_and_its_backoff_is_for_letting_others_pass() {
        let start = Instant::now();
        let mut queue = SchedulingQueue::default();
        queue.put(waiting("a", 0), start);
        queue.pop(start);
        queue.unschedulable("a", HashSet::from([Plugin::NodeResourcesFit]), start);
        queue.hint(Hint::PodPlaced, start);
        assert_eq!(popped(&mut queue, start + Duration::from_secs(2)), None);
        queue.hint(Hint::PodGone, start);
        queue.put(waiting("b", -1), start);
        assert_eq!(
            (popped(&mut queue, start), popped(&mut queue, start)),
            (Some("b".to_owned()), Some("a".to_owned()))
        );
    }

    #[test]
    fn after_a_failure_the_backoff_is_waited_out() {
        let start = Instant::now();
        let mut queue = SchedulingQueue::default();
        queue.put(waiting("a", 0), start);
        queue.pop(start);
        queue.failed("a");
        assert_eq!((popped(&mut queue, start), queue.next_due()), (None, Some(start + BACKOFF_BASE)));
        assert_eq!(popped(&mut queue, start + BACKOFF_BASE), Some("a".to_owned()));
    }

    #[test]
    fn a_gated_pod_waits_for_its_gates_and_a_forgotten_one_for_five_minutes() {
        let start = Instant::now();
        let mut queue = SchedulingQueue::default();
        queue.put(pod("g", json!({"spec": {"schedulingGates": [{"name": "x"}]}})), start);
        assert_eq!(popped(&mut queue, start), None);
        queue.put(waiting("g", 0), start);
        assert_eq!(popped(&mut queue, start), Some("g".to_owned()));
        queue.unschedulable("g", HashSet::from([Plugin::NodePorts]), start);
        assert_eq!(popped(&mut queue, start + Duration::from_secs(299)), None);
        assert_eq!(popped(&mut queue, start + LONGEST_WAIT), Some("g".to_owned()));
    }
}
