//! StatefulSets: pods with names and claims of their own, made and replaced in order.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{StatefulSet, StatefulSetSpec, StatefulSetStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaimVolumeSource, PodTemplateSpec, Volume};
use serde_json::json;

use super::Term;
use super::api::{Api, PatchKind};
use super::event::{EventType, Events};
use super::history::{self, History, REVISION_HASH};
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::{claim_all, enqueue_owner, enqueue_self};
use super::queue::Queue;
use super::replicaset::next_available;
use super::resource::{CONTROLLER_REVISIONS, PERSISTENT_VOLUME_CLAIMS, PODS, STATEFUL_SETS};
use super::retention::{Retention, is_going};
use super::rollout::scaled;
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::template::{PodName, controller_reference, pod};

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (sets, pods) = (term.informers.of(&STATEFUL_SETS), term.informers.of(&PODS));
    let (revisions, claims) = (term.informers.of(&CONTROLLER_REVISIONS), term.informers.of(&PERSISTENT_VOLUME_CLAIMS));
    let api = term.api("statefulset-controller");
    let subscriptions = vec![enqueue_self(&queue, &sets), enqueue_owner(&queue, &STATEFUL_SETS, &sets, &pods)];
    let reconcile = Arc::new(StatefulSets {
        events: term.recorder.events(&api, "statefulset-controller"),
        api,
        sets: sets.clone(),
        pods: pods.clone(),
        revisions: revisions.clone(),
        claims: claims.clone(),
    });
    let needs = vec![sets, pods, revisions, claims];
    term.start(Controller { name: "statefulset", queue, concurrency: 8, needs, subscriptions, reconcile });
}

/// A pod of the set.
#[derive(Clone, Debug)]
pub struct Member {
    /// Number at the end of its name.
    pub ordinal: i32,
    /// Name of its revision.
    pub revision: String,
    /// Being deleted.
    pub terminating: bool,
    /// Failed or succeeded.
    pub ended: bool,
    /// Running and ready.
    pub ready: bool,
    /// Ready for long enough.
    pub available: bool,
}

/// What the set asks for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// First ordinal.
    pub start: i32,
    /// Number of pods.
    pub replicas: i32,
    /// One after the other.
    pub ordered: bool,
    /// Replaces pods of older revisions by itself.
    pub rolling: bool,
    /// Ordinals below keep the current revision.
    pub partition: Option<i32>,
    /// How many pods an update may take away at once.
    pub max_unavailable: i32,
    /// Name of the revision before the update.
    pub current: String,
    /// Name of the newest revision.
    pub update: String,
    /// `status.currentReplicas`.
    pub current_replicas: i32,
}

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Change {
    /// Create the pod of an ordinal in a revision.
    Create {
        /// The ordinal.
        ordinal: i32,
        /// Of the newest revision rather than the current one.
        updated: bool,
    },
    /// Delete the pod of an ordinal.
    Delete(i32),
}

/// Plans one pass.
pub fn plan(wanted: &Wanted, members: &[Member]) -> Vec<Change> {
    let by_ordinal: BTreeMap<i32, &Member> = members.iter().map(|member| (member.ordinal, member)).collect();
    let range = wanted.start..wanted.start.saturating_add(wanted.replicas);
    let mut changes = Vec::new();
    for ordinal in range.clone() {
        match by_ordinal.get(&ordinal) {
            None => {
                changes.push(Change::Create { ordinal, updated: !wants_current(wanted, ordinal) });
                if wanted.ordered {
                    return changes;
                }
            }
            Some(member) if member.ended => {
                if !member.terminating {
                    changes.push(Change::Delete(ordinal));
                }
                if wanted.ordered {
                    return changes;
                }
            }
            Some(member) if wanted.ordered && (member.terminating || !member.available) => return changes,
            Some(_) => {}
        }
    }
    if !changes.is_empty() {
        return changes;
    }
    let unhealthy =
        members.iter().filter(|member| member.terminating || !member.available).map(|member| member.ordinal);
    let first_unhealthy = unhealthy.min();
    for member in by_ordinal.values().rev().filter(|member| !range.contains(&member.ordinal)) {
        if member.terminating {
            if wanted.ordered {
                return changes;
            }
            continue;
        }
        if wanted.ordered && !member.available && first_unhealthy != Some(member.ordinal) {
            return changes;
        }
        changes.push(Change::Delete(member.ordinal));
        if wanted.ordered {
            return changes;
        }
    }
    if changes.is_empty() && wanted.rolling {
        update(wanted, &by_ordinal, range, &mut changes);
    }
    changes
}

