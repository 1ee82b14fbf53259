//! One record of the log on disk, and the pure code that writes and reads it.
//!
//! ```text
//! offset  0  u32  length of the payload in bytes
//!         4  u32  crc32c over salt, length, bytes 8..32 and payload
//!         8  u32  batch: offset in the segment at which the write that carried this record began
//!        12  u8   kind
//!        13  u24  low bits of the segment's salt, so that a search for records need not checksum foreign bytes
//!        16  u64  index
//!        24  u64  term
//!        32       payload, then zeros up to a multiple of 8
//! ```
//! All integers are little endian. The salt belongs to the segment and is new each time a file is recycled, so a
//! record of the file's earlier life never checks. `batch` tells a torn write from damage: a record whose batch begins
//! *after* a broken place proves that the broken place had been synced once.

use bytes::Bytes;

/// Bytes of a record's header.
pub(crate) const HEADER: usize = 32;
/// Largest payload of one record in bytes; anything longer is damage.
pub(crate) const MAX_PAYLOAD: usize = 32 << 20;

/// A position in the replicated log: the entry with this index, proposed in this term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogId {
    /// Term of the leader that proposed the entry.
    pub term: u64,
    /// Position in the log, from 0.
    pub index: u64,
}

impl std::fmt::Display for LogId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.term, self.index)
    }
}

/// What this member last voted for (Raft §5.2); `committed` once a quorum granted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vote {
    /// Term voted in.
    pub term: u64,
    /// Member voted for.
    pub member: u64,
    /// True once the candidate is known to be the leader of the term.
    pub committed: bool,
}

/// What a record says. The numbers are on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A log entry; the payload is opaque here.
    Entry = 1,
    /// The vote: term in the header, member and flag in the payload.
    Vote = 2,
    /// Entries with this index and above are gone.
    Truncate = 3,
    /// Entries up to and including this log id are gone, covered by a snapshot.
    Purge = 4,
    /// Entries up to and including this log id are known to be committed.
    Committed = 5,
    /// Last record of a full segment: the log goes on in the next one.
    Seal = 6,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Kind::Entry,
            2 => Kind::Vote,
            3 => Kind::Truncate,
            4 => Kind::Purge,
            5 => Kind::Committed,
            6 => Kind::Seal,
            _ => return None,
        })
    }
}

/// A record to be written. The payload comes in parts so that nothing is copied before the write buffer.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    pub kind: Kind,
    pub index: u64,
    pub term: u64,
    pub payload: Vec<Bytes>,
}

impl Record {
    pub fn vote(vote: Vote) -> Self {
        let mut payload = Vec::with_capacity(9);
        payload.extend_from_slice(&vote.member.to_le_bytes());
        payload.push(u8::from(vote.committed));
        Record { kind: Kind::Vote, index: 0, term: vote.term, payload: vec![payload.into()] }
    }

    pub fn mark(kind: Kind, id: LogId) -> Self {
        Record { kind, index: id.index, term: id.term, payload: Vec::new() }
    }

    pub fn payload_len(&self) -> usize {
        self.payload.iter().map(Bytes::len).sum()
    }

    /// Bytes that this record takes in a segment.
    pub fn encoded_len(&self) -> usize {
        padded(self.payload_len())
    }
}

/// Bytes that a record with `payload` bytes takes in a segment.
pub(crate) fn padded(payload: usize) -> usize {
    (HEADER + payload).next_multiple_of(8)
}

