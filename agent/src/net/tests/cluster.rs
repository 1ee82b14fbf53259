//! Several nodes on one segment, none with a default route, and a machine that is none of them.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::*;
use crate::net::overlay::kernel::Refusal;
use crate::net::overlay::probe::{self, Peer};

const OUTSIDE: &str = "192.0.2.200";
const OUTSIDE_V6: &str = "2001:db8::200";

/// Which families the machines and the pods have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Families {
    V4,
    V6,
    Both,
    /// Pods of both on machines that have IPv4 only.
    BothOverV4,
}

impl Families {
    fn machines(self, n: usize) -> Vec<String> {
        let (v4, v6) = (format!("192.0.2.{n}"), format!("2001:db8::{n}"));
        match self {
            Self::V4 | Self::BothOverV4 => vec![v4],
            Self::V6 => vec![v6],
            Self::Both => vec![v4, v6],
        }
    }

    fn pick<T>(self, v4: T, v6: T) -> Vec<T> {
        match self {
            Self::V4 => vec![v4],
            Self::V6 => vec![v6],
            Self::Both | Self::BothOverV4 => vec![v4, v6],
        }
    }

    fn ranges(self, n: usize) -> Vec<String> {
        self.pick(format!("10.42.{n}.0/24"), format!("fd42:0:0:{n}::/64"))
    }
}

/// Nodes 1, 2, … with `192.0.2.N`, `2001:db8::N` and the pod ranges `10.42.N.0/24`, `fd42:0:0:N::/64`.
struct Cluster {
    switch: Space,
    outside: Space,
    hosts: Vec<Host>,
    backend: Backend,
    families: Families,
}

/// The Node object of node `n` with those addresses.
fn node_object(n: usize, ips: &[String], ranges: &[String]) -> Event {
    let addresses: Vec<_> = ips.iter().map(|ip| serde_json::json!({"type": "InternalIP", "address": ip})).collect();
    let json = serde_json::json!({
        "metadata": {"name": format!("n{n}")},
        "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
        "status": {"addresses": addresses},
    });
    Event::Applied(object(&format!("n{n}"), &json.to_string()))
}

impl Cluster {
    fn new(instance: &str, backend: Backend, families: Families, nodes: usize) -> Self {
        let (switch, outside) = (Space::new(), Space::new());
        switch.command("ip link add bridge type bridge");
        switch.command("ip link set bridge up");
        let mut cluster = Self { switch, outside, hosts: Vec::new(), backend, families };
        cluster.plug(&cluster.outside, "outside", 200);
        for n in 1..=nodes {
            let space = Space::new();
            cluster.plug(&space, &format!("port{n}"), n);
            cluster.hosts.push(cluster.host(space, &format!("{instance}{n}"), n));
        }
        // A bridge takes its time to see that a port has a carrier.
        let heard = |from: &Space, to: &str| from.ask(&at(to, 1)) == Err(std::io::ErrorKind::ConnectionRefused);
        for host in &cluster.hosts {
            for ip in families.machines(200) {
                until("machines hear each other", || heard(&host.node, &ip));
            }
        }
        cluster
    }

    fn host(&self, space: Space, instance: &str, n: usize) -> Host {
        let host = Host::new(space, instance, &format!("n{n}"), |config| {
            let parsed = |text: &str| text.parse().unwrap();
            config.backend = self.backend;
            config.node_ips = self.families.machines(n).iter().map(|ip| ip.parse().unwrap()).collect();
            config.cluster_cidrs = self.families.pick(parsed("10.42.0.0/16"), parsed("fd42::/56"));
            config.service_cidrs = self.families.pick(parsed("10.43.0.0/16"), parsed("fd43::/112"));
            let dns = self.families.pick("10.43.0.10", "fd43::a");
            config.cluster_dns = dns.iter().map(|ip| ip.parse().unwrap()).collect();
        });
        let ranges = self.families.ranges(n);
        host.network.set_pod_cidrs(&ranges.iter().map(|range| range.parse().unwrap()).collect::<Vec<_>>()).unwrap();
        host.overlay.tell(overlay::Input::Node(Event::Restarted));
        host.overlay.tell(overlay::Input::Node(Event::Synced));
        host
    }

