//! Beginning anew, with no server running in the folder: one member again (`coracle server --cluster-reset`), or one member with
//! the state of a snapshot. The other servers notice by themselves that their cluster has a new incarnation and join that.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::Request;
use http_body_util::Full;
use std::sync::Arc;
use std::time::SystemTime;

use super::cluster::{Member, from_text, remembered};
use super::keys::Keyring;
use super::peers::Peers;
use super::{Again, Settings, settings};
use crate::auth::pki::{CLUSTER_KEY, ClusterKey, files, record};

/// What is to be done at the next start, under the data folder.
const NOTE: &str = "server/again.json";
/// How long each of the other servers may take to say that it lives.
const PATIENCE: Duration = Duration::from_secs(3);

/// `coracle server --cluster-reset [--cluster-reset-restore-path FILE]`: does it and ends.
///
/// # Errors
/// It would be wrong, or cannot be done.
pub async fn run(settings: &Settings) -> anyhow::Result<()> {
    let db = settings.db();
    if let Some(file) = &settings.restore_path {
        restore(&settings.data_dir, file).await?;
        println!(
            "The state of {} is restored. Start the server as usual, without --cluster-reset; the other servers join it by \
             themselves.",
            file.display()
        );
        return Ok(());
    }
    if !db.join("wal").exists() {
        bail!("--cluster-reset: {} holds no cluster", settings.data_dir.display());
    }
    refuse_if_alive(settings, &db).await?;
    tokio::task::spawn_blocking(move || coracle_raft::reset(&db)).await?.context("--cluster-reset")?;
    println!(
        "This server is a cluster of one again. Start it as usual, without --cluster-reset; the other servers join it by \
         themselves when they come back."
    );
    Ok(())
}

/// Others that live and would be a majority together with this server make a reset wrong: two clusters would go on.
async fn refuse_if_alive(settings: &Settings, db: &Path) -> anyhow::Result<()> {
    let own = coracle_raft::member_id(db)?;
    let Some(keys) = Keyring::cached(&settings.data_dir)? else { return Ok(()) };
    let members = remembered::read(&settings.data_dir);
    if members.len() == 1 {
        bail!("--cluster-reset: this server is a cluster of one already; start it without that flag");
    }
    let peers = Peers::new(own, SystemTime::UNIX_EPOCH);
    peers.set_keys(&Arc::new(keys))?;
    let mut alive = Vec::new();
    for member in &members {
        let Some(id) = from_text(&member.id).filter(|id| *id != own) else { continue };
        if is_alive(&peers, id, member).await {
            alive.push(member.name.as_str());
        }
    }
    if (alive.len() + 1) * 2 > members.len() {
        bail!(
            "--cluster-reset: {} of the {} other servers live ({}); together with this one they are a majority, so nothing is \
             lost: start this server without --cluster-reset",
            alive.len(),
            members.len() - 1,
            alive.join(", ")
        );
    }
    Ok(())
}

async fn is_alive(peers: &Peers, id: u64, member: &Member) -> bool {
    let Ok(request) = Request::get("/livez").header("host", "kubernetes").body(Full::new(Bytes::new())) else {
        return false;
    };
    matches!(tokio::time::timeout(PATIENCE, peers.ask(id, &member.address, request)).await, Ok(Ok(_)))
}

/// Gives the folder the state of a snapshot.
///
/// # Errors
/// The file is no snapshot, the cluster key is missing, or the folder cannot be used.
pub async fn restore(data_dir: &Path, file: &Path) -> anyhow::Result<()> {
    let key = data_dir.join(CLUSTER_KEY);
    if ClusterKey::load(&key)?.is_none() {
        bail!(
            "{} is missing: put the cluster.key of the cluster there that the snapshot was taken of (it lies in DATA/server of \
             any of its servers); without it the snapshot's keys cannot be opened",
            key.display()
        );
    }
    let (db, from): (PathBuf, PathBuf) = (settings::db(data_dir), file.to_owned());
    let restored = tokio::task::spawn_blocking(move || coracle_raft::restore(&db, &from)).await?;
    restored.with_context(|| format!("restore {}", file.display()))?;
    // The copy may be newer than the snapshot; the tokens of then are good again.
    match std::fs::remove_file(record::cache_path(data_dir)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("remove the copy of the keys"),
        _ => Ok(()),
    }
}

/// Notes what is to be done with the folder when the program starts again; until then nothing has changed.
///
/// # Errors
/// It cannot be written.
pub fn note(data_dir: &Path, again: &Again) -> anyhow::Result<()> {
    files::write_durably(&data_dir.join(NOTE), &serde_json::to_vec(again)?, 0o600).context("note what is to be done")
}

/// Does what was noted. A snapshot that cannot be restored is logged and leaves everything as it was.
///
/// # Errors
/// The folder cannot be used.
pub async fn act_on_note(data_dir: &Path) -> anyhow::Result<()> {
    let path = data_dir.join(NOTE);
    let bytes = match std::fs::read(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        bytes => bytes.with_context(|| path.display().to_string())?,
    };
    match serde_json::from_slice(&bytes).with_context(|| path.display().to_string())? {
        Again::Forget => {
            let db = settings::db(data_dir);
            let forgotten = tokio::task::spawn_blocking(move || coracle_raft::forget(&db)).await?;
            forgotten.context("forget the data of the cluster's past")?;
            tracing::info!("the data of the cluster's past is gone; this server joins its cluster anew");
        }
        Again::Restore(file) => match restore(data_dir, &file).await {
            Ok(()) => tracing::info!(file = %file.display(), "the snapshot is restored"),
            Err(error) => {
                let error = super::explain(error.as_ref());
                tracing::error!(error, "the snapshot was not restored; the server goes on as before");
            }
        },
    }
    // After it: doing it twice is harmless.
    std::fs::remove_file(&path).with_context(|| path.display().to_string())
}
