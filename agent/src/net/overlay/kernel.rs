//! The overlay's hand on the kernel: looks at what there is and changes what differs.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::super::attach::RP_FILTER;
use super::super::host;
use super::super::names;
use super::super::netlink::message::Batch;
use super::super::netlink::route::{Route, SCOPE_UNIVERSE};
use super::super::netlink::vxlan::Vxlan;
use super::super::netlink::{NetlinkError, Socket};
use super::plan::{Desired, Link, Own, Underlay, is_overlay_route, is_same};

/// A packet that came through the overlay has a source that would be answered through it.
const LINK_SETTINGS: [(u16, u32); 1] = [(RP_FILTER, 1)];

/// Something that the kernel did not do, and what would help.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// What could not be done and what the kernel said.
    pub what: String,
    /// What to do about it.
    pub remedy: &'static str,
}

/// What a look at the kernel and the changes after it have brought.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Number of changes.
    pub changes: usize,
    /// What remains to be done.
    pub refusals: BTreeSet<Refusal>,
    /// The links that are there, by their index.
    pub links: BTreeMap<Underlay, u32>,
}

/// The routes and links of the namespace in which it was opened.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    clusters: Vec<IpNet>,
}

impl Kernel {
    /// `clusters` are the ranges in which the overlay's routes lie.
    ///
    /// # Errors
    /// No netlink socket.
    pub fn open(clusters: Vec<IpNet>) -> std::io::Result<Self> {
        Ok(Self { socket: Socket::route()?, clusters })
    }

    /// How the kernel names this socket in notifications.
    pub fn port(&self) -> std::io::Result<u32> {
        self.socket.port()
    }

    /// The node's addresses with the MTU of the links that they are on now.
    pub fn addresses(&mut self, node_ips: &[IpAddr]) -> Result<Vec<(IpAddr, u32)>, NetlinkError> {
        let (links, found) = (self.socket.links()?, self.socket.addresses()?);
        Ok(node_ips.iter().map(|ip| (*ip, host::underlay_mtu(&links, &found, *ip))).collect())
    }

    /// Makes the kernel hold what is desired and nothing else of ours. What it refuses does not keep the rest back.
    ///
    /// # Errors
    /// The kernel could not be looked at.
    pub fn sync(&mut self, own: &Own, desired: &Desired) -> Result<Outcome, NetlinkError> {
        let mut outcome = Outcome::default();
        let mut indexes = BTreeMap::new();
        for underlay in Underlay::ALL {
            let name = names::overlay_link(&own.instance_id, underlay.is_ipv6());
            if let Some(index) = self.link(&name, desired.links.get(&underlay), &mut outcome)? {
                indexes.insert(underlay, index);
            }
        }
        for (underlay, index) in &indexes {
            if let Some(link) = desired.links.get(underlay) {
                self.entries(*index, link, &mut outcome)?;
            }
        }
        self.routes(&desired.routes(own, &indexes), &mut outcome)?;
        outcome.links = indexes;
        Ok(outcome)
    }

    /// Brings one link into being, as it should be, or out of it. Its index when it is there.
    fn link(&mut self, name: &str, wanted: Option<&Link>, outcome: &mut Outcome) -> Result<Option<u32>, NetlinkError> {
        let mut found = self.socket.vxlan(name)?;
        if found.as_ref().is_some_and(|found| wanted.is_none_or(|wanted| !is_usable(&found.vxlan, &wanted.vxlan))) {
            let mut batch = Batch::new();
            batch.delete_link(name);
            self.change(&mut batch, "", outcome)?;
            found = None;
        }
        let Some(wanted) = wanted else { return Ok(None) };
        if found.is_none() {
            let mut batch = Batch::new();
            batch.add_vxlan(&wanted.vxlan);
            self.change(
                &mut batch,
                "modprobe vxlan, or CONFIG_VXLAN; if the link or its network exists, another instance or program on this machine has it",
                outcome,
            )?;
            found = self.socket.vxlan(name)?;
        }
        let Some(found) = found else { return Ok(None) };
        let mut batch = Batch::new();
        if found.vxlan.alias != wanted.vxlan.alias {
            batch.set_alias(found.index, &wanted.vxlan.alias);
        }
        if found.vxlan.mtu != wanted.vxlan.mtu {
            batch.set_mtu(found.index, wanted.vxlan.mtu);
        }
        if !found.is_up {
            batch.set_up(found.index, &LINK_SETTINGS, false);
        }
        self.change(&mut batch, "", outcome)?;
        Ok(Some(found.index))
    }

