//! `coracle snapshot`: copies of everything the cluster knows.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use http::Method;

use super::client::{Client, Instance, Output, print_table, say};
use crate::auth::pki::{CLUSTER_KEY, ClusterKey};
use crate::server::admin::{PREFIX, SnapshotRequest};
use crate::server::lock::DataDirLock;
use crate::server::reset;
use crate::server::snapshots::Snapshot;

/// `coracle snapshot`.
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Which instance.
    #[command(flatten)]
    pub instance: Instance,
    /// What to do.
    #[command(subcommand)]
    pub command: SnapshotCommand,
}

/// What to do with snapshots.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Write a snapshot now
    Save {
        /// What the file's name begins with
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        /// Folder to write it to (default: the server's --snapshot-dir)
        #[arg(long, visible_alias = "snapshot-dir", value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// List the snapshots of this server
    #[command(visible_alias = "list")]
    Ls {
        /// How to print them
        #[arg(long, short, value_enum, default_value = "table")]
        output: Output,
    },
    /// Delete all but the newest snapshots
    Prune {
        /// How many to keep (default: the server's --snapshot-retention)
        #[arg(long, visible_alias = "snapshot-retention", value_name = "N")]
        keep: Option<usize>,
        /// Only those whose names begin with this (default: the scheduled ones)
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
    },
    /// Go back to the state of a snapshot; the other servers follow by themselves
    Restore {
        /// The snapshot
        #[arg(value_name = "FILE")]
        file: PathBuf,
        /// On a fresh machine: the cluster.key that goes with it (DATA/server/cluster.key of a server of that cluster)
        #[arg(long, value_name = "FILE")]
        cluster_key: Option<PathBuf>,
    },
}

/// Runs the command.
pub fn run(args: SnapshotArgs) -> anyhow::Result<ExitCode> {
    let instance = &args.instance;
    let post = |what: &str, request: SnapshotRequest| -> anyhow::Result<serde_json::Value> {
        Client::open(instance)?.call(Method::POST, &format!("{PREFIX}snapshots/{what}"), &request)
    };
    match args.command {
        SnapshotCommand::Save { name, dir } => {
            let dir = dir.map(std::path::absolute).transpose()?;
            let saved = post("save", SnapshotRequest { name, dir, ..SnapshotRequest::default() })?;
            let saved: Snapshot = serde_json::from_value(saved)?;
            say(format_args!("{}  {}", saved.path.display(), size(saved.size)));
            say(format_args!(
                "To restore it on a fresh machine you also need {}: keep a copy of it, apart from the snapshot.",
                instance.data_dir.join(CLUSTER_KEY).display()
            ));
        }
        SnapshotCommand::Ls { output } => {
            let all: Vec<Snapshot> = Client::open(instance)?.call(Method::GET, &format!("{PREFIX}snapshots"), &())?;
            print(&all, output)?;
        }
        SnapshotCommand::Prune { keep, name } => {
            let gone = post("prune", SnapshotRequest { keep, name, ..SnapshotRequest::default() })?;
            let gone: Vec<Snapshot> = serde_json::from_value(gone)?;
            for snapshot in &gone {
                say(format_args!("deleted {}", snapshot.path.display()));
            }
            say(format_args!("{} snapshot{} deleted", gone.len(), if gone.len() == 1 { "" } else { "s" }));
        }
        SnapshotCommand::Restore { file, cluster_key } => restore(instance, &file, cluster_key)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn restore(instance: &Instance, file: &std::path::Path, cluster_key: Option<PathBuf>) -> anyhow::Result<()> {
    let file = std::fs::canonicalize(file).with_context(|| file.display().to_string())?;
    let data_dir = &instance.data_dir;
    let key = data_dir.join(CLUSTER_KEY);
    if let Some(from) = cluster_key {
        let text = std::fs::read_to_string(&from).with_context(|| from.display().to_string())?;
        match ClusterKey::load(&key)? {
            None => drop(ClusterKey::install(&key, &text)?),
            Some(there) if there.text()? == text.trim() => {}
            Some(_) => bail!("{} holds another key already; restore into an empty --data-dir", key.display()),
        }
    }
    if DataDirLock::holder(data_dir).is_some() {
        let request = SnapshotRequest { file: Some(file.clone()), ..SnapshotRequest::default() };
        let path = format!("{PREFIX}snapshots/restore");
        let _: serde_json::Value = Client::open(instance)?.call(Method::POST, &path, &request)?;
        say(format_args!(
            "The server goes back to the state of {} now; `coracle status` shows when it is there. The other servers follow by \
             themselves.",
            file.display()
        ));
        return Ok(());
    }
    let lock = DataDirLock::take(data_dir)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(reset::restore(data_dir, &file))?;
    drop(lock);
    say(format_args!(
        "The state of {} is restored. Start the server as usual; the other servers follow by themselves.",
        file.display()
    ));
    Ok(())
}

fn print(all: &[Snapshot], output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        say(format_args!("{}", serde_json::to_string_pretty(all)?));
        return Ok(());
    }
    let row = |s: &Snapshot| [s.name.clone(), s.path.display().to_string(), size(s.size), s.created.clone()];
    print_table(["NAME", "FILE", "SIZE", "CREATED"], &all.iter().map(row).collect::<Vec<_>>());
    Ok(())
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => format!("{:.1}kB", bytes as f64 / 1e3),
        _ => format!("{:.1}MB", bytes as f64 / 1e6),
    }
}
