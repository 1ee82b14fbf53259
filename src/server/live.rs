//! The servers behind the `default/kubernetes` Service. Upstream's API servers renew a lease each; ours know from consensus who
//! is alive, so that nothing is written while nothing changes: the leader lists the voters that answered it lately and have not
//! said that they are leaving.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use coracle_raft::Node;
use coracle_store::{Op, RangeRequest, Txn, WatchRequest, prefix_end};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::bootstrap::{delete, get, put};
use super::cluster::{from_text, to_text};

/// How often the members are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// How often the objects are compared with what they should be, in looks.
const COMPARE: u32 = 5;
/// A server that has not answered the leader for so long leaves the list.
const GONE: Duration = Duration::from_secs(10);
/// Records of servers that are leaving.
const LEAVING: &str = "/coracle/leaving/";
const ENDPOINTS: &str = "/api/v1/namespaces/default/endpoints";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Says that this server is about to stop, or (`false`) that it is back.
///
/// # Errors
/// There is no leader.
pub async fn set_leaving(node: &Node, leaving: bool) -> Result<(), coracle_raft::ProposeError> {
    let key = Bytes::from(format!("{LEAVING}{}", to_text(node.id())));
    let is_set = node.store().get(&key).ok().flatten().is_some();
    let op = match leaving {
        true => Op::Put { key, value: Bytes::from_static(b"{}"), lease: 0 },
        false if !is_set => return Ok(()),
        false => Op::Delete { key },
    };
    node.txn(Txn { then: vec![op], ..Txn::default() }).await.map(drop)
}

/// Runs until shutdown; works while this server leads.
pub async fn run(client: kube::Client, node: Node, mut leadership: watch::Receiver<bool>, shutdown: CancellationToken) {
    let work = async {
        loop {
            if leadership.wait_for(|leads| *leads).await.is_err() {
                return;
            }
            let mut term = Term::new(node.clone(), client.clone());
            while *leadership.borrow() {
                term.step().await;
                term.pause().await;
            }
        }
    };
    shutdown.run_until_cancelled(work).await;
}

/// One period of leadership.
struct Term {
    node: Node,
    client: kube::Client,
    /// When each member last answered.
    seen: HashMap<u64, Instant>,
    written: Option<BTreeSet<SocketAddr>>,
    looks: u32,
}

impl Term {
    fn new(node: Node, client: kube::Client) -> Term {
        Term { node, client, seen: HashMap::new(), written: None, looks: 0 }
    }

    async fn step(&mut self) {
        let alive = self.alive(Instant::now());
        self.looks = self.looks.wrapping_add(1);
        let same = self.written.as_ref() == Some(&alive);
        if alive.is_empty() || (same && !self.looks.is_multiple_of(COMPARE)) {
            return;
        }
        let own = self.node.members().iter().find(|m| m.id == self.node.id()).and_then(|m| m.address.parse().ok());
        match reconcile(&self.client, &alive, own).await {
            Ok(()) => self.written = Some(alive),
            Err(error) => {
                tracing::warn!(error = super::explain(error.as_ref()), "writing the endpoints of default/kubernetes");
                self.written = None;
            }
        }
    }

    /// Until the next look, or until a server says that it leaves.
    async fn pause(&self) {
        let prefix = Bytes::from_static(LEAVING.as_bytes());
        let request = WatchRequest { end: prefix_end(&prefix), start: prefix, from_revision: None };
        let changed = async {
            match self.node.store().watch(request) {
                Ok(mut watcher) => drop(watcher.next().await),
                Err(_) => std::future::pending().await,
            }
        };
        // Either is a reason to look again.
        let _ = tokio::time::timeout(LOOK, changed).await;
    }

    fn alive(&mut self, now: Instant) -> BTreeSet<SocketAddr> {
        let leaving = self.leaving();
        let mut alive = BTreeSet::new();
        for member in self.node.members() {
            let itself = member.id == self.node.id();
            let seen = self.seen.entry(member.id).or_insert(now);
            if member.reachable || itself {
                *seen = now;
            }
            let fresh = now.saturating_duration_since(*seen) < GONE;
            if fresh && !member.learner && !leaving.contains(&member.id) {
                alive.extend(member.address.parse::<SocketAddr>().ok());
            }
        }
        alive
    }

    fn leaving(&self) -> BTreeSet<u64> {
        let start = Bytes::from_static(LEAVING.as_bytes());
        let rows = self.node.store().range(&RangeRequest {
            end: prefix_end(&start),
            start,
            keys_only: true,
            ..RangeRequest::default()
        });
        let rows = rows.map(|answer| answer.kvs).unwrap_or_default();
        let id = |key: &[u8]| std::str::from_utf8(key.strip_prefix(LEAVING.as_bytes())?).ok().and_then(from_text);
        rows.iter().filter_map(|row| id(&row.key)).collect()
    }
}

/// Whether the endpoints are there.
///
/// # Errors
/// The API does not answer.
pub async fn exists(client: &kube::Client) -> anyhow::Result<bool> {
    let endpoints = get(client, &format!("{ENDPOINTS}/kubernetes")).await?;
    Ok(endpoints.is_some() && get(client, &format!("{SLICES}/kubernetes")).await?.is_some())
}

