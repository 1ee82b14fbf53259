//! Reading the log at start: every record in order, a torn tail cut, damage refused.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::index::{Index, Location};
use super::record::{self, HEADER, Kind, View};
use super::segment::{self, BODY, HeaderError, Segment};

/// The log couldn't be read.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
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
    /// Something that had been synced is no longer readable. Starting would silently lose acknowledged writes.
    #[error(
        "the log is damaged: {} at byte {offset}: {what}. Acknowledged writes may be lost if the server went on, so it \
         does not start. Keep a copy of the data directory; then re-seed this server: with other servers, remove its \
         data directory and let it join again; with none, restore the newest saved snapshot into a fresh data directory",
        path.display()
    )]
    Damaged {
        /// The segment file.
        path: PathBuf,
        /// Where reading stopped, in bytes from the start of the file.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// The log was removed. What this member acknowledged and voted for is forgotten with it, so an empty log in its place
    /// could let the others elect a leader without the writes that it had acknowledged.
    #[error(
        "the log in {} is gone, though this member belongs to a cluster: acknowledged writes and votes may be gone with it, \
         so it does not start. Re-seed it: with other servers, remove {} and start again, and it joins them as a new member; \
         with none, restore the newest saved snapshot",
        path.display(), path.parent().unwrap_or(path).display()
    )]
    Gone {
        /// Where it was.
        path: PathBuf,
    },
}

impl WalError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> WalError {
        let path = path.to_path_buf();
        move |source| WalError::Io { action, path, source }
    }
}

/// Refuses when `dir` holds no log.
pub(crate) fn must_exist(dir: &Path) -> Result<(), WalError> {
    let gone = || WalError::Gone { path: dir.to_path_buf() };
    match segment::list(dir) {
        Ok(sequences) if sequences.is_empty() => Err(gone()),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(gone()),
        Err(error) => Err(WalError::io("listing log segments in", dir)(error)),
    }
}

/// A segment with what the log thread must know about it.
pub(crate) struct Closed {
    pub segment: Arc<Segment>,
    /// Largest entry index in it.
    pub last_entry: Option<u64>,
}

/// Everything found on disk. The last of `segments` is the one to write on, unless `sealed`.
pub(crate) struct Recovered {
    pub index: Index,
    pub segments: Vec<Closed>,
    /// Offset behind the last good record of the last segment.
    pub tail: u32,
    /// The last segment is full: the next write begins a new one.
    pub sealed: bool,
}

/// Reads all segments of `dir`.
pub(crate) fn recover(dir: &Path) -> Result<Recovered, WalError> {
    let sequences = segment::list(dir).map_err(WalError::io("listing log segments in", dir))?;
    let mut found = Recovered { index: Index::default(), segments: Vec::new(), tail: BODY, sealed: true };
    for (at, &sequence) in sequences.iter().enumerate() {
        if at > 0 && sequences[at - 1] + 1 != sequence {
            let what = "this segment is missing".to_owned();
            let path = segment::path_of(dir, sequences[at - 1] + 1);
            return Err(WalError::Damaged { path, offset: 0, what });
        }
        let segment = Segment::open(dir, sequence).map_err(|error| header_error(dir, sequence, error))?;
        let last = at + 1 == sequences.len();
        read_segment(Arc::new(segment), last, &mut found)?;
    }
    if let Err(misfit) = found.index.finish()
        && let Some(first) = found.segments.first()
    {
        return Err(damaged(&first.segment, u64::from(BODY), misfit.to_string()));
    }
    Ok(found)
}

fn header_error(dir: &Path, sequence: u64, error: HeaderError) -> WalError {
    let path = segment::path_of(dir, sequence);
    match error {
        HeaderError::Read(source) => WalError::Io { action: "reading the header of", path, source },
        other => WalError::Damaged { path, offset: 0, what: other.to_string() },
    }
}

fn damaged(segment: &Segment, offset: u64, what: String) -> WalError {
    WalError::Damaged { path: segment.path.clone(), offset, what }
}

