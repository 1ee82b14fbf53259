//! Volumes, claims and attribute classes that are being deleted go when nobody uses them any more: their protection
//! finalizers are taken away then. (Admission has put them on.)

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use serde::Deserialize;
use serde_json::json;

use super::Term;
use super::api::{Api, PatchKind};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS, VOLUME_ATTRIBUTES_CLASSES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};

/// Starts the three loops.
pub fn start(term: &Term) {
    let (claims, volumes) = (term.informers.of(&PERSISTENT_VOLUME_CLAIMS), term.informers.of(&PERSISTENT_VOLUMES));
    let (pods, classes) = (term.informers.of(&PODS), term.informers.of(&VOLUME_ATTRIBUTES_CLASSES));

    let (queue, api) = (Arc::new(Queue::default()), term.api("pvc-protection-controller"));
    let subscriptions = vec![enqueue_self(&queue, &claims), enqueue_claims_of_pod(&queue, &pods)];
    let user = User::Pods { api: api.clone(), pods: pods.clone() };
    run(
        term,
        "pvc-protection",
        queue,
        subscriptions,
        vec![claims.clone(), pods],
        Protection { api, finalizer: "kubernetes.io/pvc-protection", protected: claims.clone(), user },
    );

    let queue = Arc::new(Queue::default());
    let subscriptions = vec![enqueue_self(&queue, &volumes)];
    run(
        term,
        "pv-protection",
        queue,
        subscriptions,
        vec![volumes.clone()],
        Protection {
            api: term.api("pv-protection-controller"),
            finalizer: "kubernetes.io/pv-protection",
            protected: volumes.clone(),
            user: User::Binding,
        },
    );

    let queue = Arc::new(Queue::default());
    let subscriptions = vec![
        enqueue_self(&queue, &classes),
        enqueue_all(&queue, &classes, &claims),
        enqueue_all(&queue, &classes, &volumes),
    ];
    let needs = vec![classes.clone(), claims.clone(), volumes.clone()];
    run(
        term,
        "vac-protection",
        queue,
        subscriptions,
        needs,
        Protection {
            api: term.api("volumeattributesclass-protection-controller"),
            finalizer: "kubernetes.io/vac-protection",
            protected: classes,
            user: User::Storage { claims, volumes },
        },
    );
}

fn run(
    term: &Term,
    name: &'static str,
    queue: Arc<Queue>,
    subscriptions: Vec<Subscription>,
    needs: Vec<Arc<Informer>>,
    protection: Protection,
) {
    let reconcile = Arc::new(protection);
    term.start(Controller { name, queue, concurrency: 2, needs, subscriptions, reconcile });
}

/// A pod that ended or went may have been the last user of its claims.
fn enqueue_claims_of_pod(queue: &Arc<Queue>, pods: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    pods.subscribe(move |delta| {
        if let (Some(pod), None) = (&delta.old, &delta.new)
            && let Ok(decoded) = pod.decode::<Pod>()
        {
            claims_of(&decoded).iter().for_each(|claim| queue.add(Key::new(pod.key.namespace(), claim)));
        }
    })
}

/// Anything that goes or changes may have been the last user; classes are few.
fn enqueue_all(queue: &Arc<Queue>, classes: &Arc<Informer>, users: &Arc<Informer>) -> Subscription {
    let (queue, classes) = (queue.clone(), classes.clone());
    users.subscribe(move |delta| {
        if delta.old.is_some() {
            classes
                .read()
                .iter()
                .filter(|class| class.deleting.is_some())
                .for_each(|class| queue.add(class.key.clone()));
        }
    })
}

/// Names of the claims that a pod's volumes use.
fn claims_of(pod: &Pod) -> Vec<String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let volumes = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let claim = |volume: &k8s_openapi::api::core::v1::Volume| match (&volume.persistent_volume_claim, &volume.ephemeral)
    {
        (Some(claim), _) => Some(claim.claim_name.clone()),
        (None, Some(_)) => Some(format!("{name}-{}", volume.name)),
        (None, None) => None,
    };
    volumes.filter_map(claim).collect()
}

/// The kubelet is done with a pod that waits for nothing but its deletion.
fn is_shut_down(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() && pod.metadata.deletion_grace_period_seconds == Some(0)
}

