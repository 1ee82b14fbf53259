//! Clients that read and write all the time and remember everything they were told.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use http::Method;
use serde_json::{Value, json};

use super::client::{Client, Credential, Failure};
use super::history::{Did, History, Op};
use super::hosts::Cluster;
use crate::assert_eventually;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// Keys that all clients fight for.
const KEYS: u64 = 5;

/// What clients share.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    history: Mutex<History>,
    servers: Mutex<Vec<SocketAddr>>,
    values: AtomicU64,
    accepted: AtomicU64,
    /// When the last acknowledged write began.
    newest: Mutex<Option<Instant>>,
    failed_twice: AtomicU64,
}

/// Running clients.
pub struct Load {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts clients; each begins at another server and turns to the next when one fails it.
    /// `at` are the hosts that they run on, in turn.
    pub fn start(cluster: &Cluster, count: usize, at: &[usize]) -> Load {
        let shared = Arc::new(Shared::default());
        *shared.servers.lock().unwrap() = cluster.servers().iter().map(|s| cluster.hosts[*s].api()).collect();
        let credential = cluster.credential();
        let clients = (0..count).map(|n| {
            let worker = Worker::new(n, credential.clone(), shared.clone());
            cluster.client(at[n % at.len()], move || worker.run())
        });
        Load { clients: clients.collect(), shared }
    }

    /// The servers are elsewhere now.
    pub fn servers_are_at(&self, servers: Vec<SocketAddr>) {
        *self.shared.servers.lock().unwrap() = servers;
    }

