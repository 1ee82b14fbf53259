//! EndpointSlices of Services that have a selector.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Term;
use super::api::Api;
use super::backend::{Backend, BackendPort, ServiceSpec, backends, enqueue_services};
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{ENDPOINT_SLICES, NODES, PODS, SERVICES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::template::controller_reference;

/// Endpoints of one slice.
const MAX_ENDPOINTS: usize = 100;
/// Label that names the Service of a slice.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label that names the manager of a slice.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Label of what belongs to a Service without an address.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
const MANAGER: &str = "endpointslice-controller.k8s.io";
const ZONE: &str = "topology.kubernetes.io/zone";

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (services, pods) = (term.informers.of(&SERVICES), term.informers.of(&PODS));
    let (slices, nodes) = (term.informers.of(&ENDPOINT_SLICES), term.informers.of(&NODES));
    let api = term.api("endpointslice-controller");
    let subscriptions = vec![
        enqueue_self(&queue, &services),
        enqueue_services(&queue, &services, &pods),
        enqueue_service_of_slice(&queue, &slices, MANAGER),
        enqueue_on_zone_change(&queue, &services, &nodes),
    ];
    let reconcile = Arc::new(EndpointSlices {
        events: term.recorder.events(&api, "endpoint-slice-controller"),
        api,
        services: services.clone(),
        pods: pods.clone(),
        slices: slices.clone(),
        nodes: nodes.clone(),
    });
    let needs = vec![services, pods, slices, nodes];
    term.start(Controller { name: "endpointslice", queue, concurrency: 8, needs, subscriptions, reconcile });
}

/// Asks for the Service of a slice that is ours.
pub fn enqueue_service_of_slice(queue: &Arc<Queue>, slices: &Arc<Informer>, manager: &'static str) -> Subscription {
    let queue = queue.clone();
    slices.subscribe(move |delta| {
        for slice in delta.states().filter(|slice| slice.labels.get(MANAGED_BY) == Some(manager)) {
            if let Some(service) = slice.labels.get(SERVICE_NAME) {
                queue.add(Key::new(slice.key.namespace(), service));
            }
        }
    })
}

fn enqueue_on_zone_change(queue: &Arc<Queue>, services: &Arc<Informer>, nodes: &Arc<Informer>) -> Subscription {
    let (queue, services) = (queue.clone(), services.clone());
    nodes.subscribe(move |delta| {
        let zone = |node: &Option<Arc<Object>>| node.as_ref().and_then(|node| node.labels.get(ZONE)).map(str::to_owned);
        if zone(&delta.old) != zone(&delta.new) {
            services.read().iter().for_each(|service| queue.add(service.key.clone()));
        }
    })
}

struct EndpointSlices {
    api: Api,
    events: Events,
    services: Arc<Informer>,
    pods: Arc<Informer>,
    slices: Arc<Informer>,
    nodes: Arc<Informer>,
}

/// What is to be done about slices.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    /// New slices.
    pub create: Vec<EndpointSlice>,
    /// Changed slices.
    pub update: Vec<EndpointSlice>,
    /// Names of slices that go.
    pub delete: Vec<String>,
}

/// The endpoints wanted for one set of ports.
pub struct Group {
    /// The ports.
    pub ports: Vec<EndpointPort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// Plans the slices of one address family: existing ones keep what they hold, changes touch as few as possible.
/// `skeleton` is an empty slice as a new one should begin.
pub fn plan(skeleton: &EndpointSlice, groups: Vec<Group>, existing: Vec<EndpointSlice>) -> Changes {
    let mut changes = Changes::default();
    let mut rest = existing;
    let groups = if groups.iter().all(|group| group.endpoints.is_empty()) && groups.len() <= 1 {
        // Without endpoints one empty slice says so.
        groups.into_iter().chain([Group { ports: Vec::new(), endpoints: Vec::new() }]).take(1).collect()
    } else {
        groups
    };
    for group in groups {
        let (own, others): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|slice| port_key(slice.ports.as_deref()) == port_key(Some(&group.ports)));
        rest = others;
        plan_group(skeleton, group, own, &mut changes);
    }
    // Rather than deleting a slice and creating another, the one becomes the other.
    for slice in rest {
        match changes.create.pop() {
            Some(new) => changes.update.push(EndpointSlice { metadata: renewed(&slice, skeleton), ..new }),
            None => changes.delete.push(name(&slice).to_owned()),
        }
    }
    changes
}