/// Takes pods of older revisions away, from the last to the partition, as many as may be missing.
fn update(wanted: &Wanted, members: &BTreeMap<i32, &Member>, range: std::ops::Range<i32>, changes: &mut Vec<Change>) {
    let missing = |member: &&Member| member.terminating || !member.available;
    let unavailable = members.range(range.clone()).filter(|(_, member)| missing(member)).count();
    let mut budget = wanted.max_unavailable - i32::try_from(unavailable).unwrap_or(i32::MAX);
    let from = wanted.start + wanted.partition.unwrap_or(0);
    for (ordinal, member) in members.range(range).rev().filter(|(ordinal, _)| **ordinal >= from) {
        let outdated = member.revision != wanted.update && !member.terminating;
        // One that does not become ready is replaced whatever the budget says, else a bad revision could never be left.
        if outdated && (budget > 0 || (missing(member) && changes.is_empty())) {
            changes.push(Change::Delete(*ordinal));
            budget -= i32::from(!missing(member));
        } else if missing(member) && wanted.max_unavailable <= 1 {
            return;
        }
        if budget <= 0 && !changes.is_empty() {
            return;
        }
    }
}

fn wants_current(wanted: &Wanted, ordinal: i32) -> bool {
    wanted.rolling
        && match wanted.partition {
            None => ordinal < wanted.start + wanted.current_replicas,
            Some(partition) => ordinal < wanted.start + partition,
        }
}

struct StatefulSets {
    api: Api,
    events: Events,
    sets: Arc<Informer>,
    pods: Arc<Informer>,
    revisions: Arc<Informer>,
    claims: Arc<Informer>,
}

fn ordinal(set: &str, pod: &str) -> Option<i32> {
    pod.strip_prefix(set)?.strip_prefix('-')?.parse().ok().filter(|ordinal| *ordinal >= 0)
}

fn member(set: &Object, pod: &Object, min_ready: i32, now: Timestamp) -> Option<Member> {
    let running = pod.phase() == "Running";
    Some(Member {
        ordinal: ordinal(set.key.name(), pod.key.name())?,
        revision: pod.labels.get(REVISION_HASH).unwrap_or_default().to_owned(),
        terminating: pod.deleting.is_some(),
        ended: pod.is_finished(),
        ready: running && pod.pod.ready,
        available: running && pod.is_available(min_ready, now),
    })
}

impl Reconcile for StatefulSets {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl StatefulSets {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.sets.get(key) else { return Ok(Next::Done) };
        let Some(selector) = object.selector.as_deref() else { return Ok(Next::Done) };
        let set: StatefulSet = object.decode()?;
        let Some(spec) = set.spec.as_ref() else { return Ok(Next::Done) };
        let status = set.status.clone().unwrap_or_default();
        claim_all(&self.api, &STATEFUL_SETS, &object, selector, &self.pods).await?;
        let collisions = status.collision_count.unwrap_or(0);
        let history = history::sync(&self.api, &STATEFUL_SETS, &object, &self.revisions, collisions).await?;
        let wanted = wanted(spec, &status, &history);
        let min_ready = spec.min_ready_seconds.unwrap_or(0);
        let mut result = Ok(());
        if object.deleting.is_none() {
            self.keep_claims_owned(&object, spec, &wanted).await?;
            let changes = plan(&wanted, &self.members(&object, min_ready));
            for change in changes {
                result = self.apply(&change, &object, spec, &wanted, &history).await;
                if result.is_err() {
                    break;
                }
            }
        }
        let members = self.members(&object, min_ready);
        let new = new_status(&object, spec, &status, &members, &wanted, history.collisions);
        if set.status.as_ref() != Some(&new) {
            match self.api.update_status(&STATEFUL_SETS, &object, &new).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        result?;
        let mut live: HashSet<String> = members.iter().map(|member| member.revision.clone()).collect();
        live.extend([wanted.current.clone(), wanted.update.clone()]);
        let limit = spec.revision_history_limit.unwrap_or(10);
        history::clean_up(&self.api, key.namespace(), &history.old, &live, limit).await?;
        let owned: Vec<Arc<Object>> = self.pods.read().controlled_by(&object.uid).cloned().collect();
        Ok(next_available(&owned, min_ready, Timestamp::now()).map_or(Next::Done, Next::After))
    }

