//! sled behind a layer in memory. Writes gather in the layer and go down in bulk, in the background: when the layer is full,
//! before a snapshot, and at a clean stop. So an idle cluster, whose few rows are superseded and compacted before the layer is
//! full, writes nothing here, and a busy one pays sled once per row in key order.
//!
//! What a killed process had in the layer, the consensus log brings back: position and rows go down together. A layer goes
//! down row by row, not as one batch of sled's, during which no reader could read; a marker row tells that it was cut off.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, RwLock};

use super::memory::CHUNK;
use super::sled::Sled;
use super::{Batch, Engine, EngineError, Row, Write};
use crate::rows;

/// A layer of so many bytes goes down: the larger, the more of its rows share a page of sled's (measured against half of
/// it: a tenth less processor time a put).
const FULL: usize = 8 << 20;
/// The writer waits when the layer has grown to this while the one before is still on its way down.
const HELD: usize = 4 * FULL;
/// What a row costs beside its bytes.
const OVERHEAD: usize = 128;
/// Present while a layer goes down, and from a wipe until the first layer with a position is down.
const UNFINISHED: &[u8] = b"m/unfinished";

/// What became of a row.
#[derive(Clone)]
struct Slot {
    /// None when it was removed.
    value: Option<Bytes>,
    /// No layer below knows the row.
    new: bool,
}

#[derive(Default)]
struct Layer {
    rows: RwLock<BTreeMap<Bytes, Slot>>,
    bytes: AtomicUsize,
}

impl Layer {
    fn write(&self, batch: Batch) {
        let mut rows = self.rows.write();
        let (mut added, mut gone) = (0, 0);
        for (row, write) in batch.rows {
            let weight = row.len() + OVERHEAD;
            let slot = match write {
                Write::Insert(value) => Slot { value: Some(value), new: true },
                Write::Put(value) => Slot { value: Some(value), new: false },
                Write::Remove if rows.get(&row).is_some_and(|slot| slot.new) => {
                    let slot = rows.remove(&row);
                    gone += weight + slot.and_then(|slot| slot.value).map_or(0, |value| value.len());
                    continue;
                }
                Write::Remove => Slot { value: None, new: false },
            };
            added += weight + slot.value.as_ref().map_or(0, Bytes::len);
            if let Some(old) = rows.insert(row, slot) {
                gone += weight + old.value.map_or(0, |value| value.len());
            }
        }
        // Only the writer changes it.
        self.bytes.store(self.bytes.load(Ordering::Relaxed) + added - gone, Ordering::Relaxed);
    }

    fn get(&self, row: &[u8]) -> Option<Slot> {
        self.rows.read().get(row).cloned()
    }

    /// The first row of `start..end` and what became of it.
    fn first(&self, start: &[u8], end: &[u8]) -> Option<(Bytes, Slot)> {
        let rows = self.rows.read();
        let range = rows.range::<[u8], _>((Bound::Included(start), Bound::Excluded(end)));
        range.map(|(row, slot)| (row.clone(), slot.clone())).next()
    }

    /// The rows of `start..end` in order; the lock is held for a chunk of them at a time.
    fn scan(self: Arc<Self>, start: Bytes, end: Bytes) -> impl Iterator<Item = (Bytes, Slot)> {
        let mut ended = start >= end;
        let mut next = Bound::Included(start);
        let mut chunk = Vec::new().into_iter();
        let mut size = 2;
        std::iter::from_fn(move || {
            if let Some(row) = chunk.next() {
                return Some(row);
            }
            if ended {
                return None;
            }
            let rows = self.rows.read();
            let range = rows.range::<Bytes, _>((next.clone(), Bound::Excluded(end.clone())));
            let taken: Vec<_> = range.take(size).map(|(row, slot)| (row.clone(), slot.clone())).collect();
            drop(rows);
            ended = taken.len() < size;
            size = CHUNK.min(size * 8);
            next = Bound::Excluded(taken.last()?.0.clone());
            chunk = taken.into_iter();
            chunk.next()
        })
    }
}

