//! An index over a range of the store that is brought up to date by whoever reads it: no task of its own, no wake-ups while
//! idle, and a reader sees every write that was acknowledged before it asked.

use super::objects::ObjectError;
use bytes::Bytes;
use coracle_store::{
    EventKind, KeyValue, RangeRequest, Store, StoreError, WatchError, WatchRequest, Watcher, prefix_end,
};
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::sync::atomic::{AtomicU64, Ordering};

/// What an index does with the rows of its range.
pub trait Fold {
    /// Forgets everything.
    fn clear(&mut self);
    /// A row was written; `key` is relative to the range's prefix.
    fn put(&mut self, key: &str, row: &KeyValue);
    /// A row was deleted.
    fn delete(&mut self, key: &str);
}

/// An index of type `T` over all keys with one prefix.
pub struct Live<T> {
    store: Store,
    prefix: String,
    /// Store revision up to which `index` is complete.
    seen: AtomicU64,
    index: RwLock<T>,
    watcher: Mutex<Option<Watcher>>,
}

impl<T: Fold + Default> Live<T> {
    pub fn new(store: Store, prefix: &str) -> Live<T> {
        let watcher = Mutex::new(None);
        Live { store, prefix: prefix.to_owned(), seen: AtomicU64::new(0), index: RwLock::default(), watcher }
    }

    /// The index, complete up to the newest revision of the store.
    pub fn read(&self) -> Result<RwLockReadGuard<'_, T>, ObjectError> {
        let revision = self.store.revision();
        if self.seen.load(Ordering::Acquire) < revision || revision == 0 {
            self.catch_up(revision)?;
        }
        Ok(self.index.read())
    }

    fn catch_up(&self, revision: u64) -> Result<(), StoreError> {
        let mut slot = self.watcher.lock();
        if let Some(watcher) = slot.as_mut() {
            loop {
                match watcher.try_next() {
                    Ok(None) => break,
                    Ok(Some(batch)) => {
                        let mut index = self.index.write();
                        for event in &batch.events {
                            self.fold(&mut index, event.kind, &event.kv);
                        }
                    }
                    Err(WatchError::Store(error)) => return Err(error),
                    Err(WatchError::Compacted { .. } | WatchError::Closed) => {
                        *slot = None;
                        break;
                    }
                }
            }
        }
        if slot.is_none() {
            *slot = Some(self.rebuild()?);
        }
        self.seen.fetch_max(revision, Ordering::AcqRel);
        Ok(())
    }

    fn rebuild(&self) -> Result<Watcher, StoreError> {
        let start = Bytes::copy_from_slice(self.prefix.as_bytes());
        let end = prefix_end(self.prefix.as_bytes());
        let rows =
            self.store.range(&RangeRequest { start: start.clone(), end: end.clone(), ..RangeRequest::default() })?;
        let watcher = self.store.watch(WatchRequest { start, end, from_revision: Some(rows.revision + 1) })?;
        let mut index = self.index.write();
        index.clear();
        for row in &rows.kvs {
            self.fold(&mut index, EventKind::Put, row);
        }
        Ok(watcher)
    }

    fn fold(&self, index: &mut T, kind: EventKind, row: &KeyValue) {
        let key = row.key.strip_prefix(self.prefix.as_bytes()).and_then(|key| std::str::from_utf8(key).ok());
        match (key, kind) {
            (Some(key), EventKind::Put) => index.put(key, row),
            (Some(key), EventKind::Delete) => index.delete(key),
            (None, _) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use serde_json::json;
    use std::collections::BTreeSet;

    impl Fold for BTreeSet<String> {
        fn clear(&mut self) {
            BTreeSet::clear(self);
        }
        fn put(&mut self, key: &str, _: &KeyValue) {
            self.insert(key.to_owned());
        }
        fn delete(&mut self, key: &str) {
            self.remove(key);
        }
    }

    #[test]
    fn a_reader_sees_every_write_before_its_question() {
        let mut world = World::new();
        let live: Live<BTreeSet<String>> = Live::new(world.objects.store().clone(), "/registry/core/pods/");
        assert!(live.read().unwrap().is_empty());
        world.put("", "pods", json!({ "metadata": { "namespace": "a", "name": "x" } }));
        world.put("", "secrets", json!({ "metadata": { "namespace": "a", "name": "s" } }));
        assert!(live.read().unwrap().iter().eq(["a/x"]));
        world.put("", "pods", json!({ "metadata": { "namespace": "b", "name": "y" } }));
        world.delete("", "pods", "a", "x");
        assert!(live.read().unwrap().iter().eq(["b/y"]));
    }
}
