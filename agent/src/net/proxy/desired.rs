//! What one Service wants in the kernel. Pure: models in, elements and chains out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sha2::{Digest, Sha256};

use super::super::Protocol;
use super::super::netlink::route::octets;
use super::super::nft::expr::{Address, Expr};
use super::super::nft::{ElementData, Family};
use super::model::{Endpoint, Key, Service, ServicePort, Slice};
use super::tables::{Balancer, Map, address_registers, mark_for_masquerade, within};

/// Where an element lives, and its key in register layout.
pub type ElementKey = (Family, Map, Vec<u8>);

/// Everything that one Service puts into the tables.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Contribution {
    /// Elements of the fixed maps.
    pub elements: BTreeMap<ElementKey, ElementData>,
    /// Shared chains that the elements go to.
    pub balancers: BTreeSet<(Family, Balancer, u32)>,
    /// Chains of its own (session affinity).
    pub chains: BTreeMap<(Family, String), Vec<Vec<Expr>>>,
    /// Dynamic sets of its own, with their seconds.
    pub sets: BTreeMap<(Family, String), u32>,
}

/// A transport address that can be claimed by one Service only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// The address, or the family of the node's addresses for a node port.
    pub at: At,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
}

/// See [`Frontend`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum At {
    /// An address of `spec.clusterIPs`.
    Cluster(IpAddr),
    /// An external address.
    External(IpAddr),
    /// All addresses of the node.
    Node(Family),
}

impl Frontend {
    fn family(&self) -> Family {
        match self.at {
            At::Cluster(ip) | At::External(ip) => Family::of(ip),
            At::Node(family) => family,
        }
    }

    /// The part of a map's key that names the frontend.
    fn key(&self) -> Vec<u8> {
        match self.at {
            At::Cluster(ip) | At::External(ip) => address_key(ip, self.protocol, self.port),
            At::Node(_) => port_key(self.protocol, self.port),
        }
    }
}

/// Number of a transport protocol.
pub fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP as u8,
        Protocol::Udp => libc::IPPROTO_UDP as u8,
        Protocol::Sctp => libc::IPPROTO_SCTP as u8,
    }
}

/// protocol . port in register layout.
pub fn port_key(protocol: Protocol, port: u16) -> Vec<u8> {
    let [high, low] = port.to_be_bytes();
    vec![protocol_number(protocol), 0, 0, 0, high, low, 0, 0]
}

/// address . protocol . port in register layout.
pub fn address_key(ip: IpAddr, protocol: Protocol, port: u16) -> Vec<u8> {
    let mut key = octets(ip);
    key.extend(port_key(protocol, port));
    key
}

/// address . port in register layout.
pub fn target(ip: IpAddr, port: u16) -> Vec<u8> {
    let mut value = octets(ip);
    let [high, low] = port.to_be_bytes();
    value.extend([high, low, 0, 0]);
    value
}

/// Every frontend that a Service asks for, `families` being those that have tables.
pub fn frontends(service: &Service, families: &[Family]) -> Vec<Frontend> {
    let mut found = Vec::new();
    for port in &service.ports {
        let mut add = |at, number| {
            let frontend = Frontend { at, protocol: port.protocol, port: number };
            if families.contains(&frontend.family()) {
                found.push(frontend);
            }
        };
        service.cluster_ips.iter().for_each(|ip| add(At::Cluster(*ip), port.port));
        service.external_ips.iter().for_each(|ip| add(At::External(*ip), port.port));
        if let Some(node_port) = port.node_port {
            // Node ports answer in the families that the Service has.
            let own: BTreeSet<Family> = service.cluster_ips.iter().map(|ip| Family::of(*ip)).collect();
            own.into_iter().for_each(|family| add(At::Node(family), node_port));
        }
    }
    found
}

/// Which endpoints traffic may go to.
#[derive(Debug, Clone, Copy)]
pub enum Reach<'a> {
    /// Those on this node.
    Node,
    /// All, or those that hints give to this node or its zone.
    Cluster(&'a NodeFacts),
}

/// The endpoints that a port's traffic goes to: ready ones, or, when there is none, those that still serve while they
/// terminate (KEP-1669).
pub fn usable(endpoints: &[(Endpoint, u16)], reach: Reach<'_>) -> Vec<(IpAddr, u16)> {
    let hinted = match reach {
        Reach::Node => Hinted::Nobody,
        Reach::Cluster(node) => hints(endpoints, node),
    };
    let pick = |wanted: &dyn Fn(&Endpoint) -> bool| {
        let found: BTreeSet<(IpAddr, u16)> = endpoints
            .iter()
            .filter(|(endpoint, _)| wanted(endpoint) && (endpoint.local || matches!(reach, Reach::Cluster(_))))
            .map(|(endpoint, port)| (endpoint.ip, *port))
            .collect();
        found.into_iter().collect::<Vec<_>>()
    };
    let ready = pick(&|endpoint| endpoint.ready && hinted.gives(endpoint));
    if ready.is_empty() { pick(&|endpoint| endpoint.serving && endpoint.terminating) } else { ready }
}

