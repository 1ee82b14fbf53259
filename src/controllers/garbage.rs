//! Garbage collection: what all owners of are gone goes too; deletions in the foreground wait for dependents, those
//! with `orphan` let them go.
//!
//! A graph over all resources that the API serves, metadata only. An object is looked at again when its owners change,
//! one of them goes, or it is itself being deleted; whatever is done is decided on the object as the API has it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use http::Method;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, OwnerReference, Preconditions};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::Term;
use super::api::{Api, ApiError, PatchKind};
use super::cache::Delta;
use super::discovery::Discovery;
use super::informer::{Informers, Subscription};
use super::object::{Key, Object};
use super::queue::Queue;
use super::resource::{API_SERVICES, CUSTOM_RESOURCE_DEFINITIONS, Resource};
use super::runner::{Controller, Next, Reconcile, ReconcileError};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";
/// How often discovery is compared with what is watched when nothing announces a change.
const RESYNC: Duration = Duration::from_secs(30);
/// How long the first look waits for all resources to be listed.
const FIRST_SYNC: Duration = Duration::from_secs(30);

type Uid = Box<str>;

/// An object that owns, is owned or is being deleted.
#[derive(Clone, Debug)]
struct Node {
    resource: Arc<Resource>,
    key: Key,
    owners: Box<[OwnerReference]>,
    deleting: bool,
    foreground: bool,
    orphans: bool,
}

/// Who owns whom.
#[derive(Default)]
struct Graph {
    /// All objects there are.
    nodes: HashMap<Uid, Node>,
    /// Dependents by their owner's uid, whether or not that exists.
    dependents: HashMap<Uid, HashSet<Uid>>,
    /// Everything has been listed: who is not in `nodes` does not exist, as far as is known.
    complete: bool,
}

impl Graph {
    /// Takes in a change; answers the uids to look at.
    fn apply(&mut self, resource: &Arc<Resource>, delta: &Delta) -> Vec<Uid> {
        let mut wake = Vec::new();
        if let Some(old) = &delta.old
            && delta.new.as_ref().is_none_or(|new| new.uid != old.uid)
        {
            self.remove(old, &mut wake);
        }
        if let Some(new) = &delta.new {
            self.put(resource, new, &mut wake);
        }
        wake
    }

    fn put(&mut self, resource: &Arc<Resource>, object: &Object, wake: &mut Vec<Uid>) {
        let node = Node {
            resource: resource.clone(),
            key: object.key.clone(),
            owners: object.owners.clone(),
            deleting: object.deleting.is_some(),
            foreground: object.deleting.is_some() && has(object, FOREGROUND),
            orphans: object.deleting.is_some() && has(object, ORPHAN),
        };
        let acts = node.foreground || node.orphans;
        let old = self.nodes.insert(object.uid.clone(), node);
        let same_owners = old.as_ref().is_some_and(|old| old.owners == object.owners);
        if !same_owners {
            for owner in old.iter().flat_map(|old| &old.owners) {
                self.unlink(&owner.uid, &object.uid);
                // A foreground deletion may have waited for this one.
                if self.nodes.get(owner.uid.as_str()).is_some_and(|owner| owner.foreground) {
                    wake.push(owner.uid.as_str().into());
                }
            }
            for owner in &object.owners {
                self.dependents.entry(owner.uid.as_str().into()).or_default().insert(object.uid.clone());
            }
        }
        let unsettled = self.complete && object.owners.iter().any(|owner| self.is_unsettled(&owner.uid));
        if acts || (unsettled && !same_owners) {
            wake.push(object.uid.clone());
        }
    }

    /// Missing, or about to go in the foreground.
    fn is_unsettled(&self, uid: &str) -> bool {
        self.nodes.get(uid).is_none_or(|owner| owner.foreground)
    }

    fn remove(&mut self, object: &Object, wake: &mut Vec<Uid>) {
        self.nodes.remove(&object.uid);
        for owner in &object.owners {
            self.unlink(&owner.uid, &object.uid);
            if self.nodes.get(owner.uid.as_str()).is_some_and(|owner| owner.foreground) {
                wake.push(owner.uid.as_str().into());
            }
        }
        wake.extend(self.dependents.get(&object.uid).into_iter().flatten().cloned());
    }

