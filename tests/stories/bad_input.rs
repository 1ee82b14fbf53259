//! Bad input gets a clear error and changes nothing.

use std::process::Command;

use crate::harness::{Server, binary};

fn fails(args: &[&str]) -> String {
    let output = Command::new(binary()).args(args).env("CORACLE_CONFIG_FILE", "/dev/null").output().unwrap();
    assert!(!output.status.success(), "{args:?} must fail");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn flags_are_checked_before_anything_starts() {
    assert!(fails(&["server", "--no-such-flag"]).contains("--no-such-flag"));
    assert!(fails(&["server", "--cluster-cidr=10.42.0.0/33"]).contains("--cluster-cidr \"10.42.0.0/33\""));
    assert!(fails(&["server", "--data-dir=/proc/nowhere"]).contains("--data-dir \"/proc/nowhere\""));
    assert!(fails(&["server", "--config=/nonexistent.yaml"]).contains("/nonexistent.yaml"));
}

#[test]
fn a_port_and_a_folder_have_one_server() {
    let server = Server::start(&["--disable-agent"]);
    let second = server.command().output().unwrap();
    let text = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(text.contains(&"in use by the server with pid".to_string()), "{text}");
    let other = tempfile::tempdir().unwrap();
    let mut command = server.host.command(binary());
    command
        .args(["server", "--config=/dev/null", "--disable-agent", "--node-name=n2", "--data-dir"])
        .arg(other.path().join("data"));
    command.arg("--write-kubeconfig").arg(other.path().join("kubeconfig"));
    let third = command.output().unwrap();
    let text = String::from_utf8_lossy(&third.stderr).into_owned();
    assert!(!third.status.success() && text.contains("6443") && text.contains("in use"), "{text}");
}

#[test]
fn malformed_manifests_say_what_is_wrong() {
    let server = Server::start(&["--disable-agent"]);
    let pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: p\nspec:\n  containers:\n  - name: C\n    image: x\n";
    let error = server.apply_try(pod).unwrap_err();
    assert!(error.contains("spec.containers[0].name: Invalid value: \"C\""), "{error}");
    let error = server.apply_try(&pod.replace("name: C", "nmae: c")).unwrap_err();
    assert!(error.contains("unknown field \"spec.containers[0].nmae\""), "{error}");
    let error = server.apply_try(&pod.replace("v1\nkind: Pod", "apps/v1\nkind: Deploymnt")).unwrap_err();
    assert!(error.contains("no matches for kind \"Deploymnt\" in version \"apps/v1\""), "{error}");
    assert_eq!(server.kubectl(&["get", "pods"]), "");
    let anonymous = server.fetch("https://127.0.0.1:6443/api/v1/nodes", false);
    assert!(anonymous.is_err());
    let insecure = server.host.command("curl").args(["-sk", "https://127.0.0.1:6443/api/v1/nodes"]).output().unwrap();
    assert!(String::from_utf8_lossy(&insecure.stdout).contains("Unauthorized"));
}
