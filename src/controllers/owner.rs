//! Who controls what: loops adopt orphans that their selector matches and release what it no longer matches.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use serde::Deserialize;
use serde_json::json;

use super::api::{Api, ApiError, PatchKind};
use super::informer::Informer;
use super::object::{Key, Object};
use super::queue::Queue;
use super::resource::Resource;
use super::runner::ReconcileError;
use super::selector::Selector;
use super::template::controller_reference;

/// What to do about one object.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is ours.
    Keep,
    /// It is nobody's and matches.
    Adopt,
    /// It is ours and does not match any more.
    Release,
    /// It is none of our business.
    Ignore,
}

/// Decides about an object that `owner` might control.
pub fn claim(owner: &Object, selector: &Selector, candidate: &Object) -> Claim {
    let matches = selector.matches(&candidate.labels);
    match candidate.controller() {
        Some(controller) if *controller.uid != *owner.uid => Claim::Ignore,
        Some(_) if matches => Claim::Keep,
        Some(_) if owner.deleting.is_some() => Claim::Ignore,
        Some(_) => Claim::Release,
        None if owner.deleting.is_some() || !matches => Claim::Ignore,
        None if candidate.deleting.is_some() => Claim::Ignore,
        None => Claim::Adopt,
    }
}

/// The objects of `informer` in the owner's namespace that it controls, after adopting and releasing.
/// Finished or deleted pods are among them; the caller filters.
pub async fn claim_all(
    api: &Api,
    owner_resource: &Resource,
    owner: &Object,
    selector: &Selector,
    informer: &Informer,
) -> Result<Vec<Arc<Object>>, ReconcileError> {
    let claims: Vec<(Claim, Arc<Object>)> = informer
        .read()
        .namespace(owner.key.namespace())
        .filter_map(|candidate| match claim(owner, selector, candidate) {
            Claim::Ignore => None,
            claim => Some((claim, candidate.clone())),
        })
        .collect();
    let mut owned = Vec::with_capacity(claims.len());
    let mut may_adopt = None;
    for (claim, object) in claims {
        match claim {
            Claim::Keep => owned.push(object),
            Claim::Release => release(api, informer.resource(), owner, &object).await?,
            Claim::Adopt => {
                // The cached owner may be stale; ask once whether it still is the one and lives.
                if may_adopt.is_none() {
                    may_adopt = Some(lives(api, owner_resource, owner).await?);
                }
                if may_adopt == Some(true)
                    && let Some(adopted) = adopt(api, informer.resource(), owner_resource, owner, &object).await?
                {
                    owned.push(adopted);
                }
            }
            Claim::Ignore => {}
        }
    }
    Ok(owned)
}

#[derive(Deserialize)]
struct MetadataOnly {
    metadata: ObjectMeta,
}

async fn lives(api: &Api, resource: &Resource, owner: &Object) -> Result<bool, ApiError> {
    match api.get::<MetadataOnly>(resource, &owner.key).await {
        Ok(live) => Ok(live.metadata.uid.as_deref() == Some(&*owner.uid) && live.metadata.deletion_timestamp.is_none()),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

async fn adopt(
    api: &Api,
    resource: &Resource,
    owner_resource: &Resource,
    owner: &Object,
    object: &Object,
) -> Result<Option<Arc<Object>>, ApiError> {
    let mut owners = object.owners.to_vec();
    owners.push(controller_reference(owner_resource, owner));
    tolerate_gone(set_owners(api, resource, object, &owners).await)
}

async fn release(api: &Api, resource: &Resource, owner: &Object, object: &Object) -> Result<(), ApiError> {
    let owners: Vec<OwnerReference> =
        object.owners.iter().filter(|reference| *reference.uid != *owner.uid).cloned().collect();
    tolerate_gone(set_owners(api, resource, object, &owners).await).map(drop)
}

fn tolerate_gone(result: Result<Arc<Object>, ApiError>) -> Result<Option<Arc<Object>>, ApiError> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.is_not_found() || error.is_invalid() => Ok(None),
        Err(error) => Err(error),
    }
}