fn plan_group(skeleton: &EndpointSlice, group: Group, existing: Vec<EndpointSlice>, changes: &mut Changes) {
    let keeps_empty = group.endpoints.is_empty();
    let mut wanted: BTreeMap<String, Endpoint> =
        group.endpoints.into_iter().map(|endpoint| (endpoint_key(&endpoint), endpoint)).collect();
    let mut slices: Vec<(EndpointSlice, bool)> = Vec::new();
    for mut slice in existing {
        let before = std::mem::take(&mut slice.endpoints);
        slice.endpoints = before.iter().filter_map(|endpoint| wanted.remove(&endpoint_key(endpoint))).collect();
        let mut changed = slice.endpoints != before;
        if !labels_correct(&slice, skeleton) {
            slice.metadata = renewed(&slice, skeleton);
            changed = true;
        }
        slices.push((slice, changed));
    }
    let mut wanted: Vec<Endpoint> = wanted.into_values().collect();
    slices.sort_by_key(|(slice, changed)| (!changed, std::cmp::Reverse(slice.endpoints.len())));
    for (slice, changed) in &mut slices {
        let room = MAX_ENDPOINTS.saturating_sub(slice.endpoints.len()).min(wanted.len());
        if room > 0 {
            slice.endpoints.extend(wanted.drain(..room));
            *changed = true;
        }
    }
    while !wanted.is_empty() {
        let endpoints = wanted.drain(..wanted.len().min(MAX_ENDPOINTS)).collect();
        changes.create.push(EndpointSlice { ports: Some(group.ports.clone()), endpoints, ..skeleton.clone() });
    }
    let mut kept = 0;
    for (slice, changed) in slices {
        let last = keeps_empty && kept == 0;
        if slice.endpoints.is_empty() && !last {
            changes.delete.push(name(&slice).to_owned());
            continue;
        }
        kept += 1;
        if changed {
            changes.update.push(slice);
        }
    }
    if keeps_empty && kept == 0 {
        changes.create.push(EndpointSlice { ports: Some(group.ports), ..skeleton.clone() });
    }
}

fn name(slice: &EndpointSlice) -> &str {
    slice.metadata.name.as_deref().unwrap_or_default()
}

fn endpoint_key(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref()).unwrap_or_default();
    format!("{}/{uid}", endpoint.addresses.first().map_or("", String::as_str))
}

fn port_key(ports: Option<&[EndpointPort]>) -> BTreeSet<String> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    ports
        .unwrap_or_default()
        .iter()
        .map(|port| {
            let number = port.port.map(|number| number.to_string()).unwrap_or_default();
            format!("{}/{}/{number}/{}", text(&port.name), text(&port.protocol), text(&port.app_protocol))
        })
        .collect()
}

fn labels_correct(slice: &EndpointSlice, skeleton: &EndpointSlice) -> bool {
    slice.metadata.labels.clone().unwrap_or_default() == skeleton.metadata.labels.clone().unwrap_or_default()
}

fn renewed(slice: &EndpointSlice, skeleton: &EndpointSlice) -> ObjectMeta {
    ObjectMeta { labels: skeleton.metadata.labels.clone(), ..slice.metadata.clone() }
}

/// Address families that a Service has.
fn families(spec: &ServiceSpec, backends: &[Backend]) -> Vec<&'static str> {
    let mut families: Vec<&'static str> = spec
        .ip_families
        .iter()
        .filter_map(|family| match family.as_str() {
            "IPv4" => Some("IPv4"),
            "IPv6" => Some("IPv6"),
            _ => None,
        })
        .collect();
    if families.is_empty() {
        let six = match backends.first().and_then(|backend| backend.ips.first()) {
            _ if spec.has_address() => spec.cluster_ip.contains(':'),
            Some(ip) => ip.contains(':'),
            None => false,
        };
        families.push(if six { "IPv6" } else { "IPv4" });
    }
    families
}

fn slice_ports(ports: &[BackendPort]) -> Vec<EndpointPort> {
    ports
        .iter()
        .map(|port| EndpointPort {
            name: Some(port.name.clone()),
            port: Some(port.port),
            protocol: Some(port.protocol.clone()),
            app_protocol: port.app_protocol.clone(),
        })
        .collect()
}