fn read_segment(segment: Arc<Segment>, last: bool, found: &mut Recovered) -> Result<(), WalError> {
    let mut window = Window::new(&segment)?;
    found.index.resume(&segment.carried);
    let mut offset = BODY;
    let mut batch = BODY;
    let mut last_entry = None;
    let mut sealed = false;
    while !sealed {
        let Some(view) = window.record(offset)? else { break };
        if view.batch != offset && view.batch != batch {
            break; // a leftover of an earlier torn write, not the continuation of the log
        }
        batch = view.batch;
        let length = (HEADER + view.payload.len()) as u32;
        let location = Location { segment: segment.clone(), offset, length };
        found.index.replay(&view, location).map_err(|m| damaged(&segment, u64::from(offset), m.to_string()))?;
        if view.kind == Kind::Entry {
            last_entry = Some(view.index);
        }
        sealed = view.kind == Kind::Seal;
        offset += record::padded(view.payload.len()) as u32;
    }
    if !sealed {
        if !last {
            let what = "an unreadable record, though the log goes on in the next segment";
            return Err(damaged(&segment, u64::from(offset), what.to_owned()));
        }
        cut_tail(&segment, &mut window, offset)?;
    }
    found.segments.push(Closed { segment, last_entry });
    found.tail = offset;
    found.sealed = sealed;
    Ok(())
}

/// `offset` is the end of the good records. What lies behind it is nothing, stale bytes, or the torn last write (whose
/// good parts are wiped, or they could come back behind a later write); anything else is damage.
fn cut_tail(segment: &Segment, window: &mut Window<'_>, offset: u32) -> Result<(), WalError> {
    let mut wipe_to = None;
    let mut at = offset;
    while let Some(next) = window.next_nonzero(at)? {
        at = next;
        match window.record(at)? {
            Some(view) if view.batch > offset => {
                let what = format!("an unreadable record, but a later write at byte {at} is intact");
                return Err(damaged(segment, u64::from(offset), what));
            }
            Some(view) => {
                at += record::padded(view.payload.len()) as u32;
                wipe_to = Some(at);
            }
            None => at += 8,
        }
    }
    let Some(end) = wipe_to else { return Ok(()) };
    tracing::warn!(segment = segment.sequence, offset, end, "cutting the torn last write off the log");
    let zeros = vec![0; (end - offset) as usize];
    let wiped = segment.file.write_all_at(&zeros, u64::from(offset)).and_then(|()| segment.file.sync_data());
    wiped.map_err(WalError::io("cutting the torn last write off", &segment.path))
}

/// Reads a segment through a buffer, so that a start needs no memory in the size of the log.
struct Window<'a> {
    segment: &'a Segment,
    end: u32,
    start: u32,
    bytes: Vec<u8>,
}

/// Bytes read at once.
const CHUNK: usize = 1 << 20;
/// Zeros are skipped in pieces of this size; comparing slices is quick even without optimisation.
const SKIP: usize = 4096;

impl<'a> Window<'a> {
    fn new(segment: &'a Segment) -> Result<Self, WalError> {
        let length = segment.file.metadata().map_err(WalError::io("reading", &segment.path))?.len();
        let end = u32::try_from(length).map_err(|_| damaged(segment, length, "the file is too long".to_owned()))?;
        Ok(Window { segment, end, start: 0, bytes: Vec::new() })
    }

    /// The bytes from `offset`: `length` of them, fewer only at the end of the file.
    fn bytes(&mut self, offset: u32, length: usize) -> Result<&[u8], WalError> {
        let length = length.min((self.end - offset.min(self.end)) as usize);
        let covered = offset >= self.start && (offset - self.start) as usize + length <= self.bytes.len();
        if !covered {
            let size = length.max(CHUNK).min((self.end - offset) as usize);
            self.bytes.resize(size, 0);
            self.start = offset;
            let read = self.segment.file.read_exact_at(&mut self.bytes, u64::from(offset));
            read.map_err(WalError::io("reading", &self.segment.path))?;
        }
        let from = (offset - self.start) as usize;
        Ok(&self.bytes[from..from + length])
    }

    /// The record at `offset`, if one checks there.
    fn record(&mut self, offset: u32) -> Result<Option<View<'_>>, WalError> {
        let salt = self.segment.salt;
        let Some(length) = record::claimed_length(self.bytes(offset, HEADER)?, salt) else { return Ok(None) };
        Ok(record::decode(self.bytes(offset, HEADER + length)?, salt))
    }

    /// The first multiple of 8 from `offset` on at which something else than zeros begins.
    fn next_nonzero(&mut self, mut offset: u32) -> Result<Option<u32>, WalError> {
        const ZEROS: [u8; SKIP] = [0; SKIP];
        while offset < self.end {
            let piece = self.bytes(offset, SKIP)?;
            let length = piece.len();
            if piece != &ZEROS[..length] {
                let at = piece.chunks(8).position(|word| word != &ZEROS[..word.len()]).unwrap_or(0);
                return Ok(Some(offset + (at * 8) as u32));
            }
            offset += length as u32;
        }
        Ok(None)
    }
}
