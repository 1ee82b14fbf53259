//! Stories about everything that goes wrong, each ending with all acknowledged writes in place and, where clients ran
//! meanwhile, with a linearizable history.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_store::{Compare, Op, Txn};

use super::cluster::{Cluster, eventually, put, value};
use crate::{Node, ProposeError};

#[path = "../../tests/support/history.rs"]
mod history;

use history::{Action, History};

/// Clients on every member that is given, reading, writing and swapping a few keys until they are told to stop.
struct Clients {
    history: Arc<History>,
    /// A history begins with keys that nobody wrote.
    prefix: u64,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

const KEYS: usize = 3;

impl Clients {
    fn start() -> Clients {
        Clients { history: Arc::default(), prefix: rand::random(), stop: Arc::default(), tasks: Vec::new() }
    }

    fn on(&mut self, node: &Node) {
        for _ in 0..3 {
            let (node, history, stop) = (node.clone(), self.history.clone(), self.stop.clone());
            let prefix = self.prefix;
            self.tasks.push(tokio::spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    act(&node, prefix, &history).await;
                    // Keeps the histories short enough to be searched.
                    tokio::time::sleep(Duration::from_millis(rand::random_range(5..25))).await;
                }
            }));
        }
    }

    /// Returns the number of operations that were answered.
    async fn end(self) -> usize {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.history.assert_linearizable();
        self.history.len()
    }
}

async fn act(node: &Node, prefix: u64, history: &History) {
    let key = format!("/h/{prefix}/{}", rand::random_range(0..KEYS));
    let begun = history.now();
    let new: u64 = rand::random();
    let op = || Op::Put { key: key.clone().into(), value: new.to_string().into(), lease: 0 };
    let number = |text: String| text.parse::<u64>().unwrap();
    match rand::random_range(0..3) {
        0 => {
            if node.read_barrier().await.is_ok() {
                history.done(&key, begun, Action::Read(value(node, &key).map(number)));
            }
        }
        1 => match node.txn(Txn { then: vec![op()], ..Txn::default() }).await {
            Ok(_) => history.done(&key, begun, Action::Write(new)),
            Err(ProposeError::NotLeader { .. }) => {}
            Err(_) => history.unknown(&key, begun, Action::Write(new)),
        },
        _ => {
            let seen = node.store().get(key.as_bytes()).unwrap();
            let expected = seen.as_ref().map(|kv| number(String::from_utf8(kv.value.to_vec()).unwrap()));
            let revision = seen.map_or(0, |kv| kv.mod_revision);
            let compare = Compare::ModRevision { key: key.clone().into(), equals: revision };
            match node.txn(Txn { compare: vec![compare], then: vec![op()], ..Txn::default() }).await {
                Ok(response) if response.succeeded => history.done(&key, begun, Action::Swap(expected, new, true)),
                Ok(_) | Err(ProposeError::NotLeader { .. }) => {}
                // It would have taken the place of one value only.
                Err(_) => history.unknown(&key, begun, Action::Swap(expected, new, true)),
            }
        }
    }
}

