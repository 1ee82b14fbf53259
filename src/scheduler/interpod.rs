//! Pods that want to be with others or away from them (upstream's InterPodAffinity).

use std::collections::HashMap;

use super::filter::{Plugin, Rejection};
use super::pod_info::{PodInfo, PodTerm};
use super::world::{Node, World};

/// Number of matching pods by topology key and value.
type Counts = HashMap<(Box<str>, Box<str>), i64>;

/// How the pods in the cluster bear on one pod.
#[derive(Clone, Debug, Default)]
pub struct AffinityState {
    /// Domains where pods are that want to be away from this one.
    repelling: Counts,
    /// Domains of pods that match all of this pod's affinity terms.
    attracting: Counts,
    /// Domains of pods that match one of this pod's anti-affinity terms.
    repelled: Counts,
    /// This pod matches its own affinity terms: it may be the first of its group.
    attracts_itself: bool,
}

fn affinity(pod: &PodInfo) -> &[PodTerm] {
    pod.rules.as_ref().map_or(&[], |rules| &rules.affinity)
}

fn anti_affinity(pod: &PodInfo) -> &[PodTerm] {
    pod.rules.as_ref().map_or(&[], |rules| &rules.anti_affinity)
}

fn count(counts: &mut Counts, term: &PodTerm, node: &Node, by: i64) {
    if let Some(value) = node.labels.get(&term.topology_key) {
        let key = (term.topology_key.clone(), value.into());
        let total = counts.entry(key.clone()).or_default();
        *total += by;
        if *total == 0 {
            counts.remove(&key);
        }
    }
}

fn counted(counts: &Counts, term: &PodTerm, node: &Node) -> bool {
    node.labels
        .get(&term.topology_key)
        .is_some_and(|value| counts.get(&(term.topology_key.clone(), value.into())).is_some_and(|count| *count > 0))
}

impl AffinityState {
    /// `None` when neither the pod nor any other has something to say.
    pub fn new(world: &World, pod: &PodInfo) -> Option<AffinityState> {
        let picky = !affinity(pod).is_empty() || !anti_affinity(pod).is_empty();
        let mut state = AffinityState::default();
        let mut concerned = picky;
        for node in world.nodes() {
            for other in &node.pods {
                if picky || !anti_affinity(other).is_empty() {
                    concerned = true;
                    state.adjust(world, pod, other, node, true);
                }
            }
        }
        if !concerned {
            return None;
        }
        let own = world.namespace_labels(pod.key.namespace());
        state.attracts_itself = affinity(pod).iter().all(|term| term.matches(pod, &own));
        Some(state)
    }

    /// Counts another pod in or out.
    pub fn adjust(&mut self, world: &World, pod: &PodInfo, other: &PodInfo, node: &Node, added: bool) {
        let by = if added { 1 } else { -1 };
        let own_namespace = world.namespace_labels(pod.key.namespace());
        for term in anti_affinity(other).iter().filter(|term| term.matches(pod, &own_namespace)) {
            count(&mut self.repelling, term, node, by);
        }
        if other.deleting && affinity(pod).is_empty() && anti_affinity(pod).is_empty() {
            return;
        }
        let their_namespace = world.namespace_labels(other.key.namespace());
        let wanted = affinity(pod);
        if !wanted.is_empty() && wanted.iter().all(|term| term.matches(other, &their_namespace)) {
            wanted.iter().for_each(|term| count(&mut self.attracting, term, node, by));
        }
        for term in anti_affinity(pod).iter().filter(|term| term.matches(other, &their_namespace)) {
            count(&mut self.repelled, term, node, by);
        }
    }

