//! Which nodes a pod fits on, plug-in by plug-in in upstream's order, with upstream's reasons.

use k8s_openapi::api::core::v1::{Taint, Toleration};

use super::interpod::AffinityState;
use super::pod_info::PodInfo;
use super::spread::SpreadState;
use super::volumes;
use super::world::{Node, World};

/// A plug-in that can reject a node; what later makes the pod worth another try depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plugin {
    NodeUnschedulable,
    NodeName,
    TaintToleration,
    NodeAffinity,
    NodePorts,
    NodeResourcesFit,
    VolumeBinding,
    PodTopologySpread,
    InterPodAffinity,
}

/// Why a pod does not fit on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// Who says so.
    pub plugin: Plugin,
    /// In upstream's words.
    pub reasons: Vec<String>,
    /// Deleting pods from the node would not help.
    pub unresolvable: bool,
}

impl Rejection {
    /// A rejection for one reason.
    pub fn new(plugin: Plugin, reason: &str, unresolvable: bool) -> Rejection {
        Rejection { plugin, reasons: vec![reason.to_owned()], unresolvable }
    }
}

/// What is computed once per pod, over all nodes.
pub struct PodState {
    affinity: Option<AffinityState>,
    spread: Option<SpreadState>,
}

impl PodState {
    /// Prepares for a pod.
    pub fn new(world: &World, pod: &PodInfo) -> PodState {
        PodState { affinity: AffinityState::new(world, pod), spread: SpreadState::new(world, pod) }
    }

    /// As if `other` were added to (or removed from) a node.
    pub fn adjust(&mut self, world: &World, pod: &PodInfo, other: &PodInfo, node: &Node, added: bool) {
        if let Some(affinity) = &mut self.affinity {
            affinity.adjust(world, pod, other, node, added);
        }
        if let Some(spread) = &mut self.spread {
            spread.adjust(pod, other, node, added);
        }
    }
}

impl Clone for PodState {
    fn clone(&self) -> PodState {
        PodState { affinity: self.affinity.clone(), spread: self.spread.clone() }
    }
}

/// Whether the pod fits on the node as it is.
pub fn check(world: &World, state: &PodState, pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    unschedulable(pod, node)?;
    name(pod, node)?;
    taints(pod, node)?;
    affinity(pod, node)?;
    ports(pod, node)?;
    resources(pod, node)?;
    volumes::check(world, pod, node)?;
    if let Some(spread) = &state.spread {
        spread.check(pod, node)?;
    }
    if let Some(affinity) = &state.affinity {
        affinity.check(pod, node)?;
    }
    Ok(())
}

fn unschedulable(pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    let taint = Taint {
        key: "node.kubernetes.io/unschedulable".to_owned(),
        effect: "NoSchedule".to_owned(),
        ..Taint::default()
    };
    if node.unschedulable && !tolerates(&pod.tolerations, &taint) {
        return Err(Rejection::new(Plugin::NodeUnschedulable, "node(s) were unschedulable", true));
    }
    Ok(())
}

fn name(pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    match &pod.node {
        Some(wanted) if **wanted != *node.name => {
            Err(Rejection::new(Plugin::NodeName, "node(s) didn't match the requested node name", true))
        }
        _ => Ok(()),
    }
}

fn taints(pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    if tolerates_all(&pod.tolerations, &node.taints) {
        return Ok(());
    }
    Err(Rejection::new(Plugin::TaintToleration, "node(s) had untolerated taint(s)", true))
}

fn affinity(pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    if pod.admits_node(&node.name, &node.labels) {
        return Ok(());
    }
    Err(Rejection::new(Plugin::NodeAffinity, "node(s) didn't match Pod's node affinity/selector", true))
}

fn ports(pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    let taken = |port| node.pods.iter().flat_map(|other| &other.host_ports).any(|other| other.conflicts(port));
    if pod.host_ports.iter().any(taken) {
        let reason = "node(s) didn't have free ports for the requested pod ports";
        return Err(Rejection::new(Plugin::NodePorts, reason, false));
    }
    Ok(())
}

