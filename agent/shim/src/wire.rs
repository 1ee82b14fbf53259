//! JSON lines over a unix stream socket, with file descriptors travelling beside them.
//!
//! Descriptors arrive in order but not aligned with lines, so each line says how many are its own.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// Longest line; a container's environment may be large.
pub const MAX_LINE: usize = 8 << 20;

/// Most descriptors in flight on one connection.
const MAX_FDS: usize = 64;

/// Collects what a socket receives.
#[derive(Default)]
pub struct Receiver {
    buffer: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Receiver {
    /// Reads once. `Ok(false)` is the end of the stream; `WouldBlock` is an error as usual.
    pub fn receive(&mut self, socket: RawFd) -> io::Result<bool> {
        let mut chunk = [0u8; 8192];
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let mut iov = [IoSliceMut::new(&mut chunk)];
        let message = recvmsg::<UnixAddr>(
            socket,
            &mut iov,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT,
        )?;
        let length = message.bytes;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                for fd in fds {
                    // SAFETY: the kernel just installed this descriptor for us; nobody else owns it.
                    self.fds.push_back(unsafe { OwnedFd::from_raw_fd(fd) });
                }
            }
        }
        if length == 0 {
            return Ok(false);
        }
        if self.buffer.len() + length > MAX_LINE || self.fds.len() > MAX_FDS {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer sends too much"));
        }
        self.buffer.extend_from_slice(&chunk[..length]);
        Ok(true)
    }

    /// The next complete line, without its end.
    pub fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.buffer.iter().position(|&byte| byte == b'\n')?;
        let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
        line.pop();
        if self.buffer.is_empty() {
            self.buffer.shrink_to(8192);
        }
        Some(line)
    }

    /// The descriptors of the line just taken; `None` when fewer came than were announced.
    pub fn take_fds(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        (count <= self.fds.len()).then(|| self.fds.drain(..count).collect())
    }
}

/// Sends bytes with descriptors attached to the first of them. Answers how many bytes went.
pub fn send_with_fds(socket: RawFd, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let control = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &control[..0] } else { &control[..] };
    loop {
        match sendmsg::<UnixAddr>(socket, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(sent) => return Ok(sent),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn lines_and_descriptors_arrive_together() {
        let (here, there) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        send_with_fds(here.as_raw_fd(), b"one\ntwo", &[OwnedFd::from(writer)]).unwrap();
        (&here).write_all(b"\n").unwrap();
        let mut receiver = Receiver::default();
        while receiver.receive(there.as_raw_fd()).is_ok() {}
        assert_eq!(receiver.line().unwrap(), b"one");
        let fd = receiver.take_fds(1).unwrap().remove(0);
        assert_eq!(receiver.line().unwrap(), b"two");
        assert!(receiver.line().is_none());
        assert!(receiver.take_fds(1).is_none());
        std::fs::File::from(fd).write_all(b"through").unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }
}
