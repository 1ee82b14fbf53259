//! The real kernel, in network namespaces that live as long as a thread of the test. Needs root; `nft` is used to see
//! that an administrator could read our tables.
//!
//! | module | what it holds |
//! | --- | --- |
//! | `space` | a network namespace with programs in it |
//! | `node` | a node |
//! | `services`, `dns`, `lifecycle` | stories of one node |
//! | `cluster` | stories of several nodes |

mod cluster;
mod dns;
mod lifecycle;
mod node;
mod services;
mod space;

use super::mailbox::Mailbox;
use super::proxy::Input;
use super::*;
use crate::watch::{Event, Object};
use node::{Host, World};
use space::Space;

const NODE: &str = "192.0.2.1";
const CLIENT: &str = "192.0.2.2";

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("skipped: needs root");
    }
    root
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn object(name: &str, json: &str) -> Object {
    Object {
        namespace: "n".into(),
        name: name.into(),
        uid: String::new(),
        json: bytes::Bytes::copy_from_slice(json.as_bytes()),
    }
}

const TCP_80: &str = r#""ports":[{"port":80,"protocol":"TCP","nodePort":30080}]"#;
const TO_8080: &str = r#"{"port":8080,"protocol":"TCP"}"#;

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// Waits for a condition that the kernel's notifications bring about.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}
