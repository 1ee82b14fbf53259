//! What a Service has behind it: its pods as endpoints. Shared by EndpointSlices and Endpoints.

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use super::informer::{Informer, Subscription};
use super::object::Object;
use super::queue::Queue;

/// Changes of pods are gathered for this long, so that a burst makes one update.
const GATHER: Duration = Duration::from_millis(5);

/// The fields of a Service that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    pub ports: Vec<ServicePort>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: String,
    pub ip_families: Vec<String>,
    pub publish_not_ready_addresses: bool,
    #[serde(rename = "type")]
    pub kind: String,
    pub traffic_distribution: Option<String>,
}

/// A port of a Service.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServicePort {
    pub name: String,
    pub protocol: Option<String>,
    pub port: i32,
    pub target_port: Option<TargetPort>,
    pub app_protocol: Option<String>,
}

/// Number or name of a container's port.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum TargetPort {
    Number(i32),
    Name(String),
}

impl ServiceSpec {
    /// Reads a cached Service.
    pub fn of(service: &Object) -> Result<ServiceSpec, serde_json::Error> {
        #[derive(Deserialize)]
        struct Service {
            #[serde(default)]
            spec: ServiceSpec,
        }
        Ok(service.decode::<Service>()?.spec)
    }

    /// Without an address of its own.
    pub fn is_headless(&self) -> bool {
        self.cluster_ip == "None"
    }

    /// Whether an address is set (`None` and the empty string are not).
    pub fn has_address(&self) -> bool {
        !self.cluster_ip.is_empty() && self.cluster_ip != "None"
    }
}

/// A pod behind a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backend {
    pub name: String,
    pub uid: String,
    pub ips: Vec<String>,
    pub node: Option<String>,
    pub hostname: Option<String>,
    /// The pod is ready.
    pub serving: bool,
    /// The pod is being deleted.
    pub terminating: bool,
    pub ports: Vec<BackendPort>,
}

/// A port of a backend.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendPort {
    pub name: String,
    pub protocol: String,
    pub port: i32,
    pub app_protocol: Option<String>,
}

#[derive(Deserialize)]
struct Pod {
    #[serde(default)]
    spec: PodSpec,
    #[serde(default)]
    status: PodStatus,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodSpec {
    hostname: Option<String>,
    subdomain: Option<String>,
    containers: Vec<Container>,
    init_containers: Vec<Container>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Container {
    ports: Vec<ContainerPort>,
    restart_policy: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ContainerPort {
    name: String,
    container_port: i32,
    protocol: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct PodStatus {
    #[serde(rename = "podIP")]
    pod_ip: String,
    #[serde(rename = "podIPs")]
    pod_ips: Vec<PodIp>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct PodIp {
    ip: String,
}

/// The pods that a Service's selector finds and that have an address and have not ended, ordered by name.
pub fn backends(service: &Object, spec: &ServiceSpec, pods: &Informer) -> Result<Vec<Backend>, serde_json::Error> {
    let Some(selector) = service.selector.as_deref().filter(|selector| !selector.is_empty()) else {
        return Ok(Vec::new());
    };
    let found: Vec<Arc<Object>> = pods
        .read()
        .namespace(service.key.namespace())
        .filter(|pod| pod.pod.ip.is_some() && !pod.is_finished() && selector.matches(&pod.labels))
        .cloned()
        .collect();
    found.iter().map(|pod| backend(service, spec, pod)).collect()
}

fn backend(service: &Object, spec: &ServiceSpec, object: &Object) -> Result<Backend, serde_json::Error> {
    let pod: Pod = object.decode()?;
    let mut ips: Vec<String> = pod.status.pod_ips.into_iter().map(|ip| ip.ip).collect();
    if ips.is_empty() {
        ips.push(pod.status.pod_ip);
    }
    let ours = pod.spec.subdomain.as_deref() == Some(service.key.name());
    let sidecars = pod.spec.init_containers.iter().filter(|init| init.restart_policy.as_deref() == Some("Always"));
    let containers: Vec<&Container> = pod.spec.containers.iter().chain(sidecars).collect();
    Ok(Backend {
        name: object.key.name().to_owned(),
        uid: object.uid.to_string(),
        ips,
        node: object.node.as_deref().map(str::to_owned),
        hostname: pod.spec.hostname.filter(|hostname| ours && !hostname.is_empty()),
        serving: object.pod.ready,
        terminating: object.deleting.is_some(),
        ports: spec.ports.iter().filter_map(|port| backend_port(port, &containers)).collect(),
    })
}

/// `None` when no container has a port of the wanted name.
fn backend_port(port: &ServicePort, containers: &[&Container]) -> Option<BackendPort> {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    let number = match &port.target_port {
        None | Some(TargetPort::Number(0)) => port.port,
        Some(TargetPort::Number(number)) => *number,
        Some(TargetPort::Name(name)) => {
            let all = containers.iter().flat_map(|container| &container.ports);
            let mut named = all.filter(|candidate| {
                candidate.name == *name && candidate.protocol.as_deref().unwrap_or("TCP") == protocol
            });
            named.next()?.container_port
        }
    };
    Some(BackendPort {
        name: port.name.clone(),
        protocol: protocol.to_owned(),
        port: number,
        app_protocol: port.app_protocol.clone(),
    })
}

/// Asks for the Services that a changed pod is, or was, behind.
pub fn enqueue_services(queue: &Arc<Queue>, services: &Arc<Informer>, pods: &Arc<Informer>) -> Subscription {
    let (queue, services) = (queue.clone(), services.clone());
    pods.subscribe(move |delta| {
        if let (Some(old), Some(new)) = (&delta.old, &delta.new)
            && old.uid == new.uid
            && old.pod == new.pod
            && old.labels == new.labels
            && old.node == new.node
            && old.is_finished() == new.is_finished()
            && old.deleting.is_some() == new.deleting.is_some()
        {
            return;
        }
        let Some(latest) = delta.latest() else { return };
        for service in services.read().namespace(latest.key.namespace()) {
            let Some(selector) = service.selector.as_deref().filter(|selector| !selector.is_empty()) else { continue };
            if delta.states().any(|pod| selector.matches(&pod.labels)) {
                queue.add_after(service.key.clone(), GATHER);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use crate::controllers::resource::{PODS, SERVICES};
    use serde_json::json;

    #[test]
    fn named_ports_are_found_by_name_and_protocol_and_hostnames_belong_to_their_subdomain() {
        let service = json!({"metadata": {"name": "web", "namespace": "n"}, "spec": {"ports": [
            {"name": "http", "port": 80, "targetPort": "web"}, {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "web"},
            {"name": "raw", "port": 9, "targetPort": 7}, {"name": "same", "port": 5}]}});
        let service = parse(&SERVICES, service.to_string().as_bytes(), false).unwrap();
        let spec = ServiceSpec::of(&service).unwrap();
        let pod = json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": {"hostname": "h", "subdomain": "web",
            "containers": [{"ports": [{"name": "web", "containerPort": 8080}]}]},
            "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}});
        let pod = parse(&PODS, pod.to_string().as_bytes(), false).unwrap();
        let backend = backend(&service, &spec, &pod).unwrap();
        let ports: Vec<(&str, i32)> = backend.ports.iter().map(|port| (port.name.as_str(), port.port)).collect();
        assert_eq!(ports, [("http", 8080), ("raw", 7), ("same", 5)]);
        assert_eq!((backend.hostname.as_deref(), backend.ips.len()), (Some("h"), 2));
    }
}
