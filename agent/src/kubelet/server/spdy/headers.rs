//! Header blocks: names and values, compressed as one zlib stream per direction over the whole connection.
//!
//! Our inflater knows no preset dictionaries, and needs none: the dictionary is what the window holds before the first
//! byte, and a stored block in front of the stream puts it there. What we send is not compressed at all, which every
//! inflater takes.

use flate2::{Decompress, FlushDecompress, Status};

use super::dictionary::dictionary;

/// The longest header block, inflated.
const MAX_BLOCK: usize = 16 * 1024;
/// Head of a zlib stream that names a dictionary (RFC 1950 section 2.2): two bytes, and the dictionary's checksum.
const ZLIB_HEAD: usize = 6;
/// FDICT of the second byte.
const FDICT: u8 = 0x20;

/// Names (lower case) and values.
pub type Headers = Vec<(String, String)>;

/// The other side breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not deflate, or not with our dictionary.
    #[error("header block does not inflate")]
    Compression,
    /// More than 16 KiB.
    #[error("header block too long")]
    TooLong,
    /// Lengths that do not fit.
    #[error("header block malformed")]
    Malformed,
}

/// Reads the blocks of one connection in order.
pub struct Inflater {
    state: Decompress,
    /// Bytes of the head of the stream that are still to come.
    head: usize,
}

impl Inflater {
    /// Before the first block.
    ///
    /// # Errors
    /// Never with a sound inflater.
    pub fn new() -> Result<Inflater, HeaderError> {
        let dictionary = dictionary();
        let length = u16::try_from(dictionary.len()).map_err(|_| HeaderError::TooLong)?;
        let mut stored = vec![0];
        stored.extend_from_slice(&length.to_le_bytes());
        stored.extend_from_slice(&(!length).to_le_bytes());
        stored.extend_from_slice(&dictionary);
        let mut inflater = Inflater { state: Decompress::new(false), head: ZLIB_HEAD };
        let primed = inflater.inflate(&stored)?;
        if primed != dictionary {
            return Err(HeaderError::Compression);
        }
        Ok(inflater)
    }

    /// The next block.
    ///
    /// # Errors
    /// See [`HeaderError`]; the connection is of no use then.
    pub fn read(&mut self, mut block: &[u8]) -> Result<Headers, HeaderError> {
        if self.head > 0 {
            if block.len() < ZLIB_HEAD || block[0] & 0x0f != 8 || block[1] & FDICT == 0 {
                return Err(HeaderError::Compression);
            }
            block = &block[ZLIB_HEAD..];
            self.head = 0;
        }
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut input: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let mut out = Vec::with_capacity(MAX_BLOCK);
        loop {
            let before = self.state.total_in();
            let status = self.state.decompress_vec(input, &mut out, FlushDecompress::Sync);
            let read = usize::try_from(self.state.total_in() - before).unwrap_or(usize::MAX);
            input = input.get(read..).unwrap_or_default();
            match status {
                Err(_) | Ok(Status::StreamEnd) => return Err(HeaderError::Compression),
                Ok(_) if input.is_empty() => return Ok(out),
                Ok(_) if out.len() == out.capacity() => return Err(HeaderError::TooLong),
                Ok(_) if read == 0 => return Err(HeaderError::Compression),
                Ok(_) => {}
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
    let count = number(&mut block)?;
    let mut headers = Headers::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_lowercase();
        headers.push((name, text(&mut block)?));
    }
    if block.is_empty() { Ok(headers) } else { Err(HeaderError::Malformed) }
}

fn number(block: &mut &[u8]) -> Result<usize, HeaderError> {
    let (bytes, rest) = block.split_first_chunk::<4>().ok_or(HeaderError::Malformed)?;
    *block = rest;
    usize::try_from(u32::from_be_bytes(*bytes)).map_err(|_| HeaderError::Malformed)
}

fn text(block: &mut &[u8]) -> Result<String, HeaderError> {
    let length = number(block)?;
    let (bytes, rest) = block.split_at_checked(length).ok_or(HeaderError::Malformed)?;
    *block = rest;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// The block without headers, which is all that we ever send: stored, after the head of the zlib stream if it is the
/// first.
pub fn empty_block(first: bool) -> Vec<u8> {
    let mut block = if first { vec![0x78, 0x01] } else { Vec::new() };
    // Not the last block, stored, four bytes: the number of headers.
    block.extend_from_slice(&[0, 4, 0, 0xfb, 0xff, 0, 0, 0, 0]);
    // An empty stored block: Go's inflater hands out what it has only when it sees one.
    block.extend_from_slice(&[0, 0, 0, 0xff, 0xff]);
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    /// As zlib makes them with the dictionary: the second refers to the first.
    const FIRST: &str =
        "78f9e3c6a7c202253a703a2b294a4dcc851625aca9a0808614cb45a024cc64610024398b209198094adc8c0600000000ffff";
    const SECOND: &str = "c2aa15540a2512d209000000ffff";

    #[test]
    fn blocks_are_read_with_the_dictionary_and_those_before() {
        let mut inflater = Inflater::new().unwrap();
        let of = |kind: &str| {
            vec![("streamtype".into(), kind.into()), ("port".into(), "80".into()), ("requestid".into(), "0".into())]
        };
        assert_eq!(inflater.read(&bytes(FIRST)), Ok(of("error")));
        assert_eq!(inflater.read(&bytes(SECOND)), Ok(of("data")));
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(Inflater::new().unwrap().read(b"nonsense"), Err(HeaderError::Compression));
        assert_eq!(Inflater::new().unwrap().read(&[]), Err(HeaderError::Compression));
        for block in [&[0, 0, 0, 9][..], &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff], &[0, 0, 0, 0, 1]] {
            assert_eq!(parse(block), Err(HeaderError::Malformed));
        }
    }

    #[test]
    fn what_we_send_inflates() {
        let mut state = Decompress::new(true);
        for first in [true, false] {
            let mut out = Vec::with_capacity(64);
            state.decompress_vec(&empty_block(first), &mut out, FlushDecompress::Sync).unwrap();
            assert_eq!(out, [0, 0, 0, 0]);
            assert!(empty_block(first).ends_with(&[0, 0, 0xff, 0xff]), "a sync marker");
        }
    }
}
