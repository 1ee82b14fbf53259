//! What the cluster's names mean: records of Services, endpoints and pods, as the Kubernetes DNS specification 1.1.0
//! lays them out.
//!
//! The index is changed a Service at a time and read under a short lock; a reader sees a Service as it was before or
//! after a change.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::Deserialize;

/// `namespace/name`.
pub type Key = (String, String);

/// Version of the specification, as `dns-version` tells it.
pub const VERSION: &str = "1.1.0";

/// A Service's part of the index.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Service {
    /// `spec.clusterIPs`; empty for a headless one.
    pub ips: Vec<IpAddr>,
    /// Target of a Service of type `ExternalName`.
    pub external_name: Option<String>,
    /// `spec.ports`.
    pub ports: Vec<Port>,
}

/// A named port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    /// Name, lower case; may be empty.
    pub name: String,
    /// `tcp`, `udp`, `sctp`.
    pub protocol: String,
    /// Number.
    pub port: u16,
}

/// An EndpointSlice's part of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slice {
    /// Name of the Service in the slice's namespace.
    pub service: String,
    /// Ready endpoints: host name and addresses.
    pub endpoints: Vec<(String, Vec<IpAddr>)>,
    /// Ports.
    pub ports: Vec<Port>,
}

/// What a name has for a query type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The name does not exist.
    NoName,
    /// The name exists; nothing of that type may be there.
    Data(Vec<Data>),
    /// The name is another one's alias.
    Alias(String),
}

/// One record's data. Names are without the final dot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Data {
    /// A or AAAA.
    Address(IpAddr),
    /// SRV, and where its target is.
    Server {
        /// Port.
        port: u16,
        /// Share of the traffic.
        weight: u16,
        /// Name.
        target: String,
        /// Addresses of the name.
        addresses: Vec<IpAddr>,
    },
    /// PTR.
    Pointer(String),
    /// TXT.
    Text(String),
    /// NS.
    NameServer(String),
}

/// Types of query that the cluster's names answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A.
    A,
    /// AAAA.
    Aaaa,
    /// SRV.
    Srv,
    /// PTR.
    Ptr,
    /// TXT.
    Txt,
    /// NS.
    Ns,
    /// Any other: names exist for it, and have nothing.
    Other,
}

impl Kind {
    fn wants(self, ip: IpAddr) -> bool {
        matches!((self, ip), (Self::A, IpAddr::V4(_)) | (Self::Aaaa, IpAddr::V6(_)))
    }
}

/// All names of the cluster.
#[derive(Debug, Default)]
pub struct Index {
    /// The cluster's domain, lower case, as labels.
    zone: Vec<String>,
    services: HashMap<Key, Arc<Service>>,
    slices: HashMap<Key, BTreeMap<String, Arc<Slice>>>,
    slice_owner: HashMap<Key, Key>,
    namespaces: HashSet<String>,
    /// Names of addresses.
    reverse: HashMap<IpAddr, BTreeSet<String>>,
    /// Addresses of the responder.
    own: Vec<IpAddr>,
}

impl Index {
    /// An empty cluster of that domain, whose responder has these addresses.
    pub fn new(domain: &str, own: Vec<IpAddr>) -> Self {
        let zone = domain.to_ascii_lowercase().split('.').map(str::to_owned).collect();
        Self { zone, own, ..Self::default() }
    }

    /// The cluster's domain.
    pub fn domain(&self) -> String {
        self.zone.join(".")
    }

    /// All Services.
    pub fn service_keys(&self) -> Vec<Key> {
        self.services.keys().cloned().collect()
    }

    /// All slices.
    pub fn slice_keys(&self) -> Vec<Key> {
        self.slice_owner.keys().cloned().collect()
    }

    /// All namespaces.
    pub fn namespace_keys(&self) -> Vec<String> {
        self.namespaces.iter().cloned().collect()
    }

    /// A Service exists with this content, or not.
    pub fn set_service(&mut self, key: &Key, service: Option<Service>) {
        if self.services.get(key).map(Arc::as_ref) == service.as_ref() {
            return;
        }
        let old = match service {
            Some(service) => self.services.insert(key.clone(), Arc::new(service)),
            None => self.services.remove(key),
        };
        let name = self.service_name(key);
        for ip in old.iter().flat_map(|old| &old.ips) {
            self.forget_name(*ip, &name);
        }
        let ips = self.services.get(key).map(|service| service.ips.clone()).unwrap_or_default();
        for ip in ips {
            self.reverse.entry(ip).or_default().insert(name.clone());
        }
    }