    /// Number of writes that were acknowledged so far.
    pub fn accepted(&self) -> u64 {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Number of reads that failed and failed again at once at another server.
    pub fn reads_that_failed_twice(&self) -> u64 {
        self.shared.failed_twice.load(Ordering::Relaxed)
    }

    /// Waits for an acknowledged write that began after a moment; how long after it was acknowledged.
    pub fn wait_for_a_new_write(&self, moment: Instant, seconds: u64) -> Duration {
        loop {
            if self.shared.newest.lock().unwrap().is_some_and(|start| start > moment) {
                return moment.elapsed();
            }
            assert!(moment.elapsed() < Duration::from_secs(seconds), "no write was accepted for {seconds} s");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for so many more acknowledged writes.
    pub fn wait_for_writes(&self, more: u64, seconds: u64) {
        let before = self.accepted();
        assert_eventually!(seconds, "writes are accepted", {
            let now = self.accepted() - before;
            if now >= more { Ok(()) } else { Err(format!("{now} of {more}")) }
        });
    }

    /// Ends the clients, then checks that every server has every acknowledged write and that the history is linearizable.
    pub fn finish(self, cluster: &Cluster) -> History {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().unwrap();
        }
        let history = std::mem::take(&mut *self.shared.history.lock().unwrap());
        assert!(history.acknowledged() > 0, "nothing was written");
        let mut lost = Vec::new();
        for server in cluster.servers().into_iter().filter(|s| cluster.hosts[*s].runs()) {
            let name = &cluster.hosts[server].name;
            let (status, list) = assert_eventually!(30, format!("{name} answers"), {
                match cluster.get(server, MAPS) {
                    Ok((200, list)) => Ok((200, list)),
                    other => Err(format!("{other:?}")),
                }
            });
            assert_eq!(status, 200);
            let items = list["items"].as_array().unwrap();
            let found: std::collections::HashMap<&str, u64> =
                items.iter().filter_map(|m| Some((m["metadata"]["name"].as_str()?, revision(m)?))).collect();
            for (key, (revision, value)) in history.last_written() {
                let there = found.get(key).copied().unwrap_or(0);
                if there < revision {
                    lost.push(format!("{name} has lost value {value} of {key}: {there} instead of {revision}"));
                }
            }
        }
        assert!(lost.is_empty(), "{}", lost.join("\n"));
        history.check().unwrap();
        println!("{} calls, {} writes acknowledged, none lost, linearizable", history.0.len(), history.acknowledged());
        history
    }
}

fn revision(object: &Value) -> Option<u64> {
    object["metadata"]["resourceVersion"].as_str()?.parse().ok()
}

/// One client.
struct Worker {
    number: usize,
    turn: usize,
    shared: Arc<Shared>,
    client: Client,
    made: u64,
}

impl Worker {
    fn new(number: usize, credential: Credential, shared: Arc<Shared>) -> Worker {
        let server = {
            let servers = shared.servers.lock().unwrap();
            servers[number % servers.len()]
        };
        let mut client = Client::new(credential, server);
        client.patience = Duration::from_secs(3);
        Worker { number, turn: number, shared, client, made: 0 }
    }

    async fn run(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let dice: u8 = rand::random_range(0..10);
            let key = format!("shared-{}", rand::random_range(0..KEYS));
            let op = match dice {
                0..3 => self.create().await,
                3..6 => self.update(key).await,
                _ => self.read(key).await,
            };
            let Some(op) = op else { continue };
            if matches!(op.did, Did::Wrote { .. }) {
                self.shared.accepted.fetch_add(1, Ordering::Relaxed);
                let mut newest = self.shared.newest.lock().unwrap();
                *newest = (*newest).max(Some(op.start));
            }
            self.shared.history.lock().unwrap().0.push(op);
        }
    }

    fn value(&self) -> u64 {
        self.shared.values.fetch_add(1, Ordering::Relaxed)
    }

    /// A new object of its own: what is lost of these is seen at the end.
    async fn create(&mut self) -> Option<Op> {
        self.made += 1;
        let key = format!("client-{}-{}", self.number, self.made);
        let value = self.value();
        self.write(Method::POST, MAPS.to_owned(), key, value, None).await
    }

    /// Reads one of the shared objects and changes it on condition that nobody else did.
    async fn update(&mut self, key: String) -> Option<Op> {
        let path = format!("{MAPS}/{key}");
        let answer = self.call(Method::GET, &path, None).await;
        let value = self.value();
        match answer {
            Ok((200, object)) => self.write(Method::PUT, path, key, value, Some(revision(&object)?)).await,
            Ok((404, _)) => self.write(Method::POST, MAPS.to_owned(), key, value, None).await,
            _ => None,
        }
    }

    async fn write(&mut self, method: Method, path: String, key: String, value: u64, after: Option<u64>) -> Option<Op> {
        let mut object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": key}, "data": {"value": value.to_string()}});
        if let Some(after) = after {
            object["metadata"]["resourceVersion"] = after.to_string().into();
        }
        let start = Instant::now();
        let did = match self.call(method, &path, Some(&object)).await {
            Ok((200 | 201, written)) => Did::Wrote { value, revision: revision(&written)?, after },
            Ok((400..=499, _)) => Did::Refused { value },
            Err(Failure::NotSent(_)) => return None,
            _ => Did::MayHaveWritten { value },
        };
        Some(Op { key, start, end: Instant::now(), did })
    }

    async fn read(&mut self, key: String) -> Option<Op> {
        let start = Instant::now();
        let path = format!("{MAPS}/{key}");
        let mut answer = self.call(Method::GET, &path, None).await;
        if !matches!(answer, Ok((200..=499, _))) {
            answer = self.call(Method::GET, &path, None).await;
            if !matches!(answer, Ok((200..=499, _))) {
                self.shared.failed_twice.fetch_add(1, Ordering::Relaxed);
            }
        }
        let Ok((200, object)) = answer else { return None };
        let value = object["data"]["value"].as_str()?.parse().ok()?;
        let did = Did::Read { value, revision: revision(&object)? };
        Some(Op { key, start, end: Instant::now(), did })
    }

    async fn call(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<(u16, Value), Failure> {
        let answer = self.client.call(method, path, body).await;
        if !matches!(answer, Ok((0..=499, _))) {
            // Not in a hurry: a cluster without a quorum is asked a hundred times a second, not more.
            tokio::time::sleep(Duration::from_millis(10)).await;
            self.turn += 1;
            let server = {
                let servers = self.shared.servers.lock().unwrap();
                servers[self.turn % servers.len()]
            };
            self.client.turn_to(server);
        }
        answer
    }
}
