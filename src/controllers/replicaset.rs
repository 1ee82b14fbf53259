//! ReplicaSets and ReplicationControllers: as many pods of a template as asked for.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt, join_all};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{ReplicaSetCondition, ReplicaSetStatus};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;

use super::Term;
use super::api::{Api, ApiError};
use super::event::{EventType, Events};
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::{claim_all, enqueue_owner, enqueue_self};
use super::queue::Queue;
use super::replica::{first_to_go, rank};
use super::resource::{PODS, REPLICA_SETS, REPLICATION_CONTROLLERS, Resource};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::selector::{Labels, Selector};
use super::template::{PodName, controller_reference, pod};

/// Most pods created or deleted in one go.
const BURST: usize = 500;
/// Size of the first batch of creations; each following one doubles, so that what cannot work fails cheaply.
const FIRST_BATCH: usize = 4;

/// Starts both loops.
pub fn start(term: &Term) {
    start_for(term, &REPLICA_SETS, "replicaset-controller");
    start_for(term, &REPLICATION_CONTROLLERS, "replication-controller");
}

fn start_for(term: &Term, resource: &'static Resource, name: &'static str) {
    let queue = Arc::new(Queue::default());
    let (sets, pods) = (term.informers.of(resource), term.informers.of(&PODS));
    let api = term.api(name);
    let events = term.recorder.events(&api, name);
    let subscriptions = vec![enqueue_self(&queue, &sets), enqueue_owner(&queue, resource, &sets, &pods)];
    let reconcile = Arc::new(ReplicaSets { resource, api, events, sets: sets.clone(), pods: pods.clone() });
    term.start(Controller { name, queue, concurrency: 8, needs: vec![sets, pods], subscriptions, reconcile });
}

struct ReplicaSets {
    resource: &'static Resource,
    api: Api,
    events: Events,
    sets: Arc<Informer>,
    pods: Arc<Informer>,
}

/// What both kinds have in common.
#[derive(Deserialize)]
struct Set {
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: ReplicaSetStatus,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Spec {
    replicas: Option<i32>,
    #[serde(default)]
    min_ready_seconds: i32,
    template: Option<PodTemplateSpec>,
}

/// One step towards the wanted number.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// Create this many pods.
    Create(usize),
    /// Delete this many pods.
    Delete(usize),
}

/// What to do when `wanted` pods are asked for and `active` are there.
pub fn plan(wanted: i32, active: usize) -> Option<Change> {
    let wanted = usize::try_from(wanted).unwrap_or(0);
    match wanted.cmp(&active) {
        std::cmp::Ordering::Greater => Some(Change::Create((wanted - active).min(BURST))),
        std::cmp::Ordering::Less => Some(Change::Delete((active - wanted).min(BURST))),
        std::cmp::Ordering::Equal => None,
    }
}

/// What was counted for the status.
struct Counted<'a> {
    generation: i64,
    wanted: i32,
    min_ready_seconds: i32,
    template_labels: Labels,
    active: &'a [Arc<Object>],
    terminating: usize,
    failure: Option<String>,
}

/// The status that follows from the pods.
fn status(old: &ReplicaSetStatus, counted: &Counted<'_>, now: Timestamp) -> ReplicaSetStatus {
    let labels = Selector::new(
        counted
            .template_labels
            .iter()
            .map(|(key, value)| super::selector::Requirement {
                key: key.into(),
                operator: super::selector::Operator::In,
                values: Box::new([value.into()]),
            })
            .collect(),
    );
    let count = |predicate: &dyn Fn(&Object) -> bool| {
        i32::try_from(counted.active.iter().filter(|pod| predicate(pod)).count()).unwrap_or(i32::MAX)
    };
    let mut conditions = old.conditions.clone().unwrap_or_default();
    let had_failure = conditions.iter().any(|condition| condition.type_ == "ReplicaFailure");
    match &counted.failure {
        Some(message) if !had_failure => {
            let missing = i32::try_from(counted.active.len()).unwrap_or(i32::MAX) < counted.wanted;
            conditions.push(ReplicaSetCondition {
                type_: "ReplicaFailure".to_owned(),
                status: "True".to_owned(),
                reason: Some(if missing { "FailedCreate" } else { "FailedDelete" }.to_owned()),
                message: Some(message.clone()),
                last_transition_time: Some(Time(now)),
            });
        }
        None => conditions.retain(|condition| condition.type_ != "ReplicaFailure"),
        Some(_) => {}
    }
    let some = |count: i32| (count != 0).then_some(count);
    ReplicaSetStatus {
        replicas: count(&|_| true),
        fully_labeled_replicas: some(count(&|pod| labels.matches(&pod.labels))),
        ready_replicas: some(count(&|pod| pod.pod.ready)),
        available_replicas: some(count(&|pod| pod.is_available(counted.min_ready_seconds, now))),
        terminating_replicas: i32::try_from(counted.terminating).ok(),
        observed_generation: Some(counted.generation),
        conditions: Some(conditions).filter(|conditions| !conditions.is_empty()),
    }
}

