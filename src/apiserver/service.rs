//! [`ApiServer`]: the whole API as one `tower::Service`, the same for callers over TLS and in this process.
//!
//! A request passes limits, the request grammar, authorization and then its verb.

use super::backend::Backend;
use super::body::Body;
use super::call::{Call, add_warnings, respond};
use super::deadline::within;
use super::health::{self, Health};
use super::limits::Limits;
use super::links::NodeLinks;
use super::query::{self, Query};
use super::registry::{Registry, Snapshot};
use super::request::RequestInfo;
use super::resources::Resource;
use super::reviews::{self, Reviews};
use super::status::Status;
use super::subresource::{self, connect};
use super::{deadline, delete, discovery, openapi, patch, read, watch, write};
use crate::admission::Admission;
use crate::auth::{Authorizer, Identity};
use crate::strategy::service::allocation::ServiceNetwork;
use futures::future::BoxFuture;
use http::{Method, Request, Response, StatusCode};
use parking_lot::{Mutex, RwLock};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tower::Service;

/// A lease takes new keys for so long; then another is made. Their keys live up to this much longer than asked.
const LEASE_REUSE: Duration = Duration::from_secs(60);

/// What an [`ApiServer`] is made of.
pub struct Parts {
    pub backend: Backend,
    pub authorizer: Authorizer,
    pub admission: Admission,
    /// `host:port` that discovery names.
    pub address: String,
    /// Where Service addresses and node ports come from.
    pub services: ServiceNetwork,
    /// Ends watches.
    pub shutdown: CancellationToken,
}

/// The API service. Cheap to clone; every request needs an [`Identity`] extension or is answered with 401.
#[derive(Clone)]
pub struct ApiServer {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    registry: Registry,
    health: Health,
    limits: Limits,
    /// The lease that expiring objects are bound to at present, its time to live, and when it was made.
    lease: Mutex<Option<(u64, u64, Instant)>>,
    reviews: OnceLock<Arc<dyn Reviews>>,
    links: NodeLinks,
    /// Why nothing but health and the server's own paths is served, while that is so.
    closed: RwLock<Option<String>>,
    is_closed: AtomicBool,
    paths: RwLock<Vec<(String, PathHandler)>>,
}

/// Answers a path outside of the resources.
pub type PathHandler = Arc<dyn Fn(Request<Body>) -> BoxFuture<'static, Response<Body>> + Send + Sync>;

impl ApiServer {
    /// A service over its parts.
    pub fn new(parts: Parts) -> ApiServer {
        ApiServer {
            inner: Arc::new(Inner {
                parts,
                registry: Registry::default(),
                health: Health::default(),
                limits: Limits::default(),
                lease: Mutex::new(None),
                reviews: OnceLock::new(),
                links: NodeLinks::default(),
                closed: RwLock::default(),
                is_closed: AtomicBool::new(false),
                paths: RwLock::default(),
            }),
        }
    }

    /// Store and log.
    pub fn backend(&self) -> &Backend {
        &self.inner.parts.backend
    }

    /// Where Service addresses and node ports come from.
    pub fn service_network(&self) -> &ServiceNetwork {
        &self.inner.parts.services
    }

    /// The admission chain.
    pub fn admission(&self) -> &Admission {
        &self.inner.parts.admission
    }

    /// The authorizer.
    pub fn authorizer(&self) -> &Authorizer {
        &self.inner.parts.authorizer
    }

    /// The kinds served.
    pub fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    /// The health checks; whoever starts the server adds to them.
    pub fn health(&self) -> &Health {
        &self.inner.health
    }

    /// Says who answers reviews and token requests; only the first call counts.
    pub fn set_reviews(&self, reviews: Arc<dyn Reviews>) {
        // A second one would mean two starts of the same server.
        let _ = self.inner.reviews.set(reviews);
    }

    /// Who answers reviews and token requests.
    ///
    /// # Errors
    /// 503 while the server starts.
    pub fn reviews(&self) -> Result<&Arc<dyn Reviews>, Status> {
        self.inner.reviews.get().ok_or_else(|| Status::unavailable("the server is starting"))
    }

    /// Refuses requests to the API with 503 until [`ApiServer::open`]: what this server's store holds may be older than anybody
    /// remembers, or nothing at all.
    pub fn close(&self, why: &str) {
        *self.inner.closed.write() = Some(why.to_owned());
        self.inner.is_closed.store(true, Ordering::Release);
    }

