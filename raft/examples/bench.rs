//! Committed puts a second: `cargo run --release -p coracle-raft --example bench -- [directory] [seconds] [memory]`.
//!
//! Prints one line for each number of clients; every put is 1 KiB, on its own key of a thousand per client, and counts
//! when it is committed (synced) and applied.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use coracle_raft::{Backend, Node, Options};
use coracle_store::{Op, Txn};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let dir = PathBuf::from(arguments.next().unwrap_or_else(|| "bench-data".to_owned()));
    let seconds: u64 = arguments.next().map_or(Ok(3), |seconds| seconds.parse())?;
    let mut options = Options::new(&dir);
    if arguments.next().as_deref() == Some("memory") {
        options.backend = Backend::Memory;
    }
    let started = Instant::now();
    let node = Node::start(options).await?;
    println!("started in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    println!("{:>8} {:>10} {:>10} {:>10}", "clients", "puts/s", "p50 ms", "p99 ms");
    for clients in [1, 16, 64, 128] {
        if seconds == 0 {
            break;
        }
        let begin = Instant::now();
        let tasks =
            (0..clients).map(|client| tokio::spawn(put_for(node.clone(), client, Duration::from_secs(seconds))));
        let mut latencies = Vec::new();
        for task in tasks.collect::<Vec<_>>() {
            latencies.extend(task.await??);
        }
        latencies.sort_unstable();
        let rate = latencies.len() as f64 / begin.elapsed().as_secs_f64();
        let at = |part: usize| {
            latencies.get(latencies.len() * part / 100).map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
        };
        println!("{clients:>8} {rate:>10.0} {:>10.3} {:>10.3}", at(50), at(99));
    }
    node.shutdown().await;
    Ok(())
}

async fn put_for(node: Node, client: usize, time: Duration) -> Result<Vec<Duration>, coracle_raft::ProposeError> {
    let value = Bytes::from(vec![b'x'; 1024]);
    let mut latencies = Vec::new();
    let begin = Instant::now();
    for n in 0usize.. {
        let before = Instant::now();
        if before - begin > time {
            break;
        }
        let key = format!("/bench/{client}/{}", n % 1000).into();
        node.txn(Txn { then: vec![Op::Put { key, value: value.clone(), lease: 0 }], ..Txn::default() }).await?;
        latencies.push(before.elapsed());
    }
    Ok(latencies)
}
