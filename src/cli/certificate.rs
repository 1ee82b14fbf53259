//! `coracle certificate`: when they end, and new ones.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use http::Method;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::agent_status::is_agent;
use super::client::{Client, Instance, age, print_table};
use crate::server::admin::PREFIX;
use crate::server::admin::certificates::CertificateView;
use crate::server::lock::DataDirLock;

/// The certificate and key of an agent, in its data folder.
const AGENT_CERTIFICATE: &str = "agent/client.pem";
/// How long a running agent may take to get another certificate, and how often that is looked at.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(200);

/// `coracle certificate`.
#[derive(Debug, Args)]
pub struct CertificateArgs {
    /// Which instance.
    #[command(flatten)]
    pub instance: Instance,
    /// What to do.
    #[command(subcommand)]
    pub command: CertificateCommand,
}

/// What to do with certificates.
#[derive(Debug, Subcommand)]
pub enum CertificateCommand {
    /// Show when the certificates of this machine end
    Check,
    /// Make this machine's certificates anew; nothing restarts
    Rotate,
}

/// Runs the command; `check` fails when one has ended.
pub fn run(args: CertificateArgs) -> anyhow::Result<ExitCode> {
    let data_dir = &args.instance.data_dir;
    let path = format!("{PREFIX}certificates");
    let mut all: Vec<CertificateView> = match args.command {
        CertificateCommand::Check if is_agent(data_dir) => {
            if of_agent(data_dir).is_none() {
                bail!("this machine has no certificate: start the agent with --server and --token");
            }
            Vec::new()
        }
        CertificateCommand::Rotate if is_agent(data_dir) => {
            rotate_agent(data_dir)?;
            Vec::new()
        }
        CertificateCommand::Check => Client::open(&args.instance)?.call(Method::GET, &path, &())?,
        CertificateCommand::Rotate => {
            Client::open(&args.instance)?.call(Method::POST, &format!("{path}/rotate"), &())?
        }
    };
    all.extend(of_agent(data_dir));
    print(&all);
    let over = all.iter().any(|certificate| certificate.state == "expired");
    Ok(if over { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Asks the running agent for another certificate and waits for it.
fn rotate_agent(data_dir: &Path) -> anyhow::Result<()> {
    let dir = data_dir.display();
    let Some(pid) = DataDirLock::holder(data_dir) else {
        bail!("no agent is running in {dir}; start it first (with --token if its certificate has ended)");
    };
    let read = || std::fs::read(data_dir.join(AGENT_CERTIFICATE)).ok();
    let before = read();
    let signal = crate::node::rotate_signal().as_raw_value();
    kill(Pid::from_raw(pid), Signal::try_from(signal)?).with_context(|| format!("ask the agent with pid {pid}"))?;
    let end = Instant::now() + PATIENCE;
    while read() == before {
        if Instant::now() > end {
            bail!("the agent has no other certificate after {} s; its log says why", PATIENCE.as_secs());
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// The certificate of an agent that joined.
pub fn of_agent(data_dir: &Path) -> Option<CertificateView> {
    let pem = std::fs::read(data_dir.join(AGENT_CERTIFICATE)).ok()?;
    CertificateView::of_pem("node", &pem, SystemTime::now())
}

/// Prints certificates as a table.
pub fn print(all: &[CertificateView]) {
    let row = |c: &CertificateView| [c.name.clone(), c.expires.clone(), age(c.seconds_left), c.state.clone()];
    print_table(["CERTIFICATE", "EXPIRES", "LEFT", "STATE"], &all.iter().map(row).collect::<Vec<_>>());
}
