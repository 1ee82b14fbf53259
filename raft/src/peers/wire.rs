//! What members say to each other, in bytes. Numbers are little-endian; a position in the log is `u8 present, u64 term,
//! u64 index`, a vote `u64 term, u64 member, u8 committed`.
//!
//! ```text
//! append    request:  vote, previous position, committed position, u32 number of entries, each: u64 term, u64 index,
//!                     u32 length, the payload as in the log (crate::entry)
//!           answer:   u8 0, matching position | u8 1, conflicting position | u8 2, vote
//! vote      request:  vote, last position, u8 by transfer of leadership; answer: vote, u8 granted, last position
//! transfer  request:  vote, u64 to, last position
//! propose   request:  u64 term, u64 ticket, commands as in the log
//! read      answer:   position
//! ```
//! `append` is a stream of frames each way, each behind a u32 length; the others are one message.

use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::Stream;
use http_body_util::BodyExt;
use hyper::body::Body;
use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult};
use openraft::raft::{TransferLeaderRequest, VoteRequest, VoteResponse};

use crate::entry::{
    RaftLogId, RaftVote, TypeConfig, cut_short, from_raft_id, from_raft_vote, from_wal, u32_of, u64_of,
};
use crate::entry::{to_raft_id, to_raft_vote, to_wal};
use crate::wal::{LogId, Vote};

/// Longest frame that is believed: one entry may be as long as the longest command and some more.
const MAX_FRAME: usize = 32 << 20;

pub(crate) fn put_vote(out: &mut BytesMut, vote: &RaftVote) {
    let Vote { term, member, committed } = from_raft_vote(vote);
    out.put_u64_le(term);
    out.put_u64_le(member);
    out.put_u8(committed.into());
}

pub(crate) fn take_vote(bytes: &mut Bytes) -> io::Result<RaftVote> {
    let (term, member) = (u64_of(bytes)?, u64_of(bytes)?);
    Ok(to_raft_vote(Vote { term, member, committed: u8_of(bytes)? != 0 }))
}

pub(crate) fn put_position(out: &mut BytesMut, id: Option<RaftLogId>) {
    let id = id.map(from_raft_id);
    out.put_u8(id.is_some().into());
    let id = id.unwrap_or(LogId { term: 0, index: 0 });
    out.put_u64_le(id.term);
    out.put_u64_le(id.index);
}

pub(crate) fn take_position(bytes: &mut Bytes) -> io::Result<Option<RaftLogId>> {
    let present = u8_of(bytes)? != 0;
    let id = LogId { term: u64_of(bytes)?, index: u64_of(bytes)? };
    Ok(present.then(|| to_raft_id(id)))
}

fn u8_of(bytes: &mut Bytes) -> io::Result<u8> {
    bytes.try_get_u8().map_err(|_| cut_short())
}

/// Writes a frame: its length, then what `fill` writes.
fn framed(fill: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::with_capacity(256);
    out.put_u32_le(0);
    fill(&mut out);
    let length = (out.len() - 4) as u32;
    out[..4].copy_from_slice(&length.to_le_bytes());
    out.freeze()
}

pub(crate) fn append_frame(request: &AppendEntriesRequest<TypeConfig>) -> Bytes {
    framed(|out| {
        put_vote(out, &request.vote);
        put_position(out, request.prev_log_id);
        put_position(out, request.leader_commit);
        out.put_u32_le(request.entries.len() as u32);
        for entry in &request.entries {
            let entry = to_wal(entry);
            let length: usize = entry.payload.iter().map(Bytes::len).sum();
            out.reserve(20 + length);
            out.put_u64_le(entry.id.term);
            out.put_u64_le(entry.id.index);
            out.put_u32_le(length as u32);
            entry.payload.iter().for_each(|part| out.put_slice(part));
        }
    })
}

pub(crate) fn append_request(mut frame: Bytes) -> io::Result<AppendEntriesRequest<TypeConfig>> {
    let (vote, prev_log_id) = (take_vote(&mut frame)?, take_position(&mut frame)?);
    let leader_commit = take_position(&mut frame)?;
    let mut entries = Vec::new();
    for _ in 0..u32_of(&mut frame)? {
        let id = LogId { term: u64_of(&mut frame)?, index: u64_of(&mut frame)? };
        let length = u32_of(&mut frame)? as usize;
        if frame.len() < length {
            return Err(cut_short());
        }
        entries.push(from_wal(id, frame.split_to(length))?);
    }
    let follows = |pair: &[crate::entry::Entry]| pair[0].log_id.index + 1 == pair[1].log_id.index;
    let first = prev_log_id.map_or(0, |id| id.index + 1);
    if !entries.windows(2).all(follows) || entries.first().is_some_and(|entry| entry.log_id.index != first) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the entries have a hole"));
    }
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

