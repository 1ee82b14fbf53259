//! The scheduler: gives every pod without a node the best node that it fits on.
//!
//! # Layout
//! In the order of a pod's way:
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`pod_info`] | a pod as the scheduler sees it |
//! | [`queue`] | pods that wait: to be tried, for a backoff, for a change |
//! | [`world`] | nodes and what is on them, assumed pods included |
//! | [`decide`] | where a pod goes, or why nowhere |
//! | [`filter`], [`interpod`], [`spread`], [`volumes`] | which nodes it fits on |
//! | [`score`] | which of them is best |
//! | [`preempt`] | who goes when none is |
//! | [`shell`] | the task that owns queue and world, hears informers and writes bindings |
//!
//! All but `shell` is pure. The shell runs as one task from the begin to the end of a term of leadership; requests to the
//! API run beside it and report back, so that no pod waits for another's binding.

pub mod decide;
pub mod filter;
pub mod interpod;
pub mod pod_info;
pub mod preempt;
pub mod queue;
pub mod score;
pub mod shell;
pub mod spread;
pub mod volumes;
pub mod world;

#[cfg(test)]
mod testing;

pub use shell::start;