/// Makes Endpoints and EndpointSlices what they should be, writing only what differs.
///
/// # Errors
/// The API does not answer.
pub async fn reconcile(
    client: &kube::Client,
    alive: &BTreeSet<SocketAddr>,
    own: Option<SocketAddr>,
) -> anyhow::Result<()> {
    let (endpoints, slices) = desired(alive, own);
    for (collection, object) in std::iter::once((ENDPOINTS, &endpoints)).chain(slices.iter().map(|s| (SLICES, s))) {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let stored = get(client, &format!("{collection}/{name}")).await?;
        if !stored.is_some_and(|stored| matches(&stored, object)) {
            put(client, collection, object.clone()).await?;
        }
    }
    let listed = get(client, &format!("{SLICES}?labelSelector={SERVICE_NAME}%3Dkubernetes")).await?.unwrap_or_default();
    let wanted: BTreeSet<&str> = slices.iter().filter_map(|slice| slice["metadata"]["name"].as_str()).collect();
    for slice in listed["items"].as_array().into_iter().flatten() {
        let name = slice["metadata"]["name"].as_str().unwrap_or_default();
        let ours = name == "kubernetes" || name.starts_with("kubernetes-");
        if ours && !wanted.contains(name) {
            delete(client, &format!("{SLICES}/{name}")).await?;
        }
    }
    Ok(())
}

/// Whether the stored object says what is wanted, whatever else it carries.
fn matches(stored: &Value, wanted: &Value) -> bool {
    match (stored, wanted) {
        (Value::Object(stored), Value::Object(wanted)) => {
            wanted.iter().all(|(key, value)| stored.get(key).is_some_and(|stored| matches(stored, value)))
        }
        (Value::Array(stored), Value::Array(wanted)) => {
            stored.len() == wanted.len() && stored.iter().zip(wanted).all(|(stored, wanted)| matches(stored, wanted))
        }
        _ => stored == wanted,
    }
}

/// Endpoints and EndpointSlices for these servers. A slice holds one family and one port; that of the leader is called
/// `kubernetes` as upstream's only one.
fn desired(alive: &BTreeSet<SocketAddr>, own: Option<SocketAddr>) -> (Value, Vec<Value>) {
    let mut groups: BTreeMap<(bool, u16), Vec<String>> = BTreeMap::new();
    for address in alive {
        groups.entry((address.is_ipv6(), address.port())).or_default().push(address.ip().to_string());
    }
    let first = own.map(|own| (own.is_ipv6(), own.port())).filter(|key| groups.contains_key(key));
    let first = first.or_else(|| groups.keys().next().copied());
    let port = |port: u16| json!([{ "name": "https", "port": port, "protocol": "TCP" }]);
    let subset = |((_, number), ips): (&(bool, u16), &Vec<String>)| {
        let addresses: Vec<Value> = ips.iter().map(|ip| json!({ "ip": ip })).collect();
        json!({ "addresses": addresses, "ports": port(*number) })
    };
    // Endpoints know no families; upstream writes those of the Service's own.
    let family = first.map(|(v6, _)| v6);
    let subsets: Vec<Value> = groups.iter().filter(|((v6, _), _)| Some(*v6) == family).map(subset).collect();
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {
            "name": "kubernetes", "namespace": "default", "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" },
        },
        "subsets": subsets,
    });
    let slice = |((v6, number), ips): (&(bool, u16), &Vec<String>)| {
        let kind = if *v6 { "IPv6" } else { "IPv4" };
        let name = match Some((*v6, *number)) == first {
            true => "kubernetes".to_owned(),
            false => format!("kubernetes-{}-{number}", kind.to_ascii_lowercase()),
        };
        let endpoints: Vec<Value> =
            ips.iter().map(|ip| json!({ "addresses": [ip], "conditions": { "ready": true } })).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": { "name": name, "namespace": "default", "labels": { SERVICE_NAME: "kubernetes" } },
            "addressType": kind, "endpoints": endpoints, "ports": port(*number),
        })
    };
    (endpoints, groups.iter().map(slice).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(addresses: &[&str]) -> BTreeSet<SocketAddr> {
        addresses.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn servers_with_one_port_are_one_slice_as_upstream_has_it() {
        let (endpoints, slices) =
            desired(&set(&["10.0.0.2:6443", "10.0.0.1:6443"]), Some("10.0.0.2:6443".parse().unwrap()));
        assert_eq!(endpoints["subsets"][0]["addresses"], json!([{ "ip": "10.0.0.1" }, { "ip": "10.0.0.2" }]));
        assert_eq!(slices.len(), 1);
        assert_eq!(slices[0]["metadata"]["name"], "kubernetes");
        assert_eq!(slices[0]["endpoints"][1]["addresses"], json!(["10.0.0.2"]));
    }

    #[test]
    fn other_ports_and_families_get_slices_of_their_own() {
        let (endpoints, slices) = desired(
            &set(&["10.0.0.1:6443", "10.0.0.2:7443", "[fd00::1]:6443"]),
            Some("10.0.0.2:7443".parse().unwrap()),
        );
        let names: Vec<_> = slices.iter().map(|s| s["metadata"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["kubernetes-ipv4-6443", "kubernetes", "kubernetes-ipv6-6443"]);
        assert_eq!(endpoints["subsets"].as_array().unwrap().len(), 2, "of the family of the leader");
    }

    #[test]
    fn what_the_server_adds_to_objects_is_no_difference() {
        let wanted = json!({ "a": [{ "ip": "x" }] });
        assert!(matches(&json!({ "a": [{ "ip": "x", "more": 1 }], "b": 2 }), &wanted));
        for stored in [json!({ "a": [] }), json!({ "a": [{ "ip": "y" }] }), json!({})] {
            assert!(!matches(&stored, &wanted), "{stored}");
        }
    }
}
