//! Several nodes on one segment, none with a default route, and a machine that is none of them.

use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;
use crate::net::overlay::kernel::Refusal;

const OUTSIDE: &str = "192.0.2.200";

/// Nodes 1, 2, … with `192.0.2.N`, `2001:db8::N` and the pod ranges `10.42.N.0/24`, `fd42:0:0:N::/64`.
struct Cluster {
    switch: Space,
    outside: Space,
    hosts: Vec<Host>,
    backend: Backend,
}

/// The Node object of node `n` with that address.
fn node_object(n: usize, ips: &[&str]) -> Event {
    let addresses: Vec<String> = ips.iter().map(|ip| format!(r#"{{"type":"InternalIP","address":"{ip}"}}"#)).collect();
    let json = format!(
        r#"{{"metadata":{{"name":"n{n}"}},"spec":{{"podCIDR":"10.42.{n}.0/24","podCIDRs":["10.42.{n}.0/24"]}},
        "status":{{"addresses":[{}]}}}}"#,
        addresses.join(",")
    );
    Event::Applied(object(&format!("n{n}"), &json))
}

impl Cluster {
    fn new(instance: &str, backend: Backend, nodes: usize) -> Self {
        let (switch, outside) = (Space::new(), Space::new());
        switch.command("ip link add bridge type bridge");
        switch.command("ip link set bridge up");
        let mut cluster = Self { switch, outside, hosts: Vec::new(), backend };
        cluster.plug(&cluster.outside, "outside", OUTSIDE);
        for n in 1..=nodes {
            let space = Space::new();
            cluster.plug(&space, &format!("port{n}"), &format!("192.0.2.{n}"));
            let host = Host::new(space, &format!("{instance}{n}"), &format!("n{n}"), |config| {
                config.backend = backend;
                config.node_ips = vec![format!("192.0.2.{n}").parse().unwrap()];
            });
            host.network.set_pod_cidrs(&[format!("10.42.{n}.0/24").parse().unwrap()]).unwrap();
            host.overlay.tell(overlay::Input::Node(Event::Restarted));
            host.overlay.tell(overlay::Input::Node(Event::Synced));
            cluster.hosts.push(host);
        }
        cluster
    }

    fn plug(&self, space: &Space, port: &str, ip: &str) {
        space.wire("wire", &self.switch, port.to_owned());
        self.switch.command(&format!("ip link set {port} master bridge up"));
        space.address("wire", &format!("{ip}/24"));
    }

    /// Tells every node of a change of nodes.
    fn tell(&self, event: &Event) {
        for host in &self.hosts {
            host.overlay.tell(overlay::Input::Node(event.clone()));
        }
    }

    fn tell_all(&self) {
        for n in 1..=self.hosts.len() {
            self.tell(&node_object(n, &[&format!("192.0.2.{n}")]));
        }
        assert_eq!(self.settle(), BTreeSet::new());
    }

    /// Waits until all that was said is in the kernels; returns what was refused.
    fn settle(&self) -> BTreeSet<Refusal> {
        let each = self.hosts.iter().map(|host| {
            host.settle();
            let (sender, done) = channel();
            host.overlay.tell(overlay::Input::Barrier(sender));
            done.recv_timeout(Duration::from_secs(30)).unwrap()
        });
        each.flatten().collect()
    }

    fn service(&self, name: &str, spec: &str) {
        self.hosts.iter().for_each(|host| host.service(name, spec));
    }

    fn slice(&self, name: &str, ports: &str, endpoints: &[(&str, &str)]) {
        self.hosts.iter().for_each(|host| host.slice(name, ports, endpoints));
    }
}

fn said(name: &str, peer: impl std::fmt::Display) -> Result<(String, String), std::io::ErrorKind> {
    Ok((name.to_owned(), peer.to_string()))
}

fn can_vxlan() -> bool {
    let can = is_root() && check::has_link_kind("vxlan");
    if !can {
        eprintln!("skipped: needs root and VXLAN");
    }
    can
}

fn pods_reach_pods(backend: Backend, instance: &str) {
    let cluster = Cluster::new(instance, backend, 3);
    cluster.tell_all();
    let pods: Vec<(Space, IpAddr)> =
        ["a", "b", "c"].into_iter().zip(&cluster.hosts).map(|(name, host)| host.pod(name, Vec::new())).collect();
    for (from, ip) in &pods {
        for (name, (_, to)) in ["a", "b", "c"].into_iter().zip(&pods) {
            assert_eq!(from.ask(&format!("{to}:8080")), said(name, ip), "{backend}: {ip} to {to} keeps its source");
        }
    }
    // The node itself: by an address that leads back.
    let own = if cluster.backend == Backend::Vxlan { "10.42.1.1" } else { "192.0.2.1" };
    assert_eq!(cluster.hosts[0].node.ask(&format!("{}:8080", pods[1].1)), said("b", own), "{backend}: node to pod");
    // Pods that leave the cluster do so as their node.
    cluster.outside.serve(SocketAddr::new(OUTSIDE.parse().unwrap(), 9000), "outside");
    assert_eq!(pods[1].0.ask(&format!("{OUTSIDE}:9000")), said("outside", "192.0.2.2"));
    // A pod that does not exist is refused by its node at once, wherever the question comes from.
    assert_eq!(pods[0].0.ask("10.42.2.77:8080"), Err(std::io::ErrorKind::HostUnreachable));
}

#[test]
fn pods_of_different_nodes_reach_each_other_by_vxlan() {
    if can_vxlan() {
        pods_reach_pods(Backend::Vxlan, "000001a");
    }
}

#[test]
fn pods_of_different_nodes_reach_each_other_by_routes_alone() {
    if is_root() {
        pods_reach_pods(Backend::HostGw, "000001b");
    }
}
