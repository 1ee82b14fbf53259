//! Ports over SPDY streams (`portforward.k8s.io`): every connection is a pair of streams of one request id, of which one
//! carries data and the other an error.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::spdy::{self, Stream};
use crate::runtime::Runtime;

const CHUNK: usize = 32 * 1024;
/// Halves of pairs that wait for the other one.
const MAX_HALVES: usize = 256;

/// The pod.
pub struct Target {
    /// Connects to its ports.
    pub runtime: Arc<dyn Runtime>,
    /// Id of its sandbox.
    pub sandbox: String,
    /// As errors name it.
    pub name: String,
    /// Its uid.
    pub uid: String,
}

/// Serves a client until it has gone; its connections end with it.
pub async fn forward<T>(io: T, target: Target)
where
    T: AsyncRead + AsyncWrite + Send + 'static,
{
    let target = Arc::new(target);
    let (sender, mut streams) = mpsc::channel(1);
    let mut connections = JoinSet::new();
    let accept = async {
        let mut halves: HashMap<String, Stream> = HashMap::new();
        while let Some(stream) = streams.recv().await {
            while connections.try_join_next().is_some() {}
            let Some((request, kind)) = identify(&stream) else {
                tracing::debug!("a stream without type or request id is of no use");
                continue;
            };
            match halves.remove(&request) {
                Some(other) if other.header("streamtype") != Some(kind.as_str()) => {
                    let (data, error) = if kind == "data" { (stream, other) } else { (other, stream) };
                    connections.spawn(connect(target.clone(), data, error));
                }
                _ if halves.len() >= MAX_HALVES => tracing::debug!("too many streams without their other half"),
                _ => drop(halves.insert(request, stream)),
            }
        }
    };
    tokio::select! {
        ended = spdy::serve(io, sender) => if let Err(error) = ended {
            tracing::debug!(%error, "port-forward connection ended");
        },
        () = accept => {}
    }
    connections.shutdown().await;
}

/// Request id and kind.
fn identify(stream: &Stream) -> Option<(String, String)> {
    let kind = stream.header("streamtype").filter(|kind| matches!(*kind, "data" | "error"))?;
    Some((stream.header("requestid")?.to_owned(), kind.to_owned()))
}

async fn connect(target: Arc<Target>, data: Stream, error: Stream) {
    let failed = match data.header("port").and_then(|port| port.parse::<u16>().ok()).filter(|port| *port > 0) {
        None => Some("the port must be between 1 and 65535".to_owned()),
        Some(port) => match target.runtime.port_forward(&target.sandbox, port).await {
            Ok(connection) => {
                copy(connection, data).await;
                None
            }
            Err(cause) => {
                let Target { name, uid, .. } = &*target;
                Some(format!("error forwarding port {port} to pod {name}, uid {uid}: {cause}"))
            }
        },
    };
    if let Some(text) = failed {
        let _ = error.output.send(text.as_bytes()).await;
    }
    error.output.finish().await;
}

/// Until the pod's side has ended, which says when all is said.
async fn copy(connection: TcpStream, data: Stream) {
    let (mut reader, mut writer) = connection.into_split();
    let Stream { mut input, output, .. } = data;
    let inward = async {
        while let Some(piece) = input.recv().await {
            if writer.write_all(&piece).await.is_err() {
                break;
            }
        }
        let _ = writer.shutdown().await;
        std::future::pending::<()>().await;
    };
    let outward = async {
        let mut buffer = vec![0; CHUNK];
        while let Ok(read @ 1..) = reader.read(&mut buffer).await {
            if output.send(&buffer[..read]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = inward => {}
        () = outward => {}
    }
    output.finish().await;
}
