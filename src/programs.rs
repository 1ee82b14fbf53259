//! The programs that the binary carries, built by `src/build.rs` from `agent/shim`.

/// Parent of one pod's processes; the agent runs it from memory.
pub static SHIM: &[u8] = include_bytes!(env!("CORACLE_SHIM"));

/// Program of the built-in image `coracle.local/hello`.
pub static HELLO: &[u8] = include_bytes!(env!("CORACLE_HELLO"));
