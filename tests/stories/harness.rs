//! Hosts made of network namespaces, servers on them, and kubectl. Everything that is made is removed by drop.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Retries a condition (a `Result<_, String>`; `?` works in it) until it holds; fails with its last words after the deadline (seconds).
#[macro_export]
macro_rules! assert_eventually {
    ($seconds:expr, $what:expr, $condition:expr) => {{
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs($seconds);
        #[allow(unused_mut, reason = "most conditions change nothing")]
        let mut attempt = || -> Result<_, String> { $condition };
        loop {
            match attempt() {
                Ok(value) => break value,
                Err(why) if std::time::Instant::now() > deadline => {
                    panic!("{} not within {} s: {}", $what, $seconds, why)
                }
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(50)),
            }
        }
    }};
}

/// The binary under test: `CORACLE_BIN`, else the one cargo built beside this test.
pub fn binary() -> PathBuf {
    std::env::var_os("CORACLE_BIN").map_or_else(|| env!("CARGO_BIN_EXE_coracle").into(), PathBuf::from)
}

/// Runs a command that must succeed.
pub fn run(command: &mut Command) -> Output {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Runs `ip`.
pub fn ip(args: &str) {
    run(Command::new("ip").args(args.split_whitespace()));
}

/// The first process of a pod's container, seen from the machine.
pub fn container_of(uid: &str) -> Result<u32, String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // What ends meanwhile is not found, which is right.
        if std::fs::read_to_string(entry.path().join("cgroup")).is_ok_and(|cgroups| cgroups.contains(uid)) {
            found.push(pid);
        }
    }
    found.into_iter().min().ok_or_else(|| "no process".to_owned())
}

/// What a process says of itself: a field of `/proc/PID/status`.
pub fn status_of(pid: u32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {field} in {status}")).trim().to_owned()
}

/// kill -9.
pub fn kill9(pid: u32) {
    run(Command::new("kill").arg("-9").arg(pid.to_string()));
}

/// A machine: a network namespace with an `eth0`, whose other end is in a second namespace that stands for the outside.
pub struct Host {
    inside: String,
    beyond: String,
    pub address: String,
}

impl Host {
    pub fn new() -> Host {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let host =
            Host { inside: format!("cst{pid}-{n}"), beyond: format!("cst{pid}-{n}o"), address: format!("10.77.{n}.1") };
        let Host { inside, beyond: outside, address } = &host;
        ip(&format!("netns add {inside}"));
        ip(&format!("netns add {outside}"));
        ip(&format!("-n {inside} link set lo up"));
        ip(&format!("-n {outside} link set lo up"));
        ip(&format!("-n {inside} link add eth0 type veth peer name eth0 netns {outside}"));
        ip(&format!("-n {inside} addr add {address}/24 dev eth0"));
        ip(&format!("-n {outside} addr add 10.77.{n}.2/24 dev eth0"));
        ip(&format!("-n {inside} link set eth0 up"));
        ip(&format!("-n {outside} link set eth0 up"));
        ip(&format!("-n {inside} route add default via 10.77.{n}.2"));
        host
    }

    fn enter(namespace: &str, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(program.as_ref());
        command
    }

    /// A command on the machine.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        Self::enter(&self.inside, program)
    }

    /// A command on another machine that reaches this one over its link.
    pub fn outside(&self, program: impl AsRef<Path>) -> Command {
        Self::enter(&self.beyond, program)
    }

    /// What is left of an instance in the machine's namespace: links but for its own, and nftables.
    pub fn leftovers(&self) -> String {
        let links = run(Command::new("ip").args(["-n", &self.inside, "-br", "link"]));
        let links = String::from_utf8_lossy(&links.stdout).into_owned();
        let links: String = links.lines().filter(|l| !l.starts_with("lo ") && !l.starts_with("eth0@")).collect();
        let tables = run(self.command("nft").args(["list", "tables"]));
        links + &String::from_utf8_lossy(&tables.stdout)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for namespace in [&self.inside, &self.beyond] {
            let _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
    }
}

/// A server with a data folder of its own. Dropping it uninstalls the instance.
pub struct Server {
    pub host: Host,
    pub dir: tempfile::TempDir,
    flags: Vec<String>,
    child: Option<Child>,
}

impl Server {
    /// Starts a server and waits until it is ready.
    pub fn start(flags: &[&str]) -> Server {
        let flags = flags.iter().map(ToString::to_string).collect();
        let dir = tempfile::Builder::new().prefix("coracle-story-").tempdir().unwrap();
        let mut server = Server { host: Host::new(), dir, flags, child: None };
        server.start_again();
        server
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// The command that runs the server, not started.
    pub fn command(&self) -> Command {
        let mut command = self.host.command(binary());
        command.arg("server").arg("--data-dir").arg(self.data_dir()).arg("--write-kubeconfig").arg(self.kubeconfig());
        command.args(["--node-name", "n1", "--config", "/dev/null"]).args(&self.flags);
        command
    }

    pub fn start_again(&mut self) {
        assert!(self.child.is_none());
        let log = std::fs::File::options().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let begin = Instant::now();
        loop {
            let exited = self.child.as_mut().and_then(|c| c.try_wait().unwrap());
            assert!(exited.is_none(), "the server has ended: {}", self.log());
            if self.kubectl_try(&["get", "--raw", "/readyz"]).is_ok() {
                return;
            }
            assert!(begin.elapsed() < Duration::from_secs(60), "not ready after 60 s: {}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("the server runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM; returns how long it took.
    pub fn stop(&mut self) -> Duration {
        let begin = Instant::now();
        let mut child = self.child.take().expect("the server runs");
        run(Command::new("kill").arg(child.id().to_string()));
        assert!(child.wait().unwrap().success(), "{}", self.log());
        begin.elapsed()
    }

    fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut command = self.host.command("kubectl");
        command.arg("--kubeconfig").arg(self.kubeconfig()).args(args);
        command.env("KUBECACHEDIR", self.dir.path().join("cache"));
        command
    }

    /// kubectl's standard output, or its standard error if it failed.
    pub fn kubectl_try(&self, args: &[&str]) -> Result<String, String> {
        let output = self.kubectl_command(args).stdin(Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// kubectl's standard output; it must succeed.
    pub fn kubectl(&self, args: &[&str]) -> String {
        self.kubectl_try(args).unwrap_or_else(|e| {
            let events = match args.first() {
                Some(&("rollout" | "wait")) => self.kubectl_try(&["get", "events", "-A", "--sort-by=.lastTimestamp"]),
                _ => Ok(String::new()),
            };
            panic!("kubectl {args:?}: {e}\n{}", events.unwrap_or_else(|e| e))
        })
    }

    /// Applies a manifest.
    pub fn apply(&self, yaml: &str) -> String {
        self.apply_try(yaml).unwrap_or_else(|e| panic!("kubectl apply: {e}"))
    }

    pub fn apply_try(&self, yaml: &str) -> Result<String, String> {
        use std::io::Write;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(yaml.as_bytes()).unwrap();
        self.kubectl_try(&["apply", "-f", &file.path().to_string_lossy()])
    }

    /// A page, from the machine itself or from outside.
    pub fn fetch(&self, url: &str, outside: bool) -> Result<String, String> {
        let mut command = if outside { self.host.outside("curl") } else { self.host.command("curl") };
        let output = command.args(["-sS", "-f", "--max-time", "3", url]).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    pub fn uninstall(&mut self) -> Output {
        let output = Command::new(binary()).arg("uninstall").arg("--data-dir").arg(self.data_dir()).output().unwrap();
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
        output
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the server's last words\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        self.uninstall();
    }
}
