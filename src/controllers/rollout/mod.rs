//! The pure core of Deployments: which ReplicaSets to create, scale and delete, and the status that follows.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | this | the plan: strategies and scaling |
//! | [`replica_set`] | reading and annotating one ReplicaSet |
//! | [`status`] | counts, conditions and the progress deadline |

mod replica_set;
mod status;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;

use super::event::EventType;
use super::template::{POD_TEMPLATE_HASH, canonical, hash};
use replica_set::{
    age, annotate, annotate_replicas, annotation, available, min_ready_seconds, name, owned_age, replicas, resized,
    revision, set_name, set_replicas, set_template, status_of,
};
use status::complete;
pub use status::{new_condition, set_condition};

/// Annotation that numbers the rollouts.
pub const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
const ROLLBACK_TO: &str = "deprecated.deployment.rollback.to";
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
const MAX_HISTORY_CHARS: usize = 2000;

const PROGRESSING: &str = "Progressing";
const NEW_AVAILABLE: &str = "NewReplicaSetAvailable";
const TIMED_OUT: &str = "ProgressDeadlineExceeded";

/// One thing to do; they are done in order and stop at the first failure.
#[derive(Debug, PartialEq)]
pub enum Change {
    /// Create the ReplicaSet of the current template.
    Create(Box<ReplicaSet>),
    /// Write a changed ReplicaSet.
    Update(Box<ReplicaSet>),
    /// Delete an old ReplicaSet.
    Delete {
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
    },
    /// Set the Deployment's revision annotation.
    Revision(String),
    /// Replace the Deployment's status.
    Status(Box<DeploymentStatus>),
    /// Tell an event, after what it tells about succeeded.
    Event(EventType, &'static str, String),
}

/// What is to be done, and when to look again without being asked.
#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    /// In this order.
    pub changes: Vec<Change>,
    /// A progress deadline to check.
    pub after: Option<Duration>,
}

/// What the plan is made from.
pub struct Observed<'a> {
    /// The Deployment.
    pub deployment: &'a Deployment,
    /// Its reference as a controller.
    pub owner: OwnerReference,
    /// Its ReplicaSets.
    pub sets: Vec<ReplicaSet>,
    /// Number of pods that have not ended, by uid of their ReplicaSet.
    pub pods: HashMap<String, usize>,
    /// Now.
    pub now: Timestamp,
}

/// Plans one pass over a Deployment.
pub fn plan(observed: Observed<'_>) -> Result<Plan, serde_json::Error> {
    let Observed { deployment, owner, mut sets, pods, now } = observed;
    let Some(spec) = deployment.spec.as_ref() else { return Ok(Plan::default()) };
    sets.sort_by(|a, b| age(a).cmp(&age(b)));
    let template = canonical(&spec.template)?;
    let mut current = None;
    for (index, set) in sets.iter().enumerate() {
        if set_template(set)? == template {
            current = Some(index);
            break;
        }
    }
    let current = current.map(|index| sets.remove(index));
    let mut rollout = Rollout {
        deployment,
        spec,
        template,
        owner,
        now,
        status: deployment.status.clone().unwrap_or_default(),
        current,
        old: sets,
        plan: Plan::default(),
    };
    rollout.run(&pods);
    Ok(rollout.plan)
}

struct Rollout<'a> {
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    /// The template as it is compared and hashed.
    template: Value,
    owner: OwnerReference,
    now: Timestamp,
    /// The status being built: begins as the stored one.
    status: DeploymentStatus,
    /// The ReplicaSet of the current template.
    current: Option<ReplicaSet>,
    /// All others, oldest first.
    old: Vec<ReplicaSet>,
    plan: Plan,
}

