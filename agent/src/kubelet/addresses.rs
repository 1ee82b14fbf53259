//! Which addresses a machine has, when nobody said them with `--node-ip`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::IpNet;

/// One address of each family of `pods`, in that order: the one that the default route uses, else the first global one.
/// Without any, the first address of the primary family at all, the loopback address for example. Addresses in the cluster's
/// own ranges (pods, Services, the cluster DNS on `lo`) are none of the machine.
pub fn default_addresses(pods: &[IpNet], services: &[IpNet]) -> Vec<IpAddr> {
    let foreign = |ip: IpAddr| !pods.iter().chain(services).any(|range| range.contains(&ip));
    let all: Vec<IpAddr> =
        nix::ifaddrs::getifaddrs().map(|links| links.filter_map(address).collect()).unwrap_or_default();
    let six: Vec<bool> = pods.iter().map(|range| range.addr().is_ipv6()).collect();
    let six = if six.is_empty() { vec![false] } else { six };
    let chosen = |six: &bool| choose(routed(*six), all.iter().copied().filter(|ip| ip.is_ipv6() == *six), foreign);
    let mut found: Vec<IpAddr> = six.iter().filter_map(chosen).collect();
    if found.is_empty() {
        found.extend(all.iter().copied().find(|ip| ip.is_ipv6() == six[0] && foreign(*ip)));
    }
    found
}

fn choose(
    routed: Option<IpAddr>,
    mut all: impl Iterator<Item = IpAddr>,
    foreign: impl Fn(IpAddr) -> bool,
) -> Option<IpAddr> {
    routed.filter(|ip| is_global(*ip) && foreign(*ip)).or_else(|| all.find(|ip| is_global(*ip) && foreign(*ip)))
}

/// Whether other machines may reach it.
fn is_global(ip: IpAddr) -> bool {
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || link_local)
}

fn address(link: nix::ifaddrs::InterfaceAddress) -> Option<IpAddr> {
    let address = link.address?;
    let four = address.as_sockaddr_in().map(|four| IpAddr::V4(four.ip()));
    four.or_else(|| address.as_sockaddr_in6().map(|six| IpAddr::V6(six.ip())))
}

/// A connected datagram socket has the source address that packets would have; none is sent. The destinations are for
/// documentation only (RFC 5737, RFC 3849).
fn routed(six: bool) -> Option<IpAddr> {
    let (own, to): (IpAddr, IpAddr) = if six {
        (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into())
    } else {
        (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into())
    };
    let socket = UdpSocket::bind(SocketAddr::new(own, 0)).ok()?;
    socket.connect(SocketAddr::new(to, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_routed_address_comes_first_and_never_one_of_the_clusters_own() {
        let services: IpNet = "10.43.0.0/16".parse().unwrap();
        let foreign = |ip: IpAddr| !services.contains(&ip);
        let chosen = |routed: Option<&str>, all: &[&str]| {
            choose(routed.map(|ip| ip.parse().unwrap()), ips(all).into_iter(), foreign).map(|ip| ip.to_string())
        };
        assert_eq!(chosen(Some("192.0.2.7"), &["192.0.2.1"]).as_deref(), Some("192.0.2.7"));
        let all = ["127.0.0.1", "169.254.1.1", "10.43.0.10", "192.0.2.1"];
        assert_eq!(chosen(Some("10.43.0.10"), &all).as_deref(), Some("192.0.2.1"));
        assert_eq!(chosen(None, &["::1", "fe80::1", "fd91::1"]).as_deref(), Some("fd91::1"));
        assert_eq!(chosen(Some("::1"), &["::1"]), None);
    }
}
