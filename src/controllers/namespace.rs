//! Deletion of namespaces: first the pods, then everything else, then the namespace itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use http::Method;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Namespace, NamespaceCondition, NamespaceStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ObjectMeta, Time};
use serde::Deserialize;

use super::Term;
use super::api::{Api, ApiError, send};
use super::discovery::{Discovery, Served};
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{NAMESPACES, PODS, Resource};
use super::runner::{Controller, Next, Reconcile, ReconcileError};

/// The finalizer in `spec.finalizers` that stands for this loop.
const FINALIZER: &str = "kubernetes";
/// How soon to look again at what waits for grace periods or finalizers.
const AGAIN: Duration = Duration::from_secs(2);

/// Starts the loop.
pub fn start(term: &Term, discovery: &Arc<Discovery>) {
    let queue = Arc::new(Queue::default());
    let (namespaces, pods) = (term.informers.of(&NAMESPACES), term.informers.of(&PODS));
    let (again, known) = (queue.clone(), namespaces.clone());
    let subscriptions = vec![
        enqueue_self(&queue, &namespaces),
        // The last pod is gone: the rest may go.
        pods.subscribe(move |delta| {
            let Some(pod) = delta.old.as_ref().filter(|_| delta.new.is_none()) else { return };
            let key = Key::new("", pod.key.namespace());
            if known.get(&key).is_some_and(|namespace| namespace.deleting.is_some()) {
                again.add_after(key, Duration::from_millis(20));
            }
        }),
    ];
    let reconcile = Arc::new(Namespaces {
        client: (term.context.client_for)("system:serviceaccount:kube-system:namespace-controller"),
        api: term.api("namespace-controller"),
        discovery: discovery.clone(),
        namespaces: namespaces.clone(),
    });
    let needs = vec![namespaces, pods];
    term.start(Controller { name: "namespace", queue, concurrency: 8, needs, subscriptions, reconcile });
}

struct Namespaces {
    client: kube::Client,
    api: Api,
    discovery: Arc<Discovery>,
    namespaces: Arc<Informer>,
}

/// What is left of a namespace's content.
#[derive(Debug, Default)]
pub struct Remaining {
    /// Number of objects by `plural.group`.
    pub resources: BTreeMap<String, usize>,
    /// Number of objects by finalizer.
    pub finalizers: BTreeMap<String, usize>,
    /// Why something could not be deleted.
    pub errors: Vec<String>,
    /// Groups that discovery could not list.
    pub undiscovered: Vec<String>,
}

/// The conditions that tell what is left, with upstream's types, reasons and messages.
pub fn conditions(present: &[NamespaceCondition], remaining: &Remaining, now: Timestamp) -> Vec<NamespaceCondition> {
    let listed = |counts: &BTreeMap<String, usize>, word: &str| {
        let parts: Vec<String> =
            counts.iter().map(|(name, count)| format!("{name} {word} {count} resource instances")).collect();
        parts.join(", ")
    };
    let discovery = (!remaining.undiscovered.is_empty()).then(|| {
        let (count, what) = (remaining.undiscovered.len(), remaining.undiscovered.join(", "));
        format!("Discovery failed for some groups, {count} failing: unable to retrieve the complete list of server APIs: {what}")
    });
    let mut errors = remaining.errors.clone();
    errors.sort();
    let content = (!errors.is_empty())
        .then(|| format!("Failed to delete all resource types, {} remaining: {}", errors.len(), errors.join(", ")));
    let resources = (!remaining.resources.is_empty())
        .then(|| format!("Some resources are remaining: {}", listed(&remaining.resources, "has")));
    let finalizers = (!remaining.finalizers.is_empty()).then(|| {
        format!("Some content in the namespace has finalizers remaining: {}", listed(&remaining.finalizers, "in"))
    });
    let rows = [
        (
            "NamespaceDeletionDiscoveryFailure",
            discovery,
            "DiscoveryFailed",
            "ResourcesDiscovered",
            "All resources successfully discovered",
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            "GroupVersionParsingFailed",
            "ParsedGroupVersions",
            "All legacy kube types successfully parsed",
        ),
        (
            "NamespaceDeletionContentFailure",
            content,
            "ContentDeletionFailed",
            "ContentDeleted",
            "All content successfully deleted, may be waiting on finalization",
        ),
        (
            "NamespaceContentRemaining",
            resources,
            "SomeResourcesRemain",
            "ContentRemoved",
            "All content successfully removed",
        ),
        (
            "NamespaceFinalizersRemaining",
            finalizers,
            "SomeFinalizersRemain",
            "ContentHasNoFinalizers",
            "All content-preserving finalizers finished",
        ),
    ];
    let mut all = present.to_vec();
    for (kind, problem, bad, good, well) in rows {
        let status = if problem.is_some() { "True" } else { "False" };
        let reason = if problem.is_some() { bad } else { good };
        let message = problem.unwrap_or_else(|| well.to_owned());
        let index = all.iter().position(|condition| condition.type_ == kind);
        let since = index.map(|index| all.remove(index)).filter(|old| old.status == status);
        let condition = NamespaceCondition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message),
            last_transition_time: since.and_then(|old| old.last_transition_time).or(Some(Time(now))),
        };
        all.insert(index.unwrap_or(all.len()), condition);
    }
    all
}

