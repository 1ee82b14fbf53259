//! `/portForward`: which pod, and in which of three ways.
//!
//! | the client asks for | it gets |
//! | --- | --- |
//! | `Upgrade: SPDY/3.1` with `portforward.k8s.io` | SPDY streams: kubectl up to 1.30 |
//! | WebSocket with `SPDY/3.1+portforward.k8s.io` | SPDY streams in the messages of a WebSocket: kubectl from 1.31 on |
//! | WebSocket with `v4.channel.k8s.io` | channels, the ports in the query |

use std::sync::Arc;

use futures::{SinkExt, StreamExt};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_tungstenite::tungstenite::protocol::Message;

use super::channel::{self, Socket};
use super::query::Query;
use super::stream_forward::Target;
use super::{Body, Refusal, channel_forward, stream_forward};
use crate::kubelet::containers;
use crate::kubelet::context::Context;
use crate::runtime::{PodSandboxFilter, PodSandboxState};
use crate::websocket;

/// The protocol on SPDY streams.
const STREAMS: &str = "portforward.k8s.io";
/// The same in a WebSocket.
const TUNNELLED: &str = "SPDY/3.1+portforward.k8s.io";
const SPDY: &str = "SPDY/3.1";
const PROTOCOL_VERSION: &str = "x-stream-protocol-version";
/// Bytes between the WebSocket and SPDY, per direction.
const PIPE: usize = 64 * 1024;
const CHUNK: usize = 32 * 1024;

/// Switches protocols and connects to the pod's ports.
///
/// # Errors
/// When the pod has no sandbox, or the client speaks something else.
pub async fn answer(
    context: Arc<Context>,
    request: Request<Incoming>,
    pod: &Pod,
    query: &Query,
) -> Result<Response<Body>, Refusal> {
    let sandbox = sandbox(&context, pod).await?;
    let name = format!("{}_{}", containers::name(pod), containers::namespace(pod));
    let target = Target { runtime: context.runtime.clone(), sandbox, name, uid: containers::uid(pod).to_owned() };
    let says_spdy =
        request.headers().get(header::UPGRADE).is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(SPDY.as_bytes()));
    if says_spdy {
        return streams(request, target);
    }
    if websocket::offers(request.headers()).contains(&TUNNELLED) {
        let (response, socket) = channel::accept(request, Some(TUNNELLED))?;
        tokio::spawn(async move {
            match socket.await {
                Ok(socket) => tunnel(socket, target).await,
                Err(error) => tracing::debug!(%error, "port-forward connection not upgraded"),
            }
        });
        return Ok(response);
    }
    channels(context, request, query, target)
}

async fn sandbox(context: &Context, pod: &Pod) -> Result<String, Refusal> {
    let filter = PodSandboxFilter {
        pod_uid: Some(containers::uid(pod).to_owned()),
        state: Some(PodSandboxState::Ready),
        ..PodSandboxFilter::default()
    };
    let sandboxes = context.runtime.list_pod_sandboxes(&filter).await.unwrap_or_default();
    let sandbox = sandboxes.into_iter().max_by_key(|sandbox| sandbox.metadata.attempt);
    let gone = || Refusal::not_found(format!("pod not found ({:?})", containers::uid(pod)));
    sandbox.map(|sandbox| sandbox.id).ok_or_else(gone)
}

/// SPDY on the bare connection.
fn streams(mut request: Request<Incoming>, target: Target) -> Result<Response<Body>, Refusal> {
    let versions = request.headers().get_all(PROTOCOL_VERSION).iter().filter_map(|value| value.to_str().ok());
    if !versions.flat_map(|value| value.split(',')).any(|version| version.trim() == STREAMS) {
        let text = format!("unable to upgrade: unable to negotiate protocol; the server accepts [{STREAMS}]");
        return Err(Refusal(StatusCode::FORBIDDEN, text));
    }
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgraded.await {
            Ok(upgraded) => stream_forward::forward(TokioIo::new(upgraded), target).await,
            Err(error) => tracing::debug!(%error, "port-forward connection not upgraded"),
        }
    });
    let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static(SPDY));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(PROTOCOL_VERSION, HeaderValue::from_static(STREAMS));
    Ok(response)
}

/// Unpacks SPDY from binary messages and packs it into such.
async fn tunnel(socket: Socket, target: Target) {
    let (ours, theirs) = tokio::io::duplex(PIPE);
    let work = async {
        stream_forward::forward(theirs, target).await;
    };
    tokio::join!(work, carry(socket, ours));
}

async fn carry(socket: Socket, pipe: DuplexStream) {
    let (mut sink, mut source) = socket.split();
    let (mut reader, mut writer) = tokio::io::split(pipe);
    let inward = async {
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Binary(bytes) if writer.write_all(&bytes).await.is_err() => return,
                Message::Close(_) => return,
                _ => {}
            }
        }
    };
    let outward = async {
        let mut buffer = vec![0; CHUNK];
        while let Ok(read @ 1..) = reader.read(&mut buffer).await {
            if sink.send(Message::Binary(buffer[..read].to_vec().into())).await.is_err() {
                return;
            }
        }
        let _ = sink.send(websocket::goodbye()).await;
    };
    // Either end gone: dropping the pipe ends the other.
    tokio::select! {
        () = inward => {}
        () = outward => {}
    }
}

/// Channels of a WebSocket, one pair per port of the query.
fn channels(
    context: Arc<Context>,
    request: Request<Incoming>,
    query: &Query,
    target: Target,
) -> Result<Response<Body>, Refusal> {
    let named = query.all("ports").chain(query.all("port")).flat_map(|text| text.split(','));
    let ports: Result<Vec<u16>, _> = named.map(str::parse).collect();
    let ports = ports.map_err(|_| Refusal::bad_request("port must be between 1 and 65535"))?;
    if ports.is_empty() || ports.len() > 60 || ports.contains(&0) {
        return Err(Refusal::bad_request("query parameter \"port\" is required"));
    }
    let (response, protocol, socket) = channel::upgrade(request)?;
    tokio::spawn(async move {
        if let Ok(socket) = socket.await {
            channel_forward::forward(&context, socket, protocol, &target.sandbox, &ports).await;
        }
    });
    Ok(response)
}
