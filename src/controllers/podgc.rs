//! Pods that nobody will ever finish are removed: those of nodes that are gone, those deleted before they had a node, those
//! leaving a node that is out of service, and the oldest of too many ended ones.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions, Time};
use serde_json::json;

use super::Term;
use super::api::{Api, ApiError, PatchKind};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::queue::Queue;
use super::resource::{NODES, PODS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};

/// How long a node has to be gone before its pods are.
const QUARANTINE: Duration = Duration::from_secs(40);
/// Ended pods that are kept (upstream's default).
const KEPT: usize = 12_500;

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (pods, nodes) = (term.informers.of(&PODS), term.informers.of(&NODES));
    let subscriptions = vec![enqueue_pods(&queue, &pods, &nodes), enqueue_on_node_change(&queue, &pods, &nodes)];
    let reconcile =
        Arc::new(PodGc { api: term.api("pod-garbage-collector"), pods: pods.clone(), nodes: nodes.clone() });
    term.start(Controller { name: "podgc", queue, concurrency: 4, needs: vec![nodes, pods], subscriptions, reconcile });
}

fn enqueue_pods(queue: &Arc<Queue>, pods: &Arc<Informer>, nodes: &Arc<Informer>) -> Subscription {
    let (queue, nodes) = (queue.clone(), nodes.clone());
    pods.subscribe(move |delta| {
        let Some(pod) = &delta.new else { return };
        let ended = pod.is_finished() && delta.old.as_ref().is_none_or(|old| !old.is_finished());
        match &pod.node {
            _ if ended => queue.add(pod.key.clone()),
            None if pod.deleting.is_some() => queue.add(pod.key.clone()),
            Some(node) if nodes.read().get(node).is_none() => queue.add_after(pod.key.clone(), QUARANTINE),
            Some(_) if pod.deleting.is_some() => queue.add(pod.key.clone()),
            _ => {}
        }
    })
}

fn enqueue_on_node_change(queue: &Arc<Queue>, pods: &Arc<Informer>, nodes: &Arc<Informer>) -> Subscription {
    let (queue, pods) = (queue.clone(), pods.clone());
    nodes.subscribe(move |delta| {
        let Some(node) = delta.latest() else { return };
        for pod in pods.read().on_node(node.key.name()) {
            if delta.new.is_none() {
                queue.add_after(pod.key.clone(), QUARANTINE);
            } else if pod.deleting.is_some() {
                queue.add(pod.key.clone());
            }
        }
    })
}

struct PodGc {
    api: Api,
    pods: Arc<Informer>,
    nodes: Arc<Informer>,
}

/// Why a pod goes.
#[derive(Debug, PartialEq, Eq)]
enum Reason {
    Orphaned,
    Unscheduled,
    OutOfService,
    Excess,
}

impl Reconcile for PodGc {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl PodGc {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(pod) = self.pods.get(key) else { return Ok(Next::Done) };
        let node = pod.node.as_deref().and_then(|name| self.nodes.read().get(name).cloned());
        let reason = match (&pod.node, node) {
            (None, _) if pod.deleting.is_some() => Reason::Unscheduled,
            (Some(name), None) => {
                // The cache may be behind; only what the API says counts.
                match self.api.get::<Node>(&NODES, &Key::new("", name)).await {
                    Err(error) if error.is_not_found() => Reason::Orphaned,
                    Err(error) => return Err(error.into()),
                    Ok(_) => return Ok(Next::Done),
                }
            }
            (Some(_), Some(node)) if pod.deleting.is_some() && is_out_of_service(&node.decode()?) => {
                Reason::OutOfService
            }
            _ if pod.is_finished() && self.is_excess(&pod) => Reason::Excess,
            _ => return Ok(Next::Done),
        };
        match self.remove(&pod, &reason).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(Next::Done),
        }
    }

    /// Whether there are too many ended pods and this is one of the oldest.
    fn is_excess(&self, pod: &Object) -> bool {
        let cached = self.pods.read();
        if cached.len() <= KEPT {
            return false;
        }
        let (mut all, mut older) = (0, 0);
        for other in cached.iter().filter(|other| other.is_finished()) {
            all += 1;
            older += usize::from((other.created, &other.key) < (pod.created, &pod.key));
        }
        all > KEPT && older < all - KEPT
    }

    async fn remove(&self, pod: &Object, reason: &Reason) -> Result<(), ApiError> {
        tracing::info!(pod = %pod.key, ?reason, "removing a pod that nobody finishes");
        if !pod.is_finished() {
            let mut status = json!({"phase": "Failed"});
            if *reason == Reason::Orphaned {
                status["conditions"] = json!([{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC",
                    "message": "PodGC: node no longer exists", "lastTransitionTime": Time(Timestamp::now())}]);
            }
            let patch = json!({"metadata": {"uid": &*pod.uid}, "status": status});
            self.api.patch(&PODS, &pod.key, "status", PatchKind::Strategic, &patch).await?;
        }
        let options = DeleteOptions {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: Some(pod.uid.to_string()), resource_version: None }),
            ..DeleteOptions::default()
        };
        self.api.delete_with(&PODS, &pod.key, &pod.uid, &options).await.map(drop)
    }
}

fn is_out_of_service(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    let tainted =
        taints.is_some_and(|taints| taints.iter().any(|taint| taint.key == "node.kubernetes.io/out-of-service"));
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    let ready = conditions.is_some_and(|all| all.iter().any(|one| one.type_ == "Ready" && one.status == "True"));
    tainted && !ready
}
