//! Cluster addresses and node ports. A reservation is a record of its own, created only if nobody has it, so it holds on
//! every server of a cluster: an `IPAddress` object for an address (as upstream, KEP-1880), a system record for a port.
//! Reservations that a failed write left behind are taken back by [`sweep`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use bytes::Bytes;
use coracle_store::{Compare, Op, RangeRequest, Txn, prefix_end};
use futures::future::BoxFuture;
use ipnet::IpNet;
use rand::Rng;
use serde_json::{Value, json};

use super::families::family_of;
use super::{has_cluster_ip, is_headless, wants_node_ports};
use crate::apiserver::ApiServer;
use crate::apiserver::field::FieldError;
use crate::apiserver::resources::{self, Resource};
use crate::apiserver::status::Status;
use crate::strategy::Context;
use crate::strategy::value::{int, list, text};

/// Where Service addresses and node ports come from.
#[derive(Debug, Clone)]
pub struct ServiceNetwork {
    /// `--service-cidr`: at most one range of each family, the primary one first.
    pub ranges: Vec<IpNet>,
    /// `--service-node-port-range`.
    pub node_ports: RangeInclusive<u16>,
}

/// Random tries before the whole range is searched.
const TRIES: usize = 16;
const NODE_PORTS: &str = "/coracle/nodeports/";

impl ServiceNetwork {
    /// The families that Services may have, the primary one first.
    pub fn families(&self) -> Vec<&'static str> {
        self.ranges.iter().map(|range| family_of(range.addr())).collect()
    }

    /// The address of the `kubernetes` Service: the first of the primary range.
    pub fn first(&self) -> Option<IpAddr> {
        self.ranges.first().map(|range| nth(*range, 1))
    }
}

fn nth(range: IpNet, n: u128) -> IpAddr {
    match range.network() {
        IpAddr::V4(ip) => Ipv4Addr::from(u32::from(ip).wrapping_add(n as u32)).into(),
        IpAddr::V6(ip) => Ipv6Addr::from(u128::from(ip).wrapping_add(n)).into(),
    }
}

/// Addresses of a range that a Service may have: all but the network's and the broadcast address.
fn size(range: IpNet) -> u128 {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let all = 1u128.checked_shl(bits.min(64)).unwrap_or(u128::MAX);
    if range.network().is_ipv4() { all.saturating_sub(2) } else { all - 1 }
}

/// The lower part of a range is left to addresses that are asked for by name (KEP-3070).
fn reserved(range: IpNet) -> u128 {
    (size(range) / 16).clamp(16, 256).min(size(range))
}

/// See [`crate::strategy::Strategy::allocate`].
pub(super) fn allocate<'a>(
    server: &'a ApiServer,
    context: &'a Context<'a>,
    new: &'a mut Value,
    old: Option<&'a Value>,
) -> BoxFuture<'a, Result<(), Status>> {
    Box::pin(async move {
        if context.subresource == "status" {
            return Ok(());
        }
        addresses(server, context, new, old).await?;
        ports(server, context, new, old).await
    })
}

fn invalid(context: &Context<'_>, error: FieldError) -> Status {
    Status::invalid("", "Service", context.name, &vec![error])
}

/// An address of each family of the Service; those that it had stay.
async fn addresses(
    server: &ApiServer,
    context: &Context<'_>,
    new: &mut Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let spec = &new["spec"];
    if !has_cluster_ip(spec) || is_headless(spec) {
        return Ok(());
    }
    let mut ips: Vec<String> =
        list(spec, "/clusterIPs").iter().map(|ip| ip.as_str().unwrap_or_default().to_owned()).collect();
    let families: Vec<String> = list(spec, "/ipFamilies").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    ips.resize(families.len().max(ips.len()), String::new());
    let had =
        |ip: &str| old.is_some_and(|old| list(old, "/spec/clusterIPs").iter().any(|had| had.as_str() == Some(ip)));
    if ips.iter().all(|ip| !ip.is_empty() && had(ip)) {
        return Ok(());
    }
    let ranges = ranges(server)?;
    for i in 0..ips.len() {
        if ips[i].is_empty() {
            let own: Vec<IpNet> =
                ranges.iter().copied().filter(|range| family_of(range.addr()) == families[i]).collect();
            ips[i] = any_address(server, context, &own).await?.to_string();
        } else if !had(&ips[i]) {
            named_address(server, context, &ips, i, &ranges).await?;
        }
    }
    new["spec"]["clusterIP"] = json!(ips[0]);
    new["spec"]["clusterIPs"] = json!(ips);
    Ok(())
}

