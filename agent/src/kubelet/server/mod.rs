//! The node's HTTP service: what the API server asks for. Reached only over [`crate::NodeLink`].
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`query`] | query strings |
//! | [`logs`], [`log_file`] | `/containerLogs` |
//! | [`exec`], [`channel`] | `/exec`, `/attach` over WebSocket |
//! | [`port_forward`] | `/portForward`: which ports, which protocol |
//! | [`channel_forward`] | ports over the channels of a WebSocket |
//! | [`stream_forward`], [`spdy`] | ports over SPDY streams, as kubectl does |
//! | [`stats`] | `/stats/summary`, `/metrics`, `/metrics/resource` |

pub mod channel;
pub mod channel_forward;
pub mod exec;
pub mod log_file;
pub mod logs;
pub mod port_forward;
pub mod query;
pub mod spdy;
pub mod stats;
pub mod stream_forward;

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::containers;
use super::context::Context;
use super::worker::{Board, Published};
use crate::runtime::{ContainerFilter, ContainerState, ContainerStatus};
use query::Query;

/// Body of every answer.
pub type Body = BoxBody<Bytes, std::io::Error>;

/// A refusal: plain text, as the kubelet's.
#[derive(Debug)]
pub struct Refusal(pub StatusCode, pub String);

impl Refusal {
    fn not_found(text: impl Into<String>) -> Self {
        Self(StatusCode::NOT_FOUND, text.into())
    }

    fn bad_request(text: impl Into<String>) -> Self {
        Self(StatusCode::BAD_REQUEST, text.into())
    }
}

/// A whole answer.
pub fn answer(status: StatusCode, kind: &str, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(text.into()).map_err(|never| match never {}).boxed());
    *response.status_mut() = status;
    if let Ok(kind) = kind.parse() {
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    response
}

/// The service; clones are one.
#[derive(Clone)]
pub struct NodeService {
    context: Arc<Context>,
    board: Board,
}

impl NodeService {
    /// Answers about the pods on `board`.
    pub fn new(context: Arc<Context>, board: Board) -> Self {
        Self { context, board }
    }

    async fn respond(self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let query = Query::parse(request.uri().query().unwrap_or_default());
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let result = match parts.as_slice() {
            ["healthz"] => Ok(answer(StatusCode::OK, "text/plain; charset=utf-8", "ok")),
            ["pods"] => Ok(self.pods()),
            ["stats", "summary"] => stats::summary(&self.context, &self.board).await,
            ["metrics"] => Ok(stats::metrics(&self.board)),
            ["metrics", "resource"] => stats::resource_metrics(&self.context).await,
            ["containerLogs", namespace, pod, container] => self.logs(namespace, pod, container, &query).await,
            ["exec", namespace, pod, container] | ["exec", namespace, pod, _, container] => {
                self.exec(request, namespace, pod, container, &query, exec::Mode::Exec).await
            }
            ["attach", namespace, pod, container] | ["attach", namespace, pod, _, container] => {
                self.exec(request, namespace, pod, container, &query, exec::Mode::Attach).await
            }
            ["portForward", namespace, pod] | ["portForward", namespace, pod, _] => {
                self.port_forward(request, namespace, pod, &query).await
            }
            _ => Err(Refusal::not_found("404 page not found")),
        };
        result.unwrap_or_else(|Refusal(status, text)| answer(status, "text/plain; charset=utf-8", text))
    }

    fn pods(&self) -> Response<Body> {
        let board = self.board.read();
        let items: Vec<Pod> = board
            .values()
            .map(|published| Pod { status: Some((*published.status).clone()), ..(*published.pod).clone() })
            .collect();
        drop(board);
        let list = json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items});
        answer(StatusCode::OK, "application/json", list.to_string())
    }

    fn find(&self, namespace: &str, name: &str) -> Result<Published, Refusal> {
        let board = self.board.read();
        let found = board.values().filter(|published| {
            containers::namespace(&published.pod) == namespace && containers::name(&published.pod) == name
        });
        // While a pod of the same name comes and another goes, the younger one is meant.
        let youngest = found.max_by_key(|published| published.pod.metadata.creation_timestamp.clone());
        youngest.cloned().ok_or_else(|| Refusal::not_found(format!("pod {name:?} does not exist")))
    }

    /// The newest running container of this name.
    async fn running(&self, pod: &Pod, name: &str) -> Result<ContainerStatus, Refusal> {
        let selector = [
            (super::labels::POD_UID.to_owned(), containers::uid(pod).to_owned()),
            (super::labels::CONTAINER_NAME.to_owned(), name.to_owned()),
        ];
        let filter = ContainerFilter { label_selector: selector.into(), ..ContainerFilter::default() };
        let listed = self.context.runtime.list_containers(&filter).await;
        let mut listed = listed.map_err(|error| Refusal(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        listed.retain(|container| container.state == ContainerState::Running);
        listed
            .into_iter()
            .max_by_key(|container| container.created_at)
            .ok_or_else(|| Refusal::not_found(format!("container not found ({name:?})")))
    }

    async fn logs(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        query: &Query,
    ) -> Result<Response<Body>, Refusal> {
        let published = self.find(namespace, pod)?;
        if containers::find(&published.pod, container).is_none() {
            return Err(Refusal::not_found(format!("container {container:?} not found in pod {pod:?}")));
        }
        logs::answer(&self.context, &published, container, query).await
    }

    async fn exec(
        &self,
        request: Request<Incoming>,
        namespace: &str,
        pod: &str,
        container: &str,
        query: &Query,
        mode: exec::Mode,
    ) -> Result<Response<Body>, Refusal> {
        let published = self.find(namespace, pod)?;
        let found = containers::find(&published.pod, container)
            .ok_or_else(|| Refusal::not_found(format!("container {container:?} not found in pod {pod:?}")))?;
        let running = self.running(&published.pod, container).await?;
        let tty = found.container.tty == Some(true);
        exec::answer(self.context.runtime.clone(), request, running.id, query, mode, tty)
    }

    async fn port_forward(
        &self,
        request: Request<Incoming>,
        namespace: &str,
        pod: &str,
        query: &Query,
    ) -> Result<Response<Body>, Refusal> {
        let published = self.find(namespace, pod)?;
        port_forward::answer(self.context.clone(), request, &published.pod, query).await
    }
}

impl tower::Service<Request<Incoming>> for NodeService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut TaskContext<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move { Ok(service.respond(request).await) })
    }
}
