//! Pods of different nodes: from Node objects to routes, and with VXLAN to a link, neighbours and forwarding entries.
//!
//! Every node works out the same facts from the same objects: a node's hardware address follows from its name, its
//! address on the overlay is the first of its range. Nothing is learnt from packets and nobody is asked.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`backend`] | `--flannel-backend` |
//! | [`plan`] | what the kernel is to hold (pure) |
//! | [`kernel`] | the difference to what it holds, and the changes |
//! | [`probe`] | whether packets get through |
//!
//! | task | owns | lives |
//! | --- | --- | --- |
//! | thread `overlay` | nodes and netlink socket | until every sender is gone |
//! | thread `overlay-changes` | a listening socket | some seconds longer |
//! | thread `overlay-probe` | peers that are to be asked | from the first peer on, as long as the thread |

pub mod backend;
pub mod kernel;
pub mod plan;
pub mod probe;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use backend::{Backend, BackendError};

use super::config::NetworkConfig;
use super::contain::contain;
use super::mailbox::{Inbox, Mailbox, Nothing, mailbox};
use super::names;
use super::netlink::changes;
use super::netlink::route::{Notice, notice};
use super::netlink::{NetlinkError, Socket};
use super::nodes::Node;
use crate::watch::Event;
use kernel::{Kernel, Outcome, Refusal};
use plan::{Desired, Own, Underlay};
use probe::Peer;

/// A look at the kernel begins when nothing new came for so long …
const QUIET: Duration = Duration::from_millis(10);
/// … or so long after the first news.
const LATEST: Duration = Duration::from_millis(100);
/// First and longest pause after something was refused.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What the thread is told.
#[derive(Debug, Clone)]
pub(super) enum Input {
    /// From the watch of Nodes.
    Node(Event),
    /// Somebody changed links, addresses or routes.
    Disturbed,
    /// Answer when everything said before is in the kernel.
    #[cfg(test)]
    Barrier(std::sync::mpsc::Sender<BTreeSet<Refusal>>),
}

/// Starts the thread, in the namespace of the calling one; it ends when the mailbox is gone. Nothing changes until all
/// Nodes were listed. `relist` has them listed anew, after a panic.
///
/// # Errors
/// No netlink socket or no thread.
pub(super) fn start(config: &NetworkConfig, relist: Box<dyn Fn() + Send>) -> std::io::Result<Mailbox<Input>> {
    let (sender, inbox) = mailbox();
    let kernel = Kernel::open(config.cluster_cidrs.clone())?;
    let own_port = kernel.port()?;
    let devices = Devices::default();
    let watched = devices.clone();
    changes::listen(
        "overlay-changes",
        Socket::route()?,
        &changes::ROUTE_GROUPS,
        move |header, payload| header.port != own_port && is_relevant(notice(header.kind, payload), &watched),
        sender.informer(),
        Input::Disturbed,
    )?;
    let own = Own {
        instance_id: config.instance_id.clone(),
        node_name: config.node_name.clone(),
        addresses: Vec::new(),
        backend: config.backend,
    };
    let worker = Worker {
        own,
        node_ips: config.node_ips.clone(),
        kernel,
        devices,
        nodes: BTreeMap::new(),
        unseen: None,
        listed: false,
        told: BTreeSet::new(),
        retry: None,
        relist,
        probe: None,
        #[cfg(test)]
        barriers: Vec::new(),
    };
    std::thread::Builder::new()
        .name("overlay".into())
        .spawn(move || contain("overlay", worker, |worker| worker.run(&inbox), Worker::recover))?;
    Ok(sender)
}

/// Indexes of the overlay's links, 0 for none.
type Devices = Arc<[AtomicU32; 2]>;

/// Links of pods come and go, with their own routes; neighbours of machines do. All else may be the overlay's.
fn is_relevant(notice: Option<Notice>, devices: &Devices) -> bool {
    match notice {
        Some(Notice::Link(link)) => !link.name.starts_with(names::LINK_PREFIX),
        Some(Notice::RouteGone(route)) => route.to.prefix_len() < route.to.max_prefix_len(),
        Some(Notice::Address) => true,
        Some(Notice::NeighbourGone(from)) => devices.iter().any(|device| device.load(Ordering::Relaxed) == from),
        None => false,
    }
}

