//! What the node's own namespace needs once: forwarding, a route to the Services, the DNS address.

use std::net::IpAddr;

use ipnet::IpNet;

use super::config::NetworkConfig;
use super::netlink::message::Batch;
use super::netlink::route::{Link, Route, SCOPE_HOST, Veth};
use super::netlink::{NetlinkError, Socket};
use super::sysctl::Sysctls;
use super::{NetworkError, names};

/// Of a node whose link is not found.
const ETHERNET: u32 = 1500;
/// Less than this cannot carry IPv4 (RFC 791: every host takes as much).
const SMALLEST_V4: u32 = 576;
/// Less than this cannot carry IPv6 (RFC 8200 section 5).
const SMALLEST_V6: u32 = 1280;
const LOOPBACK: &str = "lo";

/// What pods need to know of the node.
#[derive(Debug, Clone, Copy)]
pub struct HostFacts {
    /// MTU of pod links.
    pub mtu: u32,
}

/// Name of the file below `DATA/agent` that remembers changed settings.
pub const SYSCTL_FILE: &str = "sysctl.json";

/// Prepares the namespace of the calling thread. Can be repeated.
pub fn prepare(config: &NetworkConfig) -> Result<HostFacts, NetworkError> {
    let sysctls = Sysctls::new(config.agent_dir.join(SYSCTL_FILE));
    sysctls.set("net/ipv4/ip_forward", "1")?;
    if config.cluster_cidrs.iter().any(|cidr| cidr.addr().is_ipv6()) {
        keep_advertised_routes(&sysctls)?;
        sysctls.set("net/ipv6/conf/all/forwarding", "1")?;
    }
    let mut socket = Socket::route().map_err(NetlinkError::from)?;
    let links = socket.links()?;
    let addresses = socket.addresses()?;
    let Some(loopback) = links.iter().find(|link| link.name == LOOPBACK) else {
        return Err(NetlinkError::Answer("list the links").into());
    };
    let mut batch = Batch::new();
    batch.set_up(loopback.index, &[], true);
    for dns in &config.cluster_dns {
        // Scope host: never chosen as source of what the node sends elsewhere.
        batch.add_address(loopback.index, IpNet::from(*dns), SCOPE_HOST);
    }
    socket.apply(&mut batch)?;
    let sink = services_link(&mut socket, config, loopback.index)?;
    let mut batch = Batch::new();
    for cidr in &config.service_cidrs {
        let source = config.node_ips.iter().copied().find(|ip| same_family(*ip, *cidr) && is_local(&addresses, *ip));
        let device = if cidr.addr().is_ipv6() { sink } else { loopback.index };
        batch.add_route(&Route { source, ..Route::by(device, *cidr) });
    }
    socket.apply(&mut batch)?;
    Ok(HostFacts { mtu: pod_mtu(config, &links, &addresses) })
}

/// Where routes to IPv6 Services lead: packets are rewritten or refused before they get there. Linux makes routes to
/// the loopback link unreachable ones for IPv6 (`fib6_is_reject`), so it is a link of its own, of the kind that there is
/// wherever there are pods.
fn services_link(socket: &mut Socket, config: &NetworkConfig, loopback: u32) -> Result<u32, NetworkError> {
    use std::os::fd::AsRawFd;
    if !config.service_cidrs.iter().any(|cidr| cidr.addr().is_ipv6()) {
        return Ok(loopback);
    }
    let [name, other] = names::services_links(&config.instance_id);
    let path = std::path::PathBuf::from("/proc/thread-self/ns/net");
    let here = std::fs::File::open(&path).map_err(|source| NetworkError::Namespace { path, source })?;
    if socket.link(&name)?.is_none() {
        let (mac, peer_mac) = names::macs(&config.instance_id, "services");
        let mut batch = Batch::new();
        batch.add_veth(&Veth {
            name: &name,
            alias: &names::link_alias(&config.instance_id, "services"),
            mac,
            peer_name: &other,
            peer_mac,
            peer_netns: here.as_raw_fd(),
            mtu: ETHERNET,
        });
        socket.apply(&mut batch)?;
    }
    let (Some(link), Some(other)) = (socket.link(&name)?, socket.link(&other)?) else {
        return Err(NetlinkError::Answer("create the link of Services").into());
    };
    let mut batch = Batch::new();
    batch.set_alias(link.index, &names::link_alias(&config.instance_id, "services"));
    batch.set_up(link.index, &[], false);
    batch.set_up(other.index, &[], false);
    socket.apply(&mut batch)?;
    Ok(link.index)
}

