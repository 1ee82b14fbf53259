//! `install.sh`, piped into a shell from a web server as its users do it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::assert_eventually;
use crate::harness::{Host, binary};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/install.sh");
const ARCH: &str = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };

/// A machine without Coracle, and a web server beyond it that has a release.
struct Machine {
    host: Host,
    dir: tempfile::TempDir,
    web: Child,
}

impl Machine {
    fn new() -> Machine {
        let host = Host::new();
        let dir = tempfile::Builder::new().prefix("coracle-install-").tempdir().unwrap();
        std::fs::create_dir(dir.path().join("www")).unwrap();
        let mut web = host.outside("busybox");
        web.args(["httpd", "-f", "-p", "8000", "-h"]).arg(dir.path().join("www")).stdin(Stdio::null());
        let machine = Machine { web: web.spawn().unwrap(), dir, host };
        assert_eventually!(10, "the web server listens", {
            let url = machine.url();
            let probe = machine.host.command("curl").args(["-s", "--max-time", "2", &url]).output().unwrap();
            if probe.status.success() { Ok(()) } else { Err(format!("{probe:?}")) }
        });
        machine
    }

    fn url(&self) -> String {
        let beyond = self.host.address.trim_end_matches('1').to_owned() + "2";
        format!("http://{beyond}:8000/")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a release on the web server: the binary under test, with a few bytes more.
    fn publish(&self, more: &str) {
        let mut bytes = std::fs::read(binary()).unwrap();
        bytes.extend_from_slice(more.as_bytes());
        let file = self.path("www").join(format!("coracle-linux-{ARCH}"));
        std::fs::write(&file, bytes).unwrap();
        let sum = Command::new("sha256sum").arg(&file).output().unwrap();
        std::fs::write(file.with_extension("sha256"), sum.stdout).unwrap();
    }

    /// `curl … | SHELL -s - ARGS` with settings; its output, or what it complains about.
    fn install(&self, shell: &[&str], settings: &[(&str, &str)], args: &[&str]) -> Result<String, String> {
        self.run(&[shell, &["-s", "-"], args].concat(), settings)
    }

    /// The script on standard input of a command, with settings; its output, or what it complains about.
    fn run(&self, line: &[&str], settings: &[(&str, &str)]) -> Result<String, String> {
        let mut command = self.host.command("env");
        command.args(line).current_dir(self.dir.path());
        command.stdin(std::fs::File::open(SCRIPT).unwrap());
        for (name, path) in [
            ("INSTALL_CORACLE_BIN_DIR", "bin"),
            ("INSTALL_CORACLE_SYSTEMD_DIR", "systemd"),
            ("CORACLE_DATA_DIR", "data"),
            ("CORACLE_KUBECONFIG_OUTPUT", "kubeconfig"),
        ] {
            command.env(name, self.path(path));
        }
        command.env("INSTALL_CORACLE_SKIP_SYSTEMD", "true").env("INSTALL_CORACLE_URL", self.url());
        command.env("CORACLE_CONFIG_FILE", "/dev/null").envs(settings.iter().copied());
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    fn pid(&self) -> String {
        std::fs::read_to_string(self.path("data/server/coracle.pid")).unwrap().trim().to_owned()
    }

    fn installed(&self) -> bool {
        self.path("bin/coracle").exists() || self.path("bin/coracle.new").exists()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.path("data").exists() {
            let _ = Command::new(binary()).arg("uninstall").arg("--data-dir").arg(self.path("data")).output();
        }
        let _ = self.web.kill();
        let _ = self.web.wait();
    }
}

fn inode(path: &Path) -> u64 {
    path.metadata().unwrap().ino()
}

#[test]
fn a_second_run_changes_nothing_and_an_upgrade_restarts() {
    let machine = Machine::new();
    machine.publish("1");
    let server = ["--disable-agent", "--node-label=note=it's a \"$HOME\""];
    let refused = machine.install(&["dash"], &[], &server).unwrap_err();
    assert!(refused.contains(r#"note=it's a \"$HOME\""#), "arguments arrive as they were given: {refused}");

    let server = ["--disable-agent", "--node-name=given"];
    let first = machine.install(&["busybox", "sh"], &[], &server).unwrap();
    assert!(first.contains("is up to date") && first.contains("the administrator's kubeconfig is"), "{first}");
    let (pid, binary) = (machine.pid(), inode(&machine.path("bin/coracle")));
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    assert!(String::from_utf8_lossy(&command).contains("--node-name=given"));

    let second = machine.install(&["dash"], &[], &server).unwrap();
    assert!(second.contains("nothing has changed"), "{second}");
    assert_eq!((machine.pid(), inode(&machine.path("bin/coracle"))), (pid.clone(), binary));

    machine.publish("2");
    let third = machine.install(&["dash"], &[], &server).unwrap();
    assert!(third.contains("installed") && third.contains("stopping the running server"), "{third}");
    assert_ne!(machine.pid(), pid);
    assert!(std::fs::read(machine.path("bin/coracle")).unwrap().ends_with(b"2"));
    let executable = std::fs::read_link(format!("/proc/{}/exe", machine.pid())).unwrap();
    assert_eq!(executable, machine.path("bin/coracle"));
}

#[test]
fn a_download_that_is_not_right_installs_nothing() {
    let machine = Machine::new();
    let missing = machine.install(&["dash"], &[], &[]).unwrap_err();
    assert!(missing.contains(&format!("coracle-linux-{ARCH}.sha256 failed; nothing was installed")), "{missing}");

    machine.publish("1");
    let file = machine.path("www").join(format!("coracle-linux-{ARCH}"));
    std::fs::write(&file, "half of i").unwrap();
    let wrong = machine.install(&["busybox", "sh"], &[], &[]).unwrap_err();
    assert!(wrong.contains("the download's SHA-256 is"), "{wrong}");

    std::fs::remove_file(&file).unwrap();
    let missing = machine.install(&["dash"], &[], &[]).unwrap_err();
    assert!(missing.contains(&format!("coracle-linux-{ARCH} failed; nothing was installed")), "{missing}");

    std::fs::write(file.with_extension("sha256"), "<html>not found</html>").unwrap();
    let page = machine.install(&["dash"], &[], &[]).unwrap_err();
    assert!(page.contains("does not hold a SHA-256 sum"), "{page}");
    assert!(!machine.installed());
}

#[test]
fn what_cannot_work_is_said_before_anything_is_installed() {
    let machine = Machine::new();
    machine.publish("1");
    let url = ("CORACLE_URL", "https://10.0.0.1:6443");
    let no_token = machine.install(&["dash"], &[url], &[]).unwrap_err();
    assert!(no_token.contains("neither CORACLE_TOKEN nor CORACLE_TOKEN_FILE is"), "{no_token}");
    let plain = [("CORACLE_URL", "http://10.0.0.1:6443"), ("CORACLE_TOKEN", "K10x::server:y")];
    let plain = machine.install(&["dash"], &plain, &[]).unwrap_err();
    assert!(plain.contains("expected https://SERVER:6443"), "{plain}");
    let alone = machine.install(&["dash"], &[], &["agent"]).unwrap_err();
    assert!(alone.contains("an agent needs a server to join"), "{alone}");
    let unknown = machine.install(&["dash"], &[], &["sever"]).unwrap_err();
    assert!(unknown.contains("unknown command sever"), "{unknown}");
    let quickstart = machine.install(&["dash"], &[], &["--quickstart"]).unwrap_err();
    assert!(quickstart.contains("run it in a checkout"), "{quickstart}");
    let elsewhere = [("INSTALL_CORACLE_SKIP_DOWNLOAD", "true")];
    let nothing = machine.install(&["dash"], &elsewhere, &[]).unwrap_err();
    assert!(nothing.contains("there is no"), "{nothing}");
    assert!(!machine.installed());
}

#[test]
fn a_quick_start_that_gives_up_says_what_stands_in_the_way() {
    let machine = Machine::new();
    machine.publish("1");
    let line = ["dash", SCRIPT, "--quickstart", "--node-taint=reserved=true:NoSchedule"];
    let error = machine.run(&line, &[("INSTALL_CORACLE_PATIENCE", "10")]).unwrap_err();
    assert!(error.contains("  0/1 nodes are available: 1 node(s) had untolerated taint(s)"), "{error}");
    assert!(error.contains("gave up waiting for 3 pods to be available after 10 s"), "{error}");
}