const MATCHING: u8 = 0;
const CONFLICT: u8 = 1;
const HIGHER_VOTE: u8 = 2;

pub(crate) fn answer_frame(result: &StreamAppendResult<TypeConfig>) -> Bytes {
    framed(|out| match result {
        Ok(matching) => {
            out.put_u8(MATCHING);
            put_position(out, *matching);
        }
        Err(StreamAppendError::Conflict(at)) => {
            out.put_u8(CONFLICT);
            put_position(out, Some(*at));
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            out.put_u8(HIGHER_VOTE);
            put_vote(out, vote);
        }
    })
}

pub(crate) fn append_answer(mut frame: Bytes) -> io::Result<StreamAppendResult<TypeConfig>> {
    Ok(match u8_of(&mut frame)? {
        MATCHING => Ok(take_position(&mut frame)?),
        CONFLICT => Err(StreamAppendError::Conflict(take_position(&mut frame)?.ok_or_else(cut_short)?)),
        HIGHER_VOTE => Err(StreamAppendError::HigherVote(take_vote(&mut frame)?)),
        other => return Err(io::Error::other(format!("an answer of unknown kind {other}"))),
    })
}

pub(crate) fn encode_vote_request(request: &VoteRequest<TypeConfig>) -> Bytes {
    let mut out = BytesMut::new();
    put_vote(&mut out, &request.vote);
    put_position(&mut out, request.last_log_id);
    out.put_u8(request.leadership_transfer.into());
    out.freeze()
}

pub(crate) fn decode_vote_request(mut bytes: Bytes) -> io::Result<VoteRequest<TypeConfig>> {
    let mut request = VoteRequest::new(take_vote(&mut bytes)?, take_position(&mut bytes)?);
    request.leadership_transfer = u8_of(&mut bytes)? != 0;
    Ok(request)
}

pub(crate) fn encode_vote_response(response: &VoteResponse<TypeConfig>) -> Bytes {
    let mut out = BytesMut::new();
    put_vote(&mut out, &response.vote);
    out.put_u8(response.vote_granted.into());
    put_position(&mut out, response.last_log_id);
    out.freeze()
}

pub(crate) fn decode_vote_response(mut bytes: Bytes) -> io::Result<VoteResponse<TypeConfig>> {
    let (vote, granted) = (take_vote(&mut bytes)?, u8_of(&mut bytes)? != 0);
    Ok(VoteResponse::new(vote, take_position(&mut bytes)?, granted))
}

pub(crate) fn encode_transfer(request: &TransferLeaderRequest<TypeConfig>) -> Bytes {
    let mut out = BytesMut::new();
    put_vote(&mut out, request.from_leader());
    out.put_u64_le(*request.to_node_id());
    put_position(&mut out, request.last_log_id().copied());
    out.freeze()
}

pub(crate) fn decode_transfer(mut bytes: Bytes) -> io::Result<TransferLeaderRequest<TypeConfig>> {
    let (from, to) = (take_vote(&mut bytes)?, u64_of(&mut bytes)?);
    Ok(TransferLeaderRequest::new(from, to, take_position(&mut bytes)?))
}

/// Commands on their way to the leader of a term.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forwarded {
    pub term: u64,
    pub ticket: u64,
    /// Each behind its length.
    pub commands: Bytes,
}

impl Forwarded {
    pub fn encode(term: u64, ticket: u64, commands: &[Bytes]) -> Bytes {
        let mut out = BytesMut::with_capacity(16 + commands.iter().map(Bytes::len).sum::<usize>());
        out.put_u64_le(term);
        out.put_u64_le(ticket);
        commands.iter().for_each(|command| out.put_slice(command));
        out.freeze()
    }

    pub fn decode(mut bytes: Bytes) -> io::Result<Forwarded> {
        Ok(Forwarded { term: u64_of(&mut bytes)?, ticket: u64_of(&mut bytes)?, commands: bytes })
    }
}