    /// A slice exists with this content, or not.
    pub fn set_slice(&mut self, key: &Key, slice: Option<Slice>) {
        if let Some(owner) = self.slice_owner.remove(key)
            && let Some(slices) = self.slices.get_mut(&owner)
        {
            let old = slices.remove(&key.1);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
            for (host, ips) in old.iter().flat_map(|old| &old.endpoints) {
                let name = self.endpoint_name(&owner, host);
                ips.iter().for_each(|ip| self.forget_name(*ip, &name));
            }
        }
        if let Some(slice) = slice {
            let owner = (key.0.clone(), slice.service.clone());
            for (host, ips) in &slice.endpoints {
                let name = self.endpoint_name(&owner, host);
                for ip in ips {
                    self.reverse.entry(*ip).or_default().insert(name.clone());
                }
            }
            self.slice_owner.insert(key.clone(), owner.clone());
            self.slices.entry(owner).or_default().insert(key.1.clone(), Arc::new(slice));
        }
    }

    /// A namespace exists or not.
    pub fn set_namespace(&mut self, name: &str, exists: bool) {
        if exists {
            self.namespaces.insert(name.to_owned());
        } else {
            self.namespaces.remove(name);
        }
    }

    fn forget_name(&mut self, ip: IpAddr, name: &str) {
        if let Some(names) = self.reverse.get_mut(&ip) {
            names.remove(name);
            if names.is_empty() {
                self.reverse.remove(&ip);
            }
        }
    }

    fn service_name(&self, (namespace, name): &Key) -> String {
        format!("{name}.{namespace}.svc.{}", self.domain())
    }

    fn endpoint_name(&self, key: &Key, host: &str) -> String {
        format!("{host}.{}", self.service_name(key))
    }

    /// Whether the cluster answers for the name (lower-case labels, leftmost first).
    pub fn is_ours(&self, labels: &[String]) -> bool {
        labels.ends_with(&self.zone)
    }

    /// Names of an address; `None` when the cluster does not know it.
    pub fn names_of(&self, ip: IpAddr) -> Option<Vec<String>> {
        self.reverse.get(&ip).map(|names| names.iter().cloned().collect())
    }

    /// Answers for a name below the cluster's domain (lower-case labels, leftmost first).
    pub fn lookup(&self, labels: &[String], kind: Kind) -> Answer {
        let Some(below) = labels.strip_suffix(self.zone.as_slice()) else { return Answer::NoName };
        let below: Vec<&str> = below.iter().map(String::as_str).collect();
        match below.as_slice() {
            [] if kind == Kind::Ns => Answer::Data(vec![Data::NameServer(format!("ns.dns.{}", self.domain()))]),
            [] | ["svc" | "pod" | "dns"] => Answer::Data(Vec::new()),
            ["dns-version"] => Answer::Data(if kind == Kind::Txt { vec![Data::Text(VERSION.into())] } else { vec![] }),
            ["ns", "dns"] => addresses(&self.own, kind),
            [namespace, "svc" | "pod"] => self.namespace(namespace),
            [address, namespace, "pod"] => self.pod(address, namespace, kind),
            [service, namespace, "svc"] => self.service(service, namespace, kind),
            [host, service, namespace, "svc"] => self.endpoint(host, service, namespace, kind),
            [port, protocol, service, namespace, "svc"] => self.port(port, protocol, service, namespace, kind),
            _ => Answer::NoName,
        }
    }

    fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.contains(namespace)
    }

    fn namespace(&self, namespace: &str) -> Answer {
        if self.has_namespace(namespace) { Answer::Data(Vec::new()) } else { Answer::NoName }
    }

    /// `10-42-0-7.default.pod`: the name says the address; no pod is looked up.
    fn pod(&self, name: &str, namespace: &str, kind: Kind) -> Answer {
        match pod_address(name) {
            Some(ip) if self.has_namespace(namespace) => addresses(&[ip], kind),
            _ => Answer::NoName,
        }
    }

    fn find(&self, service: &str, namespace: &str) -> Option<(Key, Arc<Service>)> {
        let key = (namespace.to_owned(), service.to_owned());
        let found = self.services.get(&key)?.clone();
        Some((key, found))
    }

    fn slices_of(&self, key: &Key) -> impl Iterator<Item = &Slice> {
        self.slices.get(key).into_iter().flat_map(BTreeMap::values).map(Arc::as_ref)
    }

    fn service(&self, service: &str, namespace: &str, kind: Kind) -> Answer {
        let Some((key, found)) = self.find(service, namespace) else { return Answer::NoName };
        if let Some(target) = &found.external_name {
            return Answer::Alias(target.clone());
        }
        if kind == Kind::Srv {
            return self.servers(&key, &found, |_| true);
        }
        if !found.ips.is_empty() {
            return addresses(&found.ips, kind);
        }
        let ips: BTreeSet<IpAddr> =
            self.slices_of(&key).flat_map(|slice| &slice.endpoints).flat_map(|(_, ips)| ips).copied().collect();
        // A headless Service without any endpoint has no name, as with CoreDNS.
        if ips.is_empty() { Answer::NoName } else { addresses(&ips.into_iter().collect::<Vec<_>>(), kind) }
    }

    fn endpoint(&self, host: &str, service: &str, namespace: &str, kind: Kind) -> Answer {
        let Some((key, found)) = self.find(service, namespace) else { return Answer::NoName };
        if found.external_name.is_some() {
            return Answer::NoName;
        }
        // `_tcp.web.default.svc` is the empty node above its ports.
        let protocols: BTreeSet<String> = found.ports.iter().map(|port| format!("_{}", port.protocol)).collect();
        if protocols.contains(host) {
            return Answer::Data(Vec::new());
        }
        let slices = self.slices_of(&key);
        let ips: BTreeSet<IpAddr> = slices
            .flat_map(|slice| &slice.endpoints)
            .filter(|(name, _)| name == host)
            .flat_map(|(_, ips)| ips)
            .copied()
            .collect();
        if ips.is_empty() {
            return Answer::NoName;
        }
        if kind == Kind::Srv {
            let target = self.endpoint_name(&key, host);
            let ports = self.slices_of(&key).flat_map(|slice| &slice.ports).collect::<BTreeSet<_>>();
            let servers = ports.into_iter().map(|port| (port.port, target.clone(), ips.iter().copied().collect()));
            return Answer::Data(weighted(servers.collect()));
        }
        addresses(&ips.into_iter().collect::<Vec<_>>(), kind)
    }

    fn port(&self, port: &str, protocol: &str, service: &str, namespace: &str, kind: Kind) -> Answer {
        let (Some(port), Some(protocol)) = (port.strip_prefix('_'), protocol.strip_prefix('_')) else {
            return Answer::NoName;
        };
        let Some((key, found)) = self.find(service, namespace) else { return Answer::NoName };
        if found.external_name.is_some() {
            return Answer::NoName;
        }
        match self.servers(&key, &found, |candidate| candidate.name == port && candidate.protocol == protocol) {
            Answer::Data(data) if data.is_empty() => Answer::NoName,
            Answer::Data(_) if kind != Kind::Srv => Answer::Data(Vec::new()),
            answer => answer,
        }
    }

    /// SRV records: one a port for a Service with an address, one a port and endpoint for a headless one.
    fn servers(&self, key: &Key, service: &Service, wanted: impl Fn(&Port) -> bool) -> Answer {
        if !service.ips.is_empty() {
            let target = self.service_name(key);
            let ports = service.ports.iter().filter(|port| wanted(port));
            let servers = ports.map(|port| (port.port, target.clone(), service.ips.clone()));
            return Answer::Data(weighted(servers.collect()));
        }
        let mut servers = Vec::new();
        for slice in self.slices_of(key) {
            for port in slice.ports.iter().filter(|port| wanted(port)) {
                for (host, ips) in &slice.endpoints {
                    servers.push((port.port, self.endpoint_name(key, host), ips.clone()));
                }
            }
        }
        if servers.is_empty() { Answer::NoName } else { Answer::Data(weighted(servers)) }
    }
}

fn addresses(ips: &[IpAddr], kind: Kind) -> Answer {
    Answer::Data(ips.iter().filter(|ip| kind.wants(**ip)).map(|ip| Data::Address(*ip)).collect())
}

fn weighted(servers: Vec<(u16, String, Vec<IpAddr>)>) -> Vec<Data> {
    let weight = u16::try_from(100 / servers.len().max(1)).unwrap_or(1).max(1);
    let data = servers.into_iter().map(|(port, target, addresses)| Data::Server { port, weight, target, addresses });
    data.collect()
}

