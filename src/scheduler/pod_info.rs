//! A pod as the scheduler sees it: read once, small, shared.

use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, NodeSelectorTerm, Pod, PodAffinityTerm, PodSpec, Toleration, TopologySpreadConstraint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

use crate::controllers::object::Key;
use crate::controllers::quantity::{milli, units};
use crate::controllers::selector::{Labels, Operator, Requirement, Selector};

/// What a container is assumed to use when it does not say: 100m CPU, 200 MB memory (upstream's figures).
const DEFAULT_MILLI_CPU: i64 = 100;
const DEFAULT_MEMORY: i64 = 200 * 1024 * 1024;

/// Amounts of resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub milli_cpu: i64,
    /// Bytes.
    pub memory: i64,
    /// Bytes.
    pub ephemeral_storage: i64,
    /// Extended resources and huge pages.
    pub scalars: BTreeMap<Box<str>, i64>,
}

impl Resources {
    /// Resources of a list of quantities.
    pub fn from_quantities(quantities: Option<&BTreeMap<String, Quantity>>) -> Resources {
        let mut resources = Resources::default();
        for (name, quantity) in quantities.into_iter().flatten() {
            match name.as_str() {
                "cpu" => resources.milli_cpu = milli(quantity),
                "memory" => resources.memory = units(quantity),
                "ephemeral-storage" => resources.ephemeral_storage = units(quantity),
                "pods" => {}
                _ => drop(resources.scalars.insert(name.as_str().into(), units(quantity))),
            }
        }
        resources
    }

    /// Adds.
    pub fn add(&mut self, other: &Resources) {
        self.milli_cpu = self.milli_cpu.saturating_add(other.milli_cpu);
        self.memory = self.memory.saturating_add(other.memory);
        self.ephemeral_storage = self.ephemeral_storage.saturating_add(other.ephemeral_storage);
        for (name, amount) in &other.scalars {
            let sum = self.scalars.entry(name.clone()).or_default();
            *sum = sum.saturating_add(*amount);
        }
    }

    /// Takes away.
    pub fn subtract(&mut self, other: &Resources) {
        self.milli_cpu -= other.milli_cpu;
        self.memory -= other.memory;
        self.ephemeral_storage -= other.ephemeral_storage;
        for (name, amount) in &other.scalars {
            *self.scalars.entry(name.clone()).or_default() -= amount;
        }
    }

    fn max(&mut self, other: &Resources) {
        self.milli_cpu = self.milli_cpu.max(other.milli_cpu);
        self.memory = self.memory.max(other.memory);
        self.ephemeral_storage = self.ephemeral_storage.max(other.ephemeral_storage);
        for (name, amount) in &other.scalars {
            let most = self.scalars.entry(name.clone()).or_default();
            *most = (*most).max(*amount);
        }
    }
}

/// A port that a pod takes on its node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPort {
    /// Address, `0.0.0.0` for all.
    pub ip: Box<str>,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Box<str>,
    /// Port.
    pub port: i32,
}

impl HostPort {
    /// Whether two pods on one node cannot have both.
    pub fn conflicts(&self, other: &HostPort) -> bool {
        let everywhere = |ip: &str| ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (self.ip == other.ip || everywhere(&self.ip) || everywhere(&other.ip))
    }
}

/// One term of a node selector: all requirements must hold.
#[derive(Clone, Debug, Default)]
pub struct NodeTerm {
    labels: Selector,
    fields: Selector,
    empty: bool,
    weight: i32,
}

impl NodeTerm {
    /// Reads a term; what cannot be read matches nothing.
    pub fn new(term: &NodeSelectorTerm, weight: i32) -> NodeTerm {
        let read = |requirements: &Option<Vec<k8s_openapi::api::core::v1::NodeSelectorRequirement>>| {
            requirements
                .iter()
                .flatten()
                .map(|requirement| {
                    Some(Requirement {
                        key: requirement.key.as_str().into(),
                        operator: Operator::parse(&requirement.operator)?,
                        values: requirement.values.iter().flatten().map(|value| value.as_str().into()).collect(),
                    })
                })
                .collect::<Option<Vec<_>>>()
                .map(Selector::new)
        };
        match (read(&term.match_expressions), read(&term.match_fields)) {
            (Some(labels), Some(fields)) => {
                let empty = labels.is_empty() && fields.is_empty();
                NodeTerm { labels, fields, empty, weight }
            }
            _ => NodeTerm { empty: true, weight, ..NodeTerm::default() },
        }
    }