/// Groups of endpoints by ports, for one family.
fn groups(
    namespace: &str,
    spec: &ServiceSpec,
    backends: &[Backend],
    family: &str,
    zone_of: &dyn Fn(&str) -> Option<String>,
) -> Vec<Group> {
    let mut groups: BTreeMap<Vec<BackendPort>, Vec<Endpoint>> = BTreeMap::new();
    for backend in backends {
        let addresses: Vec<String> =
            backend.ips.iter().filter(|ip| ip.contains(':') == (family == "IPv6")).take(1).cloned().collect();
        let endpoints = groups.entry(backend.ports.clone()).or_default();
        if !addresses.is_empty() {
            endpoints.push(endpoint(namespace, spec, backend, addresses, zone_of));
        }
    }
    let mut groups: Vec<Group> = groups
        .into_iter()
        .map(|(ports, endpoints)| Group { ports: slice_ports(&ports), endpoints })
        .filter(|group| !group.endpoints.is_empty())
        .collect();
    hint(spec, &mut groups);
    groups
}

fn endpoint(
    namespace: &str,
    spec: &ServiceSpec,
    backend: &Backend,
    addresses: Vec<String>,
    zone_of: &dyn Fn(&str) -> Option<String>,
) -> Endpoint {
    Endpoint {
        addresses,
        conditions: Some(EndpointConditions {
            ready: Some(spec.publish_not_ready_addresses || (backend.serving && !backend.terminating)),
            serving: Some(backend.serving),
            terminating: Some(backend.terminating),
        }),
        hostname: backend.hostname.clone(),
        node_name: backend.node.clone(),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(backend.name.clone()),
            uid: Some(backend.uid.clone()),
            ..ObjectReference::default()
        }),
        zone: backend.node.as_deref().and_then(zone_of),
        ..Endpoint::default()
    }
}

/// Hints of `spec.trafficDistribution`: each ready endpoint is for its own zone (and node). One without a zone: no hints.
fn hint(spec: &ServiceSpec, groups: &mut [Group]) {
    let same_node = match spec.traffic_distribution.as_deref() {
        Some("PreferClose" | "PreferSameZone") => false,
        Some("PreferSameNode") => true,
        _ => return,
    };
    let is_ready =
        |endpoint: &Endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) == Some(true);
    for group in groups {
        let all_zoned = group.endpoints.iter().filter(|endpoint| is_ready(endpoint)).all(|e| e.zone.is_some());
        for endpoint in group.endpoints.iter_mut().filter(|endpoint| is_ready(endpoint)) {
            let zones = endpoint.zone.clone().filter(|_| all_zoned).map(|name| vec![ForZone { name }]);
            let nodes = endpoint.node_name.clone().filter(|_| same_node).map(|name| vec![ForNode { name }]);
            if zones.is_some() || nodes.is_some() {
                endpoint.hints = Some(EndpointHints { for_zones: zones, for_nodes: nodes });
            }
        }
    }
}

/// An empty slice of a Service.
fn skeleton(service: &Object, spec: &ServiceSpec, family: &str) -> EndpointSlice {
    let mut labels: BTreeMap<String, String> =
        service.labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    labels.remove(HEADLESS);
    if !spec.has_address() {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels.insert(SERVICE_NAME.to_owned(), service.key.name().to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", service.key.name())),
            namespace: Some(service.key.namespace().to_owned()),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference(&SERVICES, service)]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        ..EndpointSlice::default()
    }
}

impl Reconcile for EndpointSlices {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl EndpointSlices {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        // Slices of a Service that is gone are garbage, and collected as such.
        let Some(service) = self.services.get(key) else { return Ok(Next::Done) };
        if service.selector.is_none() || service.deleting.is_some() {
            return Ok(Next::Done);
        }
        let spec = ServiceSpec::of(&service)?;
        if spec.kind == "ExternalName" {
            return Ok(Next::Done);
        }
        let backends = backends(&service, &spec, &self.pods)?;
        let mut existing = self.existing(&service)?;
        let mut changes = Changes::default();
        for family in families(&spec, &backends) {
            let (own, others): (Vec<_>, Vec<_>) = existing.into_iter().partition(|slice| slice.address_type == family);
            existing = others;
            let zone_of =
                |node: &str| self.nodes.read().get(node).and_then(|node| node.labels.get(ZONE).map(str::to_owned));
            let groups = groups(service.key.namespace(), &spec, &backends, family, &zone_of);
            let planned = plan(&skeleton(&service, &spec, family), groups, own);
            changes.create.extend(planned.create);
            changes.update.extend(planned.update);
            changes.delete.extend(planned.delete);
        }
        changes.delete.extend(existing.iter().map(|slice| name(slice).to_owned()));
        if let Err(error) = self.apply(&service, changes).await {
            if error.is_namespace_terminating() {
                return Ok(Next::Done);
            }
            if !error.is_conflict() {
                let message = format!("Error updating Endpoint Slices for Service {key}: {error}");
                self.events.tell(&SERVICES, &service, EventType::Warning, "FailedToUpdateEndpointSlices", message);
            }
            return Err(error.into());
        }
        Ok(Next::Done)
    }

