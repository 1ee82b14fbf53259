//! Scratch space that lives as long as its pod.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_openapi::api::core::v1::EmptyDirVolumeSource;
use nix::mount::{MsFlags, mount};

use super::VolumeError;
use crate::kubelet::quantity;

/// Makes the folder, in memory when the source says so. `memory_limit` bounds what has no `sizeLimit`.
///
/// # Errors
/// When the node has no such medium or the kernel refuses.
pub fn set_up(path: &Path, source: &EmptyDirVolumeSource, memory_limit: Option<i64>) -> Result<(), VolumeError> {
    fs::create_dir_all(path).map_err(VolumeError::io("create", path))?;
    let mode = fs::Permissions::from_mode(0o777);
    match source.medium.as_deref().unwrap_or_default() {
        "" => {}
        "Memory" => {
            if is_mount_point(path)? {
                return Ok(());
            }
            let limit = source.size_limit.as_ref().map(quantity::value).filter(|bytes| *bytes > 0);
            let size = [limit, memory_limit].into_iter().flatten().min();
            let options = size.map_or_else(|| "mode=0777".to_owned(), |size| format!("mode=0777,size={size}"));
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str()))
                .map_err(|errno| VolumeError::io("mount tmpfs on", path)(errno.into()))?;
        }
        medium => return Err(VolumeError::Unsupported(format!("emptyDir medium {medium:?}"))),
    }
    fs::set_permissions(path, mode).map_err(VolumeError::io("chmod", path))
}

/// Whether something is mounted exactly here: the device differs from the parent's.
///
/// # Errors
/// When the path cannot be examined.
pub fn is_mount_point(path: &Path) -> Result<bool, VolumeError> {
    use std::os::unix::fs::MetadataExt;
    let own = fs::symlink_metadata(path).map_err(VolumeError::io("stat", path))?;
    let Some(parent) = path.parent() else { return Ok(true) };
    let above = fs::symlink_metadata(parent).map_err(VolumeError::io("stat", parent))?;
    Ok(own.dev() != above.dev())
}