    /// Whether a node matches. An empty term matches none.
    pub fn matches(&self, name: &str, labels: &Labels) -> bool {
        !self.empty
            && self.labels.matches(labels)
            && self.fields.matches(&Labels::from_pairs([("metadata.name", name)]))
    }

    /// Weight of a preferred term.
    pub fn weight(&self) -> i32 {
        self.weight
    }
}

/// One term of pod (anti-)affinity.
#[derive(Clone, Debug)]
pub struct PodTerm {
    selector: Option<Selector>,
    namespaces: Vec<Box<str>>,
    namespace_selector: Option<Selector>,
    /// Node label whose value names the domain.
    pub topology_key: Box<str>,
    /// Weight of a preferred term.
    pub weight: i32,
}

impl PodTerm {
    fn new(term: &PodAffinityTerm, pod: &Pod, weight: i32) -> PodTerm {
        let mut namespaces: Vec<Box<str>> = term.namespaces.iter().flatten().map(|name| name.as_str().into()).collect();
        if namespaces.is_empty() && term.namespace_selector.is_none() {
            namespaces.push(pod.metadata.namespace.as_deref().unwrap_or_default().into());
        }
        let selector = Selector::of_label_selector(term.label_selector.as_ref());
        PodTerm {
            selector: selector.map(|selector| {
                with_label_keys(selector, pod, term.match_label_keys.as_ref(), term.mismatch_label_keys.as_ref())
            }),
            namespaces,
            namespace_selector: Selector::of_label_selector(term.namespace_selector.as_ref()),
            topology_key: term.topology_key.as_str().into(),
            weight,
        }
    }

    /// Whether a pod is one the term speaks of. `namespace_labels` are those of the pod's namespace.
    pub fn matches(&self, pod: &PodInfo, namespace_labels: &Labels) -> bool {
        let in_namespace = self.namespaces.iter().any(|name| **name == *pod.key.namespace())
            || self.namespace_selector.as_ref().is_some_and(|selector| selector.matches(namespace_labels));
        in_namespace && self.selector.as_ref().is_some_and(|selector| selector.matches(&pod.labels))
    }
}

fn with_label_keys(
    selector: Selector,
    pod: &Pod,
    matching: Option<&Vec<String>>,
    mismatching: Option<&Vec<String>>,
) -> Selector {
    let labels = Labels::from_map(pod.metadata.labels.as_ref());
    let requirement = |key: &String, operator| {
        Some(Requirement { key: key.as_str().into(), operator, values: Box::new([labels.get(key)?.into()]) })
    };
    let matching = matching.into_iter().flatten().filter_map(|key| requirement(key, Operator::In));
    let mismatching = mismatching.into_iter().flatten().filter_map(|key| requirement(key, Operator::NotIn));
    selector.and(matching.chain(mismatching))
}

/// One topology spread constraint.
#[derive(Clone, Debug)]
pub struct Spread {
    /// Largest allowed difference.
    pub max_skew: i32,
    /// Node label whose value names the domain.
    pub topology_key: Box<str>,
    /// `DoNotSchedule`; else the constraint is only a wish.
    pub hard: bool,
    /// The pods that are counted.
    pub selector: Selector,
    /// Number of domains below which the smallest is taken as empty.
    pub min_domains: Option<i32>,
    /// Count only nodes that the pod's node affinity admits.
    pub honor_affinity: bool,
    /// Count only nodes whose taints the pod tolerates.
    pub honor_taints: bool,
}

