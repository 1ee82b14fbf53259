//! Netlink without a library: batches of messages, acknowledgements, dumps. Blocking; callers own a thread.
//!
//! The service proxy needs an own encoder for nftables in any case, and with it links, addresses and routes are a few
//! dozen lines more; several requests travel in one system call, which an asynchronous library does not do.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`message`] | encoding of messages and attributes, decoding of attributes |
//! | [`route`] | links, addresses and routes (rtnetlink) |
//! | [`neighbour`] | neighbours and forwarding entries |
//! | [`vxlan`] | VXLAN links |
//! | [`changes`] | what others change: a socket that listens |
//! | [`conntrack`] | connection tracking entries (ctnetlink) |

pub mod changes;
pub mod conntrack;
pub mod message;
pub mod neighbour;
pub mod route;
pub mod vxlan;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, getsockname, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use message::{Batch, u32_at};

/// The kernel answers at once; longer means that an answer was lost.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// `SO_SNDBUF`: a batch is one message to the socket and may be several megabytes.
const SEND_BUFFER: usize = 64 << 20;
const RECEIVE_BUFFER: usize = 4 << 20;
/// Dumps come in chunks of at most 32 KiB.
const CHUNK: usize = 64 << 10;

const HEADER: usize = 16;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Flag of an error message: only the header of the request follows.
const NLM_F_CAPPED: u16 = 0x100;
/// Flag of an error message: attributes follow.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// Flag of a dump part: the state changed under the dump.
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// A request that the kernel refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which request of the batch, counted from 0.
    pub index: usize,
    /// What the request was to do.
    pub step: &'static str,
    /// `errno`.
    pub errno: i32,
    /// The kernel's own explanation, often empty.
    pub text: String,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (request {})", io::Error::from_raw_os_error(self.errno), self.index)?;
        if self.text.is_empty() { Ok(()) } else { write!(f, ": {}", self.text) }
    }
}

impl std::error::Error for Refusal {}

/// Why a request has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket itself failed.
    #[error("netlink socket")]
    Socket(#[from] io::Error),
    /// The kernel refused a request.
    #[error("cannot {}", .0.step)]
    Refused(#[source] Refusal),
    /// The kernel's answer is not what its documentation says.
    #[error("unexpected answer to {0}")]
    Answer(&'static str),
}

impl NetlinkError {
    /// The `errno` of a refusal.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(refusal) => Some(refusal.errno),
            Self::Socket(error) => error.raw_os_error(),
            Self::Answer(_) => None,
        }
    }
}

impl From<NetlinkError> for super::NetworkError {
    fn from(error: NetlinkError) -> Self {
        match error {
            NetlinkError::Refused(refusal) => {
                Self::Kernel { step: refusal.step.to_owned(), source: io::Error::other(refusal) }
            }
            NetlinkError::Socket(source) => Self::Kernel { step: "use a netlink socket".to_owned(), source },
            NetlinkError::Answer(step) => {
                Self::Kernel { step: step.to_owned(), source: io::ErrorKind::InvalidData.into() }
            }
        }
    }
}

