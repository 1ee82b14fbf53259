//! The fixed part of the proxy's tables: maps, base chains and rules. Made once, before any element.
//!
//! One table per family, named after the instance. A packet's way: `prerouting` or `output` jumps to `services`, where
//! the verdict map `services` (address . protocol . port) sends it to a chain shared by all frontends with as many
//! endpoints (`lb-3`), whose one rule picks an endpoint from the map `endpoints` (… . index) by a random index.

use std::net::IpAddr;

use ipnet::IpNet;

use super::super::names::{LINK_PREFIX, POD_GATEWAY_V4, POD_GATEWAY_V6};
use super::super::nft::expr::{Address, Expr, Register, STATE_INVALID, STATE_NEW};
use super::super::nft::{Family, Hook, KeyType, SetData, SetSpec, Transaction};

/// The bit that marks packets whose source must become the node's, kube-proxy's own choice.
pub const MASQUERADE_MARK: u32 = 0x4000;

/// The fixed maps and sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Map {
    /// Frontends with an address of their own.
    Services,
    /// Their endpoints.
    Endpoints,
    /// Frontends on the node's addresses.
    NodePorts,
    /// Their endpoints.
    NodePortEndpoints,
    /// As `Services`, for clients outside of the cluster and with `externalTrafficPolicy: Local`.
    LocalServices,
    /// Their endpoints.
    LocalEndpoints,
    /// As `NodePorts`, for clients outside of the cluster and with `externalTrafficPolicy: Local`.
    LocalNodePorts,
    /// Their endpoints.
    LocalNodePortEndpoints,
    /// `hostPort` on all addresses of the node.
    HostPorts,
    /// `hostPort` on one address.
    HostPortsByAddress,
    /// Pods of this node, paired with themselves: a pod that reaches itself through a Service.
    Hairpin,
    /// Frontends with an address outside of the service range and no endpoint.
    NoEndpoints,
    /// Node ports without endpoint.
    NoEndpointNodePorts,
    /// Load balancers' addresses that not everybody may use.
    Firewall,
}

use KeyType::{Address as Addr, Mark, Port, Protocol as Proto};

impl Map {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Services,
        Self::Endpoints,
        Self::NodePorts,
        Self::NodePortEndpoints,
        Self::LocalServices,
        Self::LocalEndpoints,
        Self::LocalNodePorts,
        Self::LocalNodePortEndpoints,
        Self::HostPorts,
        Self::HostPortsByAddress,
        Self::Hairpin,
        Self::NoEndpoints,
        Self::NoEndpointNodePorts,
        Self::Firewall,
    ];

    /// Its name in the kernel.
    pub fn name(self) -> &'static str {
        match self {
            Self::Services => "services",
            Self::Endpoints => "endpoints",
            Self::NodePorts => "nodeports",
            Self::NodePortEndpoints => "nodeport-endpoints",
            Self::LocalServices => "local-services",
            Self::LocalEndpoints => "local-endpoints",
            Self::LocalNodePorts => "local-nodeports",
            Self::LocalNodePortEndpoints => "local-nodeport-endpoints",
            Self::HostPorts => "hostports",
            Self::HostPortsByAddress => "hostports-by-address",
            Self::Hairpin => "hairpin",
            Self::NoEndpoints => "no-endpoints",
            Self::NoEndpointNodePorts => "no-endpoint-nodeports",
            Self::Firewall => "firewall",
        }
    }

    /// Its declaration.
    pub(super) fn spec(self) -> SetSpec {
        let key: &[KeyType] = match self {
            Self::Services | Self::LocalServices | Self::NoEndpoints | Self::HostPortsByAddress | Self::Firewall => {
                &[Addr, Proto, Port]
            }
            Self::Endpoints | Self::LocalEndpoints => &[Addr, Proto, Port, Mark],
            Self::NodePorts | Self::LocalNodePorts | Self::NoEndpointNodePorts | Self::HostPorts => &[Proto, Port],
            Self::NodePortEndpoints | Self::LocalNodePortEndpoints => &[Proto, Port, Mark],
            Self::Hairpin => &[Addr, Addr],
        };
        let data = match self {
            Self::Services | Self::LocalServices | Self::NodePorts | Self::LocalNodePorts | Self::Firewall => {
                SetData::Verdict
            }
            Self::NoEndpoints | Self::NoEndpointNodePorts | Self::Hairpin => SetData::None,
            _ => SetData::Value(&[Addr, Port]),
        };
        SetSpec { key, data }
    }
}

