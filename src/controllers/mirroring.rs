//! EndpointSlices for Endpoints that someone keeps by hand, for a Service without a selector.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointSubset, Endpoints};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Term;
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{ENDPOINT_SLICES, ENDPOINTS, SERVICES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::slices::{Changes, Group, HEADLESS, MANAGED_BY, SERVICE_NAME, Slices, enqueue_service_of_slice, plan};
use super::template::controller_reference;

const MANAGER: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
/// Addresses of one subset that are mirrored; upstream's default.
const MAX_PER_SUBSET: usize = 1000;

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (services, endpoints) = (term.informers.of(&SERVICES), term.informers.of(&ENDPOINTS));
    let slices = term.informers.of(&ENDPOINT_SLICES);
    let subscriptions = vec![
        enqueue_self(&queue, &endpoints),
        enqueue_self(&queue, &services),
        enqueue_service_of_slice(&queue, &slices, MANAGER),
    ];
    let reconcile = Arc::new(Mirroring {
        services: services.clone(),
        endpoints: endpoints.clone(),
        slices: Slices { api: term.api("endpointslicemirroring-controller"), slices: slices.clone(), manager: MANAGER },
    });
    let needs = vec![services, endpoints, slices];
    term.start(Controller { name: "endpointslice-mirroring", queue, concurrency: 4, needs, subscriptions, reconcile });
}

struct Mirroring {
    services: Arc<Informer>,
    endpoints: Arc<Informer>,
    slices: Slices,
}

fn is_mirrored(endpoints: &Object, metadata: &ObjectMeta) -> bool {
    let elects =
        metadata.annotations.as_ref().is_some_and(|all| all.contains_key("control-plane.alpha.kubernetes.io/leader"));
    endpoints.deleting.is_none() && endpoints.labels.get(SKIP) != Some("true") && !elects
}

/// The endpoints of one address family, by ports.
fn groups(subsets: &[EndpointSubset], family: &str) -> Vec<Group> {
    let six = family == "IPv6";
    let mut groups = Vec::new();
    for subset in subsets {
        let ports: Vec<EndpointPort> = subset
            .ports
            .iter()
            .flatten()
            .map(|port| EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(port.port),
                protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".to_owned())),
                app_protocol: port.app_protocol.clone(),
            })
            .collect();
        let ready = subset.addresses.iter().flatten().map(|address| endpoint(address, true));
        let not_ready = subset.not_ready_addresses.iter().flatten().map(|address| endpoint(address, false));
        let endpoints: Vec<Endpoint> = ready
            .chain(not_ready)
            .filter(|endpoint| endpoint.addresses.iter().any(|address| address.contains(':') == six))
            .take(MAX_PER_SUBSET)
            .collect();
        if !endpoints.is_empty() {
            groups.push(Group { ports, endpoints });
        }
    }
    groups
}

fn endpoint(address: &EndpointAddress, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![address.ip.clone()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone().filter(|name| !name.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn skeleton(endpoints: &Object, family: &str) -> EndpointSlice {
    let mut labels: BTreeMap<String, String> = endpoints
        .labels
        .iter()
        .filter(|(key, _)| *key != HEADLESS)
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    labels.insert(SERVICE_NAME.to_owned(), endpoints.key.name().to_owned());
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    EndpointSlice {
        metadata: ObjectMeta {
            generate_name: Some(format!("{}-", endpoints.key.name())),
            namespace: Some(endpoints.key.namespace().to_owned()),
            labels: Some(labels),
            owner_references: Some(vec![controller_reference(&ENDPOINTS, endpoints)]),
            ..ObjectMeta::default()
        },
        address_type: family.to_owned(),
        ..EndpointSlice::default()
    }
}

impl Reconcile for Mirroring {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Mirroring {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let mut existing = self.slices.of(key)?;
        let service = self.services.get(key).filter(|service| service.selector.is_none() && service.deleting.is_none());
        let object = self.endpoints.get(key).filter(|_| service.is_some());
        let decoded: Option<Endpoints> = object.as_ref().map(|object| object.decode()).transpose()?;
        let mut changes = Changes::default();
        if let (Some(object), Some(decoded)) = (&object, &decoded)
            && is_mirrored(object, &decoded.metadata)
        {
            let subsets = decoded.subsets.clone().unwrap_or_default();
            for family in ["IPv4", "IPv6"] {
                let (own, others): (Vec<_>, Vec<_>) =
                    existing.into_iter().partition(|slice: &EndpointSlice| slice.address_type == family);
                existing = others;
                let groups = groups(&subsets, family);
                if groups.is_empty() {
                    // No endpoints, no slice: a mirror has no placeholder.
                    existing.extend(own);
                    continue;
                }
                let planned = plan(&skeleton(object, family), groups, own);
                changes.create.extend(planned.create);
                changes.update.extend(planned.update);
                changes.delete.extend(planned.delete);
            }
        }
        changes.delete.extend(existing.iter().filter_map(|slice| slice.metadata.name.clone()));
        match self.slices.apply(key.namespace(), changes).await {
            Err(error) if !error.is_namespace_terminating() => Err(error.into()),
            _ => Ok(Next::Done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn subsets_become_groups_of_one_family() {
        let subsets: Vec<EndpointSubset> = serde_json::from_value(json!([{
            "addresses": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}], "notReadyAddresses": [{"ip": "10.0.0.2"}],
            "ports": [{"port": 80}]}]))
        .unwrap();
        let four = groups(&subsets, "IPv4");
        let addresses: Vec<(&str, bool)> = four[0]
            .endpoints
            .iter()
            .map(|endpoint| (endpoint.addresses[0].as_str(), endpoint.conditions.as_ref().unwrap().ready.unwrap()))
            .collect();
        assert_eq!(addresses, [("10.0.0.1", true), ("10.0.0.2", false)]);
        assert_eq!(groups(&subsets, "IPv6")[0].endpoints.len(), 1);
        assert!(groups(&[], "IPv4").is_empty());
    }
}