/// Reserves the address that the client asked for.
async fn named_address(
    server: &ApiServer,
    context: &Context<'_>,
    ips: &[String],
    i: usize,
    ranges: &[IpNet],
) -> Result<(), Status> {
    let fault = |why: &str| {
        let detail = format!("failed to allocate IP {}: {why}", ips[i]);
        invalid(context, FieldError::invalid("spec.clusterIPs", json!(ips), detail))
    };
    let ip: IpAddr = ips[i].parse().map_err(|_| fault("invalid address"))?;
    if !ranges.iter().any(|range| range.contains(&ip) && ip != range.network()) {
        let own = ranges.iter().filter(|range| family_of(range.addr()) == family_of(ip));
        let own: Vec<String> = own.map(ToString::to_string).collect();
        return Err(fault(&format!(
            "the provided IP ({ip}) is not in the valid range. The range of valid IPs is {}",
            own.join(", ")
        )));
    }
    if !context.dry_run && !reserve_address(server, context, ip).await? {
        return Err(fault("provided IP is already allocated"));
    }
    Ok(())
}

/// The ranges that the server was started with, then those of ServiceCIDRs that are not being deleted.
fn ranges(server: &ApiServer) -> Result<Vec<IpNet>, Status> {
    let mut ranges = server.service_network().ranges.clone();
    let Some(resource) = resources::builtin("networking.k8s.io", "servicecidrs") else { return Ok(ranges) };
    let start = resource.key("", "");
    let request = RangeRequest { end: prefix_end(&start), start, ..RangeRequest::default() };
    for kv in server.backend().range(&request)?.kvs {
        let Ok(object) = serde_json::from_slice::<Value>(&kv.value) else { continue };
        if !text(&object, "/metadata/deletionTimestamp").is_empty() {
            continue;
        }
        for range in list(&object, "/spec/cidrs").iter().filter_map(|cidr| cidr.as_str()?.parse::<IpNet>().ok()) {
            if !ranges.contains(&range) {
                ranges.push(range);
            }
        }
    }
    Ok(ranges)
}

/// A free address of ranges of one family: of the first one, or of another one when that is full.
async fn any_address(server: &ApiServer, context: &Context<'_>, ranges: &[IpNet]) -> Result<IpAddr, Status> {
    for range in ranges {
        if context.dry_run {
            return Ok(nth(*range, size(*range)));
        }
        if let Some(ip) = address_of(server, context, *range).await? {
            return Ok(ip);
        }
    }
    Err(Status::internal("failed to allocate a serviceIP: range is full"))
}

async fn address_of(server: &ApiServer, context: &Context<'_>, range: IpNet) -> Result<Option<IpAddr>, Status> {
    let (low, size) = (reserved(range), size(range));
    for _ in 0..TRIES {
        let n = if low < size { rand::rng().random_range(low + 1..=size) } else { rand::rng().random_range(1..=size) };
        if reserve_address(server, context, nth(range, n)).await? {
            return Ok(Some(nth(range, n)));
        }
    }
    // Nearly full: from the top down, the reserved part last.
    for ip in (1..=size.min(1 << 20)).rev().map(|n| nth(range, n)) {
        let key = ip_addresses()?.key("", &ip.to_string());
        if server.backend().get(&key)?.is_none() && reserve_address(server, context, ip).await? {
            return Ok(Some(ip));
        }
    }
    Ok(None)
}

