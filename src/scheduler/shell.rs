//! The task that owns queue and world: hears the informers, decides, and sends bindings off.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use futures::stream::{FuturesUnordered, StreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, PersistentVolume, PersistentVolumeClaim, Pod};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::storage::v1::StorageClass;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::decide::{Decision, Nominations, decide};
use super::pod_info::PodInfo;
use super::preempt::Preemption;
use super::queue::{Hint, SchedulingQueue};
use super::volumes;
use super::world::{Budget, World};
use crate::controllers::Term;
use crate::controllers::api::{Api, ApiError, PatchKind};
use crate::controllers::cache::Delta;
use crate::controllers::event::{EventType, Events};
use crate::controllers::informer::{Informer, Informers, Subscription};
use crate::controllers::object::{Key, Object};
use crate::controllers::resource::{
    NAMESPACES, NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, POD_DISRUPTION_BUDGETS, PODS, Resource,
    STORAGE_CLASSES,
};

/// Name that pods ask for in `spec.schedulerName`.
const NAME: &str = "default-scheduler";
/// Decisions in a row before others get their turn on this thread.
const TURN: usize = 32;

/// Starts the scheduler for a term of leadership.
pub fn start(term: &Term) {
    let api = term.api_as("system:kube-scheduler");
    let events = term.recorder.events(&api, NAME);
    let informers = term.informers.clone();
    term.start_task("scheduler", move || run(informers.clone(), api.clone(), events.clone()));
}

/// Which informer a change came from.
#[derive(Clone, Copy)]
enum Source {
    Pod,
    Node,
    Namespace,
    Claim,
    Volume,
    Class,
    Budget,
}

const SOURCES: [(&Resource, Source); 7] = [
    (&NODES, Source::Node),
    (&NAMESPACES, Source::Namespace),
    (&PERSISTENT_VOLUMES, Source::Volume),
    (&PERSISTENT_VOLUME_CLAIMS, Source::Claim),
    (&STORAGE_CLASSES, Source::Class),
    (&POD_DISRUPTION_BUDGETS, Source::Budget),
    (&PODS, Source::Pod),
];

/// How a request to the API ended.
enum Report {
    Bound { pod: Arc<PodInfo>, node: Box<str>, result: Result<(), ApiError> },
    Told,
}

type Requests = FuturesUnordered<BoxFuture<'static, Report>>;

async fn run(informers: Arc<Informers>, api: Api, events: Events) {
    let (sender, mut changes) = mpsc::unbounded_channel::<(Source, Delta)>();
    let mut subscriptions: Vec<Subscription> = Vec::new();
    for (resource, source) in SOURCES {
        let informer = informers.of(resource);
        informer.synced().await;
        let sender = sender.clone();
        // The receiver lives as long as the subscriptions do.
        subscriptions.push(informer.subscribe(move |delta| drop(sender.send((source, delta.clone())))));
    }
    let pods = informers.of(&PODS);
    let mut scheduler = Scheduler {
        api,
        events,
        pods,
        world: World::default(),
        queue: SchedulingQueue::default(),
        nominations: Nominations::new(),
        requests: FuturesUnordered::new(),
    };
    loop {
        while let Ok((source, delta)) = changes.try_recv() {
            scheduler.hear(source, &delta);
        }
        for _ in 0..TURN {
            if !scheduler.schedule_one() {
                break;
            }
        }
        if scheduler.has_work() {
            scheduler.collect_reports();
            tokio::task::yield_now().await;
            continue;
        }
        let due = scheduler.queue.next_due().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600));
        tokio::select! {
            change = changes.recv() => match change {
                Some((source, delta)) => scheduler.hear(source, &delta),
                None => return,
            },
            Some(report) = scheduler.requests.next(), if !scheduler.requests.is_empty() => scheduler.report(report),
            () = tokio::time::sleep_until(due) => {}
        }
    }
}

struct Scheduler {
    api: Api,
    events: Events,
    pods: Arc<Informer>,
    world: World,
    queue: SchedulingQueue,
    nominations: Nominations,
    requests: Requests,
}

