//! Keeps one zero-filled segment ready, filled by a short-lived thread in the background.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::segment;

/// Decides when a spare segment is filled, and runs the thread that does it.
pub(crate) struct SpareKeeper {
    dir: PathBuf,
    size: u64,
    /// False until the server is ready: filling competes with the start for the disk.
    allowed: AtomicBool,
    wanted: AtomicBool,
    stopping: Arc<AtomicBool>,
    filling: Mutex<Option<JoinHandle<()>>>,
}

impl SpareKeeper {
    pub fn new(dir: PathBuf, size: u64) -> Self {
        SpareKeeper {
            dir,
            size,
            allowed: AtomicBool::new(false),
            wanted: AtomicBool::new(false),
            stopping: Arc::default(),
            filling: Mutex::new(None),
        }
    }

    /// From now on spares may be filled.
    pub fn allow(&self) {
        self.allowed.store(true, Ordering::Relaxed);
        if self.wanted.load(Ordering::Relaxed) {
            self.want();
        }
    }

    /// A spare will be needed soon. Cheap when one is there or on its way.
    pub fn want(&self) {
        self.wanted.store(true, Ordering::Relaxed);
        if !self.allowed.load(Ordering::Relaxed) || segment::spare_exists(&self.dir) {
            return;
        }
        let mut filling = self.filling.lock();
        if filling.as_ref().is_some_and(|thread| !thread.is_finished()) || self.stopping.load(Ordering::Relaxed) {
            return;
        }
        let (dir, size, stopping) = (self.dir.clone(), self.size, self.stopping.clone());
        let thread = std::thread::Builder::new().name("coracle-wal-fill".to_owned()).spawn(move || {
            if let Err(error) = segment::fill_spare(&dir, size, &|| stopping.load(Ordering::Relaxed)) {
                tracing::warn!(%error, "preparing a log segment failed; the log goes on in a growing file");
            }
        });
        match thread {
            Ok(thread) => *filling = Some(thread),
            Err(error) => {
                tracing::warn!(%error, "no thread to prepare a log segment; the log goes on in a growing file")
            }
        }
    }

    /// Ends a fill that is under way and waits for its thread.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        let thread = self.filling.lock().take();
        if let Some(thread) = thread {
            // A panic there has been printed; there is nothing to clean up that the next start doesn't.
            let _ = thread.join();
        }
    }
}
