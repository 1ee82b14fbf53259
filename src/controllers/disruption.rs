//! PodDisruptionBudgets: how many of their pods may be disrupted now.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use serde::Deserialize;

use super::Term;
use super::api::Api;
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{
    DEPLOYMENTS, POD_DISRUPTION_BUDGETS, PODS, REPLICA_SETS, REPLICATION_CONTROLLERS, STATEFUL_SETS,
};
use super::rollout::scaled;
use super::runner::{Controller, Next, Reconcile, ReconcileError};

/// An eviction that was allowed and not followed by a deletion for this long is forgotten (seconds).
const DISRUPTED_FOR: i64 = 120;

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (budgets, pods) = (term.informers.of(&POD_DISRUPTION_BUDGETS), term.informers.of(&PODS));
    let owners: Vec<Arc<Informer>> = [&REPLICA_SETS, &DEPLOYMENTS, &REPLICATION_CONTROLLERS, &STATEFUL_SETS]
        .into_iter()
        .map(|resource| term.informers.of(resource))
        .collect();
    let api = term.api("disruption-controller");
    let subscriptions = vec![enqueue_self(&queue, &budgets), enqueue_budgets(&queue, &budgets, &pods)];
    let needs: Vec<Arc<Informer>> = owners.iter().cloned().chain([budgets.clone(), pods.clone()]).collect();
    let reconcile =
        Arc::new(Disruption { events: term.recorder.events(&api, "controllermanager"), api, budgets, pods, owners });
    term.start(Controller { name: "disruption", queue, concurrency: 4, needs, subscriptions, reconcile });
}

fn enqueue_budgets(queue: &Arc<Queue>, budgets: &Arc<Informer>, pods: &Arc<Informer>) -> Subscription {
    let (queue, budgets) = (queue.clone(), budgets.clone());
    pods.subscribe(move |delta| {
        let Some(latest) = delta.latest() else { return };
        for budget in budgets.read().namespace(latest.key.namespace()) {
            let Some(selector) = budget.selector.as_deref() else { continue };
            if delta.states().any(|pod| selector.matches(&pod.labels)) {
                queue.add(budget.key.clone());
            }
        }
    })
}

struct Disruption {
    api: Api,
    events: Events,
    budgets: Arc<Informer>,
    pods: Arc<Informer>,
    owners: Vec<Arc<Informer>>,
}

/// Expected pods and the number of them that has to be healthy. `scale`: replicas that the pods' controllers ask for.
fn required(spec: &PodDisruptionBudgetSpec, pods: i32, scale: i32) -> (i32, i32) {
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
    match (&spec.max_unavailable, &spec.min_available) {
        (Some(max), _) => (scale, (scale - scaled(Some(max), scale, true)).max(0)),
        (None, Some(IntOrString::Int(min))) => (pods, *min),
        (None, Some(min)) => (scale, scaled(Some(min), scale, true)),
        (None, None) => (pods, 0),
    }
}

/// What is counted for the status.
struct Counted {
    expected: i32,
    desired: i32,
    healthy: i32,
    disrupted: BTreeMap<String, Time>,
    generation: i64,
}