/// Whether a pod uses the claim. One without a node does not: it will not be started with a claim that is going.
fn uses(pod: &Pod, claim: &str) -> bool {
    let placed = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).is_some_and(|node| !node.is_empty());
    placed && !is_shut_down(pod) && claims_of(pod).iter().any(|name| name == claim)
}

/// Who may use what is protected.
enum User {
    /// Claims: pods.
    Pods { api: Api, pods: Arc<Informer> },
    /// Volumes: the claim they are bound to.
    Binding,
    /// Attribute classes: claims and volumes.
    Storage { claims: Arc<Informer>, volumes: Arc<Informer> },
}

struct Protection {
    api: Api,
    finalizer: &'static str,
    protected: Arc<Informer>,
    user: User,
}

impl Reconcile for Protection {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Protection {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.protected.get(key) else { return Ok(Next::Done) };
        let guarded = object.finalizers.iter().any(|finalizer| &**finalizer == self.finalizer);
        if object.deleting.is_none() || !guarded || self.in_use(&object).await? {
            return Ok(Next::Done);
        }
        let left: Vec<&str> = object.finalizers.iter().map(|one| &**one).filter(|one| *one != self.finalizer).collect();
        let version = object.resource_version.to_string();
        let patch = json!({"metadata": {"resourceVersion": version, "uid": &*object.uid, "finalizers": left}});
        self.api.patch(self.protected.resource(), key, "", PatchKind::Merge, &patch).await?;
        Ok(Next::Done)
    }

    async fn in_use(&self, object: &Object) -> Result<bool, ReconcileError> {
        match &self.user {
            User::Binding => Ok(object.phase() == "Bound"),
            User::Pods { api, pods } => {
                let cached: Vec<Arc<Object>> = pods.read().namespace(object.key.namespace()).cloned().collect();
                for pod in cached.iter().filter(|pod| pod.node.is_some()) {
                    if uses(&pod.decode()?, object.key.name()) {
                        return Ok(true);
                    }
                }
                // Data is at stake: the last word has the API, not the cache.
                #[derive(Deserialize)]
                struct Pods {
                    items: Vec<Pod>,
                }
                let list: Pods =
                    serde_json::from_slice(&api.get_path(&PODS.collection(object.key.namespace())).await?)?;
                Ok(list.items.iter().any(|pod| uses(pod, object.key.name())))
            }
            User::Storage { claims, volumes } => {
                let name = object.key.name();
                let all = |informer: &Informer| -> Vec<Arc<Object>> { informer.read().iter().cloned().collect() };
                for claim in all(claims) {
                    let claim: PersistentVolumeClaim = claim.decode()?;
                    let wanted = claim.spec.and_then(|spec| spec.volume_attributes_class_name);
                    let status = claim.status.unwrap_or_default();
                    let target =
                        status.modify_volume_status.and_then(|status| status.target_volume_attributes_class_name);
                    let named = [wanted, status.current_volume_attributes_class_name, target];
                    if named.iter().any(|one| one.as_deref() == Some(name)) {
                        return Ok(true);
                    }
                }
                for volume in all(volumes) {
                    let volume: PersistentVolume = volume.decode()?;
                    let class = volume.spec.and_then(|spec| spec.volume_attributes_class_name);
                    if class.as_deref() == Some(name) {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn a_claim_is_used_by_placed_pods_until_the_kubelet_is_done_with_them() {
        let pod = |extra: Value| -> Pod {
            let mut pod = json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n", "containers": [], "volumes": [
                {"name": "a", "persistentVolumeClaim": {"claimName": "data"}},
                {"name": "b", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}]}});
            json_patch::merge(&mut pod, &extra);
            serde_json::from_value(pod).unwrap()
        };
        assert!(uses(&pod(json!({})), "data") && uses(&pod(json!({})), "p-b") && !uses(&pod(json!({})), "other"));
        assert!(!uses(&pod(json!({"spec": {"nodeName": null}})), "data"));
        let gone = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 0}});
        assert!(!uses(&pod(gone), "data"));
        assert!(uses(
            &pod(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z", "deletionGracePeriodSeconds": 9}})),
            "data"
        ));
    }
}
