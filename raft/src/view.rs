//! The materialised state on disk: which sled directory is used, and whether it can be trusted.
//!
//! sled is never trusted with durability. Its directory is used again only when a marker file says that it was closed
//! cleanly (everything synced by us), or that the kernel has not restarted since it was opened (its page cache is then
//! the truth). Anything else, a sled that fails or panics at open, a state that doesn't fit the log, or a directory that
//! has grown beyond three times the live data, leads to a fresh directory filled from the snapshot; the log does the rest.

use std::fs::{self, File};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use coracle_store::{Options, Store, StoreError, Writer};
use serde::{Deserialize, Serialize};

use crate::applied::Applied;
use crate::files;
use crate::snapshot::{Reader, SnapshotError, SnapshotFile};
use crate::wal::{LogId, Wal};

/// Where the state lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// In memory: rebuilt from snapshot and log at each start.
    Memory,
    /// In a sled directory with a page cache of so many bytes.
    Sled {
        /// Bytes of sled's page cache.
        cache_capacity: u64,
    },
}

/// The state couldn't be opened or rebuilt.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The operating system refused.
    #[error("{action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
    /// The engine refused a fresh directory.
    #[error("opening the state")]
    Store(#[from] StoreError),
    /// The snapshot to rebuild from can't be read.
    #[error("rebuilding the state from the snapshot")]
    Snapshot(#[from] SnapshotError),
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ViewError {
    let path = path.to_path_buf();
    move |source| ViewError::Io { action, path, source }
}

/// A sled directory below this size is not worth rebuilding.
const MIN_REBUILD: u64 = 64 << 20;
const MARKER: &str = "view.json";
const PREFIX: &str = "view-";

#[derive(Debug, Serialize, Deserialize)]
struct Marker {
    directory: String,
    boot_id: String,
    clean: bool,
}

/// An open state.
pub(crate) struct Opened {
    pub store: Store,
    pub writer: Writer,
    pub applied: Applied,
    pub view: View,
}

/// The directory that belongs to an open state; does the marking. In memory there is none.
#[derive(Clone, Debug)]
pub(crate) struct View {
    parent: PathBuf,
    boot_id: String,
    directory: Option<String>,
}

impl View {
    /// The state may be used at the next start: everything was handed to the operating system. Nothing may be written
    /// to it any more.
    pub fn close_cleanly(&self) -> Result<(), ViewError> {
        let Some(directory) = &self.directory else { return Ok(()) };
        let path = self.parent.join(directory);
        sync_tree(&path).map_err(io_error("syncing", &path))?;
        self.mark(directory, true)
    }

    fn mark(&self, directory: &str, clean: bool) -> Result<(), ViewError> {
        let path = self.parent.join(MARKER);
        let marker = Marker { directory: directory.to_owned(), boot_id: self.boot_id.clone(), clean };
        let json = serde_json::to_vec(&marker).map_err(|error| io_error("encoding", &path)(error.into()))?;
        files::write(&path, &json).map_err(io_error("writing", &path))
    }

    /// The state must not be used again.
    pub fn distrust(&self) {
        if self.directory.is_none() {
            return;
        }
        if let Err(error) = fs::remove_file(self.parent.join(MARKER)) {
            tracing::warn!(%error, "removing the marker of a broken state failed");
        }
    }
}

/// Opens the state in `parent`, or rebuilds it as of `snapshot` (empty without one). `boot_id` is the kernel's id of this
/// boot.
pub(crate) fn open(
    parent: &Path,
    backend: &Backend,
    boot_id: String,
    snapshot: Option<&SnapshotFile>,
    wal: &Wal,
) -> Result<Opened, ViewError> {
    let mut view = View { parent: parent.to_path_buf(), boot_id, directory: None };
    let Backend::Sled { cache_capacity } = *backend else {
        return fill(Store::open(Options::memory())?, snapshot, view);
    };
    let options = |directory: &str| Options {
        backend: coracle_store::Backend::Sled { dir: parent.join(directory), cache_capacity },
        ..Options::sled(parent)
    };
    if let Some(marker) = read_marker(parent)
        && (marker.clean || marker.boot_id == view.boot_id)
    {
        // A power cut from here on must not find the word "clean".
        view.mark(&marker.directory, false)?;
        let reopening = || reopen(options(&marker.directory), snapshot, wal);
        match catch_unwind(AssertUnwindSafe(reopening)).unwrap_or(Err("reading it panicked")) {
            Ok((store, writer, applied)) => {
                remove_others(parent, &marker.directory);
                view.directory = Some(marker.directory);
                return Ok(Opened { store, writer, applied, view });
            }
            Err(reason) => tracing::info!(reason, "rebuilding the state from snapshot and log"),
        }
    }
    let directory = fresh_name(parent)?;
    view.directory = Some(directory.clone());
    let opened = fill(Store::open(options(&directory))?, snapshot, view)?;
    opened.view.mark(&directory, false)?;
    remove_others(parent, &directory);
    Ok(opened)
}

fn fill(
    (store, mut writer): (Store, Writer),
    snapshot: Option<&SnapshotFile>,
    view: View,
) -> Result<Opened, ViewError> {
    let mut applied = Applied::default();
    if let Some(snapshot) = snapshot {
        let reader = Reader::open(&snapshot.path)?;
        writer.restore::<SnapshotError>(reader.meta.clone(), reader)?;
        applied = snapshot.applied.clone();
    }
    Ok(Opened { store, writer, applied, view })
}

/// The state as it was left, or why it can't be used.
fn reopen(
    options: Options,
    snapshot: Option<&SnapshotFile>,
    wal: &Wal,
) -> Result<(Store, Writer, Applied), &'static str> {
    let (store, writer) = Store::open(options).map_err(|error| {
        tracing::warn!(%error, "the state directory can't be opened");
        "the state directory can't be opened"
    })?;
    let applied = Applied::decode(writer.meta().clone()).map_err(|_| "its position can't be read")?;
    let behind = snapshot.is_some_and(|snapshot| snapshot.applied.last > applied.last);
    if behind {
        return Err("it is behind the snapshot");
    }
    if !fits(applied.last, snapshot.and_then(|snapshot| snapshot.applied.last), wal) {
        return Err("it does not fit the log");
    }
    let live = snapshot.map_or(0, |snapshot| snapshot.live_bytes);
    let size = store.size().map_err(|_| "its size can't be measured")?;
    if snapshot.is_some() && outgrown(size, live) {
        return Err("it has grown beyond three times the live data");
    }
    Ok((store, writer, applied))
}

/// sled gives no space back, so the directory is filled anew from time to time.
fn outgrown(size: u64, live: u64) -> bool {
    size > MIN_REBUILD.max(3 * live)
}

/// True when the log (or the snapshot) holds the very entry that was applied last.
fn fits(applied: Option<LogId>, snapshot: Option<LogId>, wal: &Wal) -> bool {
    match applied {
        None => wal.purged().is_none(),
        Some(id) => wal.id(id.index) == Some(id) || snapshot == Some(id),
    }
}

fn read_marker(parent: &Path) -> Option<Marker> {
    let marker: Marker = serde_json::from_slice(&fs::read(parent.join(MARKER)).ok()?).ok()?;
    let plain = marker.directory.starts_with(PREFIX) && !marker.directory.contains('/');
    plain.then_some(marker)
}

/// The kernel's id of this boot; where there is none, one that fits no marker.
pub(crate) fn boot_id() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    if id.trim().is_empty() { format!("unknown-{}", rand::random::<u64>()) } else { id.trim().to_owned() }
}

