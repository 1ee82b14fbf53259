//! ControllerRevisions: the templates that a DaemonSet or StatefulSet has had.

use std::collections::HashSet;
use std::sync::Arc;

use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};

use super::api::{Api, ApiError, PatchKind};
use super::informer::Informer;
use super::object::{Key, Object};
use super::resource::{CONTROLLER_REVISIONS, Resource};
use super::runner::ReconcileError;
use super::template::{controller_reference, hash, without_empty};

/// Label of revisions and pods that names the revision.
pub const REVISION_HASH: &str = "controller-revision-hash";
/// A hash that collides is changed this often before giving up.
const MAX_COLLISIONS: i32 = 20;

/// One revision.
#[derive(Clone, Debug, Default)]
pub struct Revision {
    /// Name of the ControllerRevision.
    pub name: String,
    /// Uid of the ControllerRevision.
    pub uid: String,
    /// Hash, part of the name.
    pub hash: String,
    /// Its number; the highest is the newest.
    pub number: i64,
    /// The template, as the owner's JSON had it.
    pub template: Value,
}

/// All revisions of an owner, and the one of its template.
#[derive(Debug)]
pub struct History {
    /// The revision of the present template.
    pub update: Revision,
    /// All others, oldest first.
    pub old: Vec<Revision>,
    /// `status.collisionCount` from now on.
    pub collisions: i32,
}

/// Reads the revisions and makes sure that the newest is that of the template.
pub async fn sync(
    api: &Api,
    resource: &Resource,
    owner: &Object,
    revisions: &Informer,
    mut collisions: i32,
) -> Result<History, ReconcileError> {
    let body: Value = serde_json::from_slice(&owner.bytes)?;
    let template = body.pointer("/spec/template").cloned().unwrap_or_default();
    let mut all = read(owner, revisions)?;
    all.sort_by_key(|revision| revision.number);
    let newest = all.last().map_or(0, |revision| revision.number);
    let wanted = without_empty(template.clone());
    let equal = all.iter().rposition(|revision| without_empty(revision.template.clone()) == wanted);
    if let Some(index) = equal {
        let mut update = all.remove(index);
        if update.number < newest {
            update.number = newest + 1;
            let key = Key::new(owner.key.namespace(), &update.name);
            api.patch(&CONTROLLER_REVISIONS, &key, "", PatchKind::Merge, &json!({"revision": update.number})).await?;
        }
        return Ok(History { update, old: all, collisions });
    }
    loop {
        match create(api, resource, owner, &template, newest + 1, collisions).await {
            Ok(update) => return Ok(History { update, old: all, collisions }),
            Err(error) if error.is_already_exists() && collisions < MAX_COLLISIONS => collisions += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

fn read(owner: &Object, revisions: &Informer) -> Result<Vec<Revision>, serde_json::Error> {
    let owned: Vec<Arc<Object>> = revisions.read().controlled_by(&owner.uid).cloned().collect();
    owned
        .iter()
        .map(|object| {
            let revision: ControllerRevision = object.decode()?;
            let mut template =
                revision.data.and_then(|data| data.0.pointer("/spec/template").cloned()).unwrap_or_default();
            if let Some(fields) = template.as_object_mut() {
                fields.remove("$patch");
            }
            let hash = object.labels.get(REVISION_HASH).or_else(|| object.labels.get("controller.kubernetes.io/hash"));
            Ok(Revision {
                name: object.key.name().to_owned(),
                uid: object.uid.to_string(),
                hash: hash.unwrap_or(object.key.name()).to_owned(),
                number: revision.revision,
                template,
            })
        })
        .collect()
}

async fn create(
    api: &Api,
    resource: &Resource,
    owner: &Object,
    template: &Value,
    number: i64,
    collisions: i32,
) -> Result<Revision, ApiError> {
    let canonical = without_empty(template.clone()).unwrap_or_default();
    let hash = hash(&canonical, (collisions > 0).then_some(collisions));
    let mut data = template.clone();
    if let Some(fields) = data.as_object_mut() {
        fields.insert("$patch".to_owned(), json!("replace"));
    }
    let mut labels = template.pointer("/metadata/labels").cloned().unwrap_or_else(|| json!({}));
    labels[REVISION_HASH] = json!(hash);
    let name = format!("{}-{hash}", owner.key.name());
    let revision = ControllerRevision {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(owner.key.namespace().to_owned()),
            labels: serde_json::from_value(labels)?,
            owner_references: Some(vec![controller_reference(resource, owner)]),
            ..ObjectMeta::default()
        },
        data: Some(k8s_openapi::apimachinery::pkg::runtime::RawExtension(json!({"spec": {"template": data}}))),
        revision: number,
    };
    let created = api.create(&CONTROLLER_REVISIONS, owner.key.namespace(), &revision).await?;
    Ok(Revision { name, uid: created.uid.to_string(), hash, number, template: template.clone() })
}

/// Deletes the oldest revisions that nothing uses, beyond the limit.
pub async fn clean_up(
    api: &Api,
    namespace: &str,
    old: &[Revision],
    live: &HashSet<String>,
    limit: i32,
) -> Result<(), ApiError> {
    let unused: Vec<&Revision> =
        old.iter().filter(|revision| !live.contains(&revision.hash) && !live.contains(&revision.name)).collect();
    let excess = unused.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
    for revision in unused.into_iter().take(excess) {
        api.delete(&CONTROLLER_REVISIONS, &Key::new(namespace, &revision.name), &revision.uid).await?;
    }
    Ok(())
}
