//! The DNS responder on its cluster address.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::*;

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
    until("what was told is known", || ask(&a, "web.n.svc.cluster.local.") == found("10.43.0.5"));
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
