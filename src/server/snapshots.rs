//! Snapshots of the store as files: on demand, on a schedule, and how many are kept.
//!
//! A file holds everything that is replicated, the cluster's keys sealed: to restore it on another machine one needs
//! `DATA/server/cluster.key` too.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::settings::Snapshots;
use crate::controllers::schedule::Schedule;

/// What snapshot files end with.
const SUFFIX: &str = ".snapshot";
/// What scheduled ones begin with; only they are pruned by the schedule.
pub const SCHEDULED: &str = "scheduled";
/// What those on demand begin with unless told otherwise.
pub const ON_DEMAND: &str = "on-demand";
/// The clock may be set while we wait: never sleep longer at once.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// `<prefix>-<server>-<seconds since 1970>`
    pub name: String,
    /// Where it is.
    pub path: PathBuf,
    /// Its length in bytes.
    pub size: u64,
    /// When it was made.
    pub created: String,
}

/// Writes one now.
///
/// # Errors
/// The name is none, the file cannot be written, or the store has stopped.
pub async fn save(cluster: &Cluster, dir: &Path, prefix: &str) -> anyhow::Result<Snapshot> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if prefix.is_empty() || prefix.starts_with('.') || !prefix.chars().all(plain) {
        bail!("the name {prefix:?} cannot be part of a file name: use letters, digits, '-', '_' and '.'");
    }
    make_dir(dir)?;
    // One after the other: a name that is free stays free until its file is there.
    static WRITING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    let _writing = WRITING.lock().await;
    let path = free(dir, &format!("{prefix}-{}", cluster.name), Timestamp::now().as_second());
    cluster.node.save_snapshot(&path).await.with_context(|| format!("write {}", path.display()))?;
    describe(&path).with_context(|| format!("{} is not there after it was written", path.display()))
}

/// The first path from a second on that no snapshot has.
fn free(dir: &Path, start: &str, second: i64) -> PathBuf {
    let at = |second: i64| dir.join(format!("{start}-{second}{SUFFIX}"));
    (second..).map(at).find(|path| !path.exists()).unwrap_or_else(|| at(second))
}

fn make_dir(dir: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.with_context(|| format!("make the folder {}", dir.display()))
}

fn describe(path: &Path) -> Option<Snapshot> {
    let name = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.to_owned();
    let metadata = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    let seconds = name.rsplit_once('-').and_then(|(_, seconds)| seconds.parse().ok());
    let created = match seconds.and_then(|seconds| Timestamp::from_second(seconds).ok()) {
        Some(created) => created,
        None => Timestamp::try_from(metadata.modified().ok()?).ok()?,
    };
    let created = Timestamp::from_second(created.as_second()).ok()?.to_string();
    Some(Snapshot { name, path: path.to_owned(), size: metadata.len(), created })
}

/// The snapshots of a folder, the oldest first; a folder that is not there holds none.
///
/// # Errors
/// The folder cannot be read.
pub fn list(dir: &Path) -> anyhow::Result<Vec<Snapshot>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read the folder {}", dir.display()))?,
    };
    let mut all: Vec<Snapshot> = entries.flatten().filter_map(|entry| describe(&entry.path())).collect();
    all.sort_by(|a, b| (&a.created, &a.name).cmp(&(&b.created, &b.name)));
    Ok(all)
}

/// Deletes all but the newest `keep` of those whose names begin with `prefix`; returns what went.
///
/// # Errors
/// The folder cannot be read, or a file not be deleted.
pub fn prune(dir: &Path, prefix: &str, keep: usize) -> anyhow::Result<Vec<Snapshot>> {
    let mut all = list(dir)?;
    all.retain(|snapshot| prefix.is_empty() || snapshot.name.starts_with(&format!("{prefix}-")));
    all.truncate(all.len().saturating_sub(keep));
    for snapshot in &all {
        std::fs::remove_file(&snapshot.path).with_context(|| format!("delete {}", snapshot.path.display()))?;
    }
    Ok(all)
}

/// Takes snapshots by the schedule until `shutdown`; every server takes its own.
pub async fn run(cluster: Cluster, settings: Snapshots, shutdown: CancellationToken) {
    let Some(text) = &settings.schedule else { return };
    let schedule = match Schedule::parse(text, TimeZone::system()) {
        Ok(schedule) => schedule,
        // The command line has checked it.
        Err(error) => return tracing::error!(%error, "the schedule of snapshots"),
    };
    while let Some(next) = schedule.next(Timestamp::now()) {
        loop {
            let left = next.duration_since(Timestamp::now());
            if !left.is_positive() {
                break;
            }
            let sleep = left.unsigned_abs().min(LONGEST_SLEEP);
            if shutdown.run_until_cancelled(tokio::time::sleep(sleep)).await.is_none() {
                return;
            }
        }
        match scheduled(&cluster, &settings).await {
            Ok(snapshot) => tracing::info!(path = %snapshot.path.display(), bytes = snapshot.size, "snapshot written"),
            Err(error) => tracing::error!(error = format!("{error:#}"), "the scheduled snapshot failed"),
        }
    }
}

async fn scheduled(cluster: &Cluster, settings: &Snapshots) -> anyhow::Result<Snapshot> {
    let snapshot = save(cluster, &settings.dir, SCHEDULED).await?;
    prune(&settings.dir, SCHEDULED, settings.retention)?;
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_of_one_second_have_names_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = free(dir.path(), "x-n1", 5);
        std::fs::write(&first, "").unwrap();
        let second = free(dir.path(), "x-n1", 5);
        assert_eq!([first, second], ["x-n1-5", "x-n1-6"].map(|name| dir.path().join(format!("{name}{SUFFIX}"))));
    }

    #[test]
    fn the_newest_are_kept_and_other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        assert!(list(&dir.path().join("none")).unwrap().is_empty());
        for name in ["scheduled-n1-100", "scheduled-n1-300", "scheduled-n1-200", "on-demand-n1-50"] {
            std::fs::write(dir.path().join(format!("{name}.snapshot")), name).unwrap();
        }
        std::fs::write(dir.path().join("scheduled-n1-10.snapshot.tmp"), "").unwrap();
        let names = |all: Vec<Snapshot>| all.into_iter().map(|s| s.name).collect::<Vec<_>>();
        let gone = names(prune(dir.path(), SCHEDULED, 2).unwrap());
        assert_eq!(gone, ["scheduled-n1-100"]);
        let left = list(dir.path()).unwrap();
        assert_eq!(left[0].created, "1970-01-01T00:00:50Z");
        assert_eq!(names(left), ["on-demand-n1-50", "scheduled-n1-200", "scheduled-n1-300"]);
        assert_eq!(names(prune(dir.path(), "", 0).unwrap()).len(), 3);
        assert!(dir.path().join("scheduled-n1-10.snapshot.tmp").exists());
    }
}