/// Takes the frames out of a body. Ends with it, or with the first error.
pub(crate) fn frames<B>(body: B) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    futures::stream::unfold(Some((body, BytesMut::new())), |state| async move {
        let (mut body, mut buffer) = state?;
        loop {
            match next_frame(&mut buffer) {
                Ok(Some(frame)) => return Some((Ok(frame), Some((body, buffer)))),
                Ok(None) => {}
                Err(error) => return Some((Err(error), None)),
            }
            match body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => return Some((Err(io::Error::other(error)), None)),
                None if buffer.is_empty() => return None,
                None => return Some((Err(cut_short()), None)),
            }
        }
    })
}

fn next_frame(buffer: &mut BytesMut) -> io::Result<Option<Bytes>> {
    let Some(length) = buffer.get(..4).map(|mut raw| raw.get_u32_le() as usize) else { return Ok(None) };
    if length > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame of {length} bytes")));
    }
    if buffer.len() < 4 + length {
        buffer.reserve(4 + length - buffer.len());
        return Ok(None);
    }
    buffer.advance(4);
    Ok(Some(buffer.split_to(length).freeze()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use futures::StreamExt;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use openraft::EntryPayload;

    use super::*;
    use crate::entry::{Proposal, Ticket};

    fn id(term: u64, index: u64) -> RaftLogId {
        to_raft_id(LogId { term, index })
    }

    fn request() -> AppendEntriesRequest<TypeConfig> {
        let commands: Arc<[Bytes]> =
            Arc::new([Bytes::from_static(&[1, 0, 0, 0, 9]), Bytes::from_static(&[0, 0, 0, 0])]);
        let ticket = Some(Ticket { origin: 5, number: 6 });
        let payloads = [EntryPayload::Blank, EntryPayload::Normal(Proposal { ticket, commands })];
        let entry = |(n, payload): (u64, _)| openraft::Entry { log_id: id(3, 8 + n), payload };
        AppendEntriesRequest {
            vote: to_raft_vote(Vote { term: 3, member: 1, committed: true }),
            prev_log_id: Some(id(2, 7)),
            entries: (0..).zip(payloads).map(entry).collect(),
            leader_commit: Some(id(2, 6)),
        }
    }

    #[tokio::test]
    async fn frames_survive_however_they_are_cut() {
        let all = [append_frame(&request()), append_frame(&request())].concat();
        for size in [1, 3, 50, all.len()] {
            let chunks: Vec<_> =
                all.chunks(size).map(|c| Ok::<_, io::Error>(Frame::data(Bytes::copy_from_slice(c)))).collect();
            let body = StreamBody::new(futures::stream::iter(chunks));
            let read: Vec<_> = frames(body).map(|frame| append_request(frame.unwrap()).unwrap()).collect().await;
            assert_eq!(read.len(), 2);
            assert_eq!(format!("{:?}", read[0]), format!("{:?}", request()));
        }
    }

    #[test]
    fn answers_survive() {
        let vote = to_raft_vote(Vote { term: 9, member: 4, committed: false });
        let results = [
            Ok(None),
            Ok(Some(id(1, 2))),
            Err(StreamAppendError::Conflict(id(3, 4))),
            Err(StreamAppendError::HigherVote(vote)),
        ];
        for result in results {
            assert_eq!(append_answer(answer_frame(&result).slice(4..)).unwrap(), result);
        }
        let mut request = VoteRequest::new(vote, Some(id(2, 3)));
        request.leadership_transfer = true;
        assert_eq!(decode_vote_request(encode_vote_request(&request)).unwrap(), request);
        let response = VoteResponse::new(vote, None, true);
        assert_eq!(decode_vote_response(encode_vote_response(&response)).unwrap(), response);
        let transfer = TransferLeaderRequest::new(vote, 8, Some(id(1, 1)));
        assert_eq!(decode_transfer(encode_transfer(&transfer)).unwrap(), transfer);
    }

    #[test]
    fn malformed_requests_are_errors() {
        let good = append_frame(&request()).slice(4..);
        for end in 0..good.len() {
            assert!(append_request(good.slice(..end)).is_err(), "cut at {end}");
        }
        let mut hole = request();
        hole.entries[1].log_id = id(3, 11);
        assert!(append_request(append_frame(&hole).slice(4..)).is_err());
    }
}