impl Spread {
    fn new(constraint: &TopologySpreadConstraint, pod: &Pod) -> Option<Spread> {
        let selector = Selector::of_label_selector(constraint.label_selector.as_ref())?;
        Some(Spread {
            max_skew: constraint.max_skew,
            topology_key: constraint.topology_key.as_str().into(),
            hard: constraint.when_unsatisfiable == "DoNotSchedule",
            selector: with_label_keys(selector, pod, constraint.match_label_keys.as_ref(), None),
            min_domains: constraint.min_domains,
            honor_affinity: constraint.node_affinity_policy.as_deref() != Some("Ignore"),
            honor_taints: constraint.node_taints_policy.as_deref() == Some("Honor"),
        })
    }
}

/// What only few pods have.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Required node affinity; `Some` and empty admits no node.
    pub node_required: Option<Vec<NodeTerm>>,
    /// Preferred node affinity.
    pub node_preferred: Vec<NodeTerm>,
    /// Required pod affinity.
    pub affinity: Vec<PodTerm>,
    /// Required pod anti-affinity.
    pub anti_affinity: Vec<PodTerm>,
    /// Preferred pod affinity; anti-affinity with negative weight.
    pub preferred: Vec<PodTerm>,
    /// Topology spread.
    pub spread: Vec<Spread>,
    /// Names of claims of the pod's volumes.
    pub claims: Vec<Box<str>>,
}

/// A pod as the scheduler sees it.
#[derive(Clone, Debug)]
pub struct PodInfo {
    /// Namespace and name.
    pub key: Key,
    /// `metadata.uid`.
    pub uid: Box<str>,
    /// `metadata.resourceVersion` of the state this was read from.
    pub resource_version: u64,
    /// `metadata.generation`, 0 when there is none.
    pub generation: i64,
    /// Labels.
    pub labels: Labels,
    /// Uid of the controller, for spreading.
    pub owner: Option<Box<str>>,
    /// `spec.priority`.
    pub priority: i32,
    /// `spec.preemptionPolicy` is `Never`.
    pub never_preempts: bool,
    /// `spec.schedulerName`.
    pub scheduler: Box<str>,
    /// `spec.nodeName`.
    pub node: Option<Box<str>>,
    /// `status.nominatedNodeName`.
    pub nominated: Option<Box<str>>,
    /// What it requests.
    pub requests: Resources,
    /// CPU and memory as used for scores: with defaults where nothing is requested.
    pub estimated: (i64, i64),
    /// `spec.nodeSelector`.
    pub node_selector: Option<Selector>,
    /// Tolerations.
    pub tolerations: Vec<Toleration>,
    /// Ports taken on the node.
    pub host_ports: Vec<HostPort>,
    /// Images of its containers.
    pub images: Vec<Box<str>>,
    /// Names of scheduling gates.
    pub gated: bool,
    /// Being deleted.
    pub deleting: bool,
    /// Being deleted because a scheduler preempted it.
    pub preempted: bool,
    /// When it started (or was created).
    pub started: Timestamp,
    /// What only few pods have.
    pub rules: Option<Box<Rules>>,
}

