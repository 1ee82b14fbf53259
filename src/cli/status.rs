//! `coracle status`: one screen about this machine and its cluster.

use std::process::ExitCode;

use anyhow::bail;
use clap::Args;
use http::Method;

use super::agent_status;
use super::client::{Client, Instance, Output, age, print_table, say};
use crate::server::admin::PREFIX;
use crate::server::admin::status::{MemberHealth, StatusView};
use crate::server::lock::DataDirLock;

/// `coracle status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Which instance.
    #[command(flatten)]
    pub instance: Instance,
    /// How to print it
    #[arg(long, short, value_enum, default_value = "table")]
    pub output: Output,
}

/// Runs the command; fails when something is wrong.
pub fn run(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let data_dir = &args.instance.data_dir;
    if agent_status::is_agent(data_dir) {
        return agent_status::run(data_dir, args.output);
    }
    let client = Client::open(&args.instance)?;
    if DataDirLock::holder(data_dir).is_none() {
        bail!("no server is running in {}; start it first", data_dir.display());
    }
    let status: StatusView = client.call(Method::GET, &format!("{PREFIX}status"), &())?;
    match args.output {
        Output::Json => say(format_args!("{}", serde_json::to_string_pretty(&status)?)),
        Output::Table => print(&status),
    }
    Ok(if status.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(status: &StatusView) {
    say(format_args!("Server   {} ({}), Coracle {}", status.name, status.address, status.version));
    say(format_args!("Role     {}, the leader is {}", status.role, status.leader.as_deref().unwrap_or("not known")));
    let sync = status.disk.sync_microseconds.map_or_else(
        || "cannot be written".to_owned(),
        |took| format!("a durable write takes {}.{} ms", took / 1000, took % 1000 / 100),
    );
    say(format_args!("Disk     {} of {} MiB free, {sync}", status.disk.free >> 20, status.disk.size >> 20));
    say(format_args!("Clock    {}", status.clock));
    let next = status.certificates.iter().min_by_key(|certificate| certificate.seconds_left);
    if let Some(next) = next {
        say(format_args!("Certs    the next to end is {:?}, in {}", next.name, age(next.seconds_left)));
    }
    say("");
    let row = |m: &MemberHealth| {
        let role = match (m.member.leader, m.member.learner) {
            (true, _) => "leader",
            (false, true) => "learner",
            (false, false) => "follower",
        };
        let lag = m.member.lag.map_or_else(|| "-".to_owned(), |lag| lag.to_string());
        let clock = m.clock_ahead.map_or_else(|| "-".to_owned(), |ahead| format!("{ahead:+}s"));
        [m.member.name.clone(), m.member.address.clone(), role.to_owned(), lag, clock, m.health.clone()]
    };
    let rows: Vec<_> = status.members.iter().map(row).collect();
    print_table(["SERVER", "ADDRESS", "ROLE", "LAG", "CLOCK", "HEALTH"], &rows);
    say("");
    agent_status::print_problems(&status.problems);
}
