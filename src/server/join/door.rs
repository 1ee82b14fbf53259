//! `POST /coracle/v1/join/{agent,server}`: who shows a good token gets what it needs to be one of us.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::{Engine, engine::general_purpose::STANDARD};
use futures::future::FutureExt;
use http::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::agreement::Agreement;
use super::claims;
use super::credential::{Credential, Grade, refused};
use super::limiter::Limiter;
use crate::apiserver::body::Body;
use crate::apiserver::call::respond;
use crate::apiserver::protocols::Doorkeeper;
use crate::apiserver::status::Status;
use crate::auth::bootstrap_token::BootstrapTokens;
use crate::auth::certificates::{self, CertificateRequest, KUBELET_CLIENT};
use crate::auth::jwt;
use crate::auth::objects::Objects;
use crate::auth::pki::sign;
use crate::cli::settings::node_name;
use crate::server::cluster::{Cluster, Member};

/// The largest request, in bytes.
const MAX_REQUEST: usize = 64 * 1024;
/// Requests worked on at once.
const AT_ONCE: usize = 32;
/// Life of a node's certificate, and how far its beginning lies in the past: clocks of machines differ.
const LIFETIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);
const BACKDATE: Duration = Duration::from_secs(2 * 24 * 60 * 60);

/// What a server says about itself when it wants in.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerRequest {
    /// Who.
    #[serde(flatten)]
    pub member: Member,
    /// What it was told.
    pub settings: Agreement,
    /// Secret of the node of this name, when the server runs one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_secret: Option<String>,
}

/// What it gets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerAnswer {
    /// Opens `keys`; 64 hexadecimal digits.
    pub cluster_key: String,
    /// The sealed record of the cluster's keys, base64.
    pub keys: String,
    /// All servers, the new one included.
    pub members: Vec<Member>,
    /// What all servers share.
    pub settings: Agreement,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AgentRequest {
    node_name: String,
    node_secret: String,
    csr: String,
}

struct Door {
    cluster: Cluster,
    bootstrap: BootstrapTokens,
    limiter: Limiter,
    turns: Semaphore,
}

/// The handler of [`super::PREFIX`].
pub fn doorkeeper(cluster: Cluster) -> Doorkeeper {
    let bootstrap = BootstrapTokens::new(Objects::new(cluster.node.store().clone()));
    let turns = Semaphore::new(AT_ONCE);
    let door = Arc::new(Door { cluster, bootstrap, limiter: Limiter::default(), turns });
    Arc::new(move |request, _certificate, address| {
        let door = door.clone();
        async move { door.answer(request, address).await.unwrap_or_else(Status::into_response) }.boxed()
    })
}

impl Door {
    async fn answer(&self, request: Request<Body>, address: SocketAddr) -> Result<Response<Body>, Status> {
        let (parts, body) = request.into_parts();
        if let Some(seconds) = self.limiter.wait(address.ip(), Instant::now()) {
            return Err(Status::too_many_requests("too many wrong tokens from this address", seconds));
        }
        let _turn =
            self.turns.try_acquire().map_err(|_| Status::too_many_requests("too many machines join at once", 1))?;
        let grade = self.grade(&parts.headers);
        if grade.as_ref().is_err_and(|status| status.code() == 401) {
            self.limiter.failed(address.ip(), Instant::now());
        }
        let grade = grade?;
        if parts.method != Method::POST {
            return Err(Status::method_not_allowed());
        }
        let body = body.collect(MAX_REQUEST).await?;
        let answer = match parts.uri.path() {
            super::SERVER_PATH => {
                grade.admits_server()?;
                self.server(parse(&body)?).await?
            }
            super::AGENT_PATH => self.agent(parse(&body)?).await?,
            _ => return Err(Status::new(StatusCode::NOT_FOUND, "NotFound", "nobody joins here")),
        };
        Ok(respond(StatusCode::OK, "application/json", answer.to_string().into()))
    }

    fn grade(&self, headers: &http::HeaderMap) -> Result<Grade, Status> {
        let credential = Credential::of(headers).ok_or_else(|| refused("a token is needed to join".to_owned()))?;
        let keys = self.cluster.keyring.current();
        let keys = keys.map_err(|_| Status::unavailable("this server has not caught up with its cluster yet"))?;
        credential.grade(&keys, &self.bootstrap, jiff::Timestamp::now())
    }

    async fn server(&self, request: ServerRequest) -> Result<Value, Status> {
        let differences = self.cluster.agreement.differences(&request.settings);
        if !differences.is_empty() {
            let why = format!("all servers of a cluster need the same settings: {}", differences.join("; "));
            return Err(Status::new(StatusCode::CONFLICT, "Conflict", why));
        }
        let peer = request.member.peer().ok_or_else(|| Status::bad_request("id: expected 16 hexadecimal digits"))?;
        if peer.address.parse::<SocketAddr>().is_err() {
            return Err(Status::bad_request("address: expected IP:PORT"));
        }
        node_name(&peer.name).map_err(|why| Status::bad_request(format!("name: {why}")))?;
        if let Some(secret) = &request.node_secret {
            claims::claim(&self.cluster.node, &peer.name, secret).await?;
        }
        self.cluster.admit(peer.clone()).await?;
        let mut members = self.cluster.members();
        if !members.contains(&request.member) {
            members.retain(|member| member.id != request.member.id);
            members.push(request.member);
        }
        let answer = ServerAnswer {
            cluster_key: self.cluster.keyring.cluster_key.text().map_err(Status::internal)?,
            keys: STANDARD.encode(self.cluster.keyring.sealed().map_err(Status::internal)?),
            members,
            settings: Agreement::clone(&self.cluster.agreement),
        };
        serde_json::to_value(answer).map_err(Status::internal)
    }

    async fn agent(&self, request: AgentRequest) -> Result<Value, Status> {
        node_name(&request.node_name).map_err(|why| Status::bad_request(format!("nodeName: {why}")))?;
        let asked = CertificateRequest::from_pem(request.csr.as_bytes());
        let asked = asked.map_err(|error| Status::bad_request(format!("csr: {error}")))?;
        let usages = ["digital signature", "client auth"];
        certificates::check(KUBELET_CLIENT, &asked, &usages)
            .map_err(|error| Status::bad_request(format!("csr: {error}")))?;
        if asked.common_name != format!("system:node:{}", request.node_name) {
            return Err(Status::bad_request("csr: its common name is not system:node:<nodeName>"));
        }
        claims::claim(&self.cluster.node, &request.node_name, &request.node_secret).await?;
        let (keys, now) = (&self.cluster.keyring.keys, SystemTime::now());
        let certificate = sign::sign_between(&keys.client_ca, &asked, &usages, now - BACKDATE, now + LIFETIME);
        let certificate = certificate.map_err(Status::internal)?;
        tracing::info!(name = request.node_name, "an agent joins");
        let settings = &self.cluster.agreement;
        let servers: Vec<String> = self.cluster.members().into_iter().map(|member| member.address).collect();
        Ok(json!({
            "certificate": jwt::pem("CERTIFICATE", &certificate),
            "ca": keys.server_ca.certificate_pem(),
            "clusterCidrs": settings.cluster_cidr,
            "serviceCidrs": settings.service_cidr,
            "clusterDns": settings.cluster_dns,
            "flannelBackend": settings.flannel_backend,
            "clusterDomain": settings.cluster_domain,
            "servers": servers,
        }))
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Status> {
    serde_json::from_slice(body).map_err(|error| Status::bad_request(format!("the request does not parse: {error}")))
}
