//! Kernel settings that the network needs, and what they were before.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::NetworkError;
use super::ipam::write_by_rename;

const ROOT: &str = "/proc/sys";

/// Settings changed by one instance in the network namespace that it runs in; kept in a file below the data directory.
#[derive(Debug)]
pub struct Sysctls {
    file: PathBuf,
}

/// A changed setting: what it was and what it was set to.
type Changed = BTreeMap<String, (String, String)>;

impl Sysctls {
    /// `file` need not exist.
    pub fn new(file: PathBuf) -> Self {
        Self { file }
    }

    /// Sets `name` (a path below `/proc/sys`) unless it has that value; remembers the old one before. Acts on the
    /// network namespace of the calling thread.
    pub fn set(&self, name: &str, value: &str) -> Result<(), NetworkError> {
        let path = Path::new(ROOT).join(name);
        let failed = |source| NetworkError::Kernel { step: format!("set {name} to {value}"), source };
        let old = std::fs::read_to_string(&path).map_err(failed)?.trim().to_owned();
        if old == value {
            return Ok(());
        }
        let mut changed = self.read();
        changed.entry(name.to_owned()).or_insert_with(|| (old, value.to_owned()));
        write_by_rename(&self.file, &changed).map_err(|source| NetworkError::Storage {
            step: "write",
            path: self.file.clone(),
            source,
        })?;
        std::fs::write(&path, value).map_err(failed)
    }

    /// Puts back what was, where nobody else has changed it since. Gathers errors.
    pub fn restore(&self) -> Vec<NetworkError> {
        let mut errors = Vec::new();
        for (name, (old, set)) in self.read() {
            let path = Path::new(ROOT).join(&name);
            let result = std::fs::read_to_string(&path)
                .and_then(|now| if now.trim() == set { std::fs::write(&path, &old) } else { Ok(()) });
            match result {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    errors.push(NetworkError::Kernel { step: format!("restore {name}"), source });
                }
                _ => {}
            }
        }
        if let Err(source) = std::fs::remove_file(&self.file)
            && source.kind() != io::ErrorKind::NotFound
        {
            errors.push(NetworkError::Storage { step: "remove", path: self.file.clone(), source });
        }
        errors
    }

    fn read(&self) -> Changed {
        std::fs::read(&self.file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }
}
