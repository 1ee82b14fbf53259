//! One HTTP/2 connection to one server. Closing it ends all that runs on it, so that watches go on elsewhere.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio_util::sync::CancellationToken;

use super::dial::{DialError, Dialer, Protocol};

/// How often an idle server is asked whether it lives, and how long it may take to answer.
const PING: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(4));
/// How long `/readyz` may take.
const READY_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes in flight per stream and per connection.
const WINDOW: (u32, u32) = (1 << 20, 4 << 20);

/// Why a server cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The exchange broke.
    #[error("HTTP/2")]
    Http(#[source] hyper::Error),
    /// Silence.
    #[error("no answer in time")]
    Timeout,
}

/// A connection. Clones are one connection.
#[derive(Clone)]
pub struct Channel {
    /// `host:port` as dialed.
    pub address: String,
    /// Tells connections apart.
    id: u64,
    sender: http2::SendRequest<Full<Bytes>>,
    /// Cancelled when the connection takes no more requests.
    ended: CancellationToken,
    /// Ends everything on the connection.
    kill: CancellationToken,
}

/// Spawns what hyper needs for a connection in the scope of that connection.
#[derive(Clone)]
struct Scope(CancellationToken);

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Scope {
    fn execute(&self, future: F) {
        let kill = self.0.clone();
        tokio::spawn(async move { kill.run_until_cancelled(future).await });
    }
}

impl Channel {
    /// Connects.
    ///
    /// # Errors
    /// See [`ChannelError`].
    pub async fn open(dialer: &Dialer, address: &str) -> Result<Channel, ChannelError> {
        let stream = dialer.dial(address, Protocol::Api).await?;
        let (kill, ended) = (CancellationToken::new(), CancellationToken::new());
        let mut builder = http2::Builder::new(Scope(kill.clone()));
        builder
            .timer(TokioTimer::new())
            .keep_alive_interval(PING.0)
            .keep_alive_timeout(PING.1)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW.0)
            .initial_connection_window_size(WINDOW.1);
        let (sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(ChannelError::Http)?;
        let (killed, over, name) = (kill.clone(), ended.clone(), address.to_owned());
        tokio::spawn(async move {
            if let Some(Err(error)) = killed.run_until_cancelled(connection).await {
                tracing::debug!(%error, server = name, "connection to a server ended");
            }
            over.cancel();
        });
        Ok(Channel { address: address.to_owned(), id: rand::random(), sender, ended, kill })
    }

    /// Whether it takes no more requests.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.ended.is_cancelled() || self.sender.is_closed()
    }

    /// Whether both are the same connection.
    #[must_use]
    pub fn is_same(&self, other: &Channel) -> bool {
        self.id == other.id
    }

    /// Waits until it takes no more requests.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Ends everything on the connection.
    pub fn close(&self) {
        self.kill.cancel();
    }

    /// Sends a request, whose target is completed.
    ///
    /// # Errors
    /// The request comes back when nothing of it was sent.
    pub async fn send(
        &self,
        mut request: Request<Full<Bytes>>,
    ) -> Result<Response<Incoming>, (hyper::Error, Option<Request<Full<Bytes>>>)> {
        let path = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        if let Ok(uri) = format!("https://{}{path}", super::dial::SERVER_NAME).parse() {
            *request.uri_mut() = uri;
        }
        *request.version_mut() = Version::HTTP_2;
        let mut sender = self.sender.clone();
        if let Err(error) = sender.ready().await {
            return Err((error, Some(request)));
        }
        sender.try_send_request(request).await.map_err(|mut error| {
            let message = error.take_message();
            (error.into_error(), message)
        })
    }

    /// Whether the server calls itself ready.
    ///
    /// # Errors
    /// No answer at all.
    pub async fn is_ready(&self) -> Result<bool, ChannelError> {
        let mut request = Request::new(Full::default());
        *request.uri_mut() = http::Uri::from_static("/readyz");
        let answer = tokio::time::timeout(READY_TIMEOUT, self.send(request)).await;
        let answer = answer.map_err(|_| ChannelError::Timeout)?.map_err(|(error, _)| ChannelError::Http(error))?;
        Ok(answer.status() == StatusCode::OK)
    }
}
