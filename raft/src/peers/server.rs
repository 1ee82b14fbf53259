//! What peers ask of this member, on connections that they made.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http2::Builder;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use openraft::async_runtime::WatchReceiver;

use super::link::{Body, full};
use super::wire::{self, Forwarded, answer_frame, append_request, frames};
use super::{Connection, Hello, NOT_A_MEMBER, Peers, RefusalBody, SUPERSEDED, transfer};
use crate::forward::Forwards;
use crate::leadership::Contacts;
use crate::members::{Change, Members};
use crate::node::Engine;
use crate::read::read_index;
use crate::snapshot::Arriving;

/// A silent peer is asked for a sign of life this often, and given so long to send one.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
const KEEP_ALIVE_PATIENCE: Duration = Duration::from_secs(5);
const STREAM_WINDOW: u32 = 2 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;
/// Longest request that is read whole: a batch of commands.
const MAX_REQUEST: usize = 16 << 20;

/// Everything that answers peers; cheap to share.
pub(crate) struct Serving {
    pub raft: Engine,
    pub peers: Arc<Peers>,
    pub forwards: Forwards,
    pub contacts: Arc<Contacts>,
    pub members: Arc<Members>,
    pub snapshot_dir: PathBuf,
}

/// Why a request is refused.
struct Refusal {
    status: StatusCode,
    message: String,
}

fn refuse(status: StatusCode, message: impl std::fmt::Display) -> Refusal {
    Refusal { status, message: message.to_string() }
}

fn malformed(error: io::Error) -> Refusal {
    refuse(StatusCode::BAD_REQUEST, error)
}

fn unavailable(error: impl std::fmt::Display) -> Refusal {
    refuse(StatusCode::SERVICE_UNAVAILABLE, error)
}

/// Serves one connection until it ends.
pub(crate) async fn serve(serving: Arc<Serving>, stream: Box<dyn Connection>, peer: u64) {
    let greeted = Arc::new(AtomicBool::new(false));
    serving.contacts.connected(peer);
    let service = {
        let serving = serving.clone();
        service_fn(move |request| {
            let (serving, greeted) = (serving.clone(), greeted.clone());
            async move { Ok::<_, Infallible>(answer(&serving, peer, &greeted, request).await) }
        })
    };
    let served = Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_PATIENCE)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    serving.contacts.disconnected(peer);
    if let Err(error) = served {
        tracing::debug!(peer, %error, "a connection of a peer ended");
    }
}

async fn answer(serving: &Serving, peer: u64, greeted: &AtomicBool, request: Request<Incoming>) -> Response<Body> {
    serving.peers.heard(peer);
    let path = request.uri().path().to_owned();
    let handled = match path.as_str() {
        "/hello" => serving.hello(peer, greeted, request.into_body()).await,
        _ if !greeted.load(Ordering::Acquire) => Err(refuse(StatusCode::PRECONDITION_REQUIRED, "say hello first")),
        path => serving.handle(peer, path, request.into_body()).await,
    };
    match handled {
        Ok(body) => Response::new(body),
        Err(refusal) => {
            tracing::debug!(peer, path, status = refusal.status.as_u16(), reason = refusal.message, "refused a peer");
            let membership = serving.membership_index();
            let body = serde_json::to_vec(&RefusalBody { message: refusal.message, membership }).unwrap_or_default();
            let mut response = Response::new(full(body.into()));
            *response.status_mut() = refusal.status;
            response
        }
    }
}

async fn whole(body: Incoming) -> Result<Bytes, Refusal> {
    let limited = http_body_util::Limited::new(body, MAX_REQUEST).collect().await;
    Ok(limited.map_err(|error| refuse(StatusCode::BAD_REQUEST, error))?.to_bytes())
}

impl Serving {
    fn membership_index(&self) -> u64 {
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        membership.log_id().map_or(0, |id| id.index)
    }

    /// The first request of a connection: both ends must belong to the same incarnation of the cluster.
    async fn hello(&self, peer: u64, greeted: &AtomicBool, body: Incoming) -> Result<Body, Refusal> {
        let hello: Hello = serde_json::from_slice(&whole(body).await?).map_err(|e| malformed(e.into()))?;
        let identity = &self.peers.identity;
        if hello.to != identity.id {
            return Err(refuse(StatusCode::MISDIRECTED_REQUEST, format!("this is member {:016x}", identity.id)));
        }
        match (hello.cluster, identity.cluster()) {
            (Some(theirs), Some(own)) if theirs == own => {}
            (Some(theirs), _) if identity.replaces(theirs) => {
                return Err(refuse(SUPERSEDED, "the cluster was restored or reset; forget your data and join again"));
            }
            (Some(_), Some(_)) => return Err(refuse(StatusCode::CONFLICT, "this member belongs to another cluster")),
            (Some(theirs), None) => {
                let peers = self.peers.clone();
                let adopted = tokio::task::spawn_blocking(move || peers.identity.adopt(theirs)).await;
                if !adopted.map_err(unavailable)?.map_err(unavailable)? {
                    return Err(refuse(StatusCode::CONFLICT, "this member belongs to another cluster"));
                }
            }
            (None, _) => return Err(refuse(NOT_A_MEMBER, "you are in no cluster yet; wait to be added")),
        }
        self.peers.announce(peer, &hello.address);
        greeted.store(true, Ordering::Release);
        Ok(full(Bytes::new()))
    }