/// The layers that hold what sled doesn't have yet. Whoever reads takes this first and sled after it: rows only go down.
#[derive(Clone)]
struct Layers {
    active: Arc<Layer>,
    /// On its way down.
    frozen: Option<Arc<Layer>>,
}

#[derive(Default)]
struct Control {
    frozen: bool,
    stop: bool,
    failed: Option<String>,
}

struct Shared {
    layers: RwLock<Layers>,
    sled: Sled,
    control: Mutex<Control>,
    changed: Condvar,
    /// The active layer shall go down as soon as the one before it is down.
    wanted: AtomicBool,
}

/// The engine of a cluster on disk.
pub struct Layered {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Layered {
    /// Opens or makes the tree.
    pub fn open(dir: &Path, cache_capacity: u64) -> Result<Self, EngineError> {
        let sled = Sled::open(dir, cache_capacity)?;
        if sled.get(UNFINISHED)?.is_some() {
            let source = "the last write to it was cut off".into();
            return Err(EngineError { doing: "opening the sled directory", source });
        }
        let layers = Layers { active: Arc::default(), frozen: None };
        let shared = Arc::new(Shared {
            layers: RwLock::new(layers),
            sled,
            control: Mutex::default(),
            changed: Condvar::new(),
            wanted: AtomicBool::new(false),
        });
        let worker = shared.clone();
        let thread = std::thread::Builder::new()
            .name("coracle-view".to_owned())
            .spawn(move || worker.serve())
            .map_err(|source| EngineError { doing: "starting a thread", source: source.into() })?;
        Ok(Layered { shared, thread: Some(thread) })
    }
}

impl Shared {
    /// The thread that takes layers down.
    fn serve(&self) {
        loop {
            let mut control = self.control.lock();
            while !control.frozen && !control.stop {
                self.changed.wait(&mut control);
            }
            if control.stop {
                return;
            }
            drop(control);
            let frozen = self.layers.read().frozen.clone();
            let lowered = frozen.map(|layer| catch_unwind(AssertUnwindSafe(|| self.lower(&layer))));
            let failed = match lowered {
                None | Some(Ok(Ok(()))) => None,
                Some(Ok(Err(error))) => Some(error.source.to_string()),
                Some(Err(_)) => Some("sled panicked".to_owned()),
            };
            if failed.is_none() {
                self.layers.write().frozen = None;
            }
            let mut control = self.control.lock();
            control.frozen = false;
            control.stop |= failed.is_some();
            control.failed = failed;
            self.changed.notify_all();
        }
    }

    fn lower(&self, layer: &Layer) -> Result<(), EngineError> {
        let rows = layer.rows.read();
        let finishes = rows.contains_key(rows::META);
        self.sled.put(UNFINISHED, b"")?;
        // The numbers that say how far the state is come last, together.
        let mut last = Batch::default();
        for (row, slot) in rows.iter() {
            match &slot.value {
                Some(value) if row.starts_with(b"m/") => last.put(row.clone(), value.clone()),
                Some(value) => self.sled.put(row, value)?,
                None => self.sled.remove(row)?,
            }
        }
        if finishes {
            last.remove(UNFINISHED);
        }
        self.sled.write(last)
    }

    fn error(control: &Control) -> Result<(), EngineError> {
        match &control.failed {
            Some(reason) => Err(EngineError { doing: "writing to sled", source: reason.clone().into() }),
            None => Ok(()),
        }
    }

    /// Sends the active layer on its way down unless one is.
    fn freeze(&self) -> Result<(), EngineError> {
        let mut control = self.control.lock();
        Shared::error(&control)?;
        if control.frozen {
            self.wanted.store(true, Ordering::Relaxed);
            return Ok(());
        }
        self.wanted.store(false, Ordering::Relaxed);
        let mut layers = self.layers.write();
        if layers.active.rows.read().is_empty() {
            return Ok(());
        }
        layers.frozen = Some(std::mem::take(&mut layers.active));
        control.frozen = true;
        self.changed.notify_all();
        Ok(())
    }

    /// Returns when no layer is on its way down.
    fn settle(&self) -> Result<(), EngineError> {
        let mut control = self.control.lock();
        while control.frozen {
            self.changed.wait(&mut control);
        }
        Shared::error(&control)
    }

