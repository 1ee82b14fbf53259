//! `coracle status` on a machine that runs an agent only: its process, its servers as it would reach them, its certificate.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use coracle_agent::join::credentials::Credentials;
use coracle_agent::servers::channel::Channel;
use coracle_agent::servers::resolve::Resolver;
use coracle_agent::servers::{Dialer, NodeIdentity, ServerList};
use serde::Serialize;

use super::certificate;
use super::client::{Output, age, print_table, say};
use crate::server::admin::certificates::CertificateView;
use crate::server::admin::status::Problem;
use crate::server::explain;
use crate::server::lock::DataDirLock;

/// What is known of an agent.
#[derive(Debug, Serialize)]
struct AgentView {
    data_dir: PathBuf,
    /// Of the running agent.
    pid: Option<i32>,
    servers: Vec<ServerView>,
    certificate: Option<CertificateView>,
    problems: Vec<Problem>,
}

/// A server as seen from here.
#[derive(Debug, Serialize)]
struct ServerView {
    /// `host:port`.
    address: String,
    /// Whether it answers and calls itself ready.
    ready: bool,
    /// `ready`, `not ready`, or why it was not reached.
    health: String,
}

/// Whether the folder is an agent's.
pub fn is_agent(data_dir: &Path) -> bool {
    data_dir.join("agent/servers.json").exists() && !crate::server::admin_kubeconfig(data_dir).exists()
}

/// Prints it; fails when something is wrong.
pub fn run(data_dir: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut view = AgentView {
        data_dir: data_dir.to_owned(),
        pid: DataDirLock::holder(data_dir),
        servers: runtime.block_on(servers(&data_dir.join("agent")))?,
        certificate: certificate::of_agent(data_dir),
        problems: Vec::new(),
    };
    view.problems = problems(&view);
    match output {
        Output::Json => say(format_args!("{}", serde_json::to_string_pretty(&view)?)),
        Output::Table => print(&view),
    }
    Ok(if view.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Asks each server that the agent knows, all at once.
async fn servers(agent_dir: &Path) -> anyhow::Result<Vec<ServerView>> {
    let roots = Credentials::new(agent_dir.to_owned()).roots()?;
    let resolver = Resolver::new("/etc/resolv.conf".into());
    let dialer = Dialer::new(&roots, NodeIdentity::default(), resolver)?;
    let ask = |address: String| {
        let dialer = dialer.clone();
        async move {
            let answer = match Channel::open(&dialer, &address).await {
                Ok(channel) => channel.is_ready().await,
                Err(error) => Err(error),
            };
            let (ready, health) = match answer {
                Ok(true) => (true, "ready".to_owned()),
                Ok(false) => (false, "not ready".to_owned()),
                Err(error) => (false, explain(&error)),
            };
            ServerView { address, ready, health }
        }
    };
    let known = ServerList::open(agent_dir, None).current();
    Ok(futures::future::join_all(known.into_iter().map(ask)).await)
}

fn problems(view: &AgentView) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut add =
        |what: &str, remedy: &str| problems.push(Problem { what: what.to_owned(), remedy: remedy.to_owned() });
    if view.pid.is_none() {
        add("the agent is not running; its pods go on", "start it");
    }
    match &view.certificate {
        None => add("this machine has no certificate", "start the agent with --server and --token"),
        Some(node) if node.state == "expired" => {
            add("the node's certificate has ended", "start the agent with --token to have it admitted again");
        }
        Some(_) => {}
    }
    if !view.servers.iter().any(|server| server.ready) {
        let remedy = "see that one of them runs and that TCP port 6443 of it is reached from here; \
                      `coracle agent --server` names another one";
        add("no server is ready for this node; its pods go on", remedy);
    }
    problems
}

fn print(view: &AgentView) {
    let state = view.pid.map_or_else(|| "not running".to_owned(), |pid| format!("running with pid {pid}"));
    say(format_args!("Agent    {}, {state}", view.data_dir.display()));
    if let Some(node) = &view.certificate {
        say(format_args!("Certs    the node's certificate ends in {} ({})", age(node.seconds_left), node.state));
    }
    say("");
    let rows: Vec<_> = view.servers.iter().map(|server| [server.address.clone(), server.health.clone()]).collect();
    print_table(["SERVER", "HEALTH"], &rows);
    say("");
    print_problems(&view.problems);
}

/// What is wrong and what to do.
pub fn print_problems(problems: &[Problem]) {
    if problems.is_empty() {
        say("Nothing is wrong.");
    }
    for problem in problems {
        say(format_args!("WRONG    {}", problem.what));
        say(format_args!("  do     {}", problem.remedy));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_says_what_is_wrong_with_it() {
        let server = |ready| ServerView { address: "a:1".to_owned(), ready, health: String::new() };
        let certificate = |state: &str| {
            let (name, expires) = ("node".to_owned(), String::new());
            Some(CertificateView { name, expires, seconds_left: 1, state: state.to_owned() })
        };
        let whats = |pid, servers, certificate| {
            let data_dir = PathBuf::new();
            let view = AgentView { data_dir, pid, servers, certificate, problems: Vec::new() };
            problems(&view).into_iter().map(|problem| problem.what).collect::<Vec<_>>()
        };
        assert!(whats(Some(1), vec![server(false), server(true)], certificate("ok")).is_empty());
        let all = whats(None, vec![server(false)], certificate("expired"));
        let all: Vec<&str> = all.iter().map(|what| what.split(';').next().unwrap_or_default()).collect();
        let parts =
            ["the agent is not running", "the node's certificate has ended", "no server is ready for this node"];
        assert_eq!(all, parts);
        assert_eq!(whats(Some(1), vec![server(true)], None), ["this machine has no certificate"]);
    }
}
