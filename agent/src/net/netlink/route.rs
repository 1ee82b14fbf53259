//! Links, addresses, routes and neighbours: the requests of rtnetlink(7) that pods and the node need.

use std::net::IpAddr;

use ipnet::IpNet;

use super::message::{ACK, Batch, CREATE, DUMP, EXCL, REPLACE, Writer, attribute, text, u32_at};
use super::{NetlinkError, Socket};

pub(super) const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
pub(super) const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;

pub(super) const IFLA_ADDRESS: u16 = 1;
pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFLA_MTU: u16 = 4;
pub(super) const IFLA_LINKINFO: u16 = 18;
pub(super) const IFLA_IFALIAS: u16 = 20;
/// State as RFC 2863 has it.
const IFLA_OPERSTATE: u16 = 16;
const IF_OPER_UP: u8 = 6;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
pub(super) const IFLA_INFO_KIND: u16 = 1;
pub(super) const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET_CONF: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// No link-local address is made.
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTNH_F_ONLINK: u32 = 4;
const RT_TABLE_MAIN: u8 = 254;
const RTN_UNICAST: u8 = 1;
const RTN_UNREACHABLE: u8 = 7;
/// `rtm_protocol` of our routes: an unassigned number, so that `ip route` shows whose they are.
pub const ROUTE_PROTOCOL: u8 = 0xc0;

/// `RT_SCOPE_UNIVERSE`.
pub const SCOPE_UNIVERSE: u8 = 0;
/// `RT_SCOPE_LINK`.
pub const SCOPE_LINK: u8 = 253;
/// `RT_SCOPE_HOST`.
pub const SCOPE_HOST: u8 = 254;

/// The link is up.
pub(super) const IFF_UP: u32 = 1;

/// Hardware address.
pub type Mac = [u8; 6];

/// A veth pair: one end here, the other in the namespace `peer_netns`.
#[derive(Debug)]
pub struct Veth<'a> {
    /// Name on this side.
    pub name: &'a str,
    /// Free text on this side, shown by `ip link`.
    pub alias: &'a str,
    /// Hardware address on this side.
    pub mac: Mac,
    /// Name on the other side.
    pub peer_name: &'a str,
    /// Hardware address on the other side.
    pub peer_mac: Mac,
    /// Open file descriptor of the other side's namespace.
    pub peer_netns: i32,
    /// MTU of both.
    pub mtu: u32,
}

/// A link as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// `ifindex`.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Free text, empty when there is none.
    pub alias: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// It carries packets: the kernel has dealt with the news that it is up.
    pub works: bool,
}

/// A route of ours in the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub to: IpNet,
    /// Device; 0 leaves it to the kernel, by its route to the next hop.
    pub device: u32,
    /// Next hop, taken to be on the link of the device (when one is given) whatever the addresses say.
    pub via: Option<IpAddr>,
    /// Source address of what the host itself sends there.
    pub source: Option<IpAddr>,
    /// Packets are refused with an ICMP error instead of being sent.
    pub unreachable: bool,
}

impl Route {
    /// Destinations on the link of a device.
    pub fn by(device: u32, to: IpNet) -> Self {
        Self { to, device, via: None, source: None, unreachable: false }
    }

    /// Destinations that nobody has.
    pub fn nowhere(to: IpNet) -> Self {
        Self { unreachable: true, ..Self::by(0, to) }
    }
}

/// `AF_INET` or `AF_INET6`.
pub(super) fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

/// The bytes of an address in network order.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

pub(super) fn link_header(message: &mut Writer<'_>, index: u32, flags: u32, change: u32) {
    message.raw(&[0; 4]);
    message.raw(&index.to_ne_bytes());
    message.raw(&flags.to_ne_bytes());
    message.raw(&change.to_ne_bytes());
}

fn route_header(message: &mut Writer<'_>, route: &Route) {
    let scope = if route.via.is_some() || route.unreachable { SCOPE_UNIVERSE } else { SCOPE_LINK };
    let flags = if route.via.is_some() && route.device != 0 { RTNH_F_ONLINK } else { 0 };
    let kind = if route.unreachable { RTN_UNREACHABLE } else { RTN_UNICAST };
    let prefix = route.to.prefix_len();
    message.raw(&[family(route.to.addr()), prefix, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, scope, kind]);
    message.raw(&flags.to_ne_bytes());
    if prefix > 0 {
        message.attr(RTA_DST, &octets(route.to.network()));
    }
    if route.device != 0 {
        message.attr_u32(RTA_OIF, route.device);
    }
}

fn address_header(message: &mut Writer<'_>, device: u32, address: IpNet, scope: u8) {
    message.raw(&[family(address.addr()), address.prefix_len(), IFA_F_NODAD, scope]);
    message.raw(&device.to_ne_bytes());
    message.attr(IFA_LOCAL, &octets(address.addr()));
    message.attr(IFA_ADDRESS, &octets(address.addr()));
}