/// Appends the record to `out`. `batch` is the segment offset of the write that carries it.
pub(crate) fn encode(record: &Record, salt: u32, batch: u32, out: &mut Vec<u8>) {
    let start = out.len();
    let length = record.payload_len();
    out.extend_from_slice(&(length as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&batch.to_le_bytes());
    out.push(record.kind as u8);
    out.extend_from_slice(&salt.to_le_bytes()[..3]);
    out.extend_from_slice(&record.index.to_le_bytes());
    out.extend_from_slice(&record.term.to_le_bytes());
    for part in &record.payload {
        out.extend_from_slice(part);
    }
    let crc = checksum(salt, &out[start..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
    out.resize(start + padded(length), 0);
}

/// `record` is header and payload without padding; its own checksum field is left out.
fn checksum(salt: u32, record: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&salt.to_le_bytes());
    let crc = crc32c::crc32c_append(crc, &record[..4]);
    crc32c::crc32c_append(crc, &record[8..])
}

/// A record read back: a view into the segment's bytes.
#[derive(Debug)]
pub(crate) struct View<'a> {
    pub kind: Kind,
    pub batch: u32,
    pub index: u64,
    pub term: u64,
    pub payload: &'a [u8],
}

impl View<'_> {
    pub fn id(&self) -> LogId {
        LogId { term: self.term, index: self.index }
    }

    /// The vote in this record; None when the payload has the wrong size.
    pub fn vote(&self) -> Option<Vote> {
        let member = u64::from_le_bytes(self.payload.get(..8)?.try_into().ok()?);
        let committed = *self.payload.get(8)? != 0;
        Some(Vote { term: self.term, member, committed })
    }
}

/// The payload length that a header claims, when the header is plausible at all (this doesn't check the checksum).
pub(crate) fn claimed_length(header: &[u8], salt: u32) -> Option<usize> {
    let header = header.get(..HEADER)?;
    Kind::from_byte(header[12])?;
    if header[13..16] != salt.to_le_bytes()[..3] {
        return None;
    }
    let length = read_u32(header, 0) as usize;
    (length <= MAX_PAYLOAD).then_some(length)
}

/// Reads the record at the start of `bytes`; None unless it is complete and its checksum holds.
pub(crate) fn decode(bytes: &[u8], salt: u32) -> Option<View<'_>> {
    let length = claimed_length(bytes, salt)?;
    let record = bytes.get(..HEADER + length)?;
    if read_u32(record, 4) != checksum(salt, record) {
        return None;
    }
    Some(View {
        kind: Kind::from_byte(record[12])?,
        batch: read_u32(record, 8),
        index: read_u64(record, 16),
        term: read_u64(record, 24),
        payload: &record[HEADER..],
    })
}

pub(crate) fn read_u32(bytes: &[u8], at: usize) -> u32 {
    let mut raw = [0; 4];
    raw.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(raw)
}

pub(crate) fn read_u64(bytes: &[u8], at: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Record {
        let payload = vec![Bytes::from_static(b"hello "), Bytes::from_static(b"world")];
        Record { kind: Kind::Entry, index: 7, term: 3, payload }
    }

    #[test]
    fn a_record_reads_back_as_written() {
        let mut out = vec![0xff; 8];
        encode(&entry(), 42, 64, &mut out);
        assert_eq!(out.len(), 8 + entry().encoded_len());
        assert_eq!(out.len() % 8, 0);
        let view = decode(&out[8..], 42).unwrap();
        assert_eq!((view.kind, view.index, view.term, view.batch), (Kind::Entry, 7, 3, 64));
        assert_eq!(view.payload, b"hello world");
    }

    #[test]
    fn any_flipped_byte_and_any_other_salt_is_noticed() {
        let mut out = Vec::new();
        encode(&entry(), 42, 64, &mut out);
        assert!(decode(&out, 43).is_none());
        for at in 0..HEADER + entry().payload_len() {
            let mut broken = out.clone();
            broken[at] ^= 0x10;
            assert!(decode(&broken, 42).is_none(), "byte {at}");
        }
        assert!(decode(&out[..HEADER + 5], 42).is_none());
        assert!(decode(&[0; 64], 0).is_none());
    }

    #[test]
    fn a_vote_survives() {
        let vote = Vote { term: 9, member: u64::MAX, committed: true };
        let mut out = Vec::new();
        encode(&Record::vote(vote), 1, 0, &mut out);
        assert_eq!(decode(&out, 1).unwrap().vote(), Some(vote));
    }
}
