//! The main job: a Deployment behind a Service, from `kubectl apply` to the page.

use crate::assert_eventually;
use crate::harness::Server;

pub const WEB: &str = include_str!("../../examples/web.yaml");

/// Applies the example and waits for the rollout.
pub fn deploy(server: &Server) {
    server.apply(WEB);
    server.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
}

pub fn node_port(server: &Server, name: &str) -> String {
    server.kubectl(&["get", "service", name, "-o", "jsonpath={.spec.ports[0].nodePort}"])
}

#[test]
fn apply_schedules_runs_and_answers_on_the_service() {
    let server = Server::start(&[]);
    deploy(&server);
    let pods = server.kubectl(&["get", "pods", "-o", "jsonpath={.items[*].metadata.name}"]);
    let port = node_port(&server, "web");
    let cluster_ip = server.kubectl(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"]);
    let mut answers = std::collections::BTreeSet::new();
    for _ in 0..60 {
        answers.insert(server.fetch(&format!("http://{cluster_ip}/"), false).unwrap());
    }
    assert_eq!(answers.len(), 3, "all three pods answer: {answers:?}");
    for pod in pods.split(' ') {
        assert!(answers.iter().any(|a| a.contains(pod)), "{pod} in {answers:?}");
    }
    server.fetch(&format!("http://{}:{port}/", server.host.address), true).expect("the node port answers from outside");
    server.fetch(&format!("http://127.0.0.1:{port}/"), false).expect("the node port answers on the node");

    server.kubectl(&["scale", "deployment/web", "--replicas=5"]);
    server.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let ready = server.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"]);
    assert_eq!(ready, "5");

    server.kubectl(&["delete", "service/web", "deployment/web", "--timeout=60s"]);
    assert_eventually!(60, "pods are gone", {
        let left = server.kubectl(&["get", "pods", "-o", "name"]);
        if left.is_empty() { Ok(()) } else { Err(left) }
    });
    assert!(server.fetch(&format!("http://127.0.0.1:{port}/"), false).is_err());
}

#[test]
fn a_rollout_replaces_pods_and_can_be_undone() {
    let server = Server::start(&[]);
    deploy(&server);
    let template = r#"{"spec":{"template":{"metadata":{"annotations":{"round":"2"}}}}}"#;
    server.kubectl(&["patch", "deployment", "web", "-p", template]);
    server.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let history = server.kubectl(&["rollout", "history", "deployment/web"]);
    assert!(history.contains('2'), "{history}");
    server.kubectl(&["rollout", "undo", "deployment/web"]);
    server.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
    let annotations =
        server.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.spec.template.metadata.annotations}"]);
    assert!(!annotations.contains("round"), "{annotations}");
    server.kubectl(&["rollout", "restart", "deployment/web"]);
    server.kubectl(&["rollout", "status", "deployment/web", "--timeout=60s"]);
}
