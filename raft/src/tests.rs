//! openraft's own suite on our log and state machine, and stories about a node.

use std::sync::Arc;
use std::time::Duration;

use coracle_store::{Command, Op, Response, Store, Txn};
use openraft::testing::log::{StoreBuilder, Suite};
use tempfile::TempDir;

use crate::entry::TypeConfig;
use crate::log::{Growth, Log};
use crate::machine::{ApplyThread, Snapshots, StateMachine};
use crate::view::Backend;
use crate::wal::{Wal, WalOptions};
use crate::{Node, Options, StartError};

struct Builder;

impl StoreBuilder<TypeConfig, Log, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, Log, StateMachine), openraft::StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().unwrap();
        let wal = Wal::open(&dir.path().join("wal"), WalOptions::new(1 << 20)).unwrap();
        let growth = Arc::new(Growth::default());
        let (_store, writer) = Store::open(coracle_store::Options::memory()).unwrap();
        let snapshot_dir = dir.path().join("snapshot");
        let current = crate::snapshot::newest(&snapshot_dir).unwrap();
        let snapshots = Arc::new(Snapshots::new(snapshot_dir, current, growth.clone()));
        let apply = Arc::new(ApplyThread::start(writer, || ()).unwrap());
        let machine = StateMachine::new(apply, snapshots, Default::default());
        Ok((dir, Log::new(wal, growth), machine))
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
