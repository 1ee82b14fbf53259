//! openraft's own suite on our log and state machine, and stories about a node.

mod cluster;
mod faults;
mod network;
mod offline;
mod several;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use coracle_store::{Command, Op, Response, Store, Txn};
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use crate::entry::TypeConfig;
use crate::log::{Growth, Log};
use crate::machine::{ApplyThread, Snapshots, StateMachine};
use crate::member::{Identity, Member};
use crate::pending::Pending;
use crate::view::Backend;
use crate::wal::{SyncFile, Wal, WalOptions};
use crate::{Node, Options, ProposeError, StartError};

struct Builder;

impl StoreBuilder<TypeConfig, Log, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, StateMachine), openraft::StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let wal = Wal::open(&dir.path().join("wal"), WalOptions::new(1 << 20)).unwrap();
        let growth = Arc::new(Growth::default());
        let (_store, writer) = Store::open(coracle_store::Options::memory()).unwrap();
        let snapshot_dir = dir.path().join("snapshot");
        let current = crate::snapshot::newest(&snapshot_dir).unwrap();
        let snapshots = Arc::new(Snapshots::new(snapshot_dir, 1 << 20, current, growth.clone()));
        let pending = Arc::new(Pending::new(0, None));
        let identity = Arc::new(Identity::new(dir.path().to_path_buf(), Member::load(dir.path()).unwrap()));
        let apply = Arc::new(ApplyThread::start(writer, pending.clone(), || ()).unwrap());
        let machine = StateMachine::new(apply, snapshots, pending, identity, Default::default());
        Ok((dir, Log::new(wal, growth, None), machine))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openrafts_own_suite_passes() {
    Suite::test_all(Builder).await.unwrap();
}

fn options(dir: &TempDir, backend: Backend) -> Options {
    Options { backend, segment_size: Some(1 << 20), ..Options::new(dir.path()) }
}

fn sled() -> Backend {
    Backend::Sled { cache_capacity: 8 << 20 }
}

fn put(key: &str, value: &str) -> Txn {
    let put = Op::Put { key: key.to_owned().into(), value: value.to_owned().into(), lease: 0 };
    Txn { then: vec![put], ..Txn::default() }
}

