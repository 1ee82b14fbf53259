//! One suite, run against both engines.

use std::time::Duration;

use bytes::Bytes;
use rand::Rng;

use crate::types::Refusal;
use crate::*;

struct Fixture {
    store: Store,
    writer: Writer,
    _dir: Option<tempfile::TempDir>,
}

impl Fixture {
    fn all() -> Vec<Fixture> {
        let dir = tempfile::tempdir().unwrap();
        let (store, writer) = Store::open(Options::memory()).unwrap();
        let memory = Fixture { store, writer, _dir: None };
        let (store, writer) = Store::open(Options::sled(dir.path())).unwrap();
        vec![memory, Fixture { store, writer, _dir: Some(dir) }]
    }

    fn apply(&mut self, command: Command) -> Response {
        self.writer.apply(vec![command], Bytes::from_static(b"meta")).unwrap().remove(0)
    }

    fn txn(&mut self, compare: Vec<Compare>, then: Vec<Op>) -> TxnResponse {
        match self.apply(Command::Txn(Txn { compare, then, or_else: vec![] })) {
            Response::Txn(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn put(&mut self, key: &'static str, value: &'static str) -> u64 {
        self.txn(vec![], vec![put(key, value)]).revision
    }

    fn delete(&mut self, key: &'static str) -> u64 {
        self.txn(vec![], vec![Op::Delete { key: key.into() }]).revision
    }

    fn keys(&self, revision: Option<u64>) -> Vec<(String, String)> {
        let range = self.store.range(&RangeRequest { revision, ..RangeRequest::default() }).unwrap();
        let text = |b: &Bytes| String::from_utf8(b.to_vec()).unwrap();
        range.kvs.iter().map(|kv| (text(&kv.key), text(&kv.value))).collect()
    }

    fn watch(&self, from: Option<u64>) -> Result<Watcher, StoreError> {
        self.store.watch(WatchRequest { start: "a".into(), end: "c".into(), from_revision: from })
    }
}

fn put(key: &'static str, value: &'static str) -> Op {
    Op::Put { key: key.into(), value: value.into(), lease: 0 }
}

fn pairs(kvs: &[(&str, &str)]) -> Vec<(String, String)> {
    kvs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect()
}

#[test]
fn every_transaction_is_its_own_revision_and_old_ones_stay_readable() {
    for mut f in Fixture::all() {
        assert_eq!((f.put("a", "1"), f.put("b", "1"), f.put("a", "2"), f.delete("b")), (1, 2, 3, 4));
        assert_eq!(f.keys(None), pairs(&[("a", "2")]));
        assert_eq!(f.keys(Some(3)), pairs(&[("a", "2"), ("b", "1")]));
        assert_eq!(f.keys(Some(1)), pairs(&[("a", "1")]));
        let kv = f.store.get(b"a").unwrap().unwrap();
        assert_eq!((kv.create_revision, kv.mod_revision, kv.version), (1, 3, 2));
        assert!(matches!(
            f.store.range(&RangeRequest { revision: Some(9), ..Default::default() }),
            Err(StoreError::FutureRevision { revision: 4 })
        ));
    }
}

#[test]
fn a_transaction_compares_and_a_losing_one_changes_nothing() {
    for mut f in Fixture::all() {
        let absent = || vec![Compare::ModRevision { key: "a".into(), equals: 0 }];
        assert!(f.txn(absent(), vec![put("a", "1")]).succeeded);
        let lost = f.txn(absent(), vec![put("a", "2")]);
        assert_eq!((lost.succeeded, lost.revision), (false, 1));
        assert_eq!(f.keys(None), pairs(&[("a", "1")]));
        // Deleting what is not there takes no revision.
        assert_eq!(f.delete("x"), 1);
    }
}

#[test]
fn commands_of_one_batch_see_each_other() {
    for mut f in Fixture::all() {
        let txn = |compare, then| Command::Txn(Txn { compare, then, or_else: vec![Op::Get { key: "a".into() }] });
        let absent = vec![Compare::ModRevision { key: "a".into(), equals: 0 }];
        let answers = f
            .writer
            .apply(
                vec![
                    txn(absent.clone(), vec![put("a", "1"), put("b", "1")]),
                    txn(absent, vec![put("a", "2")]),
                    txn(vec![], vec![Op::DeleteRange { start: "a".into(), end: "b".into() }]),
                ],
                Bytes::new(),
            )
            .unwrap();
        let Response::Txn(second) = &answers[1] else { panic!() };
        assert!(matches!(&second.responses[0], OpResponse::Get { kv: Some(kv) } if kv.value == "1"));
        let Response::Txn(third) = &answers[2] else { panic!() };
        assert!(matches!(&third.responses[0], OpResponse::Delete { prev } if prev.len() == 1));
        assert_eq!(f.keys(None), pairs(&[("b", "1")]));
    }
}

#[test]
fn bad_transactions_are_refused_whole() {
    for mut f in Fixture::all() {
        let mut refused = |then| f.apply(Command::Txn(Txn { then, ..Txn::default() }));
        assert_eq!(refused(vec![put("a", "1"), put("a", "2")]), Response::Refused(Refusal::DuplicateKey));
        assert_eq!(refused(vec![put("a", "1"), put("b\0", "2")]), Response::Refused(Refusal::InvalidKey));
        let bound = Op::Put { key: "a".into(), value: "1".into(), lease: 7 };
        assert_eq!(refused(vec![put("b", "1"), bound]), Response::Refused(Refusal::LeaseNotFound));
        assert_eq!(f.store.revision(), 0);
    }
}

#[test]
fn keys_that_are_prefixes_of_each_other_do_not_mix() {
    for mut f in Fixture::all() {
        f.put("a", "1");
        f.put("a/b", "2");
        f.put("ab", "3");
        assert_eq!(f.store.get(b"a").unwrap().unwrap().value, "1");
        f.delete("a");
        assert_eq!(f.keys(None), pairs(&[("a/b", "2"), ("ab", "3")]));
    }
}

#[test]
fn a_range_is_limited_and_counted() {
    for mut f in Fixture::all() {
        for key in ["a", "b", "c", "d"] {
            f.put(key, "1");
        }
        let range = |limit, count| {
            let request = RangeRequest { start: "b".into(), limit, count, ..RangeRequest::default() };
            let answer = f.store.range(&request).unwrap();
            (answer.kvs.len(), answer.more, answer.count)
        };
        assert_eq!(range(2, true), (2, true, 3));
        assert_eq!(range(2, false), (2, true, 2));
        assert_eq!(range(3, true), (3, false, 3));
        assert_eq!(range(0, false), (3, false, 3));
    }
}

#[test]
fn compaction_forgets_history_but_nothing_that_lives() {
    for mut f in Fixture::all() {
        f.put("a", "1");
        f.put("b", "1");
        f.put("a", "2");
        f.delete("b");
        f.put("a", "3");
        assert!(matches!(f.apply(Command::Compact { revision: 9 }), Response::Refused(Refusal::FutureRevision)));
        f.apply(Command::Compact { revision: 4 });
        while f.writer.compact_step(1).unwrap() {}
        assert!(matches!(
            f.store.range(&RangeRequest { revision: Some(3), ..Default::default() }),
            Err(StoreError::Compacted { compacted: 4 })
        ));
        assert_eq!(f.keys(Some(4)), pairs(&[("a", "2")]));
        assert_eq!(f.keys(None), pairs(&[("a", "3")]));
        // a@3, a@5, the event of revision 5 and three m/ rows are all that is left.
        let left = f.store.shared.engine.scan(Bytes::new(), Bytes::from_static(b"z")).count();
        assert_eq!(left, 6);
        assert!(matches!(f.apply(Command::Compact { revision: 4 }), Response::Refused(Refusal::Compacted)));
    }
}

#[test]
fn a_pinned_snapshot_survives_compaction_and_restores_elsewhere() {
    for mut f in Fixture::all() {
        f.apply(Command::LeaseGrant { id: 5, ttl_seconds: 60 });
        f.txn(vec![], vec![Op::Put { key: "l".into(), value: "x".into(), lease: 5 }]);
        f.put("a", "1");
        let pinned = f.writer.pin();
        f.put("a", "2");
        f.delete("l");
        f.apply(Command::Compact { revision: 4 });
        f.writer.compact_step(100).unwrap();
        let (store, mut writer) = Store::open(Options::memory()).unwrap();
        writer.restore::<StoreError>(pinned.meta().clone(), pinned.rows()).unwrap();
        assert_eq!((store.revision(), store.compacted_revision()), (2, 2));
        assert_eq!(store.get(b"a").unwrap().unwrap().value, "1");
        assert_eq!(writer.meta(), "meta");
        writer.apply(vec![Command::LeaseRevoke { id: 5 }], Bytes::new()).unwrap();
        assert_eq!(store.get(b"l").unwrap(), None);
        drop(pinned);
        assert!(!f.writer.compact_step(100).unwrap());
        assert_eq!(f.keys(None), pairs(&[("a", "2")]));
    }
}

#[test]
fn a_lease_takes_its_keys_with_it() {
    for mut f in Fixture::all() {
        f.apply(Command::LeaseGrant { id: 1, ttl_seconds: 0 });
        f.apply(Command::LeaseGrant { id: 2, ttl_seconds: 3600 });
        let bind = |key: &'static str, lease| Op::Put { key: key.into(), value: "v".into(), lease };
        f.txn(vec![], vec![bind("a", 1), bind("b", 1), bind("c", 2)]);
        f.txn(vec![], vec![bind("b", 0)]);
        assert_eq!(f.store.expired_leases(std::time::Instant::now()), vec![1]);
        f.apply(Command::LeaseRevoke { id: 1 });
        assert_eq!(f.keys(None), pairs(&[("b", "v"), ("c", "v")]));
        assert!(matches!(f.apply(Command::LeaseKeepAlive { id: 1 }), Response::Refused(Refusal::LeaseNotFound)));
    }
}

#[tokio::test]
async fn a_watch_has_no_gap_and_no_repeat_wherever_it_starts() {
    for mut f in Fixture::all() {
        f.put("a", "1");
        f.put("z", "1");
        f.put("b", "1");
        f.delete("a");
        let mut from_start = f.watch(Some(1)).unwrap();
        let mut from_now = f.watch(None).unwrap();
        f.put("a", "2");
        let seen = |batch: WatchBatch| batch.events.iter().map(|e| (e.kind, e.kv.mod_revision)).collect::<Vec<_>>();
        use EventKind::*;
        assert_eq!(seen(from_start.next().await.unwrap()), [(Put, 1), (Put, 3), (Delete, 4), (Put, 5)]);
        let batch = from_now.next().await.unwrap();
        assert!(batch.events[0].prev.is_none());
        assert_eq!(seen(batch), [(Put, 5)]);
        f.put("z", "2");
        assert!(tokio::time::timeout(Duration::from_millis(20), from_now.next()).await.is_err());
        assert_eq!(from_now.progress(), Some(6));
    }
}

#[tokio::test]
async fn a_watcher_that_falls_behind_reads_the_log_and_one_behind_compaction_is_cut_off() {
    let options = Options { watch_buffer: 1000, ..Options::memory() };
    let (store, writer) = Store::open(options).unwrap();
    let mut f = Fixture { store, writer, _dir: None };
    let mut slow = f.watch(None).unwrap();
    let mut lost = f.watch(None).unwrap();
    for _ in 0..100 {
        f.put("a", "0123456789");
    }
    let mut seen = Vec::new();
    while seen.len() < 100 {
        seen.extend(slow.next().await.unwrap().events.iter().map(|e| e.kv.mod_revision));
    }
    assert_eq!(seen, (1..=100).collect::<Vec<_>>());
    f.apply(Command::Compact { revision: 50 });
    assert!(matches!(lost.next().await, Err(WatchError::Compacted { compacted: 50 })));
    assert!(matches!(f.watch(Some(50)), Err(StoreError::Compacted { .. })));
    assert!(f.watch(Some(51)).is_ok());
}

#[tokio::test]
async fn after_a_bumped_revision_every_watch_ends() {
    for mut f in Fixture::all() {
        f.put("a", "1");
        let mut watcher = f.watch(None).unwrap();
        f.apply(Command::BumpRevision { by: 1000 });
        assert!(matches!(watcher.next().await, Err(WatchError::Compacted { compacted: 1001 })));
        assert_eq!(f.put("a", "2"), 1002);
    }
}

#[test]
fn sled_comes_back_as_it_was_left() {
    let dir = tempfile::tempdir().unwrap();
    {
        let (store, writer) = Store::open(Options::sled(dir.path())).unwrap();
        let mut f = Fixture { store, writer, _dir: None };
        f.put("a", "1");
        f.apply(Command::LeaseGrant { id: 3, ttl_seconds: 0 });
        f.writer.flush().unwrap();
    }
    let (store, writer) = Store::open(Options::sled(dir.path())).unwrap();
    assert_eq!((store.revision(), store.get(b"a").unwrap().unwrap().value), (1, Bytes::from_static(b"1")));
    assert_eq!(store.expired_leases(std::time::Instant::now()), vec![3]);
    assert_eq!(writer.meta(), "meta");
}

#[test]
fn commands_survive_encoding_and_damage_is_an_error() {
    let txn = Txn {
        compare: vec![
            Compare::ModRevision { key: "a".into(), equals: 3 },
            Compare::Value { key: "b".into(), equals: "v".into() },
            Compare::Lease { key: "c".into(), equals: 1 },
        ],
        then: vec![put("a", "1"), Op::DeleteRange { start: "a".into(), end: "b".into() }],
        or_else: vec![Op::Get { key: "a".into() }, Op::Delete { key: "x".into() }],
    };
    let all = [
        Command::Txn(txn),
        Command::Compact { revision: 7 },
        Command::LeaseGrant { id: 1, ttl_seconds: 2 },
        Command::LeaseKeepAlive { id: 1 },
        Command::LeaseRevoke { id: 1 },
        Command::BumpRevision { by: 1 },
    ];
    let mut rng = rand::rng();
    for command in all {
        let mut bytes = Vec::new();
        command.encode(&mut bytes);
        assert_eq!(Command::decode(bytes.clone().into()).unwrap(), command);
        for cut in 0..bytes.len() {
            assert!(Command::decode(Bytes::copy_from_slice(&bytes[..cut])).is_err());
        }
        for _ in 0..200 {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
            let _ = Command::decode(bytes.clone().into());
        }
    }
}
