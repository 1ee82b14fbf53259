//! Stories about the whole program: real servers in network namespaces, upstream's kubectl, and what a user would see.
//! Needs root; `CORACLE_BIN` names the binary (default: the one built with these tests).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;

mod bad_input;
mod cluster;
mod healing;
mod install;
mod kubectl;
mod network;
mod uninstall;
mod web;
