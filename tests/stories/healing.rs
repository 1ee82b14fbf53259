//! What dies comes back, and what lives is left alone.

use crate::assert_eventually;
use crate::harness::{Server, container_of, kill9, status_of};
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
    let uid = server.kubectl(&["get", "pod", victim, "-o", "jsonpath={.metadata.uid}"]);
    kill9(container_of(&uid).unwrap());
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

#[test]
fn a_pod_whose_shim_is_killed_restarts_and_leaks_nothing() {
    let mut server = Server::start(&[]);
    server.kubectl(&["run", "web", "--image=coracle.local/hello", "--port=8080"]);
    server.kubectl(&["wait", "pod/web", "--for=condition=Ready", "--timeout=60s"]);
    let uid = server.kubectl(&["get", "pod", "web", "-o", "jsonpath={.metadata.uid}"]);
    let container = container_of(&uid).unwrap();
    let shim: u32 = status_of(container, "PPid").parse().unwrap();
    assert_eq!(status_of(shim, "Name"), "coracle-shim");
    kill9(shim);
    let now = assert_eventually!(60, "another container runs", {
        let now = container_of(&uid)?;
        let gone = !std::path::Path::new(&format!("/proc/{container}")).exists();
        if now != container && gone { Ok(now) } else { Err(format!("{now}, before {container}")) }
    });
    assert_ne!(status_of(now, "PPid"), shim.to_string());
    server.kubectl(&["wait", "pod/web", "--for=condition=Ready", "--timeout=60s"]);
    let ip = server.kubectl(&["get", "pod", "web", "-o", "jsonpath={.status.podIP}"]);
    server.fetch(&format!("http://{ip}:8080/"), false).expect("the pod answers");
    server.kubectl(&["delete", "pod", "web", "--timeout=60s"]);
    assert!(container_of(&uid).is_err());
    assert!(server.uninstall().status.success());
    assert_eq!(server.host.leftovers(), "");
}
