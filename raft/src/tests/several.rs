//! Stories about several members: joining, agreeing, forwarding, leaving.

use std::time::Duration;

use coracle_store::{Command, Op, Txn, WatchError, WatchRequest};

use super::cluster::{Cluster, eventually, put, small, value};
use crate::{MembershipError, Options, ProposeError, Standing};

#[tokio::test(flavor = "multi_thread")]
async fn members_join_catch_up_get_a_vote_and_agree() {
    let mut cluster = Cluster::of(1).await;
    for n in 0..300 {
        cluster.put(0, &format!("/k/{n}"), "before").await;
    }
    for at in 1..3 {
        cluster.new_member(true);
        cluster.start(at).await;
        assert!(!*cluster.node(at).voter().borrow(), "nobody has added it yet");
        let peer = cluster.members[at].peer();
        cluster.node(0).add_member(peer.clone()).await.unwrap();
        cluster.node(0).add_member(peer).await.expect("adding is idempotent");
        cluster.voter(at).await;
        assert_eq!(value(cluster.node(at), "/k/299").as_deref(), Some("before"));
    }
    for at in 0..3 {
        cluster.put(at, "/through", &format!("{at}")).await;
        cluster.agree("/through", &format!("{at}")).await;
    }
    let states = cluster.node(2).members();
    let names: Vec<&str> = states.iter().map(|state| state.name.as_str()).collect();
    assert_eq!(names, ["n0", "n1", "n2"]);
    assert_eq!(states.iter().filter(|state| state.leader).count(), 1);
    assert!(states.iter().all(|state| !state.learner));
    for at in 0..3 {
        let node = cluster.node(at);
        eventually("everyone is in touch", async || node.members().iter().all(|state| state.reachable)).await;
    }
    assert_eq!(cluster.node(0).cluster(), cluster.node(2).cluster());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_stop_and_any_majority_goes_on() {
    let mut cluster = Cluster::of(3).await;
    cluster.put(0, "/a", "1").await;
    for at in 0..3 {
        cluster.stop(at).await;
    }
    cluster.start(1).await;
    assert_eq!(value(cluster.node(1), "/a").as_deref(), Some("1"), "its own state is open without a leader");
    cluster.start(2).await;
    cluster.put(1, "/a", "2").await;
    cluster.start(0).await;
    cluster.agree("/a", "2").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn five_members_go_on_without_two_and_wait_without_three() {
    let mut cluster = Cluster::of(5).await;
    cluster.put(4, "/a", "1").await;
    let first = cluster.leader().await;
    cluster.kill(first).await;
    let second = cluster.leader().await;
    cluster.kill(second).await;
    let asker = cluster.follower().await;
    cluster.put(asker, "/a", "2").await;
    cluster.agree("/a", "2").await;
    let third = cluster.leader().await;
    cluster.kill(third).await;
    let refused = tokio::time::timeout(Duration::from_secs(4), cluster.node(asker).txn(put("/b", "perhaps"))).await;
    assert!(!matches!(refused, Ok(Ok(_))), "two of five are no majority");
    assert!(cluster.node(asker).read_barrier().await.is_err());
    cluster.start(second).await;
    cluster.put(asker, "/a", "3").await;
    cluster.start(first).await;
    cluster.start(third).await;
    cluster.agree("/a", "3").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_write_through_a_follower_is_answered_there_and_done_once() {
    let cluster = Cluster::of(3).await;
    let at = cluster.follower().await;
    let node = cluster.node(at);
    let writes = (0..200).map(|n| async move {
        let key = format!("/n/{}", n % 20);
        let response = node.txn(put(&key, "x")).await.unwrap();
        // Applied here, not only on the leader.
        assert!(node.store().get(key.as_bytes()).unwrap().unwrap().mod_revision >= response.revision);
    });
    futures::future::join_all(writes).await;
    let versions: u64 = (0..20).map(|n| node.store().get(format!("/n/{n}").as_bytes()).unwrap().unwrap().version).sum();
    assert_eq!(versions, 200);
    let refused =
        node.txn(Txn { then: vec![Op::Put { key: "".into(), value: "".into(), lease: 0 }], ..Txn::default() });
    assert!(matches!(refused.await.unwrap_err(), ProposeError::Refused(_)));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clean_stop_hands_leadership_over_and_no_request_fails() {
    let mut cluster = Cluster::of(3).await;
    for round in 0..3 {
        let leader = cluster.leader().await;
        let other = cluster.follower().await;
        let node = cluster.node(other).clone();
        let load = tokio::spawn(async move {
            for n in 0..300 {
                node.txn(put(&format!("/load/{round}/{n}"), "x")).await.unwrap();
                node.read_barrier().await.unwrap();
            }
        });
        cluster.stop(leader).await;
        load.await.unwrap();
        cluster.start(leader).await;
        cluster.agree(&format!("/load/{round}/299"), "x").await;
    }
    cluster.end().await;
}

fn tiny() -> Options {
    Options { segment_size: Some(128 << 10), snapshot_distance: 200 << 10, log_kept: 60 << 10, ..small() }
}

async fn fill(cluster: &Cluster, at: usize, rounds: usize) {
    for round in 0..rounds {
        let text = format!("{round}").repeat(900);
        let puts = (0..20).map(|n| {
            let text = &text;
            async move { cluster.put(at, &format!("/fill/{n}"), text).await }
        });
        futures::future::join_all(puts).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_away_long_gets_a_snapshot_and_its_watches_start_over() {
    let mut cluster = Cluster::with(3, tiny()).await;
    let lagging = cluster.follower().await;
    cluster.put(lagging, "/a", "1").await;
    cluster.agree("/a", "1").await;
    let request = WatchRequest { start: "/".into(), end: "0".into(), from_revision: None };
    let mut watcher = cluster.node(lagging).store().watch(request).unwrap();
    cluster.isolate(lagging);
    // What is on its way would arrive once the network is whole again.
    cluster.network.sever(cluster.id(lagging));
    let other = cluster.running().into_iter().find(|at| *at != lagging).unwrap();
    eventually("the log that it lacks is purged", async || {
        fill(&cluster, other, 10).await;
        let known = cluster.node(lagging).log_end().await;
        let mut starts = futures::future::join_all((0..3).map(|at| cluster.node(at).log_start())).await;
        starts.remove(lagging);
        starts.into_iter().all(|start| start > known + 1)
    })
    .await;
    cluster.put(other, "/a", "2").await;
    let before = cluster.node(lagging).store().revision();
    cluster.network.heal();
    cluster.agree("/a", "2").await;
    assert!(cluster.node(lagging).store().revision() > before);
    let error = tokio::time::timeout(Duration::from_secs(30), async {
        loop {
            if let Err(error) = watcher.next().await {
                break error;
            }
        }
    });
    assert!(matches!(error.await.unwrap(), WatchError::Compacted { .. }));
    // It goes on from there, also over a restart.
    cluster.kill(lagging).await;
    cluster.put(other, "/a", "3").await;
    cluster.start(lagging).await;
    cluster.agree("/a", "3").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_away_shortly_needs_no_snapshot() {
    let mut cluster = Cluster::with(3, tiny()).await;
    let away = cluster.follower().await;
    let other = cluster.running().into_iter().find(|at| *at != away).unwrap();
    fill(&cluster, other, 30).await;
    eventually("its log is purged", async || cluster.node(away).log_start().await > 0).await;
    cluster.agree("/fill/0", &"29".repeat(900)).await;
    let known = cluster.node(away).log_end().await;
    cluster.kill(away).await;
    fill(&cluster, other, 1).await;
    let leader = cluster.leader().await;
    cluster.node(leader).trigger_snapshot().await.unwrap();
    cluster.start(away).await;
    cluster.agree("/fill/0", &"0".repeat(900)).await;
    assert!(cluster.node(away).log_start().await <= known, "a snapshot would have taken the place of the log");
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_is_told_and_its_requests_are_refused() {
    let cluster = Cluster::of(3).await;
    let leaving = cluster.follower().await;
    let asker = cluster.running().into_iter().find(|at| *at != leaving).unwrap();
    cluster.node(asker).remove_member(cluster.id(leaving)).await.unwrap();
    let unknown = cluster.node(asker).remove_member(77).await.unwrap_err();
    assert_eq!(unknown, MembershipError::NotAMember { id: 77 });
    let mut standing = cluster.node(leaving).standing();
    let told = standing.wait_for(|standing| *standing == Standing::Removed);
    tokio::time::timeout(Duration::from_secs(30), told).await.unwrap().unwrap();
    cluster.put(asker, "/a", "1").await;
    assert!(cluster.node(leaving).txn(put("/a", "2")).await.is_err());
    assert_eq!(cluster.get(asker, "/a").await.as_deref(), Some("1"));
    assert_eq!(cluster.node(asker).members().len(), 2);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_can_be_removed_and_a_needed_member_can_not() {
    let mut cluster = Cluster::of(3).await;
    let leader = cluster.leader().await;
    let asker = cluster.follower().await;
    cluster.node(asker).remove_member(cluster.id(leader)).await.unwrap();
    cluster.kill(leader).await;
    cluster.put(asker, "/a", "1").await;
    let third = cluster.running().into_iter().find(|at| *at != asker).unwrap();
    cluster.kill(third).await;
    let (asker_id, third_id) = (cluster.id(asker), cluster.id(third));
    eventually("it is missed", async || {
        cluster.node(asker).members().iter().any(|state| state.id == third_id && !state.reachable)
    })
    .await;
    assert!(cluster.node(asker).remove_member(asker_id).await.is_err());
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_a_new_address_announces_it() {
    let mut cluster = Cluster::of(3).await;
    let moving = cluster.follower().await;
    cluster.stop(moving).await;
    cluster.members[moving].address = "10.9.9.9:6443".to_owned();
    cluster.start(moving).await;
    let id = cluster.id(moving);
    let other = cluster.running().into_iter().find(|at| *at != moving).unwrap();
    eventually("the others know", async || {
        cluster.node(other).members().iter().any(|state| state.id == id && state.address == "10.9.9.9:6443")
    })
    .await;
    cluster.put(moving, "/a", "1").await;
    cluster.agree("/a", "1").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_members_with_new_addresses_find_each_other_by_one() {
    let mut cluster = Cluster::of(3).await;
    cluster.put(0, "/a", "1").await;
    for at in 0..3 {
        cluster.stop(at).await;
        cluster.members[at].address = format!("10.7.7.{at}:6443");
    }
    for at in 0..3 {
        cluster.start(at).await;
    }
    // What `--server` is for: two of them are told where the third is.
    let (id, address) = (cluster.id(0), cluster.members[0].address.clone());
    for at in 1..3 {
        cluster.node(at).learn_address(id, &address);
    }
    cluster.put(2, "/a", "2").await;
    cluster.agree("/a", "2").await;
    eventually("the membership has the new addresses", async || {
        cluster.node(1).members().iter().all(|state| state.address.starts_with("10.7.7."))
    })
    .await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_disk_takes_its_old_place() {
    let mut cluster = Cluster::of(3).await;
    cluster.put(0, "/a", "1").await;
    let lost = cluster.follower().await;
    let alive = cluster.new_member(true);
    (cluster.members[alive].name, cluster.members[alive].address) =
        (cluster.members[lost].name.clone(), cluster.members[lost].address.clone());
    let asker = cluster.running().into_iter().find(|at| *at != lost).unwrap();
    let error = cluster.node(asker).add_member(cluster.members[alive].peer()).await.unwrap_err();
    assert!(matches!(error, MembershipError::Taken { .. }), "the old one is alive: {error}");
    cluster.kill(lost).await;
    cluster.start(alive).await;
    let old = cluster.id(lost);
    cluster.node(asker).add_member(cluster.members[alive].peer()).await.unwrap();
    cluster.voter(alive).await;
    assert_eq!(cluster.node(asker).members().len(), 3);
    assert!(cluster.node(asker).members().iter().all(|state| state.id != old));
    cluster.agree("/a", "1").await;
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_end_whoever_leads() {
    let mut cluster = Cluster::of(3).await;
    let follower = cluster.follower().await;
    cluster.node(follower).propose(Command::LeaseGrant { id: 5, ttl_seconds: 2 }).await.unwrap();
    let op = Op::Put { key: "/leased".into(), value: "x".into(), lease: 5 };
    cluster.node(follower).txn(Txn { then: vec![op], ..Txn::default() }).await.unwrap();
    let leader = cluster.leader().await;
    cluster.kill(leader).await;
    assert!(value(cluster.node(follower), "/leased").is_some());
    eventually("the lease ends", async || value(cluster.node(follower), "/leased").is_none()).await;
    cluster.end().await;
}
