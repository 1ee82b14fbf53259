//! Taking an instance's runtime away, for `coracle uninstall`.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::cgroup::Hierarchy;
use super::sandbox::unmount_below;

/// Kills everything in the instance's cgroup (pods and shims), removes its mounts, its cgroups and `run_dir`.
///
/// Needs no agent and must not run beside one. Works from any network namespace; a mount namespace other than the
/// agent's keeps the agent's mounts out of reach.
pub fn purge(run_dir: &Path, cgroup: &str) -> Vec<std::io::Error> {
    let mut errors = Vec::new();
    if let Ok(cgroups) = Hierarchy::detect() {
        if !cgroups.kill(cgroup, Duration::from_secs(20)) {
            errors.push(std::io::Error::other(format!("processes of {cgroup} do not end")));
        }
        unmount_below(run_dir);
        errors.extend(cgroups.remove(cgroup).err());
    }
    unmount_below(run_dir);
    match fs::remove_dir_all(run_dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => errors.push(error),
        _ => {}
    }
    errors
}
