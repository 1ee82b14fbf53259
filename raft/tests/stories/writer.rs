//! A process that writes as fast as it can and says what was acknowledged. It is this test binary, run again with an
//! environment variable that names the data directory.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::{Node, Options};
use coracle_store::{Op, RangeRequest, Txn, prefix_end};

/// Concurrent clients in the process; each writes its keys one after the other.
pub const CLIENTS: usize = 12;
const DIR: &str = "CORACLE_TEST_WRITER_DIR";
const BOOT: &str = "CORACLE_TEST_WRITER_BOOT";

/// What a writer process said until it ended.
#[derive(Debug, Default)]
pub struct Report {
    /// How many keys each client had when the process started; None if it was killed before it knew.
    pub found: Option<[u64; CLIENTS]>,
    /// How many keys of each client are acknowledged, of those that got an acknowledgement.
    pub acknowledged: [u64; CLIENTS],
    /// Acknowledgements in this process's life.
    pub count: u64,
}

/// A running writer.
pub struct Writer {
    child: Child,
    ready: Receiver<()>,
    listener: JoinHandle<Report>,
}

impl Writer {
    pub fn start(dir: &Path, boot: &str) -> Writer {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "writer::process", "--nocapture", "--test-threads=1"])
            .env(DIR, dir)
            .env(BOOT, boot)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = child.stdout.take().unwrap();
        let (told, ready) = mpsc::channel();
        let listener = std::thread::spawn(move || listen(output, &told));
        Writer { child, ready, listener }
    }

    /// Waits until the process has checked what it found and begins to write.
    pub fn wait_until_ready(&self) {
        self.ready.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(self.child.id() as i32)
    }

    /// kill -9, then everything it said.
    pub fn kill(mut self) -> Report {
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert!(!status.success() && status.code().is_none(), "the writer ended by itself: {status}");
        self.listener.join().unwrap()
    }
}

fn listen(output: ChildStdout, ready: &Sender<()>) -> Report {
    let mut report = Report::default();
    for line in BufReader::new(output).lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words[..] {
            ["found", ref counts @ ..] => {
                let counts: Vec<u64> = counts.iter().map(|count| count.parse().unwrap()).collect();
                report.found = Some(counts.try_into().unwrap());
                // Rounds that kill early don't wait for this.
                let _ = ready.send(());
            }
            ["ack", client, key] => {
                let (client, key): (usize, u64) = (client.parse().unwrap(), key.parse().unwrap());
                report.acknowledged[client] = report.acknowledged[client].max(key + 1);
                report.count += 1;
            }
            _ => {}
        }
    }
    report
}

/// Not a test of its own: the body of the writer process.
#[test]
fn process() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(write_forever(Path::new(&dir)));
}

async fn write_forever(dir: &Path) {
    // Small, so that segments, snapshots and recycling all happen many times.
    let options = Options {
        segment_size: Some(512 << 10),
        snapshot_distance: 1 << 20,
        boot_id: std::env::var(BOOT).ok(),
        ..Options::new(dir)
    };
    let node = Node::start(options).await.unwrap();
    let counts: Vec<u64> = (0..CLIENTS).map(|client| check(&node, client)).collect();
    let words: Vec<String> = counts.iter().map(u64::to_string).collect();
    // The harness has begun a line of its own.
    say(&format!("\nfound {}", words.join(" ")));
    let clients = counts.into_iter().enumerate().map(|(client, next)| {
        let node = node.clone();
        tokio::spawn(async move {
            for key in next.. {
                let put = Op::Put { key: name(client, key), value: value(client, key), lease: 0 };
                node.txn(Txn { then: vec![put], ..Txn::default() }).await.unwrap();
                say(&format!("ack {client} {key}"));
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
}

/// One write call, so that a line is either said or not.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn name(client: usize, key: u64) -> Bytes {
    format!("/c/{client}/{key:012}").into()
}

/// Told from key and client, and now and then larger than a page.
fn value(client: usize, key: u64) -> Bytes {
    let length = if key % 16 == 7 { 20_000 } else { 900 };
    format!("{client}:{key};").repeat(length / 8).into()
}

/// The number of keys the client has; they must be the first ones, without a hole, each with its value.
fn check(node: &Node, client: usize) -> u64 {
    let start = Bytes::from(format!("/c/{client}/"));
    let request = RangeRequest { end: prefix_end(&start), start, ..RangeRequest::default() };
    let kvs = node.store().range(&request).unwrap().kvs;
    for (key, kv) in kvs.iter().enumerate() {
        let key = key as u64;
        assert_eq!(kv.key, name(client, key), "a write is missing");
        assert_eq!(kv.value, value(client, key), "a write has changed");
    }
    kvs.len() as u64
}
