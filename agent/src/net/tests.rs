//! The real kernel, in network namespaces that live as long as a thread of the test. Needs root; `nft` is used to see
//! that an administrator could read our tables.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
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

    fn ask_datagram(&self, socket: &std::sync::Arc<UdpSocket>, at: &str) -> Option<String> {
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
    _directory: tempfile::TempDir,
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
        let world = Self { node, client, network, proxy, config, _directory: directory };
        world.tell(Event::Restarted, Event::Restarted);
        world.tell(Event::Synced, Event::Synced);
        world.settle();
        world
    }

    fn start(node: &Space, config: &NetworkConfig) -> (Network, Sender<Input>) {
        let config = config.clone();
        node.run(move || {
            let facts = host::prepare(&config).unwrap();
            teardown::remember(&config).unwrap();
            let ipam = ipam::Ipam::load(config.agent_dir.join("ipam")).unwrap();
            let sender = proxy::start(&config).unwrap();
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
    Object { namespace: "n".into(), name: name.into(), uid: String::new(), json: bytes::Bytes::copy_from_slice(json.as_bytes()) }
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
    assert!(took < Duration::from_millis(200), "{took:?}");

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
