//! The log as openraft sees it: entries in the write-ahead log, the newest ones also in memory.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::Stream;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use openraft::{EntryPayload, OptionalSend};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::entry::{
    Entry, RaftLogId, RaftVote, TypeConfig, from_raft_id, from_raft_vote, from_wal, to_raft_id, to_raft_vote, to_wal,
};
use crate::member::Hold;
use crate::wal::{Done, Wal};

/// Entries kept in memory after they are written, in bytes.
const CACHE: usize = 1 << 20;
/// Bytes of entries handed out at once when the reader need not have them all.
const CHUNK: usize = 1 << 20;

/// The log; clones share it. It is its own reader.
#[derive(Clone)]
pub(crate) struct Log {
    shared: Arc<Shared>,
}

struct Shared {
    /// Dropped first: its thread ends before the directory is free.
    wal: Wal,
    cache: Mutex<Cache>,
    growth: Arc<Growth>,
    _hold: Option<Arc<Hold>>,
}

/// How much was appended since the last snapshot; says when the next one is due.
#[derive(Default)]
pub(crate) struct Growth {
    bytes: AtomicU64,
    entries: AtomicU64,
    /// Bytes at which a snapshot is due; moves with the size of the state.
    limit: AtomicU64,
    pub due: Notify,
    /// Told when a snapshot is written.
    pub taken: Notify,
}

/// Entries at which a snapshot is due whatever their size: each costs memory in the index of the log.
const MAX_ENTRIES: u64 = 100_000;

impl Growth {
    pub fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// A snapshot covers everything appended until `before` was taken.
    pub fn forget(&self, before: (u64, u64)) {
        self.bytes.fetch_sub(before.0, Ordering::Relaxed);
        self.entries.fetch_sub(before.1, Ordering::Relaxed);
        self.taken.notify_one();
    }

    pub fn now(&self) -> (u64, u64) {
        (self.bytes.load(Ordering::Relaxed), self.entries.load(Ordering::Relaxed))
    }

    pub fn is_due(&self) -> bool {
        let (bytes, entries) = self.now();
        bytes >= self.limit.load(Ordering::Relaxed) || entries >= MAX_ENTRIES
    }

    pub fn add(&self, bytes: u64, entries: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.entries.fetch_add(entries, Ordering::Relaxed);
        if self.is_due() {
            self.due.notify_one();
        }
    }
}

/// The tail of the log in memory: what is not on disk yet, and some more.
#[derive(Default)]
struct Cache {
    first: u64,
    entries: VecDeque<Entry>,
    bytes: usize,
}

impl Cache {
    fn end(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    fn get(&self, index: u64) -> Option<&Entry> {
        self.entries.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    fn push(&mut self, entry: Entry) {
        if self.entries.is_empty() || self.end() != entry.log_id.index {
            self.entries.clear();
            self.bytes = 0;
            self.first = entry.log_id.index;
        }
        self.bytes += weight(&entry);
        self.entries.push_back(entry);
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.first += 1;
            self.bytes -= weight(&entry);
        }
    }

    fn evict(&mut self, wal: &Wal) {
        while self.bytes > CACHE
            && let Some(oldest) = self.entries.front()
            && wal.is_placed(oldest.log_id.index)
        {
            self.pop_front();
        }
    }

    fn truncate_from(&mut self, index: u64) {
        while self.end() > index.max(self.first) {
            if let Some(entry) = self.entries.pop_back() {
                self.bytes -= weight(&entry);
            }
        }
    }

    fn purge(&mut self, upto: u64) {
        while !self.entries.is_empty() && self.first <= upto {
            self.pop_front();
        }
    }
}

fn weight(entry: &Entry) -> usize {
    let payload = match &entry.payload {
        EntryPayload::Normal(proposal) => proposal.size() + 64 * proposal.commands.len(),
        EntryPayload::Blank | EntryPayload::Membership(_) => 64,
    };
    payload + size_of::<Entry>()
}

impl Log {
    /// `hold` is kept until nobody writes the log any more: the engine's tasks may outlive the node by a little.
    pub fn new(wal: Wal, growth: Arc<Growth>, hold: Option<Arc<Hold>>) -> Self {
        Log { shared: Arc::new(Shared { wal, cache: Mutex::default(), growth, _hold: hold }) }
    }

    pub fn wal(&self) -> &Wal {
        &self.shared.wal
    }

    fn entry(&self, index: u64) -> io::Result<Option<Entry>> {
        if let Some(entry) = self.shared.cache.lock().get(index) {
            return Ok(Some(entry.clone()));
        }
        match self.shared.wal.read(index)? {
            Some((id, payload)) => from_wal(id, payload).map(Some),
            None => Ok(None),
        }
    }

    /// Entries from `start` on, up to `end` or about [`CHUNK`] bytes; at least one if it is there.
    fn chunk(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for index in start..end {
            let Some(entry) = self.entry(index)? else { break };
            bytes += weight(&entry);
            entries.push(entry);
            if bytes >= CHUNK {
                break;
            }
        }
        Ok(entries)
    }

    fn missing(&self, index: u64) -> io::Error {
        let (first, end) = self.shared.wal.bounds();
        let cached = {
            let cache = self.shared.cache.lock();
            (cache.first, cache.end())
        };
        let purged = self.shared.wal.purged();
        tracing::error!(index, first, end, ?cached, ?purged, "an entry that is to be applied is missing");
        io::Error::other(format!("log entry {index} is to be applied, but the log holds {first} to {end}, without it"))
    }

