//! The stories.

use std::time::{Duration, Instant};

use coracle_agent::runtime::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Node, Story};

macro_rules! stories {
    ($($name:ident),* $(,)?) => {
        pub const ALL: &[Story] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

stories![a_container_runs_logs_and_is_gone, the_builtin_image_serves, commands_run_inside,];

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
    assert_eq!(node.sh(&id, "pgrep -f 'sleep 100$' | wc -l").await.1.trim(), "0", "the command was killed");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}