fn status(old: &PodDisruptionBudgetStatus, counted: Counted, now: Timestamp) -> PodDisruptionBudgetStatus {
    let spare = counted.healthy - counted.desired;
    let allowed = if counted.expected <= 0 { 0 } else { spare.max(0) };
    let (value, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let mut conditions = old.conditions.clone().unwrap_or_default();
    let present = conditions.iter().find(|condition| condition.type_ == "DisruptionAllowed");
    let since = present.filter(|present| present.status == value).map(|present| present.last_transition_time.clone());
    let condition = Condition {
        type_: "DisruptionAllowed".to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message: String::new(),
        observed_generation: Some(counted.generation),
        last_transition_time: since.unwrap_or(Time(now)),
    };
    match conditions.iter_mut().find(|condition| condition.type_ == "DisruptionAllowed") {
        Some(present) => *present = condition,
        None => conditions.push(condition),
    }
    PodDisruptionBudgetStatus {
        current_healthy: counted.healthy,
        desired_healthy: counted.desired,
        disruptions_allowed: allowed,
        expected_pods: counted.expected,
        disrupted_pods: Some(counted.disrupted).filter(|pods| !pods.is_empty()),
        observed_generation: Some(counted.generation),
        conditions: Some(conditions),
    }
}

impl Reconcile for Disruption {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Disruption {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.budgets.get(key) else { return Ok(Next::Done) };
        let budget: PodDisruptionBudget = object.decode()?;
        let Some(spec) = budget.spec.as_ref() else { return Ok(Next::Done) };
        let selector = object.selector.as_deref().cloned();
        let pods: Vec<Arc<Object>> = match &selector {
            Some(selector) => {
                let cached = self.pods.read();
                cached.namespace(key.namespace()).filter(|pod| selector.matches(&pod.labels)).cloned().collect()
            }
            None => Vec::new(),
        };
        if pods.is_empty() {
            self.events.tell(
                &POD_DISRUPTION_BUDGETS,
                &object,
                EventType::Normal,
                "NoPods",
                "No matching pods found".to_owned(),
            );
        }
        let now = Timestamp::now();
        let old = budget.status.clone().unwrap_or_default();
        let disrupted = still_disrupted(&old, &pods, now);
        let active: Vec<&Arc<Object>> = pods.iter().filter(|pod| !pod.is_finished()).collect();
        let healthy = active
            .iter()
            .filter(|pod| pod.deleting.is_none() && pod.pod.ready && !disrupted.contains_key(pod.key.name()))
            .count();
        let (expected, desired) = required(spec, count(active.len()), self.scale(&active)?);
        let again = disrupted.values().map(|time| time.0.as_second() + DISRUPTED_FOR - now.as_second()).min();
        let counted = Counted { expected, desired, healthy: count(healthy), disrupted, generation: object.generation };
        let new = status(&old, counted, now);
        if budget.status.as_ref() != Some(&new) {
            match self.api.update_status(&POD_DISRUPTION_BUDGETS, &object, &new).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        let wait = again.map(|seconds| Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(1)));
        Ok(wait.map_or(Next::Done, Next::After))
    }

    /// Replicas that the controllers of the pods ask for; a pod without one counts itself.
    fn scale(&self, pods: &[&Arc<Object>]) -> Result<i32, serde_json::Error> {
        let (mut seen, mut total) = (HashSet::new(), 0);
        for pod in pods {
            let Some(owner) = pod.controller() else {
                total += 1;
                continue;
            };
            let mut top = self.find(&owner.kind, pod.key.namespace(), &owner.name);
            if let Some(above) = top.as_ref().and_then(|top| top.controller().cloned()) {
                top = self.find(&above.kind, pod.key.namespace(), &above.name).or(top);
            }
            match top {
                Some(top) if seen.insert(top.uid.clone()) => total += replicas(&top)?,
                Some(_) => {}
                None => total += 1,
            }
        }
        Ok(total)
    }

    fn find(&self, kind: &str, namespace: &str, name: &str) -> Option<Arc<Object>> {
        let informer = self.owners.iter().find(|informer| informer.resource().kind == kind)?;
        informer.get(&Key::new(namespace, name))
    }
}

fn count(count: usize) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

fn replicas(object: &Object) -> Result<i32, serde_json::Error> {
    #[derive(Deserialize)]
    struct Scaled {
        #[serde(default)]
        spec: Spec,
    }
    #[derive(Default, Deserialize)]
    struct Spec {
        replicas: Option<i32>,
    }
    Ok(object.decode::<Scaled>()?.spec.replicas.unwrap_or(1))
}

/// Pods whose eviction was allowed and that have not gone yet.
fn still_disrupted(old: &PodDisruptionBudgetStatus, pods: &[Arc<Object>], now: Timestamp) -> BTreeMap<String, Time> {
    let waiting = old.disrupted_pods.iter().flatten().filter(|(name, since)| {
        let there = pods.iter().any(|pod| pod.key.name() == name.as_str() && pod.deleting.is_none());
        there && since.0.as_second() + DISRUPTED_FOR > now.as_second()
    });
    waiting.map(|(name, since)| (name.clone(), since.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn budgets_are_counted_in_pods_or_in_shares_of_what_is_asked_for() {
        let spec = |json: serde_json::Value| serde_json::from_value::<PodDisruptionBudgetSpec>(json).unwrap();
        assert_eq!(required(&spec(json!({"minAvailable": 2})), 3, 5), (3, 2));
        assert_eq!(required(&spec(json!({"minAvailable": "50%"})), 3, 5), (5, 3));
        assert_eq!(required(&spec(json!({"maxUnavailable": 1})), 3, 5), (5, 4));
        assert_eq!(required(&spec(json!({"maxUnavailable": "30%"})), 3, 5), (5, 3));
    }

    #[test]
    fn what_is_allowed_is_what_is_healthy_beyond_the_desired() {
        let counted = |healthy| Counted { expected: 3, desired: 2, healthy, disrupted: BTreeMap::new(), generation: 1 };
        let now = Timestamp::UNIX_EPOCH;
        let allowed = status(&PodDisruptionBudgetStatus::default(), counted(3), now);
        assert_eq!(
            (allowed.disruptions_allowed, allowed.conditions.as_ref().unwrap()[0].reason.as_str()),
            (1, "SufficientPods")
        );
        let refused = status(&allowed, counted(1), now);
        assert_eq!(
            (refused.disruptions_allowed, refused.conditions.unwrap()[0].reason.as_str()),
            (0, "InsufficientPods")
        );
    }
}