/// When the next ready pod becomes available, if that is still to come.
pub fn next_available(pods: &[Arc<Object>], min_ready_seconds: i32, now: Timestamp) -> Option<Duration> {
    let seconds = pods
        .iter()
        .filter(|pod| pod.pod.ready && !pod.is_available(min_ready_seconds, now))
        .map(|pod| pod.pod.ready_since + i64::from(min_ready_seconds) - now.as_second())
        .min()?;
    Some(Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(1)))
}

impl Reconcile for ReplicaSets {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl ReplicaSets {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.sets.get(key) else { return Ok(Next::Done) };
        let Some(selector) = object.selector.as_deref() else { return Ok(Next::Done) };
        let set: Set = object.decode()?;
        let wanted = set.spec.replicas.unwrap_or(1);
        let pods = claim_all(&self.api, self.resource, &object, selector, &self.pods).await?;
        let mut failure = None;
        let active: Vec<Arc<Object>> = pods.iter().filter(|pod| pod.is_active()).cloned().collect();
        if object.deleting.is_none() {
            let result = match plan(wanted, active.len()) {
                Some(Change::Create(count)) => self.create(&object, &set, count).await,
                Some(Change::Delete(count)) => self.delete(&object, &active, count).await,
                None => Ok(()),
            };
            failure = result.err();
        }
        // Our own writes are in the cache by now.
        let controlled: Vec<Arc<Object>> = self.pods.read().controlled_by(&object.uid).cloned().collect();
        let active: Vec<Arc<Object>> = controlled.iter().filter(|pod| pod.is_active()).cloned().collect();
        let template_labels = set.spec.template.as_ref().and_then(|template| template.metadata.as_ref());
        let counted = Counted {
            generation: object.generation,
            wanted,
            min_ready_seconds: set.spec.min_ready_seconds,
            template_labels: Labels::from_map(template_labels.and_then(|metadata| metadata.labels.as_ref())),
            active: &active,
            terminating: controlled.iter().filter(|pod| pod.deleting.is_some() && !pod.is_finished()).count(),
            failure: failure.as_ref().map(ToString::to_string),
        };
        let now = Timestamp::now();
        let mut new = status(&set.status, &counted, now);
        if self.resource.kind == "ReplicationController" {
            new.terminating_replicas = None;
        }
        if new != set.status {
            self.write_status(&object, &new).await?;
        }
        if let Some(failure) = failure {
            return Err(failure.into());
        }
        Ok(next_available(&active, set.spec.min_ready_seconds, now).map_or(Next::Done, Next::After))
    }

