//! DaemonSets: one pod on every node that takes it.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt, join_all};
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetSpec, DaemonSetStatus};
use k8s_openapi::api::core::v1::{
    Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodTemplateSpec, Toleration,
};

use super::Term;
use super::api::{Api, ApiError};
use super::event::{EventType, Events};
use super::history::{self, REVISION_HASH};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::{claim_all, enqueue_owner, enqueue_self};
use super::queue::Queue;
use super::replicaset::next_available;
use super::resource::{CONTROLLER_REVISIONS, DAEMON_SETS, NODES, PODS};
use super::rollout::scaled;
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::selector::Labels;
use super::template::{PodName, controller_reference, pod};
use crate::scheduler::filter::{tolerates, tolerates_all};
use crate::scheduler::pod_info::PodInfo;

/// Most pods created in one go.
const BURST: usize = 250;

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (sets, pods) = (term.informers.of(&DAEMON_SETS), term.informers.of(&PODS));
    let (nodes, revisions) = (term.informers.of(&NODES), term.informers.of(&CONTROLLER_REVISIONS));
    let api = term.api("daemon-set-controller");
    let subscriptions = vec![
        enqueue_self(&queue, &sets),
        enqueue_owner(&queue, &DAEMON_SETS, &sets, &pods),
        enqueue_on_node_change(&queue, &sets, &nodes),
    ];
    let reconcile = Arc::new(DaemonSets {
        events: term.recorder.events(&api, "daemonset-controller"),
        api,
        sets: sets.clone(),
        pods: pods.clone(),
        nodes: nodes.clone(),
        revisions: revisions.clone(),
    });
    let needs = vec![sets, pods, nodes, revisions];
    term.start(Controller { name: "daemonset", queue, concurrency: 4, needs, subscriptions, reconcile });
}

fn enqueue_on_node_change(queue: &Arc<Queue>, sets: &Arc<Informer>, nodes: &Arc<Informer>) -> Subscription {
    let (queue, sets) = (queue.clone(), sets.clone());
    nodes.subscribe(move |delta| {
        let relevant = match (&delta.old, &delta.new) {
            (Some(old), Some(new)) => old.labels != new.labels || taints(old) != taints(new),
            _ => true,
        };
        if relevant {
            sets.read().iter().for_each(|set| queue.add(set.key.clone()));
        }
    })
}

fn taints(node: &Object) -> Option<Vec<k8s_openapi::api::core::v1::Taint>> {
    node.decode::<Node>().ok()?.spec?.taints
}

/// A pod of the set, for the plan.
#[derive(Clone, Debug)]
pub struct Daemon {
    /// Name.
    pub name: String,
    /// Its node, or the one it is made for.
    pub node: String,
    /// It has been scheduled.
    pub bound: bool,
    /// Made from the newest template.
    pub updated: bool,
    /// Being deleted.
    pub terminating: bool,
    /// `Failed`, `Succeeded` or neither.
    pub phase: String,
    /// Ready.
    pub ready: bool,
    /// Ready for long enough.
    pub available: bool,
    /// Creation, seconds since the epoch.
    pub created: i64,
}

/// Whether a node takes a new pod, and whether one there may stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Takes {
    /// A new one is to be there.
    pub should_run: bool,
    /// One that is there may go on.
    pub may_stay: bool,
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Nodes that need a pod.
    pub create: Vec<String>,
    /// Names of pods that go.
    pub delete: Vec<String>,
    /// Names of ended pods among them, with their phase, for events.
    pub ended: Vec<(String, String, String)>,
    /// The numbers of the status.
    pub counts: Counts,
}

/// The numbers of the status.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub desired: i32,
    pub current: i32,
    pub misscheduled: i32,
    pub ready: i32,
    pub available: i32,
    pub updated: i32,
}

/// How a rolling update may proceed; `None` for OnDelete.
#[derive(Clone, Copy, Debug)]
pub struct Rolling {
    /// Pods that may exist beside the old one.
    pub max_surge: i32,
    /// Pods that may be missing.
    pub max_unavailable: i32,
}