impl PodInfo {
    /// Reads a pod.
    pub fn new(pod: &Pod) -> Arc<PodInfo> {
        let spec = pod.spec.clone().unwrap_or_default();
        let status = pod.status.as_ref();
        let metadata = &pod.metadata;
        let owner = metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true));
        let started = status.and_then(|status| status.start_time.as_ref()).or(metadata.creation_timestamp.as_ref());
        let preempted = status.and_then(|status| status.conditions.as_ref()).is_some_and(|conditions| {
            conditions.iter().any(|condition| {
                condition.type_ == "DisruptionTarget"
                    && condition.status == "True"
                    && condition.reason.as_deref() == Some("PreemptionByScheduler")
            })
        });
        let owned = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(Box::from);
        Arc::new(PodInfo {
            key: Key::new(
                metadata.namespace.as_deref().unwrap_or_default(),
                metadata.name.as_deref().unwrap_or_default(),
            ),
            uid: metadata.uid.as_deref().unwrap_or_default().into(),
            resource_version: metadata.resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0),
            generation: metadata.generation.unwrap_or(0),
            labels: Labels::from_map(metadata.labels.as_ref()),
            owner: owner.map(|owner| owner.uid.as_str().into()),
            priority: spec.priority.unwrap_or(0),
            never_preempts: spec.preemption_policy.as_deref() == Some("Never"),
            scheduler: spec.scheduler_name.as_deref().unwrap_or("default-scheduler").into(),
            node: owned(&spec.node_name),
            nominated: status.and_then(|status| owned(&status.nominated_node_name)),
            requests: requests(&spec),
            estimated: estimated(&spec),
            node_selector: spec.node_selector.as_ref().filter(|map| !map.is_empty()).map(Selector::of_map),
            host_ports: host_ports(&spec),
            images: spec.containers.iter().filter_map(|container| container.image.as_deref()).map(Box::from).collect(),
            gated: spec.scheduling_gates.as_ref().is_some_and(|gates| !gates.is_empty()),
            deleting: metadata.deletion_timestamp.is_some(),
            preempted,
            started: started.map_or(Timestamp::UNIX_EPOCH, |time| time.0),
            rules: rules(&spec, pod).map(Box::new),
            tolerations: spec.tolerations.unwrap_or_default(),
        })
    }

    /// Whether the node's labels satisfy selector and required affinity.
    pub fn admits_node(&self, name: &str, labels: &Labels) -> bool {
        let selected = self.node_selector.as_ref().is_none_or(|selector| selector.matches(labels));
        let required = self.rules.as_ref().and_then(|rules| rules.node_required.as_ref());
        selected && required.is_none_or(|terms| terms.iter().any(|term| term.matches(name, labels)))
    }
}

fn rules(spec: &PodSpec, pod: &Pod) -> Option<Rules> {
    let mut rules = Rules::default();
    let affinity = spec.affinity.as_ref();
    if let Some(node) = affinity.and_then(|affinity| affinity.node_affinity.as_ref()) {
        let required = node.required_during_scheduling_ignored_during_execution.as_ref();
        rules.node_required =
            required.map(|selector| selector.node_selector_terms.iter().map(|term| NodeTerm::new(term, 0)).collect());
        let preferred = node.preferred_during_scheduling_ignored_during_execution.iter().flatten();
        rules.node_preferred = preferred.map(|term| NodeTerm::new(&term.preference, term.weight)).collect();
    }
    if let Some(together) = affinity.and_then(|affinity| affinity.pod_affinity.as_ref()) {
        let required = together.required_during_scheduling_ignored_during_execution.iter().flatten();
        rules.affinity = required.map(|term| PodTerm::new(term, pod, 0)).collect();
        let preferred = together.preferred_during_scheduling_ignored_during_execution.iter().flatten();
        rules.preferred.extend(preferred.map(|term| PodTerm::new(&term.pod_affinity_term, pod, term.weight)));
    }
    if let Some(apart) = affinity.and_then(|affinity| affinity.pod_anti_affinity.as_ref()) {
        let required = apart.required_during_scheduling_ignored_during_execution.iter().flatten();
        rules.anti_affinity = required.map(|term| PodTerm::new(term, pod, 0)).collect();
        let preferred = apart.preferred_during_scheduling_ignored_during_execution.iter().flatten();
        rules.preferred.extend(preferred.map(|term| PodTerm::new(&term.pod_affinity_term, pod, -term.weight)));
    }
    let spread = spec.topology_spread_constraints.iter().flatten();
    rules.spread = spread.filter_map(|constraint| Spread::new(constraint, pod)).collect();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    rules.claims = spec
        .volumes
        .iter()
        .flatten()
        .filter_map(|volume| match (&volume.persistent_volume_claim, &volume.ephemeral) {
            (Some(claim), _) => Some(claim.claim_name.as_str().into()),
            (None, Some(_)) => Some(format!("{name}-{}", volume.name).into()),
            (None, None) => None,
        })
        .collect();
    let none = rules.node_required.is_none()
        && rules.node_preferred.is_empty()
        && rules.affinity.is_empty()
        && rules.anti_affinity.is_empty()
        && rules.preferred.is_empty()
        && rules.spread.is_empty()
        && rules.claims.is_empty();
    (!none).then_some(rules)
}

fn of_container(container: &Container) -> Resources {
    Resources::from_quantities(container.resources.as_ref().and_then(|resources| resources.requests.as_ref()))
}

