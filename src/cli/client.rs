//! How commands reach the running server of an instance: its administrator's kubeconfig lies in the data folder.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use clap::Args;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::args::DATA_DIR;
use crate::auth::pki::join_token::ca_hash;
use crate::server::admin_kubeconfig;
use crate::server::lock::DataDirLock;

/// The longest answer, in bytes.
const MAX_ANSWER: usize = 64 << 20;
/// How long connecting and the whole exchange may take; a snapshot of a large store takes its time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(600);

/// Which instance.
#[derive(Clone, Debug, Args)]
pub struct Instance {
    /// Folder of the instance
    #[arg(long, short, global = true, env = "CORACLE_DATA_DIR", default_value = DATA_DIR, value_name = "DIR")]
    pub data_dir: PathBuf,
}

/// A server said no.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// HTTP status code.
    pub code: u16,
    /// Its words.
    pub message: String,
}

/// The way to the server of an instance, as administrator.
pub struct Client {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    /// PEM of the CA.
    ca: String,
    data_dir: PathBuf,
}

impl Client {
    /// Reads the credential.
    ///
    /// # Errors
    /// No server was ever started in the folder, or the file is not ours to read.
    pub fn open(instance: &Instance) -> anyhow::Result<Client> {
        let data_dir = instance.data_dir.clone();
        let path = admin_kubeconfig(&data_dir);
        if super::agent_status::is_agent(&data_dir) {
            bail!("{} is the folder of an agent: run this on a server of its cluster", data_dir.display());
        }
        let text = std::fs::read_to_string(&path).map_err(|error| {
            anyhow!(
                "no server was ever started in {}: {} cannot be read ({error}); use sudo, or name the folder with --data-dir",
                data_dir.display(),
                path.display()
            )
        })?;
        let config: serde_yaml::Value = serde_yaml::from_str(&text).with_context(|| path.display().to_string())?;
        let damaged = || anyhow!("{} is damaged: start the server again to have it written anew", path.display());
        let decoded = |value: &serde_yaml::Value| value.as_str().and_then(|text| STANDARD.decode(text).ok());
        let (cluster, user) = (&config["clusters"][0]["cluster"], &config["users"][0]["user"]);
        let ca = decoded(&cluster["certificate-authority-data"]).ok_or_else(damaged)?;
        let chain = decoded(&user["client-certificate-data"]).ok_or_else(damaged)?;
        let key = decoded(&user["client-key-data"]).ok_or_else(damaged)?;
        let url = cluster["server"].as_str().ok_or_else(damaged)?;
        let address = url.strip_prefix("https://").and_then(|rest| rest.parse().ok()).ok_or_else(damaged)?;
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(&ca).map_err(|_| damaged())?)?;
        let chain = CertificateDer::pem_slice_iter(&chain).collect::<Result<Vec<_>, _>>().map_err(|_| damaged())?;
        let key = PrivateKeyDer::from_pem_slice(&key).map_err(|_| damaged())?;
        let tls = ClientConfig::builder().with_root_certificates(roots).with_client_auth_cert(chain, key)?;
        let ca = String::from_utf8(ca).map_err(|_| damaged())?;
        Ok(Client { address, tls: Arc::new(tls), ca, data_dir })
    }

    /// Hash of the CA as tokens carry it.
    pub fn ca_hash(&self) -> String {
        ca_hash(&self.ca)
    }

    /// One request with a JSON body (`null`: none) and a JSON answer.
    ///
    /// # Errors
    /// The server is not running, or says no ([`Refused`]).
    pub fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: &impl Serialize) -> anyhow::Result<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let body = serde_json::to_value(body)?;
        let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
        let answer = runtime.block_on(self.exchange(method, path, body))?;
        serde_json::from_slice(&answer).context("the server's answer is not understood")
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Bytes> {
        let stream = match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(self.address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err(self.not_reached(&error.to_string())),
            Err(_) => return Err(self.not_reached("no answer")),
        };
        let name = ServerName::IpAddress(self.address.ip().into());
        let tls = TlsConnector::from(self.tls.clone()).connect(name, stream);
        let tls = tokio::time::timeout(CONNECT_TIMEOUT, tls).await.map_err(|_| self.not_reached("no answer"))?;
        let tls = tls.with_context(|| format!("https://{} is not this instance's server", self.address))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "kubernetes")
            .header(header::ACCEPT, "application/json")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let code = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|error| anyhow!("the server's answer broke off: {error}"))?.to_bytes();
            if code.is_success() {
                return Ok(body);
            }
            let status: Value = serde_json::from_slice(&body).unwrap_or_default();
            let text = String::from_utf8_lossy(&body);
            let message = status["message"].as_str().unwrap_or_else(|| text.trim()).to_owned();
            Err(Refused { code: code.as_u16(), message }.into())
        };
        tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await.context("the server did not answer in time")?
    }

    fn not_reached(&self, why: &str) -> anyhow::Error {
        let dir = self.data_dir.display();
        match DataDirLock::holder(&self.data_dir) {
            None => anyhow!("no server is running in {dir}; start it first"),
            Some(pid) => anyhow!(
                "the server with pid {pid} of {dir} is not reached at https://{}: {why} (is this the same network namespace?)",
                self.address
            ),
        }
    }
}

/// Fails unless no server runs in the folder.
///
/// # Errors
/// One does.
pub fn require_stopped(data_dir: &Path) -> anyhow::Result<()> {
    match DataDirLock::holder(data_dir) {
        Some(pid) => bail!("the server with pid {pid} is running in {}; stop it first", data_dir.display()),
        None => Ok(()),
    }
}

/// Prints a line; whoever reads no further (`| head`) is no fault.
pub fn say(text: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints rows below a heading, columns aligned.
pub fn print_table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) {
    let mut widths = heading.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        say(padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(heading);
    for row in rows {
        line(std::array::from_fn(|i| row[i].as_str()));
    }
}

/// How a list is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For scripts.
    Json,
    /// For people.
    Table,
}

/// Seconds as people read them, e.g. `23h59m`, `364d`.
pub fn age(seconds: i64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600, seconds / 60);
    match seconds {
        ..0 => "over".to_owned(),
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m"),
        3600..172_800 => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short() {
        let all = [-1, 5, 300, 86_399, 31_536_000].map(age);
        assert_eq!(all, ["over", "5s", "5m", "23h59m", "365d"]);
    }

    #[test]
    fn a_folder_without_a_server_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = Client::open(&Instance { data_dir: dir.path().to_owned() }).err().unwrap().to_string();
        assert!(text.contains("no server was ever started in") && text.contains("--data-dir"), "{text}");
    }
}
