//! Becoming a member of a cluster, and staying one.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`token`] | `K10<hash>::<user>:<secret>` and `K10<hash>::<id>.<secret>` as the joiner reads them |
//! | [`introduction`] | TLS to a server of which only the hash of its CA is known; nothing is said before it matches |
//! | [`request`] | one JSON request over such a connection |
//! | [`credentials`] | key, certificate, CA and cluster settings below `DATA/agent` |
//! | [`admission`] | the agent's request to be let in, and what its refusals mean |
//! | [`renewal`] | another certificate while the old one is good |
//! | [`membership`] | a member from the first start to the last: admission, renewal, admission anew |
//!
//! What a node needs of its cluster is kept, so that an agent starts again without any server; the token is not.

pub mod admission;
pub mod credentials;
pub mod introduction;
pub mod membership;
pub mod renewal;
pub mod request;
pub mod token;

pub use admission::{AdmissionError, ClusterSettings};
pub use membership::{Membership, MembershipError, Wish};
pub use token::{BadToken, Login, Token};
