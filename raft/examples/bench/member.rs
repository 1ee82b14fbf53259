//! One member in a process of its own, told what to do by lines on its standard input. Peers meet over plain TCP on
//! loopback: whoever connects says its id, and is believed.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_raft::{Connection, Dial, Node, Options, Peer};
use coracle_store::{Op, Txn, WatchRequest};
use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::{Result, load};

/// A member as the parent sees it.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub id: u64,
    pub port: u16,
}

impl Process {
    pub fn start(dir: &Path, at: usize) -> Result<Process> {
        let port = 23_790 + at as u16;
        let mut child = Command::new(std::env::current_exe()?)
            .arg("member")
            .arg(dir)
            .args([at.to_string(), port.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().ok_or("no input")?;
        let output = BufReader::new(child.stdout.take().ok_or("no output")?);
        let mut process = Process { child, input, output, id: 0, port };
        process.id = process.ask("id")?.parse()?;
        Ok(process)
    }

    pub fn tell(&mut self, line: &str) -> Result<()> {
        writeln!(self.input, "{line}")?;
        Ok(())
    }

    pub fn ask(&mut self, line: &str) -> Result<String> {
        self.tell(line)?;
        let mut answer = String::new();
        self.output.read_line(&mut answer)?;
        match answer.trim().strip_prefix("ok") {
            Some(answer) => Ok(answer.trim().to_owned()),
            None => Err(format!("{line}: {answer}").into()),
        }
    }

    /// Bytes of memory.
    pub fn resident(&self) -> u64 {
        resident(self.child.id())
    }

    pub fn kill(&mut self) {
        // It may have ended by itself, which shows elsewhere.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
}

struct Tcp {
    own: u64,
}

impl Dial for Tcp {
    fn dial(&self, peer: &Peer) -> BoxFuture<'static, io::Result<Box<dyn Connection>>> {
        let (own, address) = (self.own, peer.address.parse::<SocketAddr>());
        Box::pin(async move {
            let mut stream = TcpStream::connect(address.map_err(io::Error::other)?).await?;
            stream.set_nodelay(true)?;
            stream.write_u64(own).await?;
            Ok(Box::new(stream) as Box<dyn Connection>)
        })
    }
}

/// The member's process.
pub async fn run(arguments: &[String]) -> Result<()> {
    let [dir, at, port] = arguments else { return Err("member DIRECTORY NUMBER PORT".into()) };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse()?));
    let own = coracle_raft::member_id(Path::new(dir))?;
    let options = Options {
        name: format!("n{at}"),
        address: address.to_string(),
        dial: Some(Arc::new(Tcp { own })),
        join: at != "0",
        ..Options::new(dir)
    };
    let listener = TcpListener::bind(address).await?;
    let node = Node::start(options).await?;
    tokio::spawn(accept(listener, node.clone()));
    let (sender, mut lines) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(io::Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut probe = None;
    while let Some(line) = lines.recv().await {
        if line.trim() == "probe" {
            let node = node.clone();
            probe = Some(tokio::spawn(async move {
                // Until the leader is lost, and then until a write is accepted again.
                loop {
                    let (before, begun) = (*node.leader().borrow(), std::time::Instant::now());
                    let put = put(&node, "/probe".into()).await;
                    let after = *node.leader().borrow();
                    if put.is_ok() && (after != before || begun.elapsed() > Duration::from_millis(400)) {
                        return begun.elapsed();
                    }
                }
            }));
            continue;
        }
        let answer = match line.trim() {
            "accepted" => match probe.take() {
                Some(probe) => {
                    probe.await.map(|time| format!("{} ms in one call", time.as_millis())).map_err(Into::into)
                }
                None => Err("nothing was probed".into()),
            },
            line => obey(&node, line).await,
        };
        match answer {
            Ok(answer) => println!("ok {answer}"),
            Err(error) => println!("error {error}"),
        }
    }
    Ok(())
}

async fn accept(listener: TcpListener, node: Node) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let node = node.clone();
        tokio::spawn(async move {
            if let (Ok(peer), Ok(())) = (stream.read_u64().await, stream.set_nodelay(true)) {
                node.serve_peer(Box::new(stream), peer).await;
            }
        });
    }
}

async fn obey(node: &Node, line: &str) -> Result<String> {
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["id"] => Ok(node.id().to_string()),
        ["add", id, port] => {
            let name = format!("n{}", port.parse::<u16>()? - 23_790);
            node.add_member(Peer { id: id.parse()?, name, address: format!("127.0.0.1:{port}") }).await?;
            Ok(String::new())
        }
        ["voter"] => {
            node.voter().wait_for(|votes| *votes).await?;
            Ok(String::new())
        }
        ["leader"] => {
            let mut leader = node.leader();
            let id = leader.wait_for(Option::is_some).await?.unwrap_or(0);
            Ok(id.to_string())
        }
        ["barrier"] => Ok(node.read_barrier().await?.to_string()),
        ["fan", watchers, puts] => Ok(fan_out(node, watchers.parse()?, puts.parse()?).await?.to_string()),
        [kind @ ("put" | "get" | "read"), clients, seconds] => {
            let (node, puts, linearizable) = (node.clone(), kind == "put", kind == "get");
            let calls = move |client: usize, n: usize| {
                let node = node.clone();
                let key = format!("/bench/{client}/{n}");
                async move {
                    if puts {
                        return put(&node, key.into()).await;
                    }
                    if linearizable {
                        node.read_barrier().await?;
                    }
                    node.store().get(key.as_bytes())?;
                    Ok(())
                }
            };
            let figures = load::run(clients.parse()?, Duration::from_secs(seconds.parse()?), calls).await?;
            Ok(figures.to_string())
        }
        _ => Err(format!("unknown: {line}").into()),
    }
}

async fn fan_out(node: &Node, watchers: usize, puts: usize) -> Result<load::Figures> {
    let (sender, seen) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..watchers {
        let (start, end) = (Bytes::from_static(b"/fan/"), Bytes::from_static(b"/fan0"));
        let mut watcher = node.store().watch(WatchRequest { start, end, from_revision: None })?;
        let sender = sender.clone();
        tokio::spawn(async move {
            let mut left = puts;
            while left > 0 {
                let Ok(batch) = watcher.next().await else { return };
                for event in batch.events {
                    let number =
                        event.kv.key.strip_prefix(b"/fan/").and_then(|n| std::str::from_utf8(n).ok()?.parse().ok());
                    if sender.send((number.unwrap_or(usize::MAX), std::time::Instant::now())).is_err() {
                        return;
                    }
                    left -= 1;
                }
            }
        });
    }
    drop(sender);
    load::fan_out(watchers, puts, |n| put(node, format!("/fan/{n}").into()), seen).await
}

async fn put(node: &Node, key: Bytes) -> Result<()> {
    let value = Bytes::from_static(&[b'x'; 1024]);
    node.txn(Txn { then: vec![Op::Put { key, value, lease: 0 }], ..Txn::default() }).await?;
    Ok(())
}
