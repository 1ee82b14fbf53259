//! The consensus log as the API needs it, and the cluster's keys in it.

use coracle_raft::ProposeError;
use coracle_store::{Command, Response};
use futures::future::BoxFuture;

use crate::apiserver::backend::{Log, LogError};

/// The log of this member.
pub struct RaftLog(pub coracle_raft::Node);

impl Log for RaftLog {
    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Response, LogError>> {
        Box::pin(async move { self.0.propose(command).await.map_err(log_error) })
    }

    fn read_barrier(&self) -> BoxFuture<'_, Result<u64, LogError>> {
        Box::pin(async move { self.0.read_barrier().await.map_err(log_error) })
    }
}

fn log_error(error: ProposeError) -> LogError {
    LogError::Unavailable(error.into())
}
