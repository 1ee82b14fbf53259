//! Asks new peers whether packets get through, by the machines' addresses and through the overlay, and says so once when
//! only one of the two works. Kernels answer; nothing of ours listens anywhere.
//!
//! | question | answered by |
//! | --- | --- |
//! | echo request to the machine | echo reply |
//! | the same to the node's address on the overlay, small and as large as the link carries | echo reply |
//! | datagram to a closed port of that address, whose checksum a network card may be asked to make | port unreachable |

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use super::super::mailbox::{Inbox, Mailbox, Nothing, mailbox};

/// A peer is asked so long after it came: its own overlay may come a little later.
const AFTER: [Duration; 3] = [Duration::from_secs(3), Duration::from_secs(15), Duration::from_secs(60)];
/// How long all answers of one round may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Port of the discard service (RFC 863), which nobody runs.
const CLOSED_PORT: u16 = 9;
const ECHO_HEADER: usize = 8;

/// A node that is to be asked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peer {
    /// `metadata.name`.
    pub node: String,
    /// Address of the machine.
    pub machine: IpAddr,
    /// Address of the node on the overlay.
    pub overlay: IpAddr,
    /// MTU of the overlay's link.
    pub mtu: u32,
}

/// Which questions were answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Answers {
    /// By the machine.
    pub machine: bool,
    /// Through the overlay.
    pub small: bool,
    /// Through the overlay, as large as its link carries.
    pub large: bool,
    /// Through the overlay, with a checksum of the transport layer.
    pub datagram: bool,
}

/// What is wrong, and what would help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// What is seen.
    pub what: &'static str,
    /// What to do about it.
    pub remedy: &'static str,
}

const BLOCKED: Problem = Problem {
    what: "the machine answers, but nothing comes through the overlay",
    remedy: "let UDP port 8472 pass between the nodes (host firewalls, security groups; some hypervisors use that port themselves), or use --flannel-backend=host-gw on one L2 segment",
};
const TOO_LARGE: Problem = Problem {
    what: "the overlay carries small packets only",
    remedy: "the network between the machines carries less than the MTU of their links: lower it there (ip link set LINK mtu N) and restart the agents",
};
const CHECKSUMS: Problem = Problem {
    what: "the overlay carries echo requests, but no datagrams are answered",
    remedy: "let traffic of the pod ranges pass the host's firewall; if there is none, the network card makes wrong checksums: ethtool -K LINK tx-checksum-ip-generic off for the link co4-… or co6-…",
};

impl Answers {
    /// What is wrong. A machine that does not answer at all is down, or answers nobody: nothing can be said.
    pub fn problem(self) -> Option<Problem> {
        let overlay = self.small || self.large || self.datagram;
        match self {
            _ if !overlay => self.machine.then_some(BLOCKED),
            Self { small: true, large: false, .. } => Some(TOO_LARGE),
            Self { small: true, datagram: false, .. } => Some(CHECKSUMS),
            _ => None,
        }
    }
}

/// Starts the thread; it ends when the mailbox is gone. It is told all peers whenever one of them changes.
pub(super) fn start() -> io::Result<Mailbox<BTreeSet<Peer>>> {
    let (sender, inbox) = mailbox();
    std::thread::Builder::new().name("overlay-probe".into()).spawn(move || run(&inbox))?;
    Ok(sender)
}

/// When a peer came and how often it was asked.
type Pending = BTreeMap<Peer, (Instant, usize)>;

fn run(inbox: &Inbox<BTreeSet<Peer>>) {
    let (mut known, mut pending) = (BTreeSet::new(), Pending::new());
    loop {
        let next = pending.values().filter_map(|(since, asked)| Some(*since + *AFTER.get(*asked)?)).min();
        let wait = next.map(|next| next.saturating_duration_since(Instant::now()));
        match inbox.receive(wait) {
            Ok(peers) => {
                pending.retain(|peer, _| peers.contains(peer));
                let now = Instant::now();
                pending.extend(peers.difference(&known).map(|peer| (peer.clone(), (now, 0))));
                known = peers;
            }
            Err(Nothing::Yet) => ask_due(&mut pending),
            Err(Nothing::Ever) => return,
        }
    }
}

