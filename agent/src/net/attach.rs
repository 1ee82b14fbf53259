//! One pod's link: a routed veth pair with host addresses.
//!
//! The pod has `<ip>/32` on `eth0` and one route, to everything, by a link-local gateway that is the node's end of the
//! pair; the node has a route to the pod's address by its end. Both ends know each other's hardware address, so there
//! is no ARP, no neighbour discovery and no bridge.
//!
//! Everything here blocks and [`join`] changes the calling thread's namespace for good: it runs on a thread of its own,
//! which ends with it.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns};

use super::NetworkError;
use super::names::{POD_GATEWAY_V4, POD_GATEWAY_V6, POD_LINK};
use super::netlink::message::Batch;
use super::netlink::route::{Mac, Route, SCOPE_UNIVERSE, Veth};
use super::netlink::{NetlinkError, Socket};

/// `IPV4_DEVCONF_RP_FILTER`.
pub(super) const RP_FILTER: u16 = 8;
/// `IPV4_DEVCONF_ROUTE_LOCALNET`.
const ROUTE_LOCALNET: u16 = 26;
/// `IPV4_DEVCONF_SEND_REDIRECTS`.
const SEND_REDIRECTS: u16 = 6;
/// On the node's end: pods cannot send from foreign addresses; node ports answer on 127.0.0.1; a pod that reaches
/// another one by the node is not told of a shorter way.
const NODE_SIDE: [(u16, u32); 3] = [(RP_FILTER, 1), (ROUTE_LOCALNET, 1), (SEND_REDIRECTS, 0)];

/// How long a new pair may take until both sides carry packets, and how often it is looked at.
const CARRIER_WITHIN: Duration = Duration::from_secs(1);
const CARRIER_POLL: Duration = Duration::from_millis(1);

/// What a pod's link looks like.
#[derive(Debug, Clone)]
pub struct PodLink {
    /// Name on the node's side.
    pub name: String,
    /// Owner, for the eye and for the teardown.
    pub alias: String,
    /// Hardware address on the node's side.
    pub node_mac: Mac,
    /// Hardware address on the pod's side.
    pub pod_mac: Mac,
    /// Addresses of the pod.
    pub ips: Vec<IpAddr>,
    /// MTU of both sides.
    pub mtu: u32,
}

impl PodLink {
    fn has_ipv6(&self) -> bool {
        self.ips.iter().any(IpAddr::is_ipv6)
    }
}

/// Makes the link and configures both sides; mends one that is there. Leaves the calling thread in the pod's namespace.
pub fn join(link: &PodLink, netns: &Path) -> Result<(), NetworkError> {
    let namespace = |source: std::io::Error| NetworkError::Namespace { path: netns.to_owned(), source };
    let pod = File::open(netns).map_err(namespace)?;
    let mut node = Socket::route().map_err(NetlinkError::from)?;
    create(&mut node, link, &pod)?;
    node_side(&mut node, link)?;
    setns(&pod, CloneFlags::CLONE_NEWNET).map_err(|errno| namespace(errno.into()))?;
    match pod_side(link) {
        Ok(()) => {}
        // The pair exists and its other end is elsewhere: it is a former sandbox's.
        Err(NetlinkError::Answer(_)) => {
            remove(&mut node, &link.name)?;
            create(&mut node, link, &pod)?;
            node_side(&mut node, link)?;
            pod_side(link)?;
        }
        Err(error) => return Err(error.into()),
    }
    Ok(await_carrier(&mut node, &link.name)?)
}

/// The kernel tells the side that was up first by a task of its own; what is sent there before is lost without a word. (To
/// ask for the link makes newer kernels deal with the news at once.) One that takes long is not waited for.
fn await_carrier(node: &mut Socket, name: &str) -> Result<(), NetlinkError> {
    let deadline = Instant::now() + CARRIER_WITHIN;
    while node.link(name)?.is_some_and(|link| !link.works) && Instant::now() < deadline {
        std::thread::sleep(CARRIER_POLL);
    }
    Ok(())
}

/// Removes the link; one that is gone already is fine.
pub fn remove(node: &mut Socket, name: &str) -> Result<(), NetlinkError> {
    let mut batch = Batch::new();
    batch.delete_link(name);
    node.apply(&mut batch)
}

fn create(node: &mut Socket, link: &PodLink, pod: &File) -> Result<(), NetlinkError> {
    let mut batch = Batch::new();
    batch.add_veth(&Veth {
        name: &link.name,
        alias: &link.alias,
        mac: link.node_mac,
        peer_name: POD_LINK,
        peer_mac: link.pod_mac,
        peer_netns: pod.as_raw_fd(),
        mtu: link.mtu,
    });
    match node.apply(&mut batch) {
        Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

fn node_side(node: &mut Socket, link: &PodLink) -> Result<(), NetlinkError> {
    let Some(found) = node.link(&link.name)? else { return Err(NetlinkError::Answer("create the veth pair")) };
    let mut batch = Batch::new();
    if found.alias != link.alias {
        batch.set_alias(found.index, &link.alias);
    }
    batch.set_up(found.index, &NODE_SIDE, link.has_ipv6());
    for ip in &link.ips {
        batch.add_neighbour(found.index, *ip, link.pod_mac);
        batch.add_route(&Route::by(found.index, IpNet::from(*ip)));
    }
    node.apply(&mut batch)
}

/// Runs in the pod's namespace.
fn pod_side(link: &PodLink) -> Result<(), NetlinkError> {
    let mut pod = Socket::route()?;
    let Some(found) = pod.link(POD_LINK)? else { return Err(NetlinkError::Answer("find the pod's link")) };
    let Some(loopback) = pod.link("lo")? else { return Err(NetlinkError::Answer("find the loopback link")) };
    let mut batch = Batch::new();
    batch.set_up(loopback.index, &[], true);
    batch.set_up(found.index, &[], link.has_ipv6());
    for ip in &link.ips {
        let gateway = if ip.is_ipv4() { POD_GATEWAY_V4 } else { POD_GATEWAY_V6 };
        let everything = IpNet::new_assert(if ip.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() }, 0);
        batch.add_address(found.index, IpNet::from(*ip), SCOPE_UNIVERSE);
        batch.add_neighbour(found.index, gateway, link.node_mac);
        batch.add_route(&Route { via: Some(gateway), source: Some(*ip), ..Route::by(found.index, everything) });
    }
    pod.apply(&mut batch)
}
