//! Stories on real processes and a real file system: what is acknowledged survives kill -9 and power cuts.

mod kill;
mod power_cut;
mod writer;
