//! The stories.

use std::time::{Duration, Instant};

use coracle_agent::runtime::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Node, Story};

mod faults;
mod figures;
mod isolation;
mod streams;

macro_rules! stories {
    ($($name:path),* $(,)?) => {
        pub const ALL: &[Story] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

stories![
    a_container_runs_logs_and_is_gone,
    the_builtin_image_serves,
    commands_run_inside,
    stopping_asks_first_and_then_kills,
    isolation::users_and_groups_come_from_the_image,
    isolation::environment_and_working_directory_are_complete,
    isolation::capabilities_and_filters_hold_in_exec_too,
    isolation::the_default_seccomp_profile_lets_programs_work,
    isolation::read_only_masked_and_privileged,
    isolation::volumes_and_devices,
    isolation::namespaces_are_shared_as_asked,
    isolation::limits_are_in_the_cgroup,
    streams::a_terminal_is_one,
    streams::standard_input_and_attach,
    streams::commands_have_streams,
    streams::logs_rotate_and_long_lines_are_cut,
    faults::what_cannot_start_says_why,
    faults::out_of_memory_is_told,
    faults::a_new_agent_finds_running_pods,
    faults::a_killed_shim_leaves_nothing,
    faults::a_failed_sandbox_leaves_nothing,
    faults::many_pods_at_once,
    figures::what_a_pod_costs,
];

async fn a_container_runs_logs_and_is_gone() {
    let node = Node::new().await;
    let mut events = node.runtime.events();
    let (pod, config) = (node.pod(), node.script("echo out; echo err >&2; printf unended; hostname; exit 3"));
    let (sandbox, id) = node.run(&pod, &config).await;
    let status = node.wait(&id, ContainerState::Exited).await;
    assert_eq!((status.exit_code, status.signal, status.reason.as_str()), (3, 0, "Error"));
    assert!(status.started_at.unwrap() <= status.finished_at.unwrap());
    let mut lines: Vec<String> = node.log(&status).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["err", "out", "unendedmy-pod"]);
    let mut kinds = Vec::new();
    while let Ok(event) = events.try_recv() {
        kinds.push(event.kind);
    }
    use ContainerEventKind::*;
    assert_eq!(kinds, [ContainerCreated, ContainerStarted, ContainerStopped]);
    node.runtime.remove_container(&id).await.unwrap();
    assert!(node.runtime.container_status(&id).await.unwrap_err().is_not_found());
    node.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
    let status = node.runtime.pod_sandbox_status(&sandbox).await.unwrap();
    assert_eq!(status.state, PodSandboxState::NotReady);
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    assert!(node.runtime.list_pod_sandboxes(&Default::default()).await.unwrap().is_empty());
    assert_eq!(node.mounts(), 0);
    assert!(node.cgroups().iter().all(|path| !path.to_string_lossy().contains("kubepods/")), "{:?}", node.cgroups());
    assert!(node.network.attached.lock().is_empty());
    assert_eq!(std::fs::read_dir(node.run_dir().join("pods")).unwrap().count(), 0);
}

async fn the_builtin_image_serves() {
    let node = Node::new().await;
    let config = ContainerConfig {
        image: node.image("coracle.local/hello"),
        envs: vec![KeyValue { key: "HOSTNAME".into(), value: "web-1".into() }],
        log_path: "hello/0.log".into(),
        ..Default::default()
    };
    let (sandbox, id) = node.run(&node.pod(), &config).await;
    let mut stream = connect(&node, &sandbox, 8080).await;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\r\n\r\nHello from web-1\n"), "{answer}");
    let answer = node.runtime.exec_sync(&id, &["cat".into(), "/etc/group".into()], None).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&answer.stdout), "root:x:0:\nnogroup:x:65534:\n");
    let started = Instant::now();
    node.runtime.stop_container(&id, 30).await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "SIGTERM ends it");
    assert_eq!(node.wait(&id, ContainerState::Exited).await.exit_code, 0);
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

async fn connect(node: &Node, sandbox: &str, port: u16) -> tokio::net::TcpStream {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match node.runtime.port_forward(sandbox, port).await {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn commands_run_inside() {
    let node = Node::new().await;
    let (sandbox, id) = node.run(&node.pod(), &node.script("sleep 1000")).await;
    assert_eq!(node.sh(&id, "echo $FROM_IMAGE; hostname; exit 7").await, (7, "yes\nmy-pod\n".into()));
    assert_eq!(node.sh(&id, "cat /proc/1/cmdline | tr '\\0' ' '").await.1, "sleep 1000 ");
    let missing = node.runtime.exec_sync(&id, &["nope".into()], None).await.unwrap_err();
    assert!(missing.to_string().contains("exec: \"nope\": executable file not found in $PATH"), "{missing}");
    let slow = ["sleep".to_owned(), "100".to_owned()];
    let timeout = node.runtime.exec_sync(&id, &slow, Some(Duration::from_millis(200))).await.unwrap_err();
    assert!(matches!(timeout, RuntimeError::Timeout { .. }), "{timeout}");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(node.count(&id, "sleep 100").await, 0, "the command was killed");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

async fn stopping_asks_first_and_then_kills() {
    let node = Node::new().await;
    let config = node.script("trap 'echo asked; exit 5' TERM; while :; do sleep 0.05; done");
    let (sandbox, id) = node.run(&node.pod(), &config).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.runtime.stop_container(&id, 20).await.unwrap();
    let status = node.wait(&id, ContainerState::Exited).await;
    assert_eq!((status.exit_code, node.log(&status).as_str()), (5, "asked\n"));
    // Process 1 ignores what it does not handle.
    let id = node.runtime.create_container(&sandbox, &node.script("sleep 1000 & wait")).await.unwrap();
    node.runtime.start_container(&id).await.unwrap();
    let started = Instant::now();
    node.runtime.stop_container(&id, 1).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
    let status = node.wait(&id, ContainerState::Exited).await;
    assert_eq!((status.exit_code, status.signal, status.reason.as_str()), (137, 9, "Error"));
    let mut config = node.script("trap 'exit 6' USR1; while :; do sleep 0.05; done");
    config.stop_signal = "SIGUSR1".into();
    let id = node.runtime.create_container(&sandbox, &config).await.unwrap();
    node.runtime.start_container(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    node.runtime.stop_container(&id, 20).await.unwrap();
    assert_eq!(node.wait(&id, ContainerState::Exited).await.exit_code, 6);
    // Never started, stopped all the same.
    let id = node.runtime.create_container(&sandbox, &node.script("true")).await.unwrap();
    node.runtime.stop_container(&id, 20).await.unwrap();
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}
