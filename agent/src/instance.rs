//! The names that keep two instances on one machine apart: all derive from the data directory.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// One instance of Coracle on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    id: String,
}

impl Instance {
    /// The instance that owns `data_dir`. Symbolic links are resolved, so every spelling of a path names one instance;
    /// a path that does not exist yet is taken as it is, made absolute.
    #[must_use]
    pub fn of(data_dir: &Path) -> Self {
        let canonical = std::fs::canonicalize(data_dir)
            .or_else(|_| std::path::absolute(data_dir))
            .unwrap_or_else(|_| data_dir.to_owned());
        let digest = Sha256::digest(canonical.as_os_str().as_encoded_bytes());
        let id = digest[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { id }
    }

    /// First 8 hex digits of the SHA-256 of the canonical data directory.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// State that must not outlive a reboot: `/run/coracle/<id>`.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        Path::new("/run/coracle").join(&self.id)
    }

    /// Name of the instance's top cgroup and of its nftables table: `coracle-<id>`.
    #[must_use]
    pub fn scoped_name(&self) -> String {
        format!("coracle-{}", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_directory_are_one_instance() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        let real = dir.path().join("real");
        std::fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(Instance::of(&real), Instance::of(&link));
        assert_ne!(Instance::of(&real), Instance::of(dir.path()));
        assert_eq!(Instance::of(&real).id().len(), 8);
    }
}