    fn members(&self, set: &Object, min_ready: i32) -> Vec<Member> {
        let now = Timestamp::now();
        self.pods.read().controlled_by(&set.uid).filter_map(|pod| member(set, pod, min_ready, now)).collect()
    }

    async fn apply(
        &self,
        change: &Change,
        object: &Object,
        spec: &StatefulSetSpec,
        wanted: &Wanted,
        history: &History,
    ) -> Result<(), ReconcileError> {
        let (name, namespace) = (object.key.name(), object.key.namespace());
        match change {
            Change::Delete(ordinal) => {
                let key = Key::new(namespace, &format!("{name}-{ordinal}"));
                let Some(pod) = self.pods.get(&key) else { return Ok(()) };
                self.api.delete(&PODS, &key, &pod.uid).await?;
                let message = format!("delete Pod {} in StatefulSet {name} successful", key.name());
                self.events.tell(&STATEFUL_SETS, object, EventType::Normal, "SuccessfulDelete", message);
                Ok(())
            }
            Change::Create { ordinal, updated } => {
                let revision = if *updated {
                    &history.update
                } else {
                    history.old.iter().find(|old| old.name == wanted.current).unwrap_or(&history.update)
                };
                let template: PodTemplateSpec = serde_json::from_value(revision.template.clone())?;
                let pod_name = format!("{name}-{ordinal}");
                self.ensure_claims(object, spec, *ordinal, &pod_name).await?;
                let template = dress(template, spec, name, *ordinal, &revision.name);
                let owner = controller_reference(&STATEFUL_SETS, object);
                let body = pod(&template, PodName::Exact(&pod_name), namespace, &owner)?;
                match self.api.create(&PODS, namespace, &body).await {
                    Ok(_) => {
                        let message = format!("create Pod {pod_name} in StatefulSet {name} successful");
                        self.events.tell(&STATEFUL_SETS, object, EventType::Normal, "SuccessfulCreate", message);
                        Ok(())
                    }
                    Err(error) if error.is_namespace_terminating() => Ok(()),
                    Err(error) => {
                        let message = format!("create Pod {pod_name} in StatefulSet {name} failed error: {error}");
                        self.events.tell(&STATEFUL_SETS, object, EventType::Warning, "FailedCreate", message);
                        Err(error.into())
                    }
                }
            }
        }
    }

    /// Gives the claims of all pods the owners that the retention policy asks for.
    async fn keep_claims_owned(
        &self,
        object: &Object,
        spec: &StatefulSetSpec,
        wanted: &Wanted,
    ) -> Result<(), ReconcileError> {
        let templates = spec.volume_claim_templates.as_deref().unwrap_or_default();
        if templates.is_empty() {
            return Ok(());
        }
        let (retention, set) = (Retention::of(spec), controller_reference(&STATEFUL_SETS, object));
        let pods: Vec<Arc<Object>> = self.pods.read().controlled_by(&object.uid).cloned().collect();
        for pod in &pods {
            let Some(ordinal) = ordinal(object.key.name(), pod.key.name()) else { continue };
            let scaled_away = !(wanted.start..wanted.start.saturating_add(wanted.replicas)).contains(&ordinal);
            for template in templates {
                let name = template.metadata.name.as_deref().unwrap_or_default();
                let key = Key::new(object.key.namespace(), &claim_name(name, object.key.name(), ordinal));
                let Some(claim) = self.claims.get(&key) else { continue };
                let owner = controller_reference(&PODS, pod);
                let Some(owners) = retention.owners(&claim.owners, &set, &owner, scaled_away) else { continue };
                let version = claim.resource_version.to_string();
                let patch = json!({"metadata": {"resourceVersion": version, "ownerReferences": owners}});
                self.api.patch(&PERSISTENT_VOLUME_CLAIMS, &key, "", PatchKind::Merge, &patch).await?;
            }
        }
        Ok(())
    }

