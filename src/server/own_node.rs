//! The agent in this process. Its own API is a call away; to the other servers it keeps tunnels, so that they reach its
//! node without this server.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use coracle_agent::servers::resolve::Resolver;
use coracle_agent::servers::{Dialer, NodeIdentity, ServerList, Servers};
use coracle_agent::{Access, AgentConfig};
use http::{Method, Request};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::Settings;
use super::bootstrap::get;
use crate::apiserver::ApiServer;
use crate::auth::pki::{ClusterKeys, LeafRequest, Usage};
use crate::auth::{Identity, Security};

/// A certificate for tunnels is replaced this often; it lives a year.
const RENEW: Duration = Duration::from_secs(60 * 24 * 3600);
/// How often its age is looked at; jumps of the clock make one long sleep unreliable.
const CHECK: Duration = Duration::from_secs(60);

/// Tells nodes with a server from others; a node may not say so itself (NodeRestriction).
const ROLE: &str = "node-role.kubernetes.io/control-plane";
/// How often the label is looked at until it is there, and from then on: a node may be registered anew.
const LABEL: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));

/// Starts the agent. `own` is the advertised `host:port`.
pub fn start(
    api: &ApiServer,
    security: &Security,
    settings: &Settings,
    node_ips: Vec<IpAddr>,
    own: &str,
    shutdown: &CancellationToken,
) -> JoinHandle<()> {
    let config = AgentConfig {
        node_ips,
        node_labels: settings.node_labels.clone(),
        node_taints: settings.node_taints.clone(),
        cluster_cidr: settings.cluster_cidr.clone(),
        service_cidr: settings.service_cidr.clone(),
        cluster_dns: settings.cluster_dns.clone(),
        backend: settings.backend,
        cluster_domain: settings.cluster_domain.clone(),
        resolv_conf: settings.resolv_conf.clone(),
        service_proxy: settings.service_proxy,
        dns: settings.dns,
        shim: crate::programs::SHIM,
        hello: crate::programs::HELLO,
        ..AgentConfig::new(settings.data_dir.clone(), settings.node_name.clone())
    };
    let client = crate::apiserver::client(api, Identity::node(&settings.node_name));
    let (link, listener) = coracle_agent::node_link();
    let registration = api.links().register(&settings.node_name, link);
    let servers = other_servers(&config, &security.keys, own, shutdown)
        .inspect_err(|error| tracing::error!(error = format!("{error:#}"), "no tunnels to other servers"))
        .ok();
    let access = Access { client, link: Some(listener), servers };
    let labels = label_role(crate::apiserver::client(api, Identity::apiserver()), settings.node_name.clone());
    tokio::spawn(shutdown.clone().run_until_cancelled_owned(labels));
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        let _registration = registration;
        if let Err(error) = coracle_agent::run(config, access, shutdown).await {
            let error = anyhow::Error::from(error);
            tracing::error!(error = format!("{error:#}"), "the agent cannot run; the server goes on without a node");
        }
    })
}

/// Keeps the role's label on the node.
async fn label_role(client: kube::Client, node: String) {
    loop {
        let pause = match label_once(&client, &node).await {
            Ok(true) => LABEL.1,
            Ok(false) => LABEL.0,
            Err(error) => {
                tracing::debug!(error = format!("{error:#}"), "the node is not labelled yet");
                LABEL.0
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Whether the node exists and bears the label.
async fn label_once(client: &kube::Client, node: &str) -> anyhow::Result<bool> {
    let path = format!("/api/v1/nodes/{node}");
    let Some(object) = get(client, &path).await? else { return Ok(false) };
    if object["metadata"]["labels"].get(ROLE).is_some() {
        return Ok(true);
    }
    let patch = json!({ "metadata": { "labels": { ROLE: "true" } } });
    let request = Request::builder()
        .method(Method::PATCH)
        .uri(path)
        .header(http::header::CONTENT_TYPE, "application/merge-patch+json")
        .body(serde_json::to_vec(&patch)?)?;
    client.request::<Value>(request).await?;
    Ok(true)
}

/// The way to the other servers, under the node's identity.
fn other_servers(
    config: &AgentConfig,
    keys: &Arc<ClusterKeys>,
    own: &str,
    shutdown: &CancellationToken,
) -> anyhow::Result<Servers> {
    let identity = NodeIdentity::default();
    issue(&identity, keys, &config.node_name)?;
    let roots = [keys.server_ca.certificate().clone()];
    let resolver = Resolver::new(config.resolv_conf.clone());
    let dialer = Dialer::new(&roots, identity.clone(), resolver).context("trust the cluster's CA")?;
    let renewal = renew(identity, keys.clone(), config.node_name.clone());
    tokio::spawn(shutdown.clone().run_until_cancelled_owned(renewal));
    let list = ServerList::open(&config.agent_dir(), None);
    Ok(Servers { list, dialer, own: Some(own.to_owned()) })
}

/// Every server holds the CA's key: its node's certificate needs no request.
fn issue(identity: &NodeIdentity, keys: &ClusterKeys, node_name: &str) -> anyhow::Result<()> {
    let user = format!("system:node:{node_name}");
    let request =
        LeafRequest { common_name: &user, organization: Some("system:nodes"), names: &[], usage: Usage::Client };
    let leaf = keys.client_ca.issue(&request, SystemTime::now()).context("issue the node's certificate")?;
    identity.set(vec![leaf.certificate.clone()], &leaf.key_der()).context("use the node's certificate")
}

async fn renew(identity: NodeIdentity, keys: Arc<ClusterKeys>, node_name: String) {
    let mut issued = SystemTime::now();
    loop {
        tokio::time::sleep(CHECK).await;
        // A clock that went back makes the age unknown.
        if SystemTime::now().duration_since(issued).is_ok_and(|age| age < RENEW) {
            continue;
        }
        match issue(&identity, &keys, &node_name) {
            Ok(()) => issued = SystemTime::now(),
            Err(error) => tracing::warn!(error = format!("{error:#}"), "node certificate not renewed"),
        }
    }
}