    fn plug(&self, space: &Space, port: &str, n: usize) {
        space.without_duplicate_address_detection();
        space.wire("wire", &self.switch, port.to_owned());
        self.switch.command(&format!("ip link set {port} master bridge up"));
        for ip in self.families.machines(n) {
            space.address("wire", &format!("{ip}/{}", if ip.contains(':') { 64 } else { 24 }));
        }
    }

    /// Tells every node of a change of nodes.
    fn tell(&self, event: &Event) {
        for host in &self.hosts {
            host.overlay.tell(overlay::Input::Node(event.clone()));
        }
    }

    fn tell_all(&self) {
        for n in 1..=self.hosts.len() {
            self.tell(&node_object(n, &self.families.machines(n), &self.families.ranges(n)));
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

    /// Pods a, b, … on nodes 1, 2, ….
    fn pods(&self) -> Vec<(Space, Vec<IpAddr>)> {
        let names = ["a", "b", "c"].into_iter().zip(&self.hosts);
        names.map(|(name, host)| host.pod_of_all_families(name, Vec::new())).collect()
    }
}

fn said(name: &str, peer: impl std::fmt::Display) -> Result<(String, String), std::io::ErrorKind> {
    Ok((name.to_owned(), peer.to_string()))
}

fn at(ip: impl std::fmt::Display, port: u16) -> String {
    SocketAddr::new(ip.to_string().parse().unwrap(), port).to_string()
}

fn can_vxlan() -> bool {
    let can = is_root() && check::has_link_kind("vxlan");
    if !can {
        eprintln!("skipped: needs root and VXLAN");
    }
    can
}

fn pods_reach_pods(instance: &str, backend: Backend, families: Families) {
    let cluster = Cluster::new(instance, backend, families, 3);
    cluster.tell_all();
    let pods = cluster.pods();
    for (from, from_ips) in &pods {
        for (name, (_, to_ips)) in ["a", "b", "c"].into_iter().zip(&pods) {
            for (from_ip, to) in from_ips.iter().zip(to_ips) {
                assert_eq!(from.ask_patiently(&at(to, 8080)), said(name, from_ip), "{backend}: {to} sees its client");
            }
        }
    }
    let (v4, v6) =
        if backend == Backend::Vxlan { ("10.42.1.1", "fd42:0:0:1::1") } else { ("192.0.2.1", "2001:db8::1") };
    for (to, own) in pods[1].1.iter().zip(families.pick(v4, v6)) {
        assert_eq!(
            cluster.hosts[0].node.ask_patiently(&at(to, 8080)),
            said("b", own),
            "a node comes by a way that leads back"
        );
    }
    let machines = [(OUTSIDE, "192.0.2.2"), (OUTSIDE_V6, "2001:db8::2")];
    for (outside, node) in machines.into_iter().filter(|(_, node)| families.machines(2).contains(&(*node).to_owned())) {
        cluster.outside.serve(at(outside, 9000).parse().unwrap(), "outside");
        assert_eq!(
            pods[1].0.ask_patiently(&at(outside, 9000)),
            said("outside", node),
            "pods leave the cluster as their node"
        );
    }
    if families != Families::V6 {
        // Of IPv6 a connection hears the second such error only, a second later.
        let refused = pods[0].0.ask_patiently("10.42.2.77:8080");
        assert_eq!(refused, Err(std::io::ErrorKind::HostUnreachable), "no such pod, said at once by its node");
    }
}

#[test]
fn pods_of_different_nodes_reach_each_other_by_vxlan() {
    if can_vxlan() {
        pods_reach_pods("000001a", Backend::Vxlan, Families::V4);
        pods_reach_pods("000001b", Backend::Vxlan, Families::Both);
        pods_reach_pods("000001c", Backend::Vxlan, Families::V6);
        pods_reach_pods("000001d", Backend::Vxlan, Families::BothOverV4);
    }
}

#[test]
fn pods_of_different_nodes_reach_each_other_by_routes_alone() {
    if is_root() {
        pods_reach_pods("000001e", Backend::HostGw, Families::V4);
        pods_reach_pods("000001f", Backend::HostGw, Families::Both);
    }
}

#[test]
fn the_ways_follow_nodes_that_move_and_go_and_survive_those_who_clear_them() {
    if !can_vxlan() {
        return;
    }
    let cluster = Cluster::new("0000020", Backend::Vxlan, Families::V4, 2);
    cluster.tell_all();
    let pods = cluster.pods();
    let first = &cluster.hosts[0].node;
    let reached = || pods[0].0.ask_patiently(&at(pods[1].1[0], 8080)).is_ok();
    assert!(reached());
    let link = "co4-00000201";
    for cut in [
        format!("ip link del {link}"),
        format!("ip link set {link} down"),
        "ip route del 10.42.2.0/24".to_owned(),
        format!("ip neigh flush dev {link} nud permanent"),
        format!("ip addr flush dev {link}"),
    ] {
        first.command(&cut);
        until(&format!("after {cut}"), reached);
        assert_eq!(cluster.settle(), BTreeSet::new());
    }
    // The machine comes back with another address.
    cluster.hosts[1].node.command("ip addr add 192.0.2.99/24 dev wire");
    cluster.tell(&node_object(2, &["192.0.2.99".to_owned()], &cluster.families.ranges(2)));
    cluster.settle();
    let forwarding = first.command(&format!("bridge fdb show dev {link}"));
    assert!(forwarding.contains("192.0.2.99") && !forwarding.contains("192.0.2.2 "), "{forwarding}");
    // The node is deleted: nothing of it is left.
    cluster.tell(&Event::Deleted(object("n2", "{}")));
    cluster.settle();
    assert_eq!(first.command(&format!("bridge fdb show dev {link}")), "");
    assert_eq!(first.command(&format!("ip neigh show dev {link} nud permanent")), "");
    assert!(!first.command("ip route").contains("10.42.2.0/24"));
    // Another list, without what was there.
    cluster.tell_all();
    assert!(reached());
    cluster.tell(&Event::Restarted);
    cluster.tell(&node_object(1, &cluster.families.machines(1), &cluster.families.ranges(1)));
    cluster.tell(&Event::Synced);
    cluster.settle();
    assert!(!first.command("ip route").contains("10.42.2.0/24"));
}

#[test]
fn a_change_of_the_backend_and_a_teardown_leave_nothing_of_the_former() {
    if !can_vxlan() {
        return;
    }
    let mut cluster = Cluster::new("0000023", Backend::Vxlan, Families::V4, 2);
    cluster.tell_all();
    let pods = cluster.pods();
    let links = |host: &Host| host.node.command("ip -o link");
    assert!(links(&cluster.hosts[0]).contains("co4-"));
    cluster.backend = Backend::HostGw;
    for n in [1, 2] {
        let host = cluster.hosts.remove(0);
        drop((host.overlay, host.proxy, host.network));
        std::thread::sleep(Duration::from_millis(100));
        cluster.hosts.push(cluster.host(host.node, &format!("0000023{n}"), n));
    }
    cluster.tell_all();
    assert!(!links(&cluster.hosts[0]).contains("co4-"));
    assert!(pods[0].0.ask_patiently(&at(pods[1].1[0], 8080)).is_ok());
    for host in std::mem::take(&mut cluster.hosts) {
        let Host { node, network, proxy, overlay, config, directory } = host;
        drop((network, proxy, overlay));
        std::thread::sleep(Duration::from_millis(100));
        assert!(teardown(&config.instance_id, directory.path()).is_empty());
        let (links, routes) = (node.command("ip -o link"), node.command("ip route"));
        assert!(!links.contains("co4-") && !routes.contains("10.42."), "{links}{routes}");
    }
}

#[test]
fn machines_that_are_no_neighbours_are_told_with_the_remedy() {
    if !is_root() {
        return;
    }
    let cluster = Cluster::new("0000024", Backend::HostGw, Families::V4, 1);
    cluster.tell(&node_object(1, &cluster.families.machines(1), &cluster.families.ranges(1)));
    cluster.tell(&node_object(2, &["198.51.100.2".to_owned()], &cluster.families.ranges(2)));
    let refusals = cluster.settle();
    let refusal = refusals.first().unwrap();
    assert!(refusal.what.contains("10.42.2.0/24 by 198.51.100.2") && refusal.remedy.contains("vxlan"), "{refusals:?}");
}

#[test]
fn services_answer_on_every_node_and_policies_hold_across_nodes() {
    if !can_vxlan() {
        return;
    }
    let cluster = Cluster::new("0000025", Backend::Vxlan, Families::V4, 3);
    cluster.tell_all();
    let pods = cluster.pods();
    let (a, b) = (&pods[0], &pods[1]);
    let ports = |port: u16| format!(r#""ports":[{{"port":80,"nodePort":{port}}}]"#);
    cluster.service("all", &format!(r#""type":"NodePort","clusterIP":"10.43.0.50",{}"#, ports(30050)));
    let local = format!(
        r#""type":"LoadBalancer","clusterIP":"10.43.0.51","externalTrafficPolicy":"Local","healthCheckNodePort":32051,{}"#,
        ports(30051)
    );
    cluster.service("outer", &local);
    cluster.service("inner", r#""clusterIP":"10.43.0.52","internalTrafficPolicy":"Local","ports":[{"port":80}]"#);
    for name in ["all", "outer", "inner"] {
        cluster.slice(name, TO_8080, &[(&b.1[0].to_string(), "n2")]);
    }
    cluster.settle();

    assert_eq!(a.0.ask_patiently("10.43.0.50:80"), said("b", a.1[0]), "a pod keeps its address to another node");
    assert_eq!(b.0.ask_patiently("10.43.0.50:80"), said("b", "192.0.2.2"), "hairpin");
    assert_eq!(
        cluster.hosts[0].node.ask_patiently("10.43.0.50:80"),
        said("b", "10.42.1.1"),
        "a node to another one's pod"
    );
    for (node, seen) in [(1, "10.42.1.1"), (2, OUTSIDE), (3, "10.42.3.1")] {
        let answer = cluster.outside.ask_patiently(&format!("192.0.2.{node}:30050"));
        assert_eq!(answer, said("b", seen), "node {node}: the node stands in where the way back needs it");
        assert_eq!(
            a.0.ask_patiently(&format!("192.0.2.{node}:30050")).map(|(name, _)| name),
            Ok("b".into()),
            "by node {node}"
        );
    }
    assert_eq!(cluster.outside.ask_patiently("192.0.2.2:30051"), said("b", OUTSIDE), "the client's address is kept");
    let silence = Err(std::io::ErrorKind::TimedOut);
    assert_eq!(cluster.outside.ask("192.0.2.1:30051"), silence, "no endpoint on that node");
    let health = |node: usize| {
        cluster.outside.run(move || {
            let to: SocketAddr = format!("192.0.2.{node}:32051").parse().unwrap();
            let mut stream = TcpStream::connect(to).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text[9..12].to_owned()
        })
    };
    assert_eq!((health(1), health(2), health(3)), ("503".into(), "200".into(), "503".into()));
    assert_eq!(a.0.ask("10.43.0.52:80"), silence, "endpoints of other nodes only");
    assert_eq!(b.0.ask("10.43.0.52:80"), said("b", "192.0.2.2"));
}

#[test]
fn datagrams_follow_an_endpoint_to_another_node() {
    if !can_vxlan() {
        return;
    }
    let cluster = Cluster::new("0000026", Backend::Vxlan, Families::V4, 3);
    cluster.tell_all();
    let pods = cluster.pods();
    cluster.service(
        "names",
        r#""type":"NodePort","clusterIP":"10.43.0.53","ports":[{"port":53,"protocol":"UDP","nodePort":30053}]"#,
    );
    let (inside, outside) = (pods[0].0.datagram_socket(), cluster.outside.datagram_socket());
    for (name, pod) in [("b", 1), ("c", 2), ("a", 0), ("b", 1)] {
        let endpoint = (pods[pod].1[0].to_string(), format!("n{}", pod + 1));
        cluster.slice("names", r#"{"port":8080,"protocol":"UDP"}"#, &[(&endpoint.0, &endpoint.1)]);
        cluster.settle();
        // An answer of the former endpoint may be under way.
        let ask = |space: &Space, socket, at| (0..2).filter_map(|_| space.ask_datagram(socket, at)).next_back();
        assert_eq!(ask(&pods[0].0, &inside, "10.43.0.53:53").as_deref(), Some(name));
        assert_eq!(ask(&cluster.outside, &outside, "192.0.2.1:30053").as_deref(), Some(name));
    }
}

#[test]
fn services_of_both_families_and_of_ipv6_alone() {
    if !can_vxlan() {
        return;
    }
    for (instance, families) in [("0000027", Families::Both), ("0000028", Families::V6)] {
        let cluster = Cluster::new(instance, Backend::Vxlan, families, 2);
        cluster.tell_all();
        let pods = cluster.pods();
        let ips = families.pick(r#""10.43.0.60""#, r#""fd43::60""#);
        let spec = format!(
            r#""type":"NodePort","clusterIP":{},"clusterIPs":[{}],"ports":[{{"port":80,"nodePort":30060}}]"#,
            ips[0],
            ips.join(",")
        );
        cluster.service("web", &spec);
        let b6 = pods[1].1.last().unwrap().to_string();
        cluster.slice("web", TO_8080, &[(&b6, "n2")]);
        cluster.settle();
        assert_eq!(pods[0].0.ask_patiently("[fd43::60]:80"), said("b", pods[0].1.last().unwrap()));
        assert_eq!(pods[1].0.ask_patiently("[fd43::60]:80"), said("b", "2001:db8::2"), "hairpin");
        assert_eq!(cluster.outside.ask_patiently("[2001:db8::1]:30060"), said("b", "fd42:0:0:1::1"));
        assert_eq!(cluster.outside.ask_patiently("[2001:db8::2]:30060"), said("b", OUTSIDE_V6));
        let refused = Err(std::io::ErrorKind::ConnectionRefused);
        assert_eq!(pods[0].0.ask_patiently("[fd43::99]:80"), refused, "no such Service");
        if families == Families::Both {
            assert_eq!(pods[0].0.ask_patiently("10.43.0.60:80"), refused, "no endpoint of that family");
        }
        cluster.hosts[0].nft();
    }
}

#[test]
fn a_path_that_is_blocked_or_too_narrow_is_found_out() {
    if !can_vxlan() {
        return;
    }
    let cluster = Cluster::new("0000029", Backend::Vxlan, Families::V4, 2);
    cluster.tell_all();
    let (near, far) = (&cluster.hosts[0].node, &cluster.hosts[1].node);
    let ask = || {
        near.run(|| {
            let ip = |text: &str| text.parse().unwrap();
            let peer = Peer { node: "n2".into(), machine: ip("192.0.2.2"), overlay: ip("10.42.2.1"), mtu: 1450 };
            probe::ask(&[peer])[0]
        })
    };
    let answers = ask();
    assert!(answers.machine && answers.small && answers.large && answers.datagram, "{answers:?}");
    far.command("nft add table inet firewall");
    far.command("nft add chain inet firewall input { type filter hook input priority 0 ; }");
    far.command("nft add rule inet firewall input udp dport 8472 meta length > 1400 drop");
    assert!(ask().problem().unwrap().remedy.contains("MTU"));
    far.command("nft add rule inet firewall input udp dport 8472 drop");
    assert!(ask().problem().unwrap().remedy.contains("8472"));
    far.command("nft flush chain inet firewall input");
    far.command("nft add rule inet firewall input iifname co4* meta l4proto udp drop");
    assert!(ask().problem().unwrap().remedy.contains("checksums"));
}
