//! One entry of a volume as a mount of its own. A container may have put symbolic links into the volume, so the path is
//! walked by the kernel with the volume as its root limit, and what was found is pinned by a bind mount.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, mkdirat};

use super::VolumeError;

/// Checks `path` as upstream does.
///
/// # Errors
/// The message for the container's status.
pub fn check(path: &str) -> Result<(), String> {
    if path.starts_with('/') {
        return Err(format!("error SubPath `{path}` must not be an absolute path"));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(format!("unable to provision SubPath `{path}`: must not contain '..'"));
    }
    Ok(())
}

fn open_beneath(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Opens `path` below `root`, making folders that are missing with the volume's own mode.
fn open_or_create(root: &Path, path: &str) -> Result<OwnedFd, VolumeError> {
    let error = |what| move |errno: nix::Error| VolumeError::io(what, PathBuf::from(path))(errno.into());
    let volume =
        openat2(AT_FDCWD, root, OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC)).map_err(error("open"))?;
    match open_beneath(&volume, Path::new(path), OFlag::O_PATH) {
        Ok(found) => return Ok(found),
        Err(nix::Error::ENOENT) => {}
        Err(errno) => return Err(error("open")(errno)),
    }
    let mode = fs::metadata(root).map_err(VolumeError::io("stat", root))?.permissions().mode() & 0o7777;
    let mode = Mode::from_bits_truncate(mode);
    let mut current =
        open_beneath(&volume, Path::new("."), OFlag::O_PATH | OFlag::O_DIRECTORY).map_err(error("open"))?;
    let mut walked = PathBuf::new();
    for part in Path::new(path).components() {
        let Component::Normal(part) = part else { continue };
        walked.push(part);
        // Always from the volume: a link inside it may lead sideways, never out.
        match open_beneath(&volume, &walked, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(found) => current = found,
            Err(nix::Error::ENOENT) => {
                mkdirat(&current, part, mode).map_err(error("create"))?;
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
                let made = open_beneath(&current, Path::new(part), flags).map_err(error("open"))?;
                fchmod(&made, mode).map_err(error("chmod"))?;
                current = made;
            }
            Err(errno) => return Err(error("open")(errno)),
        }
    }
    Ok(current)
}

/// Binds the entry `path` of the volume at `root` to `target` and answers `target`; does nothing when it is bound.
///
/// # Errors
/// When the path leads out of the volume or the kernel refuses.
pub fn bind(root: &Path, path: &str, target: &Path) -> Result<PathBuf, VolumeError> {
    unbind(target)?;
    let found = open_or_create(root, path)?;
    let link = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    let is_dir = fs::metadata(&link).map_err(VolumeError::io("stat", root.join(path)))?.is_dir();
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent).map_err(VolumeError::io("create", parent))?;
    }
    if is_dir {
        fs::create_dir_all(target).map_err(VolumeError::io("create", target))?;
    } else {
        fs::File::create(target).map_err(VolumeError::io("create", target))?;
    }
    mount(Some(&link), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|errno| VolumeError::io("bind", target)(errno.into()))?;
    Ok(target.to_owned())
}

/// Takes a bind mount of [`bind`] away.
///
/// # Errors
/// When the kernel refuses.
pub fn unbind(target: &Path) -> Result<(), VolumeError> {
    match umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(errno) => return Err(VolumeError::io("unmount", target)(errno.into())),
    }
    match fs::symlink_metadata(target) {
        Ok(meta) if meta.is_dir() => fs::remove_dir(target).map_err(VolumeError::io("remove", target)),
        Ok(_) => fs::remove_file(target).map_err(VolumeError::io("remove", target)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(VolumeError::io("stat", target)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_sideways_but_never_out_of_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        fs::create_dir_all(volume.join("real")).unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        symlink("real", volume.join("inside")).unwrap();
        symlink("../outside", volume.join("out")).unwrap();
        symlink(dir.path().join("outside"), volume.join("absolute")).unwrap();
        open_or_create(&volume, "inside/made/deep").unwrap();
        assert!(volume.join("real/made/deep").is_dir());
        for path in ["out", "out/made", "absolute/made", "inside/../../outside"] {
            assert!(open_or_create(&volume, path).is_err(), "{path}");
        }
        assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
    }

    #[test]
    fn paths_that_cannot_be_meant_are_refused_with_upstreams_texts() {
        assert_eq!(check("/a").unwrap_err(), "error SubPath `/a` must not be an absolute path");
        assert_eq!(check("a/../b").unwrap_err(), "unable to provision SubPath `a/../b`: must not contain '..'");
        assert!(check("a/..b").is_ok());
    }
}
