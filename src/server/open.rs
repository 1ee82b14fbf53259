//! From a folder to a member: founds a cluster in an empty one, joins one when told to, goes on where it was otherwise. Ends with
//! the consensus engine running and the keys open; whether anybody leads is another matter.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, bail};
use coracle_agent::join::Token;
use coracle_agent::join::introduction::ca_hash;
use coracle_agent::servers::resolve::Resolver;
use coracle_raft::Node;
use tokio::sync::watch;

use super::Settings;
use super::anteroom::Anteroom;
use super::cluster::{Cluster, Member, remembered};
use super::join::agreement::Agreement;
use super::join::door::ServerRequest;
use super::join::enter;
use super::keys::Keyring;
use super::peers::{Peers, RaftDialer};
use crate::auth::pki::{ClusterKeys, clock};

/// A member of a cluster.
pub struct Opened {
    /// The cluster as this member sees it.
    pub cluster: Cluster,
    /// Certificates are not judged as of an earlier time.
    pub earliest: SystemTime,
}

/// Opens the data folder.
///
/// # Errors
/// It cannot be used, or the cluster to join refuses this server.
pub async fn open(settings: &Settings, clock_state: &watch::Sender<Option<String>>) -> anyhow::Result<Opened> {
    let db = settings.db();
    let id = coracle_raft::member_id(&db).with_context(|| format!("--data-dir {:?}", settings.data_dir.display()))?;
    let advertise = settings.advertise_address.unwrap_or(settings.node_ips()[0]);
    let address = SocketAddr::new(advertise, settings.port).to_string();
    let begun = db.join("wal").exists();
    let mut keys = Keyring::cached(&settings.data_dir).or_else(|error| if begun { Ok(None) } else { Err(error) })?;
    match &keys {
        None if !begun => {
            begin(settings, id, &address, clock_state).await?;
            keys = Keyring::cached(&settings.data_dir)?;
        }
        Some(keys) => check_still_ours(settings, keys, begun)?,
        None => {}
    }
    let earliest = match clock::problem(SystemTime::now(), clock::earliest(None)) {
        None => SystemTime::UNIX_EPOCH,
        Some(_) => clock::last_run(&settings.data_dir, clock::latest()),
    };
    let keys = keys.map(Arc::new);
    let peers = Peers::new(id, earliest);
    if let Some(keys) = &keys {
        peers.set_keys(keys)?;
    }
    let node = Node::start(coracle_raft::Options {
        name: settings.node_name.clone(),
        address: address.clone(),
        dial: Some(Arc::new(RaftDialer(peers.clone()))),
        // Who has keys was in a cluster: if its log is gone, the others have it.
        join: keys.is_some(),
        ..coracle_raft::Options::new(&db)
    });
    let node = node.await.context("start the store")?;
    let keyring = Keyring::open(&settings.data_dir, &node).await.context("open the keys of the cluster")?;
    peers.set_keys(&keyring.keys)?;
    let agreement = Arc::new(Agreement::of(settings));
    let name = settings.node_name.clone();
    Ok(Opened { cluster: Cluster { node, keyring, peers, name, address, agreement }, earliest })
}

/// The first start: a plausible clock is waited for, and the cluster to join.
async fn begin(
    settings: &Settings,
    id: u64,
    address: &str,
    clock_state: &watch::Sender<Option<String>>,
) -> anyhow::Result<()> {
    let token = match &settings.server {
        Some(_) => Some(enter::server_token(settings.token.as_deref())?),
        None if settings.token.is_some() => {
            bail!(
                "--token without --server: a new cluster makes its own tokens, in DATA/server/token and DATA/server/agent-token"
            )
        }
        None => None,
    };
    let clock_is_wrong = clock::problem(SystemTime::now(), clock::earliest(None)).is_some();
    if !clock_is_wrong && settings.server.is_none() {
        return Ok(());
    }
    let anteroom = Anteroom::open(settings.listen(), clock_state.subscribe()).await?;
    clock::wait_until_plausible(clock::earliest(None), clock_state).await;
    if let (Some(server), Some(token)) = (&settings.server, &token) {
        clock_state.send_replace(Some(format!("joining the cluster of {server}")));
        let node_secret = match settings.agent {
            true => Some(super::node_secret(&settings.data_dir)?),
            false => None,
        };
        let member = Member::new(id, &settings.node_name, address);
        let request = ServerRequest { member, settings: Agreement::of(settings), node_secret };
        let resolver = Resolver::new(settings.resolv_conf.clone());
        tracing::info!(server, "joining a cluster");
        enter::enter(&resolver, server, token, &request, &settings.data_dir, clock_state).await?;
        tracing::info!(server, "let in; catching up");
    }
    anteroom.close().await;
    clock_state.send_replace(None);
    Ok(())
}

/// What cannot be right about flags and folder of a server that is a member already.
fn check_still_ours(settings: &Settings, keys: &ClusterKeys, begun: bool) -> anyhow::Result<()> {
    let data_dir = settings.data_dir.display();
    let others = remembered::read(&settings.data_dir).iter().any(|member| member.name != settings.node_name);
    if !begun && !others && settings.server.is_none() {
        bail!(
            "{data_dir}/server holds the keys of a cluster of this server alone, but its data in {data_dir}/server/db is gone: \
             restore a snapshot with `coracle snapshot restore FILE --data-dir {data_dir}`, or remove {data_dir}/server to \
             begin a new cluster"
        );
    }
    if settings.server.is_none() {
        return Ok(());
    }
    let token = settings.token.as_deref().and_then(|text| Token::parse(text).ok());
    if token.is_some_and(|token| token.ca_hash != ca_hash(keys.server_ca.certificate())) {
        bail!(
            "{data_dir} belongs to a server of another cluster than the one that --server and --token name: choose another \
             --data-dir, or remove this instance with `coracle uninstall --data-dir {data_dir}`"
        );
    }
    if !others && begun {
        tracing::warn!("this server is a cluster of its own already; --server and --token are ignored");
    }
    Ok(())
}