    fn layers(&self) -> Layers {
        self.layers.read().clone()
    }
}

impl Engine for Layered {
    fn get(&self, row: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let layers = self.shared.layers();
        let slot = layers.active.get(row).or_else(|| layers.frozen.as_ref().and_then(|frozen| frozen.get(row)));
        match slot {
            Some(slot) => Ok(slot.value),
            None => self.shared.sled.get(row),
        }
    }

    fn newest(&self, start: Bytes, end: Bytes) -> Result<Option<Row>, EngineError> {
        let layers = self.shared.layers();
        for layer in std::iter::once(&layers.active).chain(&layers.frozen) {
            match layer.first(&start, &end) {
                Some((row, Slot { value: Some(value), .. })) => return Ok(Some((row, value))),
                // A compaction removed something: the first row that is left may be in any layer.
                Some(_) => return self.scan(start, end).next().transpose(),
                None => {}
            }
        }
        self.shared.sled.newest(start, end)
    }

    fn scan<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        // Taken before sled is looked at: rows only go down.
        let layers = self.shared.layers();
        let below = self.shared.sled.scan(start.clone(), end.clone());
        Box::new(merge(layers, below, start, end))
    }

    fn marks<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        let layers = self.shared.layers();
        let below = self.shared.sled.marks(start.clone(), end.clone());
        Box::new(merge(layers, below, start, end))
    }

    fn write(&self, batch: Batch) -> Result<(), EngineError> {
        let active = self.shared.layers.read().active.clone();
        active.write(batch);
        let bytes = active.bytes.load(Ordering::Relaxed);
        if bytes >= HELD {
            self.shared.settle()?;
        }
        if bytes >= FULL || self.shared.wanted.load(Ordering::Relaxed) { self.shared.freeze() } else { Ok(()) }
    }

    fn wipe(&self) -> Result<(), EngineError> {
        self.shared.settle()?;
        let mut layers = self.shared.layers.write();
        *layers = Layers { active: Arc::default(), frozen: None };
        self.shared.sled.wipe()?;
        self.shared.sled.put(UNFINISHED, b"")
    }

    fn size(&self) -> Result<u64, EngineError> {
        self.shared.sled.size()
    }

    fn lower(&self) -> Result<(), EngineError> {
        self.shared.freeze()
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.shared.settle()?;
        self.shared.freeze()?;
        self.shared.settle()?;
        self.shared.sled.flush()
    }
}

impl Drop for Layered {
    fn drop(&mut self) {
        self.shared.control.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic in sled was caught and is the writer's error.
            let _ = thread.join();
        }
    }
}

