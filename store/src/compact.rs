//! Removal of superseded rows. A compaction sets the floor at once; the rows go in small steps between applied batches, so
//! that no write waits for a long one. Steps need no record of their own: the event rows that are left say what is to do.

use bytes::Bytes;

use crate::engine::Batch;
use crate::rows;
use crate::store::StoreError;
use crate::writer::Writer;

impl Writer {
    /// Removes up to `events` events below the floor and the rows they superseded. Returns whether more are left.
    pub fn compact_step(&mut self, events: usize) -> Result<bool, StoreError> {
        let shared = &self.store.shared;
        let pinned = shared.pins.lock().keys().next().copied().unwrap_or(u64::MAX);
        let floor = self.store.compacted_revision().min(pinned);
        let mut batch = Batch::default();
        let mut seen = 0;
        let end = rows::event_row(floor.saturating_add(1), 0);
        for row in shared.engine.scan(Bytes::from_static(b"e/"), end) {
            if seen == events {
                shared.engine.write(batch)?;
                return Ok(true);
            }
            seen += 1;
            let (row, key) = row?;
            let revision = rows::event_revision(&row).ok_or_else(|| StoreError::damaged(&row))?;
            self.compact_key(&key, revision, floor, &mut batch)?;
            batch.remove(row);
        }
        if seen > 0 {
            shared.engine.write(batch)?;
        }
        Ok(false)
    }

    /// Of the rows of a key up to `floor` all but the newest go; that one too when it is a tombstone.
    fn compact_key(&self, key: &[u8], revision: u64, floor: u64, batch: &mut Batch) -> Result<(), StoreError> {
        let row = rows::version_row(key, revision);
        let Some(value) = self.store.shared.engine.get(&row)? else { return Ok(()) };
        if rows::is_tombstone(&value) || self.superseded(key, revision, floor)? {
            batch.remove(row);
        }
        // The row before the first event that is left (its own event is gone already) goes with its successor.
        let mut end = rows::version_prefix(key);
        if let Some(last) = end.last_mut() {
            *last = 1;
        }
        let start = rows::version_row(key, revision.saturating_sub(1));
        for row in self.store.shared.engine.scan(start, end.freeze()) {
            batch.remove(row?.0);
        }
        Ok(())
    }

    fn superseded(&self, key: &[u8], revision: u64, floor: u64) -> Result<bool, StoreError> {
        let start = rows::version_row(key, floor);
        let end = rows::version_row(key, revision);
        Ok(self.store.shared.engine.scan(start, end).next().transpose()?.is_some())
    }
}