    /// Whether the node suits.
    pub fn check(&self, pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
        let reject = |reason, unresolvable| Err(Rejection::new(Plugin::InterPodAffinity, reason, unresolvable));
        let labelled = affinity(pod).iter().all(|term| node.labels.get(&term.topology_key).is_some());
        let attracted = affinity(pod).iter().all(|term| counted(&self.attracting, term, node));
        if !labelled || !(attracted || (self.attracting.is_empty() && self.attracts_itself)) {
            return reject("node(s) didn't match pod affinity rules", true);
        }
        if anti_affinity(pod).iter().any(|term| counted(&self.repelled, term, node)) {
            return reject("node(s) didn't match pod anti-affinity rules", false);
        }
        let here = |(key, value): &(Box<str>, Box<str>)| node.labels.get(key) == Some(&**value);
        if self.repelling.iter().any(|(domain, count)| *count > 0 && here(domain)) {
            return reject("node(s) didn't satisfy existing pods anti-affinity rules", false);
        }
        Ok(())
    }
}

/// Weight of the wishes of this pod and of those there (required affinity of others counts 1), by node.
pub fn scores(world: &World, pod: &PodInfo, nodes: &[&Node]) -> Option<Vec<i64>> {
    let own_namespace = world.namespace_labels(pod.key.namespace());
    let mut weights = Counts::new();
    let mut concerned = false;
    for node in world.nodes() {
        for other in &node.pods {
            let their_namespace = world.namespace_labels(other.key.namespace());
            for term in pod.rules.iter().flat_map(|rules| &rules.preferred) {
                if term.matches(other, &their_namespace) {
                    concerned = true;
                    count(&mut weights, term, node, i64::from(term.weight));
                }
            }
            let Some(rules) = &other.rules else { continue };
            let wishes = rules.preferred.iter().map(|term| (term, i64::from(term.weight)));
            for (term, weight) in wishes.chain(rules.affinity.iter().map(|term| (term, 1))) {
                if term.matches(pod, &own_namespace) {
                    concerned = true;
                    count(&mut weights, term, node, weight);
                }
            }
        }
    }
    if !concerned {
        return None;
    }
    let total = |node: &&Node| {
        weights
            .iter()
            .filter(|((key, value), _)| node.labels.get(key) == Some(&**value))
            .map(|(_, weight)| *weight)
            .sum::<i64>()
    };
    Some(nodes.iter().map(total).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::filter::{PodState, check};
    use crate::scheduler::testing::{node, pod, world};
    use serde_json::{Value, json};

    fn term(kind: &str, app: &str) -> Value {
        json!({kind: {"requiredDuringSchedulingIgnoredDuringExecution": [
            {"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": "kubernetes.io/hostname"}]}})
    }

    fn placed(name: &str, node: &str, app: &str, affinity: Value) -> std::sync::Arc<PodInfo> {
        pod(name, json!({"metadata": {"labels": {"app": app}}, "spec": {"nodeName": node, "affinity": affinity}}))
    }

    fn fits(pods: &[std::sync::Arc<PodInfo>], app: &str, affinity: Value) -> Vec<Option<String>> {
        let world = world(&[node("a", json!({})), node("b", json!({}))], pods);
        let new = pod("new", json!({"metadata": {"labels": {"app": app}}, "spec": {"affinity": affinity}}));
        let state = PodState::new(&world, &new);
        world.nodes().map(|node| check(&world, &state, &new, node).err().map(|r| r.reasons[0].clone())).collect()
    }

    #[test]
    fn affinity_goes_where_friends_are_and_the_first_of_a_group_anywhere() {
        let friend = [placed("f", "b", "web", Value::Null)];
        let away = Some("node(s) didn't match pod affinity rules".to_owned());
        assert_eq!(fits(&friend, "x", term("podAffinity", "web")), [away.clone(), None]);
        assert_eq!(fits(&[], "web", term("podAffinity", "web")), [None, None]);
        assert_eq!(fits(&[], "x", term("podAffinity", "web")), [away.clone(), away]);
    }

    #[test]
    fn anti_affinity_holds_both_ways() {
        let own = fits(&[placed("o", "a", "web", Value::Null)], "x", term("podAntiAffinity", "web"));
        assert_eq!(own, [Some("node(s) didn't match pod anti-affinity rules".to_owned()), None]);
        let theirs = fits(&[placed("o", "a", "y", term("podAntiAffinity", "x"))], "x", Value::Null);
        assert_eq!(theirs, [Some("node(s) didn't satisfy existing pods anti-affinity rules".to_owned()), None]);
    }
}
