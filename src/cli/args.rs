//! Every command and flag. Names and meaning follow k3s where it has the same thing.

use std::ffi::OsString;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand};

/// Where an instance keeps everything unless told otherwise.
pub const DATA_DIR: &str = "/var/lib/coracle";
/// Where the configuration file is looked for.
pub const CONFIG: &str = "/etc/coracle/config.yaml";
/// Where the administrator's kubeconfig is written.
pub const KUBECONFIG: &str = "/etc/coracle/coracle.yaml";

/// Kubernetes you can carry: one static binary that is a whole cluster.
#[derive(Debug, Parser)]
#[command(name = "coracle", version = crate::server::VERSION, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a server: API, controllers, scheduler, and a node unless --disable-agent
    Server(Box<ServerArgs>),
    /// Run a node that joins the servers of a cluster
    Agent(Box<super::agent::AgentArgs>),
    /// List, import and remove container images of this machine
    Images(ImagesArgs),
    /// Run kubectl against the server of this machine
    Kubectl(KubectlArgs),
    /// Show how this server and its cluster are: what is wrong and what to do
    Status(super::status::StatusArgs),
    /// List and remove the servers of the cluster
    Member(super::member::MemberArgs),
    /// Make, list, delete and rotate tokens for joining
    Token(super::token::TokenArgs),
    /// Save, list, prune and restore snapshots of the cluster's state
    Snapshot(super::snapshot::SnapshotArgs),
    /// Check and renew certificates
    Certificate(super::certificate::CertificateArgs),
    /// Check that this machine's kernel has what Coracle needs
    CheckConfig,
    /// Stop an instance and remove everything it made; asks nothing
    Uninstall(UninstallArgs),
    /// Print a completion script for a shell
    Completion {
        /// bash, zsh, fish, elvish or powershell
        shell: clap_complete::Shell,
    },
}

