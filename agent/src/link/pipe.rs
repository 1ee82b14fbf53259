//! The own agent of a server: in-memory streams inside one process.
//!
//! [`Pipe`] is the API server's end (clone it freely), [`NodeLinkListener`] the agent's. Each connection carries
//! HTTP/1.1 with upgrades, so exec, attach and port-forward work as they would over TCP.

use std::convert::Infallible;
use std::future::Future;

use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::{LinkBody, NodeLink, NodeLinkError};

/// Bytes in flight per direction and connection.
const PIPE_BYTES: usize = 64 * 1024;
/// Connections that wait to be accepted before [`Pipe::connect`] waits too.
const BACKLOG: usize = 16;

/// Makes both ends.
#[must_use]
pub fn node_link() -> (NodeLink, NodeLinkListener) {
    let (sender, receiver) = mpsc::channel(BACKLOG);
    (NodeLink::Pipe(Pipe { sender }), NodeLinkListener { receiver })
}

/// The end that calls.
#[derive(Debug, Clone)]
pub struct Pipe {
    sender: mpsc::Sender<DuplexStream>,
}

impl Pipe {
    /// A raw connection to the node's HTTP service.
    ///
    /// # Errors
    /// [`NodeLinkError::Closed`] when no agent listens.
    pub async fn connect(&self) -> Result<DuplexStream, NodeLinkError> {
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        self.sender.send(theirs).await.map_err(|_| NodeLinkError::Closed)?;
        Ok(ours)
    }

    /// Sends one request on a connection of its own, which lives until both bodies or the upgraded stream are dropped.
    pub(super) async fn send(&self, request: Request<LinkBody>) -> Result<Response<Incoming>, NodeLinkError> {
        let stream = self.connect().await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(NodeLinkError::Http)?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "node link connection ended");
            }
        });
        sender.send_request(request).await.map_err(NodeLinkError::Http)
    }
}

/// The end that answers.
#[derive(Debug)]
pub struct NodeLinkListener {
    receiver: mpsc::Receiver<DuplexStream>,
}

impl NodeLinkListener {
    /// The next connection, or `None` once every [`Pipe`] is gone.
    pub async fn accept(&mut self) -> Option<DuplexStream> {
        self.receiver.recv().await
    }

    /// Serves `service` on every connection until `shutdown`; open connections end with their streams.
    pub async fn serve<S, B>(mut self, service: S, shutdown: CancellationToken)
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
        S::Future: Future<Output = Result<Response<B>, Infallible>> + Send,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        loop {
            let stream = tokio::select! {
                stream = self.accept() => match stream { Some(stream) => stream, None => return },
                () = shutdown.cancelled() => return,
            };
            let service = hyper_util::service::TowerToHyperService::new(service.clone());
            let shutdown = shutdown.clone();
            tokio::spawn(async move {
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades();
                tokio::select! {
                    result = connection => if let Err(error) = result {
                        tracing::debug!(%error, "node link connection ended");
                    },
                    () = shutdown.cancelled() => {}
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Empty, Full};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_request_crosses_the_link_and_may_upgrade() {
        let (link, listener) = node_link();
        let shutdown = CancellationToken::new();
        let service = tower::service_fn(|mut request: Request<Incoming>| async move {
            if request.uri().path() != "/exec" {
                return Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("ok"))));
            }
            tokio::spawn(async move {
                let mut stream = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                let mut byte = [0; 1];
                stream.read_exact(&mut byte).await.unwrap();
                stream.write_all(&[byte[0] + 1]).await.unwrap();
            });
            let mut response = Response::new(Full::new(Bytes::new()));
            *response.status_mut() = http::StatusCode::SWITCHING_PROTOCOLS;
            response.headers_mut().insert("connection", "upgrade".parse().unwrap());
            response.headers_mut().insert("upgrade", "test".parse().unwrap());
            Ok(response)
        });
        let server = tokio::spawn(listener.serve(service, shutdown.clone()));

        let plain = link.send(Request::get("http://node/healthz").body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
        assert_eq!(plain.into_body().collect().await.unwrap().to_bytes(), "ok");

        let request = Request::get("http://node/exec")
            .header("connection", "upgrade")
            .header("upgrade", "test")
            .body(Empty::<Bytes>::new())
            .unwrap();
        let mut response = link.send(request).await.unwrap();
        assert_eq!(response.status(), 101);
        let mut stream = TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap());
        stream.write_all(&[41]).await.unwrap();
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte[0], 42);

        shutdown.cancel();
        server.await.unwrap();
        let late = link.send(Request::get("http://node/healthz").body(Empty::<Bytes>::new()).unwrap()).await;
        assert!(matches!(late, Err(NodeLinkError::Closed)));
    }
}
