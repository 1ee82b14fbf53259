//! Streams in and out.

use std::time::Duration;

use coracle_agent::runtime::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::Node;

async fn read_until(stream: &mut BoxRead, wanted: &str) -> String {
    let mut text = Vec::new();
    let work = async {
        let mut chunk = [0; 4096];
        while !String::from_utf8_lossy(&text).contains(wanted) {
            let length = stream.read(&mut chunk).await.unwrap();
            assert!(length > 0, "ended with {:?} before {wanted:?}", String::from_utf8_lossy(&text));
            text.extend_from_slice(&chunk[..length]);
        }
    };
    tokio::time::timeout(Duration::from_secs(10), work).await.unwrap_or_else(|_| panic!("no {wanted:?}"));
    String::from_utf8_lossy(&text).into_owned()
}

async fn read_all(stream: &mut Option<BoxRead>) -> String {
    let mut text = String::new();
    stream.as_mut().unwrap().read_to_string(&mut text).await.unwrap();
    text
}

pub async fn a_terminal_is_one() {
    let node = Node::new().await;
    let mut config = node.script("tty; read line; echo got $line; stty size; sleep 1000");
    (config.tty, config.stdin) = (true, true);
    config.linux.security_context.run_as_user = Some(33);
    let (sandbox, id) = node.run(&node.pod(), &config).await;
    let request = AttachRequest { container_id: id.clone(), stdin: true, stdout: true, stderr: true };
    let mut session = node.runtime.attach(&request).await.unwrap();
    assert!(session.stderr.is_none());
    session.resize.send(TerminalSize { width: 91, height: 17 }).await.unwrap();
    let mut exit = session.exit;
    let mut out = session.stdout.take().unwrap();
    let mut stdin = session.stdin.take().unwrap();
    tokio::select! {
        _ = &mut exit => panic!("ended"),
        () = tokio::time::sleep(Duration::from_millis(100)) => {}
    }
    stdin.write_all(b"hello\n").await.unwrap();
    assert!(read_until(&mut out, "17 91").await.contains("got hello"));
    let (_, size) = node.sh(&id, "ls -l /dev/console | cut -c1").await;
    assert_eq!(size, "c\n");
    // A command with a terminal of its own.
    let request = ExecRequest {
        container_id: id.clone(),
        command: ["sh", "-c", "tty; read x; stty size; echo $TERM $x; exit 4"].map(str::to_owned).to_vec(),
        tty: true,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let mut session = node.runtime.exec(&request).await.unwrap();
    let exit = tokio::spawn(session.exit);
    session.resize.send(TerminalSize { width: 33, height: 22 }).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let mut out = session.stdout.take().unwrap();
    session.stdin.as_mut().unwrap().write_all(b"typed\n").await.unwrap();
    let text = read_until(&mut out, "typed\r\n22 33\r\nxterm typed").await;
    assert!(text.starts_with("/dev/pts/"), "{text}");
    assert_eq!(exit.await.unwrap().unwrap(), 4);
    node.runtime.stop_container(&id, 0).await.unwrap();
    let status = node.wait(&id, ContainerState::Exited).await;
    let log = node.log(&status);
    assert!(log.starts_with("/dev/pts/0\n") && log.contains("got hello\n"), "{log:?}");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

pub async fn standard_input_and_attach() {
    let node = Node::new().await;
    let mut config = node.script("cat; echo end >&2; exit 9");
    (config.stdin, config.stdin_once) = (true, true);
    let (sandbox, id) = node.run(&node.pod(), &config).await;
    let request = AttachRequest { container_id: id.clone(), stdin: true, stdout: true, stderr: true };
    let mut session = node.runtime.attach(&request).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    let large = "0123456789abcdef".repeat(20_000);
    let writer = tokio::spawn({
        let large = large.clone();
        async move {
            stdin.write_all(large.as_bytes()).await.unwrap();
            drop(stdin);
        }
    });
    assert_eq!(read_all(&mut session.stdout).await.len(), large.len());
    assert_eq!(read_all(&mut session.stderr).await, "end\n");
    writer.await.unwrap();
    assert_eq!(session.exit.await.unwrap(), 9);
    let again = node.runtime.attach(&request).await;
    assert!(matches!(again, Err(RuntimeError::WrongState(_))));
    // One that reads late gets all of it, also what was said right before the end.
    let mut config = node.script("read go; head -c 200000 /dev/zero | tr '\\0' z; exit 0");
    config.stdin = true;
    let id = node.runtime.create_container(&sandbox, &config).await.unwrap();
    node.runtime.start_container(&id).await.unwrap();
    let request = AttachRequest { container_id: id.clone(), stdin: true, stdout: true, stderr: false };
    let mut session = node.runtime.attach(&request).await.unwrap();
    session.stdin.as_mut().unwrap().write_all(b"go\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let reader = tokio::spawn(async move { read_all(&mut session.stdout).await.len() });
    node.wait(&id, ContainerState::Exited).await;
    assert_eq!(reader.await.unwrap(), 200_000);
    // A client that does not read holds the container back, and lets go when it leaves.
    let id = node
        .runtime
        .create_container(
            &sandbox,
            &node.script("yes $(head -c 1000 /dev/zero | tr '\\0' x) | head -c 3000000; echo done >&2; sleep 1000"),
        )
        .await
        .unwrap();
    node.runtime.start_container(&id).await.unwrap();
    let request = AttachRequest { container_id: id.clone(), stdin: false, stdout: true, stderr: false };
    drop(node.runtime.attach(&request).await.unwrap());
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let status = node.runtime.container_status(&id).await.unwrap();
        if node.log(&status).contains("done") {
            break;
        }
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

pub async fn commands_have_streams() {
    let node = Node::new().await;
    let (sandbox, id) = node.run(&node.pod(), &node.script("sleep 1000")).await;
    let request = ExecRequest {
        container_id: id.clone(),
        command: ["sh", "-c", "cat; echo problem >&2; exit 2"].map(str::to_owned).to_vec(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    };
    let mut session = node.runtime.exec(&request).await.unwrap();
    let mut stdin = session.stdin.take().unwrap();
    stdin.write_all(b"through").await.unwrap();
    stdin.shutdown().await.unwrap();
    drop(stdin);
    assert_eq!(read_all(&mut session.stdout).await, "through");
    assert_eq!(read_all(&mut session.stderr).await, "problem\n");
    assert_eq!(session.exit.await.unwrap(), 2);
    // Who goes away takes the command along.
    let request = ExecRequest { command: ["sleep", "77"].map(str::to_owned).to_vec(), ..request };
    let session = node.runtime.exec(&request).await.unwrap();
    assert_eq!(node.count(&id, "sleep 77").await, 1);
    drop(session);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node.count(&id, "sleep 77").await, 0);
    // Something left in the background does not hold the answer.
    let started = std::time::Instant::now();
    assert_eq!(node.sh(&id, "sleep 5 & echo now").await, (0, "now\n".into()));
    assert!(started.elapsed() < Duration::from_secs(3));
    node.runtime.stop_container(&id, 0).await.unwrap();
    assert!(matches!(node.runtime.exec(&request).await, Err(RuntimeError::WrongState(_))));
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

pub async fn logs_rotate_and_long_lines_are_cut() {
    let node = Node::new().await;
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; i=0; while [ $i -lt 30 ]; do head -c 1000000 /dev/zero | \
                  tr '\\0' y; echo; i=$((i+1)); done; echo last";
    let pod = node.pod();
    let (sandbox, id) = node.run(&pod, &node.script(script)).await;
    let status = node.wait(&id, ContainerState::Exited).await;
    let files = std::fs::read_dir(status.log_path.parent().unwrap()).unwrap().count();
    assert_eq!(files, 3, "30 MB in files of 10 MB");
    assert!(node.log(&status).ends_with("last\n"));
    // Somebody else rotates.
    let id =
        node.runtime.create_container(&sandbox, &node.script("echo one; sleep 1; echo two; sleep 1000")).await.unwrap();
    node.runtime.start_container(&id).await.unwrap();
    let status = node.runtime.container_status(&id).await.unwrap();
    std::fs::rename(&status.log_path, status.log_path.with_extension("old")).unwrap();
    node.runtime.reopen_container_log(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert!(node.log(&status).ends_with("two\n"));
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}