async fn a_while() {
    tokio::time::sleep(Duration::from_millis(1500)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_leaders_lose_nothing() {
    let mut cluster = Cluster::of(3).await;
    let mut clients = Clients::start();
    for round in 0..4 {
        let leader = cluster.leader().await;
        let other = cluster.follower().await;
        clients.on(cluster.node(other));
        let key = format!("/acked/{round}");
        cluster.put(leader, &key, "x").await;
        cluster.kill(leader).await;
        cluster.put(other, "/after", &key).await;
        a_while().await;
        assert!(std::mem::replace(&mut clients, Clients::start()).end().await > 0);
        assert_eq!(cluster.get(other, &key).await.as_deref(), Some("x"));
        cluster.start(leader).await;
        cluster.agree("/after", &key).await;
    }
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parted_leader_acknowledges_nothing_that_is_lost() {
    let cluster = Cluster::of(3).await;
    let mut clients = Clients::start();
    for at in 0..3 {
        clients.on(cluster.node(at));
    }
    a_while().await;
    for _ in 0..2 {
        let leader = cluster.leader().await;
        cluster.isolate(leader);
        let mut leads = cluster.node(leader).leadership();
        tokio::time::timeout(Duration::from_secs(20), leads.wait_for(|leads| !leads)).await.unwrap().unwrap();
        let other = (leader + 1) % 3;
        cluster.put(other, "/majority", "x").await;
        a_while().await;
        cluster.network.heal();
        cluster.agree("/majority", "x").await;
        a_while().await;
    }
    assert!(clients.end().await > 50);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn partitions_of_any_kind_leave_a_linearizable_history() {
    let cluster = Cluster::of(3).await;
    let mut clients = Clients::start();
    for at in 0..3 {
        clients.on(cluster.node(at));
    }
    for round in 0..6 {
        let (a, b) = (cluster.id(round % 3), cluster.id((round + 1) % 3));
        match round % 3 {
            0 => cluster.isolate(round % 3),
            1 => cluster.network.block(a, b),
            _ => cluster.network.part(&[a], &[b]),
        }
        a_while().await;
        cluster.network.heal();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    assert!(clients.end().await > 50);
    cluster.put(0, "/end", "x").await;
    cluster.agree("/end", "x").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_hears_little_disturbs_nobody() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let deaf = cluster.follower().await;
    cluster.put(leader, "/a", "1").await;
    let term = cluster.node(leader).term().await;
    cluster.network.block(cluster.id(leader), cluster.id(deaf));
    // Long enough for several elections, if it could call them.
    tokio::time::sleep(Duration::from_secs(6)).await;
    cluster.put(leader, "/a", "2").await;
    assert_eq!((cluster.leader().await, cluster.node(leader).term().await), (leader, term));
    cluster.network.heal();
    cluster.agree("/a", "2").await;
    assert_eq!(cluster.node(leader).term().await, term);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_whose_disk_stalls_is_replaced_and_comes_back() {
    let cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    cluster.members[leader].disk.stall();
    let node = cluster.node(leader).clone();
    let stuck = tokio::spawn(async move { node.txn(put("/stuck", "x")).await });
    let other = (leader + 1) % 3;
    let third = (leader + 2) % 3;
    eventually("another leads", async || cluster.node(other).is_leader() || cluster.node(third).is_leader()).await;
    cluster.put(other, "/meanwhile", "x").await;
    cluster.members[leader].disk.recover();
    cluster.agree("/meanwhile", "x").await;
    match stuck.await.unwrap() {
        Ok(_) => cluster.agree("/stuck", "x").await,
        Err(error) => {
            assert!(matches!(error, ProposeError::OutcomeUnknown | ProposeError::NotLeader { .. }), "{error}")
        }
    }
    cluster.put(leader, "/back", "x").await;
    cluster.agree("/back", "x").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_whose_disk_stalls_is_not_missed() {
    let cluster = Cluster::of(3).await;
    let slow = cluster.follower().await;
    let leader = cluster.leader().await;
    cluster.members[slow].disk.stall();
    for n in 0..50 {
        cluster.put(leader, "/a", &n.to_string()).await;
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(cluster.node(leader).is_leader());
    cluster.members[slow].disk.recover();
    cluster.agree("/a", "49").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_disk_stops_its_member_and_no_other() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    cluster.put(leader, "/a", "1").await;
    cluster.members[leader].disk.break_down();
    let _ = cluster.node(leader).txn(put("/lost", "x")).await;
    let stopped = tokio::time::timeout(Duration::from_secs(20), cluster.node(leader).stopped()).await.unwrap();
    assert!(stopped.contains("this member stopped"), "{stopped}");
    let other = (leader + 1) % 3;
    cluster.put(other, "/a", "2").await;
    cluster.kill(leader).await;
    cluster.members[leader].disk.recover();
    cluster.start(leader).await;
    cluster.agree("/a", "2").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_network_is_borne() {
    let cluster = Cluster::of(3).await;
    cluster.network.set_delay(Duration::from_millis(200));
    let leader = cluster.leader().await;
    let follower = cluster.follower().await;
    let term = cluster.node(leader).term().await;
    for n in 0..8 {
        cluster.put(follower, "/a", &n.to_string()).await;
        assert_eq!(cluster.get(follower, "/a").await, Some(n.to_string()));
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(cluster.node(leader).term().await, term, "slow is not dead");
    cluster.network.set_delay(Duration::ZERO);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_killed_while_the_membership_changes_leaves_a_working_cluster() {
    for round in 0..3u64 {
        let mut cluster = Cluster::of(3).await;
        let new = cluster.new_member(true);
        cluster.start(new).await;
        let leader = cluster.leader().await;
        let asker = cluster.follower().await;
        let (node, peer) = (cluster.node(asker).clone(), cluster.members[new].peer());
        let adding = tokio::spawn(async move { node.add_member(peer).await });
        tokio::time::sleep(Duration::from_millis(3 + 250 * round)).await;
        cluster.kill(leader).await;
        adding.await.unwrap().unwrap();
        cluster.voter(new).await;
        cluster.put(asker, "/a", "1").await;
        cluster.start(leader).await;
        cluster.agree("/a", "1").await;
        assert_eq!(cluster.node(asker).members().len(), 4);
        cluster.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_through_followers_survive_changes_of_leader_and_are_done_once() {
    let mut cluster = Cluster::of(3).await;
    let mut done = 0;
    for round in 0..3 {
        let leader = cluster.leader().await;
        let follower = cluster.follower().await;
        let node = cluster.node(follower).clone();
        let writers: Vec<_> = (0..10)
            .map(|client| {
                let node = node.clone();
                tokio::spawn(async move {
                    for _ in 0..30 {
                        node.txn(put(&format!("/c/{client}"), "x")).await.expect("a new leader was there in time");
                    }
                })
            })
            .collect();
        drop(node);
        tokio::time::sleep(Duration::from_millis(20 + 30 * round)).await;
        cluster.kill(leader).await;
        for writer in writers {
            writer.await.unwrap();
        }
        done += 30;
        for client in 0..10 {
            let key = format!("/c/{client}");
            let version = cluster.node(follower).store().get(key.as_bytes()).unwrap().unwrap().version;
            assert_eq!(version, done, "each write once");
        }
        cluster.start(leader).await;
    }
    cluster.end().await;
}