    /// Serves the API.
    pub fn open(&self) {
        self.inner.is_closed.store(false, Ordering::Release);
    }

    /// The ways to the nodes.
    pub fn links(&self) -> &NodeLinks {
        &self.inner.links
    }

    /// Serves a path (and, when it ends in a slash, everything below), e.g. `/metrics` or `/openapi/`. Authorization has
    /// passed when `handler` is called.
    pub fn add_path(&self, path: &str, handler: PathHandler) {
        self.inner.paths.write().push((path.to_owned(), handler));
    }

    fn path_handler(&self, path: &str) -> Option<PathHandler> {
        let paths = self.inner.paths.read();
        let found = paths.iter().find(|(served, _)| {
            path == served
                || path == served.trim_end_matches('/')
                || (served.ends_with('/') && path.starts_with(served))
        });
        found.map(|(_, handler)| handler.clone())
    }

    /// Ends watches when cancelled.
    pub fn shutdown(&self) -> CancellationToken {
        self.inner.parts.shutdown.clone()
    }

    /// The lease for objects of a kind that expires; 0 for all others.
    ///
    /// # Errors
    /// 503 when the lease cannot be made.
    pub async fn lease_for(&self, resource: &Resource) -> Result<u64, Status> {
        let ttl = resource.ttl_seconds;
        if ttl == 0 {
            return Ok(0);
        }
        let now = Instant::now();
        if let Some((id, of, since)) = *self.inner.lease.lock()
            && of == ttl
            && now.duration_since(since) < LEASE_REUSE
        {
            return Ok(id);
        }
        let id = rand::random::<u64>() >> 1 | 1;
        self.backend().grant_lease(id, ttl + LEASE_REUSE.as_secs()).await?;
        *self.inner.lease.lock() = Some((id, ttl, now));
        Ok(id)
    }

    async fn handle(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        let (mut parts, body) = request.into_parts();
        let upgrade = parts.extensions.remove::<hyper::upgrade::OnUpgrade>();
        let identity = parts.extensions.get::<Identity>().ok_or_else(Status::unauthorized)?;
        let query = Query::parse(parts.uri.query());
        let Some(path) = query::decode(parts.uri.path(), false) else {
            return Err(Status::bad_request("the path does not decode"));
        };
        let info = RequestInfo::new(&parts.method, &path, &query).map_err(Status::bad_request)?;
        // While closed there may be no policy yet; health is everybody's to know.
        if self.inner.is_closed.load(Ordering::Acquire)
            && let Some(response) = self.inner.health.answer(info.path, &query)
        {
            return Ok(response);
        }
        let decision = self.authorizer().authorize(identity, &info.attributes());
        if !decision.allowed {
            let message = info.attributes().forbidden_message(identity.user(), &decision.reason);
            return Err(Status::forbidden_message(info.group, info.resource, &info.name, message));
        }
        if !info.is_resource {
            if let Some(handler) = self.path_handler(info.path) {
                return Ok(handler(Request::from_parts(parts.clone(), body)).await);
            }
            return self.non_resource(&parts.method, &info, &query, &parts.headers).await;
        }
        if self.inner.is_closed.load(Ordering::Acquire) {
            let why = self.inner.closed.read().clone().unwrap_or_default();
            return Err(Status::unavailable(why));
        }
        let snapshot = self.inner.registry.snapshot();
        let Some(resource) = snapshot.find(info.group, info.version, info.resource) else {
            return not_served(&snapshot, info.group);
        };
        let subresource = match info.subresource {
            "" => None,
            name => match resource.subresource(name) {
                Some(subresource) => Some(subresource),
                None => return not_served(&snapshot, info.group),
            },
        };
        if !resource.is_namespaced() && !info.namespace.is_empty() && info.resource != "namespaces" {
            return Ok(page_not_found());
        }
        let call = Call {
            server: self,
            identity,
            info: &info,
            query: &query,
            headers: &parts.headers,
            resource,
            subresource,
            warnings: Mutex::new(Vec::new()),
        };
        let connects = subresource.is_some_and(|s| subresource::connects(s.does));
        let _turn = match info.verb {
            "watch" => None,
            _ if connects => None,
            _ => Some(self.inner.limits.enter(identity, info.is_read_only()).await?),
        };
        let answer = if connects {
            let (method, headers) = (parts.method.clone(), parts.headers.clone());
            connect_verb(&call, connect::Incoming { method, headers, upgrade, body }).await
        } else {
            let limit = deadline::of(&query)?;
            if info.verb == "watch" { dispatch(&call, body).await } else { within(limit, dispatch(&call, body)).await }
        };
        let warnings = call.warnings.into_inner();
        let mut response = match answer {
            Ok(response) => response,
            Err(status) => status.into_response(),
        };
        add_warnings(&mut response, &warnings);
        Ok(response)
    }

