//! ServiceCIDRs: ready while they may be allocated from, kept as long as an address would be left without a range.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, FutureExt};
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde_json::{Value, json};

use super::Term;
use super::api::{Api, PatchKind};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{IP_ADDRESSES, SERVICE_CIDRS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};

const FINALIZER: &str = "networking.k8s.io/service-cidr-finalizer";
const MANAGED_BY: (&str, &str) = ("ipaddress.kubernetes.io/managed-by", "ipallocator.k8s.io");
/// So long a range that is going stays, until every server knows that it gives no more addresses (upstream's figure).
const GRACE: Duration = Duration::from_secs(10);

/// Starts the loop.
pub fn start(term: &Term) {
    let queue = Arc::new(Queue::default());
    let (ranges, addresses) = (term.informers.of(&SERVICE_CIDRS), term.informers.of(&IP_ADDRESSES));
    let subscriptions = vec![
        enqueue_self(&queue, &ranges),
        enqueue_deleting(&queue, &ranges, &ranges),
        enqueue_deleting(&queue, &ranges, &addresses),
    ];
    let reconcile = Arc::new(ServiceRanges {
        api: term.api("service-cidrs-controller"),
        ranges: ranges.clone(),
        addresses: addresses.clone(),
    });
    let needs = vec![ranges, addresses];
    term.start(Controller { name: "service-cidrs", queue, concurrency: 1, needs, subscriptions, reconcile });
}

/// Ranges that wait to go are looked at again when something they wait for changes.
fn enqueue_deleting(queue: &Arc<Queue>, ranges: &Arc<Informer>, cause: &Arc<Informer>) -> Subscription {
    let (queue, ranges) = (queue.clone(), ranges.clone());
    cause.subscribe(move |_| {
        ranges.read().iter().filter(|range| range.deleting.is_some()).for_each(|range| queue.add(range.key.clone()));
    })
}

struct ServiceRanges {
    api: Api,
    ranges: Arc<Informer>,
    addresses: Arc<Informer>,
}

/// Whether a range may go: others hold all of it, or no address is in it alone.
fn may_go(range: &[IpNet], others: &[IpNet], addresses: impl Iterator<Item = IpAddr>) -> bool {
    let within_others = range.iter().all(|net| others.iter().any(|other| other.contains(net)));
    let mut orphans = addresses
        .filter(|ip| range.iter().any(|net| net.contains(ip)) && !others.iter().any(|other| other.contains(ip)));
    within_others || orphans.next().is_none()
}

fn nets(range: &ServiceCIDR) -> Vec<IpNet> {
    let cidrs = range.spec.iter().flat_map(|spec| spec.cidrs.iter().flatten());
    cidrs.filter_map(|cidr| cidr.parse().ok()).collect()
}

impl Reconcile for ServiceRanges {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl ServiceRanges {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.ranges.get(key) else { return Ok(Next::Done) };
        let guarded = object.finalizers.iter().any(|finalizer| &**finalizer == FINALIZER);
        let Some(since) = object.deleting else {
            if !guarded {
                let finalizers: Vec<&str> = object.finalizers.iter().map(|one| &**one).chain([FINALIZER]).collect();
                self.set_finalizers(&object, &finalizers).await?;
            }
            let ready = json!({"type": "Ready", "status": "True", "reason": "",
                "message": "Kubernetes Service CIDR is ready"});
            self.set_condition(key, ready).await?;
            return Ok(Next::Done);
        };
        if !guarded {
            return Ok(Next::Done);
        }
        if !self.may_go(&object)? {
            let waits = json!({"type": "Ready", "status": "False", "reason": "Terminating", "message":
                "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR"});
            self.set_condition(key, waits).await?;
            return Ok(Next::Done);
        }
        let passed = Timestamp::now().as_second().saturating_sub(since.as_second());
        let left = GRACE.saturating_sub(Duration::from_secs(u64::try_from(passed).unwrap_or(0)));
        if !left.is_zero() {
            return Ok(Next::After(left));
        }
        let finalizers: Vec<&str> =
            object.finalizers.iter().map(|one| &**one).filter(|one| *one != FINALIZER).collect();
        self.set_finalizers(&object, &finalizers).await?;
        Ok(Next::Done)
    }

    fn may_go(&self, object: &Object) -> Result<bool, serde_json::Error> {
        let others: Vec<Arc<Object>> =
            self.ranges.read().iter().filter(|other| other.uid != object.uid).cloned().collect();
        let others: Vec<ServiceCIDR> = others.iter().map(|other| other.decode()).collect::<Result<_, _>>()?;
        let others: Vec<IpNet> = others.iter().flat_map(nets).collect();
        let cached = self.addresses.read();
        let managed = cached.iter().filter(|address| address.labels.get(MANAGED_BY.0) == Some(MANAGED_BY.1));
        let addresses = managed.filter_map(|address| address.key.name().parse().ok());
        Ok(may_go(&nets(&object.decode()?), &others, addresses))
    }

    async fn set_finalizers(&self, object: &Object, finalizers: &[&str]) -> Result<(), ReconcileError> {
        let version = object.resource_version.to_string();
        let patch = json!({"metadata": {"resourceVersion": version, "finalizers": finalizers}});
        self.api.patch(&SERVICE_CIDRS, &object.key, "", PatchKind::Merge, &patch).await?;
        Ok(())
    }

    /// Writes the condition unless it says the same already.
    async fn set_condition(&self, key: &Key, mut condition: Value) -> Result<(), ReconcileError> {
        let Some(object) = self.ranges.get(key) else { return Ok(()) };
        let whole: Value = object.decode()?;
        let present = whole.pointer("/status/conditions").and_then(Value::as_array);
        let same = present.into_iter().flatten().any(|have| {
            ["type", "status", "reason", "message"].iter().all(|field| {
                have[*field].as_str().unwrap_or_default() == condition[*field].as_str().unwrap_or_default()
            })
        });
        if !same {
            let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or_default();
            condition["lastTransitionTime"] = json!(now.to_string());
            self.api.update_status(&SERVICE_CIDRS, &object, &json!({"conditions": [condition]})).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_goes_when_no_address_would_be_left_without_one() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let range = [net("10.0.1.0/24")];
        assert!(may_go(&range, &[], [ip("10.0.2.1")].into_iter()));
        assert!(!may_go(&range, &[], [ip("10.0.1.1")].into_iter()));
        assert!(may_go(&range, &[net("10.0.0.0/16")], [ip("10.0.1.1")].into_iter()));
        assert!(!may_go(&range, &[net("10.0.1.128/25")], [ip("10.0.1.1"), ip("10.0.1.200")].into_iter()));
    }
}
