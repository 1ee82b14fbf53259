//! Who this member is: its id and the incarnation of the cluster it belongs to, kept in a small file, and the lock that
//! keeps a second process out.
//!
//! A cluster has a random number that its members tell each other when they connect. A restore or a reset makes a new
//! incarnation with a new number and the list of those it replaces: a member of an old one that calls is told to start
//! over, and nothing of an old incarnation ever gets into the log of the new one.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::files;

const FILE: &str = "member.json";
const LOCK: &str = "lock";

/// The identity of a member; made once, random.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub id: u64,
    /// The incarnation of the cluster; None until the member is in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster: Option<u64>,
    /// Incarnations that this member left, or that its cluster took the place of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replaces: Vec<u64>,
}

impl Member {
    /// Reads the identity in `dir`, or makes one when there is none.
    pub fn load(dir: &Path) -> io::Result<Member> {
        match std::fs::read(dir.join(FILE)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let member = Member { id: random(), cluster: None, replaces: Vec::new() };
                member.save(dir)?;
                Ok(member)
            }
            Err(e) => Err(e),
        }
    }

    pub fn save(&self, dir: &Path) -> io::Result<()> {
        files::write(&dir.join(FILE), &serde_json::to_vec(self)?)
    }

    /// The same member in no cluster; it never goes back to the one it was in.
    pub fn leave(&mut self) {
        if let Some(old) = self.cluster.take()
            && !self.replaces.contains(&old)
        {
            self.replaces.push(old);
        }
    }

    /// The same member in a new incarnation of its cluster, which was `previous` as far as the data tells.
    pub fn reincarnate(&mut self, previous: Option<u64>) {
        for old in [self.cluster, previous].into_iter().flatten() {
            if !self.replaces.contains(&old) {
                self.replaces.push(old);
            }
        }
        self.cluster = Some(random());
    }
}

/// A number that nobody else has; the highest bit is free, for languages without unsigned integers.
pub(crate) fn random() -> u64 {
    (rand::random::<u64>() >> 1).max(1)
}

/// The id of the member whose data directory this is: made at the first call, never changed.
///
/// # Errors
/// The directory can't be made, read or written.
pub fn member_id(data_dir: &Path) -> io::Result<u64> {
    files::create_dir(data_dir)?;
    Ok(Member::load(data_dir)?.id)
}

/// The identity of a running member.
#[derive(Debug)]
pub(crate) struct Identity {
    dir: PathBuf,
    pub id: u64,
    member: RwLock<Member>,
}

impl Identity {
    pub fn new(dir: PathBuf, member: Member) -> Identity {
        Identity { dir, id: member.id, member: RwLock::new(member) }
    }

    pub fn cluster(&self) -> Option<u64> {
        self.member.read().cluster
    }

    /// Whether that incarnation belongs to this member's past.
    pub fn replaces(&self, cluster: u64) -> bool {
        self.member.read().replaces.contains(&cluster)
    }

    /// Joins a cluster, durably; a member that is in one already stays there. Whether it is in this one then.
    pub fn adopt(&self, cluster: u64) -> io::Result<bool> {
        let mut member = self.member.write();
        if let Some(own) = member.cluster {
            return Ok(own == cluster);
        }
        let joined = Member { cluster: Some(cluster), ..member.clone() };
        joined.save(&self.dir)?;
        *member = joined;
        Ok(true)
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

/// The lock of a directory, shared by all that write there.
#[derive(Debug)]
pub(crate) struct Hold {
    _file: File,
    // Dropped behind the file.
    _released: watch::Sender<()>,
}

impl Hold {
    /// The receiver sees its sender go once the lock is free again.
    pub fn new(lock: File) -> (Arc<Hold>, watch::Receiver<()>) {
        let (sender, released) = watch::channel(());
        (Arc::new(Hold { _file: lock, _released: sender }), released)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_stays() {
        let dir = tempfile::tempdir().unwrap();
        let id = member_id(&dir.path().join("db")).unwrap();
        assert_eq!(member_id(&dir.path().join("db")).unwrap(), id);
        let identity = Identity::new(dir.path().join("db"), Member::load(&dir.path().join("db")).unwrap());
        assert!(identity.adopt(5).unwrap());
        assert!(!identity.adopt(6).unwrap(), "another cluster came too late");
        let mut member = Member::load(&dir.path().join("db")).unwrap();
        assert_eq!((member.id, member.cluster), (id, Some(5)));
        member.reincarnate(Some(4));
        assert_eq!((member.id, &member.replaces[..]), (id, &[5, 4][..]));
        assert_ne!(member.cluster, Some(5));
    }

    #[test]
    fn a_file_of_the_first_version_is_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), r#"{"id":42}"#).unwrap();
        assert_eq!(Member::load(dir.path()).unwrap(), Member { id: 42, cluster: None, replaces: Vec::new() });
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