/// Plans one pass over all nodes.
pub fn plan(nodes: &BTreeMap<String, Takes>, daemons: &[Daemon], rolling: Option<Rolling>) -> Plan {
    let mut plan = Plan::default();
    let mut by_node: BTreeMap<&str, Vec<&Daemon>> = BTreeMap::new();
    for daemon in daemons {
        by_node.entry(&daemon.node).or_default().push(daemon);
    }
    for pods in by_node.values_mut() {
        pods.sort_by_key(|pod| (!pod.bound, pod.created, pod.name.clone()));
    }
    for (node, takes) in nodes {
        let pods = by_node.get(node.as_str()).map_or(&[][..], Vec::as_slice);
        count(&mut plan.counts, *takes, pods);
        place(&mut plan, node, *takes, pods, rolling);
    }
    // Pods that wait for a node that is gone.
    let stray =
        daemons.iter().filter(|daemon| !daemon.bound && !daemon.terminating && !nodes.contains_key(&daemon.node));
    plan.delete.extend(stray.map(|daemon| daemon.name.clone()));
    if let Some(rolling) = rolling
        && plan.create.is_empty()
        && plan.delete.is_empty()
    {
        roll(&mut plan, nodes, &by_node, rolling);
    }
    plan
}

fn count(counts: &mut Counts, takes: Takes, pods: &[&Daemon]) {
    let Some(first) = pods.first() else {
        counts.desired += i32::from(takes.should_run);
        return;
    };
    if !takes.should_run {
        counts.misscheduled += 1;
        return;
    }
    counts.desired += 1;
    counts.current += 1;
    counts.ready += i32::from(first.ready);
    counts.available += i32::from(first.ready && first.available);
    counts.updated += i32::from(first.updated);
}

fn place(plan: &mut Plan, node: &str, takes: Takes, pods: &[&Daemon], rolling: Option<Rolling>) {
    let ended = |pod: &&&Daemon| matches!(pod.phase.as_str(), "Failed" | "Succeeded");
    if takes.should_run && pods.is_empty() {
        plan.create.push(node.to_owned());
    }
    if !takes.may_stay {
        plan.delete.extend(pods.iter().filter(|pod| !pod.terminating).map(|pod| pod.name.clone()));
        return;
    }
    for pod in pods.iter().filter(ended).filter(|pod| !pod.terminating) {
        plan.delete.push(pod.name.clone());
        plan.ended.push((pod.name.clone(), pod.node.clone(), pod.phase.clone()));
    }
    let running: Vec<&&Daemon> = pods.iter().filter(|pod| !pod.terminating && !ended(pod)).collect();
    let surges = rolling.is_some_and(|rolling| rolling.max_surge > 0);
    if !surges {
        plan.delete.extend(running.iter().skip(1).map(|pod| pod.name.clone()));
        return;
    }
    let (new, old): (Vec<&&Daemon>, Vec<&&Daemon>) = running.into_iter().partition(|pod| pod.updated);
    plan.delete.extend(new.iter().skip(1).chain(old.iter().skip(1)).map(|pod| pod.name.clone()));
    if let (Some(new), Some(old)) = (new.first(), old.first())
        && (!old.ready || new.available)
    {
        plan.delete.push(old.name.clone());
    }
}

fn roll(plan: &mut Plan, nodes: &BTreeMap<String, Takes>, by_node: &BTreeMap<&str, Vec<&Daemon>>, rolling: Rolling) {
    let limit = |count: i32| usize::try_from(count).unwrap_or(0);
    let (mut busy, mut at_once, mut later) = (0, Vec::new(), Vec::new());
    for (node, _) in nodes.iter().filter(|(_, takes)| takes.should_run) {
        let pods: Vec<&&Daemon> =
            by_node.get(node.as_str()).into_iter().flatten().filter(|pod| !pod.terminating).collect();
        let new = pods.iter().find(|pod| pod.updated);
        let old = pods.iter().find(|pod| !pod.updated);
        match (new, old) {
            (None, None) => busy += 1,
            (Some(new), None) => busy += i32::from(!new.available),
            (Some(new), Some(_)) if rolling.max_surge > 0 => busy += i32::from(!new.available),
            (Some(_), Some(_)) => busy += 1,
            (None, Some(old)) => {
                let what = if rolling.max_surge > 0 { node.clone() } else { old.name.clone() };
                if old.available {
                    later.push(what);
                } else {
                    // Replacing what does not work costs nothing.
                    busy += i32::from(rolling.max_surge == 0);
                    at_once.push(what);
                }
            }
        }
    }
    let allowed = if rolling.max_surge > 0 { rolling.max_surge } else { rolling.max_unavailable };
    let chosen = at_once.into_iter().chain(later.into_iter().take(limit(allowed - busy)));
    if rolling.max_surge > 0 { plan.create.extend(chosen) } else { plan.delete.extend(chosen) }
}

struct DaemonSets {
    api: Api,
    events: Events,
    sets: Arc<Informer>,
    pods: Arc<Informer>,
    nodes: Arc<Informer>,
    revisions: Arc<Informer>,
}