    fn clamp(&self, range: impl RangeBounds<u64>) -> (u64, u64) {
        let (first, end) = self.shared.wal.bounds();
        let start = match range.start_bound() {
            Bound::Included(at) => *at,
            Bound::Excluded(at) => at + 1,
            Bound::Unbounded => 0,
        };
        let stop = match range.end_bound() {
            Bound::Included(at) => at + 1,
            Bound::Excluded(at) => *at,
            Bound::Unbounded => u64::MAX,
        };
        (start.max(first), stop.min(end))
    }
}

/// Runs a request of the log and waits until it is durable.
async fn durable(request: impl FnOnce(Done)) -> io::Result<()> {
    let (sender, receiver) = oneshot::channel();
    request(Box::new(move |result| {
        // Nobody listens any more when the node stopped meanwhile.
        let _ = sender.send(result);
    }));
    receiver.await.unwrap_or_else(|_| Err(io::Error::other("the log thread is gone")))
}

impl RaftLogReader<TypeConfig> for Log {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = self.clamp(range);
        let mut entries = Vec::new();
        for index in start..end {
            // Purged meanwhile: the reader gets what is left, as openraft wants it.
            if let Some(entry) = self.entry(index)? {
                entries.push(entry);
            }
        }
        Ok(entries)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let (start, end) = self.clamp(start..end);
        self.chunk(start, end)
    }

    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        // What is applied is read here. What is known to be committed must be there: leaving it out would lose it for good.
        let needed = self.shared.wal.committed().map_or(0, |committed| committed.index + 1);
        let (first, last) = self.clamp(range.clone());
        let (start, end) = match (range.start_bound(), range.end_bound()) {
            (Bound::Included(start), Bound::Excluded(end)) if *start < needed => (*start, last.max(needed.min(*end))),
            _ => (first, last),
        };
        let state = (self.clone(), start, end, Vec::new().into_iter());
        futures::stream::unfold(state, move |(log, at, end, mut ready)| async move {
            if let Some(entry) = ready.next() {
                return Some((Ok(entry), (log, at, end, ready)));
            }
            if at >= end {
                return None;
            }
            match log.chunk(at, end) {
                Ok(chunk) => {
                    let next = at + chunk.len() as u64;
                    let mut ready = chunk.into_iter();
                    match ready.next() {
                        Some(entry) => Some((Ok(entry), (log, next, end, ready))),
                        None if at < needed => Some((Err(log.missing(at)), (log, end, end, ready))),
                        None => None,
                    }
                }
                Err(error) => Some((Err(error), (log, end, end, Vec::new().into_iter()))),
            }
        })
    }

    async fn read_vote(&mut self) -> Result<Option<RaftVote>, io::Error> {
        Ok(self.shared.wal.vote().map(to_raft_vote))
    }
}

impl RaftLogStorage<TypeConfig> for Log {
    type LogReader = Log;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let wal = &self.shared.wal;
        Ok(LogState { last_purged_log_id: wal.purged().map(to_raft_id), last_log_id: wal.last().map(to_raft_id) })
    }

    async fn get_log_reader(&mut self) -> Log {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &RaftVote) -> Result<(), io::Error> {
        durable(|done| self.shared.wal.save_vote(from_raft_vote(vote), done)).await
    }

    async fn save_committed(&mut self, committed: Option<RaftLogId>) -> Result<(), io::Error> {
        if let Some(committed) = committed {
            self.shared.wal.save_committed(from_raft_id(committed));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<RaftLogId>, io::Error> {
        Ok(self.shared.wal.committed().map(to_raft_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let records: Vec<_> = entries.iter().map(to_wal).collect();
        let bytes = entries.iter().map(weight).sum::<usize>() as u64;
        self.shared.growth.add(bytes, entries.len() as u64);
        {
            let mut cache = self.shared.cache.lock();
            entries.into_iter().for_each(|entry| cache.push(entry));
            cache.evict(&self.shared.wal);
        }
        self.shared.wal.append(records, Box::new(|result| callback.io_completed(result)))
    }

    async fn truncate_after(&mut self, last: Option<RaftLogId>) -> Result<(), io::Error> {
        let from = last.map_or(0, |last| last.index + 1);
        self.shared.cache.lock().truncate_from(from);
        durable(|done| self.shared.wal.truncate_from(from, done)).await
    }

    async fn purge(&mut self, upto: RaftLogId) -> Result<(), io::Error> {
        self.shared.cache.lock().purge(upto.index);
        durable(|done| self.shared.wal.purge(from_raft_id(upto), done)).await
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;

    use super::*;
    use crate::wal::{LogId, WalOptions};

    #[tokio::test]
    async fn a_committed_entry_that_is_missing_is_an_error_and_others_just_end() {
        let dir = tempfile::tempdir().unwrap();
        let wal = Wal::open(dir.path(), WalOptions::new(1 << 20)).unwrap();
        let mut log = Log::new(wal, Arc::default(), None);
        let blank = |index| Entry { log_id: to_raft_id(LogId { term: 1, index }), payload: EntryPayload::Blank };
        log.append((0..10).map(blank), IOFlushed::noop()).await.unwrap();
        let read = async |log: &mut Log| log.entries_stream(5..13).await.collect::<Vec<_>>().await;
        let found = read(&mut log).await;
        assert!(found.len() == 5 && found.iter().all(Result::is_ok), "{found:?}");
        log.save_committed(Some(to_raft_id(LogId { term: 1, index: 12 }))).await.unwrap();
        let found = read(&mut log).await;
        let error = found.last().unwrap().as_ref().unwrap_err().to_string();
        assert!(found.len() == 6 && error.contains("log entry 10 is to be applied"), "{found:?}");
        log.purge(to_raft_id(LogId { term: 1, index: 7 })).await.unwrap();
        let found = read(&mut log).await;
        assert!(found.len() == 1 && found[0].is_err(), "{found:?}");
    }
}