/// The chains shared by frontends with the same number of endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Balancer {
    /// Cluster addresses.
    Cluster,
    /// External addresses: marks for masquerade.
    External,
    /// Node ports: marks for masquerade.
    NodePort,
    /// External addresses, endpoints of this node: keeps the client's address.
    LocalExternal,
    /// Node ports, endpoints of this node: keeps the client's address.
    LocalNodePort,
}

impl Balancer {
    /// Name of the chain for `count` endpoints.
    pub fn chain(self, count: u32) -> String {
        let prefix = match self {
            Self::Cluster => "lb",
            Self::External => "lb-external",
            Self::NodePort => "lb-nodeport",
            Self::LocalExternal => "lb-local",
            Self::LocalNodePort => "lb-local-nodeport",
        };
        format!("{prefix}-{count}")
    }

    /// The map of frontends.
    pub fn frontends(self) -> Map {
        match self {
            Self::Cluster | Self::External => Map::Services,
            Self::NodePort => Map::NodePorts,
            Self::LocalExternal => Map::LocalServices,
            Self::LocalNodePort => Map::LocalNodePorts,
        }
    }

    /// The map of endpoints.
    pub fn endpoints(self) -> Map {
        match self {
            Self::Cluster | Self::External => Map::Endpoints,
            Self::NodePort => Map::NodePortEndpoints,
            Self::LocalExternal => Map::LocalEndpoints,
            Self::LocalNodePort => Map::LocalNodePortEndpoints,
        }
    }

    /// Whether the source of what it forwards off the node must become the node's.
    pub fn masquerades(self) -> bool {
        matches!(self, Self::External | Self::NodePort)
    }

    /// Rules of the chain for `count` endpoints.
    pub fn rules(self, family: Family, count: u32) -> Vec<Vec<Expr>> {
        let mut rules = Vec::new();
        if self.masquerades() {
            rules.push(mark_for_masquerade());
        }
        let by_address = matches!(self, Self::Cluster | Self::External | Self::LocalExternal);
        let (mut rule, index) = if by_address { address_key(family) } else { port_key() };
        rule.push(Expr::Random(count, index));
        rule.push(Expr::Map(0, self.endpoints().name().to_owned(), 0));
        rule.push(Expr::Dnat(0, address_registers(family)));
        rules.push(rule);
        rules
    }
}

/// `meta mark set meta mark | 0x4000`.
pub fn mark_for_masquerade() -> Vec<Expr> {
    let keep = (!MASQUERADE_MARK).to_ne_bytes().to_vec();
    vec![Expr::Mark(0), Expr::Bitwise(0, keep, MASQUERADE_MARK.to_ne_bytes().to_vec()), Expr::SetMark(0)]
}

/// Registers that an address takes.
pub fn address_registers(family: Family) -> Register {
    (family.address_len() / 4) as Register
}

/// Loads destination address . protocol . port; also returns the next register.
fn address_key(family: Family) -> (Vec<Expr>, Register) {
    let next = address_registers(family);
    let loads = vec![Expr::Address(Address::Destination, 0), Expr::L4Proto(next), Expr::DestinationPort(next + 1)];
    (loads, next + 2)
}

/// Loads protocol . port; also returns the next register.
fn port_key() -> (Vec<Expr>, Register) {
    (vec![Expr::L4Proto(0), Expr::DestinationPort(1)], 2)
}

/// What the fixed rules depend on, for one family.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The family.
    pub family: Family,
    /// Where all pods live.
    pub cluster_cidr: Option<IpNet>,
    /// Where Services get their addresses.
    pub service_cidr: Option<IpNet>,
    /// The address of the DNS responder, answered by a local socket.
    pub cluster_dns: Option<IpAddr>,
    /// The node's address.
    pub node_ip: Option<IpAddr>,
}

