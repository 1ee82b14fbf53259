//! What the kernel is to hold so that pods of all nodes reach each other. Pure: nodes in, links, routes, neighbours and
//! forwarding entries out, and the difference to what the kernel holds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::names;
use super::super::netlink::route::{Mac, Route};
use super::super::netlink::vxlan::Vxlan;
use super::super::nodes::Node;
use super::Backend;
use super::probe::Peer;

/// Network identifier of all our VXLAN links: "co". Not flannel's 1, which may run on the same machine.
pub const VNI: u32 = 0x636f;
/// UDP port of all VXLAN links: Linux' own default, as flannel's.
pub const PORT: u16 = 8472;

/// Which addresses of the machines carry a packet. What travels inside may be of the other family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Underlay {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Underlay {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Whether it is IPv6.
    pub fn is_ipv6(self) -> bool {
        self == Self::V6
    }

    fn of(range: IpNet) -> [Self; 2] {
        // The range's own family first.
        if range.addr().is_ipv6() { [Self::V6, Self::V4] } else { [Self::V4, Self::V6] }
    }
}

/// What is known of this node from the start.
#[derive(Debug, Clone)]
pub struct Own {
    /// The instance, for names.
    pub instance_id: String,
    /// `metadata.name`.
    pub node_name: String,
    /// Own addresses, at most one per family, with the MTU of their links.
    pub addresses: Vec<(IpAddr, u32)>,
    /// How.
    pub backend: Backend,
}

impl Own {
    fn address(&self, underlay: Underlay) -> Option<(IpAddr, u32)> {
        self.addresses.iter().copied().find(|(ip, _)| ip.is_ipv6() == underlay.is_ipv6())
    }
}

/// One link with everything on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// The link itself.
    pub vxlan: Vxlan,
    /// Addresses of this node on it: what the node itself sends to pods of other nodes comes from them.
    pub addresses: BTreeSet<IpAddr>,
    /// The other nodes' addresses on it, and their hardware addresses.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Which machine has which hardware address.
    pub forwarding: BTreeMap<Mac, IpAddr>,
}

/// A way to a range of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Through the overlay's link to that node's address on it.
    Link(Underlay, IpAddr),
    /// Directly to the machine.
    Machine(IpAddr),
    /// Own pods that do not exist: those that do have routes of their own.
    Nowhere,
}

/// What the kernel is to hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// At most one link per family underneath.
    pub links: BTreeMap<Underlay, Link>,
    /// Ranges of pods.
    pub ways: BTreeMap<IpNet, Way>,
    /// Nodes and ranges that cannot be reached, with the reason.
    pub unreachable: BTreeSet<(String, IpNet, &'static str)>,
}

/// The address of a node on the overlay: the first of its range, which no pod gets.
pub fn overlay_address(range: IpNet) -> IpAddr {
    match range.network() {
        IpAddr::V4(ip) => std::net::Ipv4Addr::from_bits(ip.to_bits().wrapping_add(1)).into(),
        IpAddr::V6(ip) => std::net::Ipv6Addr::from_bits(ip.to_bits().wrapping_add(1)).into(),
    }
}

/// Works out what the kernel is to hold, given all nodes by name (this one too, once it is registered).
pub fn desired(own: &Own, nodes: &BTreeMap<String, Node>) -> Desired {
    let mut out = Desired::default();
    let ranges = nodes.get(&own.node_name).map(|node| node.pod_cidrs.as_slice()).unwrap_or_default();
    for range in ranges {
        out.ways.insert(*range, Way::Nowhere);
    }
    if own.backend == Backend::Vxlan {
        out.links = own_links(own, ranges);
    }
    let peers = nodes.values().filter(|node| node.name != own.node_name);
    // An object of this machine under a former name leads to itself.
    let is_own = |ip: &IpAddr| own.addresses.iter().any(|(known, _)| known == ip);
    for peer in peers.filter(|peer| !peer.internal_ips.iter().any(is_own)) {
        for range in &peer.pod_cidrs {
            if out.ways.contains_key(range) {
                continue;
            }
            match own.backend {
                Backend::Vxlan => through_link(&mut out, own, peer, *range),
                Backend::HostGw => match peer.internal_ip(range.addr().is_ipv6()) {
                    Some(ip) => drop(out.ways.insert(*range, Way::Machine(ip))),
                    None => drop(out.unreachable.insert((
                        peer.name.clone(),
                        *range,
                        "the node has no InternalIP of the range's family, which host-gw needs",
                    ))),
                },
                Backend::None => {}
            }
        }
    }
    out
}

