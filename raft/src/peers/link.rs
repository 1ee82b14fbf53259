//! One connection to a peer: dialled when it is needed, HTTP/2 on top, greeted once, dialled anew when it breaks.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::task::AbortHandle;

use super::{Peers, Refused};

/// What a request or an answer carries.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Time for a connection to be made, greeting included.
const DIAL: Duration = Duration::from_secs(3);
/// A silent peer is asked for a sign of life this often, and given so long to send one.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
const KEEP_ALIVE_PATIENCE: Duration = Duration::from_secs(2);
/// After a failed attempt the next one waits a random part of this, doubled each time up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LAST_PAUSE: Duration = Duration::from_millis(800);
/// Bytes that may be under way unread: snapshots and entries should fill a network with some delay.
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Longest answer that is read whole.
const MAX_ANSWER: usize = 1 << 20;

/// A request to a peer failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// It was not sent: the peer can't be reached.
    #[error("the peer can't be reached: {0}")]
    NotSent(String),
    /// It was sent, and there is no answer; the peer may have acted on it.
    #[error("the connection was lost: {0}")]
    Lost(String),
    /// The peer refused.
    #[error("the peer refused: {status} {text}")]
    Refused { status: StatusCode, text: String },
}

/// A connection that is made when needed.
pub(crate) struct Link {
    peer: u64,
    /// Held by the task that connects, so that callers who lose patience don't end the attempt.
    state: Arc<tokio::sync::Mutex<State>>,
}

#[derive(Default)]
struct State {
    connection: Option<Connection>,
    failures: u32,
    /// Not before this is another attempt made; and what the last one ended with.
    not_before: Option<(Instant, String)>,
}

struct Connection {
    requests: SendRequest<Body>,
    driver: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

pub(crate) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

impl Link {
    pub fn new(peer: u64) -> Link {
        Link { peer, state: Arc::default() }
    }

    /// Closes the connection; the next request makes a new one at once.
    pub async fn reset(&self) {
        *self.state.lock().await = State::default();
    }

    /// Sends a request; returns the head of the answer.
    pub async fn send(
        &self,
        peers: &Arc<Peers>,
        path: &'static str,
        body: Body,
    ) -> Result<Response<Incoming>, CallError> {
        let mut requests = self.requests(peers).await?;
        // An address that openraft or the network never sees: the connection is authenticated, the path names the call.
        let uri = format!("http://peer{path}");
        let request = Request::post(uri).body(body).map_err(|e| CallError::NotSent(e.to_string()))?;
        if let Err(error) = requests.ready().await {
            return Err(CallError::NotSent(error.to_string()));
        }
        let answer = match requests.try_send_request(request).await {
            Ok(answer) => answer,
            Err(error) if error.message().is_some() => return Err(CallError::NotSent(error.error().to_string())),
            Err(error) => return Err(CallError::Lost(describe(&error.into_error()))),
        };
        peers.heard(self.peer);
        if answer.status().is_success() {
            return Ok(answer);
        }
        let refused = Refused::read(answer).await;
        peers.note_refusal(self.peer, &refused);
        Err(CallError::Refused { status: refused.status, text: refused.text })
    }

    /// Sends a request and reads all of the answer.
    pub async fn call(&self, peers: &Arc<Peers>, path: &'static str, body: Bytes) -> Result<Bytes, CallError> {
        let answer = self.send(peers, path, full(body)).await?;
        read_all(answer.into_body()).await.map_err(|error| CallError::Lost(error.to_string()))
    }

    async fn requests(&self, peers: &Arc<Peers>) -> Result<SendRequest<Body>, CallError> {
        let mut state = self.state.clone().lock_owned().await;
        if let Some(connection) = &state.connection
            && !connection.requests.is_closed()
        {
            return Ok(connection.requests.clone());
        }
        state.connection = None;
        if let Some((not_before, reason)) = &state.not_before
            && Instant::now() < *not_before
        {
            return Err(CallError::NotSent(reason.clone()));
        }
        let (peer, peers) = (self.peer, peers.clone());
        let attempt = tokio::spawn(async move {
            let connected = tokio::time::timeout(DIAL, connect(peer, &peers)).await;
            let connected = connected.unwrap_or_else(|_| Err(CallError::NotSent("it took too long".to_owned())));
            state.note(peer, connected)
        });
        attempt.await.unwrap_or_else(|error| Err(CallError::NotSent(error.to_string())))
    }
}

impl State {
    fn note(&mut self, peer: u64, connected: Result<Connection, CallError>) -> Result<SendRequest<Body>, CallError> {
        match connected {
            Ok(connection) => {
                let requests = connection.requests.clone();
                *self = State { connection: Some(connection), ..State::default() };
                Ok(requests)
            }
            Err(error) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(8)).min(LAST_PAUSE);
                self.failures += 1;
                let reason = match &error {
                    CallError::NotSent(reason) => reason.clone(),
                    other => other.to_string(),
                };
                let pause = pause.mul_f64(rand::random_range(0.5..1.0));
                self.not_before = Some((Instant::now() + pause, reason));
                tracing::debug!(peer, %error, "connecting failed");
                Err(error)
            }
        }
    }
}

async fn connect(peer: u64, peers: &Peers) -> Result<Connection, CallError> {
    let not_sent = |error: &dyn std::fmt::Display| CallError::NotSent(error.to_string());
    let stream = peers.dial(peer).await.map_err(|e| not_sent(&e))?;
    let handshake = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_PATIENCE)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .handshake(TokioIo::new(stream))
        .await;
    let (mut requests, driver) = handshake.map_err(|e| not_sent(&describe(&e)))?;
    let driver = tokio::spawn(async move {
        // Its end shows at the requests.
        let _ = driver.await;
    });
    let connection = Connection { requests: requests.clone(), driver: driver.abort_handle() };
    let request = Request::post("http://peer/hello").body(full(peers.hello_to(peer).into()));
    let request = request.map_err(|e| not_sent(&e))?;
    let answer = requests.send_request(request).await.map_err(|e| not_sent(&describe(&e)))?;
    if answer.status().is_success() {
        peers.heard(peer);
        return Ok(connection);
    }
    let refused = Refused::read(answer).await;
    peers.note_refusal(peer, &refused);
    Err(CallError::Refused { status: refused.status, text: refused.text })
}

/// hyper's errors say little by themselves.
fn describe(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// All of a short body.
pub(crate) async fn read_all(body: Incoming) -> io::Result<Bytes> {
    let limited = http_body_util::Limited::new(body, MAX_ANSWER);
    Ok(limited.collect().await.map_err(io::Error::other)?.to_bytes())
}
