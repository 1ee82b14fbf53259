//! Files and folders of the node.

use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use k8s_openapi::api::core::v1::HostPathVolumeSource;

use super::VolumeError;

/// Checks the path, makes it when its type says so.
///
/// # Errors
/// When the path is not of its type.
pub fn set_up(source: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = Path::new(&source.path);
    let kind = source.type_.as_deref().unwrap_or_default();
    let found = fs::metadata(path);
    match kind {
        "" => return Ok(()),
        "DirectoryOrCreate" if found.is_err() => {
            fs::create_dir_all(path).map_err(VolumeError::io("create", path))?;
            return fs::set_permissions(path, fs::Permissions::from_mode(0o755))
                .map_err(VolumeError::io("chmod", path));
        }
        "FileOrCreate" if found.is_err() => {
            fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
                .map_err(VolumeError::io("create", path))?;
            return fs::set_permissions(path, fs::Permissions::from_mode(0o644))
                .map_err(VolumeError::io("chmod", path));
        }
        _ => {}
    }
    let kind_of = found.ok().map(|meta| meta.file_type());
    let (matches, what) = match kind {
        "Directory" | "DirectoryOrCreate" => (kind_of.is_some_and(|kind| kind.is_dir()), "directory"),
        "File" | "FileOrCreate" => (kind_of.is_some_and(|kind| kind.is_file()), "file"),
        "Socket" => (kind_of.is_some_and(|kind| kind.is_socket()), "socket file"),
        "CharDevice" => (kind_of.is_some_and(|kind| kind.is_char_device()), "character device"),
        "BlockDevice" => (kind_of.is_some_and(|kind| kind.is_block_device()), "block device"),
        other => {
            return Err(VolumeError::Invalid(format!("hostPath type check failed: {other} is an invalid volume type")));
        }
    };
    if matches {
        return Ok(());
    }
    Err(VolumeError::Invalid(format!("hostPath type check failed: {} is not a {what}", source.path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_decides_what_is_made_and_what_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str, kind: &str| HostPathVolumeSource {
            path: dir.path().join(name).display().to_string(),
            type_: Some(kind.to_owned()),
        };
        assert!(set_up(&at("d", "Directory")).is_err());
        set_up(&at("d", "DirectoryOrCreate")).unwrap();
        set_up(&at("d", "Directory")).unwrap();
        set_up(&at("f", "FileOrCreate")).unwrap();
        let refused = set_up(&at("f", "Directory")).unwrap_err().to_string();
        assert!(refused.ends_with("/f is not a directory"), "{refused}");
        set_up(&at("nothing", "")).unwrap();
    }
}
