//! Files that change all at once: each state is a folder of its own, `..data` links to the current one, and every
//! visible name is a link through `..data`. The layout is upstream's, containers depend on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use super::VolumeError;

const DATA: &str = "..data";
const DATA_NEW: &str = "..data_tmp";

/// One file of a payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Content.
    pub data: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// Owner, when it is not root.
    pub owner: Option<u32>,
}

/// Files by path relative to the volume.
pub type Payload = BTreeMap<String, File>;

/// Makes `target` show exactly `payload`. `prepare` sees the new folder before it becomes visible (ownership).
/// Does nothing when nothing changed; answers whether it did.
///
/// # Errors
/// When a path leads out of the volume or the file system fails; the old state stays visible then.
pub fn write(
    target: &Path,
    payload: &Payload,
    prepare: impl FnOnce(&Path) -> Result<(), VolumeError>,
) -> Result<bool, VolumeError> {
    for path in payload.keys() {
        check(path)?;
    }
    let current = match fs::read_link(target.join(DATA)) {
        Ok(link) => Some(target.join(link)),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(VolumeError::io("read link", target.join(DATA))(error)),
    };
    if current.as_deref().is_some_and(|current| is_current(current, payload)) {
        return Ok(false);
    }
    let fresh = make_folder(target)?;
    let written = write_files(&fresh, payload).and_then(|()| prepare(&fresh)).and_then(|()| show(target, &fresh));
    if let Err(error) = written {
        let _ = fs::remove_dir_all(&fresh);
        return Err(error);
    }
    link_names(target, payload)?;
    if let Some(current) = current {
        let _ = fs::remove_dir_all(current);
    }
    Ok(true)
}

/// A relative path without `..`, whose first part does not begin with `..`.
fn check(path: &str) -> Result<(), VolumeError> {
    let ok = !path.is_empty()
        && path.len() <= 4096
        && !path.starts_with("..")
        && Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
    if ok { Ok(()) } else { Err(VolumeError::Invalid(format!("invalid path: {path:?}"))) }
}

fn is_current(current: &Path, payload: &Payload) -> bool {
    let mut existing = BTreeSet::new();
    if collect(current, Path::new(""), &mut existing).is_err() {
        return false;
    }
    existing.len() == payload.len()
        && payload.iter().all(|(path, file)| {
            existing.contains(Path::new(path)) && fs::read(current.join(path)).is_ok_and(|data| data == file.data)
        })
}

fn collect(root: &Path, below: &Path, into: &mut BTreeSet<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(root.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            collect(root, &path, into)?;
        } else {
            into.insert(path);
        }
    }
    Ok(())
}

fn make_folder(target: &Path) -> Result<PathBuf, VolumeError> {
    let now = k8s_openapi::jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S").to_string();
    loop {
        let path = target.join(format!("..{now}.{}", rand::random_range(1_u32 << 16..u32::MAX)));
        match fs::create_dir(&path) {
            Ok(()) => {
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
                    .map_err(VolumeError::io("chmod", &path))?;
                return Ok(path);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(VolumeError::io("create", path)(error)),
        }
    }
}

fn write_files(folder: &Path, payload: &Payload) -> Result<(), VolumeError> {
    for (path, file) in payload {
        let full = folder.join(path);
        if let Some(parent) = full.parent() {
            fs::create_dir_all(parent).map_err(VolumeError::io("create", parent))?;
        }
        let mut open = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(file.mode)
            .open(&full)
            .map_err(VolumeError::io("create", &full))?;
        open.write_all(&file.data).map_err(VolumeError::io("write", &full))?;
        // The process's umask must not show.
        open.set_permissions(fs::Permissions::from_mode(file.mode)).map_err(VolumeError::io("chmod", &full))?;
        if let Some(owner) = file.owner {
            std::os::unix::fs::chown(&full, Some(owner), None).map_err(VolumeError::io("chown", &full))?;
        }
    }
    Ok(())
}

/// The switch: one rename.
fn show(target: &Path, fresh: &Path) -> Result<(), VolumeError> {
    let name = fresh.file_name().unwrap_or_default();
    let temporary = target.join(DATA_NEW);
    let _ = fs::remove_file(&temporary);
    symlink(name, &temporary).map_err(VolumeError::io("link", &temporary))?;
    fs::rename(&temporary, target.join(DATA)).map_err(VolumeError::io("rename", temporary))
}

fn link_names(target: &Path, payload: &Payload) -> Result<(), VolumeError> {
    let wanted: BTreeSet<&str> = payload.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &wanted {
        let link = target.join(name);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new(DATA).join(name), &link).map_err(VolumeError::io("link", link))?;
        }
    }
    let entries = fs::read_dir(target).map_err(VolumeError::io("list", target))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if !name.starts_with("..") && !wanted.contains(name.as_ref()) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> File {
        File { data: text.as_bytes().to_vec(), mode: 0o644, owner: None }
    }

    #[test]
    fn a_new_state_shows_all_at_once_and_leaves_nothing_of_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let first: Payload = [("a".to_owned(), file("1")), ("d/b".to_owned(), file("2"))].into();
        assert!(write(dir.path(), &first, |_| Ok(())).unwrap());
        assert!(!write(dir.path(), &first, |_| Ok(())).unwrap());
        assert_eq!(fs::read_to_string(dir.path().join("d/b")).unwrap(), "2");
        assert_eq!(fs::read_link(dir.path().join("a")).unwrap(), Path::new("..data/a"));

        let second: Payload = [("a".to_owned(), file("3"))].into();
        assert!(write(dir.path(), &second, |_| Ok(())).unwrap());
        assert_eq!(fs::read_to_string(dir.path().join("a")).unwrap(), "3");
        assert!(fs::symlink_metadata(dir.path().join("d")).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn no_path_leads_out_of_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/x", "a/../../x", "..x", ""] {
            let payload: Payload = [(path.to_owned(), file("1"))].into();
            assert!(write(dir.path(), &payload, |_| Ok(())).is_err(), "{path}");
        }
    }
}
