//! Segment files: their header, names, creation, and the fsync of directories.
//!
//! ```text
//! offset  0  8    "CORAWAL1"
//!         8  u32  format version (1)
//!        12  u32  salt of this life of the file
//!        16  u64  sequence number, also the file's name
//!        24  u64  capacity: the log goes on in the next segment when this many bytes are used
//!        32       what later records may rely on and earlier segments need not be kept for:
//!        32  u8   which of the following are set (1 vote, 2 purged, 4 committed), u8 vote is committed, 6 zeros
//!        40  u64  term and
//!        48  u64  member of the vote
//!        56  u64  term and
//!        64  u64  index up to which the log is purged
//!        72  u64  term and
//!        80  u64  index up to which the log is known to be committed
//!        88  u32  crc32c over bytes 0..88
//!        92       zeros up to 128, where the first record begins
//! ```

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::files::sync_dir;

use super::record::{LogId, Vote, read_u32, read_u64};

/// Offset of the first record.
pub(crate) const BODY: u32 = 128;
/// Bytes of the header that its checksum covers; the checksum follows.
const CHECKED: usize = 88;
const MAGIC: &[u8; 8] = b"CORAWAL1";
const VERSION: u32 = 1;
/// Name of the segment that is zero-filled (or recycled) and waits for its turn.
const SPARE: &str = "spare";
const SPARE_UNFINISHED: &str = "spare.tmp";
const UNFINISHED: &str = "segment.tmp";
/// Zeros are synced in pieces of this size, so that a commit of the log never waits for more.
const FILL_STEP: usize = 1 << 20;
/// One page. What is written at once becomes one folio of the page cache, and the kernel counts a folio of which a record
/// dirties a few bytes as written whole (`write_bytes` of /proc/PID/io, the limit on dirty memory).
const PAGE: u64 = 4096;

/// The state of the log at the start of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Carried {
    pub vote: Option<Vote>,
    pub purged: Option<LogId>,
    pub committed: Option<LogId>,
}

/// An open segment. Readers and the log thread share it; only the log thread writes.
#[derive(Debug)]
pub(crate) struct Segment {
    pub sequence: u64,
    pub salt: u32,
    pub capacity: u64,
    pub carried: Carried,
    pub file: File,
    pub path: PathBuf,
}

/// Why a segment file can't be used; the caller adds the path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("reading its header")]
    Read(#[source] io::Error),
    #[error("its header is damaged")]
    Damaged,
    #[error("format version {0} is newer than this program")]
    Version(u32),
}

impl Segment {
    /// Creates the segment `sequence` from the spare file if there is one, else from nothing with `prefill` bytes of
    /// zeros. The name appears only after the header is durable.
    pub fn create(dir: &Path, sequence: u64, capacity: u64, carried: Carried, prefill: usize) -> io::Result<Segment> {
        let salt: u32 = rand::random();
        // The spare gets a private name first: the filling thread may put another one in its place at any time.
        let unfinished = dir.join(UNFINISHED);
        let file = match fs::rename(dir.join(SPARE), &unfinished) {
            Ok(()) => OpenOptions::new().read(true).write(true).open(&unfinished)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&unfinished)?;
                write_zeros(&file, 0, prefill as u64)?;
                file
            }
            Err(e) => return Err(e),
        };
        file.write_all_at(&header(sequence, salt, capacity, &carried), 0)?;
        file.sync_all()?;
        let path = path_of(dir, sequence);
        fs::rename(&unfinished, &path)?;
        sync_dir(dir)?;
        Ok(Segment { sequence, salt, capacity, carried, file, path })
    }

    /// Opens an existing segment for reading and writing.
    pub fn open(dir: &Path, sequence: u64) -> Result<Segment, HeaderError> {
        let path = path_of(dir, sequence);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(HeaderError::Read)?;
        // Reading ahead would make large folios.
        if let Err(errno) = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM) {
            tracing::debug!(%errno, "no advice on reading the log");
        }
        let mut raw = [0; BODY as usize];
        match file.read_exact_at(&mut raw, 0) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(HeaderError::Damaged),
            Err(e) => return Err(HeaderError::Read(e)),
        }
        let intact = &raw[..8] == MAGIC && crc32c::crc32c(&raw[..CHECKED]) == read_u32(&raw, CHECKED);
        match read_u32(&raw, 8) {
            _ if !intact || read_u64(&raw, 16) != sequence => Err(HeaderError::Damaged),
            VERSION => {
                let (salt, capacity, carried) = (read_u32(&raw, 12), read_u64(&raw, 24), carried(&raw));
                Ok(Segment { sequence, salt, capacity, carried, file, path })
            }
            newer => Err(HeaderError::Version(newer)),
        }
    }

    /// Takes a retired segment out of the log: it becomes the spare when none waits and it is of full size, else it is
    /// removed. The caller syncs the directory.
    pub fn retire(&self, dir: &Path, full_size: u64) -> io::Result<()> {
        let spare = dir.join(SPARE);
        if !spare.exists() && self.file.metadata()?.len() >= full_size {
            fs::rename(&self.path, spare)
        } else {
            fs::remove_file(&self.path)
        }
    }
}

