//! The log thread: takes everything that is queued, writes it with one write and one `fdatasync`, completes all.
//!
//! It alone writes segments. A failed write or sync is final: pages of unknown state must not be acknowledged later, so
//! nothing is retried and every further request fails with the first error.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::files::sync_dir;

use super::index::{Index, Location};
use super::record::{self, HEADER, Kind, LogId, Record};
use super::recover::Closed;
use super::segment::{self, BODY, Carried, Segment};
use super::spare::SpareKeeper;

/// Called once the request is durable, or has failed.
pub(crate) type Done = Box<dyn FnOnce(io::Result<()>) + Send>;
/// Makes a file's written data durable; replaced only by tests of failing disks.
pub(crate) type SyncFile = Arc<dyn Fn(&File) -> io::Result<()> + Send + Sync>;

/// Tells a disk that is slow from one that doesn't answer.
pub(crate) struct Pulse {
    origin: Instant,
    /// Milliseconds from the origin to the begin of the write under way, plus one; 0 while there is none.
    begun: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Pulse { origin: Instant::now(), begun: AtomicU64::new(0) }
    }
}

impl Pulse {
    fn begin(&self) {
        self.begun.store(self.origin.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
    }

    fn end(&self) {
        self.begun.store(0, Ordering::Relaxed);
    }

    /// The age of the write under way.
    pub fn stalled(&self) -> Duration {
        match self.begun.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            begun => self.origin.elapsed().saturating_sub(Duration::from_millis(begun - 1)),
        }
    }
}

/// One request to the log thread.
pub(crate) struct Request {
    pub records: Vec<Record>,
    /// None: write it along with the next request that has one (nothing waits for it).
    pub done: Option<Done>,
}

/// Bytes taken into one write before the rest waits for the next.
const MAX_WRITE: usize = 4 << 20;
/// A write buffer grown larger than this is given back.
const KEPT_BUFFER: usize = 1 << 20;
/// A segment that has to grow does so to a multiple of this many bytes.
const FILL: u64 = 256 << 10;

pub(crate) struct LogThread {
    pub pulse: Arc<Pulse>,
    pub dir: PathBuf,
    pub segment_size: u64,
    pub sync: SyncFile,
    pub index: Arc<Mutex<Index>>,
    pub spares: Arc<SpareKeeper>,
    /// Full segments, oldest first.
    pub closed: VecDeque<Closed>,
    /// The segment being written.
    pub active: Closed,
    pub tail: u32,
    /// Length of the active segment: up to here its blocks are allocated, written and synced.
    pub filled: u64,
    /// As of the last record written; repeated in the header of each new segment, so that old ones can go.
    pub carried: Carried,
    pub buffer: Vec<u8>,
}

impl LogThread {
    /// Serves requests until every sender is gone.
    pub fn run(mut self, requests: &Receiver<Request>) {
        let mut waiting: Vec<Request> = Vec::new();
        let mut size = 0;
        while let Ok(request) = requests.recv() {
            size += take(request, &mut waiting);
            while size < MAX_WRITE
                && let Ok(request) = requests.try_recv()
            {
                size += take(request, &mut waiting);
            }
            if waiting.iter().all(|request| request.done.is_none()) && size < MAX_WRITE {
                continue;
            }
            let batch = std::mem::take(&mut waiting);
            size = 0;
            if let Err(error) = self.commit(batch) {
                fail_all(&error, requests);
                return;
            }
        }
        // Nobody waits for these; a loss costs a little more replay at the next start.
        if !waiting.is_empty()
            && let Err(error) = self.commit(waiting)
        {
            tracing::warn!(%error, "the last lazy records of the log were not written");
        }
    }

    fn commit(&mut self, batch: Vec<Request>) -> io::Result<()> {
        self.pulse.begin();
        let written = self.write(&batch);
        self.pulse.end();
        match written {
            Ok(()) => {
                for done in batch.into_iter().filter_map(|request| request.done) {
                    done(Ok(()));
                }
                if let Err(error) = self.retire_purged() {
                    // The log itself is fine; the space comes back at a later purge.
                    tracing::warn!(%error, "retiring old log segments failed");
                }
                Ok(())
            }
            Err(error) => {
                tracing::error!(%error, "writing the log failed: this member stops");
                for done in batch.into_iter().filter_map(|request| request.done) {
                    done(Err(copy(&error)));
                }
                Err(error)
            }
        }
    }

