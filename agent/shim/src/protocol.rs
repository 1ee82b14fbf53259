//! Requests, replies and events of a shim. One JSON object a line; unknown fields are ignored, so that an agent of
//! another version can talk to a shim that outlived its predecessor.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Changes when an old shim could misunderstand a new agent.
pub const VERSION: u32 = 1;

/// Name of the shim's socket in the pod's folder.
pub const SOCKET: &str = "shim.sock";

/// Name of the file in the pod's folder that the shim is started with.
pub const POD_FILE: &str = "shim.json";

/// `argv[0]` with which the shim runs the agent's program to create a container.
pub const HELPER_NAME: &str = "coracle-create";

/// Descriptors that the helper finds open: why the program could not be executed goes to the first one, the others
/// are the container's standard streams (absent with a terminal).
pub const HELPER_STATUS_FD: i32 = 3;
pub const HELPER_STDIN_FD: i32 = 4;
pub const HELPER_STDOUT_FD: i32 = 5;
pub const HELPER_STDERR_FD: i32 = 6;

/// What a shim is told at its start.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Folder of the pod: socket, exit files, pinned namespaces in `ns/`.
    pub dir: PathBuf,
    /// Hostname of the new UTS namespace.
    pub hostname: String,
    /// Namespaces to make and pin: `net`, `ipc`, `uts`.
    pub namespaces: Vec<String>,
    /// Make and pin a process-id namespace whose init is a small reaper.
    pub shared_pid: bool,
    /// Set inside the new namespaces, `/proc/sys` names with dots.
    pub sysctls: BTreeMap<String, String>,
    /// `cgroup.procs` files that the shim itself joins.
    pub cgroup_procs: Vec<PathBuf>,
    /// `cgroup.procs` files that the init of a shared process-id namespace joins.
    pub init_cgroup_procs: Vec<PathBuf>,
}

/// One request; the reply carries the same id.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    pub id: u64,
    /// How many descriptors belong to this request.
    #[serde(default)]
    pub fds: usize,
    pub request: Request,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Who are you, and what runs?
    Hello,
    /// Create a container; descriptor 0 is the agent's program. Answers its pid.
    Create(Create),
    /// Let a created container execute its program. Answers when it does.
    Start { container: String },
    /// Signal a container's first process.
    Kill { container: String, signal: i32 },
    /// Run a command in a container. Descriptors: stdin, stdout, stderr; with `tty` one socket to which the
    /// terminal's master is sent. Answers the pid once the command executes; an [`Event::ExecExit`] follows.
    Exec(Box<Exec>),
    /// Signal a command and, with `SIGKILL`, all of its session that is left.
    KillExec { exec: String, signal: i32 },
    /// Connect to a container's streams. Descriptors in the order stdin, stdout, stderr, those that are true.
    Attach { container: String, stdin: bool, stdout: bool, stderr: bool },
    /// Size of a container's terminal.
    Resize { container: String, width: u16, height: u16 },
    /// Open the log file anew.
    ReopenLog { container: String },
    /// Forget an exited container.
    Forget { container: String },
    /// End when no container runs.
    Shutdown,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Create {
    pub container: String,
    /// Folder with the container's `config.json`; the helper writes its pid to `pid` there.
    pub bundle: PathBuf,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    /// Owner of the standard streams, so that an unprivileged program can open `/dev/stdout`.
    pub uid: u32,
    /// Wanted `oom_score_adj`; the nearest that the host allows is set.
    pub oom_score_adj: Option<i32>,
    /// `cgroup.procs` files that the container joins.
    pub cgroup_procs: Vec<PathBuf>,
    pub log: Option<LogSpec>,
}

/// Where a container's output goes, in the format of CRI.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSpec {
    pub path: PathBuf,
    /// Rotate beyond this size; 0 never rotates.
    pub max_bytes: u64,
    /// How many files to keep, the current one included.
    pub max_files: u32,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Exec {
    pub exec: String,
    pub container: String,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub tty: bool,
    pub capabilities: CapabilitySets,
    pub no_new_privileges: bool,
    pub rlimits: Vec<Rlimit>,
    /// A compiled seccomp filter to load.
    pub seccomp: Option<PathBuf>,
    pub oom_score_adj: Option<i32>,
    pub cgroup_procs: Vec<PathBuf>,
}

/// Capability numbers as bit masks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapabilitySets {
    pub bounding: u64,
    pub effective: u64,
    pub permitted: u64,
    pub inheritable: u64,
    pub ambient: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*` number.
    pub resource: u32,
    pub soft: u64,
    pub hard: u64,
}

/// What comes back over the socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    Reply { id: u64, result: Result<Answer, Failure> },
    Event(Event),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    NotFound,
    WrongState,
    Failed,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Answer {
    pub pid: Option<i32>,
    pub version: Option<u32>,
    pub containers: Vec<Report>,
    /// When it happened, nanoseconds since 1970.
    pub at: Option<u64>,
}

/// A container as its shim sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    pub container: String,
    pub pid: i32,
    pub started_at: Option<u64>,
    pub exit: Option<Exit>,
}

/// The end of a process. Also the content of `<container>.exit` in the pod's folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Exit {
    /// Exit code; 128 + signal when killed by one.
    pub code: i32,
    pub signal: i32,
    /// Nanoseconds since 1970.
    pub started_at: Option<u64>,
    pub finished_at: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    Exit { container: String, exit: Exit },
    ExecExit { exec: String, exit: Exit },
}
