//! Where a pod goes, or why it goes nowhere.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use rand::Rng;

use super::filter::{Plugin, PodState, Rejection, check};
use super::pod_info::PodInfo;
use super::preempt::{self, Preemption};
use super::score::scores;
use super::volumes;
use super::world::{Node, World};

/// Pods that were promised a node whose victims are still leaving, by node.
pub type Nominations = HashMap<Box<str>, Vec<Arc<PodInfo>>>;

/// The decision about one pod.
#[derive(Debug)]
pub enum Decision {
    /// Bind it to this node.
    Bind(Box<str>),
    /// It fits nowhere.
    Unschedulable {
        /// Upstream's FailedScheduling message.
        message: String,
        /// Who rejected it.
        plugins: HashSet<Plugin>,
        /// Pods that are to go for it, and where.
        preemption: Option<Preemption>,
    },
}

/// Decides about a pod.
pub fn decide(world: &World, nominations: &Nominations, pod: &PodInfo) -> Decision {
    let all = world.nodes().count();
    if all == 0 {
        let message = "no nodes available to schedule pods".to_owned();
        return Decision::Unschedulable { message, plugins: HashSet::new(), preemption: None };
    }
    if let Some(obstacle) = volumes::obstacle(world, pod) {
        let preempting = format!("preemption: {}", unhelpful(all, all));
        let message = format!("0/{all} nodes are available: {obstacle}. {preempting}");
        return Decision::Unschedulable { message, plugins: HashSet::from([Plugin::VolumeBinding]), preemption: None };
    }
    let state = PodState::new(world, pod);
    let mut rejections: BTreeMap<Box<str>, Rejection> = BTreeMap::new();
    let mut feasible: Vec<&Node> = Vec::new();
    for node in world.nodes() {
        match check_with_nominated(world, &state, nominations, pod, node) {
            Ok(()) => feasible.push(node),
            Err(rejection) => drop(rejections.insert(node.name.clone(), rejection)),
        }
    }
    match feasible.as_slice() {
        [] => unschedulable(world, nominations, pod, &state, &rejections),
        [only] => Decision::Bind(only.name.clone()),
        several => Decision::Bind(best(world, pod, several)),
    }
}

/// The best node; one of the best at random.
fn best(world: &World, pod: &PodInfo, nodes: &[&Node]) -> Box<str> {
    if let Some(nominated) = &pod.nominated
        && nodes.iter().any(|node| node.name == *nominated)
    {
        return nominated.clone();
    }
    let scores = scores(world, pod, nodes);
    let most = scores.iter().max().copied().unwrap_or(0);
    let best: Vec<&&Node> =
        nodes.iter().zip(&scores).filter(|(_, score)| **score == most).map(|(node, _)| node).collect();
    best.get(rand::rng().random_range(0..best.len().max(1))).map(|node| node.name.clone()).unwrap_or_default()
}

/// A node must do with the pods that it is promised to, and without them.
pub fn check_with_nominated(
    world: &World,
    state: &PodState,
    nominations: &Nominations,
    pod: &PodInfo,
    node: &Node,
) -> Result<(), Rejection> {
    let promised = nominations.get(&node.name).into_iter().flatten();
    let promised: Vec<&Arc<PodInfo>> =
        promised.filter(|other| other.uid != pod.uid && other.priority >= pod.priority).collect();
    if !promised.is_empty() {
        let (mut full, mut adjusted) = (node.clone(), state.clone());
        for other in promised {
            full.add(other.clone());
            adjusted.adjust(world, pod, other, node, true);
        }
        check(world, &adjusted, pod, &full)?;
    }
    check(world, state, pod, node)
}

