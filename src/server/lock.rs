//! One server per data folder: a lock on its pid file.

use std::fs::{File, Permissions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

/// Holds the data folder for this process; released when dropped or when the process ends, however it ends.
pub struct DataDirLock {
    _file: Flock<File>,
}

/// The file that holds the pid of the server.
pub fn pid_file(data_dir: &Path) -> PathBuf {
    data_dir.join("server/coracle.pid")
}

impl DataDirLock {
    /// Makes the folder (0700) if need be and locks it.
    pub fn take(data_dir: &Path) -> anyhow::Result<DataDirLock> {
        let server = data_dir.join("server");
        std::fs::create_dir_all(&server)
            .with_context(|| format!("--data-dir {:?}: cannot make {}", data_dir.display(), server.display()))?;
        for dir in [data_dir, &server] {
            std::fs::set_permissions(dir, Permissions::from_mode(0o700))
                .with_context(|| format!("--data-dir {:?}: cannot restrict {}", data_dir.display(), dir.display()))?;
        }
        let path = pid_file(data_dir);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file =
            file.with_context(|| format!("--data-dir {:?}: cannot open {}", data_dir.display(), path.display()))?;
        let mut file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err((mut file, _)) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                bail!(
                    "--data-dir {:?}: in use by the server with pid {}; stop that one or choose another folder",
                    data_dir.display(),
                    pid.trim()
                );
            }
        };
        file.set_len(0)?;
        file.rewind()?;
        write!(&mut *file, "{}", std::process::id())?;
        Ok(DataDirLock { _file: file })
    }

    /// The pid of the running server of a data folder, if there is one.
    pub fn holder(data_dir: &Path) -> Option<i32> {
        let file = File::open(pid_file(data_dir)).ok()?;
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => None,
            Err((mut file, _)) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).ok()?;
                pid.trim().parse().ok()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_server_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(DataDirLock::holder(dir.path()), None);
        let lock = DataDirLock::take(dir.path()).unwrap();
        assert_eq!(DataDirLock::holder(dir.path()), Some(std::process::id() as i32));
        let text = DataDirLock::take(dir.path()).err().unwrap().to_string();
        assert!(text.contains(&format!("pid {}", std::process::id())), "{text}");
        drop(lock);
        assert_eq!(DataDirLock::holder(dir.path()), None);
        DataDirLock::take(dir.path()).unwrap();
    }

    #[test]
    fn an_unusable_folder_is_named() {
        let text = format!("{:#}", DataDirLock::take(Path::new("/proc/x")).err().unwrap());
        assert!(text.contains("--data-dir \"/proc/x\""), "{text}");
    }
}