fn resources(pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    let mut reasons = Vec::new();
    let mut unresolvable = false;
    if node.pods.len() + 1 > node.max_pods {
        reasons.push("Too many pods".to_owned());
    }
    let mut need = |name: &str, wanted: i64, used: i64, all: i64| {
        if wanted > 0 && wanted > all - used {
            reasons.push(format!("Insufficient {name}"));
            unresolvable |= wanted > all;
        }
    };
    let (wanted, used, all) = (&pod.requests, &node.requested, &node.allocatable);
    need("cpu", wanted.milli_cpu, used.milli_cpu, all.milli_cpu);
    need("memory", wanted.memory, used.memory, all.memory);
    need("ephemeral-storage", wanted.ephemeral_storage, used.ephemeral_storage, all.ephemeral_storage);
    for (name, wanted) in &wanted.scalars {
        let amount = |resources: &super::pod_info::Resources| resources.scalars.get(name).copied().unwrap_or(0);
        need(name, *wanted, amount(used), amount(all));
    }
    if reasons.is_empty() {
        return Ok(());
    }
    Err(Rejection { plugin: Plugin::NodeResourcesFit, reasons, unresolvable })
}

/// Whether all taints that keep pods away are tolerated.
pub fn tolerates_all(tolerations: &[Toleration], taints: &[Taint]) -> bool {
    taints
        .iter()
        .filter(|taint| taint.effect == "NoSchedule" || taint.effect == "NoExecute")
        .all(|taint| tolerates(tolerations, taint))
}

/// Whether one of the tolerations is for the taint.
pub fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| tolerates_one(toleration, taint))
}

/// Whether a toleration is for a taint.
pub fn tolerates_one(toleration: &Toleration, taint: &Taint) -> bool {
    let set = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(str::to_owned);
    if set(&toleration.effect).is_some_and(|effect| effect != taint.effect) {
        return false;
    }
    let key = set(&toleration.key);
    if key.as_ref().is_some_and(|key| *key != taint.key) {
        return false;
    }
    match toleration.operator.as_deref().unwrap_or_default() {
        "Exists" => true,
        "" | "Equal" => {
            key.is_some()
                && toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::testing::{node, pod, world};
    use serde_json::{Value, json};

    fn verdict(node_extra: Value, pod_extra: Value) -> Option<Vec<String>> {
        let world = world(&[node("a", node_extra)], &[]);
        let pod = pod("p", pod_extra);
        let state = PodState::new(&world, &pod);
        check(&world, &state, &pod, world.node("a").unwrap()).err().map(|rejection| rejection.reasons)
    }

    fn rejected(node_extra: Value, pod_extra: Value, reason: &str) {
        assert_eq!(verdict(node_extra, pod_extra), Some(vec![reason.to_owned()]));
    }

    #[test]
    fn each_plugin_rejects_with_upstreams_words() {
        let requests = |what: Value| json!({"spec": {"containers": [{"name": "c", "resources": {"requests": what}}]}});
        assert_eq!(verdict(json!({}), json!({})), None);
        rejected(json!({"spec": {"unschedulable": true}}), json!({}), "node(s) were unschedulable");
        rejected(
            json!({}),
            json!({"spec": {"nodeSelector": {"x": "y"}}}),
            "node(s) didn't match Pod's node affinity/selector",
        );
        rejected(
            json!({"spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}}),
            json!({}),
            "node(s) had untolerated taint(s)",
        );
        rejected(json!({}), requests(json!({"cpu": "9"})), "Insufficient cpu");
        rejected(json!({}), requests(json!({"example.com/gpu": "1"})), "Insufficient example.com/gpu");
        rejected(json!({"status": {"allocatable": {"pods": "0"}}}), json!({}), "Too many pods");
        assert_eq!(
            verdict(json!({}), requests(json!({"cpu": "9", "memory": "9Ti"}))),
            Some(vec!["Insufficient cpu".to_owned(), "Insufficient memory".to_owned()])
        );
    }

    #[test]
    fn tolerations_match_by_key_value_and_effect() {
        let taint = Taint { key: "k".into(), value: Some("v".into()), effect: "NoExecute".into(), time_added: None };
        let toleration = |json: Value| tolerates_one(&serde_json::from_value(json).unwrap(), &taint);
        assert!(toleration(json!({"operator": "Exists"})));
        assert!(toleration(json!({"key": "k", "value": "v"})));
        assert!(toleration(json!({"key": "k", "operator": "Exists", "effect": "NoExecute"})));
        assert!(!toleration(json!({"key": "k", "operator": "Exists", "effect": "NoSchedule"})));
        assert!(!toleration(json!({"key": "k", "value": "w"})));
        assert!(!toleration(json!({"value": "v"})));
    }
}
