//! Who this member is: its id, kept in a small file, and the lock that keeps a second process out.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::files;

const FILE: &str = "member.json";
const LOCK: &str = "lock";

/// The identity of a member; made once, random.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub id: u64,
}

impl Member {
    /// Reads the identity in `dir`, or makes one when there is none.
    pub fn load(dir: &Path) -> io::Result<Member> {
        let path = dir.join(FILE);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let member = Member { id: rand::random::<u64>() >> 1 };
                files::write(&path, &serde_json::to_vec(&member)?)?;
                Ok(member)
            }
            Err(e) => Err(e),
        }
    }
}

/// Locks the directory for this process; None when another one holds it. Ends with the file.
pub(crate) fn lock(dir: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join(LOCK))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_stays() {
        let dir = tempfile::tempdir().unwrap();
        let member = Member::load(dir.path()).unwrap();
        assert_eq!(Member::load(dir.path()).unwrap(), member);
    }

    #[test]
    fn a_second_holder_is_refused_until_the_first_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let first = lock(dir.path()).unwrap();
        assert!(first.is_some());
        assert!(lock(dir.path()).unwrap().is_none());
        drop(first);
        assert!(lock(dir.path()).unwrap().is_some());
    }
}
