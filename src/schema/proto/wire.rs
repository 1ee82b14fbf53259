//! The wire format: tags, varints, lengths.

use super::ProtoError;

/// Varint.
pub const VARINT: u8 = 0;
/// Eight bytes.
pub const FIXED64: u8 = 1;
/// Length and bytes.
pub const BYTES: u8 = 2;

pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], ProtoError> {
        let (head, rest) = self.rest.split_at_checked(count).ok_or(ProtoError::Eof)?;
        self.rest = rest;
        Ok(head)
    }

    pub fn uvarint(&mut self) -> Result<u64, ProtoError> {
        let mut value = 0u64;
        for shift in (0..70).step_by(7) {
            if shift >= 64 {
                break;
            }
            let byte = self.take(1)?[0];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(ProtoError::Overflow)
    }

    /// Field number and wire type of the next field; `None` at the end.
    pub fn tag(&mut self) -> Result<Option<(u32, u8)>, ProtoError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.uvarint()?;
        match u32::try_from(tag >> 3) {
            Ok(field) if field > 0 => Ok(Some((field, (tag & 7) as u8))),
            _ => Err(ProtoError::Tag(tag >> 3)),
        }
    }

    fn expect(wire: u8, wanted: u8, field: &str) -> Result<(), ProtoError> {
        if wire == wanted { Ok(()) } else { Err(ProtoError::Field { found: wire, field: field.to_owned() }) }
    }

    /// A varint field.
    pub fn int(&mut self, wire: u8, field: &str) -> Result<i64, ProtoError> {
        Self::expect(wire, VARINT, field)?;
        Ok(self.uvarint()?.cast_signed())
    }

    pub fn double(&mut self, wire: u8, field: &str) -> Result<f64, ProtoError> {
        Self::expect(wire, FIXED64, field)?;
        let bytes = self.take(8)?.try_into().map_err(|_| ProtoError::Eof)?;
        Ok(f64::from_le_bytes(bytes))
    }

    pub fn bytes(&mut self, wire: u8, field: &str) -> Result<&'a [u8], ProtoError> {
        Self::expect(wire, BYTES, field)?;
        let length = self.uvarint()?;
        self.take(usize::try_from(length).map_err(|_| ProtoError::Overflow)?)
    }

    pub fn string(&mut self, wire: u8, field: &str) -> Result<String, ProtoError> {
        Ok(String::from_utf8_lossy(self.bytes(wire, field)?).into_owned())
    }

    /// Passes over a field that nobody knows.
    pub fn skip(&mut self, wire: u8) -> Result<(), ProtoError> {
        match wire {
            VARINT => self.uvarint().map(drop),
            FIXED64 => self.take(8).map(drop),
            BYTES => self.bytes(BYTES, "").map(drop),
            5 => self.take(4).map(drop),
            other => Err(ProtoError::WireType(other)),
        }
    }
}

#[derive(Default)]
pub struct Writer {
    out: Vec<u8>,
}

impl From<Vec<u8>> for Writer {
    fn from(out: Vec<u8>) -> Writer {
        Writer { out }
    }
}

impl Writer {
    pub fn uvarint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.out.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    fn tag(&mut self, field: u32, wire: u8) {
        self.uvarint(u64::from(field) << 3 | u64::from(wire));
    }

    pub fn varint(&mut self, field: u32, value: i64) {
        self.tag(field, VARINT);
        self.uvarint(value.cast_unsigned());
    }

    pub fn double(&mut self, field: u32, value: f64) {
        self.tag(field, FIXED64);
        self.out.extend(value.to_le_bytes());
    }

    pub fn bytes(&mut self, field: u32, value: &[u8]) {
        self.tag(field, BYTES);
        self.uvarint(value.len() as u64);
        self.out.extend(value);
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.out
    }
}