/// Whom the hints of all ready endpoints together are followed for.
#[derive(Debug, Clone, Copy)]
enum Hinted<'a> {
    Nobody,
    Node(&'a str),
    Zone(&'a str),
}

impl Hinted<'_> {
    fn gives(self, endpoint: &Endpoint) -> bool {
        match self {
            Self::Nobody => true,
            Self::Node(name) => endpoint.for_nodes.iter().any(|hint| hint == name),
            Self::Zone(zone) => endpoint.for_zones.iter().any(|hint| hint == zone),
        }
    }
}

/// Hints are followed when every ready endpoint has one and one of them is for us (KEP-2433, KEP-3015).
fn hints<'a>(endpoints: &[(Endpoint, u16)], node: &'a NodeFacts) -> Hinted<'a> {
    let ready = || endpoints.iter().map(|(endpoint, _)| endpoint).filter(|endpoint| endpoint.ready);
    let holds = |hinted: Hinted<'_>, hints: fn(&Endpoint) -> &[String]| {
        ready().all(|endpoint| !hints(endpoint).is_empty()) && ready().any(|endpoint| hinted.gives(endpoint))
    };
    if holds(Hinted::Node(&node.name), |endpoint| &endpoint.for_nodes) {
        return Hinted::Node(&node.name);
    }
    match &node.zone {
        Some(zone) if holds(Hinted::Zone(zone), |endpoint| &endpoint.for_zones) => Hinted::Zone(zone),
        _ => Hinted::Nobody,
    }
}

/// Endpoints of one port in one family, with their port numbers.
pub fn endpoints_of<'a>(
    port: &ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a Slice>,
) -> Vec<(Endpoint, u16)> {
    let mut found = Vec::new();
    for slice in slices {
        let numbers = slice.ports.iter().filter(|other| other.name == port.name && other.protocol == port.protocol);
        for number in numbers {
            let own = slice.endpoints.iter().filter(|endpoint| Family::of(endpoint.ip) == family);
            found.extend(own.map(|endpoint| (endpoint.clone(), number.port)));
        }
    }
    found
}

/// What depends on the node only.
#[derive(Debug, Clone, Default)]
pub struct NodeFacts {
    /// Families that have tables.
    pub families: Vec<Family>,
    /// Addresses whose frontends a local socket answers.
    pub cluster_dns: Vec<IpAddr>,
    /// The node's name, for hints.
    pub name: String,
    /// The node's zone, for hints.
    pub zone: Option<String>,
}

/// What `service` wants in the kernel, given its slices, for the frontends that it has been granted.
pub fn contribution<'a>(
    key: &Key,
    service: &Service,
    slices: impl Iterator<Item = &'a Slice> + Clone,
    node: &NodeFacts,
    granted: impl Fn(&Frontend) -> bool,
) -> Contribution {
    let mut out = Contribution::default();
    for family in &node.families {
        for port in &service.ports {
            let all = endpoints_of(port, *family, slices.clone());
            let cluster = usable(&all, Reach::Cluster(node));
            let local = usable(&all, Reach::Node);
            let mut builder = Builder { key, service, port, family: *family, out: &mut out };
            let own = Service { ports: vec![port.clone()], ..service.clone() };
            for frontend in frontends(&own, &[*family]).into_iter().filter(|frontend| granted(frontend)) {
                let (balancer, local_balancer) = match frontend.at {
                    At::Cluster(ip) => {
                        if !node.cluster_dns.contains(&ip) {
                            let chosen = if service.internal_local { &local } else { &cluster };
                            if chosen.is_empty() && !cluster.is_empty() {
                                builder.silence(&frontend);
                            } else {
                                builder.frontend(&frontend, Balancer::Cluster, chosen);
                            }
                        }
                        continue;
                    }
                    At::External(ip) => {
                        if service.load_balancer_ips.contains(&ip) && !service.source_ranges.is_empty() {
                            builder.firewall(&frontend);
                        }
                        (Balancer::External, Balancer::LocalExternal)
                    }
                    At::Node(_) => (Balancer::NodePort, Balancer::LocalNodePort),
                };
                builder.frontend(&frontend, balancer, &cluster);
                if service.external_local && !cluster.is_empty() {
                    builder.frontend(&frontend, local_balancer, &local);
                }
            }
        }
    }
    out
}

struct Builder<'a> {
    key: &'a Key,
    service: &'a Service,
    port: &'a ServicePort,
    family: Family,
    out: &'a mut Contribution,
}

