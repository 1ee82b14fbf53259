//! What dies comes back, and what lives is left alone.

use std::process::Command;

use crate::assert_eventually;
use crate::harness::Server;
use crate::web;

fn pods(server: &Server) -> Vec<(String, String)> {
    let template = "jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{\"\\n\"}{end}";
    let text = server.kubectl(&["get", "pods", "-o", template]);
    text.lines().filter_map(|l| l.split_once(' ')).map(|(name, rest)| (name.to_owned(), rest.to_owned())).collect()
}

#[test]
fn a_killed_server_adopts_its_pods_without_restarting_them() {
    let mut server = Server::start(&[]);
    web::deploy(&server);
    let before = pods(&server);
    let port = web::node_port(&server, "web");
    server.kubectl(&["create", "configmap", "written", "--from-literal=before=kill"]);
    server.kill9();
    server
        .fetch(&format!("http://{}:{port}/", server.host.address), true)
        .expect("pods answer while the server is down");
    server.start_again();
    assert_eq!(server.kubectl(&["get", "configmap", "written", "-o", "jsonpath={.data.before}"]), "kill");
    server.kubectl(&["wait", "node/n1", "--for=condition=Ready", "--timeout=30s"]);
    server.kubectl(&["scale", "deployment/web", "--replicas=4"]);
    server.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let after = pods(&server);
    for pod in &before {
        assert!(after.contains(pod), "{pod:?} was left alone: {after:?}");
    }
}

#[test]
fn a_clean_stop_is_quick_and_leaves_pods_running() {
    let mut server = Server::start(&[]);
    web::deploy(&server);
    let port = web::node_port(&server, "web");
    let took = server.stop();
    assert!(took.as_secs() < 5, "{took:?}");
    server
        .fetch(&format!("http://{}:{port}/", server.host.address), true)
        .expect("pods answer while the server is stopped");
    server.start_again();
}

#[test]
fn a_killed_container_is_restarted_and_a_deleted_pod_replaced() {
    let server = Server::start(&[]);
    web::deploy(&server);
    let before = pods(&server);
    let victim = &before[0].0;
    let ip = server.kubectl(&["get", "pod", victim, "-o", "jsonpath={.status.podIP}"]);
    assert!(!ip.is_empty());
    server.kubectl_try(&["exec", victim, "--", "/bin/kill", "-9", "1"]).ok();
    // The first process of a pid namespace cannot be killed from inside it: from the host it can.
    let uid = server.kubectl(&["get", "pod", victim, "-o", "jsonpath={.metadata.uid}"]);
    let pids = Command::new("sh")
        .arg("-c")
        .arg(format!("grep -l {uid} /proc/[0-9]*/cgroup 2>/dev/null | cut -d/ -f3"))
        .output()
        .unwrap();
    let pids = String::from_utf8_lossy(&pids.stdout).into_owned();
    for pid in pids.split_whitespace() {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        if !name.contains("shim") {
            let _ = Command::new("kill").args(["-9", pid]).status();
        }
    }
    assert_eventually!(60, "the container is restarted", {
        let count =
            server.kubectl(&["get", "pod", victim, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"]);
        if count == "1" { Ok(()) } else { Err(format!("restartCount {count}")) }
    });
    let replaced = &before[1].0;
    server.kubectl(&["delete", "pod", replaced, "--timeout=60s"]);
    assert_eventually!(60, "three pods are ready again", {
        let ready = server.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"]);
        if ready == "3" { Ok(()) } else { Err(ready) }
    });
    assert!(!pods(&server).iter().any(|(name, _)| name == replaced));
}
