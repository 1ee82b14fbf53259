//! What a user does with kubectl all day.

use crate::harness::Server;

#[test]
fn objects_are_created_read_changed_and_deleted() {
    let server = Server::start(&[]);
    server.kubectl(&["create", "configmap", "one", "--from-literal=a=1"]);
    assert_eq!(server.kubectl(&["get", "configmap", "one", "-o", "jsonpath={.data.a}"]), "1");
    server.kubectl(&["patch", "configmap", "one", "--type=merge", "-p", r#"{"data":{"b":"2"}}"#]);
    server.kubectl(&["patch", "configmap", "one", "--type=json", "-p", r#"[{"op":"remove","path":"/data/a"}]"#]);
    assert_eq!(server.kubectl(&["get", "configmap", "one", "-o", "jsonpath={.data}"]), r#"{"b":"2"}"#);
    server.kubectl(&["label", "configmap", "one", "tier=x"]);
    server.kubectl(&["annotate", "configmap", "one", "note=y"]);
    assert!(server.kubectl(&["get", "configmaps", "-l", "tier=x"]).contains("one"));
    assert!(server.kubectl(&["describe", "configmap", "one"]).contains("note: y"));
    let error = server.kubectl_try(&["get", "configmap", "none"]).unwrap_err();
    assert_eq!(error, r#"Error from server (NotFound): configmaps "none" not found"#);
    server.kubectl(&["delete", "configmap", "one"]);

    server.kubectl(&["create", "namespace", "team"]);
    server.kubectl(&["create", "serviceaccount", "bot", "-n", "team"]);
    server.kubectl(&["delete", "namespace", "team", "--timeout=60s"]);
    for args in [
        &["version"][..],
        &["cluster-info"],
        &["api-resources"],
        &["api-versions"],
        &["explain", "deployment.spec.strategy"],
        &["auth", "can-i", "create", "pods"],
        &["events", "-A"],
        &["get", "nodes", "-o", "wide"],
        &["get", "all", "-A"],
    ] {
        assert!(!server.kubectl(args).is_empty(), "{args:?}");
    }
}

#[test]
fn server_side_apply_keeps_owners_apart() {
    let server = Server::start(&["--disable-agent"]);
    let manifest =
        |value: &str| format!("apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: shared\ndata:\n  key: {value}\n");
    let apply = |value: &str, manager: &str| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), manifest(value)).unwrap();
        let manager = format!("--field-manager={manager}");
        server.kubectl_try(&["apply", "--server-side", &manager, "-f", &file.path().to_string_lossy()])
    };
    apply("a", "one").unwrap();
    let error = apply("b", "two").unwrap_err();
    assert!(error.contains(r#"conflict with "one": .data.key"#), "{error}");
    apply("a", "two").unwrap();
}

#[test]
fn a_pod_tells_its_logs_and_takes_commands() {
    let server = Server::start(&[]);
    server.kubectl(&["run", "box", "--image=coracle.local/hello", "--restart=Never", "--", "echo", "it", "floats"]);
    server.kubectl(&["wait", "pod/box", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s"]);
    assert_eq!(server.kubectl(&["logs", "box"]), "it floats");
    server.kubectl(&["run", "web", "--image=coracle.local/hello", "--port=8080", "--expose"]);
    server.kubectl(&["wait", "pod/web", "--for=condition=Ready", "--timeout=60s"]);
    assert_eq!(server.kubectl(&["exec", "web", "--", "/bin/echo", "hi"]), "hi");
    let status = server.kubectl_try(&["exec", "web", "--", "/bin/false"]).unwrap_err();
    assert!(status.contains("exit code 1"), "{status}");
}
