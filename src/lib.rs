//! Coracle: Kubernetes you can carry. This crate is the server (API, controllers, scheduler) and the command line.
//!
//! # Layout
//! In the order a write flows through it:
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`cli`] | flags, configuration file, the commands |
//! | [`server`] | starts and stops everything a server runs |
//! | [`node`] | `coracle agent`: a node without a server in its process |
//! | [`auth`] | certificates, tokens, who the caller is, what the caller may do |
//! | [`apiserver`] | listener, request grammar, the generic verbs over stored bytes, discovery |
//! | [`schema`] | the table of all API types: decoding, defaults, validation of fields, patches |
//! | [`admission`] | the plug-ins a write passes |
//! | [`strategy`] | per-kind defaults and validation |
//! | [`controllers`] | the control loops |
//! | [`scheduler`] | places pods on nodes |
//! | [`programs`] | the shim and the built-in image's program, carried in the binary |
#![forbid(unsafe_code)]

pub mod admission;
pub mod apiserver;
pub mod auth;
pub mod cli;
pub mod controllers;
pub mod node;
pub mod programs;
pub mod scheduler;
pub mod schema;
pub mod server;
pub mod strategy;
