//! Which of the nodes that a pod fits on is best: upstream's scores with upstream's weights.

use super::filter::tolerates;
use super::pod_info::PodInfo;
use super::world::{Node, World};
use super::{interpod, spread};

const MAX: i64 = 100;

/// Scores of the nodes, in their order. Higher is better.
pub fn scores(world: &World, pod: &PodInfo, nodes: &[&Node]) -> Vec<i64> {
    let mut totals = vec![0; nodes.len()];
    let mut add = |weight: i64, scores: Vec<i64>| {
        for (total, score) in totals.iter_mut().zip(scores) {
            *total += weight * score;
        }
    };
    add(3, reversed(&nodes.iter().map(|node| intolerable(pod, node)).collect::<Vec<_>>()));
    add(2, normalized(&nodes.iter().map(|node| preferred(pod, node)).collect::<Vec<_>>()));
    add(1, nodes.iter().map(|node| least_allocated(pod, node)).collect());
    add(1, nodes.iter().map(|node| balanced(pod, node)).collect());
    add(1, nodes.iter().map(|node| images(world, pod, node)).collect());
    if let Some(crowding) = spread::crowding(world, pod, nodes) {
        add(2, between(&crowding, true));
    }
    if let Some(wishes) = interpod::scores(world, pod, nodes) {
        add(2, between(&wishes, false));
    }
    totals
}

/// Scaled so that the largest is 100.
fn normalized(scores: &[i64]) -> Vec<i64> {
    let most = scores.iter().max().copied().unwrap_or(0);
    scores.iter().map(|score| if most == 0 { 0 } else { score * MAX / most }).collect()
}

/// Scaled so that none is 100 and the most is 0.
fn reversed(scores: &[i64]) -> Vec<i64> {
    let most = scores.iter().max().copied().unwrap_or(0);
    scores.iter().map(|score| if most == 0 { MAX } else { MAX - score * MAX / most }).collect()
}

/// Scaled so that least and most become 0 and 100, or the other way round.
fn between(scores: &[i64], less_is_better: bool) -> Vec<i64> {
    let (least, most) = (scores.iter().min().copied().unwrap_or(0), scores.iter().max().copied().unwrap_or(0));
    let scaled = |score: &i64| match most - least {
        0 if less_is_better => MAX,
        0 => 0,
        span if less_is_better => (most - score) * MAX / span,
        span => (score - least) * MAX / span,
    };
    scores.iter().map(scaled).collect()
}

fn intolerable(pod: &PodInfo, node: &Node) -> i64 {
    let wishes = node.taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
    i64::try_from(wishes.filter(|taint| !tolerates(&pod.tolerations, taint)).count()).unwrap_or(i64::MAX)
}

fn preferred(pod: &PodInfo, node: &Node) -> i64 {
    let terms = pod.rules.iter().flat_map(|rules| &rules.node_preferred);
    terms.filter(|term| term.matches(&node.name, &node.labels)).map(|term| i64::from(term.weight())).sum()
}

fn least_allocated(pod: &PodInfo, node: &Node) -> i64 {
    let free = |used: i64, all: i64| if all == 0 || used > all { 0 } else { (all - used) * MAX / all };
    let cpu = free(node.estimated.0 + pod.estimated.0, node.allocatable.milli_cpu);
    let memory = free(node.estimated.1 + pod.estimated.1, node.allocatable.memory);
    (cpu + memory) / 2
}

fn balanced(pod: &PodInfo, node: &Node) -> i64 {
    #[expect(clippy::cast_precision_loss, reason = "a score needs no more than 53 bits")]
    let fraction = |used: i64, all: i64| if all == 0 { 1.0 } else { (used as f64 / all as f64).min(1.0) };
    let cpu = fraction(node.requested.milli_cpu + pod.requests.milli_cpu, node.allocatable.milli_cpu);
    let memory = fraction(node.requested.memory + pod.requests.memory, node.allocatable.memory);
    #[expect(clippy::cast_possible_truncation, reason = "between 0 and 100")]
    let score = ((1.0 - (cpu - memory).abs() / 2.0) * 100.0) as i64;
    score
}

/// How much of the pod's images the node has, between 23 MB and 1 GB a container; widespread images count more.
fn images(world: &World, pod: &PodInfo, node: &Node) -> i64 {
    const MIB: i64 = 1 << 20;
    let all = i64::try_from(world.nodes().count()).unwrap_or(i64::MAX).max(1);
    let having = |image: &str| world.nodes().filter(|node| node.images.contains_key(image)).count();
    let present = pod.images.iter().filter_map(|image| Some((image, *node.images.get(image)?)));
    let sum: i64 = present.map(|(image, size)| size * i64::try_from(having(image)).unwrap_or(0) / all).sum();
    let (low, high) = (23 * MIB, 1000 * MIB * i64::try_from(pod.images.len()).unwrap_or(1).max(1));
    MAX * (sum.clamp(low, high) - low) / (high - low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::testing::{node, pod, world};
    use serde_json::json;

    fn best(world: &World, pod: &PodInfo) -> Box<str> {
        let nodes: Vec<&Node> = world.nodes().collect();
        let scores = scores(world, pod, &nodes);
        let best = scores.iter().enumerate().max_by_key(|(_, score)| **score).unwrap().0;
        nodes[best].name.clone()
    }

    #[test]
    fn the_emptier_the_preferred_and_the_untainted_node_win() {
        let busy =
            json!({"spec": {"nodeName": "a", "containers": [{"name": "c", "resources": {"requests": {"cpu": "2"}}}]}});
        let cluster = world(&[node("a", json!({})), node("b", json!({}))], &[pod("x", busy)]);
        assert_eq!(&*best(&cluster, &pod("p", json!({}))), "b");
        let wants_a = json!({"spec": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 1, "preference": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["a"]}]}}]}}}});
        assert_eq!(&*best(&cluster, &pod("p", wants_a)), "a");
        let tainted = json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}});
        let cluster = world(&[node("a", json!({})), node("b", tainted)], &[]);
        assert_eq!(&*best(&cluster, &pod("p", json!({}))), "a");
    }

    #[test]
    fn pods_of_one_owner_spread() {
        let owned = |name: &str, node: Option<&str>| {
            pod(
                name,
                json!({"metadata": {"ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": "r",
                "controller": true}]}, "spec": {"nodeName": node}}),
            )
        };
        let cluster = world(&[node("a", json!({})), node("b", json!({}))], &[owned("x", Some("a"))]);
        assert_eq!(&*best(&cluster, &owned("p", None)), "b");
    }
}
