//! `coracle uninstall`: stops an instance and removes everything it made. Goes on after errors and reports them all.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::bail;
use coracle_agent::instance::Instance;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::args::{DATA_DIR, KUBECONFIG, UninstallArgs};
use super::kubectl;
use crate::server::lock::DataDirLock;
use crate::server::{admin_kubeconfig, user_kubeconfig_link};

const UNITS: &str = "/etc/systemd/system";
const BINARY: &str = "/usr/local/bin/coracle";
/// How long a server may take to stop before it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// Runs the command.
pub fn run(args: UninstallArgs) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("uninstall needs root: run it with sudo");
    }
    let whole = args.data_dir.is_none();
    let data_dir = args.data_dir.unwrap_or_else(|| PathBuf::from(DATA_DIR));
    if !whole && !data_dir.exists() {
        bail!("--data-dir {:?}: there is no such folder", data_dir.display());
    }
    let mut errors = Vec::new();
    if whole {
        stop_units(&mut errors);
    }
    // The name of an instance follows from its folder, so it is taken before the folder goes.
    let instance = Instance::of(&data_dir);
    stop_server(&data_dir, &mut errors);
    let say = |errors: &mut Vec<String>, error: anyhow::Error| errors.push(super::explain(&error));
    for error in coracle_agent::runtime::purge(&instance.run_dir(), &instance.scoped_name()) {
        say(&mut errors, error.into());
    }
    for error in coracle_agent::net::teardown(instance.id(), &data_dir.join("agent")) {
        say(&mut errors, error.into());
    }
    if let Err(error) = unmount_below(&data_dir) {
        errors.push(error);
    }
    if let Some(kubeconfig) = own_kubeconfig(&data_dir) {
        remove(&kubeconfig, &mut errors);
    }
    remove(&data_dir, &mut errors);
    if whole {
        for path in [Path::new(KUBECONFIG).parent().unwrap_or(Path::new("/etc/coracle")), Path::new(BINARY)] {
            remove(path, &mut errors);
        }
    }
    // Shared by all instances: it goes with the last one.
    let _ = std::fs::remove_dir("/run/coracle");
    if errors.is_empty() {
        println!("removed the instance of {}", data_dir.display());
        return Ok(ExitCode::SUCCESS);
    }
    for error in &errors {
        eprintln!("coracle: {error}");
    }
    Ok(ExitCode::FAILURE)
}

/// The kubeconfig that the server wrote for its user, unless another cluster has written there since.
fn own_kubeconfig(data_dir: &Path) -> Option<PathBuf> {
    let path = std::fs::read_link(user_kubeconfig_link(data_dir)).ok()?;
    let authority = |path: &Path| {
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().map(str::trim).find(|line| line.starts_with("certificate-authority-data:")).map(str::to_owned)
    };
    let ours = authority(&admin_kubeconfig(data_dir))?;
    (authority(&path)? == ours).then_some(path)
}

/// The units that install.sh made for the installed binary: `coracle`, `coracle-agent` or another name.
fn units(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let ours = |path: &Path| {
        let start = format!("ExecStart={BINARY} ");
        std::fs::read_to_string(path).is_ok_and(|text| text.lines().any(|line| line.starts_with(&start)))
    };
    let names = entries.flatten().filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        (name.starts_with("coracle") && name.ends_with(".service") && ours(&entry.path())).then_some(name)
    });
    names.collect()
}

fn stop_units(errors: &mut Vec<String>) {
    let units = units(Path::new(UNITS));
    let systemctl = kubectl::find("systemctl");
    let control = |args: &[&str]| {
        if let Some(systemctl) = &systemctl {
            let _ = Command::new(systemctl).args(args).output();
        }
    };
    for unit in &units {
        control(&["disable", "--now", unit]);
        control(&["reset-failed", unit]);
        for path in [format!("{UNITS}/{unit}"), format!("{UNITS}/{unit}.env")] {
            remove(Path::new(&path), errors);
        }
    }
    if !units.is_empty() {
        control(&["daemon-reload"]);
    }
}

fn stop_server(data_dir: &Path, errors: &mut Vec<String>) {
    let Some(pid) = DataDirLock::holder(data_dir) else { return };
    println!("stopping the server with pid {pid}");
    let begin = Instant::now();
    let mut signal = Signal::SIGTERM;
    while DataDirLock::holder(data_dir) == Some(pid) {
        if begin.elapsed() > STOP_PATIENCE {
            signal = Signal::SIGKILL;
        }
        if begin.elapsed() > 2 * STOP_PATIENCE {
            errors.push(format!("the server with pid {pid} does not end"));
            return;
        }
        if begin.elapsed() < Duration::from_millis(10) || signal == Signal::SIGKILL {
            let _ = kill(Pid::from_raw(pid), signal);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Unmounts what is mounted below a folder, innermost first.
fn unmount_below(dir: &Path) -> Result<(), String> {
    let dir = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("read the mounts: {e}"))?;
    let below =
        mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).filter(|path| path.starts_with(&dir));
    let mut below: Vec<PathBuf> = below.collect();
    below.reverse();
    for path in below {
        let flags = nix::mount::MntFlags::MNT_DETACH;
        nix::mount::umount2(&path, flags).map_err(|e| format!("unmount {}: {e}", path.display()))?;
    }
    Ok(())
}

/// Paths in mountinfo have octal escapes for white space and backslashes.
fn unescape(text: &str) -> PathBuf {
    let text = text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\");
    PathBuf::from(text)
}

fn remove(path: &Path, errors: &mut Vec<String>) {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => errors.push(format!("remove {}: {error}", path.display())),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_units_of_the_installed_binary_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("coracle.service", "[Service]\nExecStart=/usr/local/bin/coracle server \n");
        write("coracle-agent.service", "[Service]\nExecStart=/usr/local/bin/coracle agent '--node-name=a'\n");
        write("coracle-other.service", "[Service]\nExecStart=/opt/bin/coracle server\n");
        write("coracles.service.env", "ExecStart=/usr/local/bin/coracle server\n");
        write("else.service", "[Service]\nExecStart=/usr/local/bin/coracle server\n");
        let mut found = units(dir.path());
        found.sort();
        assert_eq!(found, ["coracle-agent.service", "coracle.service"]);
    }

    #[test]
    fn escaped_paths_are_read_back() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
    }
}