/// The rows of all layers and of sled in order, each as the uppermost layer has it.
fn merge<'a>(
    layers: Layers,
    below: impl Iterator<Item = Result<Row, EngineError>> + 'a,
    start: Bytes,
    end: Bytes,
) -> impl Iterator<Item = Result<Row, EngineError>> + 'a {
    let Layers { active, frozen } = layers;
    let mut active = active.scan(start.clone(), end.clone()).peekable();
    let mut frozen = frozen.unwrap_or_default().scan(start, end).peekable();
    let mut below = below.peekable();
    std::iter::from_fn(move || {
        loop {
            let (upper, middle) = (active.peek().map(|(row, _)| row), frozen.peek().map(|(row, _)| row));
            let lower = match below.peek() {
                // Most rows are here alone.
                Some(Ok(_)) if upper.is_none() && middle.is_none() => return below.next(),
                Some(Ok((row, _))) => Some(row),
                Some(Err(_)) => return below.next(),
                None => None,
            };
            let least = [upper, middle, lower].into_iter().flatten().min()?;
            let holds = [upper == Some(least), middle == Some(least), lower == Some(least)];
            let mut found: Option<(Bytes, Option<Bytes>)> = None;
            if holds[0]
                && let Some((row, slot)) = active.next()
            {
                found = Some((row, slot.value));
            }
            if holds[1]
                && let Some((row, slot)) = frozen.next()
            {
                found.get_or_insert((row, slot.value));
            }
            if holds[2]
                && let Some(Ok((row, value))) = below.next()
            {
                found.get_or_insert((row, Some(value)));
            }
            if let Some((row, Some(value))) = found {
                return Some(Ok((row, value)));
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows_of(engine: &Layered) -> Vec<(String, String)> {
        let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).unwrap();
        let rows = engine.scan(Bytes::from_static(b"v/"), Bytes::from_static(b"v0"));
        rows.map(|row| row.unwrap()).map(|(row, value)| (text(row), text(value))).collect()
    }

    fn batch(puts: &[(&'static str, &'static str)], removals: &[&'static str]) -> Batch {
        let mut batch = Batch::default();
        for (row, value) in puts {
            batch.insert(*row, *value);
        }
        for row in removals {
            batch.remove(*row);
        }
        batch.put(rows::META, "position");
        batch
    }

    fn pairs(rows: &[(&str, &str)]) -> Vec<(String, String)> {
        rows.iter().map(|(row, value)| (row.to_string(), value.to_string())).collect()
    }

    #[test]
    fn readers_see_one_map_wherever_its_rows_are() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Layered::open(dir.path(), 1 << 20).unwrap();
        engine.write(batch(&[("v/a", "1"), ("v/b", "1"), ("v/c", "1")], &[])).unwrap();
        engine.flush().unwrap();
        engine.write(batch(&[("v/b", "2"), ("v/d", "2")], &["v/c"])).unwrap();
        let before_freeze = rows_of(&engine);
        assert_eq!(before_freeze, pairs(&[("v/a", "1"), ("v/b", "2"), ("v/d", "2")]));
        let mut held = engine.scan(Bytes::from_static(b"v/"), Bytes::from_static(b"v0"));
        assert_eq!(held.next().unwrap().unwrap().0, "v/a");
        engine.flush().unwrap();
        engine.write(batch(&[("v/e", "3")], &["v/a"])).unwrap();
        // A scan that began before goes on with what it saw.
        let rest: Vec<Bytes> = held.map(|row| row.unwrap().0).collect();
        assert_eq!(rest, ["v/b", "v/d"]);
        assert_eq!(rows_of(&engine), pairs(&[("v/b", "2"), ("v/d", "2"), ("v/e", "3")]));
        let first = engine.newest(Bytes::from_static(b"v/a"), Bytes::from_static(b"v/z")).unwrap();
        assert_eq!(first.unwrap().0, "v/b");
        assert_eq!(engine.get(b"v/a").unwrap(), None);
        assert_eq!(engine.get(b"v/d").unwrap().unwrap(), "2");
    }

    #[test]
    fn what_is_removed_before_it_went_down_leaves_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let engine = Layered::open(dir.path(), 1 << 20).unwrap();
        engine.write(batch(&[("v/a", "1")], &[])).unwrap();
        let bytes = || engine.shared.layers().active.bytes.load(Ordering::Relaxed);
        let before = bytes();
        engine.write(batch(&[("v/b", "1")], &[])).unwrap();
        engine.write(batch(&[], &["v/b"])).unwrap();
        assert_eq!(bytes(), before);
        assert_eq!(engine.shared.layers().active.rows.read().len(), 2);
    }

    #[test]
    fn a_killed_process_leaves_the_state_as_it_was_last_lowered() {
        let dir = tempfile::tempdir().unwrap();
        {
            let engine = Layered::open(dir.path(), 1 << 20).unwrap();
            engine.write(batch(&[("v/a", "1")], &[])).unwrap();
            engine.flush().unwrap();
            engine.write(batch(&[("v/b", "1")], &[])).unwrap();
        }
        let engine = Layered::open(dir.path(), 1 << 20).unwrap();
        assert_eq!(rows_of(&engine), pairs(&[("v/a", "1")]));
    }

    #[test]
    fn a_state_that_was_cut_off_on_its_way_down_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        {
            let engine = Layered::open(dir.path(), 1 << 20).unwrap();
            engine.wipe().unwrap();
            let mut rows = Batch::default();
            rows.insert("v/a", "1");
            engine.write(rows).unwrap();
            engine.flush().unwrap();
        }
        assert!(Layered::open(dir.path(), 1 << 20).is_err());
    }
}