fn own_links(own: &Own, ranges: &[IpNet]) -> BTreeMap<Underlay, Link> {
    let link = |underlay: Underlay| {
        let ipv6 = underlay.is_ipv6();
        let (local, mtu) = own.address(underlay)?;
        let vxlan = Vxlan {
            name: names::overlay_link(&own.instance_id, ipv6),
            alias: names::link_alias(&own.instance_id, "overlay"),
            mac: names::overlay_mac(&own.node_name, ipv6),
            vni: VNI,
            port: PORT,
            local,
            mtu: mtu.saturating_sub(own.backend.overhead(ipv6)),
        };
        // Both links may carry both families; the same address on two links is no harm, as neither has its subnet.
        let addresses = ranges.iter().map(|range| overlay_address(*range)).collect();
        let link = Link { vxlan, addresses, neighbours: BTreeMap::new(), forwarding: BTreeMap::new() };
        Some((underlay, link))
    };
    Underlay::ALL.into_iter().filter_map(link).collect()
}

fn through_link(out: &mut Desired, own: &Own, peer: &Node, range: IpNet) {
    let usable =
        |underlay: &Underlay| out.links.contains_key(underlay) && peer.internal_ip(underlay.is_ipv6()).is_some();
    let Some(underlay) = Underlay::of(range).into_iter().find(usable) else {
        let why = if peer.internal_ips.is_empty() || own.addresses.is_empty() {
            "the node has no InternalIP"
        } else {
            "this node and that one have no address family in common"
        };
        out.unreachable.insert((peer.name.clone(), range, why));
        return;
    };
    let (Some(link), Some(machine)) = (out.links.get_mut(&underlay), peer.internal_ip(underlay.is_ipv6())) else {
        return;
    };
    let mac = names::overlay_mac(&peer.name, underlay.is_ipv6());
    let gateway = overlay_address(range);
    link.neighbours.insert(gateway, mac);
    link.forwarding.insert(mac, machine);
    out.ways.insert(range, Way::Link(underlay, gateway));
}

impl Desired {
    /// The routes, given the indexes of the links. Ways over links that could not be made are left out.
    pub fn routes(&self, own: &Own, indexes: &BTreeMap<Underlay, u32>) -> Vec<Route> {
        let route = |(range, way): (&IpNet, &Way)| match way {
            Way::Nowhere => Some(Route::nowhere(*range)),
            Way::Machine(ip) => {
                let source = own.addresses.iter().map(|(own, _)| *own).find(|own| own.is_ipv6() == ip.is_ipv6());
                Some(Route { via: Some(*ip), source, ..Route::by(0, *range) })
            }
            Way::Link(underlay, gateway) => {
                let addresses = &self.links.get(underlay)?.addresses;
                let source = addresses.iter().copied().find(|ip| ip.is_ipv6() == range.addr().is_ipv6());
                Some(Route { via: Some(*gateway), source, ..Route::by(*indexes.get(underlay)?, *range) })
            }
        };
        self.ways.iter().filter_map(route).collect()
    }
}

impl Desired {
    /// The nodes that are reached through links, as the probe asks them.
    pub fn peers(&self, nodes: &BTreeMap<String, Node>) -> BTreeSet<Peer> {
        let peer = |node: &Node, range: &IpNet| {
            let Some(Way::Link(underlay, overlay)) = self.ways.get(range) else { return None };
            let machine = node.internal_ip(underlay.is_ipv6())?;
            let mtu = self.links.get(underlay)?.vxlan.mtu;
            Some(Peer { node: node.name.clone(), machine, overlay: *overlay, mtu })
        };
        nodes.values().flat_map(|node| node.pod_cidrs.iter().filter_map(move |range| peer(node, range))).collect()
    }
}

/// Whether a route that the kernel holds is the one that was asked for: the kernel names the device where we did not.
pub fn is_same(found: &Route, wanted: &Route) -> bool {
    let device = wanted.device == 0 || found.device == wanted.device;
    device
        && (found.to, found.via, found.unreachable) == (wanted.to, wanted.via, wanted.unreachable)
        && (wanted.source.is_none() || found.source == wanted.source)
}

