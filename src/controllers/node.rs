//! Node lifecycle: a node that stops reporting becomes Unknown, taints follow from conditions, pods of lost nodes become
//! unready. What has to leave tainted nodes is [`super::eviction`]'s business.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, NodeCondition, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use super::Term;
use super::api::{Api, PatchKind};
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{LEASES, NODES, PODS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::zone::{Count, Turns, Zone};

/// How often each node is looked at.
const PERIOD: Duration = Duration::from_secs(5);
/// Silence after which a node is Unknown (upstream's defaults, 1.35).
const GRACE: Duration = Duration::from_secs(50);
const STARTUP_GRACE: Duration = Duration::from_secs(60);
/// Where kubelets renew their leases.
const LEASE_NAMESPACE: &str = "kube-node-lease";

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions and the taint that `True` brings.
const PRESSURES: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (nodes, leases, pods) = (term.informers.of(&NODES), term.informers.of(&LEASES), term.informers.of(&PODS));
    let api = term.api("node-controller");
    let subscriptions = vec![enqueue_self(&queue, &nodes), enqueue_on_renewal(&queue, &leases)];
    let reconcile = Arc::new(NodeLifecycle {
        events: term.recorder.events(&api, "node-controller"),
        api,
        nodes: nodes.clone(),
        leases: leases.clone(),
        pods: pods.clone(),
        seen: Mutex::default(),
        turns: Mutex::default(),
    });
    let needs = vec![nodes, leases, pods];
    term.start(Controller { name: "node-lifecycle", queue, concurrency: 4, needs, subscriptions, reconcile });
}

/// A first lease of a node is news; later renewals are noticed on the regular look.
fn enqueue_on_renewal(queue: &Arc<Queue>, leases: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    leases.subscribe(move |delta| {
        if let (None, Some(new)) = (&delta.old, &delta.new)
            && new.key.namespace() == LEASE_NAMESPACE
        {
            queue.add(Key::new("", new.key.name()));
        }
    })
}

/// When a node was last heard of, on our clock.
#[derive(Clone, Debug)]
struct Seen {
    uid: Box<str>,
    lease_revision: u64,
    heartbeat: Option<Time>,
    at: Instant,
}

struct NodeLifecycle {
    api: Api,
    events: Events,
    nodes: Arc<Informer>,
    leases: Arc<Informer>,
    pods: Arc<Informer>,
    seen: Mutex<HashMap<Key, Seen>>,
    turns: Mutex<Turns>,
}

fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind)
}

/// The conditions of a node that fell silent; `None` when they say so already.
pub fn silent_conditions(node: &Node, now: Timestamp) -> Option<Vec<NodeCondition>> {
    let mut conditions = node.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
    let mut changed = false;
    for kind in ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"] {
        match conditions.iter_mut().find(|condition| condition.type_ == kind) {
            None => {
                changed = true;
                conditions.push(NodeCondition {
                    type_: kind.to_owned(),
                    status: "Unknown".to_owned(),
                    reason: Some("NodeStatusNeverUpdated".to_owned()),
                    message: Some("Kubelet never posted node status.".to_owned()),
                    last_heartbeat_time: node.metadata.creation_timestamp.clone(),
                    last_transition_time: Some(Time(now)),
                });
            }
            Some(condition) if condition.status != "Unknown" => {
                changed = true;
                condition.status = "Unknown".to_owned();
                condition.reason = Some("NodeStatusUnknown".to_owned());
                condition.message = Some("Kubelet stopped posting node status.".to_owned());
                condition.last_transition_time = Some(Time(now));
            }
            Some(_) => {}
        }
    }
    changed.then_some(conditions)
}

