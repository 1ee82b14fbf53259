//! Disks that stall, fail and lose power.

use std::time::Duration;

use super::disks::Disk;
use super::hosts::{Cluster, Role};
use super::load::Load;

/// Three servers with disks of their own, under load.
fn with_disks() -> (Cluster, Vec<Disk>, Load) {
    let mut cluster = Cluster::empty();
    let mut disks = Vec::new();
    for _ in 0..3 {
        let host = cluster.add(Role::Server, &["--disable-agent"]);
        disks.push(cluster.disk(host));
        cluster.start(host);
        cluster.wait_ready(host);
    }
    let client = cluster.add(Role::Client, &[]);
    let load = Load::start(&cluster, 6, &[client]);
    load.wait_for_writes(50, 120);
    (cluster, disks, load)
}

#[test]
fn a_disk_may_stall_for_ten_seconds() {
    let (mut cluster, disks, load) = with_disks();
    let leader = cluster.wait_leader();
    let follower = (leader + 1) % 3;
    for server in [leader, follower] {
        disks[server].stall();
        // The others go on meanwhile.
        load.wait_for_writes(10, 120);
        std::thread::sleep(Duration::from_secs(10));
        disks[server].go_on();
        for host in cluster.servers() {
            cluster.wait_ready(host);
        }
    }
    load.wait_for_writes(50, 120);
    load.finish(&cluster);
}

#[test]
fn a_server_whose_disk_fails_stops_and_says_so() {
    let (mut cluster, disks, load) = with_disks();
    let leader = cluster.wait_leader();
    disks[leader].fail();
    let log = cluster.hosts[leader].wait_for_end(60);
    let last = log.lines().last().unwrap_or_default();
    assert!(last.contains("Input/output error"), "{last}");
    load.wait_for_writes(50, 120);
    load.finish(&cluster);
}

#[test]
fn power_cuts_of_one_and_of_all_lose_nothing() {
    let (mut cluster, mut disks, load) = with_disks();
    let one = cluster.wait_leader();
    for victims in [vec![one], cluster.servers(), cluster.servers()] {
        load.wait_for_writes(50, 120);
        // A power cut leaves nobody to answer. A server that still ran would: ext4's shutdown lets a sync that is under
        // way return as done though its metadata is dropped, and the write would be acknowledged.
        victims.iter().for_each(|v| cluster.hosts[*v].freeze());
        victims.iter().for_each(|v| disks[*v].fail());
        victims.iter().for_each(|v| cluster.hosts[*v].kill9());
        // All of them before any starts: its mount namespace would hold the failed disks of the others.
        victims.iter().for_each(|v| disks[*v].power_up());
        for victim in victims {
            cluster.reboot(victim);
            cluster.start(victim);
        }
        for server in cluster.servers() {
            cluster.wait_ready(server);
        }
    }
    load.wait_for_writes(50, 120);
    load.finish(&cluster);
}