fn value(node: &Node, key: &str) -> Option<String> {
    let kv = node.store().get(key.as_bytes()).unwrap()?;
    Some(String::from_utf8(kv.value.to_vec()).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_takes_writes_and_has_them_after_a_restart() {
    for backend in [Backend::Memory, sled()] {
        let dir = tempfile::tempdir().unwrap();
        let node = Node::start(options(&dir, backend.clone())).await.unwrap();
        assert!(node.is_leader());
        let first = node.txn(put("/a", "1")).await.unwrap();
        assert_eq!(first.revision, 1);
        for n in 0..50 {
            node.txn(put(&format!("/b/{n}"), "x")).await.unwrap();
        }
        assert_eq!(node.read_barrier().await.unwrap(), 51);
        node.shutdown().await;
        let node = Node::start(options(&dir, backend)).await.unwrap();
        assert_eq!((node.store().revision(), value(&node, "/a").as_deref()), (51, Some("1")));
        assert_eq!(node.txn(put("/a", "2")).await.unwrap().revision, 52);
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    let second = Node::start(options(&dir, Backend::Memory)).await;
    assert!(matches!(second, Err(StartError::InUse(_))), "{second:?}");
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_end_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    let granted = node.propose(Command::LeaseGrant { id: 5, ttl_seconds: 1 }).await.unwrap();
    assert!(matches!(granted, Response::Done { .. }));
    let op = Op::Put { key: "/leased".into(), value: "x".into(), lease: 5 };
    node.txn(Txn { then: vec![op], ..Txn::default() }).await.unwrap();
    assert!(value(&node, "/leased").is_some());
    tokio::time::timeout(Duration::from_secs(10), async {
        while value(&node, "/leased").is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .unwrap();
    node.shutdown().await;
}

fn put_n(n: usize) -> Txn {
    put(&format!("/n/{n}"), &"x".repeat(1000))
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn files(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|item| item.unwrap().path()).collect();
    paths.retain(|path| path.to_str().unwrap().ends_with(suffix));
    paths.sort();
    paths
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_bound_the_log_and_a_restart_builds_on_them() {
    for backend in [Backend::Memory, sled()] {
        let dir = tempfile::tempdir().unwrap();
        let options = || Options {
            snapshot_distance: 300 << 10,
            segment_size: Some(128 << 10),
            ..options(&dir, backend.clone())
        };
        let node = Node::start(options()).await.unwrap();
        for round in 0..100 {
            let puts = (0..20).map(|n| node.txn(put_n((20 * round + n) % 100)));
            futures::future::try_join_all(puts).await.unwrap();
        }
        let wal = dir.path().join("wal");
        eventually("old segments go", || files(&wal, ".wal").len() < 10).await;
        eventually("one snapshot stays", || files(&dir.path().join("snapshot"), ".snap").len() == 1).await;
        node.shutdown().await;
        let node = Node::start(Options { boot_id: Some("another".to_owned()), ..options() }).await.unwrap();
        assert_eq!(node.store().revision(), 2000);
        assert_eq!(value(&node, "/n/99").unwrap().len(), 1000);
        assert_eq!(node.txn(put_n(0)).await.unwrap().revision, 2001);
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_purged_to_its_end_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    node.txn(put("/a", "1")).await.unwrap();
    node.trigger_snapshot().await.unwrap();
    eventually("a snapshot", || !files(&dir.path().join("snapshot"), ".snap").is_empty()).await;
    node.shutdown().await;
    for n in 0..3 {
        let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
        assert_eq!(node.store().revision(), 1 + n);
        node.txn(put("/b", "1")).await.unwrap();
        node.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_stops_the_node_and_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let broken = Arc::new(AtomicBool::new(false));
    let sync: SyncFile = {
        let broken = broken.clone();
        Arc::new(move |file| match broken.load(Ordering::SeqCst) {
            true => Err(std::io::Error::from_raw_os_error(5)),
            false => file.sync_data(),
        })
    };
    let node = Node::start_on(options(&dir, sled()), sync).await.unwrap();
    node.txn(put("/a", "1")).await.unwrap();
    broken.store(true, Ordering::SeqCst);
    node.txn(put("/a", "2")).await.unwrap_err();
    broken.store(false, Ordering::SeqCst);
    let reason = tokio::time::timeout(Duration::from_secs(10), node.stopped()).await.unwrap();
    assert!(reason.contains("this member stopped"), "{reason}");
    let error = node.txn(put("/a", "3")).await.unwrap_err();
    assert!(matches!(error, ProposeError::Stopped { .. }), "{error}");
    eventually("leadership is given up", || !node.is_leader()).await;
    assert!(node.read_barrier().await.is_err());
    node.shutdown().await;
    let node = Node::start(options(&dir, sled())).await.unwrap();
    // The write without an answer may be there or not; the later one was refused.
    assert!(["1", "2"].contains(&value(&node, "/a").unwrap().as_str()));
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_refuses_to_start_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    for n in 0..20 {
        node.txn(put_n(n)).await.unwrap();
    }
    node.shutdown().await;
    let segment = &files(&dir.path().join("wal"), ".wal")[0];
    let mut bytes = std::fs::read(segment).unwrap();
    bytes[10_000] ^= 1;
    std::fs::write(segment, bytes).unwrap();
    let error = Node::start(options(&dir, Backend::Memory)).await.unwrap_err();
    let StartError::Wal(error) = error else { panic!("{error}") };
    let text = error.to_string();
    assert!(text.contains(segment.to_str().unwrap()) && text.contains("re-seed this server"), "{text}");
}

/// What became of the state directory after `damage` was done to a cleanly stopped or (with a copy) killed node.
async fn view_after(clean: bool, damage: impl Fn(&Path)) -> (String, u64) {
    let dir = tempfile::tempdir().unwrap();
    let boot = |id: &str| Options { boot_id: Some(id.to_owned()), ..options(&dir, sled()) };
    let node = Node::start(boot("first")).await.unwrap();
    for n in 0..30 {
        node.txn(put_n(n)).await.unwrap();
    }
    node.shutdown().await;
    let marker = dir.path().join("view.json");
    if !clean {
        let text = std::fs::read_to_string(&marker).unwrap().replace("\"clean\":true", "\"clean\":false");
        std::fs::write(&marker, text).unwrap();
    }
    damage(dir.path());
    let node = Node::start(boot(if clean { "second" } else { "first" })).await.unwrap();
    let revision = node.store().revision();
    assert_eq!(value(&node, "/n/29").unwrap().len(), 1000);
    node.shutdown().await;
    let marker: serde_json::Value = serde_json::from_slice(&std::fs::read(&marker).unwrap()).unwrap();
    (marker["directory"].as_str().unwrap().to_owned(), revision)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_directory_is_kept_or_rebuilt() {
    assert_eq!(view_after(true, |_| ()).await, ("view-1".to_owned(), 30), "a clean stop, then a reboot");
    assert_eq!(view_after(false, |_| ()).await, ("view-1".to_owned(), 30), "killed, same boot");
    let reboot = |dir: &Path| {
        let marker = dir.join("view.json");
        let text = std::fs::read_to_string(&marker).unwrap().replace("first", "before");
        std::fs::write(&marker, text).unwrap();
    };
    assert_eq!(view_after(false, reboot).await, ("view-2".to_owned(), 30), "killed, then another boot");
    let unmarked = |dir: &Path| std::fs::remove_file(dir.join("view.json")).unwrap();
    assert_eq!(view_after(true, unmarked).await, ("view-2".to_owned(), 30), "no marker");
    let damaged = |dir: &Path| {
        for name in ["conf", "db"] {
            let path = dir.join("view-1").join(name);
            let length = std::fs::metadata(&path).unwrap().len() as usize;
            std::fs::write(path, vec![0xa5; length]).unwrap();
        }
    };
    assert_eq!(view_after(true, damaged).await, ("view-2".to_owned(), 30), "sled can't open it");
    let foreign = |dir: &Path| std::fs::remove_dir_all(dir.join("view-1")).unwrap();
    assert_eq!(view_after(true, foreign).await.1, 30, "the directory is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn history_is_compacted_and_an_idle_node_proposes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let interval = Duration::from_millis(150);
    let node = Node::start(Options { compaction_interval: interval, ..options(&dir, Backend::Memory) }).await.unwrap();
    for n in 0..10 {
        node.txn(put_n(n)).await.unwrap();
    }
    eventually("compaction", || node.store().compacted_revision() == 10).await;
    let before = node.log_end().await;
    tokio::time::sleep(5 * interval).await;
    assert_eq!(node.log_end().await, before);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_share_entries_and_each_gets_its_own_answer() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    let clients = (0..200).map(|n| {
        let node = node.clone();
        tokio::spawn(async move {
            let response = node.txn(put_n(n)).await.unwrap();
            let kv = node.store().get(format!("/n/{n}").as_bytes()).unwrap().unwrap();
            assert_eq!(kv.mod_revision, response.revision);
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.unwrap();
    }
    assert_eq!(node.store().revision(), 200);
    assert!(node.log_end().await < 100, "{}", node.log_end().await);
    node.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_too_long_is_refused_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    let error = node.txn(put("/a", &"x".repeat(9 << 20))).await.unwrap_err();
    assert!(matches!(error, ProposeError::TooLarge { .. }), "{error}");
    node.txn(put("/a", &"x".repeat(3 << 20))).await.unwrap();
    let error = node.txn(put("", "x")).await.unwrap_err();
    assert!(matches!(error, ProposeError::Refused(_)), "{error}");
    node.shutdown().await;
    let node = Node::start(options(&dir, Backend::Memory)).await.unwrap();
    assert_eq!(value(&node, "/a").unwrap().len(), 3 << 20);
    node.shutdown().await;
}
