//! PersistentVolumes and the claims on them: who gets which, and what becomes of a volume that its claim has left.
//! What to do is decided in [`super::binding`]; volumes are made and deleted by provisioners from outside.

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::StorageClass;
use serde_json::{Value, json};

use super::Term;
use super::api::{Api, PatchKind};
use super::binding::{
    BIND_COMPLETED, BOUND_BY_CONTROLLER, ClaimPlan, Place, SELECTED_NODE, VolumePlan, annotated, class_of, is_for,
    plan_claim, plan_volume,
};
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, STORAGE_CLASSES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};

const PROVISIONER: [&str; 2] =
    ["volume.beta.kubernetes.io/storage-provisioner", "volume.kubernetes.io/storage-provisioner"];
const PROVISIONED_BY: &str = "pv.kubernetes.io/provisioned-by";
/// Names of provisioners that upstream has built in; we have none of them.
const BUILT_IN: &str = "kubernetes.io/";

/// Starts both loops.
pub fn start(term: &Term) {
    let (claim_queue, volume_queue) = (Arc::new(Queue::default()), Arc::new(Queue::default()));
    let (claims, volumes) = (term.informers.of(&PERSISTENT_VOLUME_CLAIMS), term.informers.of(&PERSISTENT_VOLUMES));
    let (classes, nodes) = (term.informers.of(&STORAGE_CLASSES), term.informers.of(&NODES));
    let api = term.api("persistent-volume-binder");
    let binder = Arc::new(Binder {
        events: term.recorder.events(&api, "persistentvolume-controller"),
        api,
        claims: claims.clone(),
        volumes: volumes.clone(),
        classes: classes.clone(),
        nodes: nodes.clone(),
    });
    let needs = vec![claims.clone(), volumes.clone(), classes.clone(), nodes];
    let subscriptions = vec![
        enqueue_self(&claim_queue, &claims),
        enqueue_claims(&claim_queue, &claims, &volumes),
        enqueue_claims_of_class(&claim_queue, &claims, &classes),
    ];
    term.start(Controller {
        name: "persistentvolume-claims",
        queue: claim_queue,
        // Two claims at once could choose the same volume.
        concurrency: 1,
        needs: needs.clone(),
        subscriptions,
        reconcile: Arc::new(Claims(binder.clone())),
    });
    let subscriptions = vec![enqueue_self(&volume_queue, &volumes), enqueue_volume_of_claim(&volume_queue, &claims)];
    term.start(Controller {
        name: "persistentvolume-volumes",
        queue: volume_queue,
        concurrency: 2,
        needs,
        subscriptions,
        reconcile: Arc::new(Volumes(binder)),
    });
}

fn claim_of(volume: &Object) -> Option<Key> {
    let volume: PersistentVolume = volume.decode().ok()?;
    let reference = volume.spec?.claim_ref?;
    Some(Key::new(&reference.namespace?, &reference.name?))
}

/// A volume that changed is news for its claim, and for all that wait for one.
fn enqueue_claims(queue: &Arc<Queue>, claims: &Arc<Informer>, volumes: &Arc<Informer>) -> Subscription {
    let (queue, claims) = (queue.clone(), claims.clone());
    volumes.subscribe(move |delta| {
        delta.states().filter_map(|volume| claim_of(volume)).for_each(|claim| queue.add(claim));
        if delta.new.as_ref().is_some_and(|volume| volume.phase() == "Available") {
            claims
                .read()
                .iter()
                .filter(|claim| claim.phase() != "Bound")
                .for_each(|claim| queue.add(claim.key.clone()));
        }
    })
}

fn enqueue_claims_of_class(queue: &Arc<Queue>, claims: &Arc<Informer>, classes: &Arc<Informer>) -> Subscription {
    let (queue, claims) = (queue.clone(), claims.clone());
    classes.subscribe(move |_| {
        claims.read().iter().filter(|claim| claim.phase() != "Bound").for_each(|claim| queue.add(claim.key.clone()));
    })
}