fn ask_due(pending: &mut Pending) {
    let now = Instant::now();
    let is_due = |(since, asked): &(Instant, usize)| AFTER.get(*asked).is_some_and(|after| *since + *after <= now);
    let due: Vec<Peer> = pending.iter().filter(|(_, state)| is_due(state)).map(|(peer, _)| peer.clone()).collect();
    for (peer, answers) in due.iter().zip(ask(&due)) {
        let last = pending.get_mut(peer).is_some_and(|(_, asked)| {
            *asked += 1;
            *asked == AFTER.len()
        });
        let problem = answers.problem();
        if let Some(problem) = problem.filter(|_| last) {
            tracing::warn!(node = peer.node, machine = %peer.machine, overlay = %peer.overlay, what = problem.what, remedy = problem.remedy, "pods of another node cannot be reached well");
        }
        if problem.is_none() || last {
            pending.remove(peer);
        }
    }
}

/// Asks all of them at once; as many answers, in their order.
pub fn ask(peers: &[Peer]) -> Vec<Answers> {
    let mut answers = vec![Answers::default(); peers.len()];
    let datagrams: Vec<Option<UdpSocket>> = peers.iter().map(|peer| knock(peer.overlay).ok()).collect();
    for ipv6 in [false, true] {
        match Echo::open(ipv6) {
            Ok(echo) => echo.round(peers, &mut answers),
            Err(error) => tracing::debug!(ipv6, %error, "cannot send echo requests"),
        }
    }
    for (socket, answers) in datagrams.iter().zip(&mut answers) {
        // Echo requests have waited long enough for this error to be here too.
        let refused = socket.as_ref().and_then(|socket| socket.recv(&mut [0]).err());
        answers.datagram = refused.is_some_and(|error| !matches!(error.kind(), io::ErrorKind::WouldBlock));
    }
    answers
}

/// Sends a datagram to a closed port.
fn knock(ip: IpAddr) -> io::Result<UdpSocket> {
    let any = if ip.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.set_nonblocking(true)?;
    socket.connect((ip, CLOSED_PORT))?;
    socket.send(&[0])?;
    Ok(socket)
}

/// A raw socket for echo requests of one family.
struct Echo {
    fd: OwnedFd,
    ipv6: bool,
    id: u16,
}

/// Which question of a peer a sequence number is.
const QUESTIONS: usize = 3;

impl Echo {
    fn open(ipv6: bool) -> io::Result<Self> {
        let (family, protocol) =
            if ipv6 { (AddressFamily::Inet6, SockProtocol::IcmpV6) } else { (AddressFamily::Inet, SockProtocol::Icmp) };
        let fd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        // Larger than the way carries is refused or lost, never cut.
        if ipv6 {
            set(&fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE)?;
        } else {
            set(&fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)?;
        }
        Ok(Self { fd, ipv6, id: rand::random() })
    }

    /// Sends all questions of this family and marks what is answered.
    fn round(&self, peers: &[Peer], answers: &mut [Answers]) {
        let mut open = BTreeSet::new();
        for (index, peer) in peers.iter().enumerate() {
            let header = if peer.overlay.is_ipv6() { 40 } else { 20 };
            let large = (peer.mtu as usize).saturating_sub(header + ECHO_HEADER);
            for (question, to, size) in [(0, peer.machine, 0), (1, peer.overlay, 0), (2, peer.overlay, large)] {
                let Ok(sequence) = u16::try_from(index * QUESTIONS + question) else { continue };
                if to.is_ipv6() == self.ipv6 && self.send(to, sequence, size).is_ok() {
                    open.insert(sequence);
                }
            }
        }
        let deadline = Instant::now() + ANSWER_WITHIN;
        while !open.is_empty()
            && let Some(left) = deadline.checked_duration_since(Instant::now())
        {
            let Some(sequence) = self.receive(left) else { continue };
            if open.remove(&sequence) {
                let (index, question) = (usize::from(sequence) / QUESTIONS, usize::from(sequence) % QUESTIONS);
                if let Some(answers) = answers.get_mut(index) {
                    match question {
                        0 => answers.machine = true,
                        1 => answers.small = true,
                        _ => answers.large = true,
                    }
                }
            }
        }
    }

