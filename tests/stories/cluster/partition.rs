//! Servers that do not hear each other.

use std::time::Duration;

use super::hosts::Cluster;
use super::load::Load;
use super::switch::Weather;

/// Three servers and two clients' machines, with clients on both.
fn under_load() -> (Cluster, Load) {
    let cluster = Cluster::of(3, 2, &["--disable-agent"]);
    let load = Load::start(&cluster, 6, &cluster.clients());
    load.wait_for_writes(20, 120);
    (cluster, load)
}

fn others(cluster: &Cluster, server: usize) -> Vec<usize> {
    cluster.servers().into_iter().filter(|s| *s != server).collect()
}

/// One server and one machine of clients on one side, the rest on the other.
fn isolate(cluster: &Cluster, server: usize) {
    let clients = cluster.clients();
    let mut rest = others(cluster, server);
    rest.push(clients[1]);
    cluster.part(&[server, clients[0]], &rest);
}

fn end(mut cluster: Cluster, load: Load) {
    cluster.switch.heal();
    load.wait_for_writes(50, 120);
    for server in cluster.servers() {
        cluster.wait_ready(server);
    }
    load.finish(&cluster);
}

#[test]
fn every_server_may_be_cut_off_in_turn() {
    let (cluster, load) = under_load();
    for server in cluster.servers() {
        isolate(&cluster, server);
        load.wait_for_writes(50, 120);
        cluster.switch.heal();
        load.wait_for_writes(20, 120);
    }
    end(cluster, load);
}

#[test]
fn a_leader_that_is_cut_off_is_replaced_and_acknowledges_nothing() {
    let (cluster, load) = under_load();
    for _ in 0..3 {
        isolate(&cluster, cluster.wait_leader());
        load.wait_for_writes(50, 120);
        // Long enough for the old leader to notice, and for clients on its side to try.
        std::thread::sleep(Duration::from_secs(2));
        cluster.switch.heal();
        load.wait_for_writes(20, 120);
    }
    end(cluster, load);
}

#[test]
fn a_leader_that_is_heard_but_hears_nobody_is_replaced() {
    let (cluster, load) = under_load();
    let leader = cluster.wait_leader();
    for other in others(&cluster, leader) {
        cluster.cut(other, leader);
    }
    load.wait_for_writes(50, 120);
    cluster.switch.heal();
    load.wait_for_writes(20, 120);
    let leader = cluster.wait_leader();
    for other in others(&cluster, leader) {
        cluster.cut(leader, other);
    }
    load.wait_for_writes(50, 120);
    end(cluster, load);
}

#[test]
fn loss_and_delay_slow_it_down_and_no_more() {
    let (cluster, load) = under_load();
    let bad = Weather { loss: 0.05, delay: Duration::from_millis(200), ..Weather::default() };
    for a in cluster.servers() {
        for b in others(&cluster, a) {
            cluster.weather(a, b, bad);
        }
    }
    load.wait_for_writes(30, 180);
    end(cluster, load);
}
