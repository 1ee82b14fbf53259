//! Machines that join: what they ask, who lets them in, and a server's own way in.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`credential`] | the token of a request, and what it lets in |
//! | [`limiter`] | how often an address may be wrong |
//! | [`claims`] | node names belong to the machine that had them first |
//! | [`agreement`] | settings that all servers of a cluster share |
//! | [`door`] | `POST /coracle/v1/join/{agent,server}` |
//! | [`enter`] | this server asks to be let into a cluster |

pub mod agreement;
pub mod claims;
pub mod credential;
pub mod door;
pub mod enter;
pub mod limiter;

/// What all paths of joining begin with.
pub const PREFIX: &str = "/coracle/v1/join/";
/// Where servers ask.
pub const SERVER_PATH: &str = "/coracle/v1/join/server";
/// Where agents ask.
pub const AGENT_PATH: &str = "/coracle/v1/join/agent";