#[derive(Deserialize)]
struct MetadataList {
    #[serde(default)]
    items: Option<Vec<MetadataItem>>,
}

#[derive(Deserialize)]
struct MetadataItem {
    metadata: ObjectMeta,
}

impl Reconcile for Namespaces {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Namespaces {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.namespaces.get(key).filter(|object| object.deleting.is_some()) else {
            return Ok(Next::Done);
        };
        let mut namespace: Namespace = object.decode()?;
        let mut object = object;
        let status = namespace.status.get_or_insert_default();
        if status.phase.as_deref() != Some("Terminating") {
            status.phase = Some("Terminating".to_owned());
            object = self.api.update_status(&NAMESPACES, &object, status).await?;
            namespace = object.decode()?;
        }
        let finalizers = namespace.spec.as_ref().and_then(|spec| spec.finalizers.clone()).unwrap_or_default();
        if finalizers.is_empty() {
            return Ok(Next::Done);
        }
        let remaining = self.empty(key.name()).await?;
        let object = self.tell(&object, &namespace, &remaining).await?;
        if !remaining.resources.is_empty() {
            return Ok(Next::After(AGAIN));
        }
        if !remaining.errors.is_empty() || !remaining.undiscovered.is_empty() {
            return Err(ReconcileError::NotYet("some content of the namespace could not be deleted".to_owned()));
        }
        self.finalize(&object).await?;
        Ok(Next::Done)
    }

    async fn tell(
        &self,
        object: &Arc<Object>,
        namespace: &Namespace,
        remaining: &Remaining,
    ) -> Result<Arc<Object>, ApiError> {
        let status = namespace.status.clone().unwrap_or_default();
        let present = status.conditions.clone().unwrap_or_default();
        // Who deletes an empty namespace wants no history of it.
        let eventless =
            remaining.resources.is_empty() && remaining.errors.is_empty() && remaining.undiscovered.is_empty();
        let wanted = conditions(&present, remaining, Timestamp::now());
        if wanted == present || (eventless && present.is_empty()) {
            return Ok(object.clone());
        }
        let status = NamespaceStatus { conditions: Some(wanted), ..status };
        self.api.update_status(&NAMESPACES, object, &status).await
    }

    /// Deletes the content: while there are pods, only them.
    async fn empty(&self, namespace: &str) -> Result<Remaining, ApiError> {
        let catalog = self.discovery.catalog().await?;
        let mut remaining = Remaining { undiscovered: catalog.failures.clone(), ..Remaining::default() };
        let deletable = catalog.served.iter().filter(|served| served.resource.namespaced && served.can("delete"));
        let (pods, others): (Vec<&Served>, Vec<&Served>) = deletable.partition(|served| served.resource == PODS);
        for served in pods {
            self.empty_of(served, namespace, &mut remaining).await;
        }
        if !remaining.resources.is_empty() {
            return Ok(remaining);
        }
        for served in others {
            self.empty_of(served, namespace, &mut remaining).await;
        }
        Ok(remaining)
    }