    async fn ensure_claims(
        &self,
        object: &Object,
        spec: &StatefulSetSpec,
        ordinal: i32,
        pod: &str,
    ) -> Result<(), ReconcileError> {
        let (name, namespace) = (object.key.name(), object.key.namespace());
        for template in spec.volume_claim_templates.iter().flatten() {
            let mut claim = template.clone();
            let claim_name = claim_name(template.metadata.name.as_deref().unwrap_or_default(), name, ordinal);
            if let Some(claim) = self.claims.get(&Key::new(namespace, &claim_name)) {
                if claim.deleting.is_some() || is_going(&claim.owners, pod, None) {
                    return Err(ReconcileError::NotYet(format!("claim {claim_name} is being deleted")));
                }
                continue;
            }
            claim.metadata.name = Some(claim_name.clone());
            claim.metadata.namespace = Some(namespace.to_owned());
            claim.status = None;
            let labels = claim.metadata.labels.get_or_insert_default();
            labels.extend(spec.selector.match_labels.clone().unwrap_or_default());
            match self.api.create(&PERSISTENT_VOLUME_CLAIMS, namespace, &claim).await {
                Ok(_) => {
                    let message = format!("create Claim {claim_name} Pod {pod} in StatefulSet {name} success");
                    self.events.tell(&STATEFUL_SETS, object, EventType::Normal, "SuccessfulCreate", message);
                }
                Err(error) if error.is_already_exists() => {}
                Err(error) => {
                    let message =
                        format!("create Claim {claim_name} for Pod {pod} in StatefulSet {name} failed error: {error}");
                    self.events.tell(&STATEFUL_SETS, object, EventType::Warning, "FailedCreate", message);
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }
}

fn claim_name(template: &str, set: &str, ordinal: i32) -> String {
    format!("{template}-{set}-{ordinal}")
}

fn wanted(spec: &StatefulSetSpec, status: &StatefulSetStatus, history: &History) -> Wanted {
    let replicas = spec.replicas.unwrap_or(1);
    let strategy = spec.update_strategy.as_ref();
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    let max_unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref());
    let current = status.current_revision.clone().filter(|name| history.old.iter().any(|old| old.name == *name));
    Wanted {
        start: spec.ordinals.as_ref().and_then(|ordinals| ordinals.start).unwrap_or(0),
        replicas,
        ordered: spec.pod_management_policy.as_deref() != Some("Parallel"),
        rolling: strategy.and_then(|strategy| strategy.type_.as_deref()) != Some("OnDelete"),
        partition: rolling.map(|rolling| rolling.partition.unwrap_or(0)),
        max_unavailable: max_unavailable.map_or(1, |value| scaled(Some(value), replicas, true).max(1)),
        current: current.unwrap_or_else(|| history.update.name.clone()),
        update: history.update.name.clone(),
        current_replicas: status.current_replicas.unwrap_or(0),
    }
}

fn new_status(
    object: &Object,
    spec: &StatefulSetSpec,
    old: &StatefulSetStatus,
    members: &[Member],
    wanted: &Wanted,
    collisions: i32,
) -> StatefulSetStatus {
    let count = |predicate: &dyn Fn(&Member) -> bool| {
        i32::try_from(members.iter().filter(|member| predicate(member)).count()).unwrap_or(i32::MAX)
    };
    let of = |revision: &str| count(&|member| !member.terminating && member.revision == revision);
    let some = |count: i32| (count != 0).then_some(count);
    let (replicas, ready) = (count(&|_| true), count(&|member| member.ready));
    let updated = of(&wanted.update);
    let mut status = StatefulSetStatus {
        observed_generation: Some(object.generation),
        replicas,
        ready_replicas: some(ready),
        available_replicas: Some(count(&|member| member.available)),
        current_replicas: some(of(&wanted.current)),
        updated_replicas: some(updated),
        current_revision: Some(wanted.current.clone()),
        update_revision: Some(wanted.update.clone()),
        collision_count: Some(collisions),
        conditions: old.conditions.clone(),
    };
    let all = spec.replicas.unwrap_or(1);
    if wanted.rolling && updated == all && ready == all && replicas == all {
        status.current_replicas = status.updated_replicas;
        status.current_revision = status.update_revision.clone();
    }
    status
}

/// The template with the pod's identity and claims.
fn dress(
    mut template: PodTemplateSpec,
    spec: &StatefulSetSpec,
    set: &str,
    ordinal: i32,
    revision: &str,
) -> PodTemplateSpec {
    let name = format!("{set}-{ordinal}");
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert("statefulset.kubernetes.io/pod-name".to_owned(), name.clone());
    labels.insert("apps.kubernetes.io/pod-index".to_owned(), ordinal.to_string());
    labels.insert(REVISION_HASH.to_owned(), revision.to_owned());
    let pod = template.spec.get_or_insert_default();
    pod.hostname = Some(name);
    pod.subdomain = spec.service_name.clone().filter(|name| !name.is_empty());
    let volumes = pod.volumes.get_or_insert_default();
    for claim in spec.volume_claim_templates.iter().flatten() {
        let volume = claim.metadata.name.clone().unwrap_or_default();
        volumes.retain(|present| present.name != volume);
        volumes.push(Volume {
            persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
                claim_name: claim_name(&volume, set, ordinal),
                read_only: Some(false),
            }),
            name: volume,
            ..Volume::default()
        });
    }
    if volumes.is_empty() {
        pod.volumes = None;
    }
    template
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(replicas: i32) -> Wanted {
        Wanted {
            start: 0,
            replicas,
            ordered: true,
            rolling: true,
            partition: Some(0),
            max_unavailable: 1,
            current: "old".to_owned(),
            update: "new".to_owned(),
            current_replicas: 0,
        }
    }