impl Scheduler {
    fn has_work(&mut self) -> bool {
        self.queue.has_active()
    }

    fn collect_reports(&mut self) {
        while let Some(Some(report)) = self.requests.next().now_or_never() {
            self.report(report);
        }
    }

    // ---- hearing

    fn hear(&mut self, source: Source, delta: &Delta) {
        let result = match source {
            Source::Pod => self.hear_pod(delta),
            Source::Node => self.hear_node(delta),
            Source::Namespace => self.hear_namespace(delta),
            Source::Claim | Source::Volume | Source::Class => self.hear_storage(source, delta),
            Source::Budget => self.hear_budget(delta),
        };
        if let Err(error) = result {
            let key = delta.latest().map(|object| object.key.to_string()).unwrap_or_default();
            tracing::warn!(key, %error, "the scheduler cannot read an object");
        }
    }

    fn hear_pod(&mut self, delta: &Delta) -> Result<(), serde_json::Error> {
        if let (Some(old), Some(new)) = (&delta.old, &delta.new)
            && old.uid != new.uid
        {
            self.forget_pod(&old.uid);
        }
        let Some(new) = &delta.new else {
            if let Some(old) = &delta.old {
                self.forget_pod(&old.uid);
            }
            return Ok(());
        };
        if new.is_finished() {
            self.forget_pod(&new.uid);
            return Ok(());
        }
        if new.node.is_some() { self.hear_placed(new) } else { self.hear_waiting(new) }
    }

    fn forget_pod(&mut self, uid: &str) {
        self.queue.remove(uid);
        self.withdraw_nomination(uid);
        if self.world.remove_pod(uid) {
            self.queue.hint(Hint::PodGone, Instant::now());
        }
    }

    fn hear_placed(&mut self, object: &Object) -> Result<(), serde_json::Error> {
        let known = self.world.placed(&object.uid).filter(|_| !self.world.is_assumed(&object.uid));
        if let Some(known) = known
            && known.generation == object.generation
            && known.labels == object.labels
            && known.deleting == object.deleting.is_some()
        {
            return Ok(());
        }
        let first = known.is_none();
        let pod = PodInfo::new(&object.decode::<Pod>()?);
        self.queue.remove(&object.uid);
        self.withdraw_nomination(&object.uid);
        self.world.set_pod(pod);
        self.queue.hint(if first { Hint::PodPlaced } else { Hint::PodGone }, Instant::now());
        Ok(())
    }

    fn hear_waiting(&mut self, object: &Object) -> Result<(), serde_json::Error> {
        if self.world.is_assumed(&object.uid) {
            return Ok(());
        }
        let pod = PodInfo::new(&object.decode::<Pod>()?);
        if *pod.scheduler != *NAME || pod.deleting {
            self.forget_pod(&object.uid);
            return Ok(());
        }
        self.withdraw_nomination(&pod.uid);
        if let Some(node) = &pod.nominated {
            self.nominations.entry(node.clone()).or_default().push(pod.clone());
        }
        self.queue.put(pod, Instant::now());
        Ok(())
    }

    fn withdraw_nomination(&mut self, uid: &str) {
        self.nominations.retain(|_, pods| {
            pods.retain(|pod| *pod.uid != *uid);
            !pods.is_empty()
        });
    }

    fn hear_node(&mut self, delta: &Delta) -> Result<(), serde_json::Error> {
        let Some(new) = &delta.new else {
            if let Some(old) = &delta.old {
                self.world.remove_node(old.key.name());
            }
            return Ok(());
        };
        let before = self.world.node(new.key.name()).map(|node| {
            (node.labels.clone(), node.allocatable.clone(), node.max_pods, node.unschedulable, node.taints.clone())
        });
        self.world.set_node(&new.decode::<Node>()?);
        let after = self.world.node(new.key.name()).map(|node| {
            (node.labels.clone(), node.allocatable.clone(), node.max_pods, node.unschedulable, node.taints.clone())
        });
        if before != after {
            self.queue.hint(Hint::Node, Instant::now());
        }
        Ok(())
    }