    fn unlink(&mut self, owner: &str, dependent: &str) {
        if let Some(dependents) = self.dependents.get_mut(owner) {
            dependents.remove(dependent);
            if dependents.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    fn dependents_of(&self, uid: &str) -> Vec<(Uid, Node)> {
        let uids = self.dependents.get(uid).into_iter().flatten();
        uids.filter_map(|uid| Some((uid.clone(), self.nodes.get(uid)?.clone()))).collect()
    }

    /// Everything is listed: whose owners are missing is to be looked at.
    fn completed(&mut self) -> Vec<Uid> {
        if std::mem::replace(&mut self.complete, true) {
            return Vec::new();
        }
        let unsettled = self.nodes.iter().filter(|(_, node)| {
            node.foreground || node.orphans || node.owners.iter().any(|owner| self.is_unsettled(&owner.uid))
        });
        unsettled.map(|(uid, _)| uid.clone()).collect()
    }
}

fn has(object: &Object, finalizer: &str) -> bool {
    object.finalizers.iter().any(|candidate| **candidate == *finalizer)
}

/// Starts the loop and the task that follows discovery.
pub fn start(term: &Term, discovery: &Arc<Discovery>) {
    let queue = Arc::new(Queue::default());
    let graph: Arc<Mutex<Graph>> = Arc::default();
    let reconcile = Arc::new(Garbage {
        api: term.api("generic-garbage-collector"),
        discovery: discovery.clone(),
        graph: graph.clone(),
    });
    term.start(Controller {
        name: "garbage-collector",
        queue: queue.clone(),
        concurrency: 16,
        needs: Vec::new(),
        subscriptions: Vec::new(),
        reconcile,
    });
    let (informers, discovery) = (term.informers.clone(), discovery.clone());
    let watched: Arc<Mutex<HashMap<Resource, Subscription>>> = Arc::default();
    term.start_task("garbage-collector-discovery", move || {
        let (informers, discovery) = (informers.clone(), discovery.clone());
        follow(informers, discovery, queue.clone(), graph.clone(), watched.clone())
    });
}

/// Watches what discovery lists, and what it lists later.
async fn follow(
    informers: Arc<Informers>,
    discovery: Arc<Discovery>,
    queue: Arc<Queue>,
    graph: Arc<Mutex<Graph>>,
    watched: Arc<Mutex<HashMap<Resource, Subscription>>>,
) {
    let changed = Arc::new(tokio::sync::Notify::new());
    let announce = |resource: &Resource| {
        let (changed, discovery) = (changed.clone(), discovery.clone());
        informers.metadata_of(resource).subscribe(move |_| {
            discovery.forget();
            changed.notify_one();
        })
    };
    let _announcements = [announce(&CUSTOM_RESOURCE_DEFINITIONS), announce(&API_SERVICES)];
    loop {
        match discovery.catalog().await {
            Ok(catalog) => {
                let collectable = catalog.served.iter().filter(|served| {
                    served.can("list")
                        && served.can("watch")
                        && served.can("delete")
                        && served.resource.plural != "events"
                });
                let wanted: HashSet<Resource> = collectable.map(|served| served.resource.clone()).collect();
                watch(&informers, &wanted, catalog.failures.is_empty(), &watched, &queue, &graph);
                complete(&informers, &wanted, &queue, &graph).await;
            }
            Err(error) => tracing::debug!(%error, "discovery failed"),
        }
        // A custom resource is served a moment after its definition changed.
        tokio::select! {
            () = changed.notified() => tokio::time::sleep(Duration::from_millis(200)).await,
            () = tokio::time::sleep(RESYNC) => {}
        }
        discovery.forget();
    }
}

fn watch(
    informers: &Arc<Informers>,
    wanted: &HashSet<Resource>,
    all_known: bool,
    watched: &Mutex<HashMap<Resource, Subscription>>,
    queue: &Arc<Queue>,
    graph: &Arc<Mutex<Graph>>,
) {
    let mut watched = watched.lock();
    let gone: Vec<Resource> =
        watched.keys().filter(|resource| all_known && !wanted.contains(resource)).cloned().collect();
    for resource in gone {
        watched.remove(&resource);
        informers.drop_metadata(&resource);
        graph.lock().nodes.retain(|_, node| *node.resource != resource);
    }
    for resource in wanted {
        if watched.contains_key(resource) {
            continue;
        }
        let (queue, graph, shared) = (queue.clone(), graph.clone(), Arc::new(resource.clone()));
        let subscription = informers.metadata_of(resource).subscribe(move |delta| {
            let wake = graph.lock().apply(&shared, delta);
            wake.iter().for_each(|uid| queue.add(Key::new("", uid)));
        });
        watched.insert(resource.clone(), subscription);
    }
}

async fn complete(
    informers: &Arc<Informers>,
    wanted: &HashSet<Resource>,
    queue: &Arc<Queue>,
    graph: &Arc<Mutex<Graph>>,
) {
    if graph.lock().complete {
        return;
    }
    let deadline = Instant::now() + FIRST_SYNC;
    for resource in wanted {
        let informer = informers.metadata_of(resource);
        if tokio::time::timeout_at(deadline, informer.synced()).await.is_err() {
            tracing::warn!(%resource, "garbage collection goes on without a list of this resource");
        }
    }
    let wake = graph.lock().completed();
    wake.iter().for_each(|uid| queue.add(Key::new("", uid)));
}

struct Garbage {
    api: Api,
    discovery: Arc<Discovery>,
    graph: Arc<Mutex<Graph>>,
}

#[derive(Deserialize)]
struct Live {
    metadata: ObjectMeta,
}

/// What the owners of an object amount to.
#[derive(Debug, Default)]
struct Owners {
    /// There, and staying.
    solid: Vec<OwnerReference>,
    /// Gone.
    dangling: Vec<OwnerReference>,
    /// Going as soon as their dependents are gone.
    waiting: Vec<OwnerReference>,
}

impl Reconcile for Garbage {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        async move {
            match self.look_at(key.name()).await {
                Err(ReconcileError::Api(error)) if error.is_not_found() => Ok(Next::Done),
                other => other,
            }
        }
        .boxed()
    }
}

impl Garbage {
    async fn look_at(&self, uid: &str) -> Result<Next, ReconcileError> {
        let Some(node) = self.graph.lock().nodes.get(uid).cloned() else { return Ok(Next::Done) };
        if node.deleting && !node.foreground && !node.orphans {
            return Ok(Next::Done);
        }
        let live = self.api.get::<Live>(&node.resource, &node.key).await?.metadata;
        if live.uid.as_deref() != Some(uid) {
            return Ok(Next::Done);
        }
        let deleting = live.deletion_timestamp.is_some();
        let finalizer = |name: &str| live.finalizers.iter().flatten().any(|finalizer| finalizer == name);
        if deleting && finalizer(ORPHAN) {
            return self.orphan(uid, &node, &live).await;
        }
        if deleting && finalizer(FOREGROUND) {
            return self.wait_for_dependents(uid, &node, &live).await;
        }
        if deleting {
            return Ok(Next::Done);
        }
        self.collect(uid, &node, &live).await
    }