/// The taints that a node's conditions ask for; `None` when it has just these. `evict`: NoExecute taints may be added.
pub fn taints(node: &Node, evict: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    match condition(node, "Ready").map(|ready| ready.status.as_str()) {
        Some("True") | None => {}
        Some("Unknown") => wanted.extend([(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]),
        Some(_) => wanted.extend([(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]),
    }
    for (kind, taint) in PRESSURES {
        if condition(node, kind).is_some_and(|condition| condition.status == "True") {
            wanted.push((taint, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    if !evict {
        wanted.retain(|(_, effect)| *effect != "NoExecute");
    }
    let present = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
    // Before a node reports for the first time, the taint it was registered with stays.
    let reported = condition(node, "Ready").is_some();
    let ours = |taint: &Taint| match (taint.key.as_str(), taint.effect.as_str()) {
        (NOT_READY | UNREACHABLE, "NoSchedule" | "NoExecute") => reported,
        (UNSCHEDULABLE, "NoSchedule") => true,
        (key, "NoSchedule") => PRESSURES.iter().any(|(_, taint)| *taint == key),
        _ => false,
    };
    let is = |taint: &Taint, (key, effect): &(&str, &str)| taint.key == *key && taint.effect == *effect;
    let mut result: Vec<Taint> =
        present.iter().filter(|taint| !ours(taint) || wanted.iter().any(|pair| is(taint, pair))).cloned().collect();
    for pair in &wanted {
        if !result.iter().any(|taint| is(taint, pair)) {
            let (key, effect) = (pair.0.to_owned(), pair.1.to_owned());
            result.push(Taint { key, effect, value: None, time_added: Some(Time(now)) });
        }
    }
    (result != present).then_some(result)
}

impl Reconcile for NodeLifecycle {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl NodeLifecycle {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.nodes.get(key) else {
            self.forget(key);
            return Ok(Next::Done);
        };
        let node: Node = object.decode()?;
        let mut object = object;
        let mut node = node;
        let silence = self.silence(&object, &node);
        let grace = if condition(&node, "Ready").is_none() { STARTUP_GRACE } else { GRACE };
        if silence > grace
            && let Some(conditions) = silent_conditions(&node, Timestamp::now())
        {
            let was_ready = condition(&node, "Ready").is_some_and(|ready| ready.status == "True");
            let status = node.status.get_or_insert_default();
            status.conditions = Some(conditions);
            object = self.api.update_status(&NODES, &object, status).await?;
            node = object.decode()?;
            if was_ready {
                let message = format!("Node {} status is now: NodeNotReady", key.name());
                self.events.tell(&NODES, &object, EventType::Normal, "NodeNotReady", message);
            }
        }
        let ready = condition(&node, "Ready").map(|ready| ready.status.clone());
        if ready.as_deref().is_some_and(|ready| ready != "True") {
            self.mark_pods_not_ready(key.name()).await?;
        }
        let evict = self.may_evict(&object, &node);
        if let Some(taints) = taints(&node, evict, Timestamp::now()) {
            let patch = json!({
                "metadata": {"uid": &*object.uid, "resourceVersion": object.resource_version.to_string()},
                "spec": {"taints": taints},
            });
            self.api.patch(&NODES, key, "", PatchKind::Merge, &patch).await?;
        }
        Ok(Next::After(PERIOD))
    }

    fn forget(&self, key: &Key) {
        if let Some(seen) = self.seen.lock().remove(key) {
            let about = k8s_openapi::api::core::v1::ObjectReference {
                kind: Some("Node".to_owned()),
                name: Some(key.name().to_owned()),
                uid: Some(seen.uid.to_string()),
                ..Default::default()
            };
            let message = format!("Node {0} event: Removing Node {0} from Controller", key.name());
            self.events.tell_about(about, EventType::Normal, "RemovingNode", message);
        }
    }

    /// How long nothing has been heard of the node, neither by its status nor by its lease.
    fn silence(&self, object: &Object, node: &Node) -> Duration {
        let lease = self.leases.get(&Key::new(LEASE_NAMESPACE, object.key.name()));
        let lease_revision = lease.as_ref().map_or(0, |lease| lease.resource_version);
        let heartbeat = condition(node, "Ready").and_then(|ready| ready.last_heartbeat_time.clone());
        let now = Instant::now();
        let mut seen = self.seen.lock();
        if let Some(known) = seen.get_mut(&object.key)
            && known.uid == object.uid
        {
            if known.lease_revision != lease_revision || known.heartbeat != heartbeat {
                *known = Seen { uid: object.uid.clone(), lease_revision, heartbeat, at: now };
            }
            return now - known.at;
        }
        let message = format!("Node {0} event: Registered Node {0} in Controller", object.key.name());
        self.events.tell(&NODES, object, EventType::Normal, "RegisteredNode", message);
        seen.insert(object.key.clone(), Seen { uid: object.uid.clone(), lease_revision, heartbeat, at: now });
        Duration::ZERO
    }

    /// Whether the node may have NoExecute taints for its silence: it has them already, or it is its turn.
    fn may_evict(&self, object: &Object, node: &Node) -> bool {
        let mut zones: HashMap<Zone, Count> = HashMap::new();
        let mut own = Count::default();
        let all: Vec<Arc<Object>> = self.nodes.read().iter().cloned().collect();
        for other in &all {
            let decoded: Option<Node> = other.decode().ok();
            // One that never reported counts neither way, as it has nothing to lose.
            let Some(ready) = decoded.as_ref().and_then(|node| condition(node, "Ready")) else { continue };
            let count = zones.entry(Zone::of(&other.labels)).or_default();
            if ready.status == "True" { count.ready += 1 } else { count.silent += 1 }
        }
        let zone = Zone::of(&object.labels);
        if let Some(count) = zones.get(&zone) {
            own = *count;
        }
        let mut turns = self.turns.lock();
        if turns.observe(&zones) {
            // Nobody was heard while we were cut off: everybody gets the time to report again.
            self.seen.lock().values_mut().for_each(|seen| seen.at = Instant::now());
        }
        if turns.is_halted() {
            return false;
        }
        let present = node.spec.as_ref().and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        let tainted = present
            .iter()
            .any(|taint| taint.effect == "NoExecute" && (taint.key == UNREACHABLE || taint.key == NOT_READY));
        let ready = condition(node, "Ready").is_none_or(|ready| ready.status == "True");
        tainted || ready || turns.take(&zone, own, Instant::now())
    }

    async fn mark_pods_not_ready(&self, node: &str) -> Result<(), ReconcileError> {
        let pods: Vec<Arc<Object>> =
            self.pods.read().on_node(node).filter(|pod| pod.pod.ready && pod.is_active()).cloned().collect();
        for object in pods {
            let pod: Pod = object.decode()?;
            let Some(mut status) = pod.status else { continue };
            for condition in status.conditions.iter_mut().flatten().filter(|condition| condition.type_ == "Ready") {
                condition.status = "False".to_owned();
                condition.last_transition_time = Some(Time(Timestamp::now()));
            }
            match self.api.update_status(&PODS, &object, &status).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
            self.events.tell(&PODS, &object, EventType::Warning, "NodeNotReady", "Node is not ready".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    fn node(ready: &str, spec: Value) -> Node {
        let conditions = if ready.is_empty() { json!([]) } else { json!([{"type": "Ready", "status": ready}]) };
        serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec, "status": {"conditions": conditions}}))
            .unwrap()
    }

    fn pairs(taints: Option<Vec<Taint>>) -> Option<Vec<String>> {
        let short = |taint: Taint| format!("{}:{}", taint.key.rsplit('/').next().unwrap_or_default(), taint.effect);
        taints.map(|taints| taints.into_iter().map(short).collect())
    }

    #[test]
    fn taints_follow_conditions_and_leave_others_alone() {
        let own = json!({"taints": [{"key": "mine", "effect": "NoSchedule"}]});
        assert_eq!(taints(&node("True", own.clone()), true, NOW), None);
        let expected = ["mine:NoSchedule", "unreachable:NoSchedule", "unreachable:NoExecute"];
        assert_eq!(pairs(taints(&node("Unknown", own.clone()), true, NOW)), Some(expected.map(str::to_owned).to_vec()));
        let calm = ["mine:NoSchedule", "not-ready:NoSchedule"];
        assert_eq!(pairs(taints(&node("False", own), false, NOW)), Some(calm.map(str::to_owned).to_vec()));
        let back = json!({"taints": [{"key": UNREACHABLE, "effect": "NoExecute"}, {"key": NOT_READY, "effect": "NoSchedule"}]});
        assert_eq!(pairs(taints(&node("True", back.clone()), true, NOW)), Some(vec![]));
        // Registered, but never reported: what it came with stays.
        assert_eq!(taints(&node("", back), true, NOW), None);
        let cordoned = taints(&node("True", json!({"unschedulable": true})), true, NOW);
        assert_eq!(pairs(cordoned), Some(vec!["unschedulable:NoSchedule".to_owned()]));
    }

    #[test]
    fn a_silent_node_becomes_unknown_once() {
        let node = node("True", json!({}));
        let conditions = silent_conditions(&node, NOW).unwrap();
        assert_eq!(conditions.len(), 4);
        assert_eq!(
            (conditions[0].status.as_str(), conditions[0].reason.as_deref()),
            ("Unknown", Some("NodeStatusUnknown"))
        );
        assert_eq!(conditions[1].reason.as_deref(), Some("NodeStatusNeverUpdated"));
        let mut silent = node;
        silent.status.as_mut().unwrap().conditions = Some(conditions);
        assert_eq!(silent_conditions(&silent, NOW), None);
    }
}
