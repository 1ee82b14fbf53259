//! What the proxy keeps of Services and EndpointSlices, read from their JSON.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::Deserialize;

use super::super::Protocol;

/// `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A Service that has addresses to answer on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// `spec.clusterIPs`.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs` and the addresses of `status.loadBalancer`.
    pub external_ips: Vec<IpAddr>,
    /// The addresses of `status.loadBalancer` alone.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges`: who may use the load balancer's addresses, everybody when empty.
    pub source_ranges: Vec<IpNet>,
    /// `spec.healthCheckNodePort`, with `externalTrafficPolicy: Local`.
    pub health_port: Option<u16>,
    /// `spec.ports`.
    pub ports: Vec<ServicePort>,
    /// Seconds that a client stays with its endpoint, with `sessionAffinity: ClientIP`.
    pub affinity: Option<u32>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
}

/// One port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, empty when the Service has one port only.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port on the Service's addresses.
    pub port: u16,
    /// Port on the node's addresses.
    pub node_port: Option<u16>,
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// The Service that it belongs to.
    pub service: Key,
    /// Ports by name.
    pub ports: Vec<SlicePort>,
    /// Endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// One port of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// Name of the Service's port.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port of the endpoints.
    pub port: u16,
}

/// One endpoint of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub ip: IpAddr,
    /// Takes new connections.
    pub ready: bool,
    /// Could take connections, were it not for its termination.
    pub serving: bool,
    /// Is shutting down.
    pub terminating: bool,
    /// Runs on this node.
    pub local: bool,
    /// `hints.forZones`.
    pub for_zones: Vec<String>,
    /// `hints.forNodes`.
    pub for_nodes: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawService {
    metadata: RawMeta,
    spec: RawSpec,
    status: RawStatus,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawMeta {
    namespace: String,
    labels: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSpec {
    #[serde(rename = "type")]
    kind: String,
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(rename = "externalIPs")]
    external_ips: Option<Vec<String>>,
    ports: Option<Vec<RawServicePort>>,
    session_affinity: String,
    session_affinity_config: RawAffinity,
    internal_traffic_policy: String,
    external_traffic_policy: String,
    load_balancer_source_ranges: Option<Vec<String>>,
    health_check_node_port: u16,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawServicePort {
    name: String,
    protocol: Option<Protocol>,
    port: u16,
    #[serde(rename = "nodePort")]
    node_port: u16,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAffinity {
    #[serde(rename = "clientIP")]
    client_ip: RawClientIp,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RawClientIp {
    timeout_seconds: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawStatus {
    load_balancer: RawLoadBalancer,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawLoadBalancer {
    ingress: Option<Vec<RawIngress>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawIngress {
    ip: String,
    #[serde(rename = "ipMode")]
    mode: Option<String>,
}

/// `DEFAULT_CLIENT_IP_SERVICE_AFFINITY_SECONDS` of upstream.
const AFFINITY_SECONDS: u32 = 10_800;
/// A range that holds no sender.
const NOBODY: IpNet = IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::BROADCAST, 32));
const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

fn ips(texts: Option<Vec<String>>) -> Vec<IpAddr> {
    texts.unwrap_or_default().iter().filter_map(|text| text.parse().ok()).collect()
}

impl Service {
    /// Reads a Service; `None` when it has no addresses that this proxy is to answer on.
    pub fn parse(json: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        let raw: RawService = serde_json::from_slice(json)?;
        let labels = raw.metadata.labels.unwrap_or_default();
        let other_proxy = labels.contains_key(LABEL_PROXY_NAME) || labels.contains_key(LABEL_HEADLESS);
        let mut cluster_ips = ips(raw.spec.cluster_ips);
        if cluster_ips.is_empty() {
            cluster_ips.extend(raw.spec.cluster_ip.parse::<IpAddr>().ok());
        }
        if other_proxy || cluster_ips.is_empty() || raw.spec.kind == "ExternalName" {
            return Ok(None);
        }
        let mut external_ips = ips(raw.spec.external_ips);
        let mut load_balancer_ips: Vec<IpAddr> = Vec::new();
        if raw.spec.kind == "LoadBalancer" {
            let ingress = raw.status.load_balancer.ingress.unwrap_or_default();
            let answered_here = ingress.iter().filter(|ingress| ingress.mode.as_deref() != Some("Proxy"));
            load_balancer_ips.extend(answered_here.filter_map(|ingress| ingress.ip.parse::<IpAddr>().ok()));
        }
        external_ips.extend(&load_balancer_ips);
        external_ips.sort_unstable();
        external_ips.dedup();
        let ports = raw.spec.ports.unwrap_or_default().into_iter().map(|port| ServicePort {
            name: port.name,
            protocol: port.protocol.unwrap_or(Protocol::Tcp),
            port: port.port,
            node_port: (port.node_port != 0).then_some(port.node_port),
        });
        let affinity = (raw.spec.session_affinity == "ClientIP")
            .then(|| raw.spec.session_affinity_config.client_ip.timeout_seconds.unwrap_or(AFFINITY_SECONDS));
        let external_local = raw.spec.external_traffic_policy == "Local";
        // A range that cannot be read admits nobody: the list is not taken to be empty.
        let source_ranges = raw.spec.load_balancer_source_ranges.unwrap_or_default();
        let source_ranges = source_ranges.iter().map(|text| text.trim().parse().unwrap_or(NOBODY)).collect();
        Ok(Some(Self {
            cluster_ips,
            external_ips,
            load_balancer_ips,
            source_ranges,
            health_port: (external_local && raw.spec.health_check_node_port != 0)
                .then_some(raw.spec.health_check_node_port),
            ports: ports.collect(),
            affinity,
            internal_local: raw.spec.internal_traffic_policy == "Local",
            external_local,
        }))
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawSlice {
    metadata: RawMeta,
    address_type: String,
    ports: Option<Vec<RawSlicePort>>,
    endpoints: Option<Vec<RawEndpoint>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawSlicePort {
    name: Option<String>,
    protocol: Option<Protocol>,
    port: Option<u16>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawEndpoint {
    addresses: Vec<String>,
    conditions: Option<RawConditions>,
    node_name: Option<String>,
    hints: Option<RawHints>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct RawHints {
    for_zones: Option<Vec<RawHint>>,
    for_nodes: Option<Vec<RawHint>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawHint {
    name: String,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

impl Slice {
    /// Whether the endpoints are API servers.
    pub fn is_of_the_api(&self) -> bool {
        self.service.namespace == "default" && self.service.name == "kubernetes"
    }

    /// Without the endpoints at these addresses, unless nobody ready would be left.
    #[must_use]
    pub fn without(&self, lost: &BTreeSet<SocketAddr>) -> Self {
        let gone =
            |endpoint: &Endpoint| self.ports.iter().any(|port| lost.contains(&SocketAddr::new(endpoint.ip, port.port)));
        let endpoints: Vec<Endpoint> = self.endpoints.iter().filter(|endpoint| !gone(endpoint)).cloned().collect();
        if endpoints.iter().any(|endpoint| endpoint.ready) { Self { endpoints, ..self.clone() } } else { self.clone() }
    }

    /// Reads an EndpointSlice; `None` when it belongs to no Service or holds no addresses.
    pub fn parse(json: &[u8], node_name: &str) -> Result<Option<Self>, serde_json::Error> {
        let raw: RawSlice = serde_json::from_slice(json)?;
        let service = raw.metadata.labels.unwrap_or_default().remove(LABEL_SERVICE_NAME).unwrap_or_default();
        if service.is_empty() || !matches!(raw.address_type.as_str(), "IPv4" | "IPv6") {
            return Ok(None);
        }
        let ports = raw.ports.unwrap_or_default().into_iter().filter_map(|port| {
            Some(SlicePort {
                name: port.name.unwrap_or_default(),
                protocol: port.protocol.unwrap_or(Protocol::Tcp),
                port: port.port.filter(|port| *port != 0)?,
            })
        });
        let endpoints = raw.endpoints.unwrap_or_default().into_iter().filter_map(|endpoint| {
            let conditions = endpoint.conditions.unwrap_or_default();
            let ready = conditions.ready.unwrap_or(true);
            let hints = endpoint.hints.unwrap_or_default();
            let names = |hints: Option<Vec<RawHint>>| hints.unwrap_or_default().into_iter().map(|hint| hint.name);
            Some(Endpoint {
                // The addresses of one endpoint are fungible; upstream uses the first one.
                ip: endpoint.addresses.first()?.parse().ok()?,
                ready,
                serving: conditions.serving.unwrap_or(ready),
                terminating: conditions.terminating.unwrap_or(false),
                local: endpoint.node_name.as_deref() == Some(node_name),
                for_zones: names(hints.for_zones).collect(),
                for_nodes: names(hints.for_nodes).collect(),
            })
        });
        Ok(Some(Self {
            service: Key { namespace: raw.metadata.namespace, name: service },
            ports: ports.collect(),
            endpoints: endpoints.collect(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_without_addresses_of_ours_are_left_out() {
        for json in [
            r#"{"spec":{"clusterIP":"None","clusterIPs":["None"]}}"#,
            r#"{"spec":{"type":"ExternalName","externalName":"a.b"}}"#,
            r#"{"metadata":{"labels":{"service.kubernetes.io/service-proxy-name":"x"}},"spec":{"clusterIP":"10.43.0.1"}}"#,
        ] {
            assert_eq!(Service::parse(json.as_bytes()).unwrap(), None, "{json}");
        }
    }

    #[test]
    fn conditions_default_as_upstream_says() {
        let json = r#"{"metadata":{"namespace":"n","labels":{"kubernetes.io/service-name":"s"}},"addressType":"IPv4",
            "ports":[{"port":80}],"endpoints":[{"addresses":["10.42.0.2"],"nodeName":"me"},
            {"addresses":["10.42.1.2"],"conditions":{"ready":false,"serving":true,"terminating":true}},
            {"addresses":["10.42.1.3"],"conditions":{"ready":false}}]}"#;
        let slice = Slice::parse(json.as_bytes(), "me").unwrap().unwrap();
        let seen: Vec<_> = slice.endpoints.iter().map(|e| (e.ready, e.serving, e.terminating, e.local)).collect();
        assert_eq!(seen, [(true, true, false, true), (false, true, true, false), (false, false, false, false)]);
    }

    #[test]
    fn lost_servers_are_avoided_while_another_is_left() {
        let json = r#"{"metadata":{"namespace":"default","labels":{"kubernetes.io/service-name":"kubernetes"}},
            "addressType":"IPv4","ports":[{"name":"https","port":6443}],"endpoints":[{"addresses":["10.0.0.1"]},
            {"addresses":["10.0.0.2"]},{"addresses":["10.0.0.3"],"conditions":{"ready":false}}]}"#;
        let slice = Slice::parse(json.as_bytes(), "me").unwrap().unwrap();
        assert!(slice.is_of_the_api());
        let left = |lost: &[&str]| {
            let slice = slice.without(&lost.iter().map(|text| text.parse().unwrap()).collect());
            slice.endpoints.iter().map(|endpoint| endpoint.ip.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(left(&["10.0.0.1:6443"]), ["10.0.0.2", "10.0.0.3"]);
        let all = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
        assert_eq!(left(&["10.0.0.1:7443"]), all, "another port is another server");
        assert_eq!(left(&["10.0.0.1:6443", "10.0.0.2:6443"]), all, "one that is not ready is no way out");
    }
}