    /// Deletes the object when all its owners are gone or wait for it to go.
    async fn collect(&self, uid: &str, node: &Node, live: &ObjectMeta) -> Result<Next, ReconcileError> {
        let references = live.owner_references.clone().unwrap_or_default();
        if references.is_empty() {
            return Ok(Next::Done);
        }
        let Some(owners) = self.classify(node, references).await? else { return Ok(Next::After(RESYNC)) };
        if !owners.solid.is_empty() {
            if !owners.dangling.is_empty() || !owners.waiting.is_empty() {
                self.set_owners(node, live, &owners.solid).await?;
            }
            return Ok(Next::Done);
        }
        let dependents = self.graph.lock().dependents_of(uid);
        if !owners.waiting.is_empty() && !dependents.is_empty() {
            // Two that wait for each other would wait for ever.
            if dependents.iter().any(|(_, dependent)| dependent.foreground) {
                let mut references = live.owner_references.clone().unwrap_or_default();
                references.iter_mut().for_each(|owner| owner.block_owner_deletion = Some(false));
                self.set_owners(node, live, &references).await?;
            }
            self.delete(uid, node, live, "Foreground").await?;
            return Ok(Next::Done);
        }
        let finalizer = |name: &str| live.finalizers.iter().flatten().any(|finalizer| finalizer == name);
        let policy = match () {
            () if finalizer(ORPHAN) => "Orphan",
            () if finalizer(FOREGROUND) => "Foreground",
            () => "Background",
        };
        self.delete(uid, node, live, policy).await?;
        Ok(Next::Done)
    }

