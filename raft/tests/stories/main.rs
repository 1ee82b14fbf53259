//! Stories on real processes and a real file system: what is acknowledged survives kill -9 and power cuts.
#![allow(clippy::unwrap_used, reason = "this is a test")]

mod disk;
mod idle;
mod kill;
mod power_cut;
mod writer;
