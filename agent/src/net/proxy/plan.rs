//! The proxy's state: what exists in the API, and what has to change in the kernel for it. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use super::super::netlink::route::octets;
use super::super::nft::{ElementData, Family, Transaction};
use super::super::{HostPort, Protocol};
use super::desired::{
    At, Contribution, ElementKey, Frontend, NodeFacts, Reach, address_key, contribution, endpoints_of, frontends,
    port_key, target, usable,
};
use super::health::Health;
use super::model::{Key, Service, Slice};
use super::tables::{Balancer, Map};

/// A pod attached to this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalPod {
    /// The pod's addresses.
    pub ips: Vec<IpAddr>,
    /// Its `hostPort`s.
    pub ports: Vec<HostPort>,
}

/// What the kernel is to hold, and what of it changed since the last [`Plan::take`].
#[derive(Debug, Default)]
pub struct Plan {
    node: NodeFacts,
    services: BTreeMap<Key, Service>,
    /// Slices by Service, then by own name.
    slices: BTreeMap<Key, BTreeMap<String, Slice>>,
    /// Which Service a slice was filed under.
    slice_owner: HashMap<Key, Key>,
    pods: BTreeMap<String, LocalPod>,
    /// Who has which frontend.
    claims: HashMap<Frontend, Key>,
    /// Services that want a frontend of another one.
    waiting: BTreeSet<Key>,
    /// What each changed Service had in the kernel before the change.
    before: BTreeMap<Key, Contribution>,
    /// Frontends for UDP that each changed Service had before the change.
    datagrams: BTreeSet<Frontend>,
    pods_before: Option<BTreeMap<ElementKey, ElementData>>,
    /// Shared chains that exist; they stay.
    balancers: BTreeSet<(Family, Balancer, u32)>,
}

/// What to do in one transaction.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Diff {
    old: Contribution,
    new: Contribution,
    /// UDP frontends whose flows must go to these endpoints only.
    pub datagrams: BTreeMap<Frontend, BTreeSet<(IpAddr, u16)>>,
}

impl Plan {
    /// An empty cluster.
    pub fn new(node: NodeFacts) -> Self {
        Self { node, ..Self::default() }
    }

    /// What was told, without anything that was concluded from it.
    pub fn renewed(self) -> Self {
        let Self { node, services, slices, slice_owner, pods, .. } = self;
        let mut fresh = Self { node, slices, slice_owner, pods, ..Self::default() };
        // Claims are made anew by the first look.
        services.into_iter().for_each(|(key, service)| fresh.set_service(&key, Some(service)));
        fresh
    }

    /// The zone that this node is in, by its label.
    pub fn set_zone(&mut self, zone: Option<String>) {
        if self.node.zone != zone {
            self.service_keys().iter().for_each(|key| self.touch(key));
            self.node.zone = zone;
        }
    }

    /// A Service exists with this content, or (`None`) not.
    pub fn set_service(&mut self, key: &Key, service: Option<Service>) {
        if self.services.get(key) == service.as_ref() {
            return;
        }
        self.touch(key);
        match service {
            Some(service) => self.services.insert(key.clone(), service),
            None => self.services.remove(key),
        };
    }

    /// An EndpointSlice exists with this content, or (`None`) not.
    pub fn set_slice(&mut self, key: &Key, slice: Option<Slice>) {
        if let Some(owner) = self.slice_owner.get(key).cloned() {
            let known = self.slices.get(&owner).and_then(|slices| slices.get(&key.name));
            if known == slice.as_ref() {
                return;
            }
            self.touch(&owner);
            self.slice_owner.remove(key);
            if let Some(slices) = self.slices.get_mut(&owner) {
                slices.remove(&key.name);
                if slices.is_empty() {
                    self.slices.remove(&owner);
                }
            }
        }
        if let Some(slice) = slice {
            let owner = slice.service.clone();
            self.touch(&owner);
            self.slice_owner.insert(key.clone(), owner.clone());
            self.slices.entry(owner).or_default().insert(key.name.clone(), slice);
        }
    }

    /// A pod is attached to this node, by its uid, or (`None`) gone.
    pub fn set_pod(&mut self, uid: &str, pod: Option<LocalPod>) {
        if self.pods.get(uid) == pod.as_ref() {
            return;
        }
        if self.pods_before.is_none() {
            self.pods_before = Some(self.pod_elements());
        }
        match pod {
            Some(pod) => self.pods.insert(uid.to_owned(), pod),
            None => self.pods.remove(uid),
        };
    }

    /// All known Services.
    pub fn service_keys(&self) -> Vec<Key> {
        self.services.keys().cloned().collect()
    }

    /// Services whose endpoints on this node load balancers ask for.
    pub fn health(&self) -> Health {
        let asked = self.services.iter().filter_map(|(key, service)| Some((key, service, service.health_port?)));
        let health = asked.map(|(key, service, port)| {
            let endpoints: BTreeSet<(IpAddr, u16)> = service
                .ports
                .iter()
                .flat_map(|port| self.node.families.iter().map(move |family| (port, *family)))
                .flat_map(|(port, family)| usable(&endpoints_of(port, family, self.slices_of(key)), Reach::Node))
                .collect();
            let ips: BTreeSet<IpAddr> = endpoints.into_iter().map(|(ip, _)| ip).collect();
            (port, (key.clone(), ips.len()))
        });
        health.collect()
    }

