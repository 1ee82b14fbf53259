//! The other members: how they are reached, and what is said on the connections.
//!
//! A connection is a byte stream that somebody else made and authenticated ([`Dial`], [`crate::Node::serve_peer`]);
//! HTTP/2 runs on it. Each member keeps two to every peer: one for the log and everything small, one for snapshots, so
//! that a heartbeat never waits behind one.
//!
//! | file | what |
//! | --- | --- |
//! | [`wire`] | requests and answers in bytes |
//! | [`link`] | one outgoing connection |
//! | [`client`] | openraft's calls to a peer |
//! | [`server`] | what peers ask of this member |
//! | [`transfer`] | snapshots on their way |

pub(crate) mod client;
pub(crate) mod link;
pub(crate) mod server;
pub(crate) mod transfer;
pub(crate) mod wire;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use hyper::body::Incoming;
use hyper::{Response, StatusCode};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use self::link::{CallError, Link, read_all};
use self::transfer::Transfer;
use crate::entry::Membership;
use crate::member::Identity;
use crate::membership::{Contact, Peer};

/// A byte stream to a peer, authenticated and encrypted by whoever made it.
pub trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// Makes connections to peers.
pub trait Dial: Send + Sync {
    /// Connects to exactly this member: the caller relies on the other end being who `peer.id` says, not only on the
    /// address.
    ///
    /// # Errors
    /// It can't be reached, or somebody else answers.
    fn dial(&self, peer: &Peer) -> BoxFuture<'static, io::Result<Box<dyn Connection>>>;
}

/// What the others think of this member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Nothing else is known.
    #[default]
    Member,
    /// It was removed from the cluster: it serves no purpose any more and should be stopped, or forget its data
    /// ([`crate::forget`]) and join anew.
    Removed,
    /// The cluster was restored or reset meanwhile; what this member has belongs to the past. It should forget its data
    /// ([`crate::forget`]) and join anew.
    Superseded,
}

/// A peer that was heard within this time is reachable.
const REACHABLE: Duration = Duration::from_secs(4);
/// One that was silent for this time is asked for a sign of life.
const IN_TOUCH: Duration = Duration::from_millis(1500);

/// Which of the connections to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    Log,
    Bulk,
}

/// Every peer that this member knows.
pub(crate) struct Peers {
    pub identity: Arc<Identity>,
    dial: Option<Arc<dyn Dial>>,
    own: Contact,
    known: Mutex<HashMap<u64, Arc<Known>>>,
    /// While set, nothing that keeps this member's leadership alive is sent: its disk doesn't answer.
    pub muted: AtomicBool,
    standing: watch::Sender<Standing>,
    /// Log index of the membership that this member knows.
    membership: AtomicU64,
    started: Instant,
}

struct Known {
    peer: Mutex<Peer>,
    /// The address that the peer itself announced since.
    announced: Mutex<Option<String>>,
    log: Link,
    bulk: Link,
    /// Milliseconds from the start to its last sign of life, plus one; 0 is never.
    heard: AtomicU64,
    transfer: Mutex<Option<Transfer>>,
}

/// The first words on a connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The incarnation of the cluster; null from a member that is in none yet.
    pub cluster: Option<u64>,
    /// Who the caller takes the other end for.
    pub to: u64,
    /// Where the caller is reached now.
    pub address: String,
}

/// A refusal as it is sent.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct RefusalBody {
    pub message: String,
    /// Log index of the membership by which it was refused.
    #[serde(default)]
    pub membership: u64,
}

/// A refusal that came back.
#[derive(Debug)]
pub(crate) struct Refused {
    pub status: StatusCode,
    pub text: String,
    pub membership: u64,
}

impl Refused {
    async fn read(answer: Response<Incoming>) -> Refused {
        let status = answer.status();
        let body = read_all(answer.into_body()).await.unwrap_or_default();
        match serde_json::from_slice::<RefusalBody>(&body) {
            Ok(refusal) => Refused { status, text: refusal.message, membership: refusal.membership },
            Err(_) => Refused { status, text: String::from_utf8_lossy(&body).into_owned(), membership: 0 },
        }
    }
}

/// The cluster was restored or reset; the caller's data belongs to the past.
pub(crate) const SUPERSEDED: StatusCode = StatusCode::GONE;
/// The caller is no member.
pub(crate) const NOT_A_MEMBER: StatusCode = StatusCode::FORBIDDEN;

impl Peers {
    pub fn new(identity: Arc<Identity>, own: Contact, dial: Option<Arc<dyn Dial>>) -> Peers {
        Peers {
            identity,
            dial,
            own,
            known: Mutex::default(),
            muted: AtomicBool::new(false),
            standing: watch::Sender::new(Standing::Member),
            membership: AtomicU64::new(0),
            started: Instant::now(),
        }
    }

    pub fn own(&self) -> Peer {
        Peer::new(self.identity.id, &self.own)
    }

    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    fn known(&self, id: u64, contact: Option<&Contact>) -> Arc<Known> {
        let mut known = self.known.lock();
        let entry = known.entry(id).or_insert_with(|| {
            Arc::new(Known {
                peer: Mutex::new(Peer { id, ..Peer::default() }),
                announced: Mutex::default(),
                log: Link::new(id),
                bulk: Link::new(id),
                heard: AtomicU64::new(0),
                transfer: Mutex::default(),
            })
        });
        if let Some(contact) = contact {
            let mut peer = entry.peer.lock();
            if peer.address != contact.address {
                // What the membership says now is newer than what the peer said before.
                *entry.announced.lock() = None;
            }
            *peer = Peer::new(id, contact);
        }
        entry.clone()
    }