fn header(sequence: u64, salt: u32, capacity: u64, carried: &Carried) -> [u8; BODY as usize] {
    let mut raw = [0; BODY as usize];
    let mut put = |at: usize, value: u64| raw[at..at + 8].copy_from_slice(&value.to_le_bytes());
    put(8, u64::from(VERSION) | u64::from(salt) << 32);
    put(16, sequence);
    put(24, capacity);
    let mut set = 0;
    if let Some(vote) = carried.vote {
        set |= 1 | u64::from(vote.committed) << 8;
        put(40, vote.term);
        put(48, vote.member);
    }
    for (bit, at, id) in [(2, 56, carried.purged), (4, 72, carried.committed)] {
        if let Some(id) = id {
            set |= bit;
            put(at, id.term);
            put(at + 8, id.index);
        }
    }
    put(32, set);
    raw[..8].copy_from_slice(MAGIC);
    let crc = crc32c::crc32c(&raw[..CHECKED]);
    raw[CHECKED..CHECKED + 4].copy_from_slice(&crc.to_le_bytes());
    raw
}

fn carried(raw: &[u8]) -> Carried {
    let vote = Vote { term: read_u64(raw, 40), member: read_u64(raw, 48), committed: raw[33] != 0 };
    let id = |at| LogId { term: read_u64(raw, at), index: read_u64(raw, at + 8) };
    Carried {
        vote: (raw[32] & 1 != 0).then_some(vote),
        purged: (raw[32] & 2 != 0).then(|| id(56)),
        committed: (raw[32] & 4 != 0).then(|| id(72)),
    }
}

/// True when a zero-filled or recycled segment waits.
pub(crate) fn spare_exists(dir: &Path) -> bool {
    dir.join(SPARE).exists()
}

/// Makes the spare segment: `size` bytes of real zeros (allocated and written extents make later syncs cheap). Returns
/// without a spare when `stop` says so between two pieces.
pub(crate) fn fill_spare(dir: &Path, size: u64, stop: &dyn Fn() -> bool) -> io::Result<()> {
    let unfinished = dir.join(SPARE_UNFINISHED);
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(&unfinished)?;
    let mut at = 0;
    while at < size {
        if stop() {
            return fs::remove_file(&unfinished);
        }
        let step = (size - at).min(FILL_STEP as u64);
        write_zeros(&file, at, at + step)?;
        file.sync_data()?;
        at += step;
    }
    file.sync_all()?;
    fs::rename(&unfinished, dir.join(SPARE))?;
    sync_dir(dir)
}

/// Zeros from `at` to `end`, in small folios.
pub(crate) fn write_zeros(file: &File, mut at: u64, end: u64) -> io::Result<()> {
    const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
    while at < end {
        let step = (PAGE - at % PAGE).min(end - at);
        file.write_all_at(&ZEROS[..step as usize], at)?;
        at += step;
    }
    Ok(())
}

/// Sequence numbers of the segments in `dir`, ascending. Leftovers of an interrupted creation are removed.
pub(crate) fn list(dir: &Path) -> io::Result<Vec<u64>> {
    let mut sequences = Vec::new();
    for item in fs::read_dir(dir)? {
        let item = item?;
        let name = item.file_name();
        let Some(name) = name.to_str() else { continue };
        if name == SPARE_UNFINISHED || name == UNFINISHED {
            fs::remove_file(item.path())?;
        } else if let Some(sequence) = name.strip_suffix(".wal").and_then(|stem| stem.parse().ok()) {
            sequences.push(sequence);
        }
    }
    sequences.sort_unstable();
    Ok(sequences)
}

pub(crate) fn path_of(dir: &Path, sequence: u64) -> PathBuf {
    dir.join(format!("{sequence:020}.wal"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recycled_file_gets_a_new_salt_and_keeps_its_size() {
        let dir = tempfile::tempdir().unwrap();
        let first = Segment::create(dir.path(), 1, 4096, Carried::default(), 8192).unwrap();
        first.retire(dir.path(), 8192).unwrap();
        assert!(spare_exists(dir.path()));
        let carried = Carried {
            vote: Some(Vote { term: 3, member: 9, committed: true }),
            purged: Some(LogId { term: 2, index: 40 }),
            committed: None,
        };
        let second = Segment::create(dir.path(), 2, 8192, carried, 0).unwrap();
        assert_ne!(first.salt, second.salt);
        assert_eq!(second.file.metadata().unwrap().len(), 8192);
        let reopened = Segment::open(dir.path(), 2).unwrap();
        assert_eq!((reopened.salt, reopened.capacity, reopened.carried), (second.salt, 8192, carried));
        assert_eq!(list(dir.path()).unwrap(), [2]);
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let segment = Segment::create(dir.path(), 1, 4096, Carried::default(), 4096).unwrap();
        segment.file.write_all_at(&[0x55], 13).unwrap();
        assert!(matches!(Segment::open(dir.path(), 1), Err(HeaderError::Damaged)));
    }

    #[test]
    fn filling_can_be_interrupted_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fill_spare(dir.path(), 4096, &|| true).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        fill_spare(dir.path(), 3 << 20, &|| false).unwrap();
        assert!(spare_exists(dir.path()));
    }
}
