//! EndpointSlices of Services that have a selector.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Term;
use super::backend::{Backend, BackendPort, ServiceSpec, backends, enqueue_services};
use super::event::{EventType, Events};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{ENDPOINT_SLICES, NODES, PODS, SERVICES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::slices::{Changes, Group, HEADLESS, MANAGED_BY, SERVICE_NAME, Slices, enqueue_service_of_slice, name, plan};
use super::template::controller_reference;

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
        services: services.clone(),
        pods: pods.clone(),
        slices: Slices { api, slices: slices.clone(), manager: MANAGER },
        nodes: nodes.clone(),
    });
    let needs = vec![services, pods, slices, nodes];
    term.start(Controller { name: "endpointslice", queue, concurrency: 8, needs, subscriptions, reconcile });
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
    events: Events,
    services: Arc<Informer>,
    pods: Arc<Informer>,
    slices: Slices,
    nodes: Arc<Informer>,
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
        let mut existing = self.slices.of(key)?;
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
        if let Err(error) = self.slices.apply(key.namespace(), changes).await {
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
}

#[cfg(test)]
mod tests {
    use super::*;

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
