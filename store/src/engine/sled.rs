//! sled as a rebuildable view. Never trusted with durability: its `flush` ends in `sync_file_range`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bytes::Bytes;

use super::{Batch, Engine, EngineError, Row, Write};

/// A sled tree.
pub struct Sled {
    db: sled::Db,
}

fn failed(doing: &'static str) -> impl FnOnce(sled::Error) -> EngineError {
    move |source| EngineError { doing, source: source.into() }
}

impl Sled {
    /// Opens or makes the tree. sled panics on some damaged directories; that is an error here.
    pub fn open(dir: &Path, cache_capacity: u64) -> Result<Self, EngineError> {
        let open = || {
            sled::Config::new()
                .path(dir)
                .cache_capacity(cache_capacity)
                .flush_every_ms(None)
                .print_profile_on_drop(false)
                .open()
        };
        let db = catch_unwind(AssertUnwindSafe(open))
            .map_err(|_| EngineError { doing: "opening the sled directory", source: "sled panicked".into() })?
            .map_err(failed("opening the sled directory"))?;
        Ok(Sled { db })
    }

    /// Sets one row. Readers are not held up as they are by a batch.
    pub(super) fn put(&self, row: &[u8], value: &[u8]) -> Result<(), EngineError> {
        self.db.insert(row, value).map(|_| ()).map_err(failed("writing a row"))
    }

    /// Removes one row.
    pub(super) fn remove(&self, row: &[u8]) -> Result<(), EngineError> {
        self.db.remove(row).map(|_| ()).map_err(failed("removing a row"))
    }
}

/// Shorter than this, a copy costs less than sharing.
const SHARED: usize = 128;

/// Long values share the memory of sled's cache.
fn to_bytes(v: sled::IVec) -> Bytes {
    if v.len() < SHARED { Bytes::copy_from_slice(&v) } else { Bytes::from_owner(v) }
}

/// The first byte, if there is one.
fn mark(v: &sled::IVec) -> Bytes {
    Bytes::copy_from_slice(v.get(..1).unwrap_or_default())
}

impl Engine for Sled {
    fn get(&self, row: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.db.get(row).map_err(failed("reading a row"))?.map(to_bytes))
    }

    fn scan<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        if start >= end {
            return Box::new(std::iter::empty());
        }
        Box::new(self.db.range(start..end).map(|row| {
            let (k, v) = row.map_err(failed("scanning rows"))?;
            Ok((to_bytes(k), to_bytes(v)))
        }))
    }

    fn marks<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        if start >= end {
            return Box::new(std::iter::empty());
        }
        Box::new(self.db.range(start..end).map(|row| {
            let (k, v) = row.map_err(failed("scanning rows"))?;
            Ok((to_bytes(k), mark(&v)))
        }))
    }

    fn write(&self, batch: Batch) -> Result<(), EngineError> {
        let mut out = sled::Batch::default();
        for (row, write) in batch.rows {
            match write {
                Write::Insert(value) | Write::Put(value) => out.insert(row.as_ref(), value.as_ref()),
                Write::Remove => out.remove(row.as_ref()),
            }
        }
        self.db.apply_batch(out).map_err(failed("writing a batch"))
    }

    fn wipe(&self) -> Result<(), EngineError> {
        self.db.clear().map_err(failed("removing all rows"))
    }

    fn size(&self) -> Result<u64, EngineError> {
        self.db.size_on_disk().map_err(failed("measuring the directory"))
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.db.flush().map(|_| ()).map_err(failed("flushing"))
    }
}
