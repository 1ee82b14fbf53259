//! Watches. Each watched range has one ring of recent events, bounded in bytes and shared by all its watchers; a watcher
//! that starts earlier, or falls behind the ring, reads the event log. Nobody waits for a watcher: one that falls behind
//! the compaction is told so.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::rows;
use crate::store::{Store, StoreError};
use crate::types::{Event, EventKind, KeyValue, in_range};

/// Events handed out at once.
const BATCH: usize = 512;

/// What to watch.
#[derive(Debug, Clone)]
pub struct WatchRequest {
    /// First key.
    pub start: Bytes,
    /// End of the range, exclusive.
    pub end: Bytes,
    /// The first revision wanted; `None` for everything after now.
    pub from_revision: Option<u64>,
}

/// Events in order of their revisions; a revision is never split over two batches.
#[derive(Debug)]
pub struct WatchBatch {
    /// Shared with other watchers.
    pub events: Vec<Arc<Event>>,
    /// Everything up to this revision has been delivered.
    pub revision: u64,
}

/// The watch has ended.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// Events that were not delivered yet are gone.
    #[error("required revision has been compacted")]
    Compacted { compacted: u64 },
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
    /// The event log could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Default)]
struct Ring {
    events: VecDeque<Arc<Event>>,
    bytes: usize,
    /// Every event of the range with at least this revision is in `events`.
    complete_from: u64,
}

struct Group {
    start: Bytes,
    end: Bytes,
    ring: Mutex<Ring>,
    /// Holds the newest revision of the ring; a change wakes the watchers.
    wake: watch::Sender<u64>,
    watchers: AtomicUsize,
}

/// All watched ranges.
pub(crate) struct Hub {
    groups: RwLock<Vec<Arc<Group>>>,
    ring_bytes: usize,
}

impl Hub {
    pub(crate) fn new(ring_bytes: usize) -> Self {
        Hub { groups: RwLock::default(), ring_bytes }
    }

    /// Puts events in the rings, then lets `advance` show the new revision, then wakes. A new group cannot come in between.
    pub(crate) fn publish(&self, events: &[Arc<Event>], advance: impl FnOnce()) {
        let groups = self.groups.read();
        let mut woken = Vec::new();
        for group in groups.iter() {
            let mut newest = None;
            let mut ring = None;
            for event in events.iter().filter(|e| in_range(&e.kv.key, &group.start, &group.end)) {
                ring.get_or_insert_with(|| group.ring.lock()).push(event.clone(), self.ring_bytes);
                newest = Some(event.kv.mod_revision);
            }
            drop(ring);
            if let Some(newest) = newest {
                woken.push((group, newest));
            }
        }
        advance();
        for (group, newest) in woken {
            group.wake.send_replace(newest);
        }
    }

    /// The history up to `revision` is gone: rings are emptied and every watcher that is not beyond it is cut off.
    pub(crate) fn restart(&self, revision: u64, advance: impl FnOnce()) {
        let groups = self.groups.write();
        for group in groups.iter() {
            *group.ring.lock() = Ring { complete_from: revision + 1, ..Ring::default() };
        }
        advance();
        for group in groups.iter() {
            group.wake.send_replace(revision);
        }
    }

    fn join(&self, store: &Store, start: &Bytes, end: &Bytes) -> Arc<Group> {
        let mut groups = self.groups.write();
        if let Some(group) = groups.iter().find(|g| g.start == start && g.end == end) {
            group.watchers.fetch_add(1, Ordering::Relaxed);
            return group.clone();
        }
        let revision = store.revision();
        let group = Arc::new(Group {
            start: start.clone(),
            end: end.clone(),
            ring: Mutex::new(Ring { complete_from: revision + 1, ..Ring::default() }),
            wake: watch::Sender::new(revision),
            watchers: AtomicUsize::new(1),
        });
        groups.push(group.clone());
        group
    }

    fn leave(&self, group: &Arc<Group>) {
        let mut groups = self.groups.write();
        if group.watchers.fetch_sub(1, Ordering::Relaxed) == 1 {
            groups.retain(|g| !Arc::ptr_eq(g, group));
        }
    }
}

impl Ring {
    fn push(&mut self, event: Arc<Event>, limit: usize) {
        self.bytes += event.weight();
        self.events.push_back(event);
        while self.bytes > limit && self.events.len() > 1 {
            let Some(old) = self.events.pop_front() else { break };
            self.bytes -= old.weight();
            // The rest of a revision that was cut in two is of no use to a watcher that needs all of it.
            self.complete_from = old.kv.mod_revision + 1;
        }
    }

    /// Events from `cursor` on, whole revisions only.
    fn after(&self, cursor: u64) -> Vec<Arc<Event>> {
        let first = self.events.partition_point(|e| e.kv.mod_revision < cursor);
        let mut out: Vec<Arc<Event>> = Vec::new();
        for event in self.events.iter().skip(first) {
            let last = out.last().map_or(0, |e| e.kv.mod_revision);
            if out.len() >= BATCH && event.kv.mod_revision != last {
                break;
            }
            out.push(event.clone());
        }
        out
    }
}

