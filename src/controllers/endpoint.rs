//! Endpoints of Services that have a selector: the older form of EndpointSlices.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::Term;
use super::api::Api;
use super::backend::{Backend, BackendPort, ServiceSpec, backends, enqueue_services};
use super::informer::Informer;
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{ENDPOINTS, PODS, SERVICES};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::slices::HEADLESS;

/// Addresses of one Endpoints object; more are left out.
const MAX_ADDRESSES: usize = 1000;
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
const MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const MANAGER: &str = "endpoint-controller";

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (services, pods) = (term.informers.of(&SERVICES), term.informers.of(&PODS));
    let endpoints = term.informers.of(&ENDPOINTS);
    let again = queue.clone();
    let subscriptions = vec![
        enqueue_self(&queue, &services),
        enqueue_services(&queue, &services, &pods),
        // Someone deleted them: the Service of that name wants them back.
        endpoints.subscribe(move |delta| {
            if let (Some(old), None) = (&delta.old, &delta.new) {
                again.add(old.key.clone());
            }
        }),
    ];
    let reconcile = Arc::new(EndpointsOfServices {
        api: term.api("endpoint-controller"),
        services: services.clone(),
        pods: pods.clone(),
        endpoints: endpoints.clone(),
    });
    let needs = vec![services, pods, endpoints];
    term.start(Controller { name: "endpoint", queue, concurrency: 8, needs, subscriptions, reconcile });
}

struct EndpointsOfServices {
    api: Api,
    services: Arc<Informer>,
    pods: Arc<Informer>,
    endpoints: Arc<Informer>,
}

/// The subsets of a Service's backends: one per set of ports.
pub fn subsets(namespace: &str, spec: &ServiceSpec, backends: &[Backend]) -> (Vec<EndpointSubset>, bool) {
    let mut groups: BTreeMap<Vec<BackendPort>, (Vec<EndpointAddress>, Vec<EndpointAddress>)> = BTreeMap::new();
    let six = spec.ip_families.first().is_some_and(|family| family == "IPv6")
        || (spec.ip_families.is_empty() && spec.cluster_ip.contains(':'));
    let mut count = 0;
    for backend in backends {
        if backend.terminating && !spec.publish_not_ready_addresses {
            continue;
        }
        let Some(ip) = backend.ips.iter().find(|ip| ip.contains(':') == six) else { continue };
        if backend.ports.is_empty() && !(spec.ports.is_empty() && spec.is_headless()) {
            continue;
        }
        count += 1;
        if count > MAX_ADDRESSES {
            break;
        }
        let (ready, not_ready) = groups.entry(backend.ports.clone()).or_default();
        let address = address(namespace, backend, ip);
        if spec.publish_not_ready_addresses || backend.serving { ready.push(address) } else { not_ready.push(address) }
    }
    let some = |mut addresses: Vec<EndpointAddress>| {
        addresses.sort_by(|a, b| a.ip.cmp(&b.ip));
        Some(addresses).filter(|addresses| !addresses.is_empty())
    };
    let subsets = groups
        .into_iter()
        .map(|(ports, (ready, not_ready))| EndpointSubset {
            addresses: some(ready),
            not_ready_addresses: some(not_ready),
            ports: Some(ports.iter().map(port).collect()).filter(|ports: &Vec<_>| !ports.is_empty()),
        })
        .collect();
    (subsets, count > MAX_ADDRESSES)
}

fn address(namespace: &str, backend: &Backend, ip: &str) -> EndpointAddress {
    EndpointAddress {
        ip: ip.to_owned(),
        hostname: backend.hostname.clone(),
        node_name: backend.node.clone(),
        target_ref: Some(ObjectReference {
            kind: Some("Pod".to_owned()),
            namespace: Some(namespace.to_owned()),
            name: Some(backend.name.clone()),
            uid: Some(backend.uid.clone()),
            ..ObjectReference::default()
        }),
    }
}

