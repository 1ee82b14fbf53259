//! Nodes that are not servers.

use super::hosts::{Cluster, Role};
use crate::assert_eventually;
use crate::harness::{container_of, kill9};
use crate::web::WEB;

/// Three servers without nodes, two agents, and the example on them.
fn with_agents() -> (Cluster, [usize; 2]) {
    let mut cluster = Cluster::of(3, 1, &["--disable-agent"]);
    let agents = [cluster.add(Role::Agent, &[]), cluster.add(Role::Agent, &[])];
    for agent in agents {
        cluster.start(agent);
    }
    for agent in agents {
        node_is(&mut cluster, 0, agent, "True");
    }
    cluster.apply(1, WEB);
    cluster.kubectl(1, &["rollout", "status", "deployment/web", "--timeout=120s"]).unwrap();
    (cluster, agents)
}

pub fn node_is(cluster: &mut Cluster, server: usize, agent: usize, ready: &str) {
    let name = cluster.hosts[agent].name.clone();
    let path = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
    assert_eventually!(120, format!("{name} is Ready={ready}"), {
        cluster.hosts[agent].assert_alive();
        let status = cluster.kubectl(server, &["get", "node", &name, "-o", path])?;
        if status == ready { Ok(()) } else { Err(status) }
    });
}

/// Names, nodes, addresses and restarts of the pods.
fn pods(cluster: &Cluster, server: usize) -> Vec<[String; 4]> {
    let template = "jsonpath={range .items[*]}{.metadata.name} {.spec.nodeName} {.status.podIP} {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}";
    let text = cluster.kubectl(server, &["get", "pods", "-o", template]).unwrap();
    let row = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>().try_into().unwrap();
    text.lines().map(row).collect()
}

#[test]
fn any_server_reaches_pods_on_any_node_and_services_span_them() {
    let (cluster, agents) = with_agents();
    let pods = pods(&cluster, 2);
    let nodes: std::collections::BTreeSet<&String> = pods.iter().map(|p| &p[1]).collect();
    assert_eq!(nodes.len(), 2, "{pods:?}");
    for server in cluster.servers() {
        for [pod, ..] in &pods {
            assert_eq!(cluster.kubectl(server, &["exec", pod, "--", "/bin/echo", "hi"]).unwrap(), "hi");
            cluster.kubectl(server, &["logs", pod]).unwrap();
        }
    }
    let service = cluster.kubectl(0, &["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]).unwrap();
    for agent in agents {
        for [_, _, ip, _] in &pods {
            cluster.fetch(agent, &format!("http://{ip}:8080/")).expect("a pod answers on every node");
        }
        let answers: std::collections::BTreeSet<String> =
            (0..60).map(|_| cluster.fetch(agent, &format!("http://{service}/")).unwrap()).collect();
        assert_eq!(answers.len(), 3, "{answers:?}");
    }
}

#[test]
fn an_agent_gets_another_certificate_without_a_restart() {
    let mut cluster = Cluster::of(1, 0, &["--disable-agent"]);
    let agent = cluster.add(Role::Agent, &[]);
    cluster.start(agent);
    node_is(&mut cluster, 0, agent, "True");
    let kept = cluster.hosts[agent].data_dir().join("agent/client.pem");
    let before = std::fs::read(&kept).unwrap();
    cluster.hosts[agent].coracle(&["certificate", "rotate"]).unwrap();
    assert_ne!(std::fs::read(&kept).unwrap(), before);
    cluster.hosts[agent].assert_alive();
    let status = assert_eventually!(60, "nothing is wrong", cluster.hosts[agent].coracle(&["status"]));
    assert!(status.contains("running with pid"), "{status}");
    let refused = cluster.hosts[agent].coracle(&["member", "list"]).unwrap_err();
    assert!(refused.contains("run this on a server of its cluster"), "{refused}");
}

#[test]
fn agents_go_on_with_the_servers_that_are_left() {
    let (mut cluster, agents) = with_agents();
    // The one they joined by.
    cluster.hosts[0].kill9();
    cluster.kubectl(1, &["scale", "deployment/web", "--replicas=6"]).unwrap();
    cluster.kubectl(2, &["rollout", "status", "deployment/web", "--timeout=120s"]).unwrap();
    for agent in agents {
        node_is(&mut cluster, 1, agent, "True");
    }
    // The list of servers was learnt: an agent that starts now finds the others.
    cluster.hosts[agents[0]].kill9();
    cluster.start(agents[0]);
    let name = cluster.hosts[agents[0]].name.clone();
    let before = cluster
        .kubectl(1, &["get", "lease", "-n", "kube-node-lease", &name, "-o", "jsonpath={.spec.renewTime}"])
        .unwrap();
    assert_eventually!(120, "the agent renews its lease", {
        let now = cluster
            .kubectl(1, &["get", "lease", "-n", "kube-node-lease", &name, "-o", "jsonpath={.spec.renewTime}"])?;
        if now == before { Err(now) } else { Ok(()) }
    });
}

#[test]
fn an_agent_cut_off_keeps_its_pods_and_restarts_what_fails() {
    let (mut cluster, agents) = with_agents();
    let agent = agents[0];
    let name = cluster.hosts[agent].name.clone();
    let before = pods(&cluster, 0);
    let [pod, _, ip, _] = before.iter().find(|p| p[1] == name).unwrap().clone();
    let uid = cluster.kubectl(0, &["get", "pod", &pod, "-o", "jsonpath={.metadata.uid}"]).unwrap();
    cluster.part(&[agent], &cluster.servers());
    node_is(&mut cluster, 0, agent, "Unknown");
    let page = format!("http://{ip}:8080/");
    cluster.fetch(agent, &page).expect("the pod still answers");
    let container = container_of(&uid).unwrap();
    kill9(container);
    assert_eventually!(60, "another container answers", {
        let now = container_of(&uid)?;
        if now == container { Err("the old one".to_owned()) } else { cluster.fetch(agent, &page) }
    });
    cluster.switch.heal();
    node_is(&mut cluster, 0, agent, "True");
    assert_eventually!(60, "the restart is counted", {
        let now = pods(&cluster, 0);
        let restarts = now.iter().find(|p| p[0] == pod).map(|p| p[3].clone());
        if restarts.as_deref() == Some("1") { Ok(()) } else { Err(format!("{now:?}")) }
    });
}