impl Reconcile for DaemonSets {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl DaemonSets {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.sets.get(key) else { return Ok(Next::Done) };
        let Some(selector) = object.selector.as_deref() else { return Ok(Next::Done) };
        let set: DaemonSet = object.decode()?;
        let Some(spec) = set.spec.as_ref() else { return Ok(Next::Done) };
        if selector.is_empty() {
            let message = "This daemon set is selecting all pods. A non-empty selector is required.".to_owned();
            self.events.tell(&DAEMON_SETS, &object, EventType::Warning, "SelectingAll", message);
            return Ok(Next::Done);
        }
        if object.deleting.is_some() {
            return Ok(Next::Done);
        }
        claim_all(&self.api, &DAEMON_SETS, &object, selector, &self.pods).await?;
        let status = set.status.clone().unwrap_or_default();
        let collisions = status.collision_count.unwrap_or(0);
        let history = history::sync(&self.api, &DAEMON_SETS, &object, &self.revisions, collisions).await?;
        let template = dressed(spec, &set, &history.update.hash);
        let nodes = self.takes(&template)?;
        let hash = &history.update.hash;
        let first = plan(&nodes, &self.daemons(&object, spec, hash)?, rolling(spec, &nodes));
        let result = self.apply(&object, &template, &first).await;
        let daemons = self.daemons(&object, spec, hash)?;
        let counts = plan(&nodes, &daemons, None).counts;
        let new = new_status(&object, &status, &counts, history.collisions);
        if set.status.as_ref() != Some(&new) {
            match self.api.update_status(&DAEMON_SETS, &object, &new).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        result?;
        let owned: Vec<Arc<Object>> = self.pods.read().controlled_by(&object.uid).cloned().collect();
        let live: HashSet<String> =
            owned.iter().filter_map(|pod| pod.labels.get(REVISION_HASH)).map(str::to_owned).collect();
        let limit = spec.revision_history_limit.unwrap_or(10);
        history::clean_up(&self.api, key.namespace(), &history.old, &live, limit).await?;
        let min_ready = spec.min_ready_seconds.unwrap_or(0);
        Ok(next_available(&owned, min_ready, Timestamp::now()).map_or(Next::Done, Next::After))
    }

    /// What every node makes of a pod of the template.
    fn takes(&self, template: &PodTemplateSpec) -> Result<BTreeMap<String, Takes>, serde_json::Error> {
        let info = PodInfo::new(&Pod { spec: template.spec.clone(), ..Pod::default() });
        let nodes: Vec<Arc<Object>> = self.nodes.read().iter().cloned().collect();
        nodes
            .iter()
            .map(|object| {
                let node: Node = object.decode()?;
                let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
                let labels: &Labels = &object.labels;
                let named = info.node.as_deref().is_none_or(|name| name == object.key.name());
                let admitted = named && info.admits_node(object.key.name(), labels);
                let executes = |taint: &&k8s_openapi::api::core::v1::Taint| taint.effect == "NoExecute";
                let stays = taints.iter().filter(executes).all(|taint| tolerates(&info.tolerations, taint));
                let takes = Takes {
                    should_run: admitted && tolerates_all(&info.tolerations, &taints),
                    may_stay: admitted && stays,
                };
                Ok((object.key.name().to_owned(), takes))
            })
            .collect()
    }

    fn daemons(&self, set: &Object, spec: &DaemonSetSpec, hash: &str) -> Result<Vec<Daemon>, serde_json::Error> {
        let owned: Vec<Arc<Object>> = self.pods.read().controlled_by(&set.uid).cloned().collect();
        let (now, min_ready) = (Timestamp::now(), spec.min_ready_seconds.unwrap_or(0));
        owned
            .iter()
            .map(|pod| {
                Ok(Daemon {
                    name: pod.key.name().to_owned(),
                    node: match &pod.node {
                        Some(node) => node.to_string(),
                        None => target(&pod.decode()?).unwrap_or_default(),
                    },
                    bound: pod.node.is_some(),
                    updated: pod.labels.get(REVISION_HASH) == Some(hash),
                    terminating: pod.deleting.is_some(),
                    phase: pod.phase().to_owned(),
                    ready: pod.pod.ready,
                    available: pod.is_available(min_ready, now),
                    created: pod.created,
                })
            })
            .collect()
    }

