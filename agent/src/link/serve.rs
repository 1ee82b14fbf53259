//! The agent's end of a tunnel: after the handshake roles are reversed, the agent is the HTTP/2 server.

use std::convert::Infallible;
use std::future::Future;

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body;
use hyper::body::Incoming;
use hyper::ext::Protocol;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tower::Service;

use super::{BoxError, PING, WINDOW};

/// Requests at once on one tunnel.
const MAX_STREAMS: u32 = 1000;

/// Answers the server's requests until the connection ends. `service` sees upgrades as in HTTP/1.1.
///
/// # Errors
/// How the connection ended, unless cleanly.
pub async fn serve<S, B, I>(stream: I, service: S) -> Result<(), hyper::Error>
where
    I: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Future<Output = Result<Response<B>, Infallible>> + Send,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let service = hyper::service::service_fn(move |request: Request<Incoming>| {
        let mut service = service.clone();
        async move {
            let switches = request.method() == Method::CONNECT;
            let response = service.call(to_http1(request)).await?;
            Ok::<_, Infallible>(if switches { to_http2(response) } else { response })
        }
    });
    let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(WINDOW.0)
        .initial_connection_window_size(WINDOW.1);
    builder.serve_connection(TokioIo::new(stream), service).await
}

/// Extended CONNECT as the upgrade that it stands for.
fn to_http1(mut request: Request<Incoming>) -> Request<Incoming> {
    if request.method() != Method::CONNECT {
        return request;
    }
    let protocol = request.extensions().get::<Protocol>().and_then(|it| HeaderValue::from_bytes(it.as_ref()).ok());
    *request.method_mut() = Method::GET;
    if let Some(protocol) = protocol {
        let headers = request.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
    request
}

/// The answer to CONNECT: 200 where HTTP/1.1 has 101.
fn to_http2<B>(mut response: Response<B>) -> Response<B> {
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        *response.status_mut() = StatusCode::OK;
    } else if response.status() == StatusCode::OK {
        // The service has answered without switching; 200 would promise a stream.
        *response.status_mut() = StatusCode::BAD_REQUEST;
    }
    super::strip_connection_headers(response.headers_mut());
    response
}