/// One watch. Dropping it ends it.
pub struct Watcher {
    store: Store,
    group: Arc<Group>,
    wake: watch::Receiver<u64>,
    /// The next revision to deliver.
    cursor: u64,
}

impl Store {
    /// Watches a range.
    pub fn watch(&self, request: WatchRequest) -> Result<Watcher, StoreError> {
        let group = self.shared.hub.join(self, &request.start, &request.end);
        let wake = group.wake.subscribe();
        let cursor = request.from_revision.unwrap_or_else(|| self.revision() + 1);
        // Made first: its drop leaves the group also when the revision is refused.
        let watcher = Watcher { store: self.clone(), group, wake, cursor };
        let compacted = self.compacted_revision();
        if cursor <= compacted { Err(StoreError::Compacted { compacted }) } else { Ok(watcher) }
    }
}

impl Watcher {
    /// The next events; waits until there are some. Cancel-safe.
    pub async fn next(&mut self) -> Result<WatchBatch, WatchError> {
        loop {
            self.wake.borrow_and_update();
            if let Some(batch) = self.try_next()? {
                return Ok(batch);
            }
            self.wake.changed().await.map_err(|_| WatchError::Closed)?;
        }
    }

    /// The next events if there are any now.
    pub fn try_next(&mut self) -> Result<Option<WatchBatch>, WatchError> {
        loop {
            // Read before the ring: events up to it are in the ring by now.
            let revision = self.store.revision();
            let (events, in_ring) = {
                let ring = self.group.ring.lock();
                if self.cursor >= ring.complete_from { (ring.after(self.cursor), true) } else { (Vec::new(), false) }
            };
            if let Some(last) = events.last() {
                let revision = last.kv.mod_revision;
                self.cursor = revision + 1;
                return Ok(Some(WatchBatch { events, revision }));
            }
            if in_ring {
                self.cursor = self.cursor.max(revision + 1);
                return Ok(None);
            }
            let store = self.store.clone();
            match store.undisturbed(|| self.replay(revision)) {
                Ok(Some(batch)) => return Ok(Some(batch)),
                Ok(None) => {}
                // Whatever was read, or not, the history up to the snapshot is gone.
                Err(WatchError::Store(StoreError::Restoring)) => {
                    return Err(WatchError::Compacted { compacted: self.store.compacted_revision().max(self.cursor) });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// How many watch the same range.
    pub fn crowd(&self) -> usize {
        self.group.watchers.load(Ordering::Relaxed)
    }

    /// The revision up to which everything has been delivered; what a bookmark may say. `None` while events wait.
    pub fn progress(&mut self) -> Option<u64> {
        let revision = self.store.revision();
        let ring = self.group.ring.lock();
        if self.cursor < ring.complete_from || ring.events.back().is_some_and(|e| e.kv.mod_revision >= self.cursor) {
            return None;
        }
        self.cursor = self.cursor.max(revision + 1);
        Some(self.cursor - 1)
    }

    /// Reads a stretch of the event log up to `newest`.
    fn replay(&mut self, newest: u64) -> Result<Option<WatchBatch>, WatchError> {
        let compacted = self.store.compacted_revision();
        if self.cursor <= compacted {
            return Err(WatchError::Compacted { compacted });
        }
        let mut events = Vec::new();
        let mut last = newest;
        let (start, end) = (rows::event_row(self.cursor, 0), rows::event_row(newest + 1, 0));
        let mut at = 0;
        for row in self.store.shared.engine.scan(start, end) {
            let (row, key) = row.map_err(StoreError::from)?;
            let revision = rows::event_revision(&row).ok_or_else(|| StoreError::damaged(&row))?;
            if events.len() >= BATCH && revision != at {
                last = at;
                break;
            }
            at = revision;
            if in_range(&key, &self.group.start, &self.group.end) {
                events.push(Arc::new(self.read_event(key, revision)?));
            }
        }
        // A compaction that passed meanwhile may have taken rows that were to be read.
        let compacted = self.store.compacted_revision();
        if self.cursor <= compacted {
            return Err(WatchError::Compacted { compacted });
        }
        self.cursor = self.cursor.max(last + 1);
        if events.is_empty() { Ok(None) } else { Ok(Some(WatchBatch { events, revision: last })) }
    }

    fn read_event(&self, key: Bytes, revision: u64) -> Result<Event, StoreError> {
        let prev = self.store.get_at(&key, revision - 1)?;
        Ok(match self.store.get_at(&key, revision)? {
            Some(kv) => Event::new(EventKind::Put, kv, prev),
            None => {
                let gone = KeyValue {
                    key,
                    value: Bytes::new(),
                    create_revision: 0,
                    mod_revision: revision,
                    version: 0,
                    lease: 0,
                };
                Event::new(EventKind::Delete, gone, prev)
            }
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.store.shared.hub.leave(&self.group);
    }
}
