//! The ordered map in memory.

use std::collections::BTreeMap;
use std::ops::Bound;

use bytes::Bytes;
use parking_lot::RwLock;

use super::{Batch, Engine, EngineError, Row, Write};

/// Rows copied under one lock by a scan.
pub(super) const CHUNK: usize = 128;

/// A `BTreeMap` behind a lock; scans take the lock for a chunk of rows at a time, so they never hold up the writer.
#[derive(Default)]
pub struct Memory {
    rows: RwLock<BTreeMap<Bytes, Bytes>>,
}

impl Engine for Memory {
    fn get(&self, row: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.rows.read().get(row).cloned())
    }

    fn scan<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        let mut next = Bound::Included(start);
        let mut chunk = Vec::new().into_iter();
        let mut size = 2;
        Box::new(std::iter::from_fn(move || {
            if let Some(row) = chunk.next() {
                return Some(Ok(row));
            }
            if let Bound::Included(s) | Bound::Excluded(s) = &next
                && *s >= end
            {
                return None;
            }
            let rows: Vec<Row> = self
                .rows
                .read()
                .range::<Bytes, _>((next.clone(), Bound::Excluded(end.clone())))
                .take(size)
                .map(|(k, v)| (k.clone(), v.clone()))
                .collect();
            size = CHUNK.min(size * 8);
            next = Bound::Excluded(rows.last()?.0.clone());
            chunk = rows.into_iter();
            chunk.next().map(Ok)
        }))
    }

    fn write(&self, batch: Batch) -> Result<(), EngineError> {
        let mut rows = self.rows.write();
        for (row, write) in batch.rows {
            match write {
                Write::Insert(value) | Write::Put(value) => rows.insert(row, value),
                Write::Remove => rows.remove(&row),
            };
        }
        Ok(())
    }

    fn wipe(&self) -> Result<(), EngineError> {
        self.rows.write().clear();
        Ok(())
    }

    fn size(&self) -> Result<u64, EngineError> {
        Ok(self.rows.read().iter().map(|(k, v)| (k.len() + v.len()) as u64).sum())
    }

    fn flush(&self) -> Result<(), EngineError> {
        Ok(())
    }
}
