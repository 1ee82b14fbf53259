//! The write-ahead log: segmented, preallocated, one thread, one sync for everything that is queued.
//!
//! | file | what |
//! | --- | --- |
//! | [`record`] | one record on disk, pure |
//! | [`segment`] | segment files, the spare one, directory syncs |
//! | [`index`] | where entries lie, the vote and the bounds, in memory |
//! | [`recover`] | reading it all at start: torn tail cut, damage refused |
//! | [`writer`] | the log thread |
//! | [`spare`] | zero-filling ahead, in the background |
//!
//! The log knows entries as opaque bytes; what is in them is the business of [`crate::entry`].

mod index;
mod record;
mod recover;
mod segment;
mod spare;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use self::index::Index;
use self::record::{HEADER, Kind, Record};
pub use self::record::{LogId, Vote};
pub use self::recover::WalError;
pub(crate) use self::recover::must_exist;
use self::recover::{Closed, Recovered, recover};
use self::segment::{Carried, Segment};
use self::spare::SpareKeeper;
pub(crate) use self::writer::{Done, SyncFile};
use self::writer::{LogThread, Pulse, Request};

/// Zeros written at once into the very first segment, so that a first start has few growing writes and no big ones.
const FIRST_SIZE: u64 = 256 << 10;

/// How a log is laid out.
#[derive(Clone)]
pub(crate) struct WalOptions {
    /// Capacity of a segment in bytes.
    pub segment_size: u64,
    pub sync: SyncFile,
}

#[cfg(test)]
impl WalOptions {
    pub fn new(segment_size: u64) -> Self {
        WalOptions { segment_size, sync: Arc::new(|file| file.sync_data()) }
    }
}

/// An entry to append.
#[derive(Clone, Debug)]
pub(crate) struct NewEntry {
    pub id: LogId,
    /// The parts of the payload, written one behind the other.
    pub payload: Vec<Bytes>,
}

/// Handle to the log. Requests take effect in memory at once and reach the disk in the order of the calls; `done` says
/// when. Dropping it ends the log thread after everything queued is written.
pub(crate) struct Wal {
    dir: PathBuf,
    index: Arc<Mutex<Index>>,
    spares: Arc<SpareKeeper>,
    pulse: Arc<Pulse>,
    requests: Option<Sender<Request>>,
    thread: Option<JoinHandle<()>>,
}

impl Wal {
    /// Opens the log in `dir`, made if need be.
    ///
    /// # Errors
    /// The directory or a file can't be read or written, or the log is damaged.
    pub fn open(dir: &Path, options: WalOptions) -> Result<Wal, WalError> {
        crate::files::create_dir(dir).map_err(WalError::io("creating", dir))?;
        let Recovered { index, segments, tail, sealed } = recover(dir)?;
        let carried = Carried { vote: index.vote, purged: index.purged, committed: index.committed };
        let mut closed: VecDeque<Closed> = segments.into();
        let (active, tail) = match closed.pop_back() {
            Some(last) if !sealed => {
                // What the last run wrote but didn't get to sync is part of the log now.
                (options.sync)(&last.segment.file).map_err(WalError::io("syncing", &last.segment.path))?;
                (last, tail)
            }
            last => {
                let sequence = last.as_ref().map_or(1, |last| last.segment.sequence + 1);
                let capacity = if last.is_some() { options.segment_size } else { FIRST_SIZE.min(options.segment_size) };
                closed.extend(last);
                let prefill = usize::try_from(capacity.min(FIRST_SIZE)).unwrap_or(0);
                let segment = Segment::create(dir, sequence, capacity, carried, prefill);
                let segment = segment.map_err(WalError::io("creating a log segment in", dir))?;
                (Closed { segment: Arc::new(segment), last_entry: None }, segment::BODY)
            }
        };
        let filled = active.segment.file.metadata().map_err(WalError::io("reading", &active.segment.path))?.len();
        let spares = Arc::new(SpareKeeper::new(dir.to_path_buf(), options.segment_size));
        let index = Arc::new(Mutex::new(index));
        let pulse = Arc::new(Pulse::default());
        let thread = LogThread {
            pulse: pulse.clone(),
            dir: dir.to_path_buf(),
            segment_size: options.segment_size,
            sync: options.sync,
            index: index.clone(),
            spares: spares.clone(),
            closed,
            active,
            tail,
            filled,
            carried,
            buffer: Vec::new(),
        };
        let (requests, queue) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("coracle-wal".to_owned())
            .spawn(move || thread.run(&queue))
            .map_err(WalError::io("starting the log thread for", dir))?;
        Ok(Wal { dir: dir.to_path_buf(), index, spares, pulse, requests: Some(requests), thread: Some(thread) })
    }

    /// From now on the next segment may be prepared in the background.
    pub fn allow_spares(&self) {
        self.spares.allow();
    }