    fn existing(&self, service: &Object) -> Result<Vec<EndpointSlice>, serde_json::Error> {
        let cached = self.slices.read();
        let own = cached.namespace(service.key.namespace()).filter(|slice| {
            slice.labels.get(SERVICE_NAME) == Some(service.key.name())
                && slice.labels.get(MANAGED_BY) == Some(MANAGER)
                && slice.deleting.is_none()
        });
        own.map(|slice| slice.decode()).collect()
    }

    async fn apply(&self, service: &Object, changes: Changes) -> Result<(), super::api::ApiError> {
        let namespace = service.key.namespace();
        for slice in &changes.create {
            self.api.create(&ENDPOINT_SLICES, namespace, slice).await?;
        }
        for slice in &changes.update {
            self.api.update(&ENDPOINT_SLICES, &Key::new(namespace, name(slice)), "", slice).await?;
        }
        for name in &changes.delete {
            let key = Key::new(namespace, name);
            if let Some(slice) = self.slices.get(&key) {
                self.api.delete(&ENDPOINT_SLICES, &key, &slice.uid).await?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(range: std::ops::Range<usize>) -> Vec<Endpoint> {
        range
            .map(|index| Endpoint {
                addresses: vec![format!("10.0.{}.{}", index / 250, index % 250)],
                ..Endpoint::default()
            })
            .collect()
    }

    fn ports(number: i32) -> Vec<EndpointPort> {
        vec![EndpointPort { port: Some(number), ..EndpointPort::default() }]
    }

    fn slice(name: &str, number: i32, endpoints: Vec<Endpoint>) -> EndpointSlice {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        EndpointSlice { metadata, ports: Some(ports(number)), endpoints, ..EndpointSlice::default() }
    }

    fn planned(groups: Vec<Group>, existing: Vec<EndpointSlice>) -> Changes {
        plan(&EndpointSlice::default(), groups, existing)
    }

    #[test]
    fn a_service_without_endpoints_has_one_empty_slice() {
        let first = planned(vec![], vec![]);
        assert_eq!((first.create.len(), first.create[0].endpoints.len()), (1, 0));
        let empty = EndpointSlice { ports: None, ..slice("e", 0, vec![]) };
        assert_eq!(planned(vec![], vec![empty.clone()]), Changes::default());
        let filled = planned(vec![Group { ports: ports(80), endpoints: endpoints(0..1) }], vec![empty]);
        assert_eq!((filled.create.len(), filled.delete.len(), filled.update.len()), (0, 0, 1));
        assert_eq!((name(&filled.update[0]), filled.update[0].ports.clone()), ("e", Some(ports(80))));
    }

    #[test]
    fn many_endpoints_are_split_and_later_ones_fill_what_has_room() {
        let group = |count| vec![Group { ports: ports(80), endpoints: endpoints(0..count) }];
        let created = planned(group(250), vec![]);
        assert_eq!(created.create.iter().map(|slice| slice.endpoints.len()).collect::<Vec<_>>(), [100, 100, 50]);
        let existing = vec![slice("full", 80, endpoints(0..100)), slice("half", 80, endpoints(100..150))];
        let grown = planned(group(160), existing.clone());
        assert_eq!((grown.create.len(), grown.update.len()), (0, 1));
        assert_eq!((name(&grown.update[0]), grown.update[0].endpoints.len()), ("half", 60));
        let shrunk = planned(group(100), existing);
        assert_eq!((shrunk.delete, shrunk.update.len()), (vec!["half".to_owned()], 0));
    }

    #[test]
    fn readiness_and_deletion_show_in_the_conditions() {
        let conditions = |serving, terminating, publish| {
            let spec = ServiceSpec { publish_not_ready_addresses: publish, ..ServiceSpec::default() };
            let backend = Backend { serving, terminating, ips: vec!["10.0.0.1".to_owned()], ..Backend::default() };
            let groups = groups("n", &spec, &[backend], "IPv4", &|_| None);
            let conditions = groups[0].endpoints[0].conditions.clone().unwrap();
            (conditions.ready.unwrap(), conditions.serving.unwrap(), conditions.terminating.unwrap())
        };
        assert_eq!(conditions(true, false, false), (true, true, false));
        assert_eq!(conditions(true, true, false), (false, true, true));
        assert_eq!(conditions(false, false, true), (true, false, false));
    }
}