impl Batch {
    /// Makes a veth pair.
    pub fn add_veth(&mut self, veth: &Veth<'_>) {
        self.push("create the veth pair", &[], RTM_NEWLINK, CREATE | EXCL | ACK, |message| {
            link_header(message, 0, 0, 0);
            message.attr_str(IFLA_IFNAME, veth.name);
            message.attr(IFLA_ADDRESS, &veth.mac);
            message.attr_u32(IFLA_MTU, veth.mtu);
            message.attr(IFLA_IFALIAS, veth.alias.as_bytes());
            message.nest(IFLA_LINKINFO, |info| {
                info.attr_str(IFLA_INFO_KIND, "veth");
                info.nest(IFLA_INFO_DATA, |data| {
                    data.nest(VETH_INFO_PEER, |peer| {
                        link_header(peer, 0, 0, 0);
                        peer.attr_str(IFLA_IFNAME, veth.peer_name);
                        peer.attr(IFLA_ADDRESS, &veth.peer_mac);
                        peer.attr_u32(IFLA_MTU, veth.mtu);
                        peer.attr_u32(IFLA_NET_NS_FD, veth.peer_netns.cast_unsigned());
                    });
                });
            });
        });
    }

    /// Makes a link of a kind without parameters.
    pub fn add_link_of_kind(&mut self, name: &str, kind: &str) {
        self.push("create a link of that kind", &[], RTM_NEWLINK, CREATE | EXCL | ACK, |message| {
            link_header(message, 0, 0, 0);
            message.attr_str(IFLA_IFNAME, name);
            message.nest(IFLA_LINKINFO, |info| info.attr_str(IFLA_INFO_KIND, kind));
        });
    }

    /// Sets a link's alias (a kernel that ignores it at creation takes it here).
    pub fn set_alias(&mut self, index: u32, alias: &str) {
        self.push("name the link's owner", &[], RTM_SETLINK, ACK, |message| {
            link_header(message, index, 0, 0);
            message.attr(IFLA_IFALIAS, alias.as_bytes());
        });
    }

    /// Sets a link's MTU.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) {
        self.push("set the link's MTU", &[], RTM_SETLINK, ACK, |message| {
            link_header(message, index, 0, 0);
            message.attr_u32(IFLA_MTU, mtu);
        });
    }

    /// Brings a link up. `ipv4` sets `net.ipv4.conf.<link>` values by their number; without `ipv6` the link gets no
    /// link-local address and so sends nothing by itself.
    pub fn set_up(&mut self, index: u32, ipv4: &[(u16, u32)], ipv6: bool) {
        // The mode is set first, by itself: a kernel without IPv6 refuses it, and it must come before "up".
        if !ipv6 {
            let tolerate = &[libc::EAFNOSUPPORT, libc::EOPNOTSUPP, libc::EINVAL];
            self.push("turn off link-local addresses", tolerate, RTM_SETLINK, ACK, |message| {
                link_header(message, index, 0, 0);
                message.nest(IFLA_AF_SPEC, |families| {
                    families.nest(libc::AF_INET6 as u16, |inet6| {
                        inet6.attr(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
                    });
                });
            });
        }
        self.push("bring the link up", &[], RTM_SETLINK, ACK, |message| {
            link_header(message, index, IFF_UP, IFF_UP);
            if !ipv4.is_empty() {
                message.nest(IFLA_AF_SPEC, |families| {
                    families.nest(libc::AF_INET as u16, |inet| {
                        inet.nest(IFLA_INET_CONF, |conf| {
                            for (option, value) in ipv4 {
                                conf.attr_u32(*option, *value);
                            }
                        });
                    });
                });
            }
        });
    }

    /// Deletes a link by name; one that is gone already is fine.
    pub fn delete_link(&mut self, name: &str) {
        self.push("delete the link", &[libc::ENODEV], RTM_DELLINK, ACK, |message| {
            link_header(message, 0, 0, 0);
            message.attr_str(IFLA_IFNAME, name);
        });
    }

    /// Adds or replaces an address.
    pub fn add_address(&mut self, device: u32, address: IpNet, scope: u8) {
        self.push("add the address", &[libc::EEXIST], RTM_NEWADDR, CREATE | REPLACE | ACK, |message| {
            address_header(message, device, address, scope);
        });
    }

    /// Removes an address; one that is gone already is fine.
    pub fn delete_address(&mut self, device: u32, address: IpNet) {
        self.push("remove the address", &[libc::EADDRNOTAVAIL], RTM_DELADDR, ACK, |message| {
            address_header(message, device, address, 0);
        });
    }

    /// Adds or replaces a route.
    pub fn add_route(&mut self, route: &Route) {
        self.push("add the route", &[], RTM_NEWROUTE, CREATE | REPLACE | ACK, |message| {
            route_header(message, route);
            if let Some(via) = route.via {
                message.attr(RTA_GATEWAY, &octets(via));
            }
            if let Some(source) = route.source {
                message.attr(RTA_PREFSRC, &octets(source));
            }
        });
    }

    /// Removes a route of ours; one that is gone already is fine.
    pub fn delete_route(&mut self, route: &Route) {
        self.push("remove the route", &[libc::ESRCH], RTM_DELROUTE, ACK, |message| route_header(message, route));
    }
}

