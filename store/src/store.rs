//! The read handle: ranges at a revision, leases, pinned snapshots.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::engine::layered::Layered;
use crate::engine::memory::Memory;
use crate::engine::{Backend, Engine, EngineError};
use crate::rows;
use crate::types::{KeyValue, RangeRequest, RangeResponse};
use crate::watch::Hub;
use crate::writer::Writer;

/// How to open a store.
#[derive(Debug, Clone)]
pub struct Options {
    /// The engine underneath.
    pub backend: Backend,
    /// Bytes of recent events kept in memory for each watched range; older ones are read from the event log.
    pub watch_buffer: usize,
}

impl Options {
    /// Everything in memory.
    pub fn memory() -> Self {
        Options { backend: Backend::Memory, watch_buffer: 1 << 20 }
    }

    /// sled in `dir` with a page cache of 32 MiB.
    pub fn sled(dir: impl Into<std::path::PathBuf>) -> Self {
        Options { backend: Backend::Sled { dir: dir.into(), cache_capacity: 32 << 20 }, watch_buffer: 1 << 20 }
    }
}

/// A read, or the store itself, failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The revision asked for has been compacted; `compacted` is the oldest that can be read.
    #[error("required revision has been compacted")]
    Compacted { compacted: u64 },
    /// The revision asked for lies ahead; `revision` is the newest.
    #[error("required revision is a future revision")]
    FutureRevision { revision: u64 },
    /// A snapshot is taking the place of the state; nothing can be read for a moment.
    #[error("the state is being replaced by a snapshot of the leader's; try again")]
    Restoring,
    /// A row does not have the form that this program writes.
    #[error("the materialised state is damaged at row {row:?}")]
    Damaged { row: Bytes },
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

impl StoreError {
    pub(crate) fn damaged(row: &Bytes) -> Self {
        StoreError::Damaged { row: row.clone() }
    }
}

pub(crate) struct Lease {
    pub ttl_seconds: u64,
    pub deadline: Instant,
}

impl Lease {
    pub(crate) fn new(ttl_seconds: u64) -> Self {
        Lease { ttl_seconds, deadline: Instant::now() + Duration::from_secs(ttl_seconds) }
    }
}

pub(crate) struct Shared {
    pub engine: Box<dyn Engine>,
    /// The newest revision that readers may see; advanced after its rows are in the engine and its events in the rings.
    pub revision: AtomicU64,
    /// Revisions below this one are gone.
    pub compacted: AtomicU64,
    /// Odd while a snapshot takes the place of the state.
    pub generation: AtomicU64,
    pub hub: Hub,
    pub leases: Mutex<HashMap<u64, Lease>>,
    /// Revisions that snapshots are being read at, with the number of readers; rows they need are not removed.
    pub pins: Mutex<BTreeMap<u64, usize>>,
}

/// The read handle; cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
}

impl Store {
    /// Opens the engine and reads where it stands. There is exactly one [`Writer`] to a store.
    pub fn open(options: Options) -> Result<(Store, Writer), StoreError> {
        let engine: Box<dyn Engine> = match &options.backend {
            Backend::Memory => Box::new(Memory::default()),
            Backend::Sled { dir, cache_capacity } => Box::new(Layered::open(dir, *cache_capacity)?),
        };
        let revision = rows::number(engine.get(rows::REVISION)?);
        let compacted = rows::number(engine.get(rows::COMPACTED)?);
        let mut leases = HashMap::new();
        for row in engine.scan(Bytes::from_static(b"l/"), Bytes::from_static(b"l0")) {
            let (key, value) = row?;
            let id = key.get(2..).and_then(|id| id.try_into().ok()).map(u64::from_be_bytes);
            leases.insert(id.ok_or_else(|| StoreError::damaged(&key))?, Lease::new(rows::number(Some(value))));
        }
        let store = Store {
            shared: Arc::new(Shared {
                engine,
                revision: AtomicU64::new(revision),
                compacted: AtomicU64::new(compacted),
                generation: AtomicU64::new(0),
                hub: Hub::new(options.watch_buffer),
                leases: Mutex::new(leases),
                pins: Mutex::default(),
            }),
        };
        Ok((store.clone(), Writer::new(store)))
    }

    /// The newest revision that reads see; 0 before the first write.
    pub fn revision(&self) -> u64 {
        self.shared.revision.load(Ordering::Acquire)
    }

    /// The oldest revision that can be read.
    pub fn compacted_revision(&self) -> u64 {
        self.shared.compacted.load(Ordering::Acquire)
    }

    /// What the consensus layer stored with the last applied batch.
    pub fn meta(&self) -> Result<Option<Bytes>, StoreError> {
        Ok(self.shared.engine.get(rows::META)?)
    }

    /// Bytes that the engine occupies.
    pub fn size(&self) -> Result<u64, StoreError> {
        Ok(self.shared.engine.size()?)
    }

    /// The newest value of a key.
    pub fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, StoreError> {
        self.undisturbed(|| self.get_at(key, self.revision()))
    }

    /// Reads; fails when a snapshot takes the place of the state meanwhile.
    pub(crate) fn undisturbed<T, E: From<StoreError>>(&self, read: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation % 2 == 1 {
            return Err(StoreError::Restoring.into());
        }
        let result = read();
        // The reads above must not be seen to happen after this one.
        std::sync::atomic::fence(Ordering::Acquire);
        if self.shared.generation.load(Ordering::Relaxed) == generation {
            result
        } else {
            Err(StoreError::Restoring.into())
        }
    }

