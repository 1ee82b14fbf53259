//! What the log holds, in memory: where each entry lies, the vote, and the bounds of the log.

use std::collections::VecDeque;
use std::sync::Arc;

use super::record::{Kind, LogId, View, Vote};
use super::segment::{Carried, Segment};

/// Where an entry's payload lies on disk.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    pub segment: Arc<Segment>,
    /// Offset of the record in the segment.
    pub offset: u32,
    /// Bytes of header and payload.
    pub length: u32,
}

#[derive(Debug)]
struct Slot {
    term: u64,
    /// None while the entry waits for the log thread.
    location: Option<Location>,
}

/// The index of the log; the same code builds it at start (from records) and while running (from calls).
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Log index of `slots[0]`; meaningless while there are no slots.
    first: u64,
    slots: VecDeque<Slot>,
    /// Index that the next entry must have; None while nothing is known.
    next: Option<u64>,
    pub purged: Option<LogId>,
    pub committed: Option<LogId>,
    pub vote: Option<Vote>,
}

/// A record that doesn't fit what came before it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Misfit {
    #[error("entry {found} follows where entry {expected} belongs")]
    Hole { expected: u64, found: u64 },
    #[error("a vote record has the wrong size")]
    Vote,
}

impl Index {
    /// Takes over the state that a segment's header repeats.
    pub fn resume(&mut self, carried: &Carried) {
        self.vote = carried.vote.or(self.vote);
        self.committed = carried.committed.or(self.committed);
        if let Some(purged) = carried.purged {
            self.replay_purge(purged);
        }
    }

    /// Purging, while the log is read, says nothing about which entry comes next: the first segment that is left may
    /// begin anywhere behind the bound that was known when it was made.
    fn replay_purge(&mut self, upto: LogId) {
        let unknown = self.next.is_none();
        self.purge(upto);
        if unknown {
            self.next = None;
        }
    }

    /// Takes over one record found on disk.
    pub fn replay(&mut self, view: &View<'_>, location: Location) -> Result<(), Misfit> {
        match view.kind {
            Kind::Entry => {
                self.expect(view.index)?;
                self.push(view.id());
                self.place(view.id(), location);
            }
            Kind::Vote => self.vote = Some(view.vote().ok_or(Misfit::Vote)?),
            Kind::Truncate => self.truncate_from(view.index),
            Kind::Purge => self.replay_purge(view.id()),
            Kind::Committed => self.committed = Some(view.id()),
            Kind::Seal => {}
        }
        Ok(())
    }

    /// Ok when an entry with this index may follow.
    pub fn expect(&self, index: u64) -> Result<(), Misfit> {
        match self.next {
            Some(expected) if expected != index => Err(Misfit::Hole { expected, found: index }),
            _ => Ok(()),
        }
    }

    /// After the last segment: Err when entries between the purged ones and the first one are missing.
    pub fn finish(&mut self) -> Result<(), Misfit> {
        let expected = self.purged.map_or(0, |id| id.index + 1);
        if self.next.is_none() && self.purged.is_some() {
            self.next = Some(expected);
        }
        if self.slots.is_empty() || self.first == expected {
            return Ok(());
        }
        Err(Misfit::Hole { expected, found: self.first })
    }

    /// Adds an entry whose place isn't known yet. Entries behind the purged bound are not kept.
    pub fn push(&mut self, id: LogId) {
        self.next = Some(id.index + 1);
        if self.purged.is_some_and(|purged| id.index <= purged.index) {
            return;
        }
        if self.slots.is_empty() {
            self.first = id.index;
        }
        self.slots.push_back(Slot { term: id.term, location: None });
    }

    /// Says where the entry was written; ignored when the entry was replaced or purged meanwhile.
    pub fn place(&mut self, id: LogId, location: Location) {
        if let Some(slot) = self.slot_mut(id.index)
            && slot.term == id.term
        {
            slot.location = Some(location);
        }
    }

    /// Removes the entries from `index` on.
    pub fn truncate_from(&mut self, index: u64) {
        let keep = index.saturating_sub(self.first).min(self.slots.len() as u64);
        self.slots.truncate(keep as usize);
        if self.next.is_some_and(|next| next > index) {
            self.next = Some(index);
        }
    }

