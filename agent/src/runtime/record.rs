//! What is kept in files about sandboxes and containers, so that the next agent knows them.
//!
//! ```text
//! /run/coracle/<id>/boot_id              start of the kernel that all of this belongs to
//! /run/coracle/<id>/pods/<sandbox>/sandbox.json, shim.json, shim.sock, ns/{net,ipc,uts,pid}, shm/
//!                        <container>.exit                  written by the shim
//!                        <container>/container.json        this agent's record
//!                        <container>/{config.json,rootfs/,state/,pid,seccomp.bpf}
//! DATA/agent/containers/<container>/{upper,work}           the writable layer
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use coracle_shim::protocol::{CapabilitySets, Exit, Rlimit};
use serde::{Deserialize, Serialize};

use super::user::User;
use super::{ContainerConfig, PodSandboxConfig};

/// `sandbox.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxRecord {
    pub id: String,
    pub config: PodSandboxConfig,
    /// Nanoseconds since 1970.
    pub created_at: u64,
    pub ips: Vec<IpAddr>,
    /// Stopped by the kubelet; nothing of it runs.
    pub stopped: bool,
}

/// `container.json`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerRecord {
    pub id: String,
    pub sandbox: String,
    pub config: ContainerConfig,
    /// Nanoseconds since 1970.
    pub created_at: u64,
    /// Id of the image and how statuses name it.
    pub image_id: String,
    pub image_ref: String,
    /// Layers in use, as the image store wants them told.
    pub layers: String,
    pub stop_signal: String,
    pub cgroup: String,
    pub user: User,
    pub exec: ExecTemplate,
    /// How it ended; written when the agent has seen it.
    pub end: Option<End>,
}

/// What a command in the container starts from.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecTemplate {
    pub env: Vec<String>,
    pub cwd: String,
    pub capabilities: CapabilitySets,
    pub no_new_privileges: bool,
    pub rlimits: Vec<Rlimit>,
    pub seccomp: bool,
}

/// The end of a container as statuses show it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct End {
    pub exit: Exit,
    pub reason: String,
    pub message: String,
}

/// Writes a record whole or not at all.
pub fn save<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    fs::rename(temporary, path)
}

pub fn load<T: for<'de> Deserialize<'de>>(path: &Path) -> io::Result<T> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

pub fn time(nanos: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_nanos(nanos)
}

/// 64 random hexadecimal digits.
pub fn new_id() -> String {
    rand::random::<[u8; 32]>().iter().map(|byte| format!("{byte:02x}")).collect()
}