    /// `None` when the kind of an owner is not served (any more): nothing is known about it then.
    async fn classify(&self, node: &Node, references: Vec<OwnerReference>) -> Result<Option<Owners>, ApiError> {
        let mut owners = Owners::default();
        for reference in references {
            let known = self.graph.lock().nodes.get(reference.uid.as_str()).map(|owner| owner.foreground);
            match known {
                Some(true) => owners.waiting.push(reference),
                Some(false) => owners.solid.push(reference),
                None => match self.ask(node, &reference).await? {
                    Some(Some(true)) => owners.waiting.push(reference),
                    Some(Some(false)) => owners.solid.push(reference),
                    Some(None) => owners.dangling.push(reference),
                    None => return Ok(None),
                },
            }
        }
        Ok(Some(owners))
    }

    /// Asks the API for an owner that is not in the graph: whether it waits for dependents, `Some(None)` when it is gone.
    async fn ask(&self, node: &Node, owner: &OwnerReference) -> Result<Option<Option<bool>>, ApiError> {
        let catalog = self.discovery.catalog().await?;
        let Some(resource) = catalog.kind(&owner.api_version, &owner.kind) else { return Ok(None) };
        if resource.namespaced && node.key.namespace().is_empty() {
            // A cluster-scoped object cannot have an owner in a namespace; upstream leaves it alone.
            return Ok(None);
        }
        let namespace = if resource.namespaced { node.key.namespace() } else { "" };
        match self.api.get::<Live>(resource, &Key::new(namespace, &owner.name)).await {
            Ok(live) if live.metadata.uid.as_deref() == Some(&owner.uid) => {
                let waits = live.metadata.deletion_timestamp.is_some()
                    && live.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == FOREGROUND);
                Ok(Some(Some(waits)))
            }
            Ok(_another) => Ok(Some(None)),
            Err(error) if error.is_not_found() => Ok(Some(None)),
            Err(error) => Err(error),
        }
    }

    /// In the foreground: dependents first; the finalizer goes with the last one that blocks.
    async fn wait_for_dependents(&self, uid: &str, node: &Node, live: &ObjectMeta) -> Result<Next, ReconcileError> {
        let dependents = self.graph.lock().dependents_of(uid);
        let blocks = |dependent: &Node| {
            let mut references = dependent.owners.iter().filter(|owner| owner.uid == uid);
            references.any(|owner| owner.block_owner_deletion == Some(true))
        };
        let blocking = dependents.iter().filter(|(_, dependent)| blocks(dependent)).count();
        if blocking == 0 {
            self.remove_finalizer(node, live, FOREGROUND).await?;
            return Ok(Next::Done);
        }
        for (dependent_uid, dependent) in &dependents {
            if !dependent.deleting {
                let key = dependent_uid.to_string();
                match Box::pin(self.look_at_dependent(&key)).await {
                    Err(ReconcileError::Api(error)) if error.is_not_found() => {}
                    other => drop(other?),
                }
            }
        }
        Ok(Next::After(RESYNC))
    }

    async fn look_at_dependent(&self, uid: &str) -> Result<Next, ReconcileError> {
        let Some(node) = self.graph.lock().nodes.get(uid).cloned() else { return Ok(Next::Done) };
        let live = self.api.get::<Live>(&node.resource, &node.key).await?.metadata;
        if live.uid.as_deref() != Some(uid) || live.deletion_timestamp.is_some() {
            return Ok(Next::Done);
        }
        self.collect(uid, &node, &live).await
    }

    /// Lets the dependents go, then the object.
    async fn orphan(&self, uid: &str, node: &Node, live: &ObjectMeta) -> Result<Next, ReconcileError> {
        let dependents = self.graph.lock().dependents_of(uid);
        for (dependent_uid, dependent) in dependents {
            let current = match self.api.get::<Live>(&dependent.resource, &dependent.key).await {
                Ok(current) if current.metadata.uid.as_deref() == Some(&dependent_uid) => current.metadata,
                Ok(_another) => continue,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error.into()),
            };
            let mut owners = current.owner_references.clone().unwrap_or_default();
            owners.retain(|owner| owner.uid != uid);
            match self.set_owners(&dependent, &current, &owners).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        self.remove_finalizer(node, live, ORPHAN).await?;
        Ok(Next::Done)
    }

    async fn set_owners(&self, node: &Node, live: &ObjectMeta, owners: &[OwnerReference]) -> Result<(), ApiError> {
        let patch =
            json!({"metadata": {"uid": live.uid, "resourceVersion": live.resource_version, "ownerReferences": owners}});
        self.patch(node, &patch).await
    }

