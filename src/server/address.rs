//! The address of this machine, when nobody said it.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

/// The address that the default route uses, else the first global one of a link that is up, else the loopback address.
pub fn detect() -> IpAddr {
    default_route().or_else(first_global).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST))
}

/// Asks the routing table by connecting a datagram socket, which sends nothing (192.0.2.0/24 is TEST-NET-1, RFC 5737).
fn default_route() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

fn first_global() -> Option<IpAddr> {
    let up =
        |flags: InterfaceFlags| flags.contains(InterfaceFlags::IFF_UP) && !flags.contains(InterfaceFlags::IFF_LOOPBACK);
    getifaddrs().ok()?.filter(|link| up(link.flags)).find_map(|link| {
        let ip = link.address?.as_sockaddr_in()?.ip();
        (!ip.is_link_local()).then_some(IpAddr::V4(ip))
    })
}