fn ip_addresses() -> Result<&'static Resource, Status> {
    resources::builtin("networking.k8s.io", "ipaddresses").ok_or_else(|| Status::internal("ipaddresses are not served"))
}

/// Creates the `IPAddress`; false when another Service has it.
async fn reserve_address(server: &ApiServer, context: &Context<'_>, ip: IpAddr) -> Result<bool, Status> {
    let parent = json!({"group": "", "resource": "services", "namespace": context.namespace, "name": context.name});
    let object = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "IPAddress",
        "metadata": {
            "name": ip.to_string(),
            "labels": {
                "ipaddress.kubernetes.io/ip-family": family_of(ip),
                "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io",
            },
            "creationTimestamp": context.now,
            "uid": crate::apiserver::names::uuid(),
        },
        "spec": {"parentRef": parent},
    });
    let key = ip_addresses()?.key("", &ip.to_string());
    if reserve(server, key.clone(), object.to_string().into()).await? {
        return Ok(true);
    }
    // One that an earlier attempt for the same Service left is as good as a new one.
    let held = server.backend().get(&key)?.and_then(|kv| serde_json::from_slice::<Value>(&kv.value).ok());
    let ours = held.is_some_and(|held| held["spec"]["parentRef"] == parent);
    Ok(ours && !in_use(server, context, ip)?)
}

/// Whether the stored Service of this name has the address.
fn in_use(server: &ApiServer, context: &Context<'_>, ip: IpAddr) -> Result<bool, Status> {
    let stored = stored_service(server, context.namespace, context.name)?;
    Ok(stored.is_some_and(|s| list(&s, "/spec/clusterIPs").iter().any(|x| x.as_str() == Some(&ip.to_string()))))
}

fn stored_service(server: &ApiServer, namespace: &str, name: &str) -> Result<Option<Value>, Status> {
    let Some(services) = resources::builtin("", "services") else { return Ok(None) };
    let kv = server.backend().get(&services.key(namespace, name))?;
    Ok(kv.and_then(|kv| serde_json::from_slice(&kv.value).ok()))
}

async fn reserve(server: &ApiServer, key: Bytes, value: Bytes) -> Result<bool, Status> {
    let txn = Txn {
        compare: vec![Compare::ModRevision { key: key.clone(), equals: 0 }],
        then: vec![Op::Put { key, value, lease: 0 }],
        or_else: Vec::new(),
    };
    Ok(server.backend().txn(txn).await?.succeeded)
}

/// The node ports of a Service: of its ports, and of its health check.
fn node_ports(service: &Value) -> Vec<(i64, &str)> {
    let ports = list(service, "/spec/ports").iter();
    let mut all: Vec<_> =
        ports.filter_map(|p| Some((int(p, "/nodePort").filter(|n| *n != 0)?, text(p, "/protocol")))).collect();
    all.extend(int(service, "/spec/healthCheckNodePort").filter(|n| *n != 0).map(|n| (n, "health")));
    all
}

async fn ports(server: &ApiServer, context: &Context<'_>, new: &mut Value, old: Option<&Value>) -> Result<(), Status> {
    if wants_node_ports(&new["spec"]) {
        for i in 0..list(new, "/spec/ports").len() {
            let port = &new["spec"]["ports"][i];
            let protocol = text(port, "/protocol").to_owned();
            let number = int(port, "/nodePort").unwrap_or(0);
            if number != 0 {
                claim(server, context, number, &format!("spec.ports[{i}].nodePort"), new, old).await?;
                continue;
            }
            // A port number that the Service has for another protocol serves this one too.
            let same = list(new, "/spec/ports").iter().find(|p| {
                p["port"] == new["spec"]["ports"][i]["port"]
                    && int(p, "/nodePort").unwrap_or(0) != 0
                    && text(p, "/protocol") != protocol
            });
            let number = match same.and_then(|p| int(p, "/nodePort")) {
                Some(number) => number,
                None => any_port(server, context).await?,
            };
            new["spec"]["ports"][i]["nodePort"] = json!(number);
        }
    }
    let spec = &new["spec"];
    if text(spec, "/type") == "LoadBalancer" && text(spec, "/externalTrafficPolicy") == "Local" {
        match int(spec, "/healthCheckNodePort").unwrap_or(0) {
            0 => new["spec"]["healthCheckNodePort"] = json!(any_port(server, context).await?),
            number => claim(server, context, number, "spec.healthCheckNodePort", new, old).await?,
        }
    }
    Ok(())
}

