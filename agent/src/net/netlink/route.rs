//! Links, addresses, routes and neighbours: the requests of rtnetlink(7) that pods and the node need.

use std::net::IpAddr;

use ipnet::IpNet;

use super::message::{ACK, Batch, CREATE, DUMP, EXCL, REPLACE, Writer, attribute, text, u32_at};
use super::{NetlinkError, Socket};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNEIGH: u16 = 28;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
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
/// `rtm_protocol` of our routes: an unassigned number, so that `ip route` shows whose they are.
pub const ROUTE_PROTOCOL: u8 = 0xc0;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

/// `RT_SCOPE_UNIVERSE`.
pub const SCOPE_UNIVERSE: u8 = 0;
/// `RT_SCOPE_LINK`.
pub const SCOPE_LINK: u8 = 253;
/// `RT_SCOPE_HOST`.
pub const SCOPE_HOST: u8 = 254;

const IFF_UP: u32 = 1;

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
}

/// A route through a device.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// Destination.
    pub to: IpNet,
    /// Device.
    pub device: u32,
    /// Next hop, taken to be on the link whatever the addresses say.
    pub via: Option<IpAddr>,
    /// Source address of what the host itself sends there.
    pub source: Option<IpAddr>,
}

fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

/// The bytes of an address in network order.
pub fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn link_header(message: &mut Writer<'_>, index: u32, flags: u32, change: u32) {
    message.raw(&[0; 4]);
    message.raw(&index.to_ne_bytes());
    message.raw(&flags.to_ne_bytes());
    message.raw(&change.to_ne_bytes());
}

fn route_header(message: &mut Writer<'_>, route: &Route) {
    let (scope, flags) = if route.via.is_some() { (SCOPE_UNIVERSE, RTNH_F_ONLINK) } else { (SCOPE_LINK, 0) };
    let prefix = route.to.prefix_len();
    message.raw(&[family(route.to.addr()), prefix, 0, 0, RT_TABLE_MAIN, ROUTE_PROTOCOL, scope, RTN_UNICAST]);
    message.raw(&flags.to_ne_bytes());
    if prefix > 0 {
        message.attr(RTA_DST, &octets(route.to.network()));
    }
    message.attr_u32(RTA_OIF, route.device);
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

    /// Adds or replaces a neighbour that is never asked for.
    pub fn add_neighbour(&mut self, device: u32, ip: IpAddr, mac: Mac) {
        self.push("add the neighbour", &[], RTM_NEWNEIGH, CREATE | REPLACE | ACK, |message| {
            message.raw(&[family(ip), 0, 0, 0]);
            message.raw(&device.to_ne_bytes());
            message.raw(&NUD_PERMANENT.to_ne_bytes());
            message.raw(&[0, 0]);
            message.attr(NDA_DST, &octets(ip));
            message.attr(NDA_LLADDR, &mac);
        });
    }
}

fn link(payload: &[u8]) -> Option<Link> {
    let attributes = payload.get(16..)?;
    Some(Link {
        index: u32_at(payload, 4),
        name: text(attribute(attributes, IFLA_IFNAME)?),
        alias: attribute(attributes, IFLA_IFALIAS).map(text).unwrap_or_default(),
        mtu: attribute(attributes, IFLA_MTU).map_or(0, |value| u32_at(value, 0)),
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
}

fn address(payload: &[u8]) -> Option<(u32, IpAddr)> {
    let attributes = payload.get(8..)?;
    let bytes = attribute(attributes, IFA_LOCAL).or_else(|| attribute(attributes, IFA_ADDRESS))?;
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some((u32_at(payload, 4), ip))
}
