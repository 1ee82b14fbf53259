//! The ordered byte map underneath. Two of them: [`memory`] (tests, clusters on tmpfs) and [`layered`] (default), which is
//! [`sled`] behind a layer of recent rows in memory.

pub mod layered;
pub mod memory;
pub mod sled;

use std::path::PathBuf;

use bytes::Bytes;

/// Which engine to open.
#[derive(Debug, Clone)]
pub enum Backend {
    /// Everything in memory.
    Memory,
    /// A sled tree in a directory.
    Sled {
        /// The directory; made if it is not there.
        dir: PathBuf,
        /// sled's page cache in bytes.
        cache_capacity: u64,
    },
}

/// The engine failed. The state behind it must be thrown away and rebuilt from snapshot and log.
#[derive(Debug, thiserror::Error)]
#[error("the key-value engine failed while {doing}")]
pub struct EngineError {
    /// What was being done.
    pub doing: &'static str,
    /// The engine's own error.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// What is done to a row.
#[derive(Debug)]
pub enum Write {
    /// Sets a row that was never there before.
    Insert(Bytes),
    /// Sets a row.
    Put(Bytes),
    /// Removes a row.
    Remove,
}

/// Writes that become visible together. A later write to the same row wins.
#[derive(Debug, Default)]
pub struct Batch {
    /// In the order in which they were asked for.
    pub rows: Vec<(Bytes, Write)>,
}

impl Batch {
    /// Sets a row that was never there before.
    pub fn insert(&mut self, row: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.rows.push((row.into(), Write::Insert(value.into())));
    }

    /// Sets a row.
    pub fn put(&mut self, row: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.rows.push((row.into(), Write::Put(value.into())));
    }

    /// Removes a row.
    pub fn remove(&mut self, row: impl Into<Bytes>) {
        self.rows.push((row.into(), Write::Remove));
    }
}

/// A row: its key and its value.
pub type Row = (Bytes, Bytes);

/// An ordered map of bytes. Rows of the store are immutable once written, so a scan need not be isolated from writes.
pub trait Engine: Send + Sync + 'static {
    /// Reads one row.
    fn get(&self, row: &[u8]) -> Result<Option<Bytes>, EngineError>;
    /// The rows of `start..end` in order.
    fn scan<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a>;
    /// As [`Engine::scan`], with no more than the first byte of each value.
    fn marks<'a>(&'a self, start: Bytes, end: Bytes) -> Box<dyn Iterator<Item = Result<Row, EngineError>> + 'a> {
        self.scan(start, end)
    }
    /// The first row of `start..end`, where rows written later sort before earlier ones (the versions of one key do).
    fn newest(&self, start: Bytes, end: Bytes) -> Result<Option<Row>, EngineError> {
        self.scan(start, end).next().transpose()
    }
    /// Applies a batch atomically.
    fn write(&self, batch: Batch) -> Result<(), EngineError>;
    /// Removes everything.
    fn wipe(&self) -> Result<(), EngineError>;
    /// Bytes that the engine occupies on disk (or in memory).
    fn size(&self) -> Result<u64, EngineError>;
    /// Begins to hand to the operating system what was written so far; does not wait for it.
    fn lower(&self) -> Result<(), EngineError> {
        Ok(())
    }
    /// Hands everything to the operating system, for a clean stop. No promise of durability.
    fn flush(&self) -> Result<(), EngineError>;
}
