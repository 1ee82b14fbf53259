//! The byte form of a [`Command`]. Own format (a version byte, tags, little-endian lengths), so that no library upgrade is
//! a migration of the log.

use bytes::{Buf, BufMut, Bytes};

use crate::types::{Command, Compare, Op, Txn};

const VERSION: u8 = 1;

/// The bytes are not a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end early.
    #[error("the command is cut short")]
    Short,
    /// A tag or version that this program does not know.
    #[error("the command has an unknown {what} {value}; it was written by a newer version")]
    Unknown { what: &'static str, value: u8 },
    /// Bytes are left over.
    #[error("the command has {0} bytes too many")]
    Trailing(usize),
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.put_u32_le(bytes.len() as u32);
    out.put_slice(bytes);
}

impl Command {
    /// Appends the byte form.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(VERSION);
        match self {
            Command::Txn(txn) => {
                out.put_u8(0);
                encode_txn(txn, out);
            }
            Command::Compact { revision } => put_tagged(out, 1, &[*revision]),
            Command::LeaseGrant { id, ttl_seconds } => put_tagged(out, 2, &[*id, *ttl_seconds]),
            Command::LeaseKeepAlive { id } => put_tagged(out, 3, &[*id]),
            Command::LeaseRevoke { id } => put_tagged(out, 4, &[*id]),
            Command::BumpRevision { by } => put_tagged(out, 5, &[*by]),
        }
    }

    /// Reads the byte form; all of `bytes` must be the command. Keys and values share the memory of `bytes`.
    pub fn decode(bytes: Bytes) -> Result<Command, DecodeError> {
        let mut input = Input(bytes);
        let version = input.u8()?;
        if version != VERSION {
            return Err(DecodeError::Unknown { what: "format version", value: version });
        }
        let command = match input.u8()? {
            0 => Command::Txn(decode_txn(&mut input)?),
            1 => Command::Compact { revision: input.u64()? },
            2 => Command::LeaseGrant { id: input.u64()?, ttl_seconds: input.u64()? },
            3 => Command::LeaseKeepAlive { id: input.u64()? },
            4 => Command::LeaseRevoke { id: input.u64()? },
            5 => Command::BumpRevision { by: input.u64()? },
            value => return Err(DecodeError::Unknown { what: "command", value }),
        };
        match input.0.len() {
            0 => Ok(command),
            n => Err(DecodeError::Trailing(n)),
        }
    }
}

fn put_tagged(out: &mut Vec<u8>, tag: u8, numbers: &[u64]) {
    out.put_u8(tag);
    for n in numbers {
        out.put_u64_le(*n);
    }
}

fn encode_txn(txn: &Txn, out: &mut Vec<u8>) {
    out.put_u32_le(txn.compare.len() as u32);
    for compare in &txn.compare {
        let (tag, key, number) = match compare {
            Compare::ModRevision { key, equals } => (0, key, Some(equals)),
            Compare::CreateRevision { key, equals } => (1, key, Some(equals)),
            Compare::Version { key, equals } => (2, key, Some(equals)),
            Compare::Value { key, .. } => (3, key, None),
            Compare::Lease { key, equals } => (4, key, Some(equals)),
        };
        out.put_u8(tag);
        put_bytes(out, key);
        match (number, compare) {
            (Some(n), _) => out.put_u64_le(*n),
            (None, Compare::Value { equals, .. }) => put_bytes(out, equals),
            (None, _) => {}
        }
    }
    for ops in [&txn.then, &txn.or_else] {
        out.put_u32_le(ops.len() as u32);
        for op in ops {
            encode_op(op, out);
        }
    }
}

fn encode_op(op: &Op, out: &mut Vec<u8>) {
    match op {
        Op::Put { key, value, lease } => {
            out.put_u8(0);
            put_bytes(out, key);
            put_bytes(out, value);
            out.put_u64_le(*lease);
        }
        Op::Delete { key } => {
            out.put_u8(1);
            put_bytes(out, key);
        }
        Op::DeleteRange { start, end } => {
            out.put_u8(2);
            put_bytes(out, start);
            put_bytes(out, end);
        }
        Op::Get { key } => {
            out.put_u8(3);
            put_bytes(out, key);
        }
    }
}

fn decode_txn(input: &mut Input) -> Result<Txn, DecodeError> {
    let compares = input.u32()?;
    let mut txn = Txn::default();
    for _ in 0..compares {
        let tag = input.u8()?;
        let key = input.bytes()?;
        txn.compare.push(match tag {
            0 => Compare::ModRevision { key, equals: input.u64()? },
            1 => Compare::CreateRevision { key, equals: input.u64()? },
            2 => Compare::Version { key, equals: input.u64()? },
            3 => Compare::Value { key, equals: input.bytes()? },
            4 => Compare::Lease { key, equals: input.u64()? },
            value => return Err(DecodeError::Unknown { what: "comparison", value }),
        });
    }
    for ops in [&mut txn.then, &mut txn.or_else] {
        for _ in 0..input.u32()? {
            ops.push(decode_op(input)?);
        }
    }
    Ok(txn)
}

fn decode_op(input: &mut Input) -> Result<Op, DecodeError> {
    Ok(match input.u8()? {
        0 => Op::Put { key: input.bytes()?, value: input.bytes()?, lease: input.u64()? },
        1 => Op::Delete { key: input.bytes()? },
        2 => Op::DeleteRange { start: input.bytes()?, end: input.bytes()? },
        3 => Op::Get { key: input.bytes()? },
        value => return Err(DecodeError::Unknown { what: "operation", value }),
    })
}

/// Bytes being read; every read checks that they suffice.
pub(crate) struct Input(pub Bytes);

impl Input {
    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.0.try_get_u8().map_err(|_| DecodeError::Short)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.0.try_get_u32_le().map_err(|_| DecodeError::Short)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.0.try_get_u64_le().map_err(|_| DecodeError::Short)
    }

    pub(crate) fn bytes(&mut self) -> Result<Bytes, DecodeError> {
        let len = self.u32()? as usize;
        if self.0.len() < len {
            return Err(DecodeError::Short);
        }
        Ok(self.0.split_to(len))
    }
}
