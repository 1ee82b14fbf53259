//! MVCC key-value state with the semantics of etcd v3: one global revision, transactions, ranges at a revision,
//! watches without gap or repeat, compaction and leases.
//!
//! # Layout
//! In the order data flows through it:
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`types`] | keys, values, transactions, commands, events: what goes in and comes out |
//! | [`codec`] | the byte form of commands (what the consensus log carries) |
//! | [`writer`] | [`Writer`]: the only one that changes state; applies commands in order |
//! | [`compact`] | removal of superseded rows in small steps |
//! | [`store`] | [`Store`]: the read handle; ranges, leases, pinned snapshots |
//! | [`watch`] | event rings and [`Watcher`]s |
//! | [`rows`] | how keys, revisions and values are laid out as rows of the engine |
//! | [`engine`] | the ordered byte map underneath: `memory`, and `sled` behind a layer of recent rows |
//!
//! The state is a materialised view: durability is the consensus log's and the snapshot file's concern (crate
//! `coracle-raft`), which is why nothing here calls `fsync`.
//!
//! # Tasks
//! The thread `coracle-view` takes layers of rows down to sled. The [`Writer`] belongs to the one thread that applies the log;
//! [`Store`] handles may be used from any thread and never block it for longer than the copy of an event list.
#![forbid(unsafe_code)]

pub mod codec;
pub mod compact;
pub mod engine;
pub mod rows;
pub mod store;
pub mod types;
pub mod watch;
pub mod writer;

pub use engine::Backend;
pub use store::{Options, Pinned, SnapshotMeta, Store, StoreError};
pub use types::{
    Command, Compare, Event, EventKind, KeyValue, Op, OpResponse, RangeRequest, RangeResponse, Response, Txn,
    TxnResponse, prefix_end,
};
pub use watch::{WatchBatch, WatchError, WatchRequest, Watcher};
pub use writer::Writer;

#[cfg(test)]
mod tests;