    /// All known EndpointSlices.
    pub fn slice_keys(&self) -> Vec<Key> {
        self.slice_owner.keys().cloned().collect()
    }

    /// Remembers what a Service has in the kernel, before it changes.
    fn touch(&mut self, key: &Key) {
        if self.before.contains_key(key) {
            return;
        }
        let old = self.contribution(key);
        if let Some(service) = self.services.get(key) {
            self.datagrams.extend(
                frontends(service, &self.node.families)
                    .into_iter()
                    .filter(|frontend| frontend.protocol == Protocol::Udp && self.claims.get(frontend) == Some(key)),
            );
        }
        self.before.insert(key.clone(), old);
    }

    fn contribution(&self, key: &Key) -> Contribution {
        let Some(service) = self.services.get(key) else { return Contribution::default() };
        contribution(key, service, self.slices_of(key), &self.node, |frontend| self.claims.get(frontend) == Some(key))
    }

    fn slices_of(&self, key: &Key) -> impl Iterator<Item = &Slice> + Clone {
        self.slices.get(key).into_iter().flat_map(BTreeMap::values)
    }

    /// Whether anything changed.
    pub fn is_dirty(&self) -> bool {
        !self.before.is_empty() || self.pods_before.is_some()
    }

    /// Settles who owns which frontend and returns what has to change; the changes count as done.
    pub fn take(&mut self) -> Diff {
        if self.settle_claims() {
            for key in std::mem::take(&mut self.waiting) {
                self.touch(&key);
            }
            self.settle_claims();
        }
        let mut diff = Diff::default();
        let before = std::mem::take(&mut self.before);
        for (key, old) in before {
            let new = self.contribution(&key);
            self.expect_datagrams(&key, &mut diff);
            diff.old.merge(old);
            diff.new.merge(new);
        }
        for frontend in std::mem::take(&mut self.datagrams) {
            diff.datagrams.entry(frontend).or_default();
        }
        if let Some(old) = self.pods_before.take() {
            diff.old.elements.extend(old);
            diff.new.elements.extend(self.pod_elements());
        }
        diff.old.balancers.clone_from(&self.balancers);
        self.balancers.extend(&diff.new.balancers);
        diff
    }

    /// Everything, for tables that are empty.
    pub fn everything(&mut self) -> Diff {
        let _ = self.take();
        let mut diff = Diff::default();
        for key in self.service_keys() {
            diff.new.merge(self.contribution(&key));
        }
        diff.new.elements.extend(self.pod_elements());
        self.balancers.clone_from(&diff.new.balancers);
        diff
    }

    /// Releases the claims of changed Services and hands them out again. True when one became free that another
    /// Service waits for.
    fn settle_claims(&mut self) -> bool {
        let changed: Vec<Key> = self.before.keys().cloned().collect();
        let held = self.claims.len();
        let changed_set: BTreeSet<&Key> = changed.iter().collect();
        self.claims.retain(|_, owner| !changed_set.contains(owner));
        let released = held - self.claims.len();
        let mut taken = 0;
        for key in &changed {
            let Some(service) = self.services.get(key) else { continue };
            for frontend in frontends(service, &self.node.families) {
                match self.claims.entry(frontend) {
                    std::collections::hash_map::Entry::Vacant(entry) => {
                        entry.insert(key.clone());
                        taken += 1;
                    }
                    std::collections::hash_map::Entry::Occupied(entry) if entry.get() == key => {}
                    std::collections::hash_map::Entry::Occupied(entry) => {
                        tracing::warn!(service = %key, owner = %entry.get(), ?frontend, "address and port belong to another Service");
                        self.waiting.insert(key.clone());
                    }
                }
            }
        }
        !self.waiting.is_empty() && released != taken
    }

    fn expect_datagrams(&self, key: &Key, diff: &mut Diff) {
        let Some(service) = self.services.get(key) else { return };
        for port in service.ports.iter().filter(|port| port.protocol == Protocol::Udp) {
            for family in &self.node.families {
                let all = endpoints_of(port, *family, self.slices_of(key));
                let targets: BTreeSet<_> =
                    usable(&all, Reach::Cluster(&self.node)).into_iter().chain(usable(&all, Reach::Node)).collect();
                let own = Service { ports: vec![port.clone()], ..service.clone() };
                for frontend in frontends(&own, &[*family]) {
                    let ours = self.claims.get(&frontend) == Some(key);
                    let dns = matches!(frontend.at, At::Cluster(ip) if self.node.cluster_dns.contains(&ip));
                    if ours && !dns {
                        diff.datagrams.insert(frontend, targets.clone());
                    }
                }
            }
        }
    }

