//! A small fast client of the API: one connection, the administrator's certificate, every call with a deadline.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde_json::Value;
use tokio::net::TcpStream;

/// What a kubeconfig lets one be.
pub type Credential = Arc<ClientConfig>;

/// Reads the administrator's kubeconfig.
pub fn credential(kubeconfig: &Path) -> Credential {
    let config: Value = serde_yaml::from_str(&std::fs::read_to_string(kubeconfig).unwrap()).unwrap();
    let decode = |pointer: &str| {
        let text = config.pointer(pointer).and_then(Value::as_str).unwrap_or_else(|| panic!("no {pointer}"));
        base64::engine::general_purpose::STANDARD.decode(text).unwrap()
    };
    let certificates = |pem: Vec<u8>| CertificateDer::pem_slice_iter(&pem).map(Result::unwrap).collect::<Vec<_>>();
    let mut roots = rustls::RootCertStore::empty();
    for root in certificates(decode("/clusters/0/cluster/certificate-authority-data")) {
        roots.add(root).unwrap();
    }
    let key = PrivateKeyDer::from_pem_slice(&decode("/users/0/user/client-key-data")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let builder = builder.with_root_certificates(roots);
    Arc::new(builder.with_client_auth_cert(certificates(decode("/users/0/user/client-certificate-data")), key).unwrap())
}

/// Why there is no answer.
#[derive(Debug)]
#[expect(dead_code, reason = "the reasons are shown by Debug, when a story fails")]
pub enum Failure {
    /// The server was not reached: nothing has happened.
    NotSent(String),
    /// It broke or took too long: anything may have happened.
    Unknown(String),
}

/// A client of one server at a time. Must run inside the namespace of a host (`switch::inside`).
pub struct Client {
    credential: Credential,
    server: SocketAddr,
    connection: Option<SendRequest<Full<Bytes>>>,
    pub patience: Duration,
}

impl Client {
    pub fn new(credential: Credential, server: SocketAddr) -> Client {
        Client { credential, server, connection: None, patience: Duration::from_secs(5) }
    }

    /// Turns to another server.
    pub fn turn_to(&mut self, server: SocketAddr) {
        self.server = server;
        self.connection = None;
    }

    /// One call: status code and the answer as JSON (text if it is none).
    pub async fn call(&mut self, method: Method, path: &str, body: Option<&Value>) -> Result<(u16, Value), Failure> {
        let patience = self.patience;
        if self.connection.as_ref().is_none_or(SendRequest::is_closed) {
            let connect = tokio::time::timeout(patience, connect(self.credential.clone(), self.server));
            let connection = connect.await.map_err(|_| Failure::NotSent("connecting took too long".to_owned()))?;
            self.connection = Some(connection.map_err(|e| Failure::NotSent(e.to_string()))?);
        }
        let connection = self.connection.as_mut().unwrap();
        let bytes = body.map_or_else(Bytes::new, |b| b.to_string().into());
        let request = Request::builder().method(method).uri(path).header("host", self.server.to_string());
        let request = request.header("content-type", "application/json").body(Full::new(bytes)).unwrap();
        let exchange = async {
            connection.ready().await?;
            let response = connection.send_request(request).await?;
            let status = response.status().as_u16();
            Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
        };
        let answer = tokio::time::timeout(patience, exchange).await;
        let (status, bytes) = match answer {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => {
                self.connection = None;
                return Err(Failure::Unknown(error.to_string()));
            }
            Err(_) => {
                self.connection = None;
                return Err(Failure::Unknown("the answer took too long".to_owned()));
            }
        };
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        Ok((status, serde_json::from_slice(&bytes).unwrap_or_else(|_| text())))
    }
}

impl Client {
    /// The lines of an answer that comes bit by bit, on a connection of its own.
    pub async fn lines(&self, path: &str) -> anyhow::Result<Lines> {
        let mut connection =
            tokio::time::timeout(self.patience, connect(self.credential.clone(), self.server)).await??;
        let request = Request::get(path).header("host", self.server.to_string()).body(Full::default())?;
        let response = tokio::time::timeout(self.patience, connection.send_request(request)).await??;
        anyhow::ensure!(response.status().is_success(), "{}", response.status());
        Ok(Lines { _connection: connection, body: response.into_body(), buffer: Vec::new() })
    }
}

/// An answer of JSON lines.
pub struct Lines {
    _connection: SendRequest<Full<Bytes>>,
    body: Incoming,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next line; none at the end, however it came.
    pub async fn next(&mut self) -> Option<Value> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return serde_json::from_slice(&line).ok();
            }
            let frame = self.body.frame().await?.ok()?;
            self.buffer.extend_from_slice(frame.data_ref()?);
        }
    }
}

async fn connect(credential: Credential, server: SocketAddr) -> anyhow::Result<SendRequest<Full<Bytes>>> {
    let tcp = TcpStream::connect(server).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::IpAddress(IpAddr::into(server.ip()));
    let tls = tokio_rustls::TlsConnector::from(credential).connect(name, tcp).await?;
    let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Runs a future on this thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}