impl Settings {
    /// What a pod sees as source where its own address, or a loopback address, would be useless.
    fn stand_in(&self) -> Vec<u8> {
        let gateway = match self.family {
            Family::Ip => POD_GATEWAY_V4,
            Family::Ip6 => POD_GATEWAY_V6,
        };
        super::super::netlink::route::octets(self.node_ip.filter(|ip| !ip.is_loopback()).unwrap_or(gateway))
    }

    /// Adds maps, base chains and their rules.
    pub fn write(&self, transaction: &mut Transaction) {
        let family = self.family;
        for map in Map::ALL {
            transaction.add_set(family, map.name(), &map.spec());
        }
        for (name, kind, number, priority) in [
            ("guard", "filter", NF_PREROUTING, -300),
            ("firewall-check", "filter", NF_PREROUTING, -110),
            ("prerouting", "nat", NF_PREROUTING, -100),
            ("output", "nat", NF_OUTPUT, -100),
            ("postrouting", "nat", NF_POSTROUTING, 100),
            ("clamp", "filter", NF_FORWARD, -150),
            ("forward-filter", "filter", NF_FORWARD, 0),
            ("input-filter", "filter", NF_INPUT, 0),
            ("output-filter", "filter", NF_OUTPUT, 0),
        ] {
            transaction.add_chain(family, name, Some(Hook { kind, number, priority }));
        }
        for name in ["services", "local-policy", REFUSE] {
            transaction.add_chain(family, name, None);
        }
        for (chain, rules) in self.rules() {
            for rule in rules {
                transaction.add_rule(family, chain, &rule);
            }
        }
    }

    /// The fixed rules by chain.
    fn rules(&self) -> Vec<(&'static str, Vec<Vec<Expr>>)> {
        vec![
            ("guard", self.guard()),
            ("firewall-check", self.firewall()),
            ("prerouting", self.prerouting()),
            ("local-policy", self.local_policy()),
            ("output", vec![vec![Expr::Jump("services".into())]]),
            ("services", self.services()),
            ("postrouting", self.postrouting()),
            ("clamp", self.clamp()),
            (REFUSE, refuse()),
            ("forward-filter", self.forward_filter()),
            ("input-filter", self.input_filter()),
            ("output-filter", self.output_filter()),
        ]
    }

    /// Pod links accept loopback destinations (for node ports on 127.0.0.1), but no pod may send there.
    fn guard(&self) -> Vec<Vec<Expr>> {
        if self.family == Family::Ip6 {
            return Vec::new();
        }
        let mut rule = from_pod(true);
        rule.extend(within(Address::Destination, LOOPBACK, true));
        rule.push(Expr::Drop);
        vec![rule]
    }

    /// Before the destination is rewritten: `loadBalancerSourceRanges`.
    fn firewall(&self) -> Vec<Vec<Expr>> {
        let mut rule = state(STATE_NEW);
        rule.extend(address_key(self.family).0);
        rule.push(Expr::VerdictMap(0, Map::Firewall.name().into()));
        vec![rule]
    }

    /// Clients outside of the cluster meet `externalTrafficPolicy: Local` first.
    fn prerouting(&self) -> Vec<Vec<Expr>> {
        let mut outside = from_pod(false);
        if let Some(cidr) = self.cluster_cidr {
            outside.extend(within(Address::Source, cidr, false));
        }
        outside.push(Expr::Jump("local-policy".into()));
        vec![outside, vec![Expr::Jump("services".into())]]
    }

    fn local_policy(&self) -> Vec<Vec<Expr>> {
        let (mut by_address, _) = address_key(self.family);
        by_address.push(Expr::VerdictMap(0, Map::LocalServices.name().into()));
        let mut by_port = self.to_node();
        by_port.extend(port_key().0);
        by_port.push(Expr::VerdictMap(0, Map::LocalNodePorts.name().into()));
        vec![by_address, by_port]
    }

