//! Pods spread evenly over domains (upstream's PodTopologySpread).

use std::collections::HashMap;

use super::filter::{Plugin, Rejection, tolerates_all};
use super::pod_info::{PodInfo, Spread};
use super::world::{Node, World};

/// Matching pods by domain, per hard constraint.
#[derive(Clone, Debug, Default)]
pub struct SpreadState {
    counts: Vec<HashMap<Box<str>, i64>>,
}

fn constraints(pod: &PodInfo, hard: bool) -> impl Iterator<Item = &Spread> {
    pod.rules.iter().flat_map(|rules| &rules.spread).filter(move |spread| spread.hard == hard)
}

fn matches(spread: &Spread, pod: &PodInfo, other: &PodInfo) -> bool {
    !other.deleting && other.key.namespace() == pod.key.namespace() && spread.selector.matches(&other.labels)
}

/// Whether a node takes part in a constraint.
fn eligible(spread: &Spread, pod: &PodInfo, node: &Node) -> bool {
    (!spread.honor_affinity || pod.admits_node(&node.name, &node.labels))
        && (!spread.honor_taints || tolerates_all(&pod.tolerations, &node.taints))
}

impl SpreadState {
    /// `None` when the pod has no hard constraint.
    pub fn new(world: &World, pod: &PodInfo) -> Option<SpreadState> {
        let hard: Vec<&Spread> = constraints(pod, true).collect();
        if hard.is_empty() {
            return None;
        }
        let mut state = SpreadState { counts: vec![HashMap::new(); hard.len()] };
        for node in world.nodes() {
            if !hard.iter().all(|spread| node.labels.get(&spread.topology_key).is_some()) {
                continue;
            }
            for (spread, counts) in hard.iter().zip(&mut state.counts) {
                let Some(domain) = node.labels.get(&spread.topology_key) else { continue };
                if eligible(spread, pod, node) {
                    let here = node.pods.iter().filter(|other| matches(spread, pod, other)).count();
                    *counts.entry(domain.into()).or_default() += i64::try_from(here).unwrap_or(i64::MAX);
                }
            }
        }
        Some(state)
    }

    /// Counts another pod in or out.
    pub fn adjust(&mut self, pod: &PodInfo, other: &PodInfo, node: &Node, added: bool) {
        for (spread, counts) in constraints(pod, true).zip(&mut self.counts) {
            let Some(domain) = node.labels.get(&spread.topology_key) else { continue };
            if eligible(spread, pod, node)
                && matches(spread, pod, other)
                && let Some(count) = counts.get_mut(domain)
            {
                *count += if added { 1 } else { -1 };
            }
        }
    }

    /// Whether the node's domains stay within the skew.
    pub fn check(&self, pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
        for (spread, counts) in constraints(pod, true).zip(&self.counts) {
            let Some(domain) = node.labels.get(&spread.topology_key) else {
                let reason = "node(s) didn't match pod topology spread constraints (missing required label)";
                return Err(Rejection::new(Plugin::PodTopologySpread, reason, true));
            };
            let domains = i32::try_from(counts.len()).unwrap_or(i32::MAX);
            let smallest = if spread.min_domains.is_some_and(|wanted| domains < wanted) {
                0
            } else {
                counts.values().min().copied().unwrap_or(0)
            };
            let own = i64::from(spread.selector.matches(&pod.labels));
            let here = counts.get(domain).copied().unwrap_or(0);
            if here + own - smallest > i64::from(spread.max_skew) {
                let reason = "node(s) didn't match pod topology spread constraints";
                return Err(Rejection::new(Plugin::PodTopologySpread, reason, false));
            }
        }
        Ok(())
    }
}

/// Crowdedness of each node's domains by the soft constraints, or, when the pod has no constraint at all, by pods of the
/// same controller on the same host and zone. Less is better.
pub fn crowding(world: &World, pod: &PodInfo, nodes: &[&Node]) -> Option<Vec<i64>> {
    let soft: Vec<&Spread> = constraints(pod, false).collect();
    if soft.is_empty() {
        if constraints(pod, true).next().is_some() {
            return None;
        }
        let owner = pod.owner.as_deref()?;
        let of_owner = |other: &PodInfo| !other.deleting && other.owner.as_deref() == Some(owner);
        let keys = ["kubernetes.io/hostname", "topology.kubernetes.io/zone"];
        return Some(sum_over(world, nodes, &keys, &|_, other| of_owner(other)));
    }
    let keys: Vec<&str> = soft.iter().map(|spread| &*spread.topology_key).collect();
    Some(sum_over(world, nodes, &keys, &|index, other| matches(soft[index], pod, other)))
}

fn sum_over(world: &World, nodes: &[&Node], keys: &[&str], counts: &dyn Fn(usize, &PodInfo) -> bool) -> Vec<i64> {
    let mut by_domain: HashMap<(usize, &str), i64> = HashMap::new();
    for node in world.nodes() {
        for (index, key) in keys.iter().enumerate() {
            let Some(domain) = node.labels.get(key) else { continue };
            let here = node.pods.iter().filter(|other| counts(index, other)).count();
            *by_domain.entry((index, domain)).or_default() += i64::try_from(here).unwrap_or(i64::MAX);
        }
    }
    let crowd = |node: &&Node| {
        keys.iter().enumerate().filter_map(|(index, key)| by_domain.get(&(index, node.labels.get(key)?))).sum::<i64>()
    };
    nodes.iter().map(crowd).collect()
}

#[cfg(test)]
mod tests {
    use crate::scheduler::filter::{PodState, check};
    use crate::scheduler::testing::{node, pod, world};
    use serde_json::json;

    #[test]
    fn a_hard_constraint_keeps_the_skew_and_wants_the_label() {
        let zoned = |name: &str, zone: &str| node(name, json!({"metadata": {"labels": {"zone": zone}}}));
        let there = |name: &str, node: &str| {
            pod(name, json!({"metadata": {"labels": {"app": "x"}}, "spec": {"nodeName": node}}))
        };
        let world = world(
            &[zoned("a", "1"), zoned("b", "2"), node("c", json!({}))],
            &[there("p", "a"), there("q", "a"), there("r", "b")],
        );
        let new = pod(
            "new",
            json!({"metadata": {"labels": {"app": "x"}}, "spec": {"topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app": "x"}}}]}}),
        );
        let state = PodState::new(&world, &new);
        let verdicts: Vec<Option<String>> =
            world.nodes().map(|node| check(&world, &state, &new, node).err().map(|r| r.reasons[0].clone())).collect();
        assert_eq!(
            verdicts,
            [
                Some("node(s) didn't match pod topology spread constraints".to_owned()),
                None,
                Some("node(s) didn't match pod topology spread constraints (missing required label)".to_owned())
            ]
        );
    }
}
