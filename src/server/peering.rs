//! What servers say to each other beside consensus: where each is reached now, and how far each is.
//!
//! `POST /coracle/v1/peer/announce` tells a server that another one is reached elsewhere than the membership has it, and brings
//! back a server that lost its data or its incarnation of the cluster; `GET /coracle/v1/peer/state` tells how far everyone is.
//! Both demand the certificate of a server and work without a leader.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use coracle_agent::servers::resolve::Resolver;
use futures::future::FutureExt;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::cluster::{self, Cluster, Member};
use crate::apiserver::body::Body;
use crate::apiserver::call::respond;
use crate::apiserver::protocols::{self, Doorkeeper};
use crate::apiserver::status::Status;
use crate::auth::PeerCertificate;
use crate::controllers::backoff::Backoff;

/// What all paths between servers begin with.
pub const PREFIX: &str = "/coracle/v1/peer/";
const ANNOUNCE: &str = "/coracle/v1/peer/announce";
const STATE: &str = "/coracle/v1/peer/state";
/// The largest request, in bytes.
const MAX_REQUEST: usize = 16 * 1024;
/// A server whose leader is known this soon after the start has nothing to announce.
const PATIENCE: Duration = Duration::from_secs(2);
/// Delays between announcements.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(10));
/// How often the membership is compared with what is remembered.
const LOOK: Duration = Duration::from_secs(5);

/// How far a server is, as it sees itself and the others.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Who says so.
    pub member: Member,
    /// Whom it takes for the leader.
    pub leader: Option<String>,
    /// All servers it knows, with what the log holds on each as far as the leader knows.
    pub members: Vec<(Member, Option<u64>)>,
}

/// The handler of [`PREFIX`].
pub fn doorkeeper(cluster: Cluster) -> Doorkeeper {
    Arc::new(move |request, certificate, _| {
        let cluster = cluster.clone();
        async move { answer(&cluster, request, certificate).await.unwrap_or_else(Status::into_response) }.boxed()
    })
}

async fn answer(
    cluster: &Cluster,
    request: Request<Body>,
    certificate: PeerCertificate,
) -> Result<Response<Body>, Status> {
    let peer = protocols::identity(certificate).and_then(|identity| identity.server_id());
    let peer = peer.ok_or_else(Status::unauthorized)?;
    match (request.method(), request.uri().path()) {
        (&Method::GET, STATE) => {}
        (&Method::POST, ANNOUNCE) => {
            let body = request.into_body().collect(MAX_REQUEST).await?;
            let member: Member = serde_json::from_slice(&body).map_err(|e| Status::bad_request(e.to_string()))?;
            announced(cluster, peer, member).await?;
        }
        _ => return Err(Status::new(StatusCode::NOT_FOUND, "NotFound", "no such path between servers")),
    }
    let state = serde_json::to_string(&state(cluster)).map_err(Status::internal)?;
    Ok(respond(StatusCode::OK, "application/json", state.into()))
}

async fn announced(cluster: &Cluster, certified: u64, member: Member) -> Result<(), Status> {
    let peer = member.peer().filter(|peer| peer.id == certified);
    let peer = peer.ok_or_else(|| Status::bad_request("a server may announce itself only"))?;
    peer.address.parse::<SocketAddr>().map_err(|_| Status::bad_request("address: expected IP:PORT"))?;
    if cluster.is_removed(peer.id)? {
        // The refusal in words.
        return cluster.admit(peer).await;
    }
    cluster.node.learn_address(peer.id, &peer.address);
    // Without a leader that is all that can be done; it lets one be elected.
    if cluster.leader().is_some() { cluster.admit(peer).await } else { Ok(()) }
}

fn state(cluster: &Cluster) -> State {
    let members = cluster.node.members();
    State {
        member: Member::new(cluster.node.id(), &cluster.name, &cluster.address),
        leader: cluster.leader().map(cluster::to_text),
        members: members.iter().map(|m| (Member::new(m.id, &m.name, &m.address), m.matched)).collect(),
    }
}

/// Keeps this server known to the others until `shutdown`: announces where it is while the membership has it elsewhere or
/// nowhere, and remembers who they are.
pub async fn stay_known(
    cluster: Cluster,
    data_dir: PathBuf,
    server: Option<(Resolver, String)>,
    shutdown: CancellationToken,
) {
    let work = async {
        let mut retry = Backoff::new(RETRY.0, RETRY.1);
        tokio::time::sleep(PATIENCE).await;
        loop {
            cluster::remember(&cluster, &data_dir);
            if is_known(&cluster) {
                retry.reset();
                tokio::time::sleep(LOOK).await;
                continue;
            }
            announce_to_all(&cluster, &data_dir, server.as_ref()).await;
            tokio::time::sleep(retry.fail()).await;
        }
    };
    shutdown.run_until_cancelled(work).await;
}