    fn services(&self) -> Vec<Vec<Expr>> {
        let (mut frontends, _) = address_key(self.family);
        frontends.push(Expr::VerdictMap(0, Map::Services.name().into()));
        let mut node_ports = self.to_node();
        node_ports.extend(port_key().0);
        node_ports.push(Expr::VerdictMap(0, Map::NodePorts.name().into()));
        let rewrite = |map: Map| [Expr::Map(0, map.name().into(), 0), Expr::Dnat(0, address_registers(self.family))];
        let (mut host_address, _) = address_key(self.family);
        host_address.extend(rewrite(Map::HostPortsByAddress));
        let mut host_port = self.to_node();
        host_port.extend(port_key().0);
        host_port.extend(rewrite(Map::HostPorts));
        vec![frontends, node_ports, host_address, host_port]
    }

    /// The packet is for an address of this node that is not the DNS responder's.
    fn to_node(&self) -> Vec<Expr> {
        let mut exprs = vec![Expr::DestinationIsLocal];
        if let Some(dns) = self.cluster_dns {
            exprs.push(Expr::Address(Address::Destination, 0));
            exprs.push(Expr::NotEqual(0, super::super::netlink::route::octets(dns)));
        }
        exprs
    }

    fn postrouting(&self) -> Vec<Vec<Expr>> {
        let family = self.family;
        let stand_in = || [Expr::Immediate(0, self.stand_in()), Expr::Snat(0)];
        let mut hairpin = vec![
            Expr::Address(Address::Source, 0),
            Expr::Address(Address::Destination, address_registers(family)),
            Expr::InSet(0, Map::Hairpin.name().into()),
        ];
        hairpin.extend(stand_in());
        let mut rules = vec![hairpin];
        if family == Family::Ip {
            let mut loopback = to_pod(true);
            loopback.extend(within(Address::Source, LOOPBACK, true));
            loopback.extend(stand_in());
            rules.push(loopback);
        }
        rules.push([to_pod(true), vec![Expr::Return]].concat());
        rules.push(vec![Expr::OutName(0), Expr::Equal(0, b"lo\0".to_vec()), Expr::Return]);
        if let Some(cidr) = self.cluster_cidr {
            let mut inside = within(Address::Source, cidr, true);
            inside.extend(within(Address::Destination, cidr, true));
            inside.push(Expr::Return);
            rules.push(inside);
            // Pods of other nodes answer to an address that leads back the way that the packet came.
            let mut entering = within(Address::Source, cidr, false);
            entering.extend(within(Address::Destination, cidr, true));
            entering.push(Expr::Masquerade);
            rules.push(entering);
            let multicast = if family == Family::Ip { MULTICAST_V4 } else { MULTICAST_V6 };
            let mut many = within(Address::Destination, multicast, true);
            many.push(Expr::Return);
            rules.push(many);
            let mut leaving = within(Address::Source, cidr, true);
            leaving.push(Expr::Masquerade);
            rules.push(leaving);
        }
        let bit = MASQUERADE_MARK.to_ne_bytes().to_vec();
        rules.push(vec![
            Expr::Mark(0),
            Expr::Bitwise(0, bit.clone(), vec![0; 4]),
            Expr::Equal(0, bit),
            Expr::Masquerade,
        ]);
        rules
    }

    /// Without it, and with ICMP filtered on the way, connections that leave by a smaller link hang.
    fn clamp(&self) -> Vec<Vec<Expr>> {
        let pods = match self.cluster_cidr {
            Some(cidr) => [within(Address::Source, cidr, true), within(Address::Destination, cidr, true)],
            None => [from_pod(true), to_pod(true)],
        };
        let clamped = pods.into_iter().map(|mut rule| {
            rule.extend([Expr::L4Proto(0), Expr::Equal(0, vec![libc::IPPROTO_TCP as u8])]);
            // SYN set, RST not.
            rule.extend([Expr::TcpFlags(0), Expr::Bitwise(0, vec![0x06], vec![0]), Expr::Equal(0, vec![0x02])]);
            rule.push(Expr::ClampMss);
            rule
        });
        clamped.collect()
    }

    fn forward_filter(&self) -> Vec<Vec<Expr>> {
        let mut rules: Vec<Vec<Expr>> = [from_pod(true), to_pod(true)]
            .into_iter()
            .map(|link| [link, state(STATE_INVALID), vec![Expr::Drop]].concat())
            .collect();
        rules.extend(self.unanswered(None));
        rules
    }

