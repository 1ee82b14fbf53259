//! Stories about snapshots that are restored, survivors that are made a cluster again, and members that start over.

use std::time::Duration;

use coracle_store::{StoreError, WatchRequest};

use super::cluster::{Cluster, eventually, put, small, value};
use crate::{Node, OfflineError, Options, Standing, StartError, WalError, forget, member_id, reset, restore};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_restored_on_one_member_and_the_others_start_over() {
    let mut cluster = Cluster::of(3).await;
    cluster.put(0, "/a", "saved").await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved.snap");
    let info = cluster.node(1).save_snapshot(&file).await.unwrap();
    assert_eq!(info.bytes, std::fs::metadata(&file).unwrap().len());
    cluster.put(0, "/a", "later").await;
    let old = cluster.node(0).store().revision();
    let in_use = restore(cluster.members[0].data(), &file).unwrap_err();
    assert!(matches!(in_use, OfflineError::InUse(_)), "{in_use}");
    for at in 0..3 {
        cluster.stop(at).await;
    }
    let restored = restore(cluster.members[0].data(), &file).unwrap();
    assert_eq!(restored.id, cluster.id(0), "the identity stays");
    assert!(restored.revision > old + 1_000_000);
    for at in 0..3 {
        cluster.start(at).await;
    }
    assert_eq!(cluster.get(0, "/a").await.as_deref(), Some("saved"));
    assert_eq!(cluster.node(0).store().revision(), restored.revision);
    let past = WatchRequest { start: "/".into(), end: "0".into(), from_revision: Some(old) };
    assert!(matches!(cluster.node(0).store().watch(past).err(), Some(StoreError::Compacted { .. })));
    cluster.put(0, "/a", "new").await;
    assert_eq!(cluster.node(0).store().revision(), restored.revision + 1);
    // The others still have a majority of the old cluster, and must not go on with it.
    for at in 1..3 {
        let mut standing = cluster.node(at).standing();
        let told = standing.wait_for(|standing| *standing == Standing::Superseded);
        tokio::time::timeout(Duration::from_secs(30), told).await.expect("it was not told").unwrap();
        cluster.stop(at).await;
        forget(cluster.members[at].data()).unwrap();
        cluster.members[at].join = true;
        cluster.start(at).await;
        cluster.node(0).add_member(cluster.members[at].peer()).await.unwrap();
        cluster.voter(at).await;
    }
    cluster.agree("/a", "new").await;
    assert_eq!(cluster.node(0).members().len(), 3);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_all_that_a_fresh_machine_needs() {
    let cluster = Cluster::of(1).await;
    cluster.put(0, "/a", "1").await;
    let dir = tempfile::tempdir().unwrap();
    let (file, fresh) = (dir.path().join("saved.snap"), dir.path().join("db"));
    cluster.node(0).save_snapshot(&file).await.unwrap();
    cluster.end().await;
    restore(&fresh, &file).unwrap();
    let node = Node::start(Options { data_dir: fresh.clone(), name: "new".to_owned(), ..small() }).await.unwrap();
    assert_eq!(value(&node, "/a").as_deref(), Some("1"));
    eventually("it knows its name", async || node.members()[0].name == "new").await;
    node.shutdown().await;
    let node = Node::start(Options { data_dir: fresh, ..small() }).await.unwrap();
    assert_eq!(value(&node, "/a").as_deref(), Some("1"));
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_is_not_restored_and_harms_nothing() {
    let mut cluster = Cluster::of(1).await;
    cluster.put(0, "/a", "1").await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("saved.snap");
    cluster.node(0).save_snapshot(&file).await.unwrap();
    cluster.stop(0).await;
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = restore(cluster.members[0].data(), &file).unwrap_err();
    assert!(error.to_string().contains("can't be restored"), "{error}");
    cluster.start(0).await;
    assert_eq!(value(cluster.node(0), "/a").as_deref(), Some("1"));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_survivor_becomes_a_cluster_with_everything_acknowledged() {
    let mut cluster = Cluster::of(3).await;
    for n in 0..50 {
        cluster.put(n % 3, &format!("/k/{n}"), "x").await;
    }
    cluster.agree("/k/49", "x").await;
    let in_use = reset(cluster.members[2].data()).unwrap_err();
    assert!(matches!(in_use, OfflineError::InUse(_)), "{in_use}");
    for at in 0..3 {
        cluster.kill(at).await;
    }
    assert_eq!(reset(cluster.members[2].data()).unwrap(), cluster.id(2));
    assert!(matches!(reset(cluster.members[2].data()), Err(OfflineError::Alone)));
    cluster.start(2).await;
    for n in 0..50 {
        assert_eq!(value(cluster.node(2), &format!("/k/{n}")).as_deref(), Some("x"));
    }
    cluster.put(2, "/k/0", "y").await;
    // One that comes back belongs to the past.
    cluster.start(1).await;
    let mut standing = cluster.node(1).standing();
    let told = standing.wait_for(|standing| *standing == Standing::Superseded);
    tokio::time::timeout(Duration::from_secs(30), told).await.expect("it was not told").unwrap();
    assert!(cluster.node(1).txn(put("/k/0", "z")).await.is_err());
    assert_eq!(cluster.get(2, "/k/0").await.as_deref(), Some("y"));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_is_refused_where_it_would_be_wrong() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(reset(dir.path()), Err(OfflineError::NoData(_))));
    let mut cluster = Cluster::of(2).await;
    cluster.isolate(1);
    let learner = cluster.new_member(true);
    cluster.network.heal();
    cluster.start(learner).await;
    let removed = 1;
    cluster.node(0).add_member(cluster.members[learner].peer()).await.unwrap();
    cluster.voter(learner).await;
    let leader = cluster.leader().await;
    let keeper = if leader == removed { 0 } else { leader };
    let gone = cluster.id(removed);
    cluster.node(keeper).remove_member(gone).await.unwrap();
    cluster.kill(removed).await;
    // Whether it learnt of its removal or not, it doesn't become a second cluster by itself; a member that never had
    // any data doesn't either.
    if let Ok(id) = reset(cluster.members[removed].data()) {
        assert_eq!(id, gone);
    }
    let empty = cluster.new_member(true);
    assert!(matches!(reset(cluster.members[empty].data()), Err(OfflineError::NoData(_))));
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_cut_off_must_be_done_again() {
    let mut cluster = Cluster::of(1).await;
    cluster.put(0, "/a", "1").await;
    cluster.stop(0).await;
    let data = cluster.members[0].data().to_path_buf();
    std::fs::write(data.join("unfinished"), "a restore").unwrap();
    let error = Node::start(Options { data_dir: data.clone(), ..small() }).await.unwrap_err();
    assert!(matches!(error, StartError::Unfinished { .. }) && error.to_string().contains("a restore"), "{error}");
    forget(&data).unwrap();
    cluster.start(0).await;
    assert_eq!(value(cluster.node(0), "/a"), None);
    cluster.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_without_its_log_does_not_start_and_takes_its_place_again_as_a_new_one() {
    let mut cluster = Cluster::of(3).await;
    cluster.put(0, "/a", "1").await;
    let lost = cluster.follower().await;
    cluster.stop(lost).await;
    let data = cluster.members[lost].data().to_path_buf();
    std::fs::remove_dir_all(data.join("wal")).unwrap();
    let start = || Node::start(Options { data_dir: data.clone(), join: true, ..small() });
    let error = start().await.unwrap_err();
    assert!(matches!(error, StartError::Wal(WalError::Gone { .. })), "{error}");
    assert!(matches!(reset(&data).unwrap_err(), OfflineError::NoData(_)));
    // Nor an empty one.
    std::fs::create_dir(data.join("wal")).unwrap();
    let error = start().await.unwrap_err();
    assert!(matches!(error, StartError::Wal(WalError::Gone { .. })), "{error}");
    assert!(matches!(reset(&data).unwrap_err(), OfflineError::Wal(WalError::Gone { .. })));
    // What the message advises.
    let old = cluster.id(lost);
    std::fs::remove_dir_all(&data).unwrap();
    cluster.members[lost].id = member_id(&data).unwrap();
    cluster.members[lost].join = true;
    cluster.start(lost).await;
    assert_ne!(cluster.id(lost), old);
    let asker = cluster.leader().await;
    cluster.node(asker).add_member(cluster.members[lost].peer()).await.unwrap();
    cluster.voter(lost).await;
    cluster.agree("/a", "1").await;
    cluster.end().await;
}
