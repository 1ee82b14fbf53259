//! etcd on loopback, and as much of its gRPC as a put takes.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::member::resident;
use crate::{Result, load};

const CLIENT_PORT: u16 = 23_800;
/// Connections of the clients to the leader; more streams than this share them.
const CONNECTIONS: usize = 8;

/// Running members.
pub struct Cluster {
    members: Vec<Child>,
}

impl Cluster {
    pub fn start(binary: &Path, dir: &Path, count: usize) -> Result<Cluster> {
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let peer = |at: usize| url(CLIENT_PORT + 50 + at as u16);
        let all: Vec<String> = (0..count).map(|at| format!("m{at}={}", peer(at))).collect();
        let mut members = Vec::new();
        for at in 0..count {
            let client = url(CLIENT_PORT + at as u16);
            let child = Command::new(binary)
                .arg("--data-dir")
                .arg(dir.join(at.to_string()))
                .args(["--name", &format!("m{at}"), "--log-level", "error"])
                .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
                .args(["--listen-peer-urls", &peer(at), "--initial-advertise-peer-urls", &peer(at)])
                .args(["--initial-cluster", &all.join(",")])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            members.push(child);
        }
        Ok(Cluster { members })
    }

    pub fn resident(&self) -> Vec<u64> {
        self.members.iter().map(|member| resident(member.id())).collect()
    }

    pub async fn run(&self, kind: load::Kind, clients: usize, time: Duration) -> Result<load::Figures> {
        let port = self.leader().await?;
        let mut connections = Vec::new();
        for _ in 0..CONNECTIONS.min(clients) {
            connections.push(connect(port).await?);
        }
        let calls = move |client: usize, n: usize| {
            let mut connection = connections[client % connections.len()].clone();
            async move {
                let mut request = BytesMut::new();
                field(&mut request, 1, format!("/bench/{client}/{n}").as_bytes());
                let path = match kind {
                    load::Kind::Put => {
                        field(&mut request, 2, &[b'x'; 1024]);
                        "/etcdserverpb.KV/Put"
                    }
                    // Without `serializable` a range is linearizable.
                    load::Kind::Get => "/etcdserverpb.KV/Range",
                };
                call(&mut connection, path, &request).await?;
                Ok(())
            }
        };
        load::run(clients, time, calls).await
    }

    /// The client port of the member that leads.
    async fn leader(&self) -> Result<u16> {
        let patience = Instant::now() + Duration::from_secs(20);
        loop {
            for at in 0..self.members.len() as u16 {
                if let Ok(mut connection) = connect(CLIENT_PORT + at).await
                    && let Ok(status) = call(&mut connection, "/etcdserverpb.Maintenance/Status", &[]).await
                    && let (Some(Value::Bytes(header)), Some(Value::Number(leader))) =
                        (find(&status, 1), find(&status, 4))
                    && matches!(find(&header, 2), Some(Value::Number(own)) if own == leader && leader != 0)
                {
                    return Ok(CLIENT_PORT + at);
                }
            }
            if Instant::now() > patience {
                return Err("etcd has no leader".into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for member in &mut self.members {
            // It may have ended by itself, which shows elsewhere.
            let _ = member.kill();
            let _ = member.wait();
        }
    }
}

type Connection = SendRequest<Full<Bytes>>;

async fn connect(port: u16) -> Result<Connection> {
    let stream = TcpStream::connect(std::net::SocketAddr::from(([127, 0, 0, 1], port))).await?;
    stream.set_nodelay(true)?;
    let (requests, driver) = handshake(TokioExecutor::new(), TokioIo::new(stream)).await?;
    tokio::spawn(driver);
    Ok(requests)
}

async fn call(connection: &mut Connection, path: &str, message: &[u8]) -> Result<Bytes> {
    let mut body = BytesMut::new();
    body.put_u8(0);
    body.put_u32(message.len() as u32);
    body.put_slice(message);
    let request = Request::post(format!("http://etcd{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body.freeze()))?;
    connection.ready().await?;
    let answer = connection.send_request(request).await?.into_body().collect().await?;
    let status = answer.trailers().and_then(|trailers| trailers.get("grpc-status")).cloned();
    if status.is_some_and(|status| status != "0") {
        return Err(format!("{path}: {:?}", answer.trailers()).into());
    }
    let bytes = answer.to_bytes();
    if bytes.len() < 5 {
        return Err(format!("{path}: no answer").into());
    }
    Ok(bytes.slice(5..))
}

/// A field of bytes.
fn field(out: &mut BytesMut, number: u8, bytes: &[u8]) {
    out.put_u8(number << 3 | 2);
    let mut length = bytes.len();
    while length >= 0x80 {
        out.put_u8(length as u8 | 0x80);
        length >>= 7;
    }
    out.put_u8(length as u8);
    out.put_slice(bytes);
}

enum Value {
    Number(u64),
    Bytes(Bytes),
}

/// The first field with a number.
fn find(message: &Bytes, number: u64) -> Option<Value> {
    let mut at = 0;
    let varint = |at: &mut usize| {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let byte = *message.get(*at)?;
            *at += 1;
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            shift += 7;
            if byte < 0x80 {
                return Some(value);
            }
        }
    };
    while at < message.len() {
        let key = varint(&mut at)?;
        let value = match key & 7 {
            0 => Value::Number(varint(&mut at)?),
            2 => {
                let length = usize::try_from(varint(&mut at)?).ok()?;
                let end = at.checked_add(length).filter(|end| *end <= message.len())?;
                let bytes = message.slice(at..end);
                at = end;
                Value::Bytes(bytes)
            }
            _ => return None,
        };
        if key >> 3 == number {
            return Some(value);
        }
    }
    None
}
