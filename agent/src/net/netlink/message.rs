//! Encoding of netlink messages and attributes, decoding of attributes.

/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
pub const ACK: u16 = 4;
/// `NLM_F_ROOT | NLM_F_MATCH`.
pub const DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`.
pub const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`.
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;
/// The bits of an attribute's type that are not flags.
const KIND: u16 = 0x3fff;

/// Requests that travel in one system call.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    requests: Vec<Request>,
    /// The only request that is acknowledged, when not all are.
    awaited: Option<usize>,
}

#[derive(Debug)]
struct Request {
    start: usize,
    step: &'static str,
    tolerate: &'static [i32],
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a request. `step` completes "cannot …" when it is refused; refusals in `tolerate` count as success.
    pub fn push(
        &mut self,
        step: &'static str,
        tolerate: &'static [i32],
        kind: u16,
        flags: u16,
        write: impl FnOnce(&mut Writer<'_>),
    ) {
        let start = self.bytes.len();
        self.requests.push(Request { start, step, tolerate });
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 8]);
        write(&mut Writer { bytes: &mut self.bytes });
        let length = self.bytes.len() - start;
        put(&mut self.bytes, start, &u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
    }

    /// Number of requests.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there is nothing to send.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Bytes to send.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What a request was to do.
    pub fn step(&self, index: usize) -> &'static str {
        self.requests.get(index).map_or("", |request| request.step)
    }

    pub(super) fn tolerates(&self, index: usize, errno: i32) -> bool {
        self.requests.get(index).is_some_and(|request| request.tolerate.contains(&errno))
    }

    /// Has the last request acknowledged, alone of all: the kernel reports refusals of the others before it. For
    /// transactions, whose requests do not ask for acknowledgements themselves.
    pub(in crate::net) fn await_last(&mut self) {
        if let Some(request) = self.requests.last()
            && let Some(flags) = self.bytes.get_mut(request.start + 6)
        {
            *flags |= ACK as u8;
            self.awaited = Some(self.requests.len() - 1);
        }
    }

    pub(super) fn awaited(&self) -> Option<usize> {
        self.awaited
    }

    /// Writes the sequence numbers.
    pub(super) fn number(&mut self, first: u32) {
        for (index, request) in self.requests.iter().enumerate() {
            let sequence = first.wrapping_add(index as u32);
            put(&mut self.bytes, request.start + 8, &sequence.to_ne_bytes());
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(at..at + value.len()) {
        target.copy_from_slice(value);
    }
}

/// Appends to one message.
#[derive(Debug)]
pub struct Writer<'a> {
    bytes: &'a mut Vec<u8>,
}

impl Writer<'_> {
    /// Fixed header bytes (a multiple of four).
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// An attribute.
    pub fn attr(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    /// A zero-terminated string.
    pub fn attr_str(&mut self, kind: u16, value: &str) {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.attr(kind, &bytes);
    }

    /// A number in host order (rtnetlink).
    pub fn attr_u32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_ne_bytes());
    }

    /// A number in network order (netfilter).
    pub fn attr_be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// Attributes within an attribute.
    pub fn nest(&mut self, kind: u16, write: impl FnOnce(&mut Writer<'_>)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0, 0]);
        self.bytes.extend_from_slice(&(kind | NESTED).to_ne_bytes());
        write(&mut Writer { bytes: self.bytes });
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        put(self.bytes, start, &length.to_ne_bytes());
        self.pad();
    }

    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }
}

/// The attributes in `bytes`, ending at the first that is malformed.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let header = rest.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]) & KIND;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// One attribute's value.
pub fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A zero-terminated string.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Four bytes in host order, 0 when they are not there.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|four| four.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_can_be_read_back() {
        let mut batch = Batch::new();
        batch.push("try", &[17], 16, CREATE | ACK, |message| {
            message.raw(&[1, 2, 3, 4]);
            message.attr_str(3, "abc");
            message.nest(18, |nested| {
                nested.attr(1, &[9]);
                nested.attr_be32(2, 7);
            });
        });
        batch.number(40);
        let bytes = batch.bytes();
        assert_eq!(u32_at(bytes, 0) as usize, bytes.len());
        assert_eq!(u32_at(bytes, 8), 40);
        let body = &bytes[20..];
        assert_eq!(text(attribute(body, 3).unwrap()), "abc");
        let nested = attribute(body, 18).unwrap();
        assert_eq!(attribute(nested, 1), Some(&[9][..]));
        assert_eq!(attribute(nested, 2), Some(&[0, 0, 0, 7][..]));
        assert!(batch.tolerates(0, 17) && !batch.tolerates(0, 1));
    }

    #[test]
    fn malformed_attributes_end_the_walk() {
        for bytes in [&[][..], &[3, 0, 0, 0], &[9, 0, 1, 0, 1], &[2, 0]] {
            assert_eq!(attributes(bytes).count(), 0, "{bytes:?}");
        }
    }
}
