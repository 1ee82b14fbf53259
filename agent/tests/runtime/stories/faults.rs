//! What goes wrong, and what is left then.

use std::time::Duration;

use coracle_agent::runtime::*;

use crate::harness::Node;

fn shims(node: &Node) -> Vec<i32> {
    let wanted = node.run_dir().join("pods").to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let folder = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if comm == "coracle-shim\n" && folder.to_string_lossy().starts_with(&wanted) {
            found.push(pid);
        }
    }
    found
}

pub async fn what_cannot_start_says_why() {
    let node = Node::new().await;
    let sandbox = node.runtime.run_pod_sandbox(&node.pod()).await.unwrap();
    let cases: [(&[&str], &str); 4] = [
        (&["nope"], "exec: \"nope\": executable file not found in $PATH"),
        (&["/no/such"], "exec: \"/no/such\": stat /no/such: no such file or directory"),
        (&["/etc/plain"], "exec: \"/etc/plain\": permission denied"),
        (&["/etc"], "exec: \"/etc\": permission denied"),
    ];
    for (command, text) in cases {
        let mut config = node.script("");
        config.command = command.iter().map(|word| (*word).to_owned()).collect();
        let id = node.runtime.create_container(&sandbox, &config).await.unwrap();
        let error = node.runtime.start_container(&id).await.unwrap_err();
        assert_eq!(error.to_string(), format!("failed to start container: {text}"));
        let status = node.runtime.container_status(&id).await.unwrap();
        assert_eq!(
            (status.state, status.exit_code, status.reason.as_str()),
            (ContainerState::Exited, 128, "StartError")
        );
        assert!(status.message.contains(text), "{}", status.message);
        node.runtime.remove_container(&id).await.unwrap();
    }
    // Executable by its mode, but no program: only execve knows.
    let mut config = node.script("");
    config.command = vec!["/text".into()];
    let text = node.folder.path().join("text");
    std::fs::write(&text, "just text").unwrap();
    std::fs::set_permissions(&text, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    config.mounts = vec![Mount { container_path: "/text".into(), host_path: text, ..Default::default() }];
    let id = node.runtime.create_container(&sandbox, &config).await.unwrap();
    let error = node.runtime.start_container(&id).await.unwrap_err();
    assert!(error.to_string().contains("exec format error"), "{error}");
    config.image = "sha256:0000".into();
    let error = node.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Image(_)), "{error}");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    assert_eq!(node.mounts(), 0);
}

pub async fn out_of_memory_is_told() {
    let node = Node::new().await;
    let mut config = node.script("tail /dev/zero");
    config.linux.resources.memory_limit_in_bytes = Some(24 << 20);
    let (_, status) = node.run_to_end(config).await;
    assert_eq!((status.exit_code, status.signal, status.reason.as_str()), (137, 9, "OOMKilled"));
}

pub async fn a_new_agent_finds_running_pods() {
    let mut node = Node::new().await;
    let (sandbox, running) =
        node.run(&node.pod(), &node.script("i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done")).await;
    let short = node.runtime.create_container(&sandbox, &node.script("sleep 0.3; exit 6")).await.unwrap();
    node.runtime.start_container(&short).await.unwrap();
    let waiting = node.runtime.create_container(&sandbox, &node.script("echo late")).await.unwrap();
    let before = node.runtime.container_status(&running).await.unwrap();
    let old = node.runtime.clone();
    node.restart().await;
    drop(old);
    let after = node.runtime.container_status(&running).await.unwrap();
    assert_eq!((after.state, after.pid, after.started_at), (ContainerState::Running, before.pid, before.started_at));
    assert_eq!(node.runtime.pod_sandbox_status(&sandbox).await.unwrap().state, PodSandboxState::Ready);
    assert_eq!(node.wait(&short, ContainerState::Exited).await.exit_code, 6, "it ended under the new agent");
    assert_eq!(node.sh(&running, "echo here").await.1, "here\n");
    node.runtime.start_container(&waiting).await.unwrap();
    let status = node.wait(&waiting, ContainerState::Exited).await;
    let log = node.log(&status);
    assert!(log.contains("late\n"), "the log, which both containers write: {log:?}");
    // Ends while no agent looks are in the files.
    node.restart().await;
    assert_eq!(node.runtime.container_status(&short).await.unwrap().exit_code, 6);
    node.runtime.stop_container(&running, 0).await.unwrap();
    assert_eq!(node.wait(&running, ContainerState::Exited).await.exit_code, 137);
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    assert_eq!((node.mounts(), shims(&node).len()), (0, 0));
}

pub async fn a_killed_shim_leaves_nothing() {
    let mut node = Node::new().await;
    for restarted in [false, true] {
        let mut events = node.runtime.events();
        let (sandbox, id) = node.run(&node.pod(), &node.script("sleep 1000")).await;
        let pid = node.runtime.container_status(&id).await.unwrap().pid.unwrap();
        let shim = shims(&node);
        assert_eq!(shim.len(), 1);
        if restarted {
            // The agent is away while the shim dies. (Its successor takes over the same files.)
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim[0]), nix::sys::signal::Signal::SIGKILL).unwrap();
            node.restart().await;
        } else {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim[0]), nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        let status = node.wait(&id, ContainerState::Exited).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
        assert_eq!(node.runtime.pod_sandbox_status(&sandbox).await.unwrap().state, PodSandboxState::NotReady);
        tokio::time::sleep(Duration::from_millis(100)).await;
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "the container's process is gone: {state}");
        if !restarted {
            let mut lost = false;
            while let Ok(event) = events.try_recv() {
                lost |= event.kind == ContainerEventKind::SandboxLost && event.sandbox_id == sandbox;
            }
            assert!(lost);
        }
        node.runtime.stop_pod_sandbox(&sandbox).await.unwrap();
        node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        assert_eq!(node.mounts(), 0);
        assert!(node.network.attached.lock().is_empty());
    }
}

pub async fn a_failed_sandbox_leaves_nothing() {
    let node = Node::new().await;
    let mut pod = node.pod();
    pod.linux.sysctls = [("net.ipv4.no_such_thing".to_owned(), "1".to_owned())].into();
    let error = node.runtime.run_pod_sandbox(&pod).await.unwrap_err();
    let text = std::error::Error::source(&error).map_or(String::new(), ToString::to_string) + &error.to_string();
    assert!(text.contains("net.ipv4.no_such_thing"), "{text}");
    assert!(node.runtime.list_pod_sandboxes(&Default::default()).await.unwrap().is_empty());
    assert_eq!((node.mounts(), shims(&node).len()), (0, 0));
    assert_eq!(std::fs::read_dir(node.run_dir().join("pods")).unwrap().count(), 0);
}

pub async fn many_pods_at_once() {
    let node = Node::new().await;
    let started = std::time::Instant::now();
    let pods = (0..30).map(|_| async {
        let (sandbox, id) = node.run(&node.pod(), &node.script("sleep 1000")).await;
        (sandbox, id)
    });
    let pods = futures::future::join_all(pods).await;
    println!("  30 pods up in {} ms", started.elapsed().as_millis());
    let started = std::time::Instant::now();
    futures::future::join_all(pods.iter().map(|(sandbox, _)| async {
        node.runtime.stop_pod_sandbox(sandbox).await.unwrap();
        node.runtime.remove_pod_sandbox(sandbox).await.unwrap();
    }))
    .await;
    println!("  30 pods gone in {} ms", started.elapsed().as_millis());
    assert_eq!((node.mounts(), shims(&node).len()), (0, 0));
}
