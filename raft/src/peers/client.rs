//! openraft's calls to a peer, as requests on its connections.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{Stream, StreamExt};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};

use super::link::{CallError, read_all};
use super::wire::{self, append_answer, append_frame, frames};
use super::{Lane, Peers, transfer};
use crate::entry::{RaftVote, TypeConfig};
use crate::membership::Contact;
use crate::snapshot::SnapshotFile;

/// Makes [`Network`]s.
pub(crate) struct Factory {
    pub peers: Arc<Peers>,
}

/// The way to one peer.
pub(crate) struct Network {
    peers: Arc<Peers>,
    target: u64,
}

impl RaftNetworkFactory<TypeConfig> for Factory {
    type Network = Network;

    async fn new_client(&mut self, target: u64, contact: &Contact) -> Network {
        self.peers.known(target, Some(contact));
        Network { peers: self.peers.clone(), target }
    }
}

type Result<T> = std::result::Result<T, RPCError<TypeConfig>>;

fn failed(error: CallError) -> RPCError<TypeConfig> {
    match error {
        CallError::Lost(_) => RPCError::Network(NetworkError::from_string(error)),
        CallError::NotSent(_) | CallError::Refused { .. } => RPCError::Unreachable(Unreachable::from_string(error)),
    }
}

fn malformed(error: io::Error) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string(error))
}

fn muted() -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::from_string("the disk of this member does not answer: it must not lead"))
}

impl Network {
    fn is_muted(&self) -> bool {
        self.peers.muted.load(Ordering::Relaxed)
    }
}

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>> {
        let input = Box::pin(futures::stream::once(async { rpc }));
        let mut answers = self.stream_append(input, option).await?;
        let answer = answers.next().await;
        Ok(answer.ok_or_else(|| malformed(crate::entry::cut_short()))??.into())
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            if self.is_muted() {
                return Err(muted());
            }
            // The engine waits out its backoff where the first request is made.
            let Some(first) = input.next().await else {
                return Ok(Box::pin(futures::stream::empty()) as BoxStream<'s, _>);
            };
            let input = futures::stream::once(futures::future::ready(first)).chain(input);
            let peers = self.peers.clone();
            let input = input.take_while(move |_| futures::future::ready(!peers.muted.load(Ordering::Relaxed)));
            let body = StreamBody::new(input.map(|request| Ok(Frame::data(append_frame(&request))))).boxed_unsync();
            let answer = self.peers.send(self.target, Lane::Log, "/raft/append", body).await.map_err(failed)?;
            let (peers, target) = (self.peers.clone(), self.target);
            let answers = frames(answer.into_body()).map(move |frame| {
                peers.heard(target);
                frame.and_then(append_answer).map_err(malformed)
            });
            Ok(Box::pin(answers) as BoxStream<'s, _>)
        })
    }

    async fn vote(&mut self, rpc: VoteRequest<TypeConfig>, _option: RPCOption) -> Result<VoteResponse<TypeConfig>> {
        let answer = self.peers.call(self.target, "/raft/vote", wire::encode_vote_request(&rpc)).await;
        wire::decode_vote_response(answer.map_err(failed)?).map_err(malformed)
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<TypeConfig>, _option: RPCOption) -> Result<VoteResponse<TypeConfig>> {
        let answer = self.peers.call(self.target, "/raft/pre-vote", wire::encode_vote_request(&rpc)).await;
        wire::decode_vote_response(answer.map_err(failed)?).map_err(malformed)
    }

    async fn full_snapshot(
        &mut self,
        vote: RaftVote,
        snapshot: openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> std::result::Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        if self.is_muted() {
            return Err(muted().into());
        }
        let (body, progress) =
            transfer::outgoing(self.target, &vote, &snapshot.snapshot.path).await.map_err(malformed)?;
        tracing::info!(peer = self.target, bytes = progress.progress().1, "sending a snapshot");
        self.peers.set_transfer(self.target, Some(progress));
        let sending = async {
            let answer = self.peers.send(self.target, Lane::Bulk, "/raft/snapshot", body).await.map_err(failed)?;
            let mut answer = read_all(answer.into_body()).await.map_err(malformed)?;
            wire::take_vote(&mut answer).map_err(malformed)
        };
        let sent = tokio::select! {
            sent = sending => sent,
            closed = cancel => {
                self.peers.set_transfer(self.target, None);
                return Err(StreamingError::Closed(closed));
            }
        };
        self.peers.set_transfer(self.target, None);
        tracing::info!(peer = self.target, arrived = sent.is_ok(), "a snapshot was sent");
        Ok(SnapshotResponse::new(sent?))
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>> {
        self.peers.call(self.target, "/raft/transfer", wire::encode_transfer(&rpc)).await.map_err(failed)?;
        Ok(Ok(()))
    }
}
