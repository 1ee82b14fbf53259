//! `fsGroup`: a volume belongs to the pod's group.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use super::VolumeError;

const READ_WRITE: u32 = 0o660;
const READ_ONLY: u32 = 0o440;
const ENTER: u32 = 0o110;
const SET_GROUP_ID: u32 = 0o2000;

/// Gives everything below `root` (and it) to `group`, with the group's permissions; new files inherit the group.
///
/// # Errors
/// When the file system refuses.
pub fn give(root: &Path, group: u32, read_only: bool) -> Result<(), VolumeError> {
    let meta = fs::symlink_metadata(root).map_err(VolumeError::io("stat", root))?;
    lchown(root, None, Some(group)).map_err(VolumeError::io("chown", root))?;
    if meta.file_type().is_symlink() {
        return Ok(());
    }
    let mut mask = if read_only { READ_ONLY } else { READ_WRITE };
    if meta.is_dir() {
        mask |= SET_GROUP_ID | ENTER;
        for entry in fs::read_dir(root).map_err(VolumeError::io("list", root))? {
            let entry = entry.map_err(VolumeError::io("list", root))?;
            give(&entry.path(), group, read_only)?;
        }
    }
    let mode = fs::Permissions::from_mode((meta.mode() & 0o7777) | mask);
    fs::set_permissions(root, mode).map_err(VolumeError::io("chmod", root))
}

/// Whether the top of the volume already is as [`give`] leaves it (`fsGroupChangePolicy: OnRootMismatch`).
pub fn is_given(root: &Path, group: u32, read_only: bool) -> bool {
    let mask = if read_only { READ_ONLY } else { READ_WRITE } | SET_GROUP_ID | ENTER;
    fs::symlink_metadata(root).is_ok_and(|meta| meta.gid() == group && meta.mode() & mask == mask)
}