struct Worker {
    own: Own,
    node_ips: Vec<IpAddr>,
    kernel: Kernel,
    /// Shared with the thread that listens.
    devices: Devices,
    nodes: BTreeMap<String, Node>,
    /// Nodes that the list in progress has not shown yet.
    unseen: Option<BTreeSet<String>>,
    /// All nodes were listed once.
    listed: bool,
    /// What the log has been told of and is still so.
    told: BTreeSet<Refusal>,
    /// When to look again although nothing is new.
    retry: Option<Duration>,
    /// Has the nodes listed anew.
    relist: Box<dyn Fn() + Send>,
    /// Asks new peers; started with the first one.
    probe: Option<Mailbox<BTreeSet<Peer>>>,
    #[cfg(test)]
    barriers: Vec<std::sync::mpsc::Sender<BTreeSet<Refusal>>>,
}

impl Worker {
    /// The event that was being taken is lost, and so the nodes are not all known.
    fn recover(&mut self) {
        self.unseen = None;
        self.retry = Some(RETRY.0);
        (self.relist)();
    }

    fn run(&mut self, inbox: &Inbox<Input>) {
        loop {
            match inbox.receive(self.retry) {
                Ok(input) => self.take(input),
                Err(Nothing::Yet) => {}
                Err(Nothing::Ever) => return,
            }
            if !inbox.coalesce(QUIET, LATEST, |input| self.take(input)) {
                return;
            }
            if self.listed {
                self.sync();
                #[cfg(test)]
                self.barriers.drain(..).for_each(|barrier| drop(barrier.send(self.told.clone())));
            }
        }
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Node(event) => self.node(event),
            Input::Disturbed => {}
            #[cfg(test)]
            Input::Barrier(sender) => self.barriers.push(sender),
        }
    }

    fn node(&mut self, event: Event) {
        match event {
            Event::Restarted => self.unseen = Some(self.nodes.keys().cloned().collect()),
            Event::Synced => {
                self.listed = true;
                for name in self.unseen.take().unwrap_or_default() {
                    self.nodes.remove(&name);
                }
            }
            Event::Applied(object) => {
                if let Some(unseen) = &mut self.unseen {
                    unseen.remove(&object.name);
                }
                match Node::parse(&object.json) {
                    Ok(node) => drop(self.nodes.insert(object.name, node)),
                    Err(error) => tracing::warn!(node = object.name, %error, "cannot read Node"),
                }
            }
            Event::Deleted(object) => drop(self.nodes.remove(&object.name)),
        }
    }

    /// Brings the kernel to what the nodes say.
    fn sync(&mut self) {
        let refusals = match self.try_sync() {
            Ok((desired, outcome)) => {
                if outcome.changes > 0 {
                    self.probe(&desired);
                    tracing::info!(
                        nodes = self.nodes.len(),
                        ways = desired.ways.len(),
                        changes = outcome.changes,
                        "routes to pods of other nodes follow the nodes"
                    );
                }
                let unreachable = desired.unreachable.into_iter().map(|(node, range, why)| Refusal {
                    what: format!("no way to {range} of node {node}: {why}"),
                    remedy: "",
                });
                outcome.refusals.into_iter().chain(unreachable).collect()
            }
            Err(error) => BTreeSet::from([Refusal { what: super::describe(&error), remedy: "" }]),
        };
        for new in refusals.difference(&self.told) {
            tracing::error!(what = new.what, remedy = new.remedy, "pods of other nodes cannot all be reached");
        }
        self.retry = match (refusals.is_empty(), self.retry) {
            (true, _) => None,
            (false, Some(last)) => Some((last * 2).min(RETRY.1)),
            (false, None) => Some(RETRY.0),
        };
        self.told = refusals;
    }

    /// Has the other nodes asked whether packets get through.
    fn probe(&mut self, desired: &Desired) {
        let peers = desired.peers(&self.nodes);
        if self.probe.is_none() && !peers.is_empty() {
            match probe::start() {
                Ok(mailbox) => self.probe = Some(mailbox),
                Err(error) => tracing::warn!(%error, "cannot ask other nodes whether packets get through"),
            }
        }
        if let Some(mailbox) = &self.probe {
            mailbox.tell(peers);
        }
    }

    fn try_sync(&mut self) -> Result<(Desired, Outcome), NetlinkError> {
        self.own.addresses = self.kernel.addresses(&self.node_ips)?;
        let desired = plan::desired(&self.own, &self.nodes);
        let outcome = self.kernel.sync(&self.own, &desired)?;
        for (device, underlay) in self.devices.iter().zip(Underlay::ALL) {
            device.store(outcome.links.get(&underlay).copied().unwrap_or_default(), Ordering::Relaxed);
        }
        Ok((desired, outcome))
    }
}
