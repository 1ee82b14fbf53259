//! How the API server reaches a node's HTTP service without a port on the node.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`pipe`] | the own agent: in-memory streams inside one process, HTTP/1.1 |
//! | [`tunnel`] | other agents: HTTP/2 over the connection that the agent dialed, the server being the client |
//! | [`serve`] | the agent's end of a tunnel: HTTP/2 server, extended CONNECT (RFC 8441) for what switches protocols |
//! | [`dial`] | keeps one tunnel to every known server |
//!
//! Both kinds look the same to callers: a request that wants to switch protocols says so as in HTTP/1.1 (`Connection:
//! Upgrade`), is answered with 101, and `hyper::upgrade::on(&mut response)` gives the stream.

pub mod dial;
pub mod pipe;
pub mod serve;
pub mod tunnel;

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use http_body::Body;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

pub use pipe::{NodeLinkListener, Pipe, node_link};
pub use tunnel::Tunnel;

/// Any error a body may end with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// Body of a request to a node.
pub type LinkBody = UnsyncBoxBody<Bytes, BoxError>;

/// How often the other end of an idle tunnel is asked whether it lives, and how long it may take to answer.
const PING: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(10));
/// Bytes in flight per stream and per connection.
const WINDOW: (u32, u32) = (256 << 10, 1 << 20);

/// The node is not reachable.
#[derive(Debug, thiserror::Error)]
pub enum NodeLinkError {
    /// The agent has stopped or was never started.
    #[error("the agent of this node is not running")]
    Closed,
    /// The HTTP exchange broke.
    #[error("request to the node's HTTP service")]
    Http(#[source] hyper::Error),
    /// A path that no request can have.
    #[error("not a path")]
    Path(#[source] http::uri::InvalidUri),
}

/// The way to one node's HTTP service. Clones are the same way.
#[derive(Debug, Clone)]
pub enum NodeLink {
    /// The agent of this process.
    Pipe(Pipe),
    /// An agent that dialed us.
    Tunnel(Tunnel),
}

impl NodeLink {
    /// Sends one request. For an upgrade, await `hyper::upgrade::on(&mut response)` after a `101 Switching Protocols`.
    ///
    /// # Errors
    /// [`NodeLinkError::Closed`] when no agent listens, [`NodeLinkError::Http`] when the exchange breaks.
    pub async fn send<B>(&self, request: Request<B>) -> Result<Response<Incoming>, NodeLinkError>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let request = request.map(|body| body.map_err(Into::into).boxed_unsync());
        match self {
            NodeLink::Pipe(pipe) => pipe.send(request).await,
            NodeLink::Tunnel(tunnel) => tunnel.send(request).await,
        }
    }
}

/// The protocol that HTTP/1.1 headers ask to switch to.
fn wanted_protocol(headers: &HeaderMap) -> Option<String> {
    let connection = headers.get(header::CONNECTION)?.to_str().ok()?;
    if !connection.split(',').any(|token| token.trim().eq_ignore_ascii_case("upgrade")) {
        return None;
    }
    headers.get(header::UPGRADE)?.to_str().ok().map(str::to_owned)
}

/// Takes out what concerns one HTTP/1.1 connection only; HTTP/2 refuses it (RFC 9113 section 8.2.2).
fn strip_connection_headers(headers: &mut HeaderMap) {
    for name in ["connection", "upgrade", "keep-alive", "proxy-connection", "transfer-encoding", "te", "host"] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests;
