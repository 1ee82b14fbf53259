//! Builds the small programs that the binary carries: the shim of a pod and the program of the built-in image.
//!
//! They are Rust programs of this workspace with a profile of their own (size before speed, abort on panic), so a
//! nested cargo builds them, in a target folder of its own: the outer one is locked.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    for path in ["agent/shim", "Cargo.toml", "Cargo.lock", ".cargo/config.toml"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let variable = |name: &str| env::var(name).unwrap_or_else(|error| panic!("{name}: {error}"));
    let target = variable("TARGET");
    let out = PathBuf::from(variable("OUT_DIR"));
    // One for all profiles of the outer build.
    let folder = target_root(&out).unwrap_or(&out).join("shim");
    let status = Command::new(variable("CARGO"))
        .args([
            "build",
            "--package",
            "coracle-shim",
            "--bins",
            "--profile",
            "shim",
            "--target",
            &target,
            "--target-dir",
        ])
        .arg(&folder)
        .args(env::var_os("CARGO_NET_OFFLINE").map(|_| "--offline"))
        .current_dir(variable("CARGO_MANIFEST_DIR"))
        // The outer cargo's flags and wrappers are not for this build; it reads `.cargo/config.toml` itself.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("CARGO_INCREMENTAL")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("building the shim failed: {status}"),
        Err(error) => panic!("cargo could not be run: {error}"),
    }
    for (name, variable) in [("coracle-shim", "CORACLE_SHIM"), ("coracle-hello", "CORACLE_HELLO")] {
        println!("cargo::rustc-env={variable}={}", folder.join(&target).join("shim").join(name).display());
    }
}

/// The outer build's target folder: cargo marks it.
fn target_root(out: &Path) -> Option<&Path> {
    out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists())
}
