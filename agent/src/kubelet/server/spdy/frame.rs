//! Frames: eight bytes of head, then the payload.

use bytes::{BufMut, Bytes, BytesMut};

/// Bytes of a frame's head.
pub const HEAD: usize = 8;
/// SPDY/3.1 calls itself 3.
const VERSION: u16 = 3;
/// The longest payload of a control frame.
const MAX_CONTROL: usize = 64 * 1024;
const FIN: u8 = 1;
const REFUSED_STREAM: u32 = 3;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;

/// The other side breaks the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another protocol.
    #[error("SPDY version {0} is not spoken here")]
    Version(u16),
    /// More than 64 KiB.
    #[error("control frame of {0} bytes")]
    TooLong(usize),
    /// Too short for what it says it is.
    #[error("control frame of kind {0} too short")]
    TooShort(u16),
}

/// What a head says.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// `length` bytes for a stream follow.
    Data {
        /// Which.
        stream: u32,
        /// They are its last ones.
        fin: bool,
        /// How many.
        length: usize,
    },
    /// A payload for [`Control::read`] follows.
    Control {
        /// Of which kind.
        kind: u16,
        /// Its flags.
        flags: u8,
        /// How long it is.
        length: usize,
    },
}

impl Frame {
    /// Reads a head.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub fn read(head: &[u8; HEAD]) -> Result<Frame, FrameError> {
        let [a, b, c, d, flags, length @ ..] = *head;
        let length = usize::from(length[0]) << 16 | usize::from(length[1]) << 8 | usize::from(length[2]);
        if a & 0x80 == 0 {
            return Ok(Frame::Data { stream: u32::from_be_bytes([a, b, c, d]), fin: flags & FIN != 0, length });
        }
        let (version, kind) = (u16::from_be_bytes([a & 0x7f, b]), u16::from_be_bytes([c, d]));
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
        if length > MAX_CONTROL {
            return Err(FrameError::TooLong(length));
        }
        Ok(Frame::Control { kind, flags, length })
    }
}

/// The control frames that matter to a server.
#[derive(Debug, PartialEq, Eq)]
pub enum Control<'a> {
    /// A new stream.
    SynStream {
        /// Its number.
        stream: u32,
        /// The client sends nothing on it.
        fin: bool,
        /// Compressed.
        headers: &'a [u8],
    },
    /// More headers.
    Headers {
        /// Compressed.
        headers: &'a [u8],
    },
    /// A stream is of no use any more.
    Reset {
        /// Which.
        stream: u32,
    },
    /// To be sent back.
    Ping {
        /// The client's number.
        id: u32,
    },
    /// No new streams come.
    GoAway,
    /// Settings, windows: nothing to do.
    Other,
}

impl<'a> Control<'a> {
    /// Reads a payload.
    ///
    /// # Errors
    /// See [`FrameError`].
    pub fn read(kind: u16, flags: u8, payload: &'a [u8]) -> Result<Control<'a>, FrameError> {
        let first = || {
            let bytes = payload.first_chunk::<4>().ok_or(FrameError::TooShort(kind))?;
            Ok(u32::from_be_bytes(*bytes))
        };
        let behind = |at: usize| payload.get(at..).ok_or(FrameError::TooShort(kind));
        Ok(match kind {
            SYN_STREAM => {
                Control::SynStream { stream: first()? & 0x7fff_ffff, fin: flags & FIN != 0, headers: behind(10)? }
            }
            HEADERS | SYN_REPLY => Control::Headers { headers: behind(4)? },
            RST_STREAM => Control::Reset { stream: first()? & 0x7fff_ffff },
            PING => Control::Ping { id: first()? },
            GOAWAY => Control::GoAway,
            _ => Control::Other,
        })
    }
}

/// Data of a stream.
pub fn data(stream: u32, data: &[u8], fin: bool) -> Bytes {
    let mut frame = BytesMut::with_capacity(HEAD + data.len());
    frame.put_u32(stream & 0x7fff_ffff);
    frame.put_u8(if fin { FIN } else { 0 });
    // Callers send pieces far below the 16 MiB that fit.
    frame.put_uint(data.len() as u64, 3);
    frame.put_slice(data);
    frame.freeze()
}

fn control(kind: u16, payload: &[&[u8]]) -> Bytes {
    let length: usize = payload.iter().map(|part| part.len()).sum();
    let mut frame = BytesMut::with_capacity(HEAD + length);
    frame.put_u16(0x8000 | VERSION);
    frame.put_u16(kind);
    frame.put_u8(0);
    frame.put_uint(length as u64, 3);
    for part in payload {
        frame.put_slice(part);
    }
    frame.freeze()
}

/// Accepts a stream.
pub fn syn_reply(stream: u32, headers: &[u8]) -> Bytes {
    control(SYN_REPLY, &[&stream.to_be_bytes(), headers])
}

/// Refuses a stream.
pub fn refused(stream: u32) -> Bytes {
    control(RST_STREAM, &[&stream.to_be_bytes(), &REFUSED_STREAM.to_be_bytes()])
}

/// Answers a ping.
pub fn ping(id: u32) -> Bytes {
    control(PING, &[&id.to_be_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_and_bad_ones_refused() {
        let frame = data(5, b"abc", true);
        let head = frame.first_chunk::<HEAD>().unwrap();
        assert_eq!(Frame::read(head), Ok(Frame::Data { stream: 5, fin: true, length: 3 }));
        let frame = syn_reply(1, b"xy");
        let head = frame.first_chunk::<HEAD>().unwrap();
        assert_eq!(Frame::read(head), Ok(Frame::Control { kind: SYN_REPLY, flags: 0, length: 6 }));
        assert_eq!(Frame::read(&[0x80, 2, 0, 1, 0, 0, 0, 0]), Err(FrameError::Version(2)));
        assert_eq!(Frame::read(&[0x80, 3, 0, 1, 0, 2, 0, 0]), Err(FrameError::TooLong(0x20000)));
        assert_eq!(Control::read(SYN_STREAM, 0, &[0; 9]), Err(FrameError::TooShort(SYN_STREAM)));
        assert_eq!(Control::read(4, 0, &[]), Ok(Control::Other));
    }
}