    /// Removes the entries up to and including `upto`; the log goes on behind it even if it didn't reach that far.
    pub fn purge(&mut self, upto: LogId) {
        if self.purged.is_some_and(|purged| purged >= upto) {
            return;
        }
        while !self.slots.is_empty() && self.first <= upto.index {
            self.slots.pop_front();
            self.first += 1;
        }
        self.purged = Some(upto);
        if self.next.is_none_or(|next| next <= upto.index) {
            self.next = Some(upto.index + 1);
        }
    }

    /// The last entry, or the purge bound when there are none.
    pub fn last(&self) -> Option<LogId> {
        match self.slots.back() {
            Some(slot) => Some(LogId { term: slot.term, index: self.first + self.slots.len() as u64 - 1 }),
            None => self.purged,
        }
    }

    /// Term and index of the entry, also for the last purged one.
    pub fn id(&self, index: u64) -> Option<LogId> {
        if let Some(purged) = self.purged
            && purged.index == index
        {
            return Some(purged);
        }
        self.slot(index).map(|slot| LogId { term: slot.term, index })
    }

    /// Index of the first entry that is present, and one past the last.
    pub fn bounds(&self) -> (u64, u64) {
        match self.slots.is_empty() {
            true => self.next.map_or((0, 0), |next| (next, next)),
            false => (self.first, self.first + self.slots.len() as u64),
        }
    }

    /// Where the entry lies; None when it isn't there or not yet on disk.
    pub fn location(&self, index: u64) -> Option<Location> {
        self.slot(index)?.location.clone()
    }

    /// Bytes on disk and number of the entries behind `after`.
    pub fn size_after(&self, after: Option<u64>) -> (u64, u64) {
        let skip = after.map_or(0, |after| (after + 1).saturating_sub(self.first));
        let slots = self.slots.iter().skip(usize::try_from(skip).unwrap_or(usize::MAX));
        slots.fold((0, 0), |(bytes, count), slot| {
            (bytes + slot.location.as_ref().map_or(0, |location| u64::from(location.length)), count + 1)
        })
    }

    /// The last entry that may be purged when as many of the newest ones up to `end` as fit in `bytes` are to stay.
    pub fn purgeable(&self, end: u64, bytes: u64) -> Option<u64> {
        let mut kept = 0;
        let count = usize::try_from((end + 1).saturating_sub(self.first)).unwrap_or(usize::MAX);
        let slots = self.slots.iter().enumerate().take(count).rev();
        for (at, slot) in slots {
            kept += slot.location.as_ref().map_or(0, |location| u64::from(location.length));
            if kept > bytes {
                return Some(self.first + at as u64);
            }
        }
        None
    }

    fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    fn slot_mut(&mut self, index: u64) -> Option<&mut Slot> {
        self.slots.get_mut(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(term: u64, index: u64) -> LogId {
        LogId { term, index }
    }

    fn filled() -> Index {
        let mut index = Index::default();
        for at in 0..10 {
            index.push(id(1, at));
        }
        index
    }

    #[test]
    fn truncation_and_rewriting_change_the_term() {
        let mut index = filled();
        index.truncate_from(4);
        assert_eq!(index.last(), Some(id(1, 3)));
        assert!(index.expect(5).is_err());
        index.push(id(2, 4));
        assert_eq!(index.id(4), Some(id(2, 4)));
        assert_eq!(index.id(5), None);
    }

    #[test]
    fn purging_beyond_the_end_moves_the_log_forward() {
        let mut index = filled();
        index.purge(id(1, 3));
        assert_eq!(index.bounds(), (4, 10));
        index.purge(id(3, 50));
        assert_eq!((index.last(), index.bounds()), (Some(id(3, 50)), (51, 51)));
        index.push(id(3, 51));
        assert_eq!(index.bounds(), (51, 52));
        index.finish().unwrap();
    }

    #[test]
    fn truncating_everything_leaves_an_empty_log() {
        let mut index = filled();
        index.truncate_from(0);
        assert_eq!((index.last(), index.bounds()), (None, (0, 0)));
        index.push(id(2, 0));
        assert_eq!(index.last(), Some(id(2, 0)));
    }
}
