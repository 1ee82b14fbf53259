//! The command line.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`args`] | every command and flag, once: help, completion and configuration keys follow from it |
//! | [`config_file`] | the YAML file and its drop-ins; keys are the flag names |
//! | [`settings`] | raw flags become checked [`crate::server::Settings`], all faults reported together |
//! | [`agent`] | `coracle agent` |
//! | [`client`] | the way to the running server of an instance |
//! | [`status`], [`member`], [`token`], [`snapshot`], [`certificate`] | the commands of these names |
//! | [`agent_status`] | `coracle status` where only an agent runs |
//! | [`images`] | `coracle images` |
//! | [`kubectl`] | `coracle kubectl` |
//! | [`check_config`] | `coracle check-config` |
//! | [`uninstall`] | `coracle uninstall` |

pub mod agent;
pub mod agent_status;
pub mod args;
pub mod certificate;
pub mod check_config;
pub mod client;
pub mod config_file;
pub mod images;
pub mod kubectl;
pub mod member;
pub mod settings;
pub mod snapshot;
pub mod status;
pub mod token;
pub mod uninstall;

use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches};
use tracing_subscriber::EnvFilter;

use args::{Cli, Command};

/// The real `main`: helper processes first, then the command.
pub fn main() -> ExitCode {
    // A re-exec of this binary that sets up a container must not have touched anything yet.
    coracle_agent::runtime::helper_main_if_requested();
    coracle_agent::memory::keep_small();
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        eprintln!("coracle: a TLS provider is installed already");
        return ExitCode::FAILURE;
    }
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("coracle: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

/// The error and its causes on one line.
fn explain(error: &anyhow::Error) -> String {
    crate::server::explain(error.as_ref())
}

fn run() -> anyhow::Result<ExitCode> {
    let argv: Vec<_> = std::env::args_os().collect();
    let argv = config_file::merge(Cli::command(), argv)?;
    let matches = Cli::command().get_matches_from(argv);
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    match cli.command {
        Command::Server(args) => {
            start_logging(args.verbose);
            let settings = settings::check(*args)?;
            runtime()?.block_on(crate::server::run(settings))?;
        }
        Command::Agent(args) => {
            start_logging(args.verbose);
            let settings = agent::check(*args)?;
            runtime()?.block_on(crate::node::run(settings))?;
        }
        Command::Images(args) => return images::run(args),
        Command::Uninstall(args) => return uninstall::run(args),
        Command::Kubectl(args) => return kubectl::run(args),
        Command::Status(args) => return status::run(args),
        Command::Member(args) => return member::run(args),
        Command::Token(args) => return token::run(args),
        Command::Snapshot(args) => return snapshot::run(args),
        Command::Certificate(args) => return certificate::run(args),
        Command::CheckConfig => return check_config::run(),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "coracle", &mut std::io::stdout());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 8)))
        .max_blocking_threads(64)
        .enable_all()
        .build()
        .context("start the async runtime")
}

/// Logs go to standard error; `CORACLE_LOG` takes `tracing` filter directives.
fn start_logging(verbose: u8) {
    let level = match verbose {
        0 => "info,openraft=error",
        1 => "info,openraft=error,coracle=debug,coracle_agent=debug,coracle_raft=debug",
        _ => "debug",
    };
    let filter = EnvFilter::try_from_env("CORACLE_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}
