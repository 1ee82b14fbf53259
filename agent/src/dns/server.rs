//! Sockets of the responder: UDP and TCP on port 53 of the cluster DNS address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::Name;
use parking_lot::RwLock;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::answer::{self, Reply};
use super::index::Index;
use super::relay::Relay;

/// Queries that wait for upstream at once; more are refused with `SERVFAIL`.
const RELAYED: usize = 512;
/// Open TCP connections.
const CONNECTIONS: usize = 128;
/// A TCP connection without a query ends.
const IDLE: Duration = Duration::from_secs(10);
/// Pause after an address could not be bound or a socket failed.
const RETRY: Duration = Duration::from_millis(500);
const PORT: u16 = 53;

/// What every socket needs.
#[derive(Debug)]
pub struct Shared {
    /// All names.
    pub index: RwLock<Index>,
    /// Whether the index was filled once.
    pub ready: AtomicBool,
    /// Everything else.
    pub relay: Relay,
    relayed: Semaphore,
    connections: Arc<Semaphore>,
}

impl Shared {
    /// Over an index that is not filled yet.
    pub fn new(index: Index, relay: Relay) -> Self {
        Self {
            index: RwLock::new(index),
            ready: AtomicBool::new(false),
            relay,
            relayed: Semaphore::new(RELAYED),
            connections: Arc::new(Semaphore::new(CONNECTIONS)),
        }
    }

    fn decide(&self, query: &Message) -> Reply {
        answer::decide(query, &self.index.read(), self.ready.load(Ordering::Acquire))
    }

    /// The answer to a query that needs upstream.
    async fn relay(&self, query: &Message, reply: Reply) -> Message {
        let Ok(_permit) = self.relayed.try_acquire() else {
            return answer::failure(query, ResponseCode::ServFail);
        };
        match reply {
            Reply::Chase(partial, target) => self.chase(query, *partial, target).await,
            _ => match self.relay.ask(query).await {
                Some(answer) => answer,
                None => answer::failure(query, ResponseCode::ServFail),
            },
        }
    }

    async fn chase(&self, query: &Message, mut partial: Message, target: Name) -> Message {
        let Some(question) = query.queries.first() else { return partial };
        let mut further = Message::query();
        further.add_query(Query::query(target, question.query_type()));
        further.metadata.recursion_desired = true;
        match self.relay.ask(&further).await {
            Some(found) => {
                partial.add_answers(found.answers);
                partial
            }
            // The alias itself is known; a client may resolve it elsewhere.
            None => partial,
        }
    }
}

/// Answers on one address until shutdown. A failure is retried, so that an address that comes later is found.
pub async fn serve(shared: Arc<Shared>, ip: IpAddr, shutdown: CancellationToken) {
    let address = SocketAddr::new(ip, PORT);
    let datagrams = repeat("udp", shutdown.clone(), || datagrams(shared.clone(), address));
    let streams = repeat("tcp", shutdown, || streams(shared.clone(), address));
    tokio::join!(datagrams, streams);
}

async fn repeat<F: Future<Output = io::Result<()>>>(
    transport: &'static str,
    shutdown: CancellationToken,
    mut run: impl FnMut() -> F,
) {
    let mut told = false;
    loop {
        let result = tokio::select! {
            () = shutdown.cancelled() => return,
            result = run() => result,
        };
        if let Err(error) = result
            && !std::mem::replace(&mut told, true)
        {
            tracing::warn!(transport, %error, "cannot serve DNS, trying again");
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn datagrams(shared: Arc<Shared>, address: SocketAddr) -> io::Result<()> {
    let socket = Arc::new(UdpSocket::bind(address).await?);
    let mut buffer = vec![0; 4096];
    loop {
        let (length, peer) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            // An earlier answer met a closed port.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error),
        };
        let Ok(query) = Message::from_vec(buffer.get(..length).unwrap_or_default()) else { continue };
        let limit = answer::udp_limit(&query);
        match shared.decide(&query) {
            Reply::Silence => {}
            Reply::Done(answer) => {
                if let Some(bytes) = answer::encode(&answer, limit) {
                    // A full send buffer loses the answer, as the network may; the client asks again.
                    let _ = socket.try_send_to(&bytes, peer);
                }
            }
            reply @ (Reply::Upstream | Reply::Chase(..)) => {
                let (shared, socket) = (shared.clone(), socket.clone());
                tokio::spawn(async move {
                    let answer = shared.relay(&query, reply).await;
                    if let Some(bytes) = answer::encode(&answer, limit) {
                        let _ = socket.send_to(&bytes, peer).await;
                    }
                });
            }
        }
    }
}

async fn streams(shared: Arc<Shared>, address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    loop {
        let Ok(permit) = shared.connections.clone().acquire_owned().await else { return Ok(()) };
        let (stream, _) = listener.accept().await?;
        let shared = shared.clone();
        tokio::spawn(async move {
            // A client that goes away or sends nonsense ends its own connection only.
            let _ = connection(&shared, stream).await;
            drop(permit);
        });
    }
}

async fn connection(shared: &Shared, mut stream: TcpStream) -> io::Result<()> {
    loop {
        let length = tokio::time::timeout(IDLE, stream.read_u16()).await??;
        let mut bytes = vec![0; usize::from(length)];
        tokio::time::timeout(IDLE, stream.read_exact(&mut bytes)).await??;
        let query = Message::from_vec(&bytes).map_err(io::Error::other)?;
        let answer = match shared.decide(&query) {
            Reply::Silence => continue,
            Reply::Done(answer) => *answer,
            reply => shared.relay(&query, reply).await,
        };
        let Some(bytes) = answer::encode(&answer, u16::MAX) else { return Ok(()) };
        let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        let message = [&length.to_be_bytes()[..], &bytes].concat();
        tokio::time::timeout(IDLE, stream.write_all(&message)).await??;
    }
}