/// One netlink socket, bound to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket for links, addresses and routes.
    pub fn route() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    /// A socket for nftables and connection tracking.
    pub fn netfilter() -> io::Result<Self> {
        let socket = Self::open(SockProtocol::NetlinkNetFilter)?;
        // Without CAP_NET_ADMIN in the first user namespace the plain limit must do.
        let _ = setsockopt(&socket.fd, sockopt::SndBufForce, &SEND_BUFFER);
        let _ = setsockopt(&socket.fd, sockopt::RcvBufForce, &RECEIVE_BUFFER);
        Ok(socket)
    }

    fn open(protocol: SockProtocol) -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        let timeout = TimeVal::new(ANSWER_WITHIN.as_secs() as i64, 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &timeout)?;
        for option in [libc::NETLINK_EXT_ACK, libc::NETLINK_CAP_ACK] {
            set_option(&fd, option)?;
        }
        Ok(Self { fd, sequence: 1, buffer: vec![0; CHUNK] })
    }

    /// Also receive the messages of a multicast group.
    pub fn subscribe(&self, group: i32) -> io::Result<()> {
        set_value(&self.fd, libc::NETLINK_ADD_MEMBERSHIP, group)
    }

    /// The socket's own address; the kernel names it in the notifications of what this socket changed.
    pub fn port(&self) -> io::Result<u32> {
        let address: NetlinkAddr = getsockname(self.fd.as_raw_fd())?;
        Ok(address.pid())
    }

    /// Sends all requests in one system call and collects what was refused and not tolerated.
    pub fn transact(&mut self, batch: &mut Batch) -> Result<Vec<Refusal>, NetlinkError> {
        let Some(last) = batch.len().checked_sub(1) else { return Ok(Vec::new()) };
        let first = self.send(batch)?;
        let awaited = batch.awaited();
        let (mut answered, mut refusals) = (0, Vec::new());
        loop {
            let mut finished = false;
            self.receive(|header, payload| {
                let Some(index) = header.answers(first, last) else { return };
                if header.kind != NLMSG_ERROR || payload.len() < 4 {
                    return;
                }
                answered += 1;
                let errno = -(u32_at(payload, 0).cast_signed());
                let step = batch.step(index);
                if errno != 0 && !batch.tolerates(index, errno) {
                    refusals.push(Refusal { index, step, errno, text: explanation(header.flags, payload) });
                }
                // In a transaction an answer to its begin means that it failed as a whole.
                finished |= awaited.map_or(answered > last, |awaited| index == awaited || index == 0);
            })?;
            if finished {
                return Ok(refusals);
            }
        }
    }

    /// As [`Self::transact`], the first refusal being the error.
    pub fn apply(&mut self, batch: &mut Batch) -> Result<(), NetlinkError> {
        match self.transact(batch)?.into_iter().next() {
            None => Ok(()),
            Some(refusal) => Err(NetlinkError::Refused(refusal)),
        }
    }

    /// Sends one request and hands every answer (type, payload after the netlink header) to `each`. Ends with the
    /// dump's end, or with the one answer when `request` is no dump. Returns false when the state changed meanwhile.
    pub fn dump(&mut self, request: &mut Batch, mut each: impl FnMut(u16, &[u8])) -> Result<bool, NetlinkError> {
        let first = self.send(request)?;
        let (mut done, mut consistent, mut refusal) = (false, true, None);
        while !done {
            self.receive(|header, payload| {
                if header.answers(first, 0).is_none() {
                    return;
                }
                consistent &= header.flags & NLM_F_DUMP_INTR == 0;
                match header.kind {
                    NLMSG_DONE => done = true,
                    NLMSG_ERROR => {
                        done = true;
                        let errno = if payload.len() < 4 { libc::EPROTO } else { -(u32_at(payload, 0).cast_signed()) };
                        if errno != 0 && !request.tolerates(0, errno) {
                            let text = explanation(header.flags, payload);
                            refusal = Some(Refusal { index: 0, step: request.step(0), errno, text });
                        }
                    }
                    kind => each(kind, payload),
                }
            })?;
        }
        match refusal {
            Some(refusal) => Err(NetlinkError::Refused(refusal)),
            None => Ok(consistent),
        }
    }

    fn send(&mut self, batch: &mut Batch) -> io::Result<u32> {
        let first = self.sequence;
        self.sequence = self.sequence.wrapping_add(u32::try_from(batch.len()).unwrap_or(u32::MAX));
        batch.number(first);
        send(self.fd.as_raw_fd(), batch.bytes(), MsgFlags::empty())?;
        Ok(first)
    }

    /// Waits for one datagram and walks its messages.
    pub fn receive(&mut self, mut each: impl FnMut(&Header, &[u8])) -> io::Result<()> {
        let length = loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => break length,
                Err(nix::errno::Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut rest = self.buffer.get(..length).unwrap_or_default();
        while rest.len() >= HEADER {
            let size = u32_at(rest, 0) as usize;
            let Some(message) = rest.get(..size).filter(|message| message.len() >= HEADER) else { break };
            let kind = u16::from_ne_bytes([message[4], message[5]]);
            let flags = u16::from_ne_bytes([message[6], message[7]]);
            let header = Header { kind, flags, sequence: u32_at(message, 8), port: u32_at(message, 12) };
            each(&header, &message[HEADER..]);
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(())
    }
}

/// The fixed part of a received message.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub sequence: u32,
    /// `nlmsg_pid`: in a notification, the socket that caused the change.
    pub port: u32,
}

impl Header {
    /// Which request this answers, of those numbered from `first` to `first + last`.
    fn answers(&self, first: u32, last: usize) -> Option<usize> {
        let index = self.sequence.wrapping_sub(first) as usize;
        (index <= last).then_some(index)
    }
}

/// The text that the kernel attached to an error.
fn explanation(flags: u16, payload: &[u8]) -> String {
    if flags & NLM_F_ACK_TLVS == 0 || payload.len() < 20 {
        return String::new();
    }
    let request = if flags & NLM_F_CAPPED == 0 { u32_at(payload, 4) as usize } else { HEADER };
    let attributes = payload.get(4 + request.next_multiple_of(4)..).unwrap_or_default();
    message::attributes(attributes)
        .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
        .map(|(_, text)| message::text(text))
        .unwrap_or_default()
}

fn set_option(fd: &OwnedFd, option: i32) -> io::Result<()> {
    set_value(fd, option, 1)
}

fn set_value(fd: &OwnedFd, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the file descriptor is open, the value is a live i32 and its size is given.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_NETLINK,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