    /// One write, one sync.
    fn write(&mut self, batch: &[Request]) -> io::Result<()> {
        let records = || batch.iter().flat_map(|request| &request.records);
        let size: usize = records().map(Record::encoded_len).sum();
        self.make_room(size)?;
        let start = self.tail;
        self.buffer.clear();
        let mut placed = Vec::new();
        for record in records() {
            let offset = start + self.buffer.len() as u32;
            record::encode(record, self.active.segment.salt, start, &mut self.buffer);
            self.note(record);
            if record.kind == Kind::Entry {
                let length = (HEADER + record.payload_len()) as u32;
                placed.push((LogId { term: record.term, index: record.index }, offset, length));
            }
        }
        self.append_buffer()?;
        if let Some((id, ..)) = placed.last() {
            self.active.last_entry = Some(id.index);
        }
        let mut index = self.index.lock();
        for (id, offset, length) in placed {
            index.place(id, Location { segment: self.active.segment.clone(), offset, length });
        }
        Ok(())
    }

    fn append_buffer(&mut self) -> io::Result<()> {
        let file = &self.active.segment.file;
        file.write_all_at(&self.buffer, u64::from(self.tail))?;
        (self.sync)(file)?;
        self.tail += self.buffer.len() as u32;
        if self.buffer.capacity() > KEPT_BUFFER {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    fn note(&mut self, record: &Record) {
        let id = LogId { term: record.term, index: record.index };
        match record.kind {
            Kind::Purge => self.carried.purged = Some(id),
            Kind::Committed => self.carried.committed = Some(id),
            Kind::Vote => {
                let payload = record.payload.concat();
                let view = record::View { kind: Kind::Vote, batch: 0, index: 0, term: record.term, payload: &payload };
                self.carried.vote = view.vote().or(self.carried.vote);
            }
            Kind::Entry | Kind::Truncate | Kind::Seal => {}
        }
    }

    /// Goes on to the next segment when this one is full. While no prepared segment waits it may grow to twice its size
    /// first, in small pieces of zeros: nobody waits for a whole segment of them.
    fn make_room(&mut self, size: usize) -> io::Result<()> {
        let end = self.end_with(size);
        let capacity = self.active.segment.capacity;
        if end > capacity / 2 {
            self.spares.want();
        }
        let spare_waits = segment::spare_exists(&self.dir);
        if end <= capacity || (!spare_waits && end <= (2 * capacity).max(self.segment_size)) {
            return self.fill(end);
        }
        self.roll()?;
        self.fill(self.end_with(size))
    }

    /// The end of so many bytes behind the tail, with a seal behind them.
    fn end_with(&self, size: usize) -> u64 {
        u64::from(self.tail) + (size + HEADER) as u64
    }

    /// Zeros up to `end` at least, durable, before a record goes there. A record that makes its file longer needs a change
    /// of metadata to be found again, and ext4 has been seen to report a sync as done whose metadata it dropped because
    /// the journal had failed meanwhile. A record over zeros that were synced before depends on its own blocks only.
    fn fill(&mut self, end: u64) -> io::Result<()> {
        if end <= self.filled {
            return Ok(());
        }
        let end = end.next_multiple_of(FILL);
        let file = &self.active.segment.file;
        segment::write_zeros(file, self.filled, end)?;
        (self.sync)(file)?;
        self.filled = end;
        Ok(())
    }

    fn roll(&mut self) -> io::Result<()> {
        self.fill(self.end_with(0))?;
        self.buffer.clear();
        let seal = Record { kind: Kind::Seal, index: 0, term: 0, payload: Vec::new() };
        record::encode(&seal, self.active.segment.salt, self.tail, &mut self.buffer);
        self.append_buffer()?;
        let sequence = self.active.segment.sequence + 1;
        let next = Segment::create(&self.dir, sequence, self.segment_size, self.carried, 0)?;
        let next = Closed { segment: Arc::new(next), last_entry: None };
        self.closed.push_back(std::mem::replace(&mut self.active, next));
        self.tail = BODY;
        self.filled = self.active.segment.file.metadata()?.len();
        Ok(())
    }

    /// The purge bound is durable by now: full segments behind it become spares or go.
    fn retire_purged(&mut self) -> io::Result<()> {
        let Some(purged) = self.carried.purged else { return Ok(()) };
        let mut retired = false;
        while let Some(oldest) = self.closed.front()
            && oldest.last_entry.is_none_or(|last| last <= purged.index)
        {
            oldest.segment.retire(&self.dir, self.segment_size)?;
            self.closed.pop_front();
            retired = true;
        }
        if retired { sync_dir(&self.dir) } else { Ok(()) }
    }
}

fn take(request: Request, waiting: &mut Vec<Request>) -> usize {
    let size = request.records.iter().map(Record::encoded_len).sum();
    waiting.push(request);
    size
}

/// Every further request gets the first error.
fn fail_all(error: &io::Error, requests: &Receiver<Request>) {
    while let Ok(request) = requests.recv() {
        if let Some(done) = request.done {
            done(Err(copy(error)));
        }
    }
}

fn copy(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("the log could not be written and this member stopped: {error}"))
}