/// A machine that forwards IPv6 ignores router advertisements, and with them its own default route, where `accept_ra` is
/// 1; at 2 it does not (Documentation/networking/ip-sysctl.rst).
fn keep_advertised_routes(sysctls: &Sysctls) -> Result<(), NetworkError> {
    let Ok(links) = std::fs::read_dir("/proc/sys/net/ipv6/conf") else { return Ok(()) };
    for name in links.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()) {
        let setting = format!("net/ipv6/conf/{name}/accept_ra");
        let accepts = std::fs::read_to_string(format!("/proc/sys/{setting}")).is_ok_and(|value| value.trim() == "1");
        // Links of pods inherit "default": no pod may tell the node a route.
        let machines = !["all", "default", LOOPBACK].contains(&name.as_str());
        if accepts && machines && !name.starts_with(names::LINK_PREFIX) {
            sysctls.set(&setting, "2")?;
        }
    }
    Ok(())
}

/// What the smallest of the node's ways to other nodes carries.
fn pod_mtu(config: &NetworkConfig, links: &[Link], addresses: &[(u32, IpAddr)]) -> u32 {
    let of = |ip: &IpAddr| underlay_mtu(links, addresses, *ip).saturating_sub(config.backend.overhead(ip.is_ipv6()));
    let mtu = config.node_ips.iter().map(of).min().unwrap_or(ETHERNET);
    let ipv6 = config.cluster_cidrs.iter().any(|cidr| cidr.addr().is_ipv6());
    mtu.max(if ipv6 { SMALLEST_V6 } else { SMALLEST_V4 })
}

/// MTU of the link that has an address.
pub fn underlay_mtu(links: &[Link], addresses: &[(u32, IpAddr)], ip: IpAddr) -> u32 {
    let device = addresses.iter().find(|(_, found)| *found == ip).map(|(device, _)| *device);
    let link = links.iter().find(|link| Some(link.index) == device && link.name != LOOPBACK);
    link.map_or(ETHERNET, |link| link.mtu)
}

fn same_family(ip: IpAddr, cidr: IpNet) -> bool {
    ip.is_ipv4() == cidr.addr().is_ipv4()
}

fn is_local(addresses: &[(u32, IpAddr)], ip: IpAddr) -> bool {
    !ip.is_loopback() && addresses.iter().any(|(_, found)| *found == ip)
}

/// Takes back what [`prepare`] did in the namespace of the calling thread. Gathers errors.
pub fn restore(agent_dir: &std::path::Path, service_cidrs: &[IpNet], cluster_dns: &[IpAddr]) -> Vec<NetworkError> {
    let mut errors = Sysctls::new(agent_dir.join(SYSCTL_FILE)).restore();
    let undo = || -> Result<(), NetworkError> {
        let mut socket = Socket::route().map_err(NetlinkError::from)?;
        let Some(loopback) = socket.link(LOOPBACK)? else { return Ok(()) };
        let mut batch = Batch::new();
        for cidr in service_cidrs {
            batch.delete_route(&Route::by(loopback.index, *cidr));
        }
        for dns in cluster_dns {
            batch.delete_address(loopback.index, IpNet::from(*dns));
        }
        Ok(socket.apply(&mut batch)?)
    };
    errors.extend(undo().err());
    errors
}