    /// Appends entries; they must follow the last one without a hole.
    ///
    /// # Errors
    /// An entry doesn't fit behind the last one. Nothing is appended then, and `done` is dropped.
    pub fn append(&self, entries: Vec<NewEntry>, done: Done) -> io::Result<()> {
        let mut index = self.index.lock();
        let mut previous = None;
        for entry in &entries {
            let fits = match previous {
                None => index.expect(entry.id.index).map_err(io::Error::other),
                Some(before) if before + 1 == entry.id.index => Ok(()),
                Some(_) => Err(io::Error::other("the appended entries have a hole")),
            };
            fits?;
            previous = Some(entry.id.index);
        }
        let record = |entry: NewEntry| Record {
            kind: Kind::Entry,
            index: entry.id.index,
            term: entry.id.term,
            payload: entry.payload,
        };
        let records = entries.into_iter().inspect(|entry| index.push(entry.id)).map(record).collect();
        self.send(Request { records, done: Some(done) });
        Ok(())
    }

    /// Records the vote.
    pub fn save_vote(&self, vote: Vote, done: Done) {
        let mut index = self.index.lock();
        index.vote = Some(vote);
        self.send(Request { records: vec![Record::vote(vote)], done: Some(done) });
    }

    /// Notes how far the log is committed. Written along with the next synced request: losing it only means that the
    /// commit index is learnt again.
    pub fn save_committed(&self, id: LogId) {
        let mut index = self.index.lock();
        index.committed = Some(id);
        self.send(Request { records: vec![Record::mark(Kind::Committed, id)], done: None });
    }

    /// Removes the entries from `index` on.
    pub fn truncate_from(&self, from: u64, done: Done) {
        let mut index = self.index.lock();
        index.truncate_from(from);
        let record = Record::mark(Kind::Truncate, LogId { term: 0, index: from });
        self.send(Request { records: vec![record], done: Some(done) });
    }

    /// Removes the entries up to and including `upto`, and the segments that hold nothing else.
    pub fn purge(&self, upto: LogId, done: Done) {
        let mut index = self.index.lock();
        index.purge(upto);
        self.send(Request { records: vec![Record::mark(Kind::Purge, upto)], done: Some(done) });
    }

    pub fn vote(&self) -> Option<Vote> {
        self.index.lock().vote
    }

    pub fn committed(&self) -> Option<LogId> {
        self.index.lock().committed
    }

    pub fn purged(&self) -> Option<LogId> {
        self.index.lock().purged
    }

    /// The last entry, or the purge bound when there are none.
    pub fn last(&self) -> Option<LogId> {
        self.index.lock().last()
    }

    /// Term and index of the entry, also for the last purged one.
    pub fn id(&self, index: u64) -> Option<LogId> {
        self.index.lock().id(index)
    }

    /// Index of the first entry that is present, and one past the last.
    pub fn bounds(&self) -> (u64, u64) {
        self.index.lock().bounds()
    }

    /// Bytes and number of the entries behind `after`.
    pub fn size_after(&self, after: Option<u64>) -> (u64, u64) {
        self.index.lock().size_after(after)
    }

    /// The last entry that may be purged when as many of the newest ones up to `end` as fit in `bytes` are to stay.
    pub fn purgeable(&self, end: u64, bytes: u64) -> Option<u64> {
        self.index.lock().purgeable(end, bytes)
    }

    /// For how long the disk has not answered the write that it is asked to do now.
    pub fn stalled(&self) -> Duration {
        self.pulse.stalled()
    }

    /// True once the entry can be read back from disk.
    pub fn is_placed(&self, index: u64) -> bool {
        self.index.lock().location(index).is_some()
    }

    /// Reads an entry's payload from disk. None when it isn't there (any more).
    ///
    /// # Errors
    /// The file can't be read, or what it holds no longer checks.
    pub fn read(&self, index: u64) -> io::Result<Option<(LogId, Bytes)>> {
        let Some(location) = self.index.lock().location(index) else { return Ok(None) };
        let mut raw = vec![0; location.length as usize];
        location.segment.file.read_exact_at(&mut raw, u64::from(location.offset))?;
        let checked = record::decode(&raw, location.segment.salt).map(|view| (view.kind, view.id()));
        match checked {
            Some((Kind::Entry, id)) if id.index == index => Ok(Some((id, Bytes::from(raw).slice(HEADER..)))),
            // The segment may have been recycled since its location was looked up.
            _ if self.index.lock().location(index).is_none() => Ok(None),
            _ => {
                let path = location.segment.path.display();
                Err(io::Error::other(format!("log entry {index} in {path} at byte {} is damaged", location.offset)))
            }
        }
    }

    /// Callers hold the index lock, so that the queue has the order of the index.
    fn send(&self, request: Request) {
        let Some(requests) = &self.requests else { return };
        if let Err(mpsc::SendError(request)) = requests.send(request)
            && let Some(done) = request.done
        {
            done(Err(io::Error::other("the log thread is gone")));
        }
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(dir = %self.dir.display(), "the log thread panicked");
        }
        self.spares.stop();
    }
}