    /// Follows the membership: new addresses are used from the next connection on, former members are forgotten.
    pub fn update(&self, membership: &Membership, index: u64) {
        self.membership.store(index, Ordering::Relaxed);
        for (id, contact) in membership.nodes().filter(|(id, _)| **id != self.identity.id) {
            self.known(*id, Some(contact));
        }
        self.known.lock().retain(|id, _| membership.get_node(id).is_some());
        let inside = membership.get_node(&self.identity.id).is_some();
        let removed = *self.standing.borrow() == Standing::Removed;
        if inside && removed {
            self.standing.send_replace(Standing::Member);
        }
    }

    /// Where a peer says it is now; used until the membership says otherwise.
    pub fn announce(&self, id: u64, address: &str) {
        let known = self.known(id, None);
        let differs = known.peer.lock().address != address;
        *known.announced.lock() = (differs && !address.is_empty()).then(|| address.to_owned());
    }

    async fn dial(&self, id: u64) -> io::Result<Box<dyn Connection>> {
        let Some(dial) = &self.dial else { return Err(io::Error::other("this member has no way to reach others")) };
        let known = self.known(id, None);
        let mut peer = known.peer.lock().clone();
        if let Some(address) = &*known.announced.lock() {
            peer.address.clone_from(address);
        }
        let dialled = dial.dial(&peer);
        dialled.await
    }

    fn hello_to(&self, id: u64) -> Vec<u8> {
        let hello = Hello { cluster: self.identity.cluster(), to: id, address: self.own.address.clone() };
        serde_json::to_vec(&hello).unwrap_or_default()
    }

    /// A peer gave a sign of life.
    pub fn heard(&self, id: u64) {
        let now = self.started.elapsed().as_millis() as u64 + 1;
        self.known(id, None).heard.store(now, Ordering::Relaxed);
    }

    /// Whether a peer gave a sign of life lately.
    pub fn is_reachable(&self, id: u64) -> bool {
        self.silence(id).is_some_and(|silence| silence < REACHABLE)
    }

    /// Time since the last sign of life of a peer; None when there was none.
    fn silence(&self, id: u64) -> Option<Duration> {
        let heard = self.known.lock().get(&id)?.heard.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.started.elapsed().saturating_sub(Duration::from_millis(heard)))
    }

    /// Draws conclusions from a refusal.
    fn note_refusal(&self, id: u64, refused: &Refused) {
        let newer = refused.membership > self.membership.load(Ordering::Relaxed);
        let standing = match refused.status {
            SUPERSEDED => Standing::Superseded,
            NOT_A_MEMBER if newer => Standing::Removed,
            _ => return,
        };
        if self.standing.send_replace(standing) != standing {
            tracing::error!(peer = id, reason = refused.text, ?standing, "the other members don't count this one in");
        }
    }

    /// Sends a short request, reads all of the answer.
    pub async fn call(self: &Arc<Self>, id: u64, path: &'static str, body: Bytes) -> Result<Bytes, CallError> {
        self.known(id, None).log.call(self, path, body).await
    }

    /// Sends a request on one of the connections.
    pub async fn send(
        self: &Arc<Self>,
        id: u64,
        lane: Lane,
        path: &'static str,
        body: link::Body,
    ) -> Result<Response<Incoming>, CallError> {
        let known = self.known(id, None);
        let link = if lane == Lane::Log { &known.log } else { &known.bulk };
        link.send(self, path, body).await
    }

    /// The snapshot that is on its way to the peer: bytes done, and of how many.
    pub fn transfer_to(&self, id: u64) -> Option<(u64, u64)> {
        self.known(id, None).transfer.lock().as_ref().map(Transfer::progress)
    }

    fn set_transfer(&self, id: u64, transfer: Option<Transfer>) {
        *self.known(id, None).transfer.lock() = transfer;
    }

    /// Where this member reaches the others, itself included.
    pub fn addresses(&self) -> HashMap<u64, String> {
        let known = self.known.lock();
        let of = |known: &Known| known.announced.lock().clone().unwrap_or_else(|| known.peer.lock().address.clone());
        let mut addresses: HashMap<u64, String> = known.iter().map(|(id, known)| (*id, of(known))).collect();
        addresses.insert(self.identity.id, self.own.address.clone());
        addresses
    }

    /// Exchanges a word with everyone who was silent for a while, so that it is known who is there. While somebody can't be
    /// reached it asks all: members may have moved while this one was away, and what is heard is believed of those who
    /// can't be reached. Runs until it is dropped.
    pub async fn keep_in_touch(self: Arc<Self>) {
        loop {
            tokio::time::sleep(IN_TOUCH.mul_f64(rand::random_range(0.8..1.2))).await;
            let ids: Vec<u64> = self.known.lock().keys().copied().collect();
            if ids.is_empty() {
                tokio::time::sleep(3 * IN_TOUCH).await;
            }
            let missed = ids.iter().any(|id| !self.is_reachable(*id));
            let silent = |id: &&u64| self.silence(**id).is_none_or(|silence| silence > IN_TOUCH);
            let asked = ids
                .iter()
                .filter(|id| missed || silent(id))
                .map(|id| tokio::time::timeout(IN_TOUCH, self.call(*id, "/peers", Bytes::new())));
            for answer in futures::future::join_all(asked).await.into_iter().flatten().flatten() {
                let told: HashMap<u64, String> = serde_json::from_slice(&answer).unwrap_or_default();
                for (id, address) in told {
                    if ids.contains(&id) && !self.is_reachable(id) {
                        self.announce(id, &address);
                    }
                }
            }
        }
    }

    /// Closes every connection.
    pub async fn close(&self) {
        let all: Vec<_> = self.known.lock().values().cloned().collect();
        for known in all {
            known.log.reset().await;
            known.bulk.reset().await;
        }
    }
}
