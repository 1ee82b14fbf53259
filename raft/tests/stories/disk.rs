//! A file system on a loop device: what reached the device is known, to the byte.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Makes an image with an empty file system whose set-up is complete (nothing is written later in the background).
pub fn make(image: &Path, mib: u64) {
    assert!(nix::unistd::geteuid().is_root(), "mounting file systems needs root");
    std::fs::File::create(image).unwrap().set_len(mib << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0"]).arg(image));
}

/// A mounted image; unmounted when dropped, also by a failing test.
pub struct Mounted {
    pub at: PathBuf,
}

impl Mounted {
    pub fn new(image: &Path, at: &Path) -> Mounted {
        std::fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(at));
        Mounted { at: at.to_path_buf() }
    }

    /// Bytes written to the device and flushes asked of it since it was set up.
    pub fn written(&self) -> (u64, u64) {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let at = self.at.to_str().unwrap();
        let line = mounts.lines().find(|line| line.split(' ').nth(1) == Some(at)).unwrap();
        let device = line.split(' ').next().unwrap().trim_start_matches("/dev/");
        let stat = std::fs::read_to_string(format!("/sys/block/{device}/stat")).unwrap();
        let fields: Vec<u64> = stat.split_whitespace().map(|field| field.parse().unwrap()).collect();
        (fields[6] * 512, fields.get(15).copied().unwrap_or(0))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.at));
    }
}

pub fn run(command: &mut Command) {
    let status = command.status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