fn port_key(number: i64) -> Bytes {
    format!("{NODE_PORTS}{number:05}").into()
}

fn owner(context: &Context<'_>) -> Bytes {
    format!("{}/{}", context.namespace, context.name).into()
}

async fn claim(
    server: &ApiServer,
    context: &Context<'_>,
    number: i64,
    field: &str,
    new: &Value,
    old: Option<&Value>,
) -> Result<(), Status> {
    let range = &server.service_network().node_ports;
    if old.is_some_and(|old| node_ports(old).iter().any(|(n, _)| *n == number)) || context.dry_run {
        return Ok(());
    }
    if !u16::try_from(number).is_ok_and(|n| range.contains(&n)) {
        let text = format!(
            "provided port is not in the valid range. The range of valid ports is {}-{}",
            range.start(),
            range.end()
        );
        return Err(invalid(context, FieldError::invalid(field, number, text)));
    }
    // Two ports of one Service may share a number when their protocols differ; validation has seen to that.
    let twice = node_ports(new).iter().filter(|(n, _)| *n == number).count() > 1;
    if reserve(server, port_key(number), owner(context)).await? {
        return Ok(());
    }
    let held = server.backend().get(&port_key(number))?;
    let stored = stored_service(server, context.namespace, context.name)?;
    let unused = stored.is_none_or(|s| !node_ports(&s).iter().any(|(n, _)| *n == number));
    if held.is_some_and(|kv| kv.value == owner(context)) && (unused || twice) {
        return Ok(());
    }
    Err(invalid(context, FieldError::invalid(field, number, "provided port is already allocated")))
}

async fn any_port(server: &ApiServer, context: &Context<'_>) -> Result<i64, Status> {
    let range = server.service_network().node_ports.clone();
    if context.dry_run {
        return Ok(i64::from(*range.end()));
    }
    for _ in 0..TRIES {
        let number = i64::from(rand::rng().random_range(range.clone()));
        if reserve(server, port_key(number), owner(context)).await? {
            return Ok(number);
        }
    }
    for number in range.rev().map(i64::from) {
        if server.backend().get(&port_key(number))?.is_none()
            && reserve(server, port_key(number), owner(context)).await?
        {
            return Ok(number);
        }
    }
    Err(Status::internal("failed to allocate a nodePort: range is full"))
}

/// See [`crate::strategy::Strategy::released`]. A failure is logged; [`sweep`] comes by later.
pub(super) fn released<'a>(
    server: &'a ApiServer,
    context: &'a Context<'a>,
    old: &'a Value,
    new: Option<&'a Value>,
) -> BoxFuture<'a, ()> {
    Box::pin(async move {
        let mut keys = Vec::new();
        for ip in list(old, "/spec/clusterIPs").iter().filter_map(Value::as_str).filter(|ip| *ip != "None") {
            let kept = new.is_some_and(|new| list(new, "/spec/clusterIPs").iter().any(|x| x.as_str() == Some(ip)));
            if !kept && let Ok(resource) = ip_addresses() {
                keys.push(resource.key("", ip));
            }
        }
        for (number, _) in node_ports(old) {
            if !new.is_some_and(|new| node_ports(new).iter().any(|(n, _)| *n == number)) {
                keys.push(port_key(number));
            }
        }
        keys.sort();
        keys.dedup();
        if keys.is_empty() {
            return;
        }
        let then = keys.into_iter().map(|key| Op::Delete { key }).collect();
        if let Err(status) = server.backend().txn(Txn { then, ..Txn::default() }).await {
            tracing::warn!(service = context.name, error = status.message(), "releasing addresses and ports failed");
        }
    })
}

