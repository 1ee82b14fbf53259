//! Services on one node.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::*;
use crate::net::netlink::Socket;
use crate::net::netlink::message::Batch;
use crate::net::netlink::route::Route;

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
    let tell = |world: &Host| {
        world.service("spread", &spread);
        world.slice("spread", TO_8080, &endpoints);
        world.service("sticky", sticky);
        world.slice("sticky", TO_8080, &endpoints);
    };
    tell(&world);
    world.settle();
    assert_eq!(Host::asked(&a, "10.43.0.51:80", 60), set(&["b", "c", "d"]));
    let stuck = Host::asked(&a, "10.43.0.52:80", 20);
    assert_eq!(stuck.len(), 1, "{stuck:?}");
    assert_eq!(Host::asked(&a, "192.0.2.1:30081", 5), stuck, "the same client by another frontend");
    let chains = world.nft();
    assert!(chains.contains("chain affinity-") && chains.contains("set clients-"), "{chains}");

    world.restart(tell);
    assert_eq!(Host::asked(&a, "10.43.0.52:80", 20), stuck, "a restart forgets no client");

    let without = endpoints.iter().copied().filter(|(ip, _)| {
        let index = ips.iter().position(|other| other == ip).unwrap();
        !stuck.contains(["b", "c", "d"][index])
    });
    world.slice("sticky", TO_8080, &without.collect::<Vec<_>>());
    world.settle();
    let moved = Host::asked(&a, "10.43.0.52:80", 20);
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
            let to = "198.51.100.0/24".parse().unwrap();
            batch.add_route(&Route { via: Some(via.parse().unwrap()), ..Route::by(wire.index, to) });
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
    assert_eq!(Host::asked(&a, "192.0.2.1:30062", 30), set(&["b", "far"]), "from within all endpoints");
    assert_eq!(Host::asked(&a, "198.51.100.62:80", 30), set(&["b", "far"]), "from within all endpoints");
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
        world.proxy.tell(Input::Service(Event::Applied(object("lb", &spec(ranges)))));
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