    async fn remove_finalizer(&self, node: &Node, live: &ObjectMeta, finalizer: &str) -> Result<(), ApiError> {
        let mut finalizers = live.finalizers.clone().unwrap_or_default();
        finalizers.retain(|candidate| candidate != finalizer);
        let patch =
            json!({"metadata": {"uid": live.uid, "resourceVersion": live.resource_version, "finalizers": finalizers}});
        match self.patch(node, &patch).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other,
        }
    }

    /// A patch may be the end of the object, and the answer of that is no state to remember: it is not written through.
    async fn patch(&self, node: &Node, patch: &serde_json::Value) -> Result<(), ApiError> {
        let path = node.resource.object(node.key.namespace(), node.key.name());
        let kind = PatchKind::Merge.media_type();
        self.api.send(Method::PATCH, &path, kind, serde_json::to_vec(patch)?).await.map(drop)
    }

    async fn delete(&self, uid: &str, node: &Node, live: &ObjectMeta, policy: &str) -> Result<(), ReconcileError> {
        let options = DeleteOptions {
            propagation_policy: Some(policy.to_owned()),
            preconditions: Some(Preconditions {
                uid: Some(uid.to_owned()),
                // Who changed owners meanwhile saved the object; it is looked at again.
                resource_version: live.resource_version.clone().filter(|_| policy == "Background"),
            }),
            ..DeleteOptions::default()
        };
        self.api.delete_with(&node.resource, &node.key, uid, &options).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use crate::controllers::resource::PODS;

    fn object(uid: &str, owners: &[&str], finalizers: &[&str]) -> Arc<Object> {
        let owners: Vec<_> = owners
            .iter()
            .map(|uid| json!({"apiVersion": "v1", "kind": "Pod", "name": uid, "uid": uid, "blockOwnerDeletion": true}))
            .collect();
        let json = json!({"metadata": {"name": uid, "namespace": "n", "uid": uid, "ownerReferences": owners, "finalizers": finalizers,
            "deletionTimestamp": (!finalizers.is_empty()).then_some("2026-01-01T00:00:00Z")}});
        Arc::new(parse(&PODS, json.to_string().as_bytes(), true).unwrap())
    }

    fn change(graph: &mut Graph, old: Option<&Arc<Object>>, new: Option<&Arc<Object>>) -> Vec<String> {
        let delta = Delta { old: old.cloned(), new: new.cloned() };
        let mut wake: Vec<String> =
            graph.apply(&Arc::new(PODS.clone()), &delta).iter().map(|uid| uid.to_string()).collect();
        wake.sort();
        wake
    }

    #[test]
    fn dependents_are_looked_at_when_their_owner_goes() {
        let mut graph = Graph { complete: true, ..Graph::default() };
        let (owner, child) = (object("owner", &[], &[]), object("child", &["owner"], &[]));
        assert!(change(&mut graph, None, Some(&owner)).is_empty());
        assert!(change(&mut graph, None, Some(&child)).is_empty());
        assert_eq!(change(&mut graph, Some(&owner), None), ["child"]);
        // One whose owner never came is looked at, too.
        assert_eq!(change(&mut graph, None, Some(&object("stray", &["nobody"], &[]))), ["stray"]);
    }

    #[test]
    fn before_everything_is_listed_nobody_is_taken_for_an_orphan() {
        let mut graph = Graph::default();
        assert!(change(&mut graph, None, Some(&object("child", &["owner"], &[]))).is_empty());
        assert!(change(&mut graph, None, Some(&object("stray", &["nobody"], &[]))).is_empty());
        change(&mut graph, None, Some(&object("owner", &[], &[])));
        assert_eq!(graph.completed(), ["stray".into()]);
        assert!(graph.completed().is_empty());
    }

    #[test]
    fn a_foreground_deletion_is_looked_at_again_whenever_a_dependent_goes() {
        let mut graph = Graph { complete: true, ..Graph::default() };
        let (owner, child) = (object("owner", &[], &[FOREGROUND]), object("child", &["owner"], &[]));
        assert_eq!(change(&mut graph, None, Some(&owner)), ["owner"]);
        assert_eq!(change(&mut graph, None, Some(&child)), ["child"]);
        assert_eq!(change(&mut graph, Some(&child), None), ["owner"]);
        assert!(graph.dependents_of("owner").is_empty());
    }
}