/// Takes back reservations whose Service does not exist or does not have them (a write that failed after its reservation).
/// Run by the leader now and then; an orphan is taken back when two runs in a row (`suspects`) have seen it.
pub async fn sweep(server: &ApiServer, suspects: &mut Vec<Bytes>) -> Result<(), Status> {
    let mut orphans = Vec::new();
    let prefix = ip_addresses()?.key("", "");
    let all = |start: Bytes| RangeRequest { end: prefix_end(&start), start, ..RangeRequest::default() };
    for kv in server.backend().range(&all(prefix))?.kvs {
        let Ok(object) = serde_json::from_slice::<Value>(&kv.value) else { continue };
        let parent = &object["spec"]["parentRef"];
        let managed = object.pointer("/metadata/labels/ipaddress.kubernetes.io~1managed-by").is_some();
        let service = stored_service(server, text(parent, "/namespace"), text(parent, "/name"))?;
        let name = text(&object, "/metadata/name");
        let used = service.is_some_and(|s| list(&s, "/spec/clusterIPs").iter().any(|ip| ip.as_str() == Some(name)));
        if managed && !used {
            orphans.push(kv.key);
        }
    }
    for kv in server.backend().range(&all(NODE_PORTS.into()))?.kvs {
        let number = std::str::from_utf8(&kv.key[NODE_PORTS.len()..]).ok().and_then(|n| n.parse::<i64>().ok());
        let parent = String::from_utf8_lossy(&kv.value).into_owned();
        let (namespace, name) = parent.split_once('/').unwrap_or_default();
        let service = stored_service(server, namespace, name)?;
        let used = service.is_some_and(|s| node_ports(&s).iter().any(|(n, _)| Some(*n) == number));
        if !used {
            orphans.push(kv.key);
        }
    }
    // Only what was an orphan the last time too: the write that reserved it is long over.
    let gone: Vec<Bytes> = orphans.iter().filter(|key| suspects.contains(key)).cloned().collect();
    if !gone.is_empty() {
        tracing::info!(count = gone.len(), "taking back addresses and ports that no Service has");
        let then = gone.into_iter().map(|key| Op::Delete { key }).collect();
        server.backend().txn(Txn { then, ..Txn::default() }).await?;
    }
    *suspects = orphans;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_leaves_out_network_and_broadcast() {
        let small: IpNet = "10.43.0.0/24".parse().unwrap();
        assert_eq!((size(small), reserved(small)), (254, 16));
        assert_eq!(nth(small, size(small)).to_string(), "10.43.0.254");
        assert_eq!(reserved("10.43.0.0/16".parse().unwrap()), 256);
        let six: IpNet = "fd43::/112".parse().unwrap();
        assert_eq!((size(six), nth(six, size(six)).to_string()), (65535, "fd43::ffff".to_owned()));
    }

    #[test]
    fn the_first_range_is_that_of_the_primary_family() {
        let ranges = ["fd43::/112", "10.43.0.0/16"].map(|range| range.parse().unwrap()).to_vec();
        let network = ServiceNetwork { ranges, node_ports: 30000..=32767 };
        assert_eq!(network.families(), ["IPv6", "IPv4"]);
        assert_eq!(network.first().unwrap().to_string(), "fd43::1");
    }

    #[test]
    fn node_ports_are_those_of_ports_and_health_check() {
        let service = json!({"spec": {"healthCheckNodePort": 30002, "ports": [{"nodePort": 30001, "protocol": "UDP"}, {"port": 1}]}});
        assert_eq!(node_ports(&service), [(30001, "UDP"), (30002, "health")]);
    }
}