    fn hear_namespace(&mut self, delta: &Delta) -> Result<(), serde_json::Error> {
        let Some(object) = delta.latest() else { return Ok(()) };
        if delta.new.is_none() {
            self.world.namespaces.remove(object.key.name());
        } else {
            let before = self.world.namespaces.insert(object.key.name().into(), object.labels.clone());
            if before.is_some_and(|before| before != object.labels) {
                self.queue.hint(Hint::Namespace, Instant::now());
            }
        }
        Ok(())
    }

    fn hear_storage(&mut self, source: Source, delta: &Delta) -> Result<(), serde_json::Error> {
        let Some(object) = delta.latest() else { return Ok(()) };
        let (key, gone) = (&object.key, delta.new.is_none());
        match source {
            Source::Claim if gone => drop(self.world.claims.remove(key)),
            Source::Claim => self.world.set_claim(key, &object.decode::<PersistentVolumeClaim>()?),
            Source::Volume if gone => drop(self.world.volumes.remove(key.name())),
            Source::Volume => self.world.set_volume(key.name(), &object.decode::<PersistentVolume>()?),
            _ if gone => drop(self.world.classes.remove(key.name())),
            _ => self.world.set_class(key.name(), &object.decode::<StorageClass>()?),
        }
        self.queue.hint(Hint::Storage, Instant::now());
        Ok(())
    }

    fn hear_budget(&mut self, delta: &Delta) -> Result<(), serde_json::Error> {
        let Some(object) = delta.latest() else { return Ok(()) };
        match object.selector.as_deref().filter(|_| delta.new.is_some()) {
            None => drop(self.world.budgets.remove(&object.key)),
            Some(selector) => {
                let status = object.decode::<PodDisruptionBudget>()?.status;
                let allowed = status.map_or(0, |status| status.disruptions_allowed);
                let budget = Budget { namespace: object.key.namespace().into(), selector: selector.clone(), allowed };
                self.world.budgets.insert(object.key.clone(), budget);
            }
        }
        Ok(())
    }

    // ---- deciding

    fn schedule_one(&mut self) -> bool {
        let Some(pod) = self.queue.pop(Instant::now()) else { return false };
        match decide(&self.world, &self.nominations, &pod) {
            Decision::Bind(node) => self.bind(pod, node),
            Decision::Unschedulable { message, plugins, preemption } => {
                self.queue.unschedulable(&pod.uid, plugins, Instant::now());
                self.refuse(&pod, message, preemption);
            }
        }
        true
    }

    fn bind(&mut self, pod: Arc<PodInfo>, node: Box<str>) {
        self.world.assume(&pod, &node);
        let waiting = volumes::waiting(&self.world, &pod);
        let api = self.api.clone();
        self.requests.push(
            async move {
                let result = bind(&api, &pod, &node, &waiting).await;
                Report::Bound { pod, node, result }
            }
            .boxed(),
        );
    }

    fn refuse(&mut self, pod: &Arc<PodInfo>, message: String, preemption: Option<Preemption>) {
        let Some(object) = self.pods.get(&pod.key).filter(|object| object.uid == pod.uid) else { return };
        self.events.tell(&PODS, &object, EventType::Warning, "FailedScheduling", message.clone());
        let nominated = preemption.as_ref().map(|preemption| preemption.node.clone());
        if let Some(node) = &nominated {
            self.withdraw_nomination(&pod.uid);
            self.nominations.entry(node.clone()).or_default().push(pod.clone());
        }
        let victims = preemption.map(|preemption| preemption.victims).unwrap_or_default();
        let victims: Vec<Arc<Object>> = victims.iter().filter_map(|victim| self.pods.get(&victim.key)).collect();
        let (api, events, pod) = (self.api.clone(), self.events.clone(), pod.clone());
        self.requests.push(
            async move {
                let told = tell_unschedulable(&api, &object, &message, nominated.as_deref()).await;
                if let Err(error) = told {
                    tracing::debug!(pod = %object.key, %error, "the pod's condition could not be written");
                }
                for victim in victims {
                    if let Err(error) = preempt(&api, &events, &pod, &victim, nominated.as_deref()).await {
                        tracing::warn!(pod = %victim.key, %error, "a pod could not be preempted");
                    }
                }
                Report::Told
            }
            .boxed(),
        );
    }