    async fn non_resource(
        &self,
        method: &Method,
        info: &RequestInfo<'_>,
        query: &Query<'_>,
        headers: &http::HeaderMap,
    ) -> Result<Response<Body>, Status> {
        if !matches!(*method, Method::GET | Method::HEAD) {
            return Err(Status::method_not_allowed());
        }
        if let Some(response) = self.inner.health.answer(info.path, query) {
            return Ok(response);
        }
        if info.path.trim_end_matches('/') == "/version" {
            return Ok(health::version());
        }
        let snapshot = self.inner.registry.snapshot();
        if let Some(answer) = openapi::answer(&snapshot, info.path, query, headers).await {
            return answer;
        }
        discovery::answer(&snapshot, info.path, headers, &self.inner.parts.address)
            .unwrap_or_else(|| Ok(page_not_found()))
    }
}

/// What a path below a group answers when nobody serves it.
fn not_served(snapshot: &Snapshot, group: &str) -> Result<Response<Body>, Status> {
    match snapshot.find_group(group) {
        Some(_) => Err(Status::no_such_resource()),
        None => Ok(page_not_found()),
    }
}

/// What a path that nobody serves answers, as Go's mux does.
fn page_not_found() -> Response<Body> {
    respond(StatusCode::NOT_FOUND, "text/plain; charset=utf-8", "404 page not found\n".to_owned().into())
}

async fn connect_verb(call: &Call<'_>, incoming: connect::Incoming) -> Result<Response<Body>, Status> {
    let verbs = call.subresource.map(|s| s.verbs).unwrap_or_default();
    if !verbs.contains_name(call.info.verb) {
        return Err(Status::method_not_allowed());
    }
    connect::connect(call, incoming).await
}

async fn dispatch(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let verb = call.info.verb;
    let verbs = call.subresource.map_or(call.resource.verbs, |s| s.verbs);
    if !verbs.contains_name(verb) {
        return Err(Status::method_not_allowed());
    }
    let spans_namespaces = call.resource.is_namespaced() && call.info.namespace.is_empty();
    if spans_namespaces && !matches!(verb, "list" | "watch" | "deletecollection") {
        return Err(if verb == "create" { Status::method_not_allowed() } else { Status::no_such_resource() });
    }
    if call.info.name.is_empty() && matches!(verb, "update" | "patch") {
        return Err(Status::method_not_allowed());
    }
    if let Some(what) = call.resource.answers {
        return match verb {
            "create" => reviews::create(call, what, body).await,
            _ => reviews::component_status(call),
        };
    }
    match (verb, call.subresource) {
        ("get", None) => read::get(call).await,
        ("list", None) => read::list(call).await,
        ("watch", None) => watch::watch(call).await,
        ("create", None) => write::create(call, body).await,
        ("update", None) => write::update(call, body).await,
        ("patch", None) => patch::patch(call, body).await,
        ("delete", None) => delete::delete(call, body).await,
        ("deletecollection", None) => delete::delete_collection(call, body).await,
        (_, Some(_)) => subresource::dispatch(call, body).await,
        _ => Err(Status::method_not_allowed()),
    }
}

impl Service<Request<Body>> for ApiServer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let server = self.clone();
        Box::pin(async move { Ok(server.handle(request).await.unwrap_or_else(Status::into_response)) })
    }
}

/// A client of this API for a task of this process, under its own identity: no socket, no serialization of HTTP.
pub fn client(server: &ApiServer, identity: Identity) -> kube::Client {
    let server = server.clone();
    let service = tower::service_fn(move |request: Request<kube::client::Body>| {
        let (parts, body) = request.into_parts();
        let mut request = Request::from_parts(parts, Body::new(body));
        request.extensions_mut().insert(identity.clone());
        server.clone().call(request)
    });
    kube::Client::new(service, "default")
}