fn limits_of_container(container: &Container) -> Resources {
    Resources::from_quantities(container.resources.as_ref().and_then(|resources| resources.limits.as_ref()))
}

/// What a pod requests.
pub fn requests(spec: &PodSpec) -> Resources {
    let pod_level = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref());
    total(spec, of_container, pod_level)
}

/// What a pod is limited to; containers without a limit count nothing.
pub fn limits(spec: &PodSpec) -> Resources {
    let pod_level = spec.resources.as_ref().and_then(|resources| resources.limits.as_ref());
    total(spec, limits_of_container, pod_level)
}

/// The larger of a pod's containers together and of what each step of its init needs. Sidecars (init containers that
/// restart always) count with the containers and with every later step. What the pod says of itself goes before.
fn total(spec: &PodSpec, of: fn(&Container) -> Resources, pod_level: Option<&BTreeMap<String, Quantity>>) -> Resources {
    let mut total = Resources::default();
    for container in &spec.containers {
        total.add(&of(container));
    }
    let mut sidecars = Resources::default();
    let mut peak = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let own = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            sidecars.add(&own);
            peak.max(&sidecars);
        } else {
            let mut step = sidecars.clone();
            step.add(&own);
            peak.max(&step);
        }
    }
    total.add(&sidecars);
    total.max(&peak);
    if let Some(pod_level) = pod_level {
        let stated = Resources::from_quantities(Some(pod_level));
        if pod_level.contains_key("cpu") {
            total.milli_cpu = stated.milli_cpu;
        }
        if pod_level.contains_key("memory") {
            total.memory = stated.memory;
        }
        total.scalars.extend(stated.scalars);
    }
    total.add(&Resources::from_quantities(spec.overhead.as_ref()));
    total
}

/// CPU and memory for scoring.
fn estimated(spec: &PodSpec) -> (i64, i64) {
    let sidecars =
        spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always"));
    let each = spec.containers.iter().chain(sidecars).map(|container| {
        let own = of_container(container);
        let or = |amount: i64, default: i64| if amount == 0 { default } else { amount };
        (or(own.milli_cpu, DEFAULT_MILLI_CPU), or(own.memory, DEFAULT_MEMORY))
    });
    each.fold((0i64, 0i64), |sum, own| (sum.0.saturating_add(own.0), sum.1.saturating_add(own.1)))
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    let containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten().filter(|init| init.restart_policy.as_deref() == Some("Always")));
    containers
        .flat_map(|container| container.ports.iter().flatten())
        .filter_map(|port| {
            Some(HostPort {
                ip: port.host_ip.as_deref().filter(|ip| !ip.is_empty()).unwrap_or("0.0.0.0").into(),
                protocol: port.protocol.as_deref().unwrap_or("TCP").into(),
                port: port.host_port.filter(|port| *port > 0)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn init_containers_and_sidecars_count_as_upstream_counts_them() {
        let container = |cpu: &str| json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
        let mut sidecar = container("100m");
        sidecar["restartPolicy"] = json!("Always");
        let pod = |init: serde_json::Value| {
            let pod = json!({"spec": {"containers": [container("300m"), container("200m")], "initContainers": init,
                "overhead": {"cpu": "1m"}}});
            PodInfo::new(&serde_json::from_value(pod).unwrap()).requests.milli_cpu
        };
        assert_eq!(pod(json!([])), 501);
        assert_eq!(pod(json!([container("800m")])), 801);
        assert_eq!(pod(json!([sidecar.clone()])), 601);
        assert_eq!(pod(json!([sidecar.clone(), container("800m")])), 901);
        assert_eq!(pod(json!([container("800m"), sidecar])), 801);
    }

    #[test]
    fn host_ports_conflict_on_the_same_or_any_address() {
        let port = |ip: &str| HostPort { ip: ip.into(), protocol: "TCP".into(), port: 80 };
        assert!(port("0.0.0.0").conflicts(&port("10.0.0.1")));
        assert!(!port("10.0.0.2").conflicts(&port("10.0.0.1")));
        assert!(!port("10.0.0.1").conflicts(&HostPort { protocol: "UDP".into(), ..port("10.0.0.1") }));
    }
}
