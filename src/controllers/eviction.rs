//! Pods leave nodes with NoExecute taints: at once, or as long after as their tolerations allow.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use super::Term;
use super::api::{Api, ApiError, PatchKind};
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::queue::Queue;
use super::resource::{NODES, PODS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use crate::scheduler::filter::tolerates_one;

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (pods, nodes) = (term.informers.of(&PODS), term.informers.of(&NODES));
    // Upstream's policy has no role of its own for this loop.
    let api = term.api("node-controller");
    let subscriptions = vec![enqueue_placed(&queue, &pods), enqueue_on_taints(&queue, &pods, &nodes)];
    let reconcile = Arc::new(TaintEviction {
        events: term.recorder.events(&api, "taint-eviction-controller"),
        api,
        pods: pods.clone(),
        nodes: nodes.clone(),
        planned: Mutex::default(),
    });
    let needs = vec![pods, nodes];
    term.start(Controller { name: "taint-eviction", queue, concurrency: 8, needs, subscriptions, reconcile });
}

fn enqueue_placed(queue: &Arc<Queue>, pods: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    pods.subscribe(move |delta| match (&delta.old, &delta.new) {
        (_, None) => delta.old.iter().for_each(|old| queue.add(old.key.clone())),
        (old, Some(new)) if new.node.is_some() => {
            // Tolerations can only be added, which raises the generation.
            let same = old.as_ref().is_some_and(|old| old.node == new.node && old.generation == new.generation);
            if !same {
                queue.add(new.key.clone());
            }
        }
        _ => {}
    })
}

fn enqueue_on_taints(queue: &Arc<Queue>, pods: &Arc<Informer>, nodes: &Arc<Informer>) -> Subscription {
    let (queue, pods) = (queue.clone(), pods.clone());
    nodes.subscribe(move |delta| {
        let Some(node) = &delta.new else { return };
        let before = delta.old.as_ref().map(|old| executing(old)).unwrap_or_default();
        if before != executing(node) {
            pods.read().on_node(node.key.name()).for_each(|pod| queue.add(pod.key.clone()));
        }
    })
}

/// The NoExecute taints of a node.
fn executing(node: &Object) -> Vec<Taint> {
    let node: Option<Node> = node.decode().ok();
    let taints = node.and_then(|node| node.spec?.taints).unwrap_or_default();
    taints.into_iter().filter(|taint| taint.effect == "NoExecute").collect()
}

/// How long a pod may stay.
#[derive(Debug, PartialEq, Eq)]
pub enum Stay {
    /// For ever.
    Always,
    /// This long after it first had to go.
    For(Duration),
}

/// How long the taints allow a pod with these tolerations to stay.
pub fn stay(taints: &[Taint], tolerations: &[Toleration]) -> Stay {
    let mut shortest: Option<Duration> = None;
    for taint in taints {
        let matching: Vec<&Toleration> =
            tolerations.iter().filter(|toleration| tolerates_one(toleration, taint)).collect();
        if matching.is_empty() {
            return Stay::For(Duration::ZERO);
        }
        for seconds in matching.iter().filter_map(|toleration| toleration.toleration_seconds) {
            let this = Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
            shortest = Some(shortest.map_or(this, |shortest| shortest.min(this)));
        }
    }
    shortest.map_or(Stay::Always, Stay::For)
}

struct TaintEviction {
    api: Api,
    events: Events,
    pods: Arc<Informer>,
    nodes: Arc<Informer>,
    /// Since when each pod has to go, by its key; with the uid.
    planned: Mutex<HashMap<Key, (Box<str>, Instant)>>,
}

impl Reconcile for TaintEviction {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl TaintEviction {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let pod = self.pods.get(key).filter(|pod| pod.deleting.is_none() && !pod.is_finished());
        let Some(pod) = pod else {
            self.planned.lock().remove(key);
            return Ok(Next::Done);
        };
        let node = pod.node.as_deref().and_then(|name| self.nodes.read().get(name).cloned());
        let taints = node.map(|node| executing(&node)).unwrap_or_default();
        let tolerations = match taints.is_empty() {
            true => Vec::new(),
            false => pod.decode::<Pod>()?.spec.and_then(|spec| spec.tolerations).unwrap_or_default(),
        };
        let Stay::For(allowed) = stay(&taints, &tolerations) else {
            if self.planned.lock().remove(key).is_some() {
                let message = format!("Cancelling deletion of Pod {key}");
                self.events.tell(&PODS, &pod, EventType::Normal, "TaintManagerEviction", message);
            }
            return Ok(Next::Done);
        };
        let since = self.since(&pod);
        let due = since + allowed;
        let now = Instant::now();
        if due > now {
            return Ok(Next::After(due - now));
        }
        self.evict(&pod).await?;
        self.planned.lock().remove(key);
        Ok(Next::Done)
    }

    fn since(&self, pod: &Object) -> Instant {
        let mut planned = self.planned.lock();
        let entry = planned.entry(pod.key.clone()).or_insert_with(|| (pod.uid.clone(), Instant::now()));
        if entry.0 != pod.uid {
            *entry = (pod.uid.clone(), Instant::now());
        }
        entry.1
    }

    async fn evict(&self, pod: &Object) -> Result<(), ApiError> {
        let message = format!("Marking for deletion Pod {}", pod.key);
        self.events.tell(&PODS, pod, EventType::Normal, "TaintManagerEviction", message);
        let patch = json!({"metadata": {"uid": &*pod.uid}, "status": {"conditions": [
            {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
                "message": "Taint manager: deleting due to NoExecute taint", "lastTransitionTime": Time(Timestamp::now())}]}});
        match self.api.patch(&PODS, &pod.key, "status", PatchKind::Strategic, &patch).await {
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        self.api.delete(&PODS, &pod.key, &pod.uid).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_toleration_of_all_taints_decides() {
        let taint = |key: &str| Taint { key: key.to_owned(), effect: "NoExecute".to_owned(), ..Taint::default() };
        let toleration = |key: &str, seconds: Option<i64>| Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            toleration_seconds: seconds,
            ..Toleration::default()
        };
        let seconds = |seconds| Stay::For(Duration::from_secs(seconds));
        assert_eq!(stay(&[], &[]), Stay::Always);
        assert_eq!(stay(&[taint("a")], &[]), seconds(0));
        assert_eq!(stay(&[taint("a")], &[toleration("a", None)]), Stay::Always);
        assert_eq!(stay(&[taint("a"), taint("b")], &[toleration("a", Some(9)), toleration("b", Some(5))]), seconds(5));
        assert_eq!(stay(&[taint("a"), taint("b")], &[toleration("a", Some(9))]), seconds(0));
        assert_eq!(stay(&[taint("a")], &[toleration("a", Some(-1))]), seconds(0));
    }
}
