//! How many requests are worked on at once. Watches, logs and connections that stay open do not count.

use super::status::Status;
use crate::auth::Identity;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Reading requests at once (upstream's `--max-requests-inflight`).
const READING: usize = 400;
/// Writing requests at once (upstream's `--max-mutating-requests-inflight`).
const WRITING: usize = 200;
/// Requests of the system itself (nodes, control loops) at once, so that no user can starve it.
const SYSTEM: usize = 400;
/// How long a request waits for its turn.
const PATIENCE: Duration = Duration::from_secs(15);

/// The queues of one server.
pub struct Limits {
    reading: Arc<Semaphore>,
    writing: Arc<Semaphore>,
    system: Arc<Semaphore>,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            reading: Arc::new(Semaphore::new(READING)),
            writing: Arc::new(Semaphore::new(WRITING)),
            system: Arc::new(Semaphore::new(SYSTEM)),
        }
    }
}

impl Limits {
    /// Waits for a turn; dropping the permit gives it back.
    ///
    /// # Errors
    /// 429 when the wait is too long.
    pub async fn enter(&self, caller: &Identity, read_only: bool) -> Result<OwnedSemaphorePermit, Status> {
        let is_system = caller.user().name.starts_with("system:") && caller.user().name != "system:anonymous";
        let queue = match (is_system, read_only) {
            (true, _) => &self.system,
            (false, true) => &self.reading,
            (false, false) => &self.writing,
        };
        if let Ok(permit) = queue.clone().try_acquire_owned() {
            return Ok(permit);
        }
        match tokio::time::timeout(PATIENCE, queue.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Status::too_many_requests("Too many requests, please try again later.", 1)),
        }
    }
}