/// Whether a route of ours is the overlay's: one of a range of pods, not of a single pod and not of the Services.
pub fn is_overlay_route(route: &Route, clusters: &[IpNet]) -> bool {
    route.to.prefix_len() < route.to.max_prefix_len() && clusters.iter().any(|cluster| cluster.contains(&route.to))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(backend: Backend, addresses: &[&str]) -> Own {
        let addresses = addresses.iter().map(|ip| (ip.parse().unwrap(), 1500)).collect();
        Own { instance_id: "0123abcd".into(), node_name: "a".into(), addresses, backend }
    }

    fn nodes(all: &[(&str, &[&str], &[&str])]) -> BTreeMap<String, Node> {
        let node = |(name, ips, cidrs): &(&str, &[&str], &[&str])| Node {
            name: (*name).to_owned(),
            internal_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            pod_cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
            zone: None,
        };
        all.iter().map(node).map(|node| (node.name.clone(), node)).collect()
    }

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn each_family_goes_over_its_own_link_and_over_the_other_one_where_a_machine_has_only_that() {
        let ranges: &[&str] = &["10.42.1.0/24", "fd42:0:0:1::/64"];
        let nodes = nodes(&[
            ("a", &["192.0.2.1", "2001:db8::1"], &["10.42.0.0/24", "fd42::/64"]),
            ("b", &["192.0.2.2", "2001:db8::2"], ranges),
            ("c", &["192.0.2.3"], &["10.42.2.0/24", "fd42:0:0:2::/64"]),
        ]);
        let desired = desired(&own(Backend::Vxlan, &["192.0.2.1", "2001:db8::1"]), &nodes);
        assert_eq!(desired.ways[&net("10.42.0.0/24")], Way::Nowhere);
        assert_eq!(desired.ways[&net("10.42.1.0/24")], Way::Link(Underlay::V4, ip("10.42.1.1")));
        assert_eq!(desired.ways[&net("fd42:0:0:1::/64")], Way::Link(Underlay::V6, ip("fd42:0:0:1::1")));
        assert_eq!(desired.ways[&net("fd42:0:0:2::/64")], Way::Link(Underlay::V4, ip("fd42:0:0:2::1")));
        let (v4, v6) = (&desired.links[&Underlay::V4], &desired.links[&Underlay::V6]);
        assert_eq!((v4.vxlan.mtu, v6.vxlan.mtu), (1450, 1430));
        assert_eq!(v4.forwarding[&names::overlay_mac("c", false)], ip("192.0.2.3"));
        assert_eq!(v6.forwarding.len(), 1);
        assert_eq!(v4.neighbours.len(), 3, "b's IPv4 and both of c");
        assert!(desired.unreachable.is_empty());
    }

    #[test]
    fn machines_without_a_common_family_are_told_and_an_old_name_of_this_machine_is_passed_over() {
        let nodes = nodes(&[
            ("a", &["192.0.2.1"], &["10.42.0.0/24"]),
            ("former", &["192.0.2.1"], &["10.42.9.0/24"]),
            ("six", &["2001:db8::2"], &["10.42.1.0/24"]),
        ]);
        let desired = desired(&own(Backend::Vxlan, &["192.0.2.1"]), &nodes);
        assert_eq!(desired.ways.keys().copied().collect::<Vec<_>>(), [net("10.42.0.0/24")]);
        let told: Vec<_> = desired.unreachable.iter().map(|(node, ..)| node.as_str()).collect();
        assert_eq!(told, ["six"]);
    }

    #[test]
    fn host_gw_is_routes_alone_and_none_is_nothing_but_the_own_range() {
        let nodes = nodes(&[
            ("a", &["192.0.2.1"], &["10.42.0.0/24"]),
            ("b", &["192.0.2.2"], &["10.42.1.0/24", "fd42:0:0:1::/64"]),
        ]);
        let own_gw = own(Backend::HostGw, &["192.0.2.1"]);
        let direct = desired(&own_gw, &nodes);
        assert!(direct.links.is_empty());
        assert_eq!(direct.ways[&net("10.42.1.0/24")], Way::Machine(ip("192.0.2.2")));
        assert_eq!(direct.unreachable.len(), 1, "IPv6 cannot go by an IPv4 machine");
        let routes = direct.routes(&own_gw, &BTreeMap::new());
        assert_eq!(routes[1].source, Some(ip("192.0.2.1")));
        let found = Route { device: 7, ..routes[1] };
        assert!(is_same(&found, &routes[1]), "the kernel has found the device");
        let none = desired(&own(Backend::None, &["192.0.2.1"]), &nodes);
        assert_eq!(none.ways.len(), 1);
    }

    #[test]
    fn only_ranges_within_the_cluster_are_the_overlays() {
        let clusters = [net("10.42.0.0/16")];
        for (to, ours) in
            [("10.42.1.0/24", true), ("10.42.1.7/32", false), ("10.43.0.0/16", false), ("0.0.0.0/0", false)]
        {
            assert_eq!(is_overlay_route(&Route::by(1, net(to)), &clusters), ours, "{to}");
        }
    }
}