impl Rollout<'_> {
    fn run(&mut self, pods: &HashMap<String, usize>) {
        if self.deployment.metadata.deletion_timestamp.is_some() {
            self.sync_current();
            return self.finish_status(false);
        }
        self.note_pause();
        if self.spec.paused == Some(true) {
            self.sync_current();
            self.scale();
            self.clean_up();
            return self.finish_status(false);
        }
        if self.is_scaling() {
            self.sync_current();
            self.scale();
            return self.finish_status(false);
        }
        if self.is_rolling() {
            self.roll()
        } else {
            self.recreate(pods)
        }
        self.finish_status(true);
    }

    fn is_rolling(&self) -> bool {
        self.spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()) != Some("Recreate")
    }

    fn wanted(&self) -> i32 {
        self.spec.replicas.unwrap_or(1)
    }

    fn fenceposts(&self) -> (i32, i32) {
        if !self.is_rolling() {
            return (0, 0);
        }
        let rolling = self.spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
        let surge = scaled(rolling.and_then(|rolling| rolling.max_surge.as_ref()), self.wanted(), true);
        let unavailable = scaled(rolling.and_then(|rolling| rolling.max_unavailable.as_ref()), self.wanted(), false);
        if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
    }

    fn max_surge(&self) -> i32 {
        self.fenceposts().0
    }

    fn max_unavailable(&self) -> i32 {
        if self.wanted() == 0 { 0 } else { self.fenceposts().1.min(self.wanted()) }
    }

    fn all(&self) -> impl Iterator<Item = &ReplicaSet> {
        self.old.iter().chain(self.current.iter())
    }

    fn total(&self) -> i32 {
        self.all().map(replicas).sum()
    }

    fn available(&self) -> i32 {
        self.all().map(available).sum()
    }

    // ---- the ReplicaSet of the current template

    /// Brings annotations and minReadySeconds of the existing current ReplicaSet up to date.
    fn sync_current(&mut self) {
        let next = self.old.iter().map(revision).max().unwrap_or(0) + 1;
        let (desired, min_ready) = (self.deployment, self.spec.min_ready_seconds.unwrap_or(0));
        let Some(set) = self.current.as_mut() else { return };
        let changed = annotate(desired, set, next);
        if changed || min_ready_seconds(set) != min_ready {
            if let Some(spec) = set.spec.as_mut() {
                spec.min_ready_seconds = self.spec.min_ready_seconds;
            }
            self.plan.changes.push(Change::Update(Box::new(set.clone())));
        }
        let (number, name) = (revision(set).to_string(), name(&set.metadata).to_owned());
        self.set_revision(number);
        if self.has_deadline() && self.condition(PROGRESSING).is_none() {
            self.set_condition(PROGRESSING, "True", "FoundNewReplicaSet", format!("Found new replica set \"{name}\""));
        }
    }

    fn create_current(&mut self) {
        let collisions = self.status.collision_count;
        let suffix = hash(&self.template, collisions);
        let mut template = self.spec.template.clone();
        let metadata = template.metadata.get_or_insert_default();
        metadata.labels.get_or_insert_default().insert(POD_TEMPLATE_HASH.to_owned(), suffix.clone());
        let labels = metadata.labels.clone();
        let mut selector = self.spec.selector.clone();
        selector.match_labels.get_or_insert_default().insert(POD_TEMPLATE_HASH.to_owned(), suffix.clone());
        let mut set = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(set_name(name(&self.deployment.metadata), &suffix)),
                namespace: self.deployment.metadata.namespace.clone(),
                owner_references: Some(vec![self.owner.clone()]),
                labels,
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(0),
                min_ready_seconds: self.spec.min_ready_seconds,
                selector,
                template: Some(template),
            }),
            status: None,
        };
        let count = self.grown(&set, self.total());
        set_replicas(&mut set, count);
        let next = self.old.iter().map(revision).max().unwrap_or(0) + 1;
        annotate(self.deployment, &mut set, next);
        annotate_replicas(&mut set, self.wanted(), self.wanted() + self.max_surge());
        let created = name(&set.metadata).to_owned();
        self.plan.changes.push(Change::Create(Box::new(set.clone())));
        if count > 0 {
            self.event("ScalingReplicaSet", format!("Scaled up replica set {created} from 0 to {count}"));
        }
        self.set_revision(next.to_string());
        if self.has_deadline() {
            let message = format!("Created new replica set \"{created}\"");
            self.set_condition(PROGRESSING, "True", "NewReplicaSetCreated", message);
        }
        self.current = Some(set);
    }

    /// How large the current ReplicaSet may be now, `total` being all replicas there are.
    fn grown(&self, set: &ReplicaSet, total: i32) -> i32 {
        if !self.is_rolling() {
            return self.wanted();
        }
        let rolling = self.spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
        let surge = scaled(rolling.and_then(|rolling| rolling.max_surge.as_ref()), self.wanted(), true);
        let room = self.wanted() + surge - total;
        if room <= 0 { replicas(set) } else { replicas(set) + room.min(self.wanted() - replicas(set)) }
    }

    // ---- strategies

    fn roll(&mut self) {
        if self.current.is_some() {
            self.sync_current()
        } else {
            self.create_current()
        }
        let Some(current) = self.current.as_ref() else { return };
        let target = if replicas(current) > self.wanted() { self.wanted() } else { self.grown(current, self.total()) };
        if replicas(current) != self.wanted() && self.resize_current(target) {
            return;
        }
        if self.shrink_old() {
            return;
        }
        if complete(self.deployment, &self.status) {
            self.clean_up();
        }
    }

    /// Shrinks old ReplicaSets as far as availability allows: first what is unhealthy, then the rest.
    fn shrink_old(&mut self) -> bool {
        if self.old.iter().map(replicas).sum::<i32>() == 0 {
            return false;
        }
        let minimum = self.wanted() - self.max_unavailable();
        let pending = self.current.as_ref().map_or(0, |set| replicas(set) - available(set));
        let mut budget = self.total() - minimum - pending;
        if budget <= 0 {
            return false;
        }
        let mut shrunk = false;
        for index in 0..self.old.len() {
            let set = &self.old[index];
            let unhealthy = (replicas(set) - available(set)).min(budget);
            if budget > 0 && unhealthy > 0 {
                budget -= unhealthy;
                let target = replicas(set) - unhealthy;
                shrunk |= self.resize_old(index, target);
            }
        }
        let mut surplus = self.available() - minimum;
        for index in 0..self.old.len() {
            let step = replicas(&self.old[index]).min(surplus);
            if step > 0 {
                surplus -= step;
                let target = replicas(&self.old[index]) - step;
                shrunk |= self.resize_old(index, target);
            }
        }
        shrunk
    }

    fn recreate(&mut self, pods: &HashMap<String, usize>) {
        if self.current.is_some() {
            self.sync_current();
        }
        let mut shrunk = false;
        for index in 0..self.old.len() {
            shrunk |= self.resize_old(index, 0);
        }
        if shrunk || self.old_pods_run(pods) {
            return;
        }
        if self.current.is_none() {
            self.create_current();
        }
        self.resize_current(self.wanted());
        if complete(self.deployment, &self.status) {
            self.clean_up();
        }
    }

    fn old_pods_run(&self, pods: &HashMap<String, usize>) -> bool {
        let counted: i32 = self.old.iter().map(|set| status_of(set).replicas).sum();
        counted > 0
            || self.old.iter().any(|set| {
                let uid = set.metadata.uid.as_deref().unwrap_or_default();
                pods.get(uid).is_some_and(|count| *count > 0)
            })
    }

    // ---- scaling

    fn is_scaling(&self) -> bool {
        self.all().filter(|set| replicas(set) > 0).any(|set| {
            annotation(set, DESIRED_REPLICAS)
                .and_then(|desired| desired.parse::<i32>().ok())
                .is_some_and(|desired| desired >= 0 && desired != self.wanted())
        })
    }

    fn scale(&mut self) {
        let active = self.all().filter(|set| replicas(set) > 0).count();
        if active <= 1 && (self.current.is_some() || !self.old.is_empty()) {
            return self.scale_only();
        }
        let saturated = self.current.as_ref().is_some_and(|set| {
            let desired = annotation(set, DESIRED_REPLICAS).and_then(|desired| desired.parse().ok());
            replicas(set) == self.wanted() && desired == Some(self.wanted()) && available(set) == self.wanted()
        });
        if saturated {
            for index in 0..self.old.len() {
                self.resize_old(index, 0);
            }
        } else if self.is_rolling() {
            self.scale_proportionally();
        }
    }

    /// One active ReplicaSet (or none, then the current or the newest) takes all of the new size.
    fn scale_only(&mut self) {
        let old = self.old.iter().position(|set| replicas(set) > 0);
        match old {
            Some(index) => {
                self.resize_old(index, self.wanted());
            }
            None if self.current.is_some() => {
                self.resize_current(self.wanted());
            }
            None => {
                self.resize_old(self.old.len() - 1, self.wanted());
            }
        }
    }

    /// In the middle of a rollout every active ReplicaSet grows or shrinks by its share.
    fn scale_proportionally(&mut self) {
        let mut sets: Vec<(Option<usize>, ReplicaSet)> = self
            .old
            .iter()
            .enumerate()
            .map(|(index, set)| (Some(index), set.clone()))
            .chain(self.current.iter().map(|set| (None, set.clone())))
            .filter(|(_, set)| replicas(set) > 0)
            .collect();
        let allowed = if self.wanted() > 0 { self.wanted() + self.max_surge() } else { 0 };
        let add = allowed - sets.iter().map(|(_, set)| replicas(set)).sum::<i32>();
        if add > 0 {
            sets.sort_by_key(|(_, set)| (Reverse(replicas(set)), Reverse(owned_age(set))));
        } else if add < 0 {
            sets.sort_by_key(|(_, set)| (Reverse(replicas(set)), owned_age(set)));
        }
        let mut added = 0;
        let mut sizes: Vec<i32> = Vec::with_capacity(sets.len());
        for (_, set) in &sets {
            let share = self.share(set, add, added);
            sizes.push(replicas(set) + share);
            added += share;
        }
        if add != 0
            && let Some(first) = sizes.first_mut()
        {
            *first = (*first + add - added).max(0);
        }
        for ((index, _), size) in sets.iter().zip(sizes) {
            match index {
                Some(index) => self.resize_old(*index, size),
                None => self.resize_current(size),
            };
        }
    }

    fn share(&self, set: &ReplicaSet, add: i32, added: i32) -> i32 {
        if replicas(set) == 0 || add == 0 || add == added {
            return 0;
        }
        let fraction = self.fraction(set);
        if add > 0 { fraction.min(add - added) } else { fraction.max(add - added) }
    }

    fn fraction(&self, set: &ReplicaSet) -> i32 {
        if self.wanted() == 0 {
            return -replicas(set);
        }
        let before = annotation(set, MAX_REPLICAS)
            .and_then(|max| max.parse::<i32>().ok())
            .filter(|max| *max > 0)
            .unwrap_or(self.status.replicas.unwrap_or(0));
        if before == 0 {
            return 0;
        }
        let size = f64::from(replicas(set)) * f64::from(self.wanted() + self.max_surge()) / f64::from(before);
        #[expect(clippy::cast_possible_truncation, reason = "sizes of sets are far below the limits of i32")]
        let rounded = size.round() as i32;
        rounded - replicas(set)
    }

    fn resize_old(&mut self, index: usize, size: i32) -> bool {
        let (max, wanted) = (self.wanted() + self.max_surge(), self.wanted());
        let Some((set, from)) = resized(&mut self.old[index], size, wanted, max) else { return false };
        self.tell_resize(set, from, size)
    }

    fn resize_current(&mut self, size: i32) -> bool {
        let (max, wanted) = (self.wanted() + self.max_surge(), self.wanted());
        let Some(current) = self.current.as_mut() else { return false };
        let created = current.metadata.uid.is_none();
        let Some((set, from)) = resized(current, size, wanted, max) else { return false };
        // One that is only being created takes its size along.
        let creating = self.plan.changes.iter_mut().find_map(|change| match change {
            Change::Create(new) if created => Some(new),
            _ => None,
        });
        if let Some(new) = creating {
            *new = set;
            return from != size;
        }
        self.tell_resize(set, from, size)
    }

    fn tell_resize(&mut self, set: Box<ReplicaSet>, from: i32, to: i32) -> bool {
        let name = name(&set.metadata).to_owned();
        let pending = self.plan.changes.iter_mut().find_map(|change| match change {
            Change::Update(planned) if planned.metadata.uid == set.metadata.uid => Some(planned),
            _ => None,
        });
        match pending {
            Some(planned) => *planned = set,
            None => self.plan.changes.push(Change::Update(set)),
        }
        if from != to {
            let direction = if from < to { "up" } else { "down" };
            self.event("ScalingReplicaSet", format!("Scaled {direction} replica set {name} from {from} to {to}"));
        }
        from != to
    }

    /// Deletes old, empty ReplicaSets beyond the history limit.
    fn clean_up(&mut self) {
        let Some(limit) = self.spec.revision_history_limit.filter(|limit| *limit != i32::MAX) else { return };
        let mut sets: Vec<&ReplicaSet> =
            self.old.iter().filter(|set| set.metadata.deletion_timestamp.is_none()).collect();
        let excess = sets.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        sets.sort_by_key(|set| revision(set));
        for set in sets.into_iter().take(excess) {
            let status = status_of(set);
            let behind = set.metadata.generation > status.observed_generation;
            if status.replicas == 0 && replicas(set) == 0 && !behind {
                self.plan.changes.push(Change::Delete {
                    name: name(&set.metadata).to_owned(),
                    uid: set.metadata.uid.clone().unwrap_or_default(),
                });
            }
        }
    }

    fn set_revision(&mut self, number: String) {
        let stored = self.deployment.metadata.annotations.as_ref().and_then(|annotations| annotations.get(REVISION));
        if stored != Some(&number) {
            self.plan.changes.push(Change::Revision(number));
        }
    }

    fn event(&mut self, reason: &'static str, message: String) {
        self.plan.changes.push(Change::Event(EventType::Normal, reason, message));
    }
}

/// A number, or a percentage of `total`.
pub fn scaled(value: Option<&IntOrString>, total: i32, round_up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(value)) => *value,
        Some(IntOrString::String(text)) => {
            let percent = i64::from(text.trim_end_matches('%').parse::<i32>().unwrap_or(0));
            let product = percent * i64::from(total);
            i32::try_from(if round_up { (product + 99) / 100 } else { product / 100 }).unwrap_or(i32::MAX)
        }
    }
}

#[cfg(test)]
mod tests;
