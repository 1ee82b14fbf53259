//! `coracle member`: the servers of the cluster.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use http::Method;

use super::client::{Client, Instance, Output, print_table, say};
use crate::server::admin::PREFIX;
use crate::server::admin::members::MemberView;

/// `coracle member`.
#[derive(Debug, Args)]
pub struct MemberArgs {
    /// Which instance.
    #[command(flatten)]
    pub instance: Instance,
    /// What to do.
    #[command(subcommand)]
    pub command: MemberCommand,
}

/// What to do with members.
#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// List the servers of the cluster
    #[command(visible_alias = "ls")]
    List {
        /// How to print them
        #[arg(long, short, value_enum, default_value = "table")]
        output: Output,
    },
    /// Remove a server from the cluster for good
    #[command(visible_alias = "rm")]
    Remove {
        /// Its name or id
        #[arg(value_name = "NAME|ID")]
        member: String,
    },
}

/// Runs the command.
pub fn run(args: MemberArgs) -> anyhow::Result<ExitCode> {
    let client = Client::open(&args.instance)?;
    match args.command {
        MemberCommand::List { output } => {
            let members: Vec<MemberView> = client.call(Method::GET, &format!("{PREFIX}members"), &())?;
            print(&members, output)?;
        }
        MemberCommand::Remove { member } => {
            let path = format!("{PREFIX}members/{member}");
            let left: Vec<MemberView> = client.call(Method::DELETE, &path, &())?;
            let servers = if left.len() == 1 { "server is" } else { "servers are" };
            say(format_args!(
                "removed {member}; {} {servers} left. If its node is gone too: kubectl delete node {member}",
                left.len()
            ));
            say("It still holds the cluster's keys: run `coracle uninstall` there, or destroy its disk.");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print(members: &[MemberView], output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        say(format_args!("{}", serde_json::to_string_pretty(members)?));
        return Ok(());
    }
    let row = |member: &MemberView| {
        let role = match (member.leader, member.learner) {
            (true, _) => "leader",
            (false, true) => "learner",
            (false, false) => "follower",
        };
        let lag = member.lag.map_or_else(|| "-".to_owned(), |lag| lag.to_string());
        let reachable = match member.reachable {
            Some(true) => "yes",
            Some(false) => "no",
            None => "-",
        };
        [member.name.clone(), member.id.clone(), member.address.clone(), role.to_owned(), lag, reachable.to_owned()]
    };
    let rows: Vec<_> = members.iter().map(row).collect();
    print_table(["NAME", "ID", "ADDRESS", "ROLE", "LAG", "REACHABLE"], &rows);
    Ok(())
}
