//! A disk of a host: a file system on a loop device. It can stall, fail for good, and lose its power.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::libc;

use crate::harness::run;

// ext4's "go down now": every later access fails, and nothing more reaches the device (include/uapi/linux/ext4.h).
nix::ioctl_read_bad!(ext4_shutdown, 0x8004_587d, libc::c_uint);
const NOTHING_MORE: libc::c_uint = 2;

/// A mounted disk. Dropping it unmounts it.
pub struct Disk {
    image: PathBuf,
    /// How often its power came back.
    lives: u32,
    pub at: PathBuf,
}

impl Disk {
    /// Makes a disk and mounts it at a folder that it makes.
    pub fn new(image: &Path, at: &Path) -> Disk {
        File::create(image).unwrap().set_len(1 << 30).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-F", "-E", "lazy_itable_init=1,nodiscard"]).arg(image));
        std::fs::create_dir_all(at).unwrap();
        let disk = Disk { image: image.to_owned(), lives: 0, at: at.to_owned() };
        disk.mount();
        disk
    }

    fn mount(&self) {
        run(Command::new("mount").args(["-o", "loop"]).arg(&self.image).arg(&self.at));
    }

    fn unmount(&self) {
        run(Command::new("umount").arg("--lazy").arg(&self.at));
    }

    /// From now on writes wait.
    pub fn stall(&self) {
        run(Command::new("fsfreeze").arg("-f").arg(&self.at));
    }

    /// They go on.
    pub fn go_on(&self) {
        run(Command::new("fsfreeze").arg("-u").arg(&self.at));
    }

    /// From now on every access fails; what had not been synced is lost.
    pub fn fail(&self) {
        let dir = File::open(&self.at).unwrap();
        let mut flag = NOTHING_MORE;
        // SAFETY: the kernel reads one integer that outlives the call.
        unsafe { ext4_shutdown(dir.as_raw_fd(), &raw mut flag) }.unwrap();
    }

    /// The power came back after it failed. What the device holds goes on in a copy: the failed file system lives on where
    /// somebody's mount namespace was made meanwhile.
    pub fn power_up(&mut self) {
        self.unmount();
        let copy = self.image.with_extension(format!("{}.img", self.lives));
        run(Command::new("cp").arg("--sparse=always").arg(&self.image).arg(&copy));
        std::fs::remove_file(&self.image).unwrap();
        self.image = copy;
        self.lives += 1;
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.at).output();
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
        let _ = std::fs::remove_file(&self.image);
    }
}
