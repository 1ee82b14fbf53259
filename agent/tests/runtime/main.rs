//! Stories about the embedded runtime on real processes, in a network namespace of their own.
//!
//! Needs root. `cargo test -p coracle-agent --test runtime [PART OF A NAME]`

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a story fails by panicking")]

mod harness;
mod stories;

fn main() {
    coracle_agent::runtime::helper_main_if_requested();
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    std::process::exit(harness::run(stories::ALL, wanted.as_deref()));
}
