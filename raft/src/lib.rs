//! Consensus: a replicated log of commands, applied in order to the MVCC state of `coracle-store`.
//!
//! openraft decides; everything on disk and every type outside is ours.
//!
//! # Layout
//! In the order a command flows through it:
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`node`] | [`Node`]: start, propose, read barrier, leadership, shutdown |
//! | [`propose`] | concurrent commands gathered into one log entry |
//! | [`entry`] | what a log entry carries, its byte form, openraft's types |
//! | [`log`] | the log as openraft sees it, with its tail in memory |
//! | [`wal`] | the write-ahead log: segments, records, recovery, one thread |
//! | [`machine`] | the apply thread, snapshots as openraft sees them |
//! | [`applied`] | how far the state is, stored with it |
//! | [`snapshot`] | snapshot files |
//! | [`view`] | the sled directory: kept or rebuilt |
//! | [`upkeep`] | compaction, lease expiry, snapshots when due |
//! | [`member`] | identity and lock |
//! | [`files`] | durable names |
//! | [`transport`] | the seam to the peers |
//!
//! # Tasks and threads
//!
//! | what | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | thread `coracle-wal` | the log's files | [`Node::start`] | with the last handle to the log |
//! | thread `coracle-wal-fill` | the spare segment while it is filled | when the log is half full | when it is filled |
//! | thread `coracle-apply` | the store's writer | [`Node::start`] | [`Node::shutdown`] |
//! | openraft's tasks | votes, terms, commit index | [`Node::start`] | [`Node::shutdown`] or a failed disk |
//! | proposer task | commands waiting to be proposed | [`Node::start`] | [`Node::shutdown`] |
//! | upkeep tasks | nothing | [`Node::start`] | [`Node::shutdown`] |
#![forbid(unsafe_code)]

mod applied;
mod entry;
mod files;
mod log;
mod machine;
mod member;
mod node;
mod propose;
mod snapshot;
mod transport;
mod upkeep;
mod view;
mod wal;

#[cfg(test)]
mod tests;

pub use entry::Peer;
pub use node::{Node, Options, StartError};
pub use propose::ProposeError;
pub use snapshot::SnapshotError;
pub use view::{Backend, ViewError};
pub use wal::WalError;
