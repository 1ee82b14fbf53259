//! The images folder: archives put there are imported, at start and while the agent runs.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::{ImageError, ImageResult, ImageStore};

/// A file is left alone until it has not been touched for this long, unless its writer closed it.
const SETTLED: Duration = Duration::from_secs(2);

/// Inode, size and times of a file: what tells that it was imported already.
type Mark = (u64, u64, i64, i64);

/// Watches `folder` (made when missing) and imports what appears in it until `shutdown`.
pub async fn watch_folder(
    store: Arc<ImageStore>,
    folder: PathBuf,
    marks: PathBuf,
    shutdown: CancellationToken,
) -> ImageResult<()> {
    let failed = |what: &'static str| move |source| ImageError::Io { what: what.to_owned(), source };
    fs::create_dir_all(&folder).map_err(failed("create the images folder"))?;
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)
        .map_err(|errno| failed("watch the images folder")(errno.into()))?;
    // Watched before the first look, so that nothing falls between.
    inotify
        .add_watch(&folder, AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE)
        .map_err(|errno| failed("watch the images folder")(errno.into()))?;
    let events = inotify.as_fd().try_clone_to_owned().map_err(failed("watch the images folder"))?;
    // SAFETY: an owned descriptor stays open and the same one as long as it is registered.
    let events = unsafe { AsyncFd::register(events) }
        .map_err(|error| failed("watch the images folder")(std::io::Error::other(error.to_string())))?;
    let mut known: BTreeMap<String, Mark> =
        fs::read(&marks).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
    let mut first = true;
    loop {
        let unsettled = import_new(&store, &folder, &mut known, first).await;
        first = false;
        if let Ok(text) = serde_json::to_vec(&known) {
            let _ = fs::write(&marks, text);
        }
        // Files found half-written at the start have no writer that would tell: look again.
        let mut pause = if unsettled { SETTLED } else { Duration::from_secs(86_400) };
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return Ok(()),
                () = tokio::time::sleep(pause) => break,
                ready = events.readable() => {
                    let mut ready = ready.map_err(failed("watch the images folder"))?;
                    ready.clear_ready();
                    if complete(&inotify) {
                        break;
                    }
                    // A new name may be a link to a whole archive, which nobody will write and close.
                    pause = pause.min(SETTLED);
                }
            }
        }
    }
}

/// Takes the events; true when one of them tells that a file is whole.
fn complete(inotify: &Inotify) -> bool {
    let mut whole = false;
    while let Ok(events) = inotify.read_events() {
        if events.is_empty() {
            break;
        }
        whole |= events.iter().any(|event| !event.mask.contains(AddWatchFlags::IN_CREATE));
    }
    whole
}

/// Imports what is new. True when a file may still be growing.
async fn import_new(store: &Arc<ImageStore>, folder: &Path, known: &mut BTreeMap<String, Mark>, first: bool) -> bool {
    let mut unsettled = false;
    let mut seen = BTreeMap::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') || [".part", ".tmp", ".txt"].iter().any(|end| name.ends_with(end)) {
            continue;
        }
        let Ok(data) = fs::metadata(entry.path()) else { continue };
        if !data.is_file() {
            continue;
        }
        let mark = (data.ino(), data.size(), data.mtime(), data.mtime_nsec());
        if known.get(&name) == Some(&mark) {
            seen.insert(name, mark);
            continue;
        }
        let fresh = data.modified().ok().and_then(|time| time.elapsed().ok()).is_some_and(|age| age < SETTLED);
        let (store, path) = (store.clone(), entry.path());
        match tokio::task::spawn_blocking(move || store.import(&path)).await {
            Ok(Ok(imported)) => {
                tracing::info!(archive = %imported.archive.display(), images = ?imported.names, "images imported");
                seen.insert(name, mark);
            }
            // Perhaps its writer is not done; the close of the file or the next look decides.
            Ok(Err(error)) if fresh && (first || error.reason() == "ImageInspectError") => {
                tracing::debug!(archive = %name, %error, "archive is not complete yet");
                unsettled = true;
            }
            Ok(Err(error)) => {
                tracing::warn!(archive = %name, %error, "archive cannot be imported");
                seen.insert(name, mark);
            }
            Err(error) => tracing::error!(archive = %name, %error, "import panicked"),
        }
    }
    *known = seen;
    unsettled
}