    async fn write_status(&self, object: &Object, status: &ReplicaSetStatus) -> Result<(), ReconcileError> {
        match self.api.update_status(self.resource, object, status).await {
            Ok(_) => Ok(()),
            Err(error) if error.is_not_found() => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Creates pods in growing batches; stops at the first batch in which one fails.
    async fn create(&self, object: &Object, set: &Set, mut count: usize) -> Result<(), ApiError> {
        let Some(template) = &set.spec.template else { return Ok(()) };
        let owner = controller_reference(self.resource, object);
        let namespace = object.key.namespace();
        let body = pod(template, PodName::Prefix(object.key.name()), namespace, &owner)?;
        let mut batch = FIRST_BATCH;
        while count > 0 {
            let size = batch.min(count);
            let created = join_all((0..size).map(|_| self.api.create(&PODS, namespace, &body))).await;
            let mut failure = None;
            for result in created {
                match result {
                    Ok(pod) => {
                        let message = format!("Created pod: {}", pod.key.name());
                        self.events.tell(self.resource, object, EventType::Normal, "SuccessfulCreate", message);
                    }
                    Err(error) => failure = Some(error),
                }
            }
            if let Some(error) = failure {
                if error.is_namespace_terminating() {
                    return Ok(());
                }
                let message = format!("Error creating: {error}");
                self.events.tell(self.resource, object, EventType::Warning, "FailedCreate", message);
                return Err(error);
            }
            count -= size;
            batch *= 2;
        }
        Ok(())
    }

    async fn delete(&self, object: &Object, active: &[Arc<Object>], count: usize) -> Result<(), ApiError> {
        let victims = first_to_go(rank(active.to_vec(), self.related(object).iter()), count, Timestamp::now());
        let deleted = join_all(victims.iter().map(|pod| self.api.delete(&PODS, &pod.key, &pod.uid))).await;
        let mut failure = None;
        for (pod, result) in victims.iter().zip(deleted) {
            match result {
                Ok(_) => {
                    let message = format!("Deleted pod: {}", pod.key.name());
                    self.events.tell(self.resource, object, EventType::Normal, "SuccessfulDelete", message);
                }
                Err(error) if error.is_conflict() => {}
                Err(error) => {
                    let message = format!("Error deleting: {error}");
                    self.events.tell(self.resource, object, EventType::Warning, "FailedDelete", message);
                    failure = Some(error);
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// The active pods of all sets that share our owner.
    fn related(&self, object: &Object) -> Vec<Arc<Object>> {
        let siblings: Vec<Arc<Object>> = match object.controller() {
            Some(owner) => self.sets.read().controlled_by(&owner.uid).cloned().collect(),
            None => Vec::new(),
        };
        let pods = self.pods.read();
        let own = std::iter::once(&*object.uid);
        let uids = own.chain(siblings.iter().map(|set| &*set.uid).filter(|uid| **uid != *object.uid));
        uids.flat_map(|uid| pods.controlled_by(uid)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use serde_json::json;

    fn running(name: &str, ready: bool, since: &str) -> Arc<Object> {
        let json = json!({
            "metadata": {"name": name, "namespace": "n", "uid": name, "labels": {"a": "1"}},
            "status": {"phase": "Running", "conditions": [
                {"type": "Ready", "status": if ready { "True" } else { "False" }, "lastTransitionTime": since}]}});
        Arc::new(parse(&PODS, json.to_string().as_bytes(), false).unwrap())
    }

    #[test]
    fn the_difference_is_made_up_in_bounded_bursts() {
        assert_eq!(plan(3, 3), None);
        assert_eq!(plan(3, 1), Some(Change::Create(2)));
        assert_eq!(plan(0, 2), Some(Change::Delete(2)));
        assert_eq!(plan(5000, 0), Some(Change::Create(BURST)));
    }

    #[test]
    fn status_counts_ready_available_and_labelled_pods_and_names_failures() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let pods = [
            running("a", true, "2026-01-01T00:00:00Z"),
            running("b", true, "2026-01-01T00:00:55Z"),
            running("c", false, "2026-01-01T00:00:00Z"),
        ];
        let counted = |failure: Option<&str>| Counted {
            generation: 4,
            wanted: 5,
            min_ready_seconds: 10,
            template_labels: Labels::from_pairs([("a", "1")]),
            active: &pods,
            terminating: 1,
            failure: failure.map(str::to_owned),
        };
        let failed = status(&ReplicaSetStatus::default(), &counted(Some("no room")), now);
        assert_eq!(failed.replicas, 3);
        assert_eq!((failed.ready_replicas, failed.available_replicas), (Some(2), Some(1)));
        assert_eq!((failed.fully_labeled_replicas, failed.terminating_replicas), (Some(3), Some(1)));
        assert_eq!(failed.conditions.as_ref().unwrap()[0].reason.as_deref(), Some("FailedCreate"));
        assert_eq!(status(&failed, &counted(None), now).conditions, None);
        assert_eq!(next_available(&pods, 10, now), Some(Duration::from_secs(5)));
    }
}
