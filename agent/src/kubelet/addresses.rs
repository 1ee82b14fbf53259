//! Which addresses of the machine a node without `--node-ip` registers.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use ipnet::IpNet;

/// The address that the default route uses; without one the first global address, then the first of all. Addresses in
/// `ours` (pods, Services, the cluster DNS on `lo`) are no addresses of the machine.
pub fn default_addresses(ours: &[IpNet]) -> Vec<IpAddr> {
    let foreign = |ip: Ipv4Addr| !ours.iter().any(|range| range.contains(&IpAddr::V4(ip)));
    routed()
        .filter(|ip| foreign(*ip))
        .or_else(|| first(|ip| foreign(ip) && !ip.is_loopback() && !ip.is_link_local()))
        .or_else(|| first(foreign))
        .into_iter()
        .map(IpAddr::V4)
        .collect()
}

/// A connected datagram socket has the source address that packets would have; none is sent.
fn routed() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V4(ip) if !ip.is_loopback() && !ip.is_unspecified() => Some(ip),
        _ => None,
    }
}

fn first(accept: impl Fn(Ipv4Addr) -> bool) -> Option<Ipv4Addr> {
    nix::ifaddrs::getifaddrs().ok()?.find_map(|interface| {
        let ip = interface.address?.as_sockaddr_in()?.ip();
        accept(ip).then_some(ip)
    })
}