async fn set_owners(
    api: &Api,
    resource: &Resource,
    object: &Object,
    owners: &[OwnerReference],
) -> Result<Arc<Object>, ApiError> {
    let patch = json!({"metadata": {
        "uid": &*object.uid,
        "resourceVersion": object.resource_version.to_string(),
        "ownerReferences": owners,
    }});
    api.patch(resource, &object.key, "", PatchKind::Merge, &patch).await
}

/// Asks for the owner of kind `owner_resource` whenever one of `dependents` changes; an orphan asks for every owner in
/// its namespace whose selector matches it.
pub fn enqueue_owner(
    queue: &Arc<Queue>,
    owner_resource: &Resource,
    owners: &Arc<Informer>,
    dependents: &Arc<Informer>,
) -> super::informer::Subscription {
    let (queue, owners, kind) = (queue.clone(), owners.clone(), owner_resource.clone());
    dependents.subscribe(move |delta| {
        let mut owned = false;
        for object in delta.states() {
            let Some(controller) = object.controller() else { continue };
            owned = true;
            if controller.kind == kind.kind && same_group(&controller.api_version, &kind) {
                queue.add(Key::new(object.key.namespace(), &controller.name));
            }
        }
        let Some(orphan) = delta.new.as_ref().filter(|_| !owned) else { return };
        if orphan.deleting.is_some() {
            return;
        }
        for owner in owners.read().namespace(orphan.key.namespace()) {
            if owner.selector.as_ref().is_some_and(|selector| selector.matches(&orphan.labels)) {
                queue.add(owner.key.clone());
            }
        }
    })
}

/// Asks for every object of an informer that changes, itself.
pub fn enqueue_self(queue: &Arc<Queue>, informer: &Arc<Informer>) -> super::informer::Subscription {
    let queue = queue.clone();
    informer.subscribe(move |delta| {
        if let Some(object) = delta.latest() {
            queue.add(object.key.clone());
        }
    })
}

/// Whether an `apiVersion` is of the resource's group.
pub fn same_group(api_version: &str, resource: &Resource) -> bool {
    api_version.rsplit_once('/').map_or("", |(group, _)| group) == resource.group
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use crate::controllers::resource::{PODS, REPLICA_SETS};
    use crate::controllers::selector::Labels;

    fn object(resource: &Resource, json: serde_json::Value) -> Object {
        parse(resource, json.to_string().as_bytes(), false).unwrap()
    }

    #[test]
    fn orphans_are_adopted_strays_released_and_others_left_alone() {
        let owner = object(&REPLICA_SETS, json!({"metadata": {"name": "r", "namespace": "n", "uid": "me"}}));
        let selector = Selector::of_map(
            &[("a".to_owned(), "1".to_owned())].into_iter().collect::<std::collections::BTreeMap<_, _>>(),
        );
        let pod = |label: &str, controller: Option<&str>, deleting: bool| {
            let owners = controller.map(|uid| json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "r", "uid": uid, "controller": true}]));
            object(
                &PODS,
                json!({"metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a": label},
                "ownerReferences": owners, "deletionTimestamp": deleting.then_some("2026-01-01T00:00:00Z")}}),
            )
        };
        assert_eq!(claim(&owner, &selector, &pod("1", Some("me"), false)), Claim::Keep);
        assert_eq!(claim(&owner, &selector, &pod("2", Some("me"), false)), Claim::Release);
        assert_eq!(claim(&owner, &selector, &pod("1", Some("you"), false)), Claim::Ignore);
        assert_eq!(claim(&owner, &selector, &pod("1", None, false)), Claim::Adopt);
        assert_eq!(claim(&owner, &selector, &pod("1", None, true)), Claim::Ignore);
        assert_eq!(claim(&owner, &selector, &pod("2", None, false)), Claim::Ignore);
        assert!(!selector.matches(&Labels::default()));
    }
}
