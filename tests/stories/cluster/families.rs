//! Clusters of two address families.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::agents::node_is;
use super::hosts::{Cluster, Host, Role};
use crate::assert_eventually;
use crate::harness::run;
use crate::web::WEB;

/// Gives a machine that has not started an address of the other family.
fn six(host: &Host) -> String {
    let address = format!("fd80::{}", host.address.octets()[3]);
    run(host.command("ip").args(["addr", "add", &format!("{address}/64"), "dev", "eth0", "nodad"]));
    address
}

fn items(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

fn url(ip: &str, port: &str) -> String {
    if ip.contains(':') { format!("http://[{ip}]:{port}/") } else { format!("http://{ip}:{port}/") }
}

#[test]
fn pods_and_services_of_both_families_are_reached_on_every_node() {
    let mut cluster = Cluster::empty();
    let families = ["--cluster-cidr=10.42.0.0/16,fd42::/48", "--service-cidr=10.43.0.0/16,fd43::/112"];
    let hosts = [cluster.add(Role::Server, &families), cluster.add(Role::Agent, &[])];
    let nodes: Vec<[String; 2]> =
        hosts.iter().map(|host| [cluster.hosts[*host].address.to_string(), six(&cluster.hosts[*host])]).collect();
    cluster.start(hosts[0]);
    cluster.wait_ready(hosts[0]);
    cluster.start(hosts[1]);
    for host in hosts {
        node_is(&mut cluster, 0, host, "True");
    }
    let get = |what: &str, path: &str| cluster.kubectl(0, &["get", what, "-o", &format!("jsonpath={path}")]).unwrap();
    let registered = get("nodes", r#"{range .items[*].status.addresses[?(@.type=="InternalIP")]}{.address} {end}"#);
    let registered: BTreeSet<String> = items(&registered).into_iter().collect();
    assert_eq!(registered, nodes.iter().flatten().cloned().collect(), "found without --node-ip");
    let ranges: Vec<String> = items(&get("nodes", "{range .items[*].spec.podCIDRs[*]}{@} {end}"));
    assert_eq!(ranges.len(), 4, "{ranges:?}");

    cluster.apply(0, WEB);
    let one: Vec<String> = items(&get("service/web", "{.spec.ipFamilies[*]} {.spec.clusterIPs[*]}"));
    assert_eq!((one.len(), one[0].as_str()), (2, "IPv4"), "{one:?}");
    cluster
        .kubectl(0, &["patch", "service", "web", "-p", r#"{"spec":{"ipFamilyPolicy":"RequireDualStack"}}"#])
        .unwrap();
    cluster.kubectl(0, &["rollout", "status", "deployment/web", "--timeout=120s"]).unwrap();
    let addresses = items(&get("service/web", "{.spec.clusterIPs[*]}"));
    assert_eq!(addresses[0], one[1], "the first address stays");
    let family = |ip: &String| ip.parse::<IpAddr>().unwrap().is_ipv6();
    assert_eq!(addresses.iter().map(family).collect::<Vec<_>>(), [false, true], "{addresses:?}");
    let pods = items(&get("pods", "{range .items[*].status.podIPs[*]}{.ip} {end}"));
    assert_eq!(pods.iter().filter(|ip| family(ip)).count(), 3, "{pods:?}");
    let on: BTreeSet<String> = items(&get("pods", "{.items[*].spec.nodeName}")).into_iter().collect();
    assert_eq!(on.len(), 2, "{on:?}");

    let port = get("service/web", "{.spec.ports[0].nodePort}");
    for host in hosts {
        for pod in &pods {
            cluster.fetch(host, &url(pod, "8080")).unwrap_or_else(|error| panic!("{pod}: {error}"));
        }
        for (ip, port) in addresses.iter().map(|ip| (ip, "80")).chain(nodes.iter().flatten().map(|ip| (ip, &*port))) {
            let url = url(ip, port);
            let mut seen = BTreeSet::new();
            assert_eventually!(60, format!("{url} leads to every pod"), {
                seen.insert(cluster.fetch(host, &url)?);
                if seen.len() == 3 { Ok(()) } else { Err(format!("{seen:?}")) }
            });
        }
    }
}
