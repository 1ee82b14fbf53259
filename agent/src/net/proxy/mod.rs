//! The service proxy: Services and EndpointSlices in, nftables out.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`model`] | what is kept of the API objects |
//! | [`desired`] | what one Service wants in the kernel (pure) |
//! | [`plan`] | the state of all, and the difference to the kernel's (pure) |
//! | [`tables`] | the fixed maps, chains and rules |
//! | [`health`] | `healthCheckNodePort` |
//! | [`kernel`] | transactions on the tables of this instance |
//!
//! | task | owns | lives |
//! | --- | --- | --- |
//! | thread `service-proxy` | plan and netlink socket | until every sender is gone |
//! | thread `nftables-changes` | a listening socket | with tables that others can flush |
//! | task | listeners for health checks | as long as the thread |

pub mod desired;
#[cfg(test)]
mod golden;
pub mod health;
pub mod kernel;
pub mod model;
pub mod plan;
pub mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::config::NetworkConfig;
use super::contain::contain;
use super::mailbox::{Inbox, Informer, Mailbox, Nothing, mailbox};
use super::netlink::{Socket, changes};
use super::nft::{self, Family};
use crate::watch::Event;
use desired::NodeFacts;
use kernel::Kernel;
use model::{Key, Service, Slice};
use plan::{LocalPod, Plan};
use tables::Settings;

/// A sync begins when nothing new came for so long …
const QUIET: Duration = Duration::from_millis(4);
/// … or so long after the first change.
const LATEST: Duration = Duration::from_millis(25);
/// Pause after the kernel refused a rebuild.
const RETRY: Duration = Duration::from_secs(1);

/// What the proxy's thread is told.
#[derive(Debug, Clone)]
pub(super) enum Input {
    /// From the watch of Services.
    Service(Event),
    /// From the watch of EndpointSlices.
    Slice(Event),
    /// A pod was attached or (`None`) detached.
    Pod(String, Option<LocalPod>),
    /// The zone that this node is in.
    Zone(Option<String>),
    /// API servers that this node cannot reach.
    Lost(BTreeSet<SocketAddr>),
    /// Another program changed our tables.
    Disturbed,
    /// Tables that others can flush, as on kernels before 6.9.
    #[cfg(test)]
    Unprotected,
    /// Something that nobody thought of.
    #[cfg(test)]
    Panic,
    /// Answer when everything said before is in the kernel.
    #[cfg(test)]
    Barrier(std::sync::mpsc::Sender<Option<String>>),
}

/// Starts the proxy's thread; it ends when the sender is gone. Nothing changes in a table from before until all
/// Services and EndpointSlices were listed. `relist` has them listed anew, after a panic.
pub(super) fn start(
    config: &NetworkConfig,
    health: tokio::sync::watch::Sender<health::Health>,
    relist: Box<dyn Fn() + Send>,
) -> std::io::Result<Mailbox<Input>> {
    let (sender, inbox) = mailbox();
    let kernel = Kernel::open(super::names::table(&config.instance_id), settings(config))?;
    let facts = NodeFacts {
        families: families(config),
        cluster_dns: config.cluster_dns.clone(),
        name: config.node_name.clone(),
        zone: None,
    };
    let worker = Worker {
        plan: Plan::new(facts),
        kernel,
        node_name: config.node_name.clone(),
        listed: Listed::default(),
        servers: BTreeMap::new(),
        lost: BTreeSet::new(),
        built: false,
        #[cfg(test)]
        barriers: Vec::new(),
        health,
        refused: None,
        relist,
        informer: Some(sender.informer()),
    };
    std::thread::Builder::new()
        .name("service-proxy".into())
        .spawn(move || contain("service-proxy", worker, |worker| worker.run(&inbox), Worker::recover))?;
    Ok(sender)
}

/// Families that the cluster uses.
fn families(config: &NetworkConfig) -> Vec<Family> {
    let used: BTreeSet<Family> = config.service_cidrs.iter().map(|cidr| Family::of(cidr.addr())).collect();
    used.into_iter().collect()
}

