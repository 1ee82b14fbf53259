//! The real kernel, in network namespaces that live as long as a thread of the test. Needs root; `nft` is used to see
//! that an administrator could read our tables.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::netlink::Socket;
use super::netlink::message::Batch;
use super::netlink::route::{SCOPE_UNIVERSE, Veth};
use super::proxy::Input;
use super::*;
use crate::watch::{Event, Object};

const NODE: &str = "192.0.2.1";
const CLIENT: &str = "192.0.2.2";

/// A thread in a namespace of its own that does what it is told.
struct Space {
    path: PathBuf,
    work: Sender<Box<dyn FnOnce() + Send>>,
}

impl Space {
    fn new() -> Self {
        let (work, todo): (_, Receiver<Box<dyn FnOnce() + Send>>) = channel();
        let (tell, told) = channel();
        std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let thread = nix::unistd::gettid();
            tell.send(PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))).unwrap();
            todo.into_iter().for_each(|work| work());
        });
        Self { path: told.recv().unwrap(), work }
    }

    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        self.work.send(Box::new(move || drop(done.send(work())))).unwrap();
        result.recv_timeout(Duration::from_secs(30)).expect("work in a namespace failed")
    }

    /// Answers every TCP connection with a name and the peer's address, and every datagram likewise.
    fn serve(&self, at: SocketAddr, name: &'static str) {
        self.run(move || {
            let listener = TcpListener::bind(at).unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    let peer = stream.peer_addr().unwrap().ip();
                    let _ = stream.write_all(format!("{name} {peer}").as_bytes());
                }
            });
            let socket = UdpSocket::bind(at).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(format!("{name} {}", peer.ip()).as_bytes(), peer);
                }
            });
        });
    }

    /// Name of the server that answers and the address that it saw, or what went wrong.
    fn ask(&self, at: &str) -> Result<(String, String), std::io::ErrorKind> {
        let at: SocketAddr = at.parse().unwrap();
        self.run(move || {
            let mut stream = TcpStream::connect_timeout(&at, Duration::from_millis(700)).map_err(|e| e.kind())?;
            stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).map_err(|e| e.kind())?;
            let (name, peer) = text.split_once(' ').unwrap();
            Ok((name.to_owned(), peer.to_owned()))
        })
    }

    fn datagram_socket(&self) -> Arc<UdpSocket> {
        self.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            Arc::new(socket)
        })
    }

    /// Name of the server that answers this socket, if any does.
    fn ask_datagram(&self, socket: &Arc<UdpSocket>, at: &str) -> Option<String> {
        let (socket, at) = (socket.clone(), at.parse::<SocketAddr>().unwrap());
        self.run(move || {
            socket.send_to(b"?", at).ok()?;
            let mut buffer = [0; 64];
            let (length, _) = socket.recv_from(&mut buffer).ok()?;
            Some(String::from_utf8_lossy(&buffer[..length]).split(' ').next()?.to_owned())
        })
    }
}

/// A node (without default route), a machine beside it, and the proxy's thread.
struct World {
    node: Space,
    client: Space,
    network: Network,
    proxy: Sender<Input>,
    config: NetworkConfig,
    directory: tempfile::TempDir,
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

impl World {
    fn new(instance: &str) -> Self {
        let (node, client) = (Space::new(), Space::new());
        let client_path = client.path.clone();
        node.run(move || {
            use std::os::fd::AsRawFd;
            let other = std::fs::File::open(client_path).unwrap();
            let mut batch = Batch::new();
            batch.add_veth(&Veth {
                name: "wire",
                alias: "",
                mac: [2, 0, 0, 0, 0, 1],
                peer_name: "wire",
                peer_mac: [2, 0, 0, 0, 0, 2],
                peer_netns: other.as_raw_fd(),
                mtu: 1500,
            });
            Socket::route().unwrap().apply(&mut batch).unwrap();
        });
        for (space, ip) in [(&node, NODE), (&client, CLIENT)] {
            space.run(move || {
                let mut socket = Socket::route().unwrap();
                let (wire, lo) = (socket.link("wire").unwrap().unwrap(), socket.link("lo").unwrap().unwrap());
                let mut batch = Batch::new();
                batch.set_up(lo.index, &[], true);
                batch.set_up(wire.index, &[], true);
                batch.add_address(wire.index, format!("{ip}/24").parse().unwrap(), SCOPE_UNIVERSE);
                // IFA_ADDRESS equals the local address, so the subnet's route comes with it.
                socket.apply(&mut batch).unwrap();
            });
        }
        let directory = tempfile::tempdir().unwrap();
        let config = NetworkConfig {
            instance_id: instance.to_owned(),
            agent_dir: directory.path().to_owned(),
            resolv_conf: directory.path().join("resolv.conf"),
            node_name: "me".into(),
            node_ips: vec![NODE.parse().unwrap()],
            cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap()],
            service_cidrs: vec!["10.43.0.0/16".parse().unwrap()],
            cluster_dns: vec!["10.43.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
        };
        let (network, proxy) = Self::start(&node, &config);
        network.set_pod_cidrs(&["10.42.0.0/24".parse().unwrap()]).unwrap();
        let world = Self { node, client, network, proxy, config, directory };
        world.tell(Event::Restarted, Event::Restarted);
        world.tell(Event::Synced, Event::Synced);
        world.settle();
        world
    }