    pub(crate) fn get_at(&self, key: &[u8], revision: u64) -> Result<Option<KeyValue>, StoreError> {
        let prefix = rows::version_prefix(key);
        let mut end = prefix.clone();
        if let Some(last) = end.last_mut() {
            *last = 1;
        }
        let start = rows::version_row(key, revision);
        match self.shared.engine.newest(start, end.freeze())? {
            None => Ok(None),
            Some((row, value)) => {
                let (key, revision) = rows::split_version_row(&row).ok_or_else(|| StoreError::damaged(&row))?;
                rows::decode_value(key, revision, &value).ok_or_else(|| StoreError::damaged(&row))
            }
        }
    }

    /// Reads the keys of a range as of one revision.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        self.undisturbed(|| self.read_range(request))
    }

    fn read_range(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        let newest = self.revision();
        let revision = request.revision.unwrap_or(newest);
        if revision > newest {
            return Err(StoreError::FutureRevision { revision: newest });
        }
        self.check_not_compacted(revision)?;
        let limit = if request.limit == 0 { usize::MAX } else { request.limit };
        let mut answer = RangeResponse { revision, kvs: Vec::new(), more: false, count: 0 };
        for kv in self.live(&request.start, &request.end, revision) {
            let mut kv = kv?;
            if answer.kvs.len() == limit {
                answer.more = true;
                if request.count {
                    answer.count = self.count(&kv.key, &request.end, revision)?;
                }
                break;
            }
            if request.keys_only {
                kv.value = Bytes::new();
            }
            answer.kvs.push(kv);
        }
        answer.count += answer.kvs.len() as u64;
        // A compaction that passed the revision meanwhile may have taken rows away.
        self.check_not_compacted(revision)?;
        Ok(answer)
    }

    /// How many keys exist in a range at a revision.
    fn count(&self, start: &[u8], end: &[u8], revision: u64) -> Result<u64, StoreError> {
        let (from, to) = rows::version_bounds(start, end);
        let (mut done, mut count) = (Bytes::new(), 0);
        for row in self.shared.engine.marks(from, to) {
            let (row, mark) = row?;
            let (key, at) = rows::split_version_row(&row).ok_or_else(|| StoreError::damaged(&row))?;
            if at > revision || key == done {
                continue;
            }
            done = key;
            count += u64::from(!rows::is_tombstone(&mark));
        }
        Ok(count)
    }

    fn check_not_compacted(&self, revision: u64) -> Result<(), StoreError> {
        let compacted = self.compacted_revision();
        if revision < compacted { Err(StoreError::Compacted { compacted }) } else { Ok(()) }
    }

    /// The keys that exist in a range at a revision, in order. Does not check for compaction.
    pub(crate) fn live<'a>(
        &'a self,
        start: &[u8],
        end: &[u8],
        revision: u64,
    ) -> impl Iterator<Item = Result<KeyValue, StoreError>> + 'a {
        let (from, to) = rows::version_bounds(start, end);
        let mut done: Bytes = Bytes::new();
        self.shared.engine.scan(from, to).filter_map(move |row| {
            let (row, value) = match row {
                Ok(row) => row,
                Err(e) => return Some(Err(e.into())),
            };
            let Some((key, at)) = rows::split_version_row(&row) else { return Some(Err(StoreError::damaged(&row))) };
            if at > revision || key == done {
                return None;
            }
            done = key.clone();
            match rows::decode_value(key, at, &value) {
                None => Some(Err(StoreError::damaged(&row))),
                Some(kv) => kv.map(Ok),
            }
        })
    }

    /// Leases whose time is up. Only a leader acts on them, by [`crate::Command::LeaseRevoke`]; after a restart every
    /// lease has its full duration again, as in etcd.
    pub fn expired_leases(&self, now: Instant) -> Vec<u64> {
        let leases = self.shared.leases.lock();
        leases.iter().filter(|(_, lease)| lease.deadline <= now).map(|(id, _)| *id).collect()
    }

    /// When the next lease runs out.
    pub fn next_lease_deadline(&self) -> Option<Instant> {
        self.shared.leases.lock().values().map(|lease| lease.deadline).min()
    }

    /// Gives every lease its full duration again: a new leader has not seen the renewals of the old one.
    pub fn renew_leases(&self) {
        for lease in self.shared.leases.lock().values_mut() {
            *lease = Lease::new(lease.ttl_seconds);
        }
    }
}

/// What a snapshot must carry beside the rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotMeta {
    /// The revision of the rows.
    pub revision: u64,
    /// Leases and their durations in seconds.
    pub leases: Vec<(u64, u64)>,
    /// The consensus layer's own record.
    pub meta: Bytes,
}

/// The state at one revision, kept readable until this is dropped.
pub struct Pinned {
    store: Store,
    meta: SnapshotMeta,
    generation: u64,
}

impl Pinned {
    pub(crate) fn new(store: Store, meta: SnapshotMeta) -> Self {
        *store.shared.pins.lock().entry(meta.revision).or_default() += 1;
        let generation = store.shared.generation.load(Ordering::Acquire);
        Pinned { store, meta, generation }
    }

    /// What goes with the rows.
    pub fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    /// Every key that exists at the revision, in order; an error if a snapshot took the place of the state meanwhile.
    pub fn rows(&self) -> impl Iterator<Item = Result<KeyValue, StoreError>> + '_ {
        let replaced = || self.store.shared.generation.load(Ordering::Acquire) != self.generation;
        let end = std::iter::once_with(move || replaced().then_some(Err(StoreError::Restoring))).flatten();
        self.store.live(b"", b"", self.meta.revision).chain(end)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let mut pins = self.store.shared.pins.lock();
        if let Some(n) = pins.get_mut(&self.meta.revision) {
            *n -= 1;
            if *n == 0 {
                pins.remove(&self.meta.revision);
            }
        }
    }
}
