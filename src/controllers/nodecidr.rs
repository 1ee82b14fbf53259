//! Every node gets a range of pod addresses out of the cluster's ranges.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;
use serde_json::json;

use super::Term;
use super::api::{Api, PatchKind};
use super::event::{EventType, Events};
use super::informer::Informer;
use super::object::Key;
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::NODES;
use super::runner::{Controller, Next, Reconcile, ReconcileError};

/// Length of a node's prefix.
const NODE_PREFIX_V4: u8 = 24;
const NODE_PREFIX_V6: u8 = 64;

/// Starts the loop, unless the cluster has no ranges.
pub fn start(term: &Term) {
    if term.context.cluster_cidrs.is_empty() {
        return;
    }
    let queue = Arc::new(Queue::default());
    let nodes = term.informers.of(&NODES);
    let subscriptions = vec![enqueue_self(&queue, &nodes)];
    let api = term.api("node-controller");
    let reconcile = Arc::new(NodeCidrs {
        events: term.recorder.events(&api, "cidrAllocator"),
        api,
        nodes: nodes.clone(),
        cluster: term.context.cluster_cidrs.clone(),
    });
    // One at a time: each choice has to see the one before.
    term.start(Controller { name: "node-cidr", queue, concurrency: 1, needs: vec![nodes], subscriptions, reconcile });
}

/// The first range of a node's size in `cluster` that overlaps none in use.
pub fn first_free(cluster: IpNet, used: &HashSet<IpNet>) -> Option<IpNet> {
    match cluster {
        IpNet::V4(net) => {
            let length = NODE_PREFIX_V4.max(net.prefix_len());
            let (first, step) = (u32::from(net.network()), 1u64 << (32 - length));
            let count = 1u64 << (length - net.prefix_len());
            (0..count).find_map(|index| {
                let start = u32::try_from(u64::from(first) + index * step).ok()?;
                let range = IpNet::V4(Ipv4Net::new(Ipv4Addr::from(start), length).ok()?);
                is_free(range, used).then_some(range)
            })
        }
        IpNet::V6(net) => {
            let length = NODE_PREFIX_V6.max(net.prefix_len());
            let (first, step) = (u128::from(net.network()), 1u128.checked_shl(u32::from(128 - length))?);
            let count = 1u128.checked_shl(u32::from(length - net.prefix_len()).min(16))?;
            (0..count).find_map(|index| {
                let start = first.checked_add(index * step)?;
                let range = IpNet::V6(Ipv6Net::new(Ipv6Addr::from(start), length).ok()?);
                is_free(range, used).then_some(range)
            })
        }
    }
}

fn is_free(range: IpNet, used: &HashSet<IpNet>) -> bool {
    let overlaps = |other: &IpNet| range.contains(other) || other.contains(&range);
    !used.contains(&range) && !used.iter().any(overlaps)
}

fn ranges_of(node: &Node) -> Vec<IpNet> {
    let spec = node.spec.as_ref();
    let all = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let one = spec.and_then(|spec| spec.pod_cidr.clone());
    all.iter().chain(one.iter()).filter_map(|text| text.parse().ok()).collect()
}

struct NodeCidrs {
    api: Api,
    events: Events,
    nodes: Arc<Informer>,
    cluster: Vec<IpNet>,
}

impl Reconcile for NodeCidrs {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl NodeCidrs {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.nodes.get(key).filter(|node| node.deleting.is_none()) else { return Ok(Next::Done) };
        if !ranges_of(&object.decode()?).is_empty() {
            return Ok(Next::Done);
        }
        let mut used = HashSet::new();
        let all: Vec<_> = self.nodes.read().iter().cloned().collect();
        for node in all {
            used.extend(ranges_of(&node.decode()?));
        }
        let chosen: Option<Vec<IpNet>> = self.cluster.iter().map(|cluster| first_free(*cluster, &used)).collect();
        let Some(chosen) = chosen else {
            let message = format!("Node {} status is now: CIDRNotAvailable", key.name());
            self.events.tell(&NODES, &object, EventType::Normal, "CIDRNotAvailable", message);
            return Err(ReconcileError::NotYet("no range of pod addresses is left".to_owned()));
        };
        let chosen: Vec<String> = chosen.iter().map(ToString::to_string).collect();
        let patch = json!({
            "metadata": {"uid": &*object.uid, "resourceVersion": object.resource_version.to_string()},
            "spec": {"podCIDR": chosen.first(), "podCIDRs": chosen},
        });
        match self.api.patch(&NODES, key, "", PatchKind::Merge, &patch).await {
            Err(error) if !error.is_not_found() => Err(error.into()),
            _ => Ok(Next::Done),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_handed_out_in_order_without_overlap_until_none_is_left() {
        let cluster: IpNet = "10.42.0.0/22".parse().unwrap();
        let mut used = HashSet::from(["10.42.1.0/24".parse().unwrap(), "10.42.2.128/25".parse().unwrap()]);
        let mut got = Vec::new();
        while let Some(range) = first_free(cluster, &used) {
            used.insert(range);
            got.push(range.to_string());
        }
        assert_eq!(got, ["10.42.0.0/24", "10.42.3.0/24"]);
        let six = first_free("fd00:42::/56".parse().unwrap(), &HashSet::new()).unwrap();
        assert_eq!(six.to_string(), "fd00:42::/64");
    }
}