/// Flags of `coracle server`; the keys of the configuration file are the same names.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Configuration file; drop-ins beside it in FILE.d/*.yaml
    #[arg(long, short, env = "CORACLE_CONFIG_FILE", default_value = CONFIG, value_name = "FILE")]
    pub config: PathBuf,
    /// Folder that holds all state
    #[arg(long, short, env = "CORACLE_DATA_DIR", default_value = DATA_DIR, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Any server of the cluster to join, https://ADDRESS:6443; not needed once this server has joined
    #[arg(long, short, env = "CORACLE_URL", value_name = "URL", help_heading = "Cluster")]
    pub server: Option<String>,
    /// Token to join with, from DATA/server/token of a server
    #[arg(long, short, env = "CORACLE_TOKEN", value_name = "TOKEN", hide_env_values = true, help_heading = "Cluster")]
    pub token: Option<String>,
    /// File that holds the token
    #[arg(long, env = "CORACLE_TOKEN_FILE", value_name = "FILE", help_heading = "Cluster")]
    pub token_file: Option<PathBuf>,
    /// Make this one server a cluster of its own again, when the others are lost for good; then end
    #[arg(long, help_heading = "Cluster")]
    pub cluster_reset: bool,
    /// Snapshot to begin from when resetting
    #[arg(long, env = "CORACLE_CLUSTER_RESET_RESTORE_PATH", value_name = "FILE", help_heading = "Cluster")]
    pub cluster_reset_restore_path: Option<PathBuf>,
    /// When to take snapshots of the cluster's state, a cron schedule; empty for never
    #[arg(
        long,
        alias = "etcd-snapshot-schedule-cron",
        env = "CORACLE_SNAPSHOT_SCHEDULE_CRON",
        default_value = "0 */12 * * *",
        value_name = "CRON",
        help_heading = "Snapshots"
    )]
    pub snapshot_schedule_cron: String,
    /// How many scheduled snapshots to keep
    #[arg(
        long,
        alias = "etcd-snapshot-retention",
        env = "CORACLE_SNAPSHOT_RETENTION",
        default_value_t = 5,
        value_name = "N",
        help_heading = "Snapshots"
    )]
    pub snapshot_retention: usize,
    /// Folder of the snapshots (default: DATA/server/snapshots)
    #[arg(
        long,
        alias = "etcd-snapshot-dir",
        env = "CORACLE_SNAPSHOT_DIR",
        value_name = "DIR",
        help_heading = "Snapshots"
    )]
    pub snapshot_dir: Option<PathBuf>,
    /// Address to listen on (default: all, of both families)
    #[arg(long, env = "CORACLE_BIND_ADDRESS", value_name = "IP", help_heading = "Listener")]
    pub bind_address: Option<IpAddr>,
    /// Port of the API
    #[arg(
        long,
        env = "CORACLE_HTTPS_LISTEN_PORT",
        default_value_t = 6443,
        value_name = "PORT",
        help_heading = "Listener"
    )]
    pub https_listen_port: u16,
    /// Address that pods and other machines reach this server at (default: the node's address)
    #[arg(long, env = "CORACLE_ADVERTISE_ADDRESS", value_name = "IP", help_heading = "Listener")]
    pub advertise_address: Option<IpAddr>,
    /// More names or addresses for the server's certificate; may be repeated
    #[arg(long, env = "CORACLE_TLS_SAN", value_delimiter = ',', value_name = "NAME", help_heading = "Listener")]
    pub tls_san: Vec<String>,
    /// Address range of pods; for dual stack one of each family, such as "10.42.0.0/16,fd42::/56"
    #[arg(
        long,
        env = "CORACLE_CLUSTER_CIDR",
        default_value = "10.42.0.0/16",
        value_name = "CIDR",
        help_heading = "Network"
    )]
    pub cluster_cidr: String,
    /// Address range of Services; for dual stack one of each family, such as "10.43.0.0/16,fd43::/112"
    #[arg(
        long,
        env = "CORACLE_SERVICE_CIDR",
        default_value = "10.43.0.0/16",
        value_name = "CIDR",
        help_heading = "Network"
    )]
    pub service_cidr: String,
    /// Ports of NodePort Services
    #[arg(
        long,
        env = "CORACLE_SERVICE_NODE_PORT_RANGE",
        default_value = "30000-32767",
        value_name = "FROM-TO",
        help_heading = "Network"
    )]
    pub service_node_port_range: String,
    /// Addresses of the cluster DNS (default: the tenth of each Service range)
    #[arg(long, env = "CORACLE_CLUSTER_DNS", value_delimiter = ',', value_name = "IP", help_heading = "Network")]
    pub cluster_dns: Vec<IpAddr>,
    /// How pods of different nodes reach each other: vxlan, host-gw (all nodes on one L2 segment) or none
    #[arg(
        long,
        env = "CORACLE_FLANNEL_BACKEND",
        default_value = "vxlan",
        value_name = "BACKEND",
        help_heading = "Network"
    )]
    pub flannel_backend: String,
    /// DNS domain of the cluster
    #[arg(
        long,
        env = "CORACLE_CLUSTER_DOMAIN",
        default_value = "cluster.local",
        value_name = "DOMAIN",
        help_heading = "Network"
    )]
    pub cluster_domain: String,
    /// File to write the administrator's kubeconfig to
    #[arg(long, short = 'o', env = "CORACLE_KUBECONFIG_OUTPUT", default_value = KUBECONFIG, value_name = "FILE", help_heading = "Client")]
    pub write_kubeconfig: PathBuf,
    /// Its file mode, octal
    #[arg(long, env = "CORACLE_KUBECONFIG_MODE", default_value = "0600", value_name = "MODE", help_heading = "Client")]
    pub write_kubeconfig_mode: String,
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
    /// Run no node on this server
    #[arg(long, env = "CORACLE_DISABLE_AGENT", value_parser = clap::builder::BoolishValueParser::new(), num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", action = ArgAction::Set)]
    pub disable_agent: bool,
    /// Leave a component out: coredns or kube-proxy; may be repeated
    #[arg(long, env = "CORACLE_DISABLE", value_delimiter = ',', value_name = "NAME")]
    pub disable: Vec<String>,
    /// Log more; twice for everything
    #[arg(long = "verbose", short, action = ArgAction::Count)]
    pub verbose: u8,
}

/// `coracle images`.
#[derive(Debug, Args)]
pub struct ImagesArgs {
    /// Folder of the instance
    #[arg(long, short, global = true, env = "CORACLE_DATA_DIR", default_value = DATA_DIR, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// What to do with them.
    #[command(subcommand)]
    pub command: ImagesCommand,
}

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum ImagesCommand {
    /// List the images of this machine
    #[command(visible_alias = "list")]
    Ls {
        /// Also print digests in full
        #[arg(long)]
        digests: bool,
    },
    /// Import OCI or docker archives (tar, gzip or zstd)
    Import {
        /// The archives
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Remove images by name or digest
    #[command(visible_alias = "remove")]
    Rm {
        /// Names or digests
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
}

/// `coracle kubectl`.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct KubectlArgs {
    /// What kubectl takes
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    pub args: Vec<OsString>,
}

/// `coracle uninstall`.
#[derive(Debug, Args)]
pub struct UninstallArgs {
    /// Remove only the instance of this folder (default: the installed one, with binary, unit and /etc/coracle)
    #[arg(long, short, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}