/// `10-42-0-7`, `fd00-42--7`.
fn pod_address(name: &str) -> Option<IpAddr> {
    let four = name.replace('-', ".").parse::<Ipv4Addr>().map(IpAddr::from);
    four.or_else(|_| name.replace('-', ":").parse::<Ipv6Addr>().map(IpAddr::from)).ok()
}

/// The host name that an endpoint without one gets.
fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawService {
    spec: RawSpec,
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
    external_name: String,
    ports: Option<Vec<RawPort>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawPort {
    name: Option<String>,
    protocol: Option<String>,
    port: Option<u16>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawSlice {
    metadata: RawMeta,
    ports: Option<Vec<RawPort>>,
    endpoints: Option<Vec<RawEndpoint>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawMeta {
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawEndpoint {
    addresses: Vec<String>,
    hostname: Option<String>,
    conditions: Option<RawConditions>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawConditions {
    ready: Option<bool>,
}

fn ports(raw: Option<Vec<RawPort>>) -> Vec<Port> {
    let port = |raw: RawPort| {
        Some(Port {
            name: raw.name.unwrap_or_default().to_ascii_lowercase(),
            protocol: raw.protocol.unwrap_or_else(|| "TCP".into()).to_ascii_lowercase(),
            port: raw.port?,
        })
    };
    raw.unwrap_or_default().into_iter().filter_map(port).collect()
}

impl Service {
    /// Reads a Service.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let raw: RawService = serde_json::from_slice(json)?;
        let texts = raw.spec.cluster_ips.filter(|ips| !ips.is_empty()).unwrap_or_else(|| vec![raw.spec.cluster_ip]);
        let external = raw.spec.kind == "ExternalName";
        Ok(Self {
            ips: texts.iter().filter_map(|text| text.parse().ok()).collect(),
            external_name: external.then(|| raw.spec.external_name.trim_end_matches('.').to_owned()),
            ports: ports(raw.spec.ports),
        })
    }
}

impl Slice {
    /// Reads an EndpointSlice; `None` when it belongs to no Service.
    pub fn parse(json: &[u8]) -> Result<Option<Self>, serde_json::Error> {
        let raw: RawSlice = serde_json::from_slice(json)?;
        let Some(service) = raw.metadata.labels.unwrap_or_default().remove("kubernetes.io/service-name") else {
            return Ok(None);
        };
        let endpoint = |raw: RawEndpoint| {
            let ready = raw.conditions.and_then(|conditions| conditions.ready).unwrap_or(true);
            let ips: Vec<IpAddr> = raw.addresses.iter().filter_map(|text| text.parse().ok()).collect();
            let host = raw.hostname.filter(|name| !name.is_empty()).map(|name| name.to_ascii_lowercase());
            let host = host.or_else(|| ips.first().map(|ip| dashed(*ip)))?;
            (ready && !ips.is_empty()).then_some((host, ips))
        };
        let endpoints = raw.endpoints.unwrap_or_default().into_iter().filter_map(endpoint).collect();
        Ok(Some(Self { service, endpoints, ports: ports(raw.ports) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("n".to_owned(), name.to_owned())
    }

    fn index() -> Index {
        let mut index = Index::new("cluster.local", vec!["10.43.0.10".parse().unwrap()]);
        index.set_namespace("n", true);
        let web = r#"{"spec":{"clusterIP":"10.43.0.5","ports":[{"name":"http","port":80,"protocol":"TCP"}]}}"#;
        index.set_service(&key("web"), Some(Service::parse(web.as_bytes()).unwrap()));
        let db = r#"{"spec":{"clusterIP":"None","clusterIPs":["None"],"ports":[{"name":"sql","port":5432}]}}"#;
        index.set_service(&key("db"), Some(Service::parse(db.as_bytes()).unwrap()));
        let out = r#"{"spec":{"type":"ExternalName","externalName":"example.org."}}"#;
        index.set_service(&key("out"), Some(Service::parse(out.as_bytes()).unwrap()));
        let slice = r#"{"metadata":{"labels":{"kubernetes.io/service-name":"db"}},"ports":[{"name":"sql","port":5432}],
            "endpoints":[{"addresses":["10.42.0.7"],"hostname":"db-0"},{"addresses":["10.42.0.8"]},
            {"addresses":["10.42.0.9"],"conditions":{"ready":false}}]}"#;
        index.set_slice(&key("db-x"), Slice::parse(slice.as_bytes()).unwrap());
        index
    }

    fn ask(index: &Index, name: &str, kind: Kind) -> Answer {
        let labels: Vec<String> = name.split('.').map(str::to_owned).collect();
        index.lookup(&labels, kind)
    }

    fn ips(texts: &[&str]) -> Answer {
        Answer::Data(texts.iter().map(|text| Data::Address(text.parse().unwrap())).collect())
    }

    #[test]
    fn names_that_exist_have_no_data_of_other_types_and_others_do_not_exist() {
        let index = index();
        for (name, kind, expected) in [
            ("web.n.svc.cluster.local", Kind::A, ips(&["10.43.0.5"])),
            ("web.n.svc.cluster.local", Kind::Aaaa, ips(&[])),
            ("web.n.svc.cluster.local", Kind::Other, ips(&[])),
            ("absent.n.svc.cluster.local", Kind::A, Answer::NoName),
            ("web.other.svc.cluster.local", Kind::A, Answer::NoName),
            ("n.svc.cluster.local", Kind::A, ips(&[])),
            ("other.svc.cluster.local", Kind::A, Answer::NoName),
            ("cluster.local", Kind::A, ips(&[])),
            ("db.n.svc.cluster.local", Kind::A, ips(&["10.42.0.7", "10.42.0.8"])),
            ("db-0.db.n.svc.cluster.local", Kind::A, ips(&["10.42.0.7"])),
            ("10-42-0-8.db.n.svc.cluster.local", Kind::A, ips(&["10.42.0.8"])),
            ("10-42-0-9.db.n.svc.cluster.local", Kind::A, Answer::NoName),
            ("10-42-0-99.n.pod.cluster.local", Kind::A, ips(&["10.42.0.99"])),
            ("10-42-0-99.other.pod.cluster.local", Kind::A, Answer::NoName),
            ("x.n.pod.cluster.local", Kind::A, Answer::NoName),
            ("out.n.svc.cluster.local", Kind::A, Answer::Alias("example.org".into())),
            ("dns-version.cluster.local", Kind::Txt, Answer::Data(vec![Data::Text("1.1.0".into())])),
            ("_http._tcp.web.n.svc.cluster.local", Kind::A, ips(&[])),
            ("_http._udp.web.n.svc.cluster.local", Kind::Srv, Answer::NoName),
            ("a.b.c.d.e.f.svc.cluster.local", Kind::A, Answer::NoName),
        ] {
            assert_eq!(ask(&index, name, kind), expected, "{name} {kind:?}");
        }
    }

    #[test]
    fn servers_point_to_the_service_or_to_each_endpoint() {
        let index = index();
        let web = Data::Server {
            port: 80,
            weight: 100,
            target: "web.n.svc.cluster.local".into(),
            addresses: vec!["10.43.0.5".parse().unwrap()],
        };
        assert_eq!(ask(&index, "_http._tcp.web.n.svc.cluster.local", Kind::Srv), Answer::Data(vec![web]));
        let Answer::Data(servers) = ask(&index, "_sql._tcp.db.n.svc.cluster.local", Kind::Srv) else { panic!() };
        let targets: Vec<_> = servers
            .iter()
            .map(|data| match data {
                Data::Server { target, weight, .. } => (target.as_str(), *weight),
                _ => panic!(),
            })
            .collect();
        assert_eq!(targets, [("db-0.db.n.svc.cluster.local", 50), ("10-42-0-8.db.n.svc.cluster.local", 50)]);
    }

    #[test]
    fn addresses_have_names_as_long_as_their_owners_exist() {
        let mut index = index();
        let names = |index: &Index, ip: &str| index.names_of(ip.parse().unwrap());
        assert_eq!(names(&index, "10.43.0.5"), Some(vec!["web.n.svc.cluster.local".to_owned()]));
        assert_eq!(names(&index, "10.42.0.7"), Some(vec!["db-0.db.n.svc.cluster.local".to_owned()]));
        index.set_slice(&key("db-x"), None);
        index.set_service(&key("web"), None);
        assert_eq!(names(&index, "10.43.0.5"), None);
        assert_eq!(names(&index, "10.42.0.7"), None);
        assert_eq!(ask(&index, "db.n.svc.cluster.local", Kind::A), Answer::NoName);
    }
}
