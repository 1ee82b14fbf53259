//! An idle member leaves the disk alone.

use std::time::Duration;

use coracle_raft::{Node, Options};
use coracle_store::{Op, Txn};

use crate::disk::{self, Mounted};

/// Longer than the quiet time after a start and than the file system's own commit interval (5 s each).
const SETTLED: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_member_writes_nothing_and_a_small_write_costs_little() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.img");
    disk::make(&image, 96);
    let mounted = Mounted::new(&image, &dir.path().join("mnt"));
    let node = Node::start(Options::new(mounted.at.join("data"))).await.unwrap();
    let put = |n: u64| {
        let put = Op::Put { key: "/lease".into(), value: format!("{n:0600}").into(), lease: 0 };
        Txn { then: vec![put], ..Txn::default() }
    };
    node.txn(put(0)).await.unwrap();
    tokio::time::sleep(SETTLED).await;
    let before = mounted.written();
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(mounted.written(), before, "an idle member wrote");
    // As a node that renews its lease every ten seconds, quicker.
    const WRITES: u64 = 10;
    for n in 1..=WRITES {
        node.txn(put(n)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    tokio::time::sleep(SETTLED).await;
    let after = mounted.written();
    let (bytes, flushes) = ((after.0 - before.0) / WRITES, (after.1 - before.1) / WRITES);
    println!("a small write costs {bytes} bytes and {flushes} flushes on the device");
    assert!(bytes < 24 << 10 && flushes <= 3, "a small write costs {bytes} bytes and {flushes} flushes");
    node.shutdown().await;
    drop(mounted);
}
