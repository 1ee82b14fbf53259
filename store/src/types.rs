//! What goes into the store and what comes out: keys, transactions, commands, events.

use std::any::Any;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

/// One key at one revision, as etcd's `mvccpb.KeyValue`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    /// The key; never holds a zero byte.
    pub key: Bytes,
    /// The value; empty in the event of a deletion.
    pub value: Bytes,
    /// Revision at which the key was last created.
    pub create_revision: u64,
    /// Revision of this value.
    pub mod_revision: u64,
    /// Number of writes since creation; 1 for a new key, 0 for a deleted one.
    pub version: u64,
    /// The lease the key is bound to; 0 for none.
    pub lease: u64,
}

/// A condition of a [`Txn`]. A key that does not exist has revisions, version and lease 0 (etcd's rule).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compare {
    /// The revision of the last write is `equals`; 0 means that the key must not exist.
    ModRevision { key: Bytes, equals: u64 },
    /// The revision of the creation is `equals`.
    CreateRevision { key: Bytes, equals: u64 },
    /// The number of writes since creation is `equals`.
    Version { key: Bytes, equals: u64 },
    /// The key exists and has this value.
    Value { key: Bytes, equals: Bytes },
    /// The key is bound to this lease.
    Lease { key: Bytes, equals: u64 },
}

/// One operation of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes the key. `lease` 0 binds it to none; any other must have been granted.
    Put { key: Bytes, value: Bytes, lease: u64 },
    /// Deletes the key if it is there.
    Delete { key: Bytes },
    /// Deletes every key in `start..end`.
    DeleteRange { start: Bytes, end: Bytes },
    /// Reads the key as the transaction sees it.
    Get { key: Bytes },
}

/// Compare, then do one of two lists of operations, atomically and at one revision.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    /// All must hold for `then` to run.
    pub compare: Vec<Compare>,
    /// Runs when every comparison holds. A key may be written at most once.
    pub then: Vec<Op>,
    /// Runs otherwise.
    pub or_else: Vec<Op>,
}

/// Answer of one [`Op`], in the same place of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResponse {
    /// What the key held before.
    Put { prev: Option<KeyValue> },
    /// What was deleted, in key order.
    Delete { prev: Vec<KeyValue> },
    /// What the key holds.
    Get { kv: Option<KeyValue> },
}

/// Answer of a [`Txn`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TxnResponse {
    /// The revision of the store after the transaction; its own if it wrote anything.
    pub revision: u64,
    /// Whether the comparisons held.
    pub succeeded: bool,
    /// One answer per operation that ran.
    pub responses: Vec<OpResponse>,
}

/// A change to the state, as the consensus log carries it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A transaction.
    Txn(Txn),
    /// Forgets all history before `revision` (which stays readable).
    Compact { revision: u64 },
    /// Makes a lease; granting an existing one renews it with the new duration.
    LeaseGrant { id: u64, ttl_seconds: u64 },
    /// Starts the lease's duration anew.
    LeaseKeepAlive { id: u64 },
    /// Ends the lease and deletes the keys bound to it, in one revision.
    LeaseRevoke { id: u64 },
    /// Moves the revision forward by `by` and compacts up to it, so that after a restore no watcher sees time run
    /// backwards (etcd's `--bump-revision --mark-compacted`).
    BumpRevision { by: u64 },
}

/// Answer of a [`Command`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Response {
    /// Of a transaction.
    Txn(TxnResponse),
    /// Of everything else that was done; holds the revision afterwards.
    Done { revision: u64 },
    /// The command was refused and changed nothing.
    Refused(Refusal),
}

/// Why a command was refused. Deterministic: every member refuses alike.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A key is empty or holds a zero byte.
    #[error("a key must not be empty or hold a zero byte")]
    InvalidKey,
    /// A transaction writes the same key twice.
    #[error("duplicate key given in txn request")]
    DuplicateKey,
    /// The lease does not exist.
    #[error("requested lease not found")]
    LeaseNotFound,
    /// The revision to compact to has been compacted already.
    #[error("required revision has been compacted")]
    Compacted,
    /// The revision lies ahead of the store.
    #[error("required revision is a future revision")]
    FutureRevision,
}

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// Created or overwritten.
    Put,
    /// Deleted.
    Delete,
}

/// A change of one key. Shared between all watchers that see it.
#[derive(Debug)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The key afterwards. For a deletion: key and `mod_revision` of the deletion, no value.
    pub kv: KeyValue,
    /// The key before, if it existed.
    pub prev: Option<KeyValue>,
    cache: OnceLock<Arc<dyn Any + Send + Sync>>,
}

impl Event {
    pub(crate) fn new(kind: EventKind, kv: KeyValue, prev: Option<KeyValue>) -> Self {
        Event { kind, kv, prev, cache: OnceLock::new() }
    }

    /// A place for what a reader derives from the event (an encoding, extracted labels), so that it is derived once for
    /// all watchers. The first caller's type wins; another type gets `None`.
    pub fn derived<T: Any + Send + Sync>(&self, make: impl FnOnce(&Event) -> T) -> Option<Arc<T>> {
        let any = self.cache.get_or_init(|| Arc::new(make(self)));
        any.clone().downcast::<T>().ok()
    }

    /// Memory that the event holds, in bytes, roughly.
    pub(crate) fn weight(&self) -> usize {
        let prev = self.prev.as_ref().map_or(0, |p| p.value.len());
        192 + self.kv.key.len() + self.kv.value.len() + prev
    }
}

/// What to read.
#[derive(Debug, Clone, Default)]
pub struct RangeRequest {
    /// First key.
    pub start: Bytes,
    /// End of the range, exclusive; see [`prefix_end`].
    pub end: Bytes,
    /// As of which revision; `None` for the newest.
    pub revision: Option<u64>,
    /// At most so many keys; 0 for all.
    pub limit: usize,
    /// Leave the values out.
    pub keys_only: bool,
    /// Count all keys of the range, also beyond `limit`.
    pub count: bool,
}

/// What was read.
#[derive(Debug, Clone)]
pub struct RangeResponse {
    /// The revision the answer holds for.
    pub revision: u64,
    /// In key order.
    pub kvs: Vec<KeyValue>,
    /// Whether keys follow beyond the limit.
    pub more: bool,
    /// All keys of the range if `count` was asked for, else the number of `kvs`.
    pub count: u64,
}

/// The end of the range that holds exactly the keys with this prefix; empty (no end) if there is none.
pub fn prefix_end(prefix: &[u8]) -> Bytes {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end.into();
        }
    }
    Bytes::new()
}

/// Whether `key` lies in `start..end`, where an empty `end` means no end.
pub(crate) fn in_range(key: &[u8], start: &[u8], end: &[u8]) -> bool {
    key >= start && (end.is_empty() || key < end)
}
