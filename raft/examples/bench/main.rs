//! Committed puts of 1 KiB, linearizable gets, serializable reads and deliveries to 1,000 watchers of one prefix, a
//! second, on one member and on three (processes of this program on loopback), and beside them etcd's on the same disk:
//! `cargo run --release -p coracle-raft --example bench -- [directory] [seconds] [etcd binary]`.
//! `… -- failover [directory] [rounds]` kills the leader of three and tells how long writes were refused.
//!
//! Every put goes to the leader, on its own key of a thousand per client, and counts when it is committed (synced by a
//! majority) and applied. Ours come from tasks in the leader's process, which is how the API server uses it; etcd's come
//! over gRPC from this process, as there is no other way to ask it; only puts compare, whose cost is elsewhere.

mod etcd;
mod load;
mod member;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use load::Kind;
use member::Process;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const CLIENTS: [usize; 4] = [1, 16, 128, 512];
const WATCHERS: usize = 1000;
/// Each is delivered to all watchers.
const WATCHED_PUTS: usize = 300;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    match arguments.first().map(String::as_str) {
        Some("member") => runtime.block_on(member::run(&arguments[1..])),
        Some("failover") => {
            let dir = PathBuf::from(arguments.get(1).map_or("bench-data", String::as_str));
            let rounds = arguments.get(2).map_or(Ok(20), |rounds| rounds.parse())?;
            failover(&dir, rounds)
        }
        _ => {
            let dir = PathBuf::from(arguments.first().map_or("bench-data", String::as_str));
            let seconds = arguments.get(1).map_or(Ok(3), |seconds| seconds.parse())?;
            let etcd = arguments.get(2).map(PathBuf::from);
            puts(&runtime, &dir, seconds, etcd.as_deref())
        }
    }
}

fn puts(runtime: &tokio::runtime::Runtime, dir: &Path, seconds: u64, etcd: Option<&Path>) -> Result<()> {
    println!(
        "{:>9} {:>8} {:>7} {:>4} {:>10} {:>10} {:>10}",
        "store", "members", "clients", "what", "a second", "p50 ms", "p99 ms"
    );
    let row = |store: &str, members: usize, clients: usize, what: &str, figures: &str| {
        let columns: Vec<&str> = figures.split(' ').collect();
        println!(
            "{store:>9} {members:>8} {clients:>7} {:>4} {:>10} {:>10} {:>10}",
            what,
            columns.first().unwrap_or(&""),
            columns.get(1).unwrap_or(&""),
            columns.get(2).unwrap_or(&"")
        );
    };
    for members in [1, 3] {
        let mut cluster = start(&dir.join(format!("coracle-{members}")), members)?;
        for (kind, clients) in calls() {
            let figures = cluster[0].ask(&format!("{} {clients} {seconds}", kind.name()))?;
            row("coracle", members, clients, kind.name(), &figures);
        }
        let figures = cluster[0].ask(&format!("fan {WATCHERS} {WATCHED_PUTS}"))?;
        row("coracle", members, WATCHERS, "fan", &figures);
        let memory: Vec<String> = cluster.iter().map(|process| format!("{} MiB", process.resident() >> 20)).collect();
        println!("{:>9} {members:>8}         resident {}", "coracle", memory.join(", "));
        cluster.iter_mut().for_each(Process::kill);
        if let Some(binary) = etcd {
            let cluster = etcd::Cluster::start(binary, &dir.join(format!("etcd-{members}")), members)?;
            for (kind, clients) in calls() {
                let figures = runtime.block_on(cluster.run(kind, clients, Duration::from_secs(seconds)))?;
                row("etcd", members, clients, kind.name(), &figures.to_string());
            }
            let figures = runtime.block_on(cluster.fan_out(WATCHERS, WATCHED_PUTS))?;
            row("etcd", members, WATCHERS, "fan", &figures.to_string());
            let memory: Vec<String> = cluster.resident().iter().map(|bytes| format!("{} MiB", bytes >> 20)).collect();
            println!("{:>9} {members:>8}         resident {}", "etcd", memory.join(", "));
        }
    }
    Ok(())
}

fn calls() -> impl Iterator<Item = (Kind, usize)> {
    [Kind::Put, Kind::Get, Kind::Read].into_iter().flat_map(|kind| CLIENTS.map(|clients| (kind, clients)))
}

/// Members with a vote each; the first one leads.
fn start(dir: &Path, count: usize) -> Result<Vec<Process>> {
    let mut cluster = Vec::new();
    for at in 0..count {
        cluster.push(Process::start(&dir.join(at.to_string()), at)?);
        if at > 0 {
            let joined = format!("add {} {}", cluster[at].id, cluster[at].port);
            cluster[0].ask(&joined)?;
            cluster[at].ask("voter")?;
        }
    }
    Ok(cluster)
}

fn failover(dir: &Path, rounds: usize) -> Result<()> {
    let mut cluster = start(dir, 3)?;
    let mut times = Vec::new();
    for round in 0..rounds {
        let leader: u64 = cluster[round % 3].ask("leader")?.parse()?;
        let killed = cluster.iter().position(|process| process.id == leader).ok_or("an unknown leader")?;
        let prober = (killed + 1) % 3;
        cluster[prober].tell("probe")?;
        std::thread::sleep(Duration::from_millis(500 + 37 * (round as u64 % 13)));
        let began = Instant::now();
        cluster[killed].kill();
        // From here on the prober says when a write that it began after it was told so is accepted.
        let answer = cluster[prober].ask("accepted")?;
        let time = began.elapsed();
        println!("round {:>2}: {:>5} ms until a write was accepted ({answer})", round + 1, time.as_millis());
        times.push(time);
        cluster[killed] = Process::start(&dir.join(killed.to_string()), killed)?;
        cluster[killed].ask("voter")?;
        cluster[killed].ask("barrier")?;
    }
    times.sort_unstable();
    if let (Some(median), Some(max)) = (times.get(times.len() / 2), times.last()) {
        println!("p50 {} ms, max {} ms over {} rounds", median.as_millis(), max.as_millis(), times.len());
    }
    cluster.iter_mut().for_each(Process::kill);
    Ok(())
}
