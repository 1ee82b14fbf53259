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
//!
//! | task | owns | lives |
//! | --- | --- | --- |
//! | thread `overlay` | nodes and netlink socket | until every sender is gone |
//! | thread `overlay-changes` | a listening socket | some seconds longer |

pub mod backend;
pub mod kernel;
pub mod plan;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

pub use backend::{Backend, BackendError};

use super::config::NetworkConfig;
use super::mailbox::{Inbox, Mailbox, Nothing, mailbox};
use super::names;
use super::netlink::changes;
use super::netlink::route::{Notice, notice};
use super::netlink::{NetlinkError, Socket};
use super::nodes::Node;
use crate::watch::Event;
use kernel::{Kernel, Outcome, Refusal};
use plan::{Desired, Own};

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
/// Nodes were listed.
///
/// # Errors
/// No netlink socket or no thread.
pub(super) fn start(config: &NetworkConfig) -> std::io::Result<Mailbox<Input>> {
    let (sender, inbox) = mailbox();
    let kernel = Kernel::open(config.cluster_cidrs.clone())?;
    let own_port = kernel.port()?;
    let relevant = move |kind, port, payload: &[u8]| port != own_port && is_relevant(notice(kind, payload));
    changes::listen(
        "overlay-changes",
        Socket::route()?,
        &changes::ROUTE_GROUPS,
        move |header, payload| relevant(header.kind, header.port, payload),
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
        nodes: BTreeMap::new(),
        unseen: None,
        listed: false,
        told: BTreeSet::new(),
        retry: None,
        #[cfg(test)]
        barriers: Vec::new(),
    };
    std::thread::Builder::new().name("overlay".into()).spawn(move || worker.run(&inbox))?;
    Ok(sender)
}

/// Links of pods come and go, with their own routes and neighbours; all else may be the overlay's.
fn is_relevant(notice: Option<Notice>) -> bool {
    match notice {
        Some(Notice::Link(link)) => !link.name.starts_with(names::LINK_PREFIX),
        Some(Notice::RouteGone(route)) => route.to.prefix_len() < route.to.max_prefix_len(),
        Some(Notice::Address | Notice::NeighbourGone) => true,
        None => false,
    }
}

struct Worker {
    own: Own,
    node_ips: Vec<IpAddr>,
    kernel: Kernel,
    nodes: BTreeMap<String, Node>,
    /// Nodes that the list in progress has not shown yet.
    unseen: Option<BTreeSet<String>>,
    /// All nodes were listed once.
    listed: bool,
    /// What the log has been told of and is still so.
    told: BTreeSet<Refusal>,
    /// When to look again although nothing is new.
    retry: Option<Duration>,
    #[cfg(test)]
    barriers: Vec<std::sync::mpsc::Sender<BTreeSet<Refusal>>>,
}

impl Worker {
    fn run(mut self, inbox: &Inbox<Input>) {
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

    fn try_sync(&mut self) -> Result<(Desired, Outcome), NetlinkError> {
        self.own.addresses = self.kernel.addresses(&self.node_ips)?;
        let desired = plan::desired(&self.own, &self.nodes);
        let outcome = self.kernel.sync(&self.own, &desired)?;
        Ok((desired, outcome))
    }
}
