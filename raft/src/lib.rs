//! Consensus: a replicated log of commands, applied in order to the MVCC state of `coracle-store`.
//!
//! openraft decides; everything on disk and every type outside is ours.
//!
//! # Layout
//! In the order a command flows through it:
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`node`] | [`Node`]: start, propose, read barrier, members, leadership, shutdown |
//! | [`propose`] | concurrent commands gathered into one log entry and carried to its end |
//! | [`pending`] | who waits for which answer |
//! | [`forward`] | commands of a follower on their way to the leader |
//! | [`read`] | linearizable reads |
//! | [`entry`] | what a log entry carries, its byte form, openraft's types |
//! | [`membership`] | who is in the cluster, its byte form |
//! | [`members`] | changes of the membership |
//! | [`leadership`] | who leads, elections, a leader with a dead disk |
//! | [`peers`] | connections to the other members and what is said on them |
//! | [`log`] | the log as openraft sees it, with its tail in memory |
//! | [`wal`] | the write-ahead log: segments, records, recovery, one thread |
//! | [`machine`] | the apply thread, snapshots as openraft sees them |
//! | [`applied`] | how far the state is, stored with it |
//! | [`snapshot`] | snapshot files |
//! | [`view`] | the sled directory: kept or rebuilt |
//! | [`upkeep`] | compaction, lease expiry, snapshots when due |
//! | [`member`] | identity, incarnation of the cluster, lock |
//! | [`offline`] | restore, reset, forget |
//! | [`files`] | durable names |
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
//! | reader task | reads waiting for a round | [`Node::start`] | [`Node::shutdown`] |
//! | follower task | what is told about leadership | [`Node::start`] | with openraft's tasks |
//! | elections, promotion, announcement, keeping in touch | nothing | [`Node::start`] | [`Node::shutdown`] |
//! | one task per connection and request | the connection | [`Node::serve_peer`], a request | with it, or [`Node::shutdown`] |
//! | upkeep tasks | nothing | [`Node::start`] | [`Node::shutdown`] |
#![forbid(unsafe_code)]

mod applied;
mod entry;
mod files;
mod forward;
mod leadership;
mod log;
mod machine;
mod member;
mod members;
mod membership;
mod node;
mod offline;
mod peers;
mod pending;
mod propose;
mod read;
mod snapshot;
mod upkeep;
mod view;
mod wal;

#[cfg(test)]
mod tests;

pub use member::member_id;
pub use members::{MemberState, MembershipError};
pub use membership::Peer;
pub use node::{Node, Options, SaveError, SnapshotInfo, StartError};
pub use offline::{OfflineError, Restored, forget, reset, restore};
pub use peers::{Connection, Dial, Standing};
pub use propose::ProposeError;
pub use snapshot::SnapshotError;
pub use view::{Backend, ViewError};
pub use wal::WalError;
