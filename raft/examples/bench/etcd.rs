//! etcd on loopback, and as much of its gRPC as puts, gets and watches take.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Incoming;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;

use crate::member::resident;
use crate::{Result, load};

const CLIENT_PORT: u16 = 23_800;
/// Connections of the clients to the leader; more streams than this share them.
const CONNECTIONS: usize = 8;
/// Linearizable unless its field `serializable` is set.
const RANGE: &str = "/etcdserverpb.KV/Range";

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
                    load::Kind::Get => RANGE,
                    load::Kind::Read => {
                        number(&mut request, 7, 1);
                        RANGE
                    }
                };
                call(&mut connection, path, &request).await?;
                Ok(())
            }
        };
        load::run(clients, time, calls).await
    }

    /// Watchers share one stream a connection, as etcd's own client has it.
    pub async fn fan_out(&self, watchers: usize, puts: usize) -> Result<load::Figures> {
        let port = self.leader().await?;
        let (sender, seen) = tokio::sync::mpsc::unbounded_channel();
        for at in 0..CONNECTIONS {
            let watchers = (watchers + at) / CONNECTIONS;
            let mut create = BytesMut::new();
            field(&mut create, 1, b"/fan/");
            field(&mut create, 2, b"/fan0");
            let mut request = BytesMut::new();
            field(&mut request, 1, &create);
            let mut body = BytesMut::new();
            (0..watchers).for_each(|_| frame(&mut body, &request));
            let mut connection = connect(port).await?;
            connection.ready().await?;
            let answer = connection.send_request(request_to("/etcdserverpb.Watch/Watch", body.freeze())?).await?;
            let mut stream = Frames { body: answer.into_body(), bytes: BytesMut::new() };
            for _ in 0..watchers {
                let created = stream.next().await?;
                if !matches!(find(&created, 3), Some(Value::Number(1))) {
                    return Err("a watch was not created".into());
                }
            }
            let sender = sender.clone();
            tokio::spawn(async move {
                let _connection = connection;
                while let Ok(message) = stream.next().await {
                    let events = Fields(message, 0).filter_map(|(number, value)| match value {
                        Value::Bytes(event) if number == 11 => Some(event),
                        _ => None,
                    });
                    for event in events {
                        let Some(Value::Bytes(pair)) = find(&event, 2) else { continue };
                        let Some(Value::Bytes(key)) = find(&pair, 1) else { continue };
                        let number = key.strip_prefix(b"/fan/").and_then(|n| std::str::from_utf8(n).ok()?.parse().ok());
                        if sender.send((number.unwrap_or(usize::MAX), Instant::now())).is_err() {
                            return;
                        }
                    }
                }
            });
        }
        drop(sender);
        let connection = connect(port).await?;
        let put = |n: usize| {
            let mut connection = connection.clone();
            async move {
                let mut request = BytesMut::new();
                field(&mut request, 1, format!("/fan/{n}").as_bytes());
                field(&mut request, 2, &[b'x'; 1024]);
                call(&mut connection, "/etcdserverpb.KV/Put", &request).await?;
                Ok(())
            }
        };
        load::fan_out(watchers, puts, put, seen).await
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
    frame(&mut body, message);
    let request = request_to(path, body.freeze())?;
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

fn request_to(path: &str, body: Bytes) -> Result<Request<Full<Bytes>>> {
    let request = Request::post(format!("http://etcd{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Full::new(body))?;
    Ok(request)
}

/// A message as gRPC frames it.
fn frame(out: &mut BytesMut, message: &[u8]) {
    out.put_u8(0);
    out.put_u32(message.len() as u32);
    out.put_slice(message);
}

/// The messages of an answer, as they come.
struct Frames {
    body: Incoming,
    bytes: BytesMut,
}

impl Frames {
    async fn next(&mut self) -> Result<Bytes> {
        loop {
            if let Some(head) = self.bytes.first_chunk::<5>() {
                let length = 5 + u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                if self.bytes.len() >= length {
                    return Ok(self.bytes.split_to(length).freeze().slice(5..));
                }
            }
            let frame = self.body.frame().await.ok_or("the stream has ended")??;
            if let Some(data) = frame.data_ref() {
                self.bytes.put_slice(data);
            }
        }
    }
}

/// A field of bytes.
fn field(out: &mut BytesMut, field: u8, bytes: &[u8]) {
    out.put_u8(field << 3 | 2);
    varint(out, bytes.len());
    out.put_slice(bytes);
}

/// A field that is a number.
fn number(out: &mut BytesMut, field: u8, value: usize) {
    out.put_u8(field << 3);
    varint(out, value);
}

fn varint(out: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

enum Value {
    Number(u64),
    Bytes(Bytes),
}

/// The first field with a number.
fn find(message: &Bytes, number: u64) -> Option<Value> {
    Fields(message.clone(), 0).find(|(field, _)| *field == number).map(|(_, value)| value)
}

/// The fields of a message, up to the first that is neither a number nor bytes; and where it is.
struct Fields(Bytes, usize);

impl Fields {
    fn varint(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let byte = *self.0.get(self.1)?;
            self.1 += 1;
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            shift += 7;
            if byte < 0x80 {
                return Some(value);
            }
        }
    }
}

impl Iterator for Fields {
    type Item = (u64, Value);

    fn next(&mut self) -> Option<(u64, Value)> {
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            2 => {
                let length = usize::try_from(self.varint()?).ok()?;
                let end = self.1.checked_add(length).filter(|end| *end <= self.0.len())?;
                let bytes = self.0.slice(self.1..end);
                self.1 = end;
                Value::Bytes(bytes)
            }
            _ => return None,
        };
        Some((key >> 3, value))
    }
}