    async fn empty_of(&self, served: &Served, namespace: &str, remaining: &mut Remaining) {
        let resource = &served.resource;
        let result = async {
            if !served.can("list") || self.list(resource, namespace).await?.is_empty() {
                return Ok(Vec::new());
            }
            self.delete_all(served, namespace).await?;
            self.list(resource, namespace).await
        };
        match result.await {
            Ok(left) if left.is_empty() => {}
            Ok(left) => {
                for finalizer in left.iter().flat_map(|item| item.finalizers.iter().flatten()) {
                    *remaining.finalizers.entry(finalizer.clone()).or_default() += 1;
                }
                remaining.resources.insert(format!("{}.{}", resource.plural, resource.group), left.len());
            }
            Err(error) => remaining.errors.push(error.to_string()),
        }
    }

    async fn list(&self, resource: &Resource, namespace: &str) -> Result<Vec<ObjectMeta>, ApiError> {
        let accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json";
        let path = resource.collection(namespace);
        match send(&self.client, Method::GET, &path, "", accept, Vec::new()).await {
            Ok(bytes) => {
                let list: MetadataList = serde_json::from_slice(&bytes)?;
                Ok(list.items.into_iter().flatten().map(|item| item.metadata).collect())
            }
            Err(error) if error.is_not_found() || error.code() == 405 => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    async fn delete_all(&self, served: &Served, namespace: &str) -> Result<(), ApiError> {
        let background =
            DeleteOptions { propagation_policy: Some("Background".to_owned()), ..DeleteOptions::default() };
        if served.can("deletecollection") {
            let body = serde_json::to_vec(&background)?;
            let path = served.resource.collection(namespace);
            match self.api.send(Method::DELETE, &path, "application/json", body).await {
                Err(error) if error.is_not_found() || error.code() == 405 => {}
                other => return other.map(drop),
            }
        }
        for item in self.list(&served.resource, namespace).await? {
            let key = Key::new(namespace, item.name.as_deref().unwrap_or_default());
            let uid = item.uid.unwrap_or_default();
            self.api.delete_with(&served.resource, &key, &uid, &background).await?;
        }
        Ok(())
    }

    async fn finalize(&self, object: &Object) -> Result<(), ApiError> {
        let mut namespace: Namespace = object.decode()?;
        let spec = namespace.spec.get_or_insert_default();
        spec.finalizers.get_or_insert_default().retain(|finalizer| finalizer != FINALIZER);
        let path = format!("{}/finalize", NAMESPACES.object("", object.key.name()));
        match self.api.send(Method::PUT, &path, "application/json", serde_json::to_vec(&namespace)?).await {
            Err(error) if error.is_not_found() => Ok(()),
            other => other.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn condition<'a>(conditions: &'a [NamespaceCondition], kind: &str) -> &'a NamespaceCondition {
        conditions.iter().find(|condition| condition.type_ == kind).unwrap()
    }

    #[test]
    fn conditions_tell_what_remains_and_keep_their_time_while_they_hold() {
        let then: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let remaining = Remaining {
            resources: BTreeMap::from([("pods.".to_owned(), 2)]),
            finalizers: BTreeMap::from([("example.com/f".to_owned(), 1)]),
            ..Remaining::default()
        };
        let first = conditions(&[], &remaining, then);
        assert_eq!(first.len(), 5);
        let content = condition(&first, "NamespaceContentRemaining");
        assert_eq!(content.message.as_deref(), Some("Some resources are remaining: pods. has 2 resource instances"));
        assert_eq!(
            condition(&first, "NamespaceFinalizersRemaining").message.as_deref(),
            Some("Some content in the namespace has finalizers remaining: example.com/f in 1 resource instances")
        );
        assert_eq!(conditions(&first, &remaining, now), first);
        let done = conditions(&first, &Remaining::default(), now);
        let content = condition(&done, "NamespaceContentRemaining");
        assert_eq!((content.status.as_str(), content.reason.as_deref()), ("False", Some("ContentRemoved")));
        assert_eq!(content.last_transition_time, Some(Time(now)));
        assert_eq!(condition(&done, "NamespaceDeletionContentFailure").last_transition_time, Some(Time(then)));
    }
}