fn enqueue_volume_of_claim(queue: &Arc<Queue>, claims: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    claims.subscribe(move |delta| {
        for claim in delta.states() {
            let claim: Option<PersistentVolumeClaim> = claim.decode().ok();
            let name = claim.and_then(|claim| claim.spec).and_then(|spec| spec.volume_name).unwrap_or_default();
            if !name.is_empty() {
                queue.add(Key::new("", &name));
            }
        }
    })
}

struct Binder {
    api: Api,
    events: Events,
    claims: Arc<Informer>,
    volumes: Arc<Informer>,
    classes: Arc<Informer>,
    nodes: Arc<Informer>,
}

struct Claims(Arc<Binder>);
struct Volumes(Arc<Binder>);

impl Reconcile for Claims {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.0.sync_claim(key).boxed()
    }
}

impl Reconcile for Volumes {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.0.sync_volume(key).boxed()
    }
}

impl Binder {
    async fn sync_claim(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.claims.get(key) else { return Ok(Next::Done) };
        let claim: PersistentVolumeClaim = object.decode()?;
        let class: Option<StorageClass> = match self.classes.get(&Key::new("", class_of(&claim))) {
            Some(class) => Some(class.decode()?),
            None => None,
        };
        let waits = class.as_ref().map(|class| class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer"));
        let node = claim.metadata.annotations.as_ref().and_then(|all| all.get(SELECTED_NODE));
        let node = node.and_then(|name| self.nodes.get(&Key::new("", name)));
        let place = node.as_ref().map(|node| Place { name: node.key.name(), labels: &node.labels });
        match plan_claim(&claim, &self.candidates(&claim)?, place.as_ref(), waits) {
            ClaimPlan::Bind(volume) => self.bind(&object, &claim, &volume).await?,
            ClaimPlan::Pending => self.set_claim_phase(&object, "Pending").await?,
            ClaimPlan::Waits(warns, reason, message) => {
                let kind = if warns { EventType::Warning } else { EventType::Normal };
                self.events.tell(&PERSISTENT_VOLUME_CLAIMS, &object, kind, reason, message);
                self.set_claim_phase(&object, "Pending").await?;
            }
            ClaimPlan::Provision => {
                self.provision(&object, &claim, class.as_ref()).await?;
            }
            ClaimPlan::Lost(reason, message) => {
                if object.phase() != "Lost" {
                    let text = message.to_owned();
                    self.events.tell(&PERSISTENT_VOLUME_CLAIMS, &object, EventType::Warning, reason, text);
                }
                self.set_claim_phase(&object, "Lost").await?;
            }
        }
        Ok(Next::Done)
    }

    /// The volume a claim names, or all.
    fn candidates(&self, claim: &PersistentVolumeClaim) -> Result<Vec<PersistentVolume>, serde_json::Error> {
        let chosen = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        if !chosen.is_empty() || annotated(&claim.metadata, BIND_COMPLETED) {
            return self.volumes.get(&Key::new("", chosen)).iter().map(|volume| volume.decode()).collect();
        }
        let all: Vec<Arc<Object>> = self.volumes.read().iter().cloned().collect();
        all.iter().map(|volume| volume.decode()).collect()
    }

    async fn set_claim_phase(&self, object: &Object, phase: &str) -> Result<(), ReconcileError> {
        if object.phase() != phase {
            let mut status = status_of(object)?;
            status["phase"] = json!(phase);
            self.api.update_status(&PERSISTENT_VOLUME_CLAIMS, object, &status).await?;
        }
        Ok(())
    }

    /// Ties both sides together, each step repeatable: reference, phase of the volume, name, phase of the claim.
    async fn bind(&self, object: &Object, claim: &PersistentVolumeClaim, name: &str) -> Result<(), ReconcileError> {
        let Some(mut volume_object) = self.volumes.get(&Key::new("", name)) else { return Ok(()) };
        let volume: PersistentVolume = volume_object.decode()?;
        let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
        let uid = claim.metadata.uid.as_deref().unwrap_or_default();
        if reference.and_then(|reference| reference.uid.as_deref()) != Some(uid) || !is_for(&volume, claim) {
            let mut patch = json!({
                "metadata": {"resourceVersion": volume_object.resource_version.to_string()},
                "spec": {"claimRef": {
                    "kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": object.key.namespace(),
                    "name": object.key.name(), "uid": uid, "resourceVersion": object.resource_version.to_string(),
                }},
            });
            if reference.is_none() {
                patch["metadata"]["annotations"] = json!({BOUND_BY_CONTROLLER: "yes"});
            }
            let key = volume_object.key.clone();
            volume_object = self.api.patch(&PERSISTENT_VOLUMES, &key, "", PatchKind::Merge, &patch).await?;
        }
        self.set_volume_phase(&volume_object, "Bound", None).await?;
        let chosen = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        let mut claim_object = None;
        if chosen != name || !annotated(&claim.metadata, BIND_COMPLETED) {
            let mut annotations = json!({BIND_COMPLETED: "yes"});
            if chosen != name {
                annotations[BOUND_BY_CONTROLLER] = json!("yes");
            }
            let patch = json!({
                "metadata": {"resourceVersion": object.resource_version.to_string(), "annotations": annotations},
                "spec": {"volumeName": name},
            });
            let kind = PatchKind::Merge;
            claim_object = Some(self.api.patch(&PERSISTENT_VOLUME_CLAIMS, &object.key, "", kind, &patch).await?);
        }
        let object = claim_object.as_deref().unwrap_or(object);
        if object.phase() != "Bound" {
            let spec = volume.spec.unwrap_or_default();
            let mut status = status_of(object)?;
            status["phase"] = json!("Bound");
            status["accessModes"] = json!(spec.access_modes);
            status["capacity"] = json!(spec.capacity);
            if let Some(class) = spec.volume_attributes_class_name.filter(|class| !class.is_empty()) {
                status["currentVolumeAttributesClassName"] = json!(class);
            }
            self.api.update_status(&PERSISTENT_VOLUME_CLAIMS, object, &status).await?;
        }
        Ok(())
    }

    /// Asks the class's provisioner for a volume.
    async fn provision(
        &self,
        object: &Object,
        claim: &PersistentVolumeClaim,
        class: Option<&StorageClass>,
    ) -> Result<(), ReconcileError> {
        let tell = |kind, reason, message| self.events.tell(&PERSISTENT_VOLUME_CLAIMS, object, kind, reason, message);
        let Some(class) = class else {
            let message = format!("storageclass.storage.k8s.io \"{}\" not found", class_of(claim));
            tell(EventType::Warning, "ProvisioningFailed", message);
            return self.set_claim_phase(object, "Pending").await;
        };
        let provisioner = class.provisioner.as_str();
        if provisioner.starts_with(BUILT_IN) {
            let message = format!("no volume plugin matched name: {provisioner}");
            tell(EventType::Warning, "ProvisioningFailed", message);
            return self.set_claim_phase(object, "Pending").await;
        }
        let message = format!(
            "Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually by the system administrator. If volume creation is delayed, please verify that the provisioner is running and correctly registered."
        );
        tell(EventType::Normal, "ExternalProvisioning", message);
        self.set_claim_phase(object, "Pending").await?;
        let annotations = claim.metadata.annotations.as_ref();
        let asked = PROVISIONER.iter().all(|key| annotations.and_then(|all| all.get(*key)) == Some(&class.provisioner));
        if !asked {
            let patch =
                json!({"metadata": {"annotations": {PROVISIONER[0]: provisioner, PROVISIONER[1]: provisioner}}});
            self.api.patch(&PERSISTENT_VOLUME_CLAIMS, &object.key, "", PatchKind::Merge, &patch).await?;
        }
        Ok(())
    }

    async fn sync_volume(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.volumes.get(key) else { return Ok(Next::Done) };
        let volume: PersistentVolume = object.decode()?;
        let claim: Option<PersistentVolumeClaim> = match claim_of(&object).and_then(|claim| self.claims.get(&claim)) {
            Some(claim) => Some(claim.decode()?),
            None => None,
        };
        match plan_volume(&volume, claim.as_ref()) {
            VolumePlan::Phase(phase) => self.set_volume_phase(&object, phase, None).await?,
            VolumePlan::Wait => {}
            VolumePlan::Release => {
                // Data is at stake: the last word has the API, not the cache.
                if self.claim_exists(&volume).await? {
                    return Err(ReconcileError::NotYet("the cache is behind the claim of a volume".to_owned()));
                }
                self.release(&object, &volume).await?;
            }
            VolumePlan::Unbind(forgets) => {
                let version = object.resource_version.to_string();
                let patch = if forgets {
                    json!({"metadata": {"resourceVersion": version, "annotations": {BOUND_BY_CONTROLLER: null}},
                        "spec": {"claimRef": null}})
                } else {
                    json!({"metadata": {"resourceVersion": version},
                        "spec": {"claimRef": {"uid": null, "resourceVersion": null}}})
                };
                let object = self.api.patch(&PERSISTENT_VOLUMES, key, "", PatchKind::Merge, &patch).await?;
                self.set_volume_phase(&object, "Available", None).await?;
            }
        }
        Ok(Next::Done)
    }

    /// Whether the API has the very claim that a volume refers to.
    async fn claim_exists(&self, volume: &PersistentVolume) -> Result<bool, ReconcileError> {
        let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else { return Ok(false) };
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let key = Key::new(&text(&reference.namespace), &text(&reference.name));
        match self.api.get::<PersistentVolumeClaim>(&PERSISTENT_VOLUME_CLAIMS, &key).await {
            Ok(claim) => Ok(claim.metadata.uid == reference.uid),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    async fn release(&self, object: &Object, volume: &PersistentVolume) -> Result<(), ReconcileError> {
        if object.phase() == "Failed" {
            return Ok(());
        }
        self.set_volume_phase(object, "Released", None).await?;
        let Some(object) = self.volumes.get(&object.key) else { return Ok(()) };
        let policy = volume.spec.as_ref().and_then(|spec| spec.persistent_volume_reclaim_policy.as_deref());
        let by = volume.metadata.annotations.as_ref().and_then(|all| all.get(PROVISIONED_BY));
        let failure = match policy {
            Some("Recycle") => ("VolumeFailedRecycle", "No recycler plugin found for the volume!".to_owned()),
            // Whoever made it deletes it.
            Some("Delete") if by.is_some_and(|by| !by.is_empty() && !by.starts_with(BUILT_IN)) => return Ok(()),
            Some("Delete") => {
                let name = object.key.name();
                let why = "no deletable volume plugin matched";
                let message = format!("error getting deleter volume plugin for volume {name:?}: {why}");
                ("VolumeFailedDelete", message)
            }
            _ => return Ok(()),
        };
        self.set_volume_phase(&object, "Failed", Some(failure)).await
    }

    /// Writes the phase if it is news. A reason (and message) goes into an event as well.
    async fn set_volume_phase(
        &self,
        object: &Object,
        phase: &str,
        failure: Option<(&'static str, String)>,
    ) -> Result<(), ReconcileError> {
        if object.phase() == phase {
            return Ok(());
        }
        let mut status = status_of(object)?;
        if let Some(fields) = status.as_object_mut() {
            fields.remove("reason");
            fields.remove("message");
        }
        status["phase"] = json!(phase);
        if let Some((reason, message)) = failure {
            status["message"] = json!(message);
            self.events.tell(&PERSISTENT_VOLUMES, object, EventType::Warning, reason, message);
        }
        self.api.update_status(&PERSISTENT_VOLUMES, object, &status).await?;
        Ok(())
    }
}

fn status_of(object: &Object) -> Result<Value, serde_json::Error> {
    let mut whole: Value = object.decode()?;
    let status = whole["status"].take();
    Ok(if status.is_object() { status } else { json!({}) })
}