fn settings(config: &NetworkConfig) -> Vec<Settings> {
    let of = |family| {
        let cidr = |ranges: &[ipnet::IpNet]| ranges.iter().copied().find(|range| Family::of(range.addr()) == family);
        let ip = |ips: &[std::net::IpAddr]| ips.iter().copied().find(|ip| Family::of(*ip) == family);
        Settings {
            family,
            cluster_cidr: cidr(&config.cluster_cidrs),
            service_cidr: cidr(&config.service_cidrs),
            cluster_dns: ip(&config.cluster_dns),
            node_ip: ip(&config.node_ips),
        }
    };
    families(config).into_iter().map(of).collect()
}

/// What the lists in progress have not shown yet, and which lists are complete.
#[derive(Debug, Default)]
struct Listed {
    services: Option<BTreeSet<Key>>,
    slices: Option<BTreeSet<Key>>,
    services_once: bool,
    slices_once: bool,
}

struct Worker {
    plan: Plan,
    kernel: Kernel,
    node_name: String,
    listed: Listed,
    /// The slices of the API's Service, with servers that are lost.
    servers: BTreeMap<Key, Slice>,
    lost: BTreeSet<SocketAddr>,
    /// The kernel holds what the plan says.
    built: bool,
    #[cfg(test)]
    barriers: Vec<std::sync::mpsc::Sender<Option<String>>>,
    /// Followed by the task that answers load balancers.
    health: tokio::sync::watch::Sender<health::Health>,
    /// Why the kernel does not hold what the plan says.
    refused: Option<String>,
    /// Has Services and EndpointSlices listed anew.
    relist: Box<dyn Fn() + Send>,
    /// For the thread that listens for foreign changes, until it was started.
    informer: Option<Informer<Input>>,
}

impl Worker {
    /// The event that was being taken is lost and what derives from others may be half done.
    fn recover(&mut self) {
        self.plan = std::mem::take(&mut self.plan).renewed();
        self.listed = Listed { services: None, slices: None, ..std::mem::take(&mut self.listed) };
        self.built = false;
        // A fresh socket cannot have half an answer in it; the table that the old one owned can be adopted.
        match self.kernel.reopened() {
            Ok(kernel) => self.kernel = kernel,
            Err(error) => tracing::error!(%error, "no other netlink socket"),
        }
        (self.relist)();
    }

    fn run(&mut self, inbox: &Inbox<Input>) {
        self.before_first_list();
        loop {
            match inbox.receive(self.wants_rebuild().then_some(RETRY)) {
                Ok(input) => self.take(input),
                Err(Nothing::Yet) => {}
                Err(Nothing::Ever) => return,
            }
            if !inbox.coalesce(QUIET, LATEST, |input| self.take(input)) {
                return;
            }
            if self.is_ready() {
                self.sync();
                #[cfg(test)]
                self.barriers.drain(..).for_each(|barrier| drop(barrier.send(self.refused.clone())));
            }
        }
    }

    /// A new node's pods need the fixed rules (masquerade) before the API answers; after a restart the rules of before
    /// do until then.
    fn before_first_list(&mut self) {
        match self.kernel.exists() {
            Ok(true) => {}
            Ok(false) => {
                let everything = self.plan.everything();
                if let Err(error) = self.kernel.rebuild(&everything) {
                    tracing::error!(error = %super::describe(&error), "cannot write nftables");
                }
            }
            Err(error) => tracing::error!(error = %super::describe(&error), "cannot read nftables"),
        }
    }

    fn is_ready(&self) -> bool {
        self.listed.services_once && self.listed.slices_once
    }

