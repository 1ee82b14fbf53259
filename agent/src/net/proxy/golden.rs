//! What Services want in the kernel, as text files beside this one: a change of the layout is a change of these files.
//! `CORACLE_GOLDEN=write cargo test -p coracle-agent golden` writes them anew.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::desired::{Contribution, NodeFacts, contribution};
use super::model::{Key, Service, Slice};
use crate::net::nft::{ElementData, Family, KeyType, SetData};

/// One part of a key or value, as `nft` prints it.
fn part(kind: KeyType, family: Family, bytes: &mut &[u8]) -> String {
    let length = if kind == KeyType::Address { family.address_len() } else { 4 };
    let (own, rest) = bytes.split_at(length);
    *bytes = rest;
    match kind {
        KeyType::Address if family == Family::Ip => IpAddr::from(<[u8; 4]>::try_from(own).unwrap()).to_string(),
        KeyType::Address => IpAddr::from(<[u8; 16]>::try_from(own).unwrap()).to_string(),
        KeyType::Protocol => ["tcp", "udp", "sctp"][[6, 17, 132].iter().position(|p| *p == own[0]).unwrap()].to_owned(),
        KeyType::Port => u16::from_be_bytes([own[0], own[1]]).to_string(),
        KeyType::Mark => u32::from_ne_bytes(own.try_into().unwrap()).to_string(),
    }
}

fn parts(kinds: &[KeyType], family: Family, mut bytes: &[u8]) -> String {
    let all: Vec<String> = kinds.iter().map(|kind| part(*kind, family, &mut bytes)).collect();
    all.join(" . ")
}

fn render(wanted: &Contribution) -> String {
    let mut text = String::new();
    for ((family, map, key), data) in &wanted.elements {
        let spec = map.spec();
        let data = match (data, spec.data) {
            (ElementData::None, _) => String::new(),
            (ElementData::Drop, _) => " : drop".to_owned(),
            (ElementData::Goto(chain), _) => format!(" : goto {chain}"),
            (ElementData::Value(value), SetData::Value(kinds)) => format!(" : {}", parts(kinds, *family, value)),
            (ElementData::Value(value), _) => format!(" : {value:?}"),
        };
        writeln!(text, "{family:?} {} {}{data}", map.name(), parts(spec.key, *family, key)).unwrap();
    }
    for (family, balancer, count) in &wanted.balancers {
        writeln!(text, "{family:?} chain {}", balancer.chain(*count)).unwrap();
    }
    for ((family, chain), rules) in &wanted.chains {
        writeln!(text, "{family:?} chain {chain}").unwrap();
        rules.iter().for_each(|rule| writeln!(text, "  {rule:?}").unwrap());
    }
    for ((family, set), seconds) in &wanted.sets {
        writeln!(text, "{family:?} set {set} {seconds}s").unwrap();
    }
    text
}

fn golden(name: &str, spec: &str, endpoints: &[&str]) {
    let service = format!(r#"{{"metadata":{{"namespace":"n","name":"s"}},{spec}}}"#);
    let service = Service::parse(service.as_bytes()).unwrap().unwrap();
    let slice = |family: &str, wanted: fn(&str) -> bool| {
        let own: Vec<&str> = endpoints.iter().copied().filter(|endpoint| wanted(endpoint)).collect();
        let json = format!(
            r#"{{"metadata":{{"namespace":"n","labels":{{"kubernetes.io/service-name":"s"}}}},"addressType":"{family}",
            "ports":[{{"name":"","port":8080}},{{"name":"","port":8080,"protocol":"UDP"}}],"endpoints":[{}]}}"#,
            own.join(",")
        );
        Slice::parse(json.as_bytes(), "here").unwrap().unwrap()
    };
    let slices =
        [slice("IPv4", |endpoint| !endpoint.contains("::")), slice("IPv6", |endpoint| endpoint.contains("::"))];
    let node = NodeFacts {
        families: vec![Family::Ip, Family::Ip6],
        cluster_dns: vec!["10.43.0.10".parse().unwrap()],
        name: "here".into(),
        zone: Some("z1".into()),
    };
    let key = Key { namespace: "n".into(), name: "s".into() };
    let text = render(&contribution(&key, &service, slices.iter(), &node, |_| true));
    let path =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/net/proxy/golden").join(format!("{name}.txt"));
    if std::env::var_os("CORACLE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&path).unwrap_or_default(), "{name}");
}