    fn send(&self, to: IpAddr, sequence: u16, size: usize) -> io::Result<()> {
        let packet = request(self.ipv6, self.id, sequence, size);
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        sendto(self.fd.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
        Ok(())
    }

    /// The sequence number of the next reply to this socket's requests, if one comes in time.
    fn receive(&self, within: Duration) -> Option<u16> {
        let micros = i64::try_from(within.as_micros()).unwrap_or(i64::MAX).max(1);
        setsockopt(&self.fd, sockopt::ReceiveTimeout, &TimeVal::new(micros / 1_000_000, micros % 1_000_000)).ok()?;
        let mut buffer = vec![0; 1 << 16];
        let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()?;
        reply(self.ipv6, self.id, buffer.get(..length)?)
    }
}

/// An echo request; the kernel makes the checksum of ICMPv6.
fn request(ipv6: bool, id: u16, sequence: u16, size: usize) -> Vec<u8> {
    let mut packet = vec![if ipv6 { 128 } else { 8 }, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(sequence.to_be_bytes());
    packet.resize(ECHO_HEADER + size, 0x5a);
    if !ipv6 {
        let sum = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&sum);
    }
    packet
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The sequence number of an echo reply to requests with that id. IPv4 comes with its header.
fn reply(ipv6: bool, id: u16, packet: &[u8]) -> Option<u16> {
    let header = if ipv6 { 0 } else { usize::from(packet.first()? & 0x0f) * 4 };
    let [kind, _, _, _, id_high, id_low, high, low] = *packet.get(header..)?.first_chunk::<ECHO_HEADER>()?;
    let expected = if ipv6 { 129 } else { 0 };
    (kind == expected && u16::from_be_bytes([id_high, id_low]) == id).then(|| u16::from_be_bytes([high, low]))
}

fn set(fd: &OwnedFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the file descriptor is open, the value is a live i32 and its size is given.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_one_path_does_and_the_other_does_not_is_a_problem() {
        let answers = |machine, small, large, datagram| Answers { machine, small, large, datagram };
        for (answers, problem) in [
            (answers(true, true, true, true), None),
            (answers(false, true, true, true), None),
            (answers(false, false, false, false), None),
            (answers(true, false, false, true), None),
            (answers(true, false, false, false), Some(BLOCKED)),
            (answers(true, true, false, true), Some(TOO_LARGE)),
            (answers(false, true, true, false), Some(CHECKSUMS)),
        ] {
            assert_eq!(answers.problem(), problem, "{answers:?}");
        }
    }

    #[test]
    fn requests_carry_what_replies_are_known_by() {
        let packet = request(false, 0x1234, 7, 3);
        assert_eq!((packet.len(), checksum(&packet)), (11, 0));
        let mut answer = [&[0x45; 1][..], &[0; 19], &packet].concat();
        assert_eq!(reply(false, 0x1234, &answer), None, "a request is no reply");
        answer[20] = 0;
        assert_eq!(reply(false, 0x1234, &answer), Some(7));
        assert_eq!(reply(false, 0x1235, &answer), None);
        assert_eq!(reply(false, 0x1234, &answer[..23]), None);
        assert_eq!(reply(true, 1, &[129, 0, 0, 0, 0, 1, 0, 9]), Some(9));
    }
}
