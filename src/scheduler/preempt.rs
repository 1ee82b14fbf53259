//! Which pods of lower priority go so that a pod fits, and from which node.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::decide::{Nominations, check_with_nominated, fit_message};
use super::filter::{PodState, Rejection};
use super::pod_info::PodInfo;
use super::world::{Node, World};

/// A node to free and the pods that go.
#[derive(Debug)]
pub struct Preemption {
    /// The node.
    pub node: Box<str>,
    /// The pods, most important first.
    pub victims: Vec<Arc<PodInfo>>,
    violations: usize,
}

/// Plans a preemption; else tells why there is none, in upstream's words.
pub fn plan(
    world: &World,
    nominations: &Nominations,
    pod: &PodInfo,
    state: &PodState,
    rejections: &BTreeMap<Box<str>, Rejection>,
) -> Result<Preemption, String> {
    if pod.never_preempts {
        return Err("not eligible due to preemptionPolicy=Never.".to_owned());
    }
    if let Some(node) = pod.nominated.as_deref().and_then(|name| world.node(name)) {
        let unresolvable = rejections.get(&node.name).is_some_and(|rejection| rejection.unresolvable);
        let leaving = |other: &Arc<PodInfo>| other.priority < pod.priority && other.deleting && other.preempted;
        if !unresolvable && node.pods.iter().any(leaving) {
            return Err("not eligible due to a terminating pod on the nominated node.".to_owned());
        }
    }
    let mut candidates = Vec::new();
    let mut reasons: Vec<String> = Vec::new();
    for node in world.nodes() {
        if rejections.get(&node.name).is_none_or(|rejection| rejection.unresolvable) {
            reasons.push("Preemption is not helpful for scheduling".to_owned());
            continue;
        }
        match victims(world, nominations, pod, state, node) {
            Ok(candidate) => candidates.push(candidate),
            Err(why) => reasons.extend(why),
        }
    }
    let best = candidates.into_iter().min_by_key(|candidate| {
        let highest = candidate.victims.first().map_or(i32::MIN, |victim| victim.priority);
        let sum: i64 = candidate.victims.iter().map(|victim| i64::from(victim.priority) + (1 << 31)).sum();
        let of_highest = candidate.victims.iter().filter(|victim| victim.priority == highest);
        let earliest = of_highest.map(|victim| victim.started).min();
        (candidate.violations, highest, sum, candidate.victims.len(), Reverse(earliest))
    });
    best.ok_or_else(|| fit_message(world.nodes().count(), reasons.iter().map(String::as_str)))
}

/// The fewest and least important pods that have to leave a node.
fn victims(
    world: &World,
    nominations: &Nominations,
    pod: &PodInfo,
    state: &PodState,
    node: &Node,
) -> Result<Preemption, Vec<String>> {
    let mut candidates: Vec<Arc<PodInfo>> =
        node.pods.iter().filter(|other| other.priority < pod.priority).cloned().collect();
    if candidates.is_empty() {
        return Err(vec!["No preemption victims found for incoming pod".to_owned()]);
    }
    let (mut node, mut state) = (node.clone(), state.clone());
    for candidate in &candidates {
        node.remove(&candidate.uid);
        state.adjust(world, pod, candidate, &node, false);
    }
    check_with_nominated(world, &state, nominations, pod, &node).map_err(|rejection| rejection.reasons)?;
    candidates.sort_by_key(|candidate| (Reverse(candidate.priority), candidate.started));
    let (violating, others) = by_budget(world, candidates);
    let mut victims = Vec::new();
    let mut violations = 0;
    let protected = violating.len();
    // Those whose budget allows no disruption are spared first, then the others, the most important first.
    for (index, candidate) in violating.into_iter().chain(others).enumerate() {
        node.add(candidate.clone());
        state.adjust(world, pod, &candidate, &node, true);
        if check_with_nominated(world, &state, nominations, pod, &node).is_err() {
            node.remove(&candidate.uid);
            state.adjust(world, pod, &candidate, &node, false);
            violations += usize::from(index < protected);
            victims.push(candidate);
        }
    }
    victims.sort_by_key(|victim| (Reverse(victim.priority), victim.started));
    Ok(Preemption { node: node.name, victims, violations })
}

/// Pods whose going would break a disruption budget, and the others.
fn by_budget(world: &World, pods: Vec<Arc<PodInfo>>) -> (Vec<Arc<PodInfo>>, Vec<Arc<PodInfo>>) {
    let mut allowed: Vec<i32> = world.budgets.values().map(|budget| budget.allowed).collect();
    pods.into_iter().partition(|pod| {
        let mut violates = false;
        for (budget, allowed) in world.budgets.values().zip(&mut allowed) {
            if *budget.namespace == *pod.key.namespace() && budget.selector.matches(&pod.labels) {
                *allowed -= 1;
                violates |= *allowed < 0;
            }
        }
        violates
    })
}
