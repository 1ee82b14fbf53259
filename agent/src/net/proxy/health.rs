//! `healthCheckNodePort`: tells load balancers whether this node has endpoints of a Service.
//!
//! Just enough HTTP for a probe: whatever is asked, the answer is the state, and the connection closes.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::model::Key;

/// Services with a health port: whose it is, and how many endpoints are on this node.
pub type Health = BTreeMap<u16, (Key, usize)>;

const ANSWER_WITHIN: Duration = Duration::from_secs(5);
const RETRY: Duration = Duration::from_secs(1);
const REQUEST: usize = 4096;

/// Keeps a listener for every port, until the sender is gone.
pub async fn serve(mut health: watch::Receiver<Health>) {
    let mut listeners: BTreeMap<u16, JoinHandle<()>> = BTreeMap::new();
    loop {
        let ports: Vec<u16> = health.borrow_and_update().keys().copied().collect();
        listeners.retain(|port, listener| {
            let wanted = ports.contains(port);
            if !wanted {
                listener.abort();
            }
            wanted
        });
        for port in ports {
            listeners.entry(port).or_insert_with(|| tokio::spawn(listen(port, health.clone())));
        }
        if health.changed().await.is_err() {
            listeners.into_values().for_each(|listener| listener.abort());
            return;
        }
    }
}

async fn listen(port: u16, health: watch::Receiver<Health>) {
    loop {
        match bind(port).await {
            Ok(listener) => {
                while let Ok((stream, _)) = listener.accept().await {
                    let state = health.borrow().get(&port).cloned();
                    tokio::spawn(tokio::time::timeout(ANSWER_WITHIN, answer(stream, state)));
                }
            }
            Err(error) => tracing::warn!(port, %error, "health check port is not available"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// All addresses of both families, or of IPv4 on a machine without IPv6.
async fn bind(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await
        }
        result => result,
    }
}

async fn answer(mut stream: TcpStream, state: Option<(Key, usize)>) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") && request.len() < REQUEST {
        if stream.read_buf(&mut request).await? == 0 {
            break;
        }
    }
    stream.write_all(response(state).as_bytes()).await?;
    stream.shutdown().await
}

/// Status, headers and body as upstream's health check server sends them.
fn response(state: Option<(Key, usize)>) -> String {
    let Some((key, count)) = state else {
        return "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned();
    };
    let status = if count == 0 { "503 Service Unavailable" } else { "200 OK" };
    let body = serde_json::json!({
        "service": { "namespace": key.namespace, "name": key.name },
        "localEndpoints": count,
        "serviceProxyHealthy": true,
    })
    .to_string();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {count}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
