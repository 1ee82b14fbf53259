//! Which pods of a set go first when it shrinks.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;

use super::object::Object;

/// A pod and what decides about it.
pub struct Ranked {
    /// The pod.
    pub pod: Arc<Object>,
    /// `controller.kubernetes.io/pod-deletion-cost`; dearer pods stay longer.
    pub cost: i32,
    /// Pods of related sets on the same node.
    pub neighbours: usize,
    /// Largest restart count of its containers.
    pub restarts: i32,
}

/// Ranks pods; `related` are the active pods of all sets with the same owner.
pub fn rank<'a>(pods: Vec<Arc<Object>>, related: impl Iterator<Item = &'a Arc<Object>>) -> Vec<Ranked> {
    let mut on_node: HashMap<Box<str>, usize> = HashMap::new();
    for node in related.filter(|pod| pod.is_active()).filter_map(|pod| pod.node.clone()) {
        *on_node.entry(node).or_default() += 1;
    }
    pods.into_iter()
        .map(|pod| {
            let details: Details = pod.decode().unwrap_or_default();
            Ranked {
                cost: details.cost(),
                restarts: details.restarts(),
                neighbours: pod.node.as_ref().and_then(|node| on_node.get(node)).copied().unwrap_or(0),
                pod,
            }
        })
        .collect()
}

/// The `count` pods to delete, by upstream's order: unassigned, pending, not ready, cheap, crowded, freshly ready,
/// often restarted, young ones first. Ages compare by order of magnitude, so that which of similar pods goes is arbitrary.
pub fn first_to_go(mut pods: Vec<Ranked>, count: usize, now: Timestamp) -> Vec<Arc<Object>> {
    if count < pods.len() {
        pods.sort_by(|a, b| compare(a, b, now));
    }
    pods.into_iter().take(count).map(|ranked| ranked.pod).collect()
}

fn compare(a: &Ranked, b: &Ranked, now: Timestamp) -> Ordering {
    let now = now.as_second();
    let (x, y) = (&*a.pod, &*b.pod);
    x.node
        .is_some()
        .cmp(&y.node.is_some())
        .then_with(|| phase_rank(x).cmp(&phase_rank(y)))
        .then_with(|| x.pod.ready.cmp(&y.pod.ready))
        .then_with(|| a.cost.cmp(&b.cost))
        .then_with(|| Reverse(a.neighbours).cmp(&Reverse(b.neighbours)))
        .then_with(
            || if x.pod.ready { by_age(x.pod.ready_since, y.pod.ready_since, x, y, now) } else { Ordering::Equal },
        )
        .then_with(|| Reverse(a.restarts).cmp(&Reverse(b.restarts)))
        .then_with(|| by_age(x.created, y.created, x, y, now))
}

fn by_age(a: i64, b: i64, x: &Object, y: &Object, now: i64) -> Ordering {
    if a == b {
        return Ordering::Equal;
    }
    let magnitude = |since: i64| (now - since).max(0).checked_ilog2().map_or(-1, i64::from);
    magnitude(a).cmp(&magnitude(b)).then_with(|| x.uid.cmp(&y.uid))
}

fn phase_rank(pod: &Object) -> u8 {
    match pod.phase() {
        "Running" => 2,
        "Unknown" => 1,
        _ => 0,
    }
}

#[derive(Default, Deserialize)]
struct Details {
    metadata: DetailsMetadata,
    #[serde(default)]
    status: DetailsStatus,
}

#[derive(Default, Deserialize)]
struct DetailsMetadata {
    #[serde(default)]
    annotations: HashMap<String, String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DetailsStatus {
    #[serde(default)]
    container_statuses: Vec<DetailsContainer>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct DetailsContainer {
    #[serde(default)]
    restart_count: i32,
}

impl Details {
    fn cost(&self) -> i32 {
        let cost = self.metadata.annotations.get("controller.kubernetes.io/pod-deletion-cost");
        cost.and_then(|cost| cost.parse().ok()).unwrap_or(0)
    }

    fn restarts(&self) -> i32 {
        self.status.container_statuses.iter().map(|container| container.restart_count).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use crate::controllers::resource::PODS;
    use serde_json::json;

    fn pod(name: &str, node: &str, phase: &str, ready: bool, cost: &str, restarts: i32) -> Arc<Object> {
        let json = json!({
            "metadata": {"name": name, "namespace": "n", "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z",
                "annotations": {"controller.kubernetes.io/pod-deletion-cost": cost}},
            "spec": {"nodeName": node},
            "status": {"phase": phase, "containerStatuses": [{"restartCount": restarts}],
                "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]}});
        Arc::new(parse(&PODS, json.to_string().as_bytes(), false).unwrap())
    }

    #[test]
    fn the_least_useful_pods_go_first() {
        let pods = vec![
            pod("dear", "n1", "Running", true, "5", 0),
            pod("crowded", "n2", "Running", true, "0", 0),
            pod("crowding", "n2", "Running", true, "1", 0),
            pod("plain", "n1", "Running", true, "0", 0),
            pod("restarting", "n1", "Running", false, "0", 9),
            pod("unready", "n1", "Running", false, "0", 0),
            pod("pending", "n1", "Pending", false, "0", 0),
            pod("unassigned", "", "Pending", false, "0", 0),
        ];
        let related = [pod("crowded", "n2", "Running", true, "", 0), pod("crowding", "n2", "Running", true, "", 0)];
        let ranked = rank(pods, related.iter());
        let order: Vec<String> =
            first_to_go(ranked, 7, Timestamp::now()).iter().map(|pod| pod.uid.to_string()).collect();
        assert_eq!(order, ["unassigned", "pending", "restarting", "unready", "crowded", "plain", "crowding"]);
    }
}
