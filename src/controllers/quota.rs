//! ResourceQuotas: what a namespace uses of what its quotas limit.
//!
//! Admission charges a quota before the object is stored, so that for a moment a right charge looks too high: a count at that
//! moment would take it back and let the next write through. So objects that come are counted only after a while (they are
//! charged already); what goes is counted at once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::{
    PersistentVolumeClaim, Pod, ResourceQuota, ResourceQuotaSpec, ResourceQuotaStatus,
    ScopedResourceSelectorRequirement, Service,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use parking_lot::Mutex;

use super::Term;
use super::api::Api;
use super::discovery::Discovery;
use super::informer::{Informer, Informers, Subscription};
use super::object::{Key, Object};
use super::quantity::{milli, units};
use super::queue::Queue;
use super::resource::{PERSISTENT_VOLUME_CLAIMS, PODS, RESOURCE_QUOTAS, Resource, SERVICES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use crate::scheduler::pod_info::{Resources, limits, requests};

/// Changes are gathered for so long.
const GATHER: Duration = Duration::from_millis(20);
/// By then a charged object is stored, or never will be, and its charge is taken back.
const SETTLE: Duration = Duration::from_secs(5);
/// All quotas are counted again this often, whatever was missed.
const RESYNC: Duration = Duration::from_secs(300);
const CLASS: &str = ".storageclass.storage.k8s.io/";

/// Starts the loop.
pub fn start(term: &Term, discovery: &Arc<Discovery>) {
    let queue = Arc::new(Queue::default());
    let (quotas, pods) = (term.informers.of(&RESOURCE_QUOTAS), term.informers.of(&PODS));
    let (services, claims) = (term.informers.of(&SERVICES), term.informers.of(&PERSISTENT_VOLUME_CLAIMS));
    let mut subscriptions = vec![enqueue_changed(&queue, &quotas)];
    for informer in [&pods, &services, &claims] {
        subscriptions.push(enqueue_quotas(&queue, &quotas, informer, true));
    }
    let reconcile = Arc::new(Quotas {
        api: term.api("resourcequota-controller"),
        discovery: discovery.clone(),
        informers: term.informers.clone(),
        queue: queue.clone(),
        quotas: quotas.clone(),
        pods: pods.clone(),
        services: services.clone(),
        claims: claims.clone(),
        counted: Mutex::default(),
    });
    let needs = vec![quotas, pods, services, claims];
    term.start(Controller { name: "resourcequota", queue, concurrency: 4, needs, subscriptions, reconcile });
}

/// Asks for a quota: at once when its limits are others than those it was counted for, later after a charge.
fn enqueue_changed(queue: &Arc<Queue>, quotas: &Arc<Informer>) -> Subscription {
    let queue = queue.clone();
    quotas.subscribe(move |delta| {
        let Some(new) = &delta.new else { return };
        let counted = new.decode().is_ok_and(|quota: ResourceQuota| {
            let hard = quota.spec.and_then(|spec| spec.hard).unwrap_or_default();
            quota.status.and_then(|status| status.hard).is_some_and(|counted| counted == hard)
        });
        if counted {
            queue.add_after(new.key.clone(), SETTLE);
        } else {
            queue.add(new.key.clone());
        }
    })
}

/// Asks for the quotas of a namespace when something in it comes, goes or changes what it uses (which only objects can
/// of which more than their number is `measured`).
fn enqueue_quotas(
    queue: &Arc<Queue>,
    quotas: &Arc<Informer>,
    informer: &Arc<Informer>,
    measured: bool,
) -> Subscription {
    let (queue, quotas) = (queue.clone(), quotas.clone());
    informer.subscribe(move |delta| {
        if let (Some(old), Some(new)) = (&delta.old, &delta.new)
            && (!measured
                || old.generation == new.generation
                    && old.is_finished() == new.is_finished()
                    && old.deleting.is_some() == new.deleting.is_some()
                    && old.generation != 0)
        {
            return;
        }
        let Some(latest) = delta.latest() else { return };
        let delay = if delta.old.is_none() { SETTLE } else { GATHER };
        for quota in quotas.read().namespace(latest.key.namespace()) {
            queue.add_after(quota.key.clone(), delay);
        }
    })
}

struct Quotas {
    api: Api,
    discovery: Arc<Discovery>,
    informers: Arc<Informers>,
    queue: Arc<Queue>,
    quotas: Arc<Informer>,
    pods: Arc<Informer>,
    services: Arc<Informer>,
    claims: Arc<Informer>,
    /// Resources that are only counted, watched since a quota named them.
    counted: Mutex<HashMap<Resource, Subscription>>,
}

/// What is used of each limited thing, in thousandths.
type Usage = BTreeMap<String, i64>;

/// Adds to what is used.
fn add(usage: &mut Usage, name: &str, amount: i64) {
    let sum = usage.entry(name.to_owned()).or_default();
    *sum = sum.saturating_add(amount);
}

fn thousands(amount: i64) -> i64 {
    amount.saturating_mul(1000)
}

/// Adds what a pod uses.
fn add_pod(usage: &mut Usage, pod: &Pod) {
    add(usage, "count/pods", 1000);
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(phase, Some("Failed" | "Succeeded")) {
        return;
    }
    add(usage, "pods", 1000);
    let Some(spec) = &pod.spec else { return };
    let wanted = requests(spec);
    add_resources(usage, "requests.", &wanted);
    add(usage, "cpu", wanted.milli_cpu);
    add(usage, "memory", thousands(wanted.memory));
    add(usage, "ephemeral-storage", thousands(wanted.ephemeral_storage));
    for (name, amount) in wanted.scalars.iter().filter(|(name, _)| name.starts_with("hugepages-")) {
        add(usage, name, thousands(*amount));
    }
    add_resources(usage, "limits.", &limits(spec));
}

fn add_resources(usage: &mut Usage, prefix: &str, resources: &Resources) {
    add(usage, &format!("{prefix}cpu"), resources.milli_cpu);
    add(usage, &format!("{prefix}memory"), thousands(resources.memory));
    add(usage, &format!("{prefix}ephemeral-storage"), thousands(resources.ephemeral_storage));
    for (name, amount) in &resources.scalars {
        add(usage, &format!("{prefix}{name}"), thousands(*amount));
    }
}

/// Adds what a Service uses.
fn add_service(usage: &mut Usage, service: &Service) {
    add(usage, "services", 1000);
    add(usage, "count/services", 1000);
    let Some(spec) = &service.spec else { return };
    let ports = i64::try_from(spec.ports.iter().flatten().count()).unwrap_or(0);
    match spec.type_.as_deref() {
        Some("NodePort") => add(usage, "services.nodeports", thousands(ports)),
        Some("LoadBalancer") => {
            add(usage, "services.loadbalancers", 1000);
            if spec.allocate_load_balancer_node_ports != Some(false) {
                add(usage, "services.nodeports", thousands(ports));
            }
        }
        _ => {}
    }
}

/// Adds what a claim uses.
fn add_claim(usage: &mut Usage, claim: &PersistentVolumeClaim) {
    let spec = claim.spec.as_ref();
    let requests = spec.and_then(|spec| spec.resources.as_ref()).and_then(|resources| resources.requests.as_ref());
    let bytes = thousands(requests.and_then(|requests| requests.get("storage")).map_or(0, units));
    add(usage, "persistentvolumeclaims", 1000);
    add(usage, "count/persistentvolumeclaims", 1000);
    add(usage, "requests.storage", bytes);
    if let Some(class) = spec.and_then(|spec| spec.storage_class_name.as_deref()) {
        add(usage, &format!("{class}{CLASS}requests.storage"), bytes);
        add(usage, &format!("{class}{CLASS}persistentvolumeclaims"), 1000);
    }
}

/// Whether a quota's scopes let it count the pod.
fn in_scope(spec: &ResourceQuotaSpec, pod: &Pod) -> bool {
    let selected = spec.scope_selector.iter().flat_map(|selector| selector.match_expressions.iter().flatten());
    let plain = spec.scopes.iter().flatten().map(|scope| ScopedResourceSelectorRequirement {
        scope_name: scope.clone(),
        operator: "Exists".to_owned(),
        values: None,
    });
    plain.chain(selected.cloned()).all(|requirement| has_scope(&requirement, pod))
}

fn has_scope(requirement: &ScopedResourceSelectorRequirement, pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let best_effort = || {
        let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
        let resources = containers.filter_map(|container| container.resources.as_ref());
        let mut maps = resources.flat_map(|resources| [&resources.requests, &resources.limits]).flatten();
        !maps.any(|map| map.contains_key("cpu") || map.contains_key("memory"))
    };
    match requirement.scope_name.as_str() {
        "Terminating" => spec.active_deadline_seconds.is_some_and(|seconds| seconds >= 0),
        "NotTerminating" => spec.active_deadline_seconds.is_none(),
        "BestEffort" => best_effort(),
        "NotBestEffort" => !best_effort(),
        "PriorityClass" => {
            let class = spec.priority_class_name.as_deref().filter(|class| !class.is_empty());
            let listed = || requirement.values.iter().flatten().any(|value| Some(value.as_str()) == class);
            match requirement.operator.as_str() {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => class.is_some(),
                "DoesNotExist" => class.is_none(),
                _ => false,
            }
        }
        "CrossNamespacePodAffinity" => crosses_namespaces(spec),
        _ => false,
    }
}

fn crosses_namespaces(spec: &k8s_openapi::api::core::v1::PodSpec) -> bool {
    let Some(affinity) = &spec.affinity else { return false };
    let with = affinity.pod_affinity.iter().flat_map(|one| {
        let preferred = one.preferred_during_scheduling_ignored_during_execution.iter().flatten();
        let required = one.required_during_scheduling_ignored_during_execution.iter().flatten();
        required.chain(preferred.map(|term| &term.pod_affinity_term))
    });
    let apart = affinity.pod_anti_affinity.iter().flat_map(|one| {
        let preferred = one.preferred_during_scheduling_ignored_during_execution.iter().flatten();
        let required = one.required_during_scheduling_ignored_during_execution.iter().flatten();
        required.chain(preferred.map(|term| &term.pod_affinity_term))
    });
    with.chain(apart).any(|term| {
        term.namespace_selector.is_some() || term.namespaces.as_ref().is_some_and(|names| !names.is_empty())
    })
}

/// A sum as a quantity, spelled as the limit is: `1500m`, `3`, `252Mi`.
fn spelled(thousandths: i64, limit: &Quantity) -> Quantity {
    if thousandths % 1000 != 0 {
        return Quantity(format!("{thousandths}m"));
    }
    let value = thousandths / 1000;
    if limit.0.ends_with('i') && value != 0 {
        let suffixes = [("Ei", 60), ("Pi", 50), ("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)];
        let fits = suffixes.into_iter().find(|(_, bits)| value % (1i64 << bits) == 0);
        if let Some((suffix, bits)) = fits {
            return Quantity(format!("{}{suffix}", value >> bits));
        }
    }
    Quantity(value.to_string())
}

impl Reconcile for Quotas {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Quotas {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.quotas.get(key) else { return Ok(Next::Done) };
        let quota: ResourceQuota = object.decode()?;
        let spec = quota.spec.clone().unwrap_or_default();
        let hard = spec.hard.clone().unwrap_or_default();
        let mut usage = self.usage(key.namespace(), &spec)?;
        for name in hard.keys() {
            if !usage.contains_key(name)
                && let Some(count) = self.count(key.namespace(), name).await?
            {
                usage.insert(name.clone(), thousands(count));
            }
        }
        let used: BTreeMap<String, Quantity> = hard
            .iter()
            .map(|(name, limit)| (name.clone(), spelled(usage.get(name).copied().unwrap_or(0), limit)))
            .collect();
        let old = quota.status.clone().unwrap_or_default();
        if old.hard.unwrap_or_default() != hard || !same(&old.used.unwrap_or_default(), &used) {
            let status = ResourceQuotaStatus { hard: Some(hard), used: Some(used) };
            match self.api.update_status(&RESOURCE_QUOTAS, &object, &status).await {
                Err(error) if !error.is_not_found() => return Err(error.into()),
                _ => {}
            }
        }
        Ok(Next::After(RESYNC))
    }

    /// What pods, Services and claims use.
    fn usage(&self, namespace: &str, spec: &ResourceQuotaSpec) -> Result<Usage, serde_json::Error> {
        let all = |informer: &Informer| -> Vec<Arc<Object>> { informer.read().namespace(namespace).cloned().collect() };
        let mut usage = Usage::new();
        for name in ["pods", "count/pods", "services", "count/services", "persistentvolumeclaims"] {
            usage.insert(name.to_owned(), 0);
        }
        for object in all(&self.pods) {
            let pod: Pod = object.decode()?;
            if in_scope(spec, &pod) {
                add_pod(&mut usage, &pod);
            }
        }
        let scoped = spec.scopes.as_ref().is_some_and(|scopes| !scopes.is_empty()) || spec.scope_selector.is_some();
        if !scoped {
            for object in all(&self.services) {
                add_service(&mut usage, &object.decode()?);
            }
            for object in all(&self.claims) {
                add_claim(&mut usage, &object.decode()?);
            }
        }
        Ok(usage)
    }

    /// Number of objects of a resource that a quota names: `configmaps` or `count/deployments.apps`.
    async fn count(&self, namespace: &str, name: &str) -> Result<Option<i64>, ReconcileError> {
        const PLAIN: [&str; 4] = ["configmaps", "secrets", "replicationcontrollers", "resourcequotas"];
        let name = match name.strip_prefix("count/") {
            Some(name) => name,
            None if PLAIN.contains(&name) => name,
            None => return Ok(None),
        };
        let (plural, group) = name.split_once('.').unwrap_or((name, ""));
        let catalog = self.discovery.catalog().await?;
        let mut served =
            catalog.served.iter().filter(|one| one.resource.plural == plural && one.resource.group == group);
        let Some(resource) = served.next().filter(|one| one.can("list") && one.can("watch")).map(|one| &one.resource)
        else {
            return Ok(None);
        };
        let informer = self.informers.metadata_of(resource);
        informer.synced().await;
        if !self.counted.lock().contains_key(resource) {
            let subscription = enqueue_quotas(&self.queue, &self.quotas, &informer, false);
            self.counted.lock().insert(resource.clone(), subscription);
        }
        let count = informer.read().namespace(namespace).count();
        Ok(i64::try_from(count).ok())
    }
}

/// Whether two lists mean the same, however their quantities are spelled.
fn same(one: &BTreeMap<String, Quantity>, other: &BTreeMap<String, Quantity>) -> bool {
    one.len() == other.len()
        && one.iter().all(|(name, quantity)| other.get(name).is_some_and(|other| milli(other) == milli(quantity)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(extra: Value) -> Pod {
        let mut pod = json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "100m", "memory": "1Mi"}, "limits": {"cpu": "1"}}}]}});
        json_patch::merge(&mut pod, &extra);
        serde_json::from_value(pod).unwrap()
    }

    #[test]
    fn pods_use_what_they_request_until_they_end() {
        let mut usage = Usage::new();
        add_pod(&mut usage, &pod(json!({})));
        add_pod(&mut usage, &pod(json!({"status": {"phase": "Succeeded"}})));
        let used = |name: &str| usage.get(name).copied().unwrap_or(0);
        assert_eq!((used("pods"), used("count/pods"), used("cpu"), used("limits.cpu")), (1000, 2000, 100, 1000));
        assert_eq!((used("memory"), used("requests.memory")), (1_048_576_000, 1_048_576_000));
    }

    #[test]
    fn services_use_node_ports_by_their_type() {
        let mut usage = Usage::new();
        for kind in ["ClusterIP", "NodePort", "LoadBalancer"] {
            let service = json!({"spec": {"type": kind, "ports": [{"port": 1}, {"port": 2}]}});
            add_service(&mut usage, &serde_json::from_value(service).unwrap());
        }
        assert_eq!(
            (usage["services"], usage["services.nodeports"], usage["services.loadbalancers"]),
            (3000, 4000, 1000)
        );
    }

    #[test]
    fn scopes_choose_the_pods_that_count() {
        let scoped =
            |scopes: Value| -> ResourceQuotaSpec { serde_json::from_value(json!({"scopes": scopes})).unwrap() };
        let plain = pod(json!({"spec": {"containers": [{"name": "c"}]}}));
        assert!(in_scope(&scoped(json!(["BestEffort", "NotTerminating"])), &plain));
        assert!(!in_scope(&scoped(json!(["BestEffort"])), &pod(json!({}))));
        assert!(in_scope(&scoped(json!(["Terminating"])), &pod(json!({"spec": {"activeDeadlineSeconds": 5}}))));
    }

    #[test]
    fn sums_are_spelled_like_their_limits() {
        let limit = |text: &str| Quantity(text.to_owned());
        assert_eq!(spelled(1500, &limit("2")).0, "1500m");
        assert_eq!(spelled(3000, &limit("5")).0, "3");
        assert_eq!(spelled(thousands(252 << 20), &limit("500Mi")).0, "252Mi");
        assert!(same(
            &BTreeMap::from([("a".to_owned(), limit("1"))]),
            &BTreeMap::from([("a".to_owned(), limit("1000m"))])
        ));
    }
}
