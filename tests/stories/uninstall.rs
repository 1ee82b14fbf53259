//! Nothing is left behind.

use std::path::Path;
use std::process::Command;

use crate::harness::Server;
use crate::web;

#[test]
fn uninstall_leaves_no_trace() {
    let mut server = Server::start(&[]);
    web::deploy(&server);
    let (dir, kubeconfig) = (server.data_dir(), server.kubeconfig());
    assert!(kubeconfig.exists());
    let output = server.uninstall();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!dir.exists());
    assert!(!kubeconfig.exists());
    assert_eq!(server.host.leftovers(), "");
    let text = dir.to_string_lossy().into_owned();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&text), "{mounts}");
    let processes = Command::new("sh")
        .arg("-c")
        .arg(format!("grep -lsa {text} /proc/[0-9]*/cmdline | grep -v self"))
        .output()
        .unwrap();
    let mine = format!("/proc/{}/", std::process::id());
    let left: Vec<_> = String::from_utf8_lossy(&processes.stdout)
        .lines()
        .filter(|l| !l.starts_with(&mine))
        .map(str::to_owned)
        .collect();
    let alive: Vec<_> = left.iter().filter(|l| Path::new(l).exists()).collect();
    assert!(alive.is_empty(), "{alive:?}");
}

#[test]
fn two_instances_live_side_by_side_and_leave_each_other_alone() {
    let mut one = Server::start(&[]);
    let two =
        Server::start(&["--https-listen-port=7443", "--cluster-cidr=10.52.0.0/16", "--service-cidr=10.53.0.0/16"]);
    web::deploy(&one);
    web::deploy(&two);
    assert!(one.uninstall().status.success());
    let port = web::node_port(&two, "web");
    two.fetch(&format!("http://{}:{port}/", two.host.address), true).expect("the other one goes on");
}