    async fn apply(&self, object: &Object, template: &PodTemplateSpec, plan: &Plan) -> Result<(), ApiError> {
        for (pod, node, phase) in &plan.ended {
            let (kind, reason, message) = if phase == "Failed" {
                let message = format!(
                    "Found failed daemon pod {}/{pod} on node {node}, will try to kill it",
                    object.key.namespace()
                );
                (EventType::Warning, "FailedDaemonPod", message)
            } else {
                let message = format!(
                    "Found succeeded daemon pod {}/{pod} on node {node}, will try to delete it",
                    object.key.namespace()
                );
                (EventType::Normal, "SucceededDaemonPod", message)
            };
            self.events.tell(&DAEMON_SETS, object, kind, reason, message);
        }
        let (namespace, owner) = (object.key.namespace(), controller_reference(&DAEMON_SETS, object));
        let bodies: Vec<serde_json::Value> = plan
            .create
            .iter()
            .take(BURST)
            .map(|node| pod(&pinned(template, node), PodName::Prefix(object.key.name()), namespace, &owner))
            .collect::<Result<_, _>>()?;
        let mut failure = None;
        for result in join_all(bodies.iter().map(|body| self.api.create(&PODS, namespace, body))).await {
            match result {
                Ok(pod) => {
                    let message = format!("Created pod: {}", pod.key.name());
                    self.events.tell(&DAEMON_SETS, object, EventType::Normal, "SuccessfulCreate", message);
                }
                Err(error) if error.is_namespace_terminating() => {}
                Err(error) => {
                    let message = format!("Error creating: {error}");
                    self.events.tell(&DAEMON_SETS, object, EventType::Warning, "FailedCreate", message);
                    failure = Some(error);
                }
            }
        }
        for name in &plan.delete {
            let key = Key::new(namespace, name);
            let Some(pod) = self.pods.get(&key) else { continue };
            match self.api.delete(&PODS, &key, &pod.uid).await {
                Ok(_) => {
                    let message = format!("Deleted pod: {name}");
                    self.events.tell(&DAEMON_SETS, object, EventType::Normal, "SuccessfulDelete", message);
                }
                Err(error) => failure = Some(error),
            }
        }
        failure.map_or(Ok(()), Err)
    }
}

fn new_status(object: &Object, old: &DaemonSetStatus, counts: &Counts, collisions: i32) -> DaemonSetStatus {
    let some = |count: i32| (count != 0).then_some(count);
    DaemonSetStatus {
        desired_number_scheduled: counts.desired,
        current_number_scheduled: counts.current,
        number_misscheduled: counts.misscheduled,
        number_ready: counts.ready,
        number_available: some(counts.available),
        number_unavailable: some(counts.desired - counts.available),
        updated_number_scheduled: some(counts.updated),
        observed_generation: Some(object.generation),
        collision_count: old.collision_count.or(some(collisions)).map(|old| old.max(collisions)),
        conditions: old.conditions.clone(),
    }
}

fn rolling(spec: &DaemonSetSpec, nodes: &BTreeMap<String, Takes>) -> Option<Rolling> {
    let strategy = spec.update_strategy.as_ref();
    if strategy.and_then(|strategy| strategy.type_.as_deref()) == Some("OnDelete") {
        return None;
    }
    let desired = i32::try_from(nodes.values().filter(|takes| takes.should_run).count()).unwrap_or(i32::MAX);
    let rolling = strategy.and_then(|strategy| strategy.rolling_update.as_ref());
    let max_surge = scaled(rolling.and_then(|rolling| rolling.max_surge.as_ref()), desired, true);
    let unavailable = rolling.and_then(|rolling| rolling.max_unavailable.as_ref());
    let max_unavailable = unavailable.map_or(1, |value| scaled(Some(value), desired, true));
    let max_unavailable = if max_surge == 0 { max_unavailable.max(1) } else { max_unavailable };
    Some(Rolling { max_surge, max_unavailable })
}

/// The template with hash and the tolerations every daemon has.
fn dressed(spec: &DaemonSetSpec, set: &DaemonSet, hash: &str) -> PodTemplateSpec {
    let mut template = spec.template.clone();
    let labels = template.metadata.get_or_insert_default().labels.get_or_insert_default();
    labels.insert(REVISION_HASH.to_owned(), hash.to_owned());
    let annotations = set.metadata.annotations.as_ref();
    if let Some(generation) = annotations.and_then(|all| all.get("deprecated.daemonset.template.generation")) {
        labels.insert("pod-template-generation".to_owned(), generation.clone());
    }
    let pod = template.spec.get_or_insert_default();
    let mut wanted = vec![
        ("node.kubernetes.io/not-ready", "NoExecute"),
        ("node.kubernetes.io/unreachable", "NoExecute"),
        ("node.kubernetes.io/disk-pressure", "NoSchedule"),
        ("node.kubernetes.io/memory-pressure", "NoSchedule"),
        ("node.kubernetes.io/pid-pressure", "NoSchedule"),
        ("node.kubernetes.io/unschedulable", "NoSchedule"),
    ];
    if pod.host_network == Some(true) {
        wanted.push(("node.kubernetes.io/network-unavailable", "NoSchedule"));
    }
    let tolerations = pod.tolerations.get_or_insert_default();
    for (key, effect) in wanted {
        let toleration = Toleration {
            key: Some(key.to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some(effect.to_owned()),
            ..Toleration::default()
        };
        if !tolerations.contains(&toleration) {
            tolerations.push(toleration);
        }
    }
    template
}

/// The template for one node: the scheduler may bind it nowhere else.
fn pinned(template: &PodTemplateSpec, node: &str) -> PodTemplateSpec {
    let mut template = template.clone();
    let affinity = template.spec.get_or_insert_default().affinity.get_or_insert_default();
    let node_affinity: &mut NodeAffinity = affinity.node_affinity.get_or_insert_default();
    node_affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector {
        node_selector_terms: vec![NodeSelectorTerm {
            match_expressions: None,
            match_fields: Some(vec![NodeSelectorRequirement {
                key: "metadata.name".to_owned(),
                operator: "In".to_owned(),
                values: Some(vec![node.to_owned()]),
            }]),
        }],
    });
    template
}

/// The node that a pod is pinned to.
fn target(pod: &Pod) -> Option<String> {
    let affinity = pod.spec.as_ref()?.affinity.as_ref()?.node_affinity.as_ref()?;
    let required = affinity.required_during_scheduling_ignored_during_execution.as_ref()?;
    let field = required.node_selector_terms.iter().flat_map(|term| term.match_fields.iter().flatten()).next()?;
    field.values.as_ref()?.first().cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const YES: Takes = Takes { should_run: true, may_stay: true };
    const NO: Takes = Takes { should_run: false, may_stay: false };
    const STAYS: Takes = Takes { should_run: false, may_stay: true };
    const ONE: Rolling = Rolling { max_surge: 0, max_unavailable: 1 };

    fn nodes(takes: &[(&str, Takes)]) -> BTreeMap<String, Takes> {
        takes.iter().map(|(name, takes)| ((*name).to_owned(), *takes)).collect()
    }

    fn daemon(name: &str, node: &str, updated: bool, ready: bool) -> Daemon {
        Daemon {
            name: name.to_owned(),
            node: node.to_owned(),
            bound: true,
            updated,
            terminating: false,
            phase: "Running".to_owned(),
            ready,
            available: ready,
            created: 0,
        }
    }

    #[test]
    fn every_node_that_takes_one_has_one() {
        let nodes = nodes(&[("a", YES), ("b", YES), ("c", NO), ("d", STAYS)]);
        let there = [
            daemon("a1", "a", true, true),
            daemon("a2", "a", true, true),
            daemon("c1", "c", true, true),
            daemon("d1", "d", true, true),
        ];
        let plan = plan(&nodes, &there, Some(ONE));
        assert_eq!((plan.create, plan.delete), (vec!["b".to_owned()], vec!["a2".to_owned(), "c1".to_owned()]));
        assert_eq!(plan.counts, Counts { desired: 2, current: 1, misscheduled: 2, ready: 1, available: 1, updated: 1 });
    }

    #[test]
    fn failed_pods_are_replaced() {
        let failed = Daemon { phase: "Failed".to_owned(), ..daemon("a1", "a", true, false) };
        let plan = plan(&nodes(&[("a", YES)]), &[failed], Some(ONE));
        assert_eq!((plan.delete.as_slice(), plan.ended.len()), (&["a1".to_owned()][..], 1));
    }

    #[test]
    fn updates_take_what_does_not_work_first_and_no_more_than_allowed() {
        let nodes = nodes(&[("a", YES), ("b", YES), ("c", YES)]);
        let all = |broken: bool| {
            [daemon("a1", "a", false, true), daemon("b1", "b", false, !broken), daemon("c1", "c", false, true)]
        };
        assert_eq!(plan(&nodes, &all(false), Some(ONE)).delete, ["a1"]);
        assert_eq!(plan(&nodes, &all(true), Some(ONE)).delete, ["b1"]);
        assert!(plan(&nodes, &all(false), None).delete.is_empty());
        let surge = Rolling { max_surge: 1, max_unavailable: 0 };
        assert_eq!(plan(&nodes, &all(false), Some(surge)).create, ["a"]);
        let both = [
            daemon("a1", "a", false, true),
            daemon("a2", "a", true, true),
            daemon("b1", "b", false, true),
            daemon("c1", "c", false, true),
        ];
        assert_eq!(plan(&nodes, &both, Some(surge)).delete, ["a1"]);
    }
}
