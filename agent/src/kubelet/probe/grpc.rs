//! `grpc.health.v1.Health/Check` without a gRPC library: one HTTP/2 request with two tiny messages.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use super::check::Outcome;
use crate::kubelet::http_get::kernel_text;

const MAX_BODY: usize = 64 * 1024;
const UNIMPLEMENTED: &str = "12";

/// Asks for the health of `service` (empty: the server as a whole).
pub async fn check(address: SocketAddr, service: &str, timeout: Duration) -> Outcome {
    let seconds = timeout.as_secs();
    match tokio::time::timeout(timeout, ask(address, service)).await {
        Ok(outcome) => outcome,
        Err(_) => Outcome::Failure(format!("timeout: health rpc did not complete within {seconds}s")),
    }
}

async fn ask(address: SocketAddr, service: &str) -> Outcome {
    let connect = |text: String| Outcome::Failure(format!("error: failed to connect service at \"{address}\": {text}"));
    let failed = |text: String| Outcome::Failure(format!("error: health rpc probe failed: {text}"));
    let stream = match TcpStream::connect(address).await {
        Ok(stream) => stream,
        Err(error) => return connect(kernel_text(&error)),
    };
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = match handshake {
        Ok(parts) => parts,
        Err(error) => return connect(error.to_string()),
    };
    let connection = tokio::spawn(connection);
    let outcome = async {
        let request = Request::post(format!("http://{address}/grpc.health.v1.Health/Check"))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::USER_AGENT, "kube-probe/1.35")
            .header(header::TE, "trailers")
            .body(Full::new(Bytes::from(frame(service))));
        let request = match request {
            Ok(request) => request,
            Err(error) => return failed(error.to_string()),
        };
        let response = match sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return failed(error.to_string()),
        };
        let head = response.headers().clone();
        let body = match Limited::new(response.into_body(), MAX_BODY).collect().await {
            Ok(body) => body,
            Err(error) => return failed(error.to_string()),
        };
        let trailers = body.trailers().cloned().unwrap_or_default();
        let find = |name: &str| trailers.get(name).or_else(|| head.get(name)).and_then(|value| value.to_str().ok());
        let message = find("grpc-message").unwrap_or_default();
        match find("grpc-status") {
            Some("0") | None => verdict(&body.to_bytes()),
            Some(UNIMPLEMENTED) => Outcome::Failure(format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {message}"
            )),
            Some(code) => failed(format!("rpc error: code = {code} desc = {message}")),
        }
    };
    let outcome = outcome.await;
    connection.abort();
    outcome
}

/// `HealthCheckRequest { service = 1 }` in a gRPC frame.
fn frame(service: &str) -> Vec<u8> {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(0x0a);
        let mut length = service.len();
        while length >= 0x80 {
            message.push(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
            length >>= 7;
        }
        message.push(u8::try_from(length).unwrap_or(0));
        message.extend_from_slice(service.as_bytes());
    }
    let mut frame = vec![0];
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(0).to_be_bytes());
    frame.extend_from_slice(&message);
    frame
}

/// `HealthCheckResponse { status = 1 }`: 1 is SERVING.
fn verdict(body: &[u8]) -> Outcome {
    let message = body.get(5..).unwrap_or_default();
    let status = match message {
        [] => 0,
        [0x08, status, ..] => *status,
        _ => return Outcome::Failure("error: health rpc probe failed: malformed answer".to_owned()),
    };
    let name = match status {
        1 => return Outcome::Success,
        0 => "UNKNOWN",
        2 => "NOT_SERVING",
        3 => "SERVICE_UNKNOWN",
        _ => "UNRECOGNIZED",
    };
    Outcome::Failure(format!("service unhealthy (responded with {name:?})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_those_of_the_health_protocol() {
        assert_eq!(frame(""), [0, 0, 0, 0, 0]);
        assert_eq!(frame("ab"), [0, 0, 0, 0, 4, 0x0a, 2, b'a', b'b']);
        assert_eq!(verdict(&[0, 0, 0, 0, 2, 8, 1]), Outcome::Success);
        assert_eq!(
            verdict(&[0, 0, 0, 0, 2, 8, 2]),
            Outcome::Failure("service unhealthy (responded with \"NOT_SERVING\")".into())
        );
    }
}
