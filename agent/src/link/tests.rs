use super::*;
use http::StatusCode;
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

type Answer = Response<http_body_util::combinators::BoxBody<Bytes, Infallible>>;

/// Adds one to every byte that comes after an upgrade, says `ok` otherwise, and refuses `/refused`.
async fn answer(mut request: Request<Incoming>) -> Result<Answer, Infallible> {
    let text = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from(text)).boxed());
        *response.status_mut() = status;
        response
    };
    if request.uri().path() == "/refused" {
        return Ok(text(StatusCode::NOT_FOUND, "no such pod"));
    }
    let Some(protocol) = wanted_protocol(request.headers()) else {
        return Ok(text(StatusCode::OK, "ok"));
    };
    tokio::spawn(async move {
        let mut stream = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
        let mut byte = [0; 1];
        while stream.read_exact(&mut byte).await.is_ok() {
            stream.write_all(&[byte[0] + 1]).await.unwrap();
        }
    });
    let mut response = Response::new(Empty::new().boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(header::CONNECTION, "Upgrade".parse().unwrap());
    response.headers_mut().insert(header::UPGRADE, protocol.parse().unwrap());
    response.headers_mut().insert("x-kept", "yes".parse().unwrap());
    Ok(response)
}

async fn tunnel() -> NodeLink {
    let (server, agent) = tokio::io::duplex(64 * 1024);
    tokio::spawn(serve::serve(agent, tower::service_fn(answer)));
    let (tunnel, connection) = Tunnel::over(server).await.unwrap();
    tokio::spawn(connection);
    NodeLink::Tunnel(tunnel)
}

fn request(path: &str, upgrade: bool) -> Request<Empty<Bytes>> {
    let mut request = Request::get(path).body(Empty::new()).unwrap();
    if upgrade {
        request.headers_mut().insert(header::CONNECTION, "keep-alive, Upgrade".parse().unwrap());
        request.headers_mut().insert(header::UPGRADE, "SPDY/3.1".parse().unwrap());
        // As kubectl's POST has it.
        request.headers_mut().insert(header::CONTENT_LENGTH, "0".parse().unwrap());
    }
    request
}

#[tokio::test]
async fn requests_cross_a_tunnel_as_they_cross_a_pipe() {
    let link = tunnel().await;
    let response = link.send(request("/containerLogs/a/b/c?follow=true", false)).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "ok");
}

#[tokio::test]
async fn many_streams_that_switched_protocols_share_one_tunnel() {
    let link = tunnel().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut response = link.send(request("/exec", true)).await.unwrap();
        assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(response.headers()["upgrade"], "SPDY/3.1");
        assert_eq!(response.headers()["x-kept"], "yes");
        streams.push(TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap()));
    }
    for (stream, number) in streams.iter_mut().zip(1..) {
        stream.write_all(&[number]).await.unwrap();
    }
    for (stream, number) in streams.iter_mut().zip(1..) {
        let mut byte = [0; 1];
        stream.read_exact(&mut byte).await.unwrap();
        assert_eq!(byte[0], number + 1);
    }
}

#[tokio::test]
async fn a_refusal_to_switch_keeps_its_code_and_text() {
    let link = tunnel().await;
    let response = link.send(request("/refused", true)).await.unwrap();
    assert_eq!(response.status(), StatusCode::NOT_FOUND);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "no such pod");
}

#[tokio::test]
async fn a_tunnel_whose_agent_has_gone_refuses() {
    let (server, agent) = tokio::io::duplex(1024);
    let (tunnel, connection) = Tunnel::over(server).await.unwrap();
    let connection = tokio::spawn(connection);
    drop(agent);
    let _ = connection.await.unwrap();
    assert!(NodeLink::Tunnel(tunnel).send(request("/", false)).await.is_err());
}
