//! SPDY/3.1 as the server side of port-forwarding and of old clients needs it (draft-mbelshe-httpbis-spdy-00, and the
//! changes of 3.1). Flow control is left to the connection underneath, as the other implementations in this field do.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`dictionary`], [`headers`] | header blocks |
//! | [`frame`] | frames (pure) |
//! | here | a connection: one task reads, one writes, streams in between |

pub mod dictionary;
pub mod frame;
pub mod headers;

use std::collections::HashMap;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;

use frame::{Control, Frame, FrameError, HEAD};
use headers::{HeaderError, Headers, Inflater, empty_block};

/// Bytes per piece of data.
const CHUNK: usize = 32 * 1024;
/// Pieces that wait in a stream before the connection waits.
const PIECES: usize = 16;
/// Frames that wait to be written.
const FRAMES: usize = 32;
/// Streams of one connection at once.
const MAX_STREAMS: usize = 512;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum SpdyError {
    /// Underneath.
    #[error("read or write")]
    Io(#[from] std::io::Error),
    /// Not SPDY/3.1.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Headers.
    #[error(transparent)]
    Headers(#[from] HeaderError),
}

/// A stream that the client opened.
pub struct Stream {
    /// What the client says about it.
    pub headers: Headers,
    /// What the client sends; ends when it is done.
    pub input: mpsc::Receiver<Bytes>,
    /// What the client gets.
    pub output: Output,
}

impl Stream {
    /// A header's value.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// The sending half of a stream; ends it when dropped.
pub struct Output {
    stream: u32,
    frames: mpsc::Sender<Bytes>,
    open: bool,
}

/// The connection is gone.
#[derive(Debug)]
pub struct Gone;

impl Output {
    /// Sends data.
    ///
    /// # Errors
    /// The connection is gone.
    pub async fn send(&self, data: &[u8]) -> Result<(), Gone> {
        self.frames.send(frame::data(self.stream, data, false)).await.map_err(|_| Gone)
    }

    /// Ends the stream: nothing more comes.
    pub async fn finish(mut self) {
        self.open = false;
        let _ = self.frames.send(frame::data(self.stream, &[], true)).await;
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.open {
            // A full queue means a client that does not read, or one that has gone.
            let _ = self.frames.try_send(frame::data(self.stream, &[], true));
        }
    }
}

/// Serves one connection until it ends; `streams` gets every stream that the client opens.
///
/// # Errors
/// How it ended, unless by its end.
pub async fn serve<T>(io: T, streams: mpsc::Sender<Stream>) -> Result<(), SpdyError>
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let (reader, mut writer) = tokio::io::split(io);
    let (frames, mut outgoing) = mpsc::channel::<Bytes>(FRAMES);
    let write = async {
        while let Some(frame) = outgoing.recv().await {
            writer.write_all(&frame).await?;
            if outgoing.is_empty() {
                writer.flush().await?;
            }
        }
        Ok::<_, SpdyError>(())
    };
    let connection = Connection {
        reader: BufReader::new(reader),
        inflater: Inflater::new()?,
        frames,
        streams,
        inputs: HashMap::new(),
        replied: false,
    };
    // A client that sends no more has gone, and with it whoever would read.
    tokio::select! {
        read = connection.run() => read,
        written = write => written,
    }
}

struct Connection<R> {
    reader: BufReader<R>,
    inflater: Inflater,
    frames: mpsc::Sender<Bytes>,
    streams: mpsc::Sender<Stream>,
    inputs: HashMap<u32, mpsc::Sender<Bytes>>,
    /// Whether a header block was sent already.
    replied: bool,
}

impl<R: AsyncRead + Unpin> Connection<R> {
    async fn run(mut self) -> Result<(), SpdyError> {
        let mut head = [0; HEAD];
        loop {
            if let Err(error) = self.reader.read_exact(&mut head).await {
                let over = error.kind() == std::io::ErrorKind::UnexpectedEof;
                return if over { Ok(()) } else { Err(error.into()) };
            }
            match Frame::read(&head)? {
                Frame::Data { stream, fin, length } => self.data(stream, fin, length).await?,
                Frame::Control { kind, flags, length } => {
                    let mut payload = vec![0; length];
                    self.reader.read_exact(&mut payload).await?;
                    if !self.control(Control::read(kind, flags, &payload)?).await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn data(&mut self, stream: u32, fin: bool, mut left: usize) -> Result<(), SpdyError> {
        while left > 0 {
            let mut piece = vec![0; left.min(CHUNK)];
            self.reader.read_exact(&mut piece).await?;
            left -= piece.len();
            // Nobody may want it any more.
            if let Some(input) = self.inputs.get(&stream)
                && input.send(piece.into()).await.is_err()
            {
                self.inputs.remove(&stream);
            }
        }
        if fin {
            self.inputs.remove(&stream);
        }
        Ok(())
    }

    /// Whether the connection goes on.
    async fn control(&mut self, control: Control<'_>) -> Result<bool, SpdyError> {
        match control {
            Control::SynStream { stream, fin, headers } => {
                let headers = self.inflater.read(headers)?;
                self.inputs.retain(|_, input| !input.is_closed());
                if self.inputs.len() >= MAX_STREAMS {
                    return Ok(self.frames.send(frame::refused(stream)).await.is_ok());
                }
                let (sender, input) = mpsc::channel(PIECES);
                if !fin {
                    self.inputs.insert(stream, sender);
                }
                let reply = frame::syn_reply(stream, &empty_block(!std::mem::replace(&mut self.replied, true)));
                let output = Output { stream, frames: self.frames.clone(), open: true };
                let opened = self.streams.send(Stream { headers, input, output }).await.is_ok();
                // The stream is there before the client hears of it.
                Ok(opened && self.frames.send(reply).await.is_ok())
            }
            Control::Headers { headers } => {
                // Changes the state of the inflater, whatever it says.
                self.inflater.read(headers)?;
                Ok(true)
            }
            Control::Reset { stream } => {
                self.inputs.remove(&stream);
                Ok(true)
            }
            Control::Ping { id } => Ok(self.frames.send(frame::ping(id)).await.is_ok()),
            Control::GoAway => Ok(true),
            Control::Other => Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(block: &[u8], stream: u32) -> Vec<u8> {
        let mut frame = vec![0x80, 3, 0, 1, 0];
        frame.extend_from_slice(&(10 + block.len() as u32).to_be_bytes()[1..]);
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(&[0; 6]);
        frame.extend_from_slice(block);
        frame
    }

    /// A zlib stream with our dictionary and one stored block of these headers.
    fn block(pairs: &[(&str, &str)], first: bool) -> Vec<u8> {
        let mut plain = (pairs.len() as u32).to_be_bytes().to_vec();
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            plain.extend_from_slice(&(text.len() as u32).to_be_bytes());
            plain.extend_from_slice(text.as_bytes());
        }
        let mut block = if first { vec![0x78, 0xf9, 0xe3, 0xc6, 0xa7, 0xc2] } else { Vec::new() };
        let length = plain.len() as u16;
        block.push(0);
        block.extend_from_slice(&length.to_le_bytes());
        block.extend_from_slice(&(!length).to_le_bytes());
        block.extend_from_slice(&plain);
        block
    }

    #[tokio::test]
    async fn streams_carry_data_both_ways_and_pings_are_answered() {
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let (sender, mut streams) = mpsc::channel(1);
        let task = tokio::spawn(serve(server, sender));
        client.write_all(&headers(&block(&[("Port", "80")], true), 1)).await.unwrap();
        let mut stream = streams.recv().await.unwrap();
        assert_eq!(stream.header("port"), Some("80"));
        let mut reply = [0; 8 + 4 + 16];
        client.read_exact(&mut reply).await.unwrap();
        assert_eq!((&reply[..4], &reply[8..12]), (&[0x80, 3, 0, 2][..], &[0, 0, 0, 1][..]));

        client.write_all(&frame::data(1, b"hello", true)).await.unwrap();
        assert_eq!(stream.input.recv().await.unwrap(), "hello");
        assert!(stream.input.recv().await.is_none());
        stream.output.send(b"world").await.unwrap();
        stream.output.finish().await;
        let mut answer = [0; 8 + 5 + 8];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!((&answer[8..13], answer[13 + 4]), (&b"world"[..], 1));

        client.write_all(&frame::ping(7)).await.unwrap();
        let mut pong = [0; 12];
        client.read_exact(&mut pong).await.unwrap();
        assert_eq!(pong, frame::ping(7)[..]);
        drop(client);
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_is_no_spdy_ends_the_connection() {
        let (mut client, server) = tokio::io::duplex(1024);
        let (sender, _streams) = mpsc::channel(1);
        client.write_all(b"\x80\x02\0\x01\0\0\0\0").await.unwrap();
        assert!(matches!(serve(server, sender).await, Err(SpdyError::Frame(_))));
    }
}