    fn member(ordinal: i32, revision: &str, available: bool) -> Member {
        let revision = revision.to_owned();
        Member { ordinal, revision, terminating: false, ended: false, ready: available, available }
    }

    #[test]
    fn pods_are_made_one_after_the_other_unless_parallel() {
        let create = |ordinal| Change::Create { ordinal, updated: true };
        assert_eq!(plan(&wanted(3), &[]), [create(0)]);
        assert_eq!(plan(&wanted(3), &[member(0, "new", false)]), []);
        assert_eq!(plan(&wanted(3), &[member(0, "new", true)]), [create(1)]);
        assert_eq!(plan(&Wanted { ordered: false, ..wanted(3) }, &[]), [create(0), create(1), create(2)]);
        assert_eq!(plan(&Wanted { start: 5, ..wanted(1) }, &[]), [create(5)]);
    }

    #[test]
    fn scaling_down_goes_from_the_last_and_waits_for_health() {
        let pods = |last| [member(0, "new", true), member(1, "new", true), member(2, "new", last)];
        assert_eq!(plan(&wanted(1), &pods(true)), [Change::Delete(2)]);
        let sick = [member(0, "new", false), member(1, "new", true)];
        assert_eq!(plan(&wanted(1), &sick), []);
        let ended = [Member { ended: true, ..member(0, "new", false) }];
        assert_eq!(plan(&wanted(1), &ended), [Change::Delete(0)]);
    }

    #[test]
    fn updates_go_from_the_last_to_the_partition() {
        let pods = [member(0, "old", true), member(1, "old", true), member(2, "old", true)];
        assert_eq!(plan(&wanted(3), &pods), [Change::Delete(2)]);
        let half = [member(0, "old", true), member(1, "old", true), member(2, "new", true)];
        assert_eq!(plan(&wanted(3), &half), [Change::Delete(1)]);
        assert_eq!(plan(&Wanted { partition: Some(2), ..wanted(3) }, &half), []);
        let at_once = Wanted { max_unavailable: 2, ..wanted(3) };
        assert_eq!(plan(&at_once, &pods), [Change::Delete(2), Change::Delete(1)]);
        assert_eq!(plan(&Wanted { rolling: false, ..wanted(3) }, &pods), []);
        // Below the partition the old revision is made again.
        let lost = Wanted { partition: Some(2), ..wanted(3) };
        assert_eq!(plan(&lost, &[]), [Change::Create { ordinal: 0, updated: false }]);
    }
}
