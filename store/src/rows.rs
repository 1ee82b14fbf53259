//! How state is laid out as rows of the engine. Key-major, so that one batch over one tree is atomic and a live read is the
//! first row of its key:
//!
//! | row | value |
//! | --- | --- |
//! | `v/<key>\0<!revision>` | header and value, newest first; a tombstone has a header only |
//! | `e/<revision><n>` | the key that the n-th event of the revision is about |
//! | `k/<lease><key>` | nothing: the key is bound to the lease |
//! | `l/<lease>` | the lease's duration in seconds |
//! | `m/<name>` | `revision`, `compacted`, `meta` (the consensus layer's, opaque here) |

use bytes::{BufMut, Bytes, BytesMut};

use crate::types::KeyValue;

pub(crate) const REVISION: &[u8] = b"m/revision";
pub(crate) const COMPACTED: &[u8] = b"m/compacted";
pub(crate) const META: &[u8] = b"m/meta";

const HEADER: usize = 1 + 8 + 8 + 8;
const TOMBSTONE: u8 = 1;

/// `v/<key>\0`: what all rows of a key begin with.
pub(crate) fn version_prefix(key: &[u8]) -> BytesMut {
    let mut row = BytesMut::with_capacity(2 + key.len() + 1 + 8);
    row.put_slice(b"v/");
    row.put_slice(key);
    row.put_u8(0);
    row
}

/// The row of a key at a revision; sorts newer revisions first.
pub(crate) fn version_row(key: &[u8], revision: u64) -> Bytes {
    let mut row = version_prefix(key);
    row.put_u64(!revision);
    row.freeze()
}

/// The bounds of the rows of all keys in `start..end`.
pub(crate) fn version_bounds(start: &[u8], end: &[u8]) -> (Bytes, Bytes) {
    let from = [b"v/", start].concat().into();
    // '0' follows '/': the end of everything that begins with `v/`.
    let to = if end.is_empty() { Bytes::from_static(b"v0") } else { [b"v/", end].concat().into() };
    (from, to)
}

/// Splits a version row into key and revision. `None` for a row that this program did not write.
pub(crate) fn split_version_row(row: &Bytes) -> Option<(Bytes, u64)> {
    let tail = row.len().checked_sub(9)?;
    if tail < 2 || row[tail] != 0 {
        return None;
    }
    let revision = u64::from_be_bytes(row[tail + 1..].try_into().ok()?);
    Some((row.slice(2..tail), !revision))
}

/// Header and value of a version row.
pub(crate) fn encode_value(kv: &KeyValue, tombstone: bool) -> Bytes {
    let mut out = BytesMut::with_capacity(HEADER + kv.value.len());
    out.put_u8(if tombstone { TOMBSTONE } else { 0 });
    out.put_u64_le(kv.create_revision);
    out.put_u64_le(kv.version);
    out.put_u64_le(kv.lease);
    if !tombstone {
        out.put_slice(&kv.value);
    }
    out.freeze()
}

/// Reads a version row back; the outer `None` is a damaged row, the inner one a tombstone.
pub(crate) fn decode_value(key: Bytes, revision: u64, row: &Bytes) -> Option<Option<KeyValue>> {
    if row.len() < HEADER {
        return None;
    }
    if row[0] == TOMBSTONE {
        return Some(None);
    }
    let number = |at: usize| row[at..at + 8].try_into().map(u64::from_le_bytes).ok();
    Some(Some(KeyValue {
        key,
        value: row.slice(HEADER..),
        create_revision: number(1)?,
        mod_revision: revision,
        version: number(9)?,
        lease: number(17)?,
    }))
}

/// Whether a version row's value is a tombstone.
pub(crate) fn is_tombstone(row: &[u8]) -> bool {
    row.first() == Some(&TOMBSTONE)
}

/// The row of the n-th event of a revision.
pub(crate) fn event_row(revision: u64, n: u32) -> Bytes {
    let mut row = BytesMut::with_capacity(2 + 8 + 4);
    row.put_slice(b"e/");
    row.put_u64(revision);
    row.put_u32(n);
    row.freeze()
}

/// The revision of an event row.
pub(crate) fn event_revision(row: &[u8]) -> Option<u64> {
    row.get(2..10)?.try_into().map(u64::from_be_bytes).ok()
}

/// The row of a lease.
pub(crate) fn lease_row(id: u64) -> Bytes {
    [b"l/".as_slice(), &id.to_be_bytes()].concat().into()
}

/// The row that binds a key to a lease; with an empty key the prefix of all of them.
pub(crate) fn lease_key_row(id: u64, key: &[u8]) -> Bytes {
    [b"k/".as_slice(), &id.to_be_bytes(), key].concat().into()
}

/// Reads a little-endian number row.
pub(crate) fn number(row: Option<Bytes>) -> u64 {
    row.and_then(|r| r.as_ref().try_into().ok().map(u64::from_le_bytes)).unwrap_or(0)
}
