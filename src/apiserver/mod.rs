//! The API: one generic engine over stored bytes.
//!
//! # Layout
//! In the order a request flows through it:
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`service`] | [`ApiServer`]: the whole API as one `tower::Service` |
//! | [`resources`] | [`resources::RESOURCES`]: one row per kind |
//! | [`field`] | field errors and their texts |
//! | [`status`] | `metav1.Status`: what a failure looks like outside |
//! | [`body`] | the one body type |

pub mod body;
pub mod field;
pub mod resources;
pub mod service;
pub mod status;

pub use service::{ApiServer, client};
