//! Stories of several machines: servers that form a cluster and lose each other, disks that stall, agents cut off.
//!
//! Each story under load ends with every acknowledged write on every server and a linearizable history. Those marked
//! `ignore` take long; `tests/run faults` runs them.
//!
//! # Layout
//! - `switch`: the network, with partitions, loss and delay
//! - `hosts`: machines on it, and what runs there
//! - `disks`: disks that stall, fail and lose power
//! - `client`, `load`, `history`: clients, what they were told, and whether that can be
//! - `form`, `kill`, `partition`, `disk`, `address`, `agents`, `watch`, `families`: the stories

mod client;
mod disks;
mod history;
mod hosts;
mod load;
mod switch;

mod address;
mod agents;
mod disk;
mod families;
mod form;
mod kill;
mod partition;
mod watch;
