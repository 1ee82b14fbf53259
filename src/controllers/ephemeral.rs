//! Generic ephemeral volumes: the claims that pods bring along.

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Term;
use super::api::Api;
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::queue::Queue;
use super::resource::{PERSISTENT_VOLUME_CLAIMS, PODS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::template::controller_reference;

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (pods, claims) = (term.informers.of(&PODS), term.informers.of(&PERSISTENT_VOLUME_CLAIMS));
    let api = term.api("ephemeral-volume-controller");
    let subscriptions = vec![enqueue_pods(&queue, &pods), enqueue_owner_of_claim(&queue, &claims)];
    let reconcile = Arc::new(EphemeralVolumes {
        events: term.recorder.events(&api, "ephemeral_volume"),
        api,
        pods: pods.clone(),
        claims: claims.clone(),
    });
    let needs = vec![pods, claims];
    term.start(Controller { name: "ephemeral-volume", queue, concurrency: 4, needs, subscriptions, reconcile });
}

/// Pods that bring claims are rare: the field's name is looked for in the bytes before anything is decoded.
fn brings_claims(pod: &Object) -> bool {
    let needle = b"\"volumeClaimTemplate\"";
    pod.bytes.windows(needle.len()).any(|window| window == needle)
}

fn enqueue_pods(queue: &Arc<Queue>, pods: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    pods.subscribe(move |delta| {
        // What a pod brings is fixed when it is created.
        if let (None, Some(pod)) = (&delta.old, &delta.new)
            && brings_claims(pod)
        {
            queue.add(pod.key.clone());
        }
    })
}

/// A claim that went has to come back while its pod is there.
fn enqueue_owner_of_claim(queue: &Arc<Queue>, claims: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    claims.subscribe(move |delta| {
        if let (Some(claim), None) = (&delta.old, &delta.new)
            && let Some(owner) = claim.controller().filter(|owner| owner.kind == "Pod")
        {
            queue.add(Key::new(claim.key.namespace(), &owner.name));
        }
    })
}

struct EphemeralVolumes {
    api: Api,
    events: Events,
    pods: Arc<Informer>,
    claims: Arc<Informer>,
}

impl Reconcile for EphemeralVolumes {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl EphemeralVolumes {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.pods.get(key).filter(|pod| pod.deleting.is_none()) else { return Ok(Next::Done) };
        let pod: Pod = object.decode()?;
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            let Some(template) = volume.ephemeral.as_ref().and_then(|one| one.volume_claim_template.as_ref()) else {
                continue;
            };
            let name = format!("{}-{}", key.name(), volume.name);
            if let Some(claim) = self.claims.get(&Key::new(key.namespace(), &name)) {
                if claim.is_controlled_by(&object.uid) {
                    continue;
                }
                let why = format!("PVC {}/{name} was not created for pod {key} (pod is not owner)", key.namespace());
                let message = format!("ephemeral volume {}: {why}", volume.name);
                self.events.tell(&PODS, &object, EventType::Warning, "FailedBinding", message.clone());
                return Err(ReconcileError::NotYet(message));
            }
            let given = template.metadata.clone().unwrap_or_default();
            let claim = PersistentVolumeClaim {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    namespace: Some(key.namespace().to_owned()),
                    labels: given.labels,
                    annotations: given.annotations,
                    owner_references: Some(vec![controller_reference(&PODS, &object)]),
                    ..ObjectMeta::default()
                },
                spec: Some(template.spec.clone()),
                status: None,
            };
            match self.api.create(&PERSISTENT_VOLUME_CLAIMS, key.namespace(), &claim).await {
                Ok(_) => {}
                Err(error) if error.is_namespace_terminating() => return Ok(Next::Done),
                Err(error) => {
                    let message = format!("ephemeral volume {}: create PVC {name}: {error}", volume.name);
                    self.events.tell(&PODS, &object, EventType::Warning, "FailedBinding", message);
                    return Err(error.into());
                }
            }
        }
        Ok(Next::Done)
    }
}