fn port(port: &BackendPort) -> EndpointPort {
    EndpointPort {
        name: Some(port.name.clone()).filter(|name| !name.is_empty()),
        port: port.port,
        protocol: Some(port.protocol.clone()),
        app_protocol: port.app_protocol.clone(),
    }
}

impl Reconcile for EndpointsOfServices {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl EndpointsOfServices {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let current = self.endpoints.get(key);
        let Some(service) = self.services.get(key) else {
            if let Some(current) = current.filter(|current| current.deleting.is_none()) {
                self.api.delete(&ENDPOINTS, key, &current.uid).await?;
            }
            return Ok(Next::Done);
        };
        if service.selector.is_none() || service.deleting.is_some() {
            return Ok(Next::Done);
        }
        let spec = ServiceSpec::of(&service)?;
        if spec.kind == "ExternalName" {
            return Ok(Next::Done);
        }
        let backends = backends(&service, &spec, &self.pods)?;
        let (subsets, truncated) = subsets(key.namespace(), &spec, &backends);
        let stored: Option<Endpoints> = current.as_ref().map(|current| current.decode()).transpose()?;
        let mut wanted = stored.clone().unwrap_or_else(|| Endpoints {
            metadata: ObjectMeta {
                name: Some(key.name().to_owned()),
                namespace: Some(key.namespace().to_owned()),
                ..ObjectMeta::default()
            },
            subsets: None,
        });
        wanted.subsets = Some(subsets).filter(|subsets| !subsets.is_empty());
        wanted.metadata.labels = Some(labels(&service, &spec));
        let annotations = wanted.metadata.annotations.get_or_insert_default();
        if truncated {
            annotations.insert(OVER_CAPACITY.to_owned(), "truncated".to_owned());
        } else {
            annotations.remove(OVER_CAPACITY);
        }
        if annotations.is_empty() {
            wanted.metadata.annotations = None;
        }
        let written = match &stored {
            Some(stored) if *stored == wanted => return Ok(Next::Done),
            Some(_) => self.api.update(&ENDPOINTS, key, "", &wanted).await,
            None => self.api.create(&ENDPOINTS, key.namespace(), &wanted).await,
        };
        match written {
            Err(error) if !error.is_namespace_terminating() => Err(error.into()),
            _ => Ok(Next::Done),
        }
    }
}

fn labels(service: &Object, spec: &ServiceSpec) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> =
        service.labels.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    if spec.has_address() {
        labels.remove(HEADLESS);
    } else {
        labels.insert(HEADLESS.to_owned(), String::new());
    }
    labels.insert(MANAGED_BY.to_owned(), MANAGER.to_owned());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unready_pods_are_listed_apart_and_terminating_ones_not_at_all() {
        let port = BackendPort { name: String::new(), protocol: "TCP".to_owned(), port: 80, app_protocol: None };
        let backend = |ip: &str, serving, terminating| Backend {
            ips: vec![ip.to_owned()],
            serving,
            terminating,
            ports: vec![port.clone()],
            ..Backend::default()
        };
        let backends =
            [backend("10.0.0.2", true, false), backend("10.0.0.1", false, false), backend("10.0.0.3", true, true)];
        let spec = |publish| ServiceSpec { publish_not_ready_addresses: publish, ..ServiceSpec::default() };
        let ips = |addresses: &Option<Vec<EndpointAddress>>| {
            addresses.iter().flatten().map(|address| address.ip.clone()).collect::<Vec<_>>()
        };
        let (some, truncated) = subsets("n", &spec(false), &backends);
        assert!(!truncated);
        assert_eq!(
            (ips(&some[0].addresses), ips(&some[0].not_ready_addresses)),
            (vec!["10.0.0.2".to_owned()], vec!["10.0.0.1".to_owned()])
        );
        let (all, _) = subsets("n", &spec(true), &backends);
        assert_eq!(ips(&all[0].addresses), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
    }
}
