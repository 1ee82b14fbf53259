//! What the API stands on: the store to read from and the consensus log to write through.

use super::status::Status;
use coracle_raft::ProposeError;
use coracle_store::{Command, KeyValue, RangeRequest, RangeResponse, Response, Store, StoreError, Txn, TxnResponse};
use futures::future::BoxFuture;
use std::sync::Arc;

/// Why the log did not take a command.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No leader, or this server is shutting down: nothing was written.
    #[error("the server is currently unable to handle the request")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The outcome is unknown.
    #[error("the write was not confirmed in time")]
    Unknown(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The state machine refused the command.
    #[error("the store refused the command")]
    Refused(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The consensus log, as the API needs it.
pub trait Log: Send + Sync {
    /// Returns when the command is committed and applied here.
    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Response, LogError>>;
    /// The revision that a linearizable read must see; returns when the store has it.
    fn read_barrier(&self) -> BoxFuture<'_, Result<u64, LogError>>;
}

/// Store and log. Cheap to clone.
#[derive(Clone)]
pub struct Backend {
    store: Store,
    log: Arc<dyn Log>,
}

impl From<LogError> for Status {
    fn from(error: LogError) -> Status {
        match error {
            LogError::Unavailable(_) => Status::unavailable(error.to_string()),
            LogError::Unknown(_) => Status::timeout("request did not complete within the allotted timeout", 1),
            LogError::Refused(source) => Status::internal(source),
        }
    }
}

impl Backend {
    /// A backend over a store and the log that feeds it.
    pub fn new(store: Store, log: Arc<dyn Log>) -> Backend {
        Backend { store, log }
    }

    /// The store, for watches and revisions.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Waits until the store shows everything that was acknowledged before the call.
    ///
    /// # Errors
    /// 503 without a leader.
    pub async fn barrier(&self) -> Result<u64, Status> {
        Ok(self.log.read_barrier().await?)
    }

    /// The newest value of a key as this server knows it.
    ///
    /// # Errors
    /// 500 when the store is damaged.
    pub fn get(&self, key: &[u8]) -> Result<Option<KeyValue>, Status> {
        self.store.get(key).map_err(|error| store_status(&error))
    }

    /// A range of keys.
    ///
    /// # Errors
    /// 410 for a compacted revision, 504 for one from the future.
    pub fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Status> {
        self.store.range(request).map_err(|error| match error {
            StoreError::FutureRevision { revision } => {
                Status::too_large_resource_version(request.revision.unwrap_or(0), revision)
            }
            other => store_status(&other),
        })
    }

    /// Runs a transaction.
    ///
    /// # Errors
    /// 503 without a leader, 504 when the outcome is unknown, 500 when it is refused.
    pub async fn txn(&self, txn: Txn) -> Result<TxnResponse, Status> {
        match self.log.propose(Command::Txn(txn)).await? {
            Response::Txn(response) => Ok(response),
            Response::Refused(refusal) => Err(Status::internal(refusal)),
            Response::Done { .. } => Err(Status::internal("the log answered another command")),
        }
    }

    /// Makes or renews a lease.
    ///
    /// # Errors
    /// As [`Backend::txn`].
    pub async fn grant_lease(&self, id: u64, ttl_seconds: u64) -> Result<(), Status> {
        match self.log.propose(Command::LeaseGrant { id, ttl_seconds }).await? {
            Response::Refused(refusal) => Err(Status::internal(refusal)),
            _ => Ok(()),
        }
    }
}

impl Log for coracle_raft::Node {
    fn propose(&self, command: Command) -> BoxFuture<'_, Result<Response, LogError>> {
        Box::pin(async move { coracle_raft::Node::propose(self, command).await.map_err(LogError::from) })
    }

    fn read_barrier(&self) -> BoxFuture<'_, Result<u64, LogError>> {
        Box::pin(async move { coracle_raft::Node::read_barrier(self).await.map_err(LogError::from) })
    }
}

impl From<ProposeError> for LogError {
    fn from(error: ProposeError) -> LogError {
        match error {
            ProposeError::NotLeader { .. } | ProposeError::Stopped { .. } => LogError::Unavailable(error.into()),
            ProposeError::OutcomeUnknown => LogError::Unknown(error.into()),
            ProposeError::TooLarge { .. } | ProposeError::Refused(_) => LogError::Refused(error.into()),
        }
    }
}

fn store_status(error: &StoreError) -> Status {
    match error {
        StoreError::Compacted { .. } => Status::expired(
            "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.",
        ),
        StoreError::Restoring => Status::unavailable(error.to_string()),
        other => Status::internal(other),
    }
}

#[cfg(test)]
pub mod memory {
    //! A log of one member that lives in memory: the fake beside [`Log`].

    use super::*;
    use bytes::Bytes;
    use coracle_store::{Options, Writer};
    use parking_lot::Mutex;

    struct Memory {
        store: Store,
        writer: Mutex<Writer>,
    }

    impl Log for Memory {
        fn propose(&self, command: Command) -> BoxFuture<'_, Result<Response, LogError>> {
            let applied = self.writer.lock().apply(vec![command], Bytes::new());
            let answer = match applied {
                Ok(mut responses) => responses.pop().ok_or_else(|| LogError::Refused("no response".into())),
                Err(error) => Err(LogError::Refused(error.into())),
            };
            Box::pin(async move { answer })
        }

        fn read_barrier(&self) -> BoxFuture<'_, Result<u64, LogError>> {
            let revision = self.store.revision();
            Box::pin(async move { Ok(revision) })
        }
    }

    /// An empty backend in memory.
    pub fn backend() -> Backend {
        let (store, writer) = Store::open(Options::memory()).unwrap();
        Backend::new(store.clone(), Arc::new(Memory { store, writer: Mutex::new(writer) }))
    }
}