    /// What still goes to the service range after the lookup has nobody to answer it.
    fn unanswered(&self, except: Option<IpAddr>) -> Vec<Vec<Expr>> {
        let mut rules = Vec::new();
        if let Some(cidr) = self.service_cidr {
            let mut rule = state(STATE_NEW);
            rule.extend(within(Address::Destination, cidr, true));
            if let Some(ip) = except {
                rule.push(Expr::Address(Address::Destination, 0));
                rule.push(Expr::NotEqual(0, super::super::netlink::route::octets(ip)));
            }
            rule.push(Expr::Goto(REFUSE.into()));
            rules.push(rule);
        }
        let mut rule = state(STATE_NEW);
        rule.extend(address_key(self.family).0);
        rule.push(Expr::InSet(0, Map::NoEndpoints.name().into()));
        rule.push(Expr::Goto(REFUSE.into()));
        rules.push(rule);
        rules
    }

    fn input_filter(&self) -> Vec<Vec<Expr>> {
        let mut by_address = state(STATE_NEW);
        by_address.extend(address_key(self.family).0);
        by_address.push(Expr::InSet(0, Map::NoEndpoints.name().into()));
        by_address.push(Expr::Goto(REFUSE.into()));
        let mut by_port = state(STATE_NEW);
        by_port.extend(port_key().0);
        by_port.push(Expr::InSet(0, Map::NoEndpointNodePorts.name().into()));
        by_port.push(Expr::Goto(REFUSE.into()));
        vec![by_address, by_port]
    }

    fn output_filter(&self) -> Vec<Vec<Expr>> {
        self.unanswered(self.cluster_dns)
    }
}

/// Tests that an address is in, or not in, a range.
pub fn within(which: Address, range: IpNet, inside: bool) -> Vec<Expr> {
    let octets = super::super::netlink::route::octets;
    let (mask, network) = (octets(range.netmask()), octets(range.network()));
    let flip = vec![0; mask.len()];
    let test = if inside { Expr::Equal(0, network) } else { Expr::NotEqual(0, network) };
    vec![Expr::Address(which, 0), Expr::Bitwise(0, mask, flip), test]
}

const REFUSE: &str = "refuse";

const NF_PREROUTING: u32 = 0;
const NF_INPUT: u32 = 1;
const NF_FORWARD: u32 = 2;
const NF_OUTPUT: u32 = 3;
const NF_POSTROUTING: u32 = 4;

const LOOPBACK: IpNet = net4([127, 0, 0, 0], 8);
const MULTICAST_V4: IpNet = net4([224, 0, 0, 0], 4);
const MULTICAST_V6: IpNet =
    IpNet::V6(ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8));

const fn net4(octets: [u8; 4], prefix: u8) -> IpNet {
    let [a, b, c, d] = octets;
    IpNet::V4(ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, d), prefix))
}

/// `iifname "cv*"`.
fn from_pod(yes: bool) -> Vec<Expr> {
    vec![Expr::InName(0), name_test(yes)]
}

/// `oifname "cv*"`.
fn to_pod(yes: bool) -> Vec<Expr> {
    vec![Expr::OutName(0), name_test(yes)]
}

fn name_test(yes: bool) -> Expr {
    let prefix = LINK_PREFIX.as_bytes().to_vec();
    if yes { Expr::Equal(0, prefix) } else { Expr::NotEqual(0, prefix) }
}

/// `ct state …`: a test of one bit.
fn state(bit: u32) -> Vec<Expr> {
    vec![Expr::CtState(0), Expr::Bitwise(0, bit.to_ne_bytes().to_vec(), vec![0; 4]), Expr::NotEqual(0, vec![0; 4])]
}

/// A reset ends a connection of the node itself at once; an ICMP error finds its socket in use and only the second one,
/// a second later, is heard (`tcp_v4_err`).
fn refuse() -> Vec<Vec<Expr>> {
    let tcp = vec![Expr::L4Proto(0), Expr::Equal(0, vec![libc::IPPROTO_TCP as u8]), Expr::RejectReset];
    vec![tcp, vec![Expr::RejectPort]]
}
