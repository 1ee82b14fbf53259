//! Restarts, collection, teardown, and many at once.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::net::netlink::Socket;

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
    let tell = |world: &Host| {
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
fn tables_that_belong_to_nobody_come_back_after_a_foreign_flush() {
    if !is_root() {
        return;
    }
    let world = World::new("00000021");
    let (a, _) = world.pod("a", Vec::new());
    let (_b, b_ip) = world.pod("b", Vec::new());
    world.proxy.tell(Input::Unprotected);
    world.service("web", &format!(r#""clusterIP":"10.43.0.50",{TCP_80}"#));
    world.slice("web", TO_8080, &[(&b_ip.to_string(), "me")]);
    world.settle();
    for _ in 0..3 {
        world.node.command("nft flush ruleset");
        until("the rules are back", || a.ask("10.43.0.50:80").is_ok());
    }
    world.node.command("nft delete element ip coracle-00000021 services { 10.43.0.50 . tcp . 80 }");
    until("the element is back", || a.ask("10.43.0.50:80").is_ok());
}

#[test]
fn a_panic_of_the_proxy_costs_no_service_and_it_goes_on() {
    if !is_root() {
        return;
    }
    let world = World::new("00000022");
    let (a, _) = world.pod("a", Vec::new());
    let (b, b_ip) = world.pod("b", Vec::new());
    world.service("web", &format!(r#""clusterIP":"10.43.0.50",{TCP_80}"#));
    world.slice("web", TO_8080, &[(&b_ip.to_string(), "me")]);
    world.settle();
    world.proxy.tell(Input::Panic);
    world.service("other", r#""clusterIP":"10.43.0.51","ports":[{"port":80}]"#);
    world.slice("other", TO_8080, &[(&b_ip.to_string(), "me")]);
    until("what came after the panic is done", || a.ask("10.43.0.51:80").is_ok());
    assert_eq!(a.ask("10.43.0.50:80").map(|(name, _)| name), Ok("b".into()));
    assert!(b.ask("10.43.0.50:80").is_ok(), "pods are still known: the hairpin");
}

#[test]
fn dead_pods_are_collected_and_a_teardown_leaves_nothing() {
    if !is_root() {
        return;
    }
    let world = World::new("00000010");
    let (a, a_ip) = world.pod("a", Vec::new());
    let (_b, _) = world.pod("b", Vec::new());
    assert_eq!(world.attach("a", &a, Vec::new()), [a_ip], "attached again: the same address");
    let other = Space::new();
    assert_eq!(world.attach("a", &other, Vec::new()), [a_ip], "a new sandbox of the pod: the link moves");
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
    let World { host: Host { node, network, proxy, overlay, directory, .. }, client: _client } = world;
    drop((network, proxy, overlay));
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