const HERE: &str = r#"{"addresses":["10.42.0.2"],"nodeName":"here"}"#;
const THERE: &str = r#"{"addresses":["10.42.1.2"],"nodeName":"there"}"#;
const LEAVING: &str =
    r#"{"addresses":["10.42.1.3"],"nodeName":"there","conditions":{"ready":false,"serving":true,"terminating":true}}"#;
const SIX: &str = r#"{"addresses":["fd42:0:0:1::2"],"nodeName":"there"}"#;

#[test]
fn golden_files_of_what_services_want_in_the_kernel() {
    let cluster = r#""spec":{"clusterIP":"10.43.0.5","ports":[{"port":80}]}"#;
    golden("cluster-ip", cluster, &[HERE, THERE, LEAVING]);
    golden("no-endpoints", cluster, &[]);
    golden("terminating-only", cluster, &[LEAVING]);
    let both = r#""spec":{"type":"NodePort","clusterIP":"10.43.0.5","clusterIPs":["10.43.0.5","fd43::5"],
        "ports":[{"port":80,"nodePort":30080},{"port":80,"protocol":"UDP","nodePort":30080}]}"#;
    golden("node-port-of-both-families", both, &[HERE, THERE, SIX]);
    let load_balancer = r#""spec":{"type":"LoadBalancer","clusterIP":"10.43.0.5","externalIPs":["198.51.100.1"],
        "externalTrafficPolicy":"Local","healthCheckNodePort":32000,"loadBalancerSourceRanges":["203.0.113.0/24"],
        "ports":[{"port":80,"nodePort":30080}]},"status":{"loadBalancer":{"ingress":[{"ip":"192.0.2.1"}]}}"#;
    golden("local-load-balancer", load_balancer, &[HERE, THERE]);
    golden("local-load-balancer-elsewhere", load_balancer, &[THERE]);
    let internal = r#""spec":{"clusterIP":"10.43.0.5","internalTrafficPolicy":"Local","ports":[{"port":80}]}"#;
    golden("internal-local-elsewhere", internal, &[THERE]);
    let sticky = r#""spec":{"clusterIP":"10.43.0.5","sessionAffinity":"ClientIP","ports":[{"port":80}]}"#;
    golden("session-affinity", sticky, &[HERE, THERE]);
    let dns = r#""spec":{"clusterIP":"10.43.0.10","ports":[{"port":53,"protocol":"UDP"}]}"#;
    golden("cluster-dns", dns, &[HERE]);
}

#[test]
fn hints_are_followed_when_all_endpoints_have_them_and_one_is_for_this_node() {
    let hint = |ip: &str, hints: &str| format!(r#"{{"addresses":["{ip}"],"nodeName":"there","hints":{hints}}}"#);
    let zone = |zone: &str| format!(r#"{{"forZones":[{{"name":"{zone}"}}]}}"#);
    let cluster = r#""spec":{"clusterIP":"10.43.0.5","ports":[{"port":80}]}"#;
    let (own, other) = (hint("10.42.1.1", &zone("z1")), hint("10.42.1.2", &zone("z2")));
    golden("hints-of-zones", cluster, &[&own, &other]);
    golden("hints-of-some", cluster, &[&own, THERE]);
    golden("hints-of-other-zones", cluster, &[&other, &hint("10.42.1.3", &zone("z3"))]);
    let node = hint("10.42.1.4", r#"{"forZones":[{"name":"z2"}],"forNodes":[{"name":"here"}]}"#);
    let far = hint("10.42.1.5", r#"{"forZones":[{"name":"z1"}],"forNodes":[{"name":"there"}]}"#);
    golden("hints-of-nodes", cluster, &[&node, &far]);
}