    fn start(node: &Space, config: &NetworkConfig) -> (Network, Sender<Input>) {
        let config = config.clone();
        node.run(move || {
            let facts = host::prepare(&config).unwrap();
            let (health, followed) = tokio::sync::watch::channel(Default::default());
            // In this thread's namespace, until the proxy ends.
            std::thread::spawn(|| block_on(proxy::health::serve(followed)));
            teardown::remember(&config).unwrap();
            let ipam = ipam::Ipam::load(config.agent_dir.join("ipam")).unwrap();
            let sender = proxy::start(&config, health).unwrap();
            (Network::assemble(config, facts, ipam, Some(sender.clone())), sender)
        })
    }

    fn tell(&self, service: Event, slice: Event) {
        self.proxy.send(Input::Service(service)).unwrap();
        self.proxy.send(Input::Slice(slice)).unwrap();
    }

    /// Waits until all that was said is in the kernel; returns how long it took.
    fn settle(&self) -> Duration {
        let started = Instant::now();
        let (sender, done) = channel();
        self.proxy.send(Input::Barrier(sender)).unwrap();
        assert_eq!(done.recv_timeout(Duration::from_secs(60)).unwrap(), None);
        started.elapsed()
    }

    fn service(&self, name: &str, spec: &str) {
        let json = format!(r#"{{"metadata":{{"namespace":"n","name":"{name}"}},"spec":{{{spec}}}}}"#);
        self.proxy.send(Input::Service(Event::Applied(object(name, &json)))).unwrap();
    }

    /// Endpoints as (address, node) pairs.
    fn slice(&self, name: &str, ports: &str, endpoints: &[(&str, &str)]) {
        let endpoints: Vec<String> = endpoints
            .iter()
            .map(|(ip, node)| format!(r#"{{"addresses":["{ip}"],"nodeName":"{node}","conditions":{{"ready":true}}}}"#))
            .collect();
        let json = format!(
            r#"{{"metadata":{{"namespace":"n","name":"{name}-1","labels":{{"kubernetes.io/service-name":"{name}"}}}},
            "addressType":"IPv4","ports":[{ports}],"endpoints":[{}]}}"#,
            endpoints.join(",")
        );
        self.proxy.send(Input::Slice(Event::Applied(object(&format!("{name}-1"), &json)))).unwrap();
    }

    /// A pod with servers on 8080.
    fn pod(&self, name: &'static str, host_ports: Vec<HostPort>) -> (Space, IpAddr) {
        let space = Space::new();
        let ip = self.attach(name, &space, host_ports);
        space.serve(SocketAddr::new(ip, 8080), name);
        (space, ip)
    }

    fn attach(&self, name: &str, space: &Space, host_ports: Vec<HostPort>) -> IpAddr {
        let request = PodNetworkRequest {
            uid: format!("uid-{name}"),
            namespace: "n".into(),
            name: name.into(),
            netns: space.path.clone(),
            host_ports,
        };
        let network = self.network.clone();
        let addresses = self.node.run(move || block_on(async move { network.attach(&request).await })).unwrap();
        addresses.ips[0]
    }

    /// The process dies and the next one starts; the API is listed anew.
    fn restart(&mut self, again: impl FnOnce(&Self)) {
        let (idle, _) = channel();
        self.proxy = idle;
        self.network = Network::assemble(
            self.config.clone(),
            host::HostFacts { mtu: 1450 },
            ipam::Ipam::load(self.directory.path().join("ipam")).unwrap(),
            None,
        );
        // The thread ends when its last sender is gone, and its socket with it.
        std::thread::sleep(Duration::from_millis(50));
        (self.network, self.proxy) = Self::start(&self.node, &self.config);
        self.network.announce_all();
        self.tell(Event::Restarted, Event::Restarted);
        again(self);
        self.tell(Event::Synced, Event::Synced);
        self.settle();
    }

    fn detach(&self, name: &str) {
        let (network, uid) = (self.network.clone(), format!("uid-{name}"));
        self.node.run(move || block_on(async move { network.detach(&uid).await })).unwrap();
    }

    /// Names of the servers that answer so many new connections.
    fn asked(space: &Space, at: &str, times: usize) -> BTreeSet<String> {
        (0..times).filter_map(|_| space.ask(at).ok()).map(|(name, _)| name).collect()
    }

    fn nft(&self) -> String {
        self.node.run(|| {
            let output = std::process::Command::new("nft").args(["-n", "list", "ruleset"]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        })
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn object(name: &str, json: &str) -> Object {
    Object {
        namespace: "n".into(),
        name: name.into(),
        uid: String::new(),
        json: bytes::Bytes::copy_from_slice(json.as_bytes()),
    }
}

const TCP_80: &str = r#""ports":[{"port":80,"protocol":"TCP","nodePort":30080}]"#;
const TO_8080: &str = r#"{"port":8080,"protocol":"TCP"}"#;

#[test]
fn pods_and_services_answer_everybody_without_a_default_route() {
    if !is_root() {
        return;
    }
    let world = World::new("0000000a");
    let (a, a_ip) = world.pod("a", Vec::new());
    let (b, b_ip) = world.pod("b", Vec::new());
    world.service("web", &format!(r#""type":"NodePort","clusterIP":"10.43.0.50",{TCP_80}"#));
    world.slice("web", TO_8080, &[(&b_ip.to_string(), "me")]);
    let took = world.settle();
    assert!(world.nft().contains("10.43.0.50 . 6 . 80 : goto lb-1"));
    assert!(took < Duration::from_secs(5), "{took:?}");

    let node_ip = NODE.to_owned();
    assert_eq!(world.node.ask(&format!("{a_ip}:8080")), Ok(("a".into(), node_ip.clone())), "node to pod");
    assert_eq!(a.ask(&format!("{b_ip}:8080")), Ok(("b".into(), a_ip.to_string())), "pod to pod");
    assert_eq!(a.ask("10.43.0.50:80"), Ok(("b".into(), a_ip.to_string())), "pod to ClusterIP keeps the source");
    assert_eq!(world.node.ask("10.43.0.50:80"), Ok(("b".into(), node_ip.clone())), "node to ClusterIP");
    assert_eq!(b.ask("10.43.0.50:80"), Ok(("b".into(), node_ip.clone())), "pod to itself by its Service");
    assert_eq!(world.client.ask("192.0.2.1:30080"), Ok(("b".into(), CLIENT.into())), "node port from outside");
    assert_eq!(world.node.ask("192.0.2.1:30080"), Ok(("b".into(), node_ip.clone())), "node port from the node");
    assert_eq!(world.node.ask("127.0.0.1:30080"), Ok(("b".into(), node_ip.clone())), "node port on loopback");
    assert_eq!(a.ask("192.0.2.1:30080"), Ok(("b".into(), a_ip.to_string())), "node port from a pod");

    world.client.serve("192.0.2.2:9000".parse().unwrap(), "outside");
    assert_eq!(a.ask("192.0.2.2:9000"), Ok(("outside".into(), node_ip)), "pods leave as the node");

    world.slice("web", TO_8080, &[]);
    world.settle();
    for (who, space) in [("node", &world.node), ("pod", &a)] {
        assert_eq!(space.ask("10.43.0.50:80"), Err(std::io::ErrorKind::ConnectionRefused), "no endpoint, {who}");
        assert_eq!(space.ask("10.43.0.77:80"), Err(std::io::ErrorKind::ConnectionRefused), "no such Service, {who}");
    }
    assert_eq!(world.client.ask("192.0.2.1:30080"), Err(std::io::ErrorKind::ConnectionRefused), "no endpoint");
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn clients_are_spread_over_endpoints_or_stay_with_one_when_the_service_says_so() {
    if !is_root() {
        return;
    }
    let mut world = World::new("0000000b");
    let (a, _) = world.pod("a", Vec::new());
    let pods = [world.pod("b", Vec::new()), world.pod("c", Vec::new()), world.pod("d", Vec::new())];
    let ips: Vec<String> = pods.iter().map(|(_, ip)| ip.to_string()).collect();
    let endpoints: Vec<(&str, &str)> = ips.iter().map(|ip| (ip.as_str(), "me")).collect();
    let spread = format!(r#""clusterIP":"10.43.0.51",{TCP_80}"#);
    let sticky = r#""clusterIP":"10.43.0.52","sessionAffinity":"ClientIP","type":"NodePort",
        "sessionAffinityConfig":{"clientIP":{"timeoutSeconds":60}},"ports":[{"port":80,"nodePort":30081}]"#;
    let tell = |world: &World| {
        world.service("spread", &spread);
        world.slice("spread", TO_8080, &endpoints);
        world.service("sticky", sticky);
        world.slice("sticky", TO_8080, &endpoints);
    };
    tell(&world);
    world.settle();
    assert_eq!(World::asked(&a, "10.43.0.51:80", 60), set(&["b", "c", "d"]));
    let stuck = World::asked(&a, "10.43.0.52:80", 20);
    assert_eq!(stuck.len(), 1, "{stuck:?}");
    assert_eq!(World::asked(&a, "192.0.2.1:30081", 5), stuck, "the same client by another frontend");
    let chains = world.nft();
    assert!(chains.contains("chain affinity-") && chains.contains("set clients-"), "{chains}");

    world.restart(tell);
    assert_eq!(World::asked(&a, "10.43.0.52:80", 20), stuck, "a restart forgets no client");

    let without = endpoints.iter().copied().filter(|(ip, _)| {
        let index = ips.iter().position(|other| other == ip).unwrap();
        !stuck.contains(["b", "c", "d"][index])
    });
    world.slice("sticky", TO_8080, &without.collect::<Vec<_>>());
    world.settle();
    let moved = World::asked(&a, "10.43.0.52:80", 20);
    assert!(moved.len() == 1 && moved != stuck, "{moved:?} after {stuck:?}");

    world.slice("sticky", TO_8080, &[]);
    world.service("spread", &spread.replace("ports", "unused"));
    world.settle();
    let rules = world.nft();
    assert!(!rules.contains("affinity-") && !rules.contains("clients-") && !rules.contains("10.43.0.51"), "{rules}");
}

#[test]
fn policies_keep_traffic_on_the_node_and_the_address_of_clients() {
    if !is_root() {
        return;
    }
    let world = World::new("0000000c");
    let (a, a_ip) = world.pod("a", Vec::new());
    let (_b, b_ip) = world.pod("b", Vec::new());
    // An endpoint on "another node": the machine beside us, which knows the way back to us only.
    world.client.serve("192.0.2.2:8080".parse().unwrap(), "far");
    let policy = |name: &str, ip: &str, port: u16, more: &str| {
        let ports = format!(r#""ports":[{{"port":80,"nodePort":{port}}}]"#);
        world.service(
            name,
            &format!(
                r#""type":"LoadBalancer","clusterIP":"{ip}","externalIPs":["198.51.100.{port0}"],{ports}{more}"#,
                port0 = port - 30000
            ),
        );
    };
    let local = (b_ip.to_string(), "me");
    let far = ("192.0.2.2".to_owned(), "other");
    policy("cluster", "10.43.0.61", 30061, "");
    policy("local", "10.43.0.62", 30062, r#","externalTrafficPolicy":"Local""#);
    policy("local-far", "10.43.0.63", 30063, r#","externalTrafficPolicy":"Local""#);
    policy("inside", "10.43.0.64", 30064, r#","internalTrafficPolicy":"Local""#);
    policy("nobody", "10.43.0.65", 30065, "");
    for (name, endpoints) in [
        ("cluster", vec![far.clone()]),
        ("local", vec![far.clone(), local.clone()]),
        ("local-far", vec![far.clone()]),
        ("inside", vec![far.clone()]),
        ("nobody", vec![]),
    ] {
        let endpoints: Vec<(&str, &str)> = endpoints.iter().map(|(ip, node)| (ip.as_str(), *node)).collect();
        world.slice(name, TO_8080, &endpoints);
    }
    world.settle();
    world.nft();
    let route = |space: &Space, via: &'static str| {
        space.run(move || {
            let mut socket = Socket::route().unwrap();
            let wire = socket.link("wire").unwrap().unwrap();
            let mut batch = Batch::new();
            batch.add_route(&super::netlink::route::Route {
                to: "198.51.100.0/24".parse().unwrap(),
                device: wire.index,
                via: Some(via.parse().unwrap()),
                source: None,
            });
            socket.apply(&mut batch).unwrap();
        });
    };
    route(&world.client, NODE);
    route(&world.node, CLIENT);
    let node = NODE.to_owned();
    let answers = |name: &str, peer: &str| Ok((name.to_owned(), peer.to_owned()));
    assert_eq!(a.ask("10.43.0.61:80"), answers("far", &node), "to an endpoint off the cluster range as the node");
    assert_eq!(world.client.ask("192.0.2.1:30061"), answers("far", &node), "forwarded as the node");
    for _ in 0..8 {
        assert_eq!(world.client.ask("192.0.2.1:30062"), answers("b", CLIENT), "only the local one, source kept");
        assert_eq!(world.client.ask("198.51.100.62:80"), answers("b", CLIENT), "by external address too");
    }
    assert_eq!(World::asked(&a, "192.0.2.1:30062", 30), set(&["b", "far"]), "from within all endpoints");
    assert_eq!(World::asked(&a, "198.51.100.62:80", 30), set(&["b", "far"]), "from within all endpoints");
    let silence = Err(std::io::ErrorKind::TimedOut);
    assert_eq!(world.client.ask("192.0.2.1:30063"), silence, "endpoints elsewhere only");
    assert_eq!(a.ask("10.43.0.64:80"), silence, "internal policy without local endpoint");
    assert_eq!(world.client.ask("192.0.2.1:30064"), answers("far", &node), "internal policy is no external one");
    assert_eq!(world.client.ask("198.51.100.65:80"), Err(std::io::ErrorKind::ConnectionRefused), "nobody at all");
    assert_eq!(a.ask("10.43.0.62:80").map(|(_, peer)| peer == a_ip.to_string() || peer == node), Ok(true));
}

#[test]
fn load_balancers_admit_their_sources_and_see_which_nodes_have_endpoints() {
    if !is_root() {
        return;
    }
    let world = World::new("00000012");
    let (_b, b_ip) = world.pod("b", Vec::new());
    let spec = |ranges: &str| {
        format!(
            r#"{{"metadata":{{"namespace":"n","name":"lb"}},"spec":{{"type":"LoadBalancer","clusterIP":"10.43.0.80",
            "externalTrafficPolicy":"Local","healthCheckNodePort":32000,"loadBalancerSourceRanges":[{ranges}],
            "ports":[{{"port":80}}]}},"status":{{"loadBalancer":{{"ingress":[{{"ip":"192.0.2.1"}}]}}}}}}"#
        )
    };
    let tell = |ranges: &str, endpoints: &[(&str, &str)]| {
        world.proxy.send(Input::Service(Event::Applied(object("lb", &spec(ranges))))).unwrap();
        world.slice("lb", TO_8080, endpoints);
        world.settle();
    };
    let health = || {
        world.client.run(|| {
            let mut stream = TcpStream::connect("192.0.2.1:32000".parse::<SocketAddr>().unwrap()).ok()?;
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            text.get(9..12).map(str::to_owned)
        })
    };
    let b_ip = b_ip.to_string();
    tell(r#""203.0.113.0/24""#, &[(&b_ip, "me")]);
    assert!(world.nft().contains("goto firewall-"));
    assert_eq!(world.client.ask("192.0.2.1:80"), Err(std::io::ErrorKind::TimedOut), "not a source");
    tell(r#""203.0.113.0/24","192.0.2.0/24""#, &[(&b_ip, "me")]);
    assert_eq!(world.client.ask("192.0.2.1:80"), Ok(("b".into(), CLIENT.into())));
    assert_eq!(health().as_deref(), Some("200"));
    tell("", &[]);
    assert_eq!(health().as_deref(), Some("503"));
    assert!(!world.nft().contains("goto firewall-"));
}

#[test]
fn names_are_answered_on_the_cluster_address_by_datagram_and_stream() {
    use hickory_proto::op::{Message, Query};
    use hickory_proto::rr::{Name, RecordType};
    if !is_root() {
        return;
    }
    let world = World::new("00000013");
    let (a, _) = world.pod("a", Vec::new());
    let resolv_conf = world.directory.path().join("resolv.conf");
    std::fs::write(&resolv_conf, format!("nameserver {CLIENT}\n")).unwrap();
    // The host's server knows one name.
    world.client.run(|| {
        let socket = UdpSocket::bind("192.0.2.2:53").unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer) {
                let query = Message::from_vec(&buffer[..length]).unwrap();
                let mut answer = query.clone();
                answer.metadata.message_type = hickory_proto::op::MessageType::Response;
                let ip = hickory_proto::rr::rdata::A("203.0.113.7".parse().unwrap());
                let data = hickory_proto::rr::RData::A(ip);
                answer.add_answer(hickory_proto::rr::Record::from_rdata(query.queries[0].name().clone(), 60, data));
                socket.send_to(&answer.to_vec().unwrap(), peer).unwrap();
            }
        });
    });
    let (sender, events) = tokio::sync::mpsc::unbounded_channel();
    world.node.run(move || {
        std::thread::spawn(move || {
            block_on(async move {
                let own: Vec<IpAddr> = vec!["10.43.0.10".parse().unwrap()];
                let shutdown = tokio_util::sync::CancellationToken::new();
                crate::dns::start("cluster.local", &own, resolv_conf, events, &shutdown);
                std::future::pending::<()>().await;
            });
        });
    });
    let web = r#"{"metadata":{"name":"web","namespace":"n"},"spec":{"clusterIP":"10.43.0.5","ports":[]}}"#;
    use crate::dns::Source::{Namespaces, Services, Slices};
    for source in [Services, Slices, Namespaces] {
        sender.send((source, Event::Restarted)).unwrap();
    }
    sender.send((Services, Event::Applied(object("web", web)))).unwrap();
    for source in [Services, Slices, Namespaces] {
        sender.send((source, Event::Synced)).unwrap();
    }
    let query = |name: &str| {
        let mut query = Message::query();
        query.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
        query.to_vec().unwrap()
    };
    let show = |bytes: Vec<u8>| {
        let answer = Message::from_vec(&bytes).ok()?;
        Some((answer.metadata.response_code.to_string(), answer.answers.first().map(|record| record.data.to_string())))
    };
    let ask = |space: &Space, name: &str| {
        let bytes = query(name);
        let answer = space.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
            let mut buffer = vec![0; 1232];
            (0..5).find_map(|_| {
                socket.send_to(&bytes, "10.43.0.10:53").ok()?;
                let (length, from) = socket.recv_from(&mut buffer).ok()?;
                assert_eq!(from.to_string(), "10.43.0.10:53");
                Some(buffer[..length].to_vec())
            })
        });
        answer.and_then(show)
    };
    let found = |ip: &str| Some(("No Error".to_owned(), Some(ip.to_owned())));
    for space in [&a, &world.node] {
        assert_eq!(ask(space, "web.n.svc.cluster.local."), found("10.43.0.5"));
        assert_eq!(ask(space, "no.n.svc.cluster.local."), Some(("Non-Existent Domain".into(), None)));
        assert_eq!(ask(space, "example.org."), found("203.0.113.7"));
    }
    let bytes = query("web.n.svc.cluster.local.");
    let stream = a.run(move || {
        let mut stream = TcpStream::connect("10.43.0.10:53".parse::<SocketAddr>().unwrap()).unwrap();
        stream.write_all(&[&(bytes.len() as u16).to_be_bytes()[..], &bytes].concat()).unwrap();
        let mut length = [0; 2];
        stream.read_exact(&mut length).unwrap();
        let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
        stream.read_exact(&mut answer).unwrap();
        answer
    });
    assert_eq!(show(stream), found("10.43.0.5"));
    let started = Instant::now();
    for _ in 0..500 {
        assert_eq!(ask(&a, "web.n.svc.cluster.local."), found("10.43.0.5"));
    }
    println!("500 queries from a pod, one after the other: {:?}", started.elapsed());
}

#[test]
fn host_ports_lead_to_their_pod_until_it_is_gone() {
    if !is_root() {
        return;
    }
    let world = World::new("0000000d");
    let port = |host_ip: Option<&str>, host_port| HostPort {
        protocol: Protocol::Tcp,
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        host_port,
        container_port: 8080,
    };
    let (a, _) = world.pod("a", vec![port(None, 8001), port(Some("127.0.0.1"), 8002), port(Some("192.0.2.1"), 8003)]);
    world.settle();
    world.nft();
    let name = |space: &Space, at: &str| space.ask(at).map(|(name, _)| name).ok();
    let a_name = Some("a".to_owned());
    assert_eq!(name(&world.client, "192.0.2.1:8001"), a_name);
    assert_eq!(name(&world.node, "127.0.0.1:8001"), a_name);
    assert_eq!(name(&a, "192.0.2.1:8001"), a_name, "the pod itself");
    assert_eq!(name(&world.node, "127.0.0.1:8002"), a_name);
    assert_eq!(name(&world.client, "192.0.2.1:8002"), None, "bound to loopback");
    assert_eq!(name(&world.client, "192.0.2.1:8003"), a_name);
    world.detach("a");
    world.detach("a");
    world.settle();
    assert_eq!(name(&world.client, "192.0.2.1:8001"), None);
    assert!(!world.nft().contains("8001"));
}

#[test]
fn datagrams_of_one_socket_follow_the_endpoints() {
    if !is_root() {
        return;
    }
    let world = World::new("0000000e");
    let (a, _) = world.pod("a", Vec::new());
    let (_b, b_ip) = world.pod("b", Vec::new());
    let (_c, c_ip) = world.pod("c", Vec::new());
    let spec = r#""type":"NodePort","clusterIP":"10.43.0.53","ports":[{"port":53,"protocol":"UDP","nodePort":30053}]"#;
    let udp = r#"{"port":8080,"protocol":"UDP"}"#;
    world.service("names", spec);
    world.slice("names", udp, &[]);
    world.settle();
    let (inside, outside) = (a.datagram_socket(), world.client.datagram_socket());
    assert_eq!(a.ask_datagram(&inside, "10.43.0.53:53"), None);
    assert_eq!(world.client.ask_datagram(&outside, "192.0.2.1:30053"), None);
    for (name, ip) in [("b", b_ip), ("c", c_ip), ("b", b_ip)] {
        world.slice("names", udp, &[(&ip.to_string(), "me")]);
        world.settle();
        // An ICMP error of the time without endpoints may still be pending on the socket.
        let ask = |space: &Space, socket, at| (0..2).find_map(|_| space.ask_datagram(socket, at));
        assert_eq!(ask(&a, &inside, "10.43.0.53:53").as_deref(), Some(name));
        assert_eq!(ask(&world.client, &outside, "192.0.2.1:30053").as_deref(), Some(name));
    }
}

#[test]
fn a_restart_adopts_the_tables_and_drops_no_connection() {
    if !is_root() {
        return;
    }
    let mut world = World::new("0000000f");
    let (a, _) = world.pod("a", Vec::new());
    let (b, b_ip) = world.pod("b", Vec::new());
    let spec = r#""clusterIP":"10.43.0.70","ports":[{"port":80},{"name":"echo","port":81}]"#;
    let ports = r#"{"port":8080},{"name":"echo","port":8081}"#;
    let tell = |world: &World| {
        world.service("web", spec);
        world.slice("web", ports, &[(&b_ip.to_string(), "me")]);
    };
    tell(&world);
    world.settle();
    b.run(move || {
        let listener = TcpListener::bind((b_ip, 8081)).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut byte = [0];
            while stream.read_exact(&mut byte).is_ok() {
                stream.write_all(&byte).unwrap();
            }
        });
    });
    let stream = Arc::new(a.run(|| TcpStream::connect("10.43.0.70:81".parse::<SocketAddr>().unwrap()).unwrap()));
    let echo = |stream: &Arc<TcpStream>| {
        let mut stream: &TcpStream = stream;
        stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        stream.write_all(b"x").unwrap();
        let mut byte = [0];
        stream.read_exact(&mut byte).is_ok()
    };
    assert!(echo(&stream));
    world.restart(|world| {
        assert_eq!(a.ask("10.43.0.70:80").map(|(name, _)| name), Ok("b".into()), "while nothing is listed yet");
        assert!(echo(&stream));
        tell(world);
    });
    assert!(echo(&stream), "a connection of before");
    assert_eq!(a.ask("10.43.0.70:80").map(|(name, _)| name), Ok("b".into()));
    let flush = world.node.run(|| {
        let status = std::process::Command::new("nft").args(["flush", "ruleset"]).status().unwrap();
        status.success()
    });
    assert_eq!(a.ask("10.43.0.70:80").map(|(name, _)| name), Ok("b".into()), "after a foreign flush ({flush})");
}

#[test]
fn dead_pods_are_collected_and_a_teardown_leaves_nothing() {
    if !is_root() {
        return;
    }
    let world = World::new("00000010");
    let (a, a_ip) = world.pod("a", Vec::new());
    let (_b, _) = world.pod("b", Vec::new());
    assert_eq!(world.attach("a", &a, Vec::new()), a_ip, "attached again: the same address");
    let other = Space::new();
    assert_eq!(world.attach("a", &other, Vec::new()), a_ip, "a new sandbox of the pod: the link moves");
    assert!(other.run(|| Socket::route().unwrap().link("eth0").unwrap().is_some()));
    let network = world.network.clone();
    world.node.run(move || block_on(async move { network.retain(&set(&["uid-b"])).await })).unwrap();
    let links = |world: &World| {
        world.node.run(|| {
            let links = Socket::route().unwrap().links().unwrap();
            links.into_iter().filter(|link| link.name.starts_with(names::LINK_PREFIX)).count()
        })
    };
    assert_eq!(links(&world), 1);
    assert_eq!(std::fs::read_dir(world.directory.path().join("ipam")).unwrap().count(), 2, "ranges and one pod");

    let forwarding = || std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap().trim().to_owned();
    assert_eq!(world.node.run(forwarding), "1");
    // The server has stopped.
    let World { node, network, proxy, directory, client: _client, .. } = world;
    drop((network, proxy));
    std::thread::sleep(Duration::from_millis(50));
    let errors = teardown("00000010", directory.path());
    assert!(errors.is_empty(), "{errors:?}");
    let left = node.run(|| {
        let output = std::process::Command::new("nft").args(["list", "ruleset"]).output().unwrap();
        let mut socket = Socket::route().unwrap();
        let links = socket.links().unwrap().into_iter().filter(|link| link.name.starts_with("cv")).count();
        let dns = socket.addresses().unwrap().into_iter().filter(|(_, ip)| ip.to_string() == "10.43.0.10").count();
        let routes = std::process::Command::new("ip").args(["route"]).output().unwrap();
        let routes = String::from_utf8_lossy(&routes.stdout).into_owned();
        (String::from_utf8_lossy(&output.stdout).into_owned(), links, dns, routes.contains("10.43."))
    });
    assert_eq!(left, (String::new(), 0, 0, false));
    assert_eq!(node.run(forwarding), "0");
    assert!(!directory.path().join(host::SYSCTL_FILE).exists());
    assert!(teardown("00000010", directory.path()).is_empty(), "twice is fine");
}

#[test]
fn a_thousand_services_and_a_hundred_pods_are_quick() {
    if !is_root() {
        return;
    }
    let world = World::new("00000011");
    let started = Instant::now();
    for n in 0..1000 {
        let ip = format!("10.43.{}.{}", 1 + n / 200, 1 + n % 200);
        world.service(&format!("s{n}"), &format!(r#""clusterIP":"{ip}","ports":[{{"port":80}}]"#));
        let pods: Vec<String> = (0..3).map(|i| format!("10.42.{}.{}", 1 + n / 200, 2 + n % 200 + i)).collect();
        let endpoints: Vec<(&str, &str)> = pods.iter().map(|ip| (ip.as_str(), "other")).collect();
        world.slice(&format!("s{n}"), TO_8080, &endpoints);
    }
    world.settle();
    let thousand = started.elapsed();
    world.service("one", r#""clusterIP":"10.43.99.1","ports":[{"port":80}]"#);
    world.slice("one", TO_8080, &[("10.42.9.9", "other")]);
    let one = world.settle();

    let singles: Vec<Space> = (0..20).map(|_| Space::new()).collect();
    let mut each: Vec<Duration> = Vec::new();
    for (n, space) in singles.iter().enumerate() {
        let started = Instant::now();
        world.attach(&format!("single-{n}"), space, Vec::new());
        each.push(started.elapsed());
    }
    each.sort_unstable();
    let median = each[10];
    let spaces: Vec<Space> = (0..100).map(|_| Space::new()).collect();
    let requests: Vec<PodNetworkRequest> = spaces
        .iter()
        .enumerate()
        .map(|(n, space)| PodNetworkRequest {
            uid: format!("many-{n}"),
            namespace: "n".into(),
            name: format!("p{n}"),
            netns: space.path.clone(),
            host_ports: Vec::new(),
        })
        .collect();
    let network = world.network.clone();
    let hundred = world.node.run(move || {
        let started = Instant::now();
        block_on(async {
            let all = requests.iter().map(|request| network.attach(request));
            futures::future::try_join_all(all).await.unwrap();
        });
        started.elapsed()
    });
    println!("1000 services {thousand:?}, one more {one:?}, one pod {median:?}, 100 pods {hundred:?}");
    assert!(thousand < Duration::from_secs(60) && one < Duration::from_secs(5), "{thousand:?} {one:?}");
}
