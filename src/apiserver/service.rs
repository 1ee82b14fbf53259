//! [`ApiServer`]: the whole API as one `tower::Service`, the same for callers over TLS and in this process.

use super::body::Body;
use super::status::Status;
use crate::auth::Identity;
use futures::future::BoxFuture;
use http::{Request, Response};
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};
use tower::Service;

/// The API service. Cheap to clone; every request needs an [`Identity`] extension or is answered with 401.
#[derive(Clone)]
pub struct ApiServer {
    inner: Arc<Inner>,
}

struct Inner {}

impl ApiServer {
    async fn handle(self, request: Request<Body>) -> Response<Body> {
        let _ = &self.inner;
        match request.extensions().get::<Identity>() {
            None => Status::unauthorized().into_response(),
            Some(_) => Status::no_such_resource().into_response(),
        }
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
        Box::pin(async move { Ok(server.handle(request).await) })
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