    fn pod_elements(&self) -> BTreeMap<ElementKey, ElementData> {
        let mut elements = BTreeMap::new();
        for pod in self.pods.values() {
            for ip in pod.ips.iter().filter(|ip| self.node.families.contains(&Family::of(**ip))) {
                for port in &pod.ports {
                    let (family, value) = (Family::of(*ip), ElementData::Value(target(*ip, port.container_port)));
                    let key = match port.host_ip.filter(|ip| !ip.is_unspecified()) {
                        None => (family, Map::HostPorts, port_key(port.protocol, port.host_port)),
                        Some(at) if Family::of(at) == family => {
                            (family, Map::HostPortsByAddress, address_key(at, port.protocol, port.host_port))
                        }
                        Some(_) => continue,
                    };
                    // The scheduler keeps two pods with one port apart; while one replaces the other the first stays.
                    elements.entry(key).or_insert(value);
                }
                let pair = octets(*ip).repeat(2);
                elements.insert((Family::of(*ip), Map::Hairpin, pair), ElementData::None);
            }
        }
        elements
    }
}

impl Contribution {
    /// Adds another one's. Where both have a key (two Services with the same endpoint) the values are alike.
    fn merge(&mut self, other: Self) {
        self.elements.extend(other.elements);
        self.balancers.extend(other.balancers);
        self.chains.extend(other.chains);
        self.sets.extend(other.sets);
    }
}

impl Diff {
    /// Whether the kernel is as it should be.
    pub fn is_empty(&self) -> bool {
        self.old.elements == self.new.elements
            && self.old.chains == self.new.chains
            && self.old.sets == self.new.sets
            && self.new.balancers.is_subset(&self.old.balancers)
    }

    /// Numbers for the log: elements added, elements removed.
    pub fn counts(&self) -> (usize, usize) {
        let added = self.new.elements.iter().filter(|(key, data)| self.old.elements.get(*key) != Some(*data)).count();
        let removed = self.old.elements.iter().filter(|(key, data)| self.new.elements.get(*key) != Some(*data)).count();
        (added, removed)
    }

    /// Names of the dynamic sets that there are to be.
    pub fn dynamic_sets(&self, family: Family) -> impl Iterator<Item = &String> {
        self.new.sets.keys().filter(move |(of, _)| *of == family).map(|(_, name)| name)
    }

    /// Adds the changes to a transaction, in an order in which nothing names what does not exist.
    pub fn write(&self, transaction: &mut Transaction) {
        use super::super::nft::{SetData, SetSpec};
        for ((family, set), seconds) in missing(&self.new.sets, &self.old.sets) {
            let spec =
                SetSpec { key: &[super::super::nft::KeyType::Address], data: SetData::Dynamic { timeout: *seconds } };
            transaction.add_set(*family, set, &spec);
        }
        for (family, balancer, count) in self.new.balancers.difference(&self.old.balancers) {
            let chain = balancer.chain(*count);
            transaction.add_chain(*family, &chain, None);
            for rule in balancer.rules(*family, *count) {
                transaction.add_rule(*family, &chain, &rule);
            }
        }
        let changed: Vec<_> = missing(&self.new.chains, &self.old.chains).collect();
        for ((family, chain), _) in &changed {
            transaction.add_chain(*family, chain, None);
        }
        for ((family, chain), rules) in &changed {
            if self.old.chains.contains_key(&(*family, chain.clone())) {
                transaction.flush_chain(*family, chain);
            }
            for rule in *rules {
                transaction.add_rule(*family, chain, rule);
            }
        }
        self.write_elements(transaction);
        let gone: Vec<_> = self.old.chains.keys().filter(|key| !self.new.chains.contains_key(*key)).collect();
        for (family, chain) in &gone {
            transaction.flush_chain(*family, chain);
        }
        for (family, chain) in gone {
            transaction.delete_chain(*family, chain);
        }
        for (family, set) in self.old.sets.keys().filter(|key| !self.new.sets.contains_key(*key)) {
            transaction.delete_set(*family, set);
        }
    }

    fn write_elements(&self, transaction: &mut Transaction) {
        for map in Map::ALL {
            for family in [Family::Ip, Family::Ip6] {
                let gone = missing_of(&self.old.elements, &self.new.elements, family, map);
                transaction.delete_elements(family, map.name(), gone.map(|(key, _)| key));
                let come = missing_of(&self.new.elements, &self.old.elements, family, map);
                transaction.add_elements(family, map.name(), come);
            }
        }
    }
}

type Elements = BTreeMap<ElementKey, ElementData>;

/// Elements of one map in `these` that are not, or not alike, in `those`.
fn missing_of<'a>(
    these: &'a Elements,
    those: &'a Elements,
    family: Family,
    map: Map,
) -> impl Iterator<Item = (&'a [u8], &'a ElementData)> {
    these
        .range((family, map, Vec::new())..)
        .take_while(move |(key, _)| key.0 == family && key.1 == map)
        .filter(|(key, data)| those.get(*key) != Some(*data))
        .map(|(key, data)| (key.2.as_slice(), data))
}

/// Entries of `these` that are not, or not alike, in `those`.
fn missing<'a, K: Ord, V: PartialEq>(
    these: &'a BTreeMap<K, V>,
    those: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    these.iter().filter(|(key, value)| those.get(*key) != Some(*value))
}
