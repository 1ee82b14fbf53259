//! Snapshots on their way to a peer: the file as it is (it carries its own checksums), behind the sender's vote and the
//! length, in pieces; the receiver checks every frame before it believes any.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::link::Body;
use super::wire::{put_vote, take_vote};
use crate::entry::{RaftVote, cut_short, u64_of};
use crate::snapshot::{Reader, SnapshotFile};

/// Bytes read and sent at once.
const PIECE: usize = 256 << 10;
/// A long transfer says this often how far it is.
const SAY: Duration = Duration::from_secs(5);
/// Vote and length.
const HEAD: usize = 17 + 8;

/// How far a transfer is.
#[derive(Clone, Debug)]
pub(crate) struct Transfer {
    done: Arc<AtomicU64>,
    total: u64,
}

impl Transfer {
    /// Bytes done, and of how many.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total)
    }
}

/// The file as a body, and how far it will have been read.
pub(crate) async fn outgoing(peer: u64, vote: &RaftVote, path: &Path) -> io::Result<(Body, Transfer)> {
    // The file stays readable when a newer one takes its place meanwhile.
    let file = tokio::fs::File::open(path).await?;
    let total = file.metadata().await?.len();
    let transfer = Transfer { done: Arc::default(), total };
    let mut head = BytesMut::with_capacity(HEAD);
    put_vote(&mut head, vote);
    head.extend_from_slice(&total.to_le_bytes());
    let first = futures::stream::once(async move { Ok(Frame::data(head.freeze())) });
    let done = transfer.done.clone();
    let rest = futures::stream::unfold((file, done, Instant::now()), move |(mut file, done, said)| async move {
        let mut piece = BytesMut::with_capacity(PIECE);
        let read = loop {
            match file.read_buf(&mut piece).await {
                Ok(0) => break Ok(()),
                Ok(_) if piece.len() < PIECE => {}
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        if let Err(error) = read {
            return Some((Err(error), (file, done, said)));
        }
        if piece.is_empty() {
            return None;
        }
        let sent = done.fetch_add(piece.len() as u64, Ordering::Relaxed) + piece.len() as u64;
        let said = if said.elapsed() > SAY {
            tracing::info!(peer, bytes = sent, total, "sending a snapshot");
            Instant::now()
        } else {
            said
        };
        Some((Ok(Frame::data(piece.freeze())), (file, done, said)))
    });
    Ok((StreamBody::new(first.chain(rest)).boxed_unsync(), transfer))
}

/// Receives a snapshot into a file; returns the sender's vote and what the file holds.
///
/// # Errors
/// The connection or the disk failed, or the file is not what was sent.
pub(crate) async fn receive(peer: u64, mut body: Incoming, path: &Path) -> io::Result<(RaftVote, SnapshotFile)> {
    let mut head = BytesMut::new();
    let mut file = tokio::fs::File::create(path).await?;
    let (mut vote, mut total, mut received, mut said) = (None, 0, 0, Instant::now());
    while let Some(frame) = body.frame().await {
        let Ok(mut data) = frame.map_err(io::Error::other)?.into_data() else { continue };
        if vote.is_none() {
            head.extend_from_slice(&data);
            if head.len() < HEAD {
                continue;
            }
            data = head.split_off(HEAD).freeze();
            let mut fields = Bytes::from(head.split());
            vote = Some(take_vote(&mut fields)?);
            total = u64_of(&mut fields)?;
        }
        received += data.len() as u64;
        file.write_all(&data).await?;
        if said.elapsed() > SAY {
            said = Instant::now();
            tracing::info!(peer, bytes = received, total, "receiving a snapshot");
        }
    }
    file.flush().await?;
    let vote = vote.filter(|_| received == total).ok_or_else(cut_short)?;
    let path = path.to_path_buf();
    let file = tokio::task::spawn_blocking(move || Reader::open(&path).map(|reader| reader.file));
    Ok((vote, file.await.map_err(io::Error::other)?.map_err(io::Error::other)?))
}