    fn wants_rebuild(&self) -> bool {
        self.is_ready() && !self.built
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Service(event) => self.service(event),
            Input::Slice(event) => self.slice(event),
            Input::Pod(uid, pod) => self.plan.set_pod(&uid, pod),
            Input::Zone(zone) => self.plan.set_zone(zone),
            Input::Lost(lost) => {
                self.lost = lost;
                for (key, slice) in &self.servers {
                    self.plan.set_slice(key, Some(slice.without(&self.lost)));
                }
            }
            Input::Disturbed => self.built = false,
            #[cfg(test)]
            Input::Unprotected => {
                self.refused = self.kernel.unprotect().err().map(|error| super::describe(&error));
                self.built = false;
            }
            #[cfg(test)]
            Input::Panic => panic!("told to"),
            #[cfg(test)]
            Input::Barrier(sender) => self.barriers.push(sender),
        }
    }

    fn service(&mut self, event: Event) {
        match event {
            Event::Restarted => self.listed.services = Some(self.plan.service_keys().into_iter().collect()),
            Event::Synced => {
                self.listed.services_once = true;
                for key in self.listed.services.take().unwrap_or_default() {
                    self.plan.set_service(&key, None);
                }
            }
            Event::Applied(object) => {
                let key = Key { namespace: object.namespace, name: object.name };
                if let Some(unseen) = &mut self.listed.services {
                    unseen.remove(&key);
                }
                match Service::parse(&object.json) {
                    Ok(service) => self.plan.set_service(&key, service),
                    Err(error) => tracing::warn!(service = %key, %error, "cannot read Service"),
                }
            }
            Event::Deleted(object) => {
                self.plan.set_service(&Key { namespace: object.namespace, name: object.name }, None);
            }
        }
    }

    fn slice(&mut self, event: Event) {
        match event {
            Event::Restarted => self.listed.slices = Some(self.plan.slice_keys().into_iter().collect()),
            Event::Synced => {
                self.listed.slices_once = true;
                for key in self.listed.slices.take().unwrap_or_default() {
                    self.set_slice(&key, None);
                }
            }
            Event::Applied(object) => {
                let key = Key { namespace: object.namespace, name: object.name };
                if let Some(unseen) = &mut self.listed.slices {
                    unseen.remove(&key);
                }
                match Slice::parse(&object.json, &self.node_name) {
                    Ok(slice) => self.set_slice(&key, slice),
                    Err(error) => tracing::warn!(slice = %key, %error, "cannot read EndpointSlice"),
                }
            }
            Event::Deleted(object) => {
                self.set_slice(&Key { namespace: object.namespace, name: object.name }, None);
            }
        }
    }

    fn set_slice(&mut self, key: &Key, slice: Option<Slice>) {
        self.servers.remove(key);
        let shown = match slice {
            Some(slice) if slice.is_of_the_api() => {
                let shown = slice.without(&self.lost);
                self.servers.insert(key.clone(), slice);
                Some(shown)
            }
            other => other,
        };
        self.plan.set_slice(key, shown);
    }

    /// Tables that belong to nobody are flushed by whoever reloads a firewall: have that told.
    fn guard_tables(&mut self) {
        if self.kernel.is_owner() {
            return;
        }
        let Some(informer) = self.informer.take() else { return };
        let listened = self.kernel.port().and_then(|own| {
            let table = self.kernel.table().to_owned();
            changes::listen(
                "nftables-changes",
                Socket::netfilter()?,
                &changes::NFTABLES_GROUPS,
                move |header, payload| header.port != own && nft::is_loss(header.kind, payload, &table),
                informer,
                Input::Disturbed,
            )
        });
        if let Err(error) = listened {
            tracing::warn!(%error, "rules that others flush come back with the next change of a Service only");
        }
    }

    /// Brings the kernel to what the plan says.
    fn sync(&mut self) {
        let started = Instant::now();
        let diff = self.plan.take();
        if self.built && diff.is_empty() && diff.datagrams.is_empty() {
            return;
        }
        if self.built
            && let Err(error) = self.kernel.apply(&diff)
        {
            tracing::warn!(error = %super::describe(&error), "nftables refused a change, rebuilding");
            self.built = false;
        }
        if !self.built {
            let everything = self.plan.everything();
            if let Err(error) = self.kernel.rebuild(&everything) {
                let error = super::describe(&error);
                tracing::error!(%error, "cannot write nftables");
                self.refused = Some(error);
                return;
            }
            self.refused = None;
            self.built = true;
            self.guard_tables();
        }
        let health = self.plan.health();
        self.health.send_if_modified(|known| (*known != health).then(|| *known = health).is_some());
        match self.kernel.forget_datagrams(&diff) {
            Ok(flows) => {
                let (added, removed) = diff.counts();
                tracing::debug!(added, removed, flows, elapsed = ?started.elapsed(), "services synced");
            }
            Err(error) => tracing::warn!(error = %super::describe(&error), "cannot forget stale UDP connections"),
        }
    }
}
