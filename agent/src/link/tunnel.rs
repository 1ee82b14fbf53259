//! The server's end of a tunnel: an HTTP/2 client on a connection that an agent dialed.

use std::future::Future;

use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::ext::Protocol;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{LinkBody, NodeLinkError, PING, WINDOW, strip_connection_headers, wanted_protocol};

/// A connected agent.
#[derive(Debug, Clone)]
pub struct Tunnel {
    sender: http2::SendRequest<LinkBody>,
}

impl Tunnel {
    /// Takes over a connection after its handshake. The future carries the tunnel and ends with it.
    ///
    /// # Errors
    /// The agent does not speak HTTP/2.
    pub async fn over<S>(stream: S) -> Result<(Tunnel, impl Future<Output = hyper::Result<()>> + Send), NodeLinkError>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW.0)
            .initial_connection_window_size(WINDOW.1);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(NodeLinkError::Http)?;
        Ok((Tunnel { sender }, connection))
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    pub(super) async fn send(&self, request: Request<LinkBody>) -> Result<Response<Incoming>, NodeLinkError> {
        let protocol = wanted_protocol(request.headers());
        let request = to_http2(request, protocol.as_deref())?;
        let mut sender = self.sender.clone();
        if sender.is_closed() {
            return Err(NodeLinkError::Closed);
        }
        sender.ready().await.map_err(NodeLinkError::Http)?;
        let mut response = sender.send_request(request).await.map_err(NodeLinkError::Http)?;
        if let Some(protocol) = protocol.filter(|_| response.status() == StatusCode::OK) {
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            let headers = response.headers_mut();
            headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
            if let Ok(protocol) = HeaderValue::try_from(protocol) {
                headers.insert(header::UPGRADE, protocol);
            }
        }
        Ok(response)
    }
}

/// An HTTP/1.1 request as HTTP/2 wants it: no connection headers, an absolute target, extended CONNECT for an upgrade.
fn to_http2(request: Request<LinkBody>, protocol: Option<&str>) -> Result<Request<LinkBody>, NodeLinkError> {
    let (mut parts, body) = request.into_parts();
    strip_connection_headers(&mut parts.headers);
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    parts.uri = format!("http://node{path}").parse().map_err(NodeLinkError::Path)?;
    parts.version = Version::HTTP_2;
    if let Some(protocol) = protocol {
        parts.method = Method::CONNECT;
        // A POST without a body says 0, which would make all that follows on the stream too much.
        parts.headers.remove(header::CONTENT_LENGTH);
        parts.extensions.insert(Protocol::from(protocol));
    }
    Ok(Request::from_parts(parts, body))
}
