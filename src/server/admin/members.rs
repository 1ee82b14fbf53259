//! Who is in the cluster.

use http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::apiserver::status::Status;
use crate::server::cluster::{Cluster, from_text, to_text};

/// A server; the first five fields are promised to scripts, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberView {
    /// Name of the server's node.
    pub name: String,
    /// 16 hexadecimal digits.
    pub id: String,
    /// URL of its API.
    pub address: String,
    /// It leads, as far as the server asked knows.
    pub leader: bool,
    /// It is catching up and has no vote yet.
    pub learner: bool,
    /// Log entries it lacks; only the leader knows of the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<u64>,
    /// Whether it answered lately; only the leader knows of the others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reachable: Option<bool>,
}

/// All servers.
pub fn list(cluster: &Cluster) -> Vec<MemberView> {
    let own = cluster.node.id();
    let leads = cluster.node.is_leader();
    let view = |member: coracle_raft::MemberState| MemberView {
        name: member.name,
        id: to_text(member.id),
        address: format!("https://{}", member.address),
        leader: member.leader,
        learner: member.learner,
        lag: member.lag,
        reachable: (leads || member.id == own).then_some(member.reachable),
    };
    cluster.node.members().into_iter().map(view).collect()
}

/// Removes the server of this name or id; returns those that are left.
///
/// # Errors
/// 404 when there is none, 409 when it is this one or the cluster would lose its majority, 503 without a leader.
pub async fn remove(cluster: &Cluster, who: &str) -> Result<Vec<MemberView>, Status> {
    let members = cluster.node.members();
    let by_id = from_text(who);
    let mut found = members.iter().filter(|member| member.name == who || Some(member.id) == by_id);
    let member = found.next().ok_or_else(|| {
        let names: Vec<_> = members.iter().map(|member| member.name.as_str()).collect();
        let why = format!("there is no server {who:?}; the servers are {}", names.join(", "));
        Status::new(StatusCode::NOT_FOUND, "NotFound", why)
    })?;
    if found.next().is_some() {
        return Err(Status::bad_request(format!("several servers are named {who:?}; give the id")));
    }
    if member.id == cluster.node.id() && members.len() > 1 {
        let why =
            format!("this is {} itself, which would not hear how it ended: remove it on another server", member.name);
        return Err(Status::new(StatusCode::CONFLICT, "Conflict", why));
    }
    cluster.remove(member.id).await?;
    Ok(list(cluster))
}