impl Builder<'_> {
    fn frontend(&mut self, frontend: &Frontend, balancer: Balancer, endpoints: &[(IpAddr, u16)]) {
        let map = balancer.frontends();
        let key = frontend.key();
        let count = u32::try_from(endpoints.len()).unwrap_or(u32::MAX);
        if count == 0 {
            self.nobody(frontend, balancer, key);
            return;
        }
        if let Some(seconds) = self.service.affinity {
            let chain = self.affinity(balancer, endpoints, seconds);
            self.out.elements.insert((self.family, map, key), ElementData::Goto(chain));
            return;
        }
        self.out.balancers.insert((self.family, balancer, count));
        for (index, (ip, port)) in (0_u32..).zip(endpoints) {
            let indexed = [&key[..], &index.to_ne_bytes()].concat();
            let value = ElementData::Value(target(*ip, *port));
            self.out.elements.insert((self.family, balancer.endpoints(), indexed), value);
        }
        self.out.elements.insert((self.family, map, key), ElementData::Goto(balancer.chain(count)));
    }

    /// `loadBalancerSourceRanges`.
    fn firewall(&mut self, frontend: &Frontend) {
        let chain = format!("firewall-{}", self.hash(""));
        let own = self.service.source_ranges.iter().filter(|range| Family::of(range.addr()) == self.family);
        let mut rules: Vec<Vec<Expr>> =
            own.map(|range| [within(Address::Source, *range, true), vec![Expr::Accept]].concat()).collect();
        rules.push(vec![Expr::Drop]);
        self.out.chains.insert((self.family, chain.clone()), rules);
        self.out.elements.insert((self.family, Map::Firewall, frontend.key()), ElementData::Goto(chain));
    }

    /// Names chains and sets of the Service's port.
    fn hash(&self, more: &str) -> String {
        let text = format!("{}:{}:{:?}{more}", self.key, self.port.name, self.port.protocol);
        let digest = Sha256::digest(text);
        digest[..6].iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// With `internalTrafficPolicy: Local` and endpoints on other nodes only: dropped, not refused.
    fn silence(&mut self, frontend: &Frontend) {
        self.out.elements.insert((self.family, Map::Services, frontend.key()), ElementData::Drop);
    }

    /// A frontend without endpoints. What is in the service range is refused by a fixed rule.
    fn nobody(&mut self, frontend: &Frontend, balancer: Balancer, key: Vec<u8>) {
        let (map, data) = match (frontend.at, balancer) {
            // Endpoints exist on other nodes: silence makes a load balancer look elsewhere.
            (_, Balancer::LocalExternal | Balancer::LocalNodePort) => (balancer.frontends(), ElementData::Drop),
            (At::Cluster(_), _) => return,
            (At::External(_), _) => (Map::NoEndpoints, ElementData::None),
            (At::Node(_), _) => (Map::NoEndpointNodePorts, ElementData::None),
        };
        self.out.elements.insert((self.family, map, key), data);
    }

    /// Chains and sets that keep a client with its endpoint; returns the chain to go to.
    fn affinity(&mut self, balancer: Balancer, endpoints: &[(IpAddr, u16)], seconds: u32) -> String {
        let scope = match balancer {
            Balancer::Cluster | Balancer::External | Balancer::NodePort => {
                if balancer == Balancer::Cluster && self.service.internal_local { "local" } else { "cluster" }
            }
            Balancer::LocalExternal | Balancer::LocalNodePort => "local",
        };
        let of_service = self.hash(&format!(":{scope}"));
        let of_endpoint = |(ip, port): &(IpAddr, u16)| self.hash(&format!(":{scope}:{ip}:{port}"));
        let ids: Vec<String> = endpoints.iter().map(of_endpoint).collect();
        let service_chain = format!("affinity-{of_service}");
        let mut rules = Vec::new();
        for (endpoint, id) in endpoints.iter().zip(&ids) {
            let (chain, set) = (format!("endpoint-{id}"), format!("clients-{id}"));
            let client = Expr::Address(Address::Source, 0);
            rules.push(vec![client.clone(), Expr::InSet(0, set.clone()), Expr::Goto(chain.clone())]);
            let port = address_registers(self.family);
            let steps = vec![
                vec![client, Expr::Update(0, set.clone())],
                vec![
                    Expr::Immediate(0, octets(endpoint.0)),
                    Expr::Immediate(port, endpoint.1.to_be_bytes().to_vec()),
                    Expr::Dnat(0, port),
                ],
            ];
            self.out.sets.insert((self.family, set), seconds);
            self.out.chains.insert((self.family, chain), steps);
        }
        // A new client: the first endpoint with chance 1/n, the next with 1/(n-1), …
        for (left, id) in (1..=ids.len()).rev().zip(&ids) {
            let goto = Expr::Goto(format!("endpoint-{id}"));
            let rule = if left == 1 {
                vec![goto]
            } else {
                vec![Expr::Random(left as u32, 0), Expr::Equal(0, 0_u32.to_ne_bytes().to_vec()), goto]
            };
            rules.push(rule);
        }
        self.out.chains.insert((self.family, service_chain.clone()), rules);
        if !balancer.masquerades() {
            return service_chain;
        }
        let external = format!("affinity-external-{of_service}");
        let steps = vec![mark_for_masquerade(), vec![Expr::Goto(service_chain)]];
        self.out.chains.insert((self.family, external.clone()), steps);
        external
    }
}
