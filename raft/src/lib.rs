//! Consensus.
mod wal;