    fn report(&mut self, report: Report) {
        let Report::Bound { pod, node, result } = report else { return };
        match result {
            Ok(()) => {
                self.queue.remove(&pod.uid);
                if let Some(object) = self.pods.get(&pod.key) {
                    let message = format!("Successfully assigned {} to {node}", pod.key);
                    self.events.tell(&PODS, &object, EventType::Normal, "Scheduled", message);
                }
            }
            Err(error) => {
                tracing::debug!(pod = %pod.key, %error, "binding failed");
                if self.world.is_assumed(&pod.uid) {
                    self.world.remove_pod(&pod.uid);
                }
                if error.is_not_found() || self.pods.get(&pod.key).is_none() {
                    self.queue.remove(&pod.uid);
                } else {
                    self.queue.failed(&pod.uid);
                }
            }
        }
    }
}

// ---- writing

async fn bind(api: &Api, pod: &PodInfo, node: &str, waiting: &[Key]) -> Result<(), ApiError> {
    for claim in waiting {
        let annotations: HashMap<&str, &str> = HashMap::from([("volume.kubernetes.io/selected-node", node)]);
        let patch = json!({"metadata": {"annotations": annotations}});
        api.patch(&PERSISTENT_VOLUME_CLAIMS, claim, "", PatchKind::Merge, &patch).await?;
    }
    let binding = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": pod.key.name(), "namespace": pod.key.namespace(), "uid": &*pod.uid},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    });
    let path = format!("{}/binding", PODS.object(pod.key.namespace(), pod.key.name()));
    api.send(http::Method::POST, &path, "application/json", serde_json::to_vec(&binding)?).await.map(drop)
}

async fn tell_unschedulable(
    api: &Api,
    object: &Object,
    message: &str,
    nominated: Option<&str>,
) -> Result<(), ApiError> {
    let pod: Pod = object.decode()?;
    let status = pod.status.unwrap_or_default();
    let present = status.conditions.iter().flatten().find(|condition| condition.type_ == "PodScheduled").cloned();
    let same = present.as_ref().is_some_and(|condition| {
        condition.status == "False"
            && condition.reason.as_deref() == Some("Unschedulable")
            && condition.message.as_deref() == Some(message)
    });
    if same && (nominated.is_none() || status.nominated_node_name.as_deref() == nominated) {
        return Ok(());
    }
    let since = present.filter(|condition| condition.status == "False").and_then(|c| c.last_transition_time);
    let since = since.unwrap_or(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now()));
    let mut patch = json!({
        "metadata": {"uid": &*object.uid},
        "status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": message, "lastProbeTime": Value::Null, "lastTransitionTime": since}]},
    });
    if let Some(node) = nominated {
        patch["status"]["nominatedNodeName"] = json!(node);
    }
    api.patch(&PODS, &object.key, "status", PatchKind::Strategic, &patch).await.map(drop)
}

async fn preempt(
    api: &Api,
    events: &Events,
    pod: &PodInfo,
    victim: &Object,
    node: Option<&str>,
) -> Result<(), ApiError> {
    if victim.deleting.is_none() {
        let message = format!("{}: preempting to accommodate a higher priority pod", pod.scheduler);
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now());
        let patch = json!({"metadata": {"uid": &*victim.uid}, "status": {"conditions": [
            {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": message,
                "lastTransitionTime": now}]}});
        match api.patch(&PODS, &victim.key, "status", PatchKind::Strategic, &patch).await {
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        api.delete(&PODS, &victim.key, &victim.uid).await?;
    }
    let message = format!("Preempted by pod {} on node {}", pod.uid, node.unwrap_or_default());
    events.tell(&PODS, victim, EventType::Normal, "Preempted", message);
    Ok(())
}
