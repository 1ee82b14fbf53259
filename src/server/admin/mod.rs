//! What the command line asks a running server: `/coracle/v1/...`, authenticated and authorized like everything else (the paths
//! are in no role, so that only `system:masters` may), served also without a leader.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`members`] | `members`: who is in the cluster, and removal |
//! | [`status`] | `status`: what is wrong and what to do |
//! | [`certificates`] | `certificates`: when they end, and new ones |

pub mod certificates;
pub mod members;
pub mod status;

use std::path::PathBuf;
use std::sync::Arc;

use futures::future::FutureExt;
use http::{Method, Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::cluster::Cluster;
use super::{Again, Settings, snapshots};
use crate::apiserver::ApiServer;
use crate::apiserver::body::Body;
use crate::apiserver::call::respond;
use crate::apiserver::status::Status;
use crate::auth::pki::{ServerLeaf, record};

/// What all paths begin with.
pub const PREFIX: &str = "/coracle/v1/";
/// The largest request, in bytes.
const MAX_REQUEST: usize = 64 * 1024;

/// What the paths work on. Cheap to clone.
#[derive(Clone)]
pub struct Admin {
    /// The cluster.
    pub cluster: Cluster,
    /// What the command line decided.
    pub settings: Settings,
    /// The listener's certificate.
    pub leaf: Arc<ServerLeaf>,
    /// Ends this run of the server.
    pub again: Arc<watch::Sender<Option<Again>>>,
}

/// What `snapshots` takes.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SnapshotRequest {
    /// What the file's name begins with.
    pub name: Option<String>,
    /// Another folder than the configured one.
    pub dir: Option<PathBuf>,
    /// How many to keep.
    pub keep: Option<usize>,
    /// The file to restore.
    pub file: Option<PathBuf>,
}

impl Admin {
    /// Serves the paths.
    pub fn attach(self, api: &ApiServer) {
        let admin = Arc::new(self);
        api.add_path(
            PREFIX,
            Arc::new(move |request| {
                let admin = admin.clone();
                async move { admin.answer(request).await.unwrap_or_else(Status::into_response) }.boxed()
            }),
        );
    }

    async fn answer(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().strip_prefix(PREFIX).unwrap_or_default().trim_end_matches('/');
        let parts_of_path: Vec<&str> = path.split('/').collect();
        match (&parts.method, &parts_of_path[..]) {
            (&Method::GET, ["members"]) => json(&members::list(&self.cluster)),
            (&Method::DELETE, ["members", who]) => json(&members::remove(&self.cluster, who).await?),
            (&Method::GET, ["status"]) => json(&status::look(self).await),
            (&Method::POST, ["tokens", "rotate"]) => self.rotate_tokens().await,
            (&Method::GET, ["certificates"]) => json(&certificates::list(self)),
            (&Method::POST, ["certificates", "rotate"]) => {
                certificates::rotate(self).map_err(Status::internal)?;
                json(&certificates::list(self))
            }
            (&Method::GET, ["snapshots"]) => {
                json(&snapshots::list(&self.settings.snapshots.dir).map_err(|e| Status::internal(format!("{e:#}")))?)
            }
            (&Method::POST, ["snapshots", what @ ("save" | "prune" | "restore")]) => {
                let request = parse(&body.collect(MAX_REQUEST).await?)?;
                self.snapshots(what, request).await
            }
            _ => Err(Status::new(StatusCode::NOT_FOUND, "NotFound", "there is no such path of the server's own")),
        }
    }

    async fn rotate_tokens(&self) -> Result<Response<Body>, Status> {
        let keyring = &self.cluster.keyring;
        let rotated = record::rotate_secrets(&self.cluster.node, &keyring.cluster_key).await;
        rotated.map_err(|error| Status::unavailable(super::explain(&error)))?;
        // The others follow the record; whoever asked finds the files here changed already.
        keyring.write_files().map_err(Status::internal)?;
        tracing::info!("the join tokens have new secrets");
        json(&serde_json::json!({}))
    }

    async fn snapshots(&self, what: &str, request: SnapshotRequest) -> Result<Response<Body>, Status> {
        let dir = request.dir.unwrap_or_else(|| self.settings.snapshots.dir.clone());
        let failed = |error: anyhow::Error| Status::internal(format!("{error:#}"));
        match what {
            "save" => {
                let name = request.name.as_deref().unwrap_or(snapshots::ON_DEMAND);
                json(&snapshots::save(&self.cluster, &dir, name).await.map_err(failed)?)
            }
            "prune" => {
                let keep = request.keep.unwrap_or(self.settings.snapshots.retention);
                let name = request.name.as_deref().unwrap_or(snapshots::SCHEDULED);
                json(&snapshots::prune(&dir, name, keep).map_err(failed)?)
            }
            _ => {
                let file = request.file.ok_or_else(|| Status::bad_request("file: which snapshot?"))?;
                std::fs::metadata(&file).map_err(|e| Status::bad_request(format!("{}: {e}", file.display())))?;
                tracing::warn!(file = %file.display(), "told to restore a snapshot");
                self.again.send_replace(Some(Again::Restore(file)));
                json(&serde_json::json!({}))
            }
        }
    }
}

fn json(value: &impl Serialize) -> Result<Response<Body>, Status> {
    let text = serde_json::to_string(value).map_err(Status::internal)?;
    Ok(respond(StatusCode::OK, "application/json", text.into()))
}

fn parse<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Status> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body).map_err(|error| Status::bad_request(format!("the request does not parse: {error}")))
}
