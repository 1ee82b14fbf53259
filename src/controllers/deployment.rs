//! Deployments: carries out what [`super::rollout`] plans.

use std::collections::HashMap;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentStatus, ReplicaSet};
use serde_json::json;

use super::Term;
use super::api::{Api, ApiError, PatchKind};
use super::event::{EventType, Events};
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::{claim_all, enqueue_owner, enqueue_self};
use super::queue::Queue;
use super::resource::{DEPLOYMENTS, PODS, REPLICA_SETS};
use super::rollout::{Change, Observed, REVISION, new_condition, plan, set_condition};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::template::{canonical, controller_reference};

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (deployments, sets) = (term.informers.of(&DEPLOYMENTS), term.informers.of(&REPLICA_SETS));
    let pods = term.informers.of(&PODS);
    let api = term.api("deployment-controller");
    let subscriptions = vec![
        enqueue_self(&queue, &deployments),
        enqueue_owner(&queue, &DEPLOYMENTS, &deployments, &sets),
        enqueue_recreating(&queue, &sets, &pods),
    ];
    let reconcile = Arc::new(Deployments {
        events: term.recorder.events(&api, "deployment-controller"),
        api,
        deployments: deployments.clone(),
        sets: sets.clone(),
        pods: pods.clone(),
    });
    let needs = vec![deployments, sets, pods];
    term.start(Controller { name: "deployment", queue, concurrency: 8, needs, subscriptions, reconcile });
}

/// A Recreate rollout goes on when the last old pod is gone.
fn enqueue_recreating(queue: &Arc<Queue>, sets: &Arc<Informer>, pods: &Arc<Informer>) -> super::informer::Subscription {
    let (queue, sets) = (queue.clone(), sets.clone());
    pods.subscribe(move |delta| {
        let Some(pod) = delta.latest().filter(|pod| delta.new.is_none() || pod.is_finished()) else { return };
        let Some(owner) = pod.controller().filter(|owner| owner.kind == "ReplicaSet") else { return };
        let Some(set) = sets.get(&Key::new(pod.key.namespace(), &owner.name)) else { return };
        if let Some(deployment) = set.controller().filter(|owner| owner.kind == "Deployment") {
            queue.add(Key::new(pod.key.namespace(), &deployment.name));
        }
    })
}

struct Deployments {
    api: Api,
    events: Events,
    deployments: Arc<Informer>,
    sets: Arc<Informer>,
    pods: Arc<Informer>,
}

impl Reconcile for Deployments {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Deployments {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.deployments.get(key) else { return Ok(Next::Done) };
        let deployment: Deployment = object.decode()?;
        let Some(selector) = object.selector.as_deref() else { return Ok(Next::Done) };
        if selector.is_empty() {
            let message = "This deployment is selecting all pods. A non-empty selector is required.".to_owned();
            self.events.tell(&DEPLOYMENTS, &object, EventType::Warning, "SelectingAll", message);
            return Ok(Next::Done);
        }
        let claimed = claim_all(&self.api, &DEPLOYMENTS, &object, selector, &self.sets).await?;
        let sets: Vec<ReplicaSet> = claimed.iter().map(|set| set.decode()).collect::<Result<_, _>>()?;
        let observed = Observed {
            deployment: &deployment,
            owner: controller_reference(&DEPLOYMENTS, &object),
            pods: self.running_pods(&claimed),
            sets,
            now: Timestamp::now(),
        };
        let plan = plan(observed)?;
        let mut latest = object;
        for change in plan.changes {
            if !self.apply(change, &deployment, &mut latest).await? {
                return Ok(Next::Done);
            }
        }
        Ok(plan.after.map_or(Next::Done, Next::After))
    }

    fn running_pods(&self, sets: &[Arc<Object>]) -> HashMap<String, usize> {
        let pods = self.pods.read();
        sets.iter()
            .map(|set| {
                let running = pods.controlled_by(&set.uid).filter(|pod| !pod.is_finished()).count();
                (set.uid.to_string(), running)
            })
            .collect()
    }

    /// Carries out one change; `false` says that the rest of the plan is void.
    async fn apply(
        &self,
        change: Change,
        deployment: &Deployment,
        latest: &mut Arc<Object>,
    ) -> Result<bool, ReconcileError> {
        let namespace = latest.key.namespace().to_owned();
        match change {
            Change::Create(set) => return self.create(&set, deployment, latest).await,
            Change::Update(set) => {
                let key = Key::new(&namespace, set.metadata.name.as_deref().unwrap_or_default());
                self.api.update(&REPLICA_SETS, &key, "", &*set).await?;
            }
            Change::Delete { name, uid } => {
                self.api.delete(&REPLICA_SETS, &Key::new(&namespace, &name), &uid).await?;
            }
            Change::Revision(number) => {
                let patch = json!({"metadata": {"uid": &*latest.uid, "annotations": {REVISION: number}}});
                *latest = self.api.patch(&DEPLOYMENTS, &latest.key, "", PatchKind::Merge, &patch).await?;
            }
            Change::Status(status) => *latest = self.write_status(latest, &status).await?,
            Change::Event(kind, reason, message) => self.events.tell(&DEPLOYMENTS, latest, kind, reason, message),
        }
        Ok(true)
    }

    async fn write_status(&self, latest: &Object, status: &DeploymentStatus) -> Result<Arc<Object>, ApiError> {
        self.api.update_status(&DEPLOYMENTS, latest, status).await
    }

    async fn create(
        &self,
        set: &ReplicaSet,
        deployment: &Deployment,
        latest: &mut Arc<Object>,
    ) -> Result<bool, ReconcileError> {
        let error = match self.api.create(&REPLICA_SETS, latest.key.namespace(), set).await {
            Ok(_) => return Ok(true),
            Err(error) => error,
        };
        let mut status = deployment.status.clone().unwrap_or_default();
        let name = set.metadata.name.as_deref().unwrap_or_default();
        if error.is_already_exists() {
            if self.is_ours(name, deployment, latest).await? {
                return Ok(true);
            }
            status.collision_count = Some(status.collision_count.unwrap_or(0) + 1);
            self.write_status(latest, &status).await?;
            return Ok(false);
        }
        if !error.is_namespace_terminating() {
            let message = format!("Failed to create new replica set \"{name}\": {error}");
            let condition =
                new_condition("Progressing", "False", "ReplicaSetCreateError", message.clone(), Timestamp::now());
            set_condition(&mut status, condition);
            if deployment.status.as_ref() != Some(&status) {
                *latest = self.write_status(latest, &status).await?;
            }
            self.events.tell(&DEPLOYMENTS, latest, EventType::Warning, "ReplicaSetCreateError", message);
        }
        Err(error.into())
    }

    /// Whether a ReplicaSet of that name is this Deployment's, for this template.
    async fn is_ours(&self, name: &str, deployment: &Deployment, owner: &Object) -> Result<bool, ReconcileError> {
        let set: ReplicaSet = self.api.get(&REPLICA_SETS, &Key::new(owner.key.namespace(), name)).await?;
        let owners = set.metadata.owner_references.unwrap_or_default();
        let controlled = owners.iter().any(|owned| owned.controller == Some(true) && owned.uid == *owner.uid);
        let (Some(theirs), Some(spec)) = (set.spec.and_then(|spec| spec.template), deployment.spec.as_ref()) else {
            return Ok(false);
        };
        Ok(controlled && canonical(&theirs)? == canonical(&spec.template)?)
    }
}
