//! What is not the API on the API's port.
//!
//! * Protocols of our own: TLS connections whose ALPN is not HTTP, between servers and from agents. Unlike on the API a client
//!   certificate is demanded: without one that our client CA signed no handler ever sees the connection.
//! * Paths that check credentials themselves, because those who ask are no users of the API yet (joining machines) or must be
//!   served when the API cannot be (servers looking for each other).

use super::body::Body;
use crate::auth::pki::server_name;
use crate::auth::{PeerCertificate, UserInfo};
use futures::future::BoxFuture;
use http::{Request, Response};
use parking_lot::RwLock;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::net::TcpStream;

/// Raft between servers.
pub const PEER: &[u8] = b"coracle-peer/1";
/// An agent's tunnel, on which the agent serves and we ask.
pub const LINK: &[u8] = b"coracle-link/1";
/// What TLS offers beside HTTP.
pub const ALL: [&[u8]; 2] = [PEER, LINK];

/// A connection after the handshake.
pub type TlsStream = tokio_rustls::server::TlsStream<TcpStream>;

/// Takes a connection over; it is cut when the returned future ends, and the future is dropped when the server stops (after
/// the API has drained).
pub type Handler = Arc<dyn Fn(TlsStream, PeerIdentity, SocketAddr) -> BoxFuture<'static, ()> + Send + Sync>;

/// Whom the verified client certificate names.
#[derive(Clone, Debug)]
pub struct PeerIdentity {
    /// CN and O of the leaf.
    pub user: Arc<UserInfo>,
    /// When the leaf ends; long connections should not outlive it by much.
    pub not_after: SystemTime,
}

impl PeerIdentity {
    /// The id of the server that this is, if it is one.
    pub fn server_id(&self) -> Option<u64> {
        server_name::id_of_user(&self.user)
    }

    /// The name of the node that this is, if it is one.
    pub fn node_name(&self) -> Option<&str> {
        let is_node = self.user.groups.iter().any(|group| group == "system:nodes");
        self.user.name.strip_prefix("system:node:").filter(|name| is_node && !name.is_empty())
    }
}

/// Answers a request that nobody authenticated; the certificate is what the handshake brought along.
pub type Doorkeeper =
    Arc<dyn Fn(Request<Body>, PeerCertificate, SocketAddr) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

type Registry<K, V> = Arc<RwLock<Vec<(&'static K, V)>>>;

/// The handlers by protocol and path. Cheap to clone; all clones are one registry.
#[derive(Clone)]
pub struct Protocols {
    handlers: Registry<[u8], Handler>,
    doors: Registry<str, Doorkeeper>,
    earliest: SystemTime,
}

impl Default for Protocols {
    fn default() -> Protocols {
        Protocols::new(SystemTime::UNIX_EPOCH)
    }
}

impl Protocols {
    /// Certificates are judged as of now, but not as of a time before `earliest`: a machine whose clock is far behind still
    /// knows its peers.
    pub fn new(earliest: SystemTime) -> Protocols {
        Protocols { handlers: Arc::default(), doors: Arc::default(), earliest }
    }

    /// The time at which certificates are judged.
    pub fn now(&self) -> SystemTime {
        SystemTime::now().max(self.earliest)
    }

    /// Gives requests for paths below `prefix` to `keeper`, unauthenticated.
    pub fn on_path(&self, prefix: &'static str, keeper: Doorkeeper) {
        self.doors.write().push((prefix, keeper));
    }

    /// Who answers for a path, if it is not the API.
    pub fn doorkeeper(&self, path: &str) -> Option<Doorkeeper> {
        self.doors.read().iter().find(|(prefix, _)| path.starts_with(prefix)).map(|(_, keeper)| keeper.clone())
    }

    /// Hands connections of this protocol (one of [`ALL`]) to `handler`, in place of an earlier one. A connection of a protocol
    /// that has no handler is closed.
    pub fn on(&self, alpn: &'static [u8], handler: Handler) {
        let mut handlers = self.handlers.write();
        handlers.retain(|(known, _)| *known != alpn);
        handlers.push((alpn, handler));
    }

    /// The handler of a protocol.
    pub fn handler(&self, alpn: &[u8]) -> Option<Handler> {
        self.handlers.read().iter().find(|(known, _)| *known == alpn).map(|(_, handler)| handler.clone())
    }
}

/// The identity of a peer that showed a good certificate.
pub fn identity(peer: PeerCertificate) -> Option<PeerIdentity> {
    match peer {
        PeerCertificate::Verified { user, not_after } => Some(PeerIdentity { user, not_after }),
        PeerCertificate::None | PeerCertificate::Rejected => None,
    }
}