    /// Addresses, neighbours and forwarding entries of a link.
    fn entries(&mut self, index: u32, wanted: &Link, outcome: &mut Outcome) -> Result<(), NetlinkError> {
        let addresses = self.socket.addresses()?;
        let addresses: BTreeSet<IpAddr> = addresses.iter().filter(|(on, _)| *on == index).map(|(_, ip)| *ip).collect();
        let neighbours: BTreeMap<_, _> = self.socket.neighbours(index)?.into_iter().collect();
        let forwarding = self.socket.forwarding(index)?;
        let mut batch = Batch::new();
        for ip in addresses.difference(&wanted.addresses) {
            batch.delete_address(index, IpNet::from(*ip));
        }
        for (ip, _) in neighbours.iter().filter(|(ip, _)| !wanted.neighbours.contains_key(*ip)) {
            batch.delete_neighbour(index, *ip);
        }
        for (ip, mac) in forwarding.iter().filter(|(ip, mac)| wanted.forwarding.get(mac) != Some(ip)) {
            batch.delete_forwarding(index, *mac, *ip);
        }
        for ip in wanted.addresses.difference(&addresses) {
            batch.add_address(index, IpNet::from(*ip), SCOPE_UNIVERSE);
        }
        for (mac, ip) in wanted.forwarding.iter().filter(|(mac, ip)| !forwarding.contains(&(**ip, **mac))) {
            batch.add_forwarding(index, *mac, *ip);
        }
        for (ip, mac) in wanted.neighbours.iter().filter(|(ip, mac)| neighbours.get(*ip) != Some(*mac)) {
            batch.add_neighbour(index, *ip, *mac);
        }
        self.change(&mut batch, "", outcome)
    }

    fn routes(&mut self, wanted: &[Route], outcome: &mut Outcome) -> Result<(), NetlinkError> {
        let found = self.socket.own_routes()?;
        let ours = found.iter().filter(|route| is_overlay_route(route, &self.clusters));
        let mut batch = Batch::new();
        // What is in the way of another goes first.
        for stale in ours.filter(|route| !wanted.iter().any(|wanted| is_same(route, wanted))) {
            batch.delete_route(&if stale.unreachable { Route::nowhere(stale.to) } else { *stale });
        }
        self.change(&mut batch, "", outcome)?;
        for route in wanted.iter().filter(|wanted| !found.iter().any(|found| is_same(found, wanted))) {
            let mut batch = Batch::new();
            batch.add_route(route);
            let remedy = if route.device == 0 && route.via.is_some() {
                "host-gw needs all nodes on one L2 segment; use --flannel-backend=vxlan"
            } else {
                ""
            };
            let mut one = Outcome::default();
            self.change(&mut batch, remedy, &mut one)?;
            outcome.changes += one.changes;
            let to = |refusal: Refusal| Refusal { what: format!("{} to {}", refusal.what, describe(route)), ..refusal };
            outcome.refusals.extend(one.refusals.into_iter().map(to));
        }
        Ok(())
    }

    fn change(&mut self, batch: &mut Batch, remedy: &'static str, outcome: &mut Outcome) -> Result<(), NetlinkError> {
        let refused = self.socket.transact(batch)?;
        outcome.changes += batch.len() - refused.len();
        outcome.refusals.extend(
            refused.into_iter().map(|refusal| Refusal { what: format!("{}: {refusal}", refusal.step), remedy }),
        );
        Ok(())
    }

    /// Takes the overlay's routes out of the kernel; its links are deleted with the instance's other links.
    ///
    /// # Errors
    /// The kernel could not be looked at.
    pub fn remove_routes(&mut self) -> Result<(), NetlinkError> {
        self.routes(&[], &mut Outcome::default())
    }
}

fn describe(route: &Route) -> String {
    match route.via {
        Some(via) => format!("{} by {via}", route.to),
        None => route.to.to_string(),
    }
}

/// Whether a link that exists can become the wanted one: the rest can be changed.
fn is_usable(found: &Vxlan, wanted: &Vxlan) -> bool {
    let fixed = |link: &Vxlan| (link.mac, link.vni, link.port, link.local);
    fixed(found) == fixed(wanted)
}