fn numbered(parent: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for item in fs::read_dir(parent)? {
        let name = item?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.parse::<u64>().ok()));
    }
    Ok(numbers)
}

fn fresh_name(parent: &Path) -> Result<String, ViewError> {
    let numbers = numbered(parent).map_err(io_error("listing", parent))?;
    Ok(format!("{PREFIX}{}", numbers.into_iter().max().unwrap_or(0) + 1))
}

/// Abandoned directories go, in the background: they may be large.
fn remove_others(parent: &Path, keep: &str) {
    let Ok(numbers) = numbered(parent) else { return };
    let others: Vec<PathBuf> = numbers
        .into_iter()
        .map(|number| format!("{PREFIX}{number}"))
        .filter(|name| name != keep)
        .map(|name| parent.join(name))
        .collect();
    if others.is_empty() {
        return;
    }
    let remove = move || {
        for path in others {
            if let Err(error) = fs::remove_dir_all(&path) {
                tracing::warn!(%error, path = %path.display(), "removing an abandoned state directory failed");
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("coracle-clean".to_owned()).spawn(remove) {
        tracing::warn!(%error, "no thread to remove abandoned state directories; the next start tries again");
    }
}

/// Removes every state directory and the marker.
pub(crate) fn remove_all(parent: &Path) -> io::Result<()> {
    match fs::remove_file(parent.join(MARKER)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for number in numbered(parent)? {
        fs::remove_dir_all(parent.join(format!("{PREFIX}{number}")))?;
    }
    Ok(())
}

fn sync_tree(path: &Path) -> io::Result<()> {
    for item in fs::read_dir(path)? {
        let item = item?;
        if item.file_type()?.is_dir() {
            sync_tree(&item.path())?;
        } else {
            File::open(item.path())?.sync_all()?;
        }
    }
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_or_well_filled_directories_are_kept() {
        const MIB: u64 = 1 << 20;
        for (size, live, rebuild) in [(60, 1, false), (70, 1, true), (290, 100, false), (310, 100, true)] {
            assert_eq!(outgrown(size * MIB, live * MIB), rebuild, "{size} MiB for {live} MiB");
        }
    }

    #[test]
    fn a_marker_can_not_name_a_directory_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        for (name, plain) in [("view-3", true), ("view-../../etc", false), ("other", false)] {
            let marker = Marker { directory: name.to_owned(), boot_id: "b".to_owned(), clean: true };
            fs::write(dir.path().join(MARKER), serde_json::to_vec(&marker).unwrap()).unwrap();
            assert_eq!(read_marker(dir.path()).is_some(), plain, "{name}");
        }
    }
}
