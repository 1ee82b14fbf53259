//! `coracle certificate`: when they end, and new ones.

use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use http::Method;

use super::client::{Client, Instance, age, print_table};
use crate::server::admin::PREFIX;
use crate::server::admin::certificates::CertificateView;
use crate::server::admin_kubeconfig;

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
    /// Make this server's certificates anew; nothing restarts
    Rotate,
}

/// Runs the command; `check` fails when one has ended.
pub fn run(args: CertificateArgs) -> anyhow::Result<ExitCode> {
    let data_dir = &args.instance.data_dir;
    let path = format!("{PREFIX}certificates");
    let mut all: Vec<CertificateView> = match args.command {
        CertificateCommand::Check if !admin_kubeconfig(data_dir).exists() && of_agent(data_dir).is_some() => Vec::new(),
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

/// The certificate of an agent that joined.
pub fn of_agent(data_dir: &Path) -> Option<CertificateView> {
    let pem = std::fs::read(data_dir.join("agent/client.pem")).ok()?;
    CertificateView::of_pem("node", &pem, SystemTime::now())
}

/// Prints certificates as a table.
pub fn print(all: &[CertificateView]) {
    let row = |c: &CertificateView| [c.name.clone(), c.expires.clone(), age(c.seconds_left), c.state.clone()];
    print_table(["CERTIFICATE", "EXPIRES", "LEFT", "STATE"], &all.iter().map(row).collect::<Vec<_>>());
}