/// What a notification on a socket for links and routes is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A link came, changed or went.
    Link(Link),
    /// An address came or went.
    Address,
    /// A route of ours went.
    RouteGone(Route),
    /// A neighbour or forwarding entry of a device went.
    NeighbourGone(u32),
}

/// Reads a notification; `None` when it is of no interest here.
pub fn notice(kind: u16, payload: &[u8]) -> Option<Notice> {
    match kind {
        RTM_NEWLINK | RTM_DELLINK => link(payload).map(Notice::Link),
        RTM_NEWADDR | RTM_DELADDR => Some(Notice::Address),
        RTM_DELROUTE => route(payload).map(Notice::RouteGone),
        super::neighbour::RTM_DELNEIGH => Some(Notice::NeighbourGone(u32_at(payload, 4))),
        _ => None,
    }
}

fn link(payload: &[u8]) -> Option<Link> {
    let attributes = payload.get(16..)?;
    Some(Link {
        index: u32_at(payload, 4),
        name: text(attribute(attributes, IFLA_IFNAME)?),
        alias: attribute(attributes, IFLA_IFALIAS).map(text).unwrap_or_default(),
        mtu: attribute(attributes, IFLA_MTU).map_or(0, |value| u32_at(value, 0)),
        works: attribute(attributes, IFLA_OPERSTATE).is_some_and(|state| state.first() == Some(&IF_OPER_UP)),
    })
}

impl Socket {
    /// The link of that name.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("read the link", &[libc::ENODEV], RTM_GETLINK, ACK, |message| {
            link_header(message, 0, 0, 0);
            message.attr_str(IFLA_IFNAME, name);
        });
        let mut found = None;
        self.dump(&mut batch, |_, payload| found = link(payload))?;
        Ok(found)
    }

    /// All links of the namespace.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("list the links", &[], RTM_GETLINK, DUMP, |message| link_header(message, 0, 0, 0));
        let mut found = Vec::new();
        self.dump(&mut batch, |_, payload| found.extend(link(payload)))?;
        Ok(found)
    }

    /// All addresses of the namespace with their devices.
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpAddr)>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("list the addresses", &[], RTM_GETADDR, DUMP, |message| message.raw(&[0; 8]));
        let mut found = Vec::new();
        self.dump(&mut batch, |_, payload| found.extend(address(payload)))?;
        Ok(found)
    }

    /// Our routes in the main table, of both families.
    pub fn own_routes(&mut self) -> Result<Vec<Route>, NetlinkError> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut batch = Batch::new();
            // A kernel without IPv6 has no routes of that family.
            batch.push("list the routes", &[libc::EOPNOTSUPP], RTM_GETROUTE, DUMP, |message| {
                message.raw(&[family as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            });
            self.dump(&mut batch, |_, payload| found.extend(route(payload)))?;
        }
        Ok(found)
    }
}

fn address(payload: &[u8]) -> Option<(u32, IpAddr)> {
    let attributes = payload.get(8..)?;
    let bytes = attribute(attributes, IFA_LOCAL).or_else(|| attribute(attributes, IFA_ADDRESS))?;
    Some((u32_at(payload, 4), ip(bytes)?))
}

/// An address from its bytes in network order.
pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(<[u8; 4]>::try_from(bytes).ok()?.into()),
        16 => Some(<[u8; 16]>::try_from(bytes).ok()?.into()),
        _ => None,
    }
}

/// A route of ours; none when it is another program's, in another table or the kernel's copy of an exception.
fn route(payload: &[u8]) -> Option<Route> {
    let (header, attributes) = payload.split_at_checked(12)?;
    let [family, prefix, _, _, table, protocol, _, kind, ..] = *header else { return None };
    if protocol != ROUTE_PROTOCOL || table != RT_TABLE_MAIN || ![RTN_UNICAST, RTN_UNREACHABLE].contains(&kind) {
        return None;
    }
    let any = if i32::from(family) == libc::AF_INET { IpAddr::from([0; 4]) } else { IpAddr::from([0_u16; 8]) };
    let to = attribute(attributes, RTA_DST).map_or(Some(any), ip)?;
    Some(Route {
        to: IpNet::new(to, prefix).ok()?,
        device: attribute(attributes, RTA_OIF).map_or(0, |value| u32_at(value, 0)),
        via: attribute(attributes, RTA_GATEWAY).and_then(ip),
        source: attribute(attributes, RTA_PREFSRC).and_then(ip),
        unreachable: kind == RTN_UNREACHABLE,
    })
}
