//! Servers that die, at any time.

use std::time::{Duration, Instant};

use rand::seq::IndexedRandom;

use super::hosts::{Cluster, Role};
use super::load::Load;
use crate::assert_eventually;

fn pause(milliseconds: std::ops::Range<u64>) {
    std::thread::sleep(Duration::from_millis(rand::random_range(milliseconds)));
}

/// Kills random servers under load, one at a time; they come back.
fn random_kills(servers: usize, rounds: u32) {
    let mut cluster = Cluster::of(servers, 1, &["--disable-agent"]);
    let load = Load::start(&cluster, 6, &cluster.clients());
    for round in 0..rounds {
        load.wait_for_writes(20, 120);
        let victim = *cluster.servers().choose(&mut rand::rng()).unwrap();
        cluster.hosts[victim].kill9();
        pause(0..1500);
        cluster.start(victim);
        cluster.wait_ready(victim);
        if round % 10 == 9 {
            println!("{} kills, {} writes acknowledged", round + 1, load.accepted());
        }
    }
    load.wait_for_writes(20, 120);
    load.finish(&cluster);
}

#[test]
fn a_killed_server_loses_nothing() {
    random_kills(1, 3);
}

#[test]
fn killed_servers_lose_nothing() {
    random_kills(3, 5);
}

#[test]
#[ignore = "a hundred rounds"]
fn a_hundred_kills_lose_nothing() {
    random_kills(3, 100);
}

#[test]
fn the_leader_may_die_in_the_middle_of_a_membership_change() {
    let mut cluster = Cluster::of(3, 1, &["--disable-agent"]);
    let load = Load::start(&cluster, 4, &cluster.clients());
    for _ in 0..2 {
        load.wait_for_writes(20, 120);
        let leader = cluster.wait_leader();
        let newcomer = cluster.add(Role::Server, &["--disable-agent"]);
        cluster.start(newcomer);
        pause(200..2000);
        cluster.hosts[leader].kill9();
        load.wait_for_writes(20, 120);
        cluster.start(leader);
        cluster.wait_ready(leader);
        cluster.wait_ready(newcomer);

        let leader = cluster.wait_leader();
        let name = cluster.hosts[newcomer].name.clone();
        let asked = if leader == 0 { 1 } else { 0 };
        let removal = std::thread::scope(|scope| {
            let host = &cluster.hosts[asked];
            let removal = scope.spawn(|| host.coracle(&["member", "remove", &name]));
            pause(0..100);
            removal.join().unwrap()
        });
        removal.unwrap();
        if leader != newcomer {
            cluster.hosts[leader].kill9();
            cluster.start(leader);
        }
        if cluster.hosts[newcomer].runs() {
            cluster.hosts[newcomer].kill9();
        }
        cluster.hosts[newcomer].role = Role::Client;
        // The newcomer may have led: then it is gone for good.
        if leader != newcomer {
            cluster.wait_ready(leader);
        }
        assert_eventually!(30, "the member is gone", {
            let members = cluster.members(asked)?;
            if members.iter().all(|m| m["name"] != name.as_str()) { Ok(()) } else { Err(format!("{members:?}")) }
        });
    }
    load.wait_for_writes(20, 120);
    load.finish(&cluster);
}

#[test]
fn a_rolling_restart_is_hardly_noticed() {
    let mut cluster = Cluster::of(3, 1, &["--disable-agent"]);
    let load = Load::start(&cluster, 6, &cluster.clients());
    for server in cluster.servers() {
        load.wait_for_writes(20, 120);
        cluster.hosts[server].stop();
        cluster.start(server);
        cluster.wait_ready(server);
    }
    load.wait_for_writes(20, 120);
    assert_eq!(load.reads_that_failed_twice(), 0, "a client that tries once more gets its answer");
    load.finish(&cluster);
}

#[test]
#[ignore = "figures: loss of a leader to the next accepted write"]
fn how_long_the_loss_of_a_leader_lasts() {
    let mut cluster = Cluster::of(3, 1, &["--disable-agent"]);
    let load = Load::start(&cluster, 6, &cluster.clients());
    let mut took = Vec::new();
    for _ in 0..20 {
        load.wait_for_writes(50, 120);
        let leader = cluster.wait_leader();
        let begin = Instant::now();
        cluster.hosts[leader].kill9();
        // What was under way to the others may still be acknowledged; the leader's death is over when a write that
        // began after it is.
        took.push(load.wait_for_a_new_write(begin, 60));
        cluster.start(leader);
        cluster.wait_ready(leader);
    }
    load.finish(&cluster);
    took.sort();
    println!(
        "leader lost to next accepted write, {} rounds: p50 {:?}, max {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1]
    );
}
