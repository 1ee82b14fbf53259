//! What the node's own namespace needs once: forwarding, a route to the Services, the DNS address.

use std::net::IpAddr;

use ipnet::IpNet;

use super::NetworkError;
use super::config::NetworkConfig;
use super::netlink::message::Batch;
use super::netlink::route::{Link, Route, SCOPE_HOST};
use super::netlink::{NetlinkError, Socket};
use super::sysctl::Sysctls;

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
    for cidr in &config.service_cidrs {
        let source = config.node_ips.iter().copied().find(|ip| same_family(*ip, *cidr) && is_local(&addresses, *ip));
        batch.add_route(&Route { source, ..Route::by(loopback.index, *cidr) });
    }
    socket.apply(&mut batch)?;
    Ok(HostFacts { mtu: pod_mtu(config, &links, &addresses) })
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