/// Whether the others find this server: it has a leader, and the membership has its address.
fn is_known(cluster: &Cluster) -> bool {
    cluster.leader().is_some() && cluster.own_state().is_some_and(|own| own.address == cluster.address)
}

async fn announce_to_all(cluster: &Cluster, data_dir: &std::path::Path, server: Option<&(Resolver, String)>) {
    let own = Member::new(cluster.node.id(), &cluster.name, &cluster.address);
    if cluster.leader() == Some(cluster.node.id()) {
        if let Some(peer) = own.peer()
            && let Err(status) = cluster.admit(peer).await
        {
            tracing::warn!(error = status.message(), "noting this server's own address");
        }
        return;
    }
    // Whoever is there now: a server that lost its data has another id than is remembered.
    let known = cluster.members().into_iter().chain(cluster::remembered::read(data_dir));
    let known: BTreeSet<_> = known.filter_map(|member| member.address.parse::<SocketAddr>().ok()).collect();
    for address in known.into_iter().filter(|address| Some(*address) != cluster.address.parse().ok()) {
        let Some(request) = announcement(&own) else { return };
        heard(cluster, &address.to_string(), cluster.peers.ask_any(address, request).await);
    }
    let Some((resolver, server)) = server else { return };
    for address in resolver.resolve(server).await.unwrap_or_default() {
        let Some(request) = announcement(&own) else { return };
        heard(cluster, server, cluster.peers.ask_any(address, request).await);
    }
}

fn announcement(own: &Member) -> Option<Request<Full<Bytes>>> {
    let body = serde_json::to_vec(own).ok()?;
    Request::post(ANNOUNCE).header("host", "kubernetes").body(Full::new(Bytes::from(body))).ok()
}

/// Takes over where the other server says it is.
fn heard(cluster: &Cluster, from: &str, answer: std::io::Result<Response<Bytes>>) {
    match answer {
        Ok(response) if response.status() == StatusCode::OK => {
            let Ok(state) = serde_json::from_slice::<State>(response.body()) else { return };
            if let Some(id) = cluster::from_text(&state.member.id).filter(|id| *id != cluster.node.id()) {
                cluster.node.learn_address(id, &state.member.address);
            }
        }
        Ok(response) => {
            let status: serde_json::Value = serde_json::from_slice(response.body()).unwrap_or_default();
            let message = status["message"].as_str().unwrap_or_default();
            tracing::warn!(server = from, code = response.status().as_u16(), message, "another server refused us");
        }
        Err(error) => tracing::debug!(server = from, %error, "another server is not reached"),
    }
}

/// How far this server is in catching up, in percent, as the leader sees it; none while that is not known.
pub async fn progress(cluster: &Cluster) -> Option<u64> {
    let own = cluster::to_text(cluster.node.id());
    let leader = cluster.leader()?;
    let address = cluster.node.members().into_iter().find(|m| m.id == leader)?.address;
    let request = Request::get(STATE).header("host", "kubernetes").body(Full::default()).ok()?;
    let answer = cluster.peers.ask(leader, &address, request).await.ok()?;
    let state: State = serde_json::from_slice(answer.body()).ok()?;
    percent(&state, &own)
}

fn percent(state: &State, own: &str) -> Option<u64> {
    let of = |id: &str| state.members.iter().find(|(member, _)| member.id == id).and_then(|(_, matched)| *matched);
    let end = of(state.leader.as_deref()?)?;
    let here = of(own).unwrap_or(0);
    Some((here.min(end) * 100).checked_div(end).unwrap_or(100))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_what_the_leader_has_seen_arrive() {
        let member = |id: u64| Member::new(id, "", "");
        let state = |own: Option<u64>| State {
            member: member(1),
            leader: Some(cluster::to_text(1)),
            members: vec![(member(1), Some(200)), (member(2), own)],
        };
        let own = cluster::to_text(2);
        assert_eq!(percent(&state(None), &own), Some(0));
        assert_eq!(percent(&state(Some(84)), &own), Some(42));
        assert_eq!(percent(&state(Some(300)), &own), Some(100));
        assert_eq!(percent(&State { leader: None, ..state(Some(1)) }, &own), None);
    }
}