fn unschedulable(
    world: &World,
    nominations: &Nominations,
    pod: &PodInfo,
    state: &PodState,
    rejections: &BTreeMap<Box<str>, Rejection>,
) -> Decision {
    let all = world.nodes().count();
    let plugins = rejections.values().map(|rejection| rejection.plugin).collect();
    let reasons = rejections.values().flat_map(|rejection| &rejection.reasons);
    let mut message = fit_message(all, reasons.map(String::as_str));
    let preemption = match preempt::plan(world, nominations, pod, state, rejections) {
        Ok(preemption) => Some(preemption),
        Err(why) => {
            message.push_str(&format!(" preemption: {why}"));
            None
        }
    };
    Decision::Unschedulable { message, plugins, preemption }
}

/// `0/3 nodes are available: 1 Insufficient cpu, 2 Too many pods.`
pub fn fit_message<'a>(all: usize, reasons: impl Iterator<Item = &'a str>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in reasons {
        *counts.entry(reason).or_default() += 1;
    }
    let mut parts: Vec<String> = counts.into_iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    parts.sort();
    if parts.is_empty() {
        return format!("0/{all} nodes are available:");
    }
    format!("0/{all} nodes are available: {}.", parts.join(", "))
}

/// Preemption's own message when it cannot help on `nodes` of `all`.
pub fn unhelpful(all: usize, nodes: usize) -> String {
    fit_message(all, std::iter::repeat_n("Preemption is not helpful for scheduling", nodes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::testing::{node, pod, world};
    use serde_json::{Value, json};

    fn using(name: &str, cpu: &str, priority: i32, node: Value) -> Arc<PodInfo> {
        pod(
            name,
            json!({"spec": {"nodeName": node, "priority": priority,
            "containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}}),
        )
    }

    fn failure(world: &World, pod: &PodInfo) -> (String, Option<Preemption>) {
        match decide(world, &Nominations::new(), pod) {
            Decision::Unschedulable { message, preemption, .. } => (message, preemption),
            bound @ Decision::Bind(_) => panic!("{bound:?}"),
        }
    }

    #[test]
    fn failures_read_as_upstream_writes_them() {
        let cluster = world(&[], &[]);
        assert_eq!(failure(&cluster, &using("p", "1", 0, Value::Null)).0, "no nodes available to schedule pods");
        let one = world(&[node("a", json!({}))], &[using("x", "3500m", 0, json!("a"))]);
        assert_eq!(
            failure(&one, &using("p", "1", 0, Value::Null)).0,
            "0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: 1 No preemption victims found for incoming pod."
        );
        assert_eq!(
            failure(&one, &using("p", "9", 0, Value::Null)).0,
            "0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
        );
        let two = world(
            &[node("a", json!({"spec": {"unschedulable": true}})), node("b", json!({}))],
            &[using("x", "4", 0, json!("b"))],
        );
        assert_eq!(
            failure(&two, &using("p", "1", 0, Value::Null)).0,
            "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable. preemption: 0/2 nodes are available: \
             1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling."
        );
    }

    #[test]
    fn the_cheapest_victims_are_preempted() {
        let cluster = world(
            &[node("a", json!({})), node("b", json!({}))],
            &[using("a1", "2", 5, json!("a")), using("a2", "2", 1, json!("a")), using("b1", "4", 5, json!("b"))],
        );
        let (_, preemption) = failure(&cluster, &using("p", "2", 10, Value::Null));
        let preemption = preemption.unwrap();
        assert_eq!(&*preemption.node, "a");
        assert_eq!(preemption.victims.iter().map(|victim| &*victim.uid).collect::<Vec<_>>(), ["a2"]);
    }

    #[test]
    fn a_promised_node_is_kept_for_the_one_it_is_promised_to() {
        let cluster = world(&[node("a", json!({}))], &[]);
        let promised = using("first", "3", 10, Value::Null);
        let nominations = Nominations::from([("a".into(), vec![promised.clone()])]);
        assert!(matches!(
            decide(&cluster, &nominations, &using("p", "2", 0, Value::Null)),
            Decision::Unschedulable { .. }
        ));
        assert!(matches!(decide(&cluster, &nominations, &promised), Decision::Bind(_)));
        assert!(matches!(decide(&cluster, &nominations, &using("p", "2", 20, Value::Null)), Decision::Bind(_)));
    }
}
