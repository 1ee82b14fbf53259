//! `coracle agent`: flags and their checks.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::bail;
use clap::{ArgAction, Args};
use coracle_agent::join::Token;
use coracle_agent::servers::resolve;

use super::args::{CONFIG, DATA_DIR};
use super::settings::{Faults, check_components, host_name, label, node_name, taint};
use crate::node::Settings;

/// Port of a server whose URL names none.
const PORT: u16 = 6443;

/// Flags of `coracle agent`; the keys of the configuration file are the same names.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Configuration file; drop-ins beside it in FILE.d/*.yaml
    #[arg(long, short, env = "CORACLE_CONFIG_FILE", default_value = CONFIG, value_name = "FILE")]
    pub config: PathBuf,
    /// Folder that holds all state
    #[arg(long, short, env = "CORACLE_DATA_DIR", default_value = DATA_DIR, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Any server of the cluster to join, https://ADDRESS:6443; not needed once this machine has joined
    #[arg(long, short, env = "CORACLE_URL", value_name = "URL", help_heading = "Cluster")]
    pub server: Option<String>,
    /// Token to join with, from DATA/server/agent-token of a server or `coracle token create`
    #[arg(long, short, env = "CORACLE_TOKEN", value_name = "TOKEN", hide_env_values = true, help_heading = "Cluster")]
    pub token: Option<String>,
    /// File that holds the token
    #[arg(long, env = "CORACLE_TOKEN_FILE", value_name = "FILE", help_heading = "Cluster")]
    pub token_file: Option<PathBuf>,
    /// Name of this node (default: the host name)
    #[arg(long, env = "CORACLE_NODE_NAME", value_name = "NAME", help_heading = "Node")]
    pub node_name: Option<String>,
    /// Address of this node (default: that of the default route's link, else the first global one)
    #[arg(long, short = 'i', env = "CORACLE_NODE_IP", value_delimiter = ',', value_name = "IP", help_heading = "Node")]
    pub node_ip: Vec<IpAddr>,
    /// Label that this node registers with, KEY=VALUE; may be repeated
    #[arg(long, env = "CORACLE_NODE_LABEL", value_delimiter = ',', value_name = "KEY=VALUE", help_heading = "Node")]
    pub node_label: Vec<String>,
    /// Taint that this node registers with, KEY=VALUE:EFFECT; may be repeated
    #[arg(
        long,
        env = "CORACLE_NODE_TAINT",
        value_delimiter = ',',
        value_name = "KEY=VALUE:EFFECT",
        help_heading = "Node"
    )]
    pub node_taint: Vec<String>,
    /// The host's resolver file, for pods with dnsPolicy Default and for names outside the cluster
    #[arg(
        long,
        env = "CORACLE_RESOLV_CONF",
        default_value = "/etc/resolv.conf",
        value_name = "FILE",
        help_heading = "Node"
    )]
    pub resolv_conf: PathBuf,
    /// Leave a component of this node out: coredns or kube-proxy; may be repeated
    #[arg(long, env = "CORACLE_DISABLE", value_delimiter = ',', value_name = "NAME")]
    pub disable: Vec<String>,
    /// Log more; twice for everything
    #[arg(long = "verbose", short, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Checks all flags; every fault is reported in one go.
pub fn check(args: AgentArgs) -> anyhow::Result<Settings> {
    let mut faults = Faults::default();
    let name = args.node_name.clone().map_or_else(host_name, Ok)?;
    let name = faults.check("node-name", &name, node_name(&name));
    let server = args.server.as_deref().filter(|url| !url.is_empty());
    let server = server.map(|url| faults.check("server", url, server_address(url)));
    let labels: Vec<_> =
        args.node_label.iter().filter_map(|text| faults.check("node-label", text, label(text))).collect();
    let taints: Vec<_> =
        args.node_taint.iter().filter_map(|text| faults.check("node-taint", text, taint(text))).collect();
    check_components(&args.disable, &mut faults);
    let token = token(&args).unwrap_or_else(|fault| {
        faults.0.push(fault);
        None
    });
    let (Some(node_name), true) = (name, faults.0.is_empty()) else {
        bail!("the settings are not usable:\n  {}", faults.0.join("\n  "));
    };
    let disabled = |name: &str| args.disable.iter().any(|disabled| disabled == name);
    Ok(Settings {
        data_dir: args.data_dir,
        server: server.flatten(),
        token,
        node_name,
        node_ips: args.node_ip,
        node_labels: labels,
        node_taints: taints,
        resolv_conf: args.resolv_conf,
        dns: !disabled("coredns"),
        service_proxy: !disabled("kube-proxy"),
    })
}

/// `https://host[:port]` as `host:port`.
pub fn server_address(url: &str) -> Result<String, String> {
    let form = || "expected https://ADDRESS:PORT, such as \"https://192.0.2.1:6443\"".to_owned();
    let rest = url.strip_prefix("https://").ok_or_else(form)?.trim_end_matches('/');
    let has_port = rest.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) && !rest.ends_with(']');
    let address = if has_port { rest.to_owned() } else { format!("{rest}:{PORT}") };
    if rest.contains(['/', '?', '#', '@']) || resolve::split(&address).is_err() {
        return Err(form());
    }
    Ok(address)
}

/// `--token`, or what `--token-file` holds. A fault never repeats the text.
fn token(args: &AgentArgs) -> Result<Option<Token>, String> {
    let given = args.token.as_deref().filter(|text| !text.is_empty());
    let text = match (given, &args.token_file) {
        (Some(text), _) => text.to_owned(),
        (None, Some(file)) => {
            std::fs::read_to_string(file).map_err(|error| format!("--token-file {:?}: {error}", file.display()))?
        }
        (None, None) => return Ok(None),
    };
    Token::parse(&text).map(Some).map_err(|error| format!("--token: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_an_https_url_with_or_without_port() {
        for (url, address) in [
            ("https://a.example:7443/", "a.example:7443"),
            ("https://192.0.2.1", "192.0.2.1:6443"),
            ("https://[fd00::1]", "[fd00::1]:6443"),
            ("https://[fd00::1]:1", "[fd00::1]:1"),
        ] {
            assert_eq!(server_address(url).as_deref(), Ok(address), "{url}");
        }
        for url in
            ["http://a:1", "a:1", "https://", "https://a:0", "https://a/path", "https://u@a:1", "https://fd00::1"]
        {
            assert!(server_address(url).is_err(), "{url}");
        }
    }
}