    async fn handle(&self, peer: u64, path: &str, body: Incoming) -> Result<Body, Refusal> {
        match path {
            // A leader that this member has not heard of may be legitimate: members were replaced while this one was
            // away. As long as another one leads it isn't.
            "/raft/append" | "/raft/snapshot" if !self.is_member(peer) && self.contacts.has_leader_besides(peer) => {
                return Err(refuse(NOT_A_MEMBER, "you are no member of this cluster"));
            }
            "/raft/append" => return Ok(self.append(peer, body)),
            "/raft/snapshot" => return self.snapshot(peer, body).await,
            _ => {}
        }
        if !self.is_member(peer) {
            return Err(refuse(NOT_A_MEMBER, "you are no member of this cluster"));
        }
        let body = whole(body).await?;
        let answer = match path {
            "/raft/vote" => {
                let request = wire::decode_vote_request(body).map_err(malformed)?;
                wire::encode_vote_response(&self.raft.vote(request).await.map_err(unavailable)?)
            }
            "/raft/pre-vote" => {
                let request = wire::decode_vote_request(body).map_err(malformed)?;
                wire::encode_vote_response(&self.raft.pre_vote(request).await.map_err(unavailable)?)
            }
            "/raft/transfer" => {
                let request = wire::decode_transfer(body).map_err(malformed)?;
                // Whether it takes over shows by itself.
                let _ = self.raft.handle_transfer_leader(request).await.map_err(unavailable)?;
                Bytes::new()
            }
            "/propose" => {
                let forwarded = Forwarded::decode(body).map_err(malformed)?;
                self.forwards.propose(&self.raft, peer, forwarded).await.map_err(|e| refuse(e.status(), e))?;
                Bytes::new()
            }
            "/read" => {
                let position = read_index(&self.raft).await.map_err(unavailable)?;
                let mut out = bytes::BytesMut::new();
                wire::put_position(&mut out, Some(position));
                out.freeze()
            }
            "/peers" => {
                serde_json::to_vec(&self.peers.addresses()).map_err(|e| unavailable(io::Error::from(e)))?.into()
            }
            "/members" => {
                let change: Change = serde_json::from_slice(&body).map_err(|e| malformed(e.into()))?;
                let result = self.members.change_as_leader(change).await;
                serde_json::to_vec(&result).map_err(|e| unavailable(io::Error::from(e)))?.into()
            }
            _ => return Err(refuse(StatusCode::NOT_FOUND, "no such call")),
        };
        Ok(full(answer))
    }

    fn is_member(&self, peer: u64) -> bool {
        let metrics = self.raft.server_metrics();
        let membership = metrics.borrow_watched().membership_config.clone();
        membership.membership().get_node(&peer).is_some()
    }

    /// A stream of requests, answered in order.
    fn append(&self, peer: u64, body: Incoming) -> Body {
        let contacts = self.contacts.clone();
        let requests = frames(body).map(|frame| frame.and_then(append_request));
        let requests = requests.take_while(move |request| {
            match request {
                Ok(request) => contacts.heard_from_leader(peer, request.vote.leader_id.term),
                Err(error) => tracing::debug!(peer, %error, "a stream of entries ended"),
            }
            futures::future::ready(request.is_ok())
        });
        let requests = requests.filter_map(|request| futures::future::ready(request.ok()));
        let answers = self.raft.stream_append(requests);
        let answers = answers.map(|result| match result {
            Ok(result) => Ok(Frame::data(answer_frame(&result))),
            Err(fatal) => Err(io::Error::other(fatal)),
        });
        StreamBody::new(answers).boxed_unsync()
    }

    async fn snapshot(&self, peer: u64, body: Incoming) -> Result<Body, Refusal> {
        let arriving = Arriving::new(&self.snapshot_dir, peer);
        let (vote, file) = transfer::receive(peer, body, arriving.path()).await.map_err(malformed)?;
        // That the sender is of our incarnation was said with the request; its file may be of one before, which a reset keeps.
        if file.applied.last.is_none_or(|last| last.term > vote.leader_id.term) {
            return Err(refuse(StatusCode::BAD_REQUEST, "the snapshot is none of this cluster's"));
        }
        self.contacts.heard_from_leader(peer, vote.leader_id.term);
        let snapshot = crate::machine::to_raft(file);
        let raft = self.raft.clone();
        // Once begun it goes on, and needs the file, also when the sender has lost patience.
        let installing = tokio::spawn(async move {
            let installed = raft.install_full_snapshot(vote, snapshot).await;
            drop(arriving);
            installed
        });
        let response = installing.await.map_err(unavailable)?.map_err(unavailable)?;
        let mut out = bytes::BytesMut::new();
        wire::put_vote(&mut out, &response.vote);
        Ok(full(out.freeze()))
    }
}
