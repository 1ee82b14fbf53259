//! One HTTP GET to a pod: what probes and hooks send.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Bytes of an answer that are looked at.
const MAX_BODY: usize = 10 * 1024;
/// Hops that are followed.
const MAX_REDIRECTS: usize = 10;

/// Why there was no answer. Texts are like Go's, tools show them.
#[derive(Debug, thiserror::Error)]
pub enum GetError {
    /// The port is no number and no port of the container.
    #[error("couldn't find port: {0}")]
    Port(String),
    /// The container has no address to ask.
    #[error("failed to find networking container: no address")]
    NoAddress,
    /// `host` is a name that this node cannot resolve.
    #[error("Get {url:?}: dial tcp: lookup {host}: no such host")]
    Host {
        /// The request.
        url: String,
        /// The name.
        host: String,
    },
    /// No connection.
    #[error("Get {url:?}: dial tcp {address}: connect: {why}")]
    Connect {
        /// The request.
        url: String,
        /// Where to.
        address: SocketAddr,
        /// In the words of the kernel.
        why: String,
    },
    /// No answer in time.
    #[error("Get {url:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)")]
    Timeout {
        /// The request.
        url: String,
    },
    /// Something else that is no HTTP.
    #[error("Get {url:?}: {why}")]
    Protocol {
        /// The request.
        url: String,
        /// What happened.
        why: String,
    },
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// The first bytes.
    pub body: String,
}

/// A port by number or by name in `container`.
///
/// # Errors
/// [`GetError::Port`].
pub fn port(port: &IntOrString, container: &Container) -> Result<u16, GetError> {
    let unknown = |text: &str| GetError::Port(text.to_owned());
    match port {
        IntOrString::Int(number) => {
            u16::try_from(*number).ok().filter(|n| *n > 0).ok_or_else(|| unknown(&number.to_string()))
        }
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name));
            match named {
                Some(port) => u16::try_from(port.container_port).map_err(|_| unknown(name)),
                None => name.parse().map_err(|_| unknown(name)),
            }
        }
    }
}

/// Sends the request and follows redirects on the same host.
///
/// # Errors
/// When there is no complete answer within `timeout`.
pub async fn get(
    action: &HTTPGetAction,
    container: &Container,
    ip: Option<IpAddr>,
    agent: &str,
    timeout: Duration,
) -> Result<Answer, GetError> {
    let port = port(&action.port, container)?;
    let secure = action.scheme.as_deref() == Some("HTTPS");
    let scheme = if secure { "https" } else { "http" };
    let host = match action.host.as_deref().filter(|host| !host.is_empty()) {
        Some(host) => host.to_owned(),
        None => ip.ok_or(GetError::NoAddress)?.to_string(),
    };
    let path = action.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
    let mut path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    let shown = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let url = format!("{scheme}://{shown}:{port}{path}");
    // `host` may be the node's own name for itself; a static binary resolves no others.
    let ip: IpAddr = match host.as_str() {
        "localhost" => IpAddr::from([127, 0, 0, 1]),
        text => text.parse().map_err(|_| GetError::Host { url: url.clone(), host: host.clone() })?,
    };
    let address = SocketAddr::new(ip, port);
    let work = async {
        for _ in 0..=MAX_REDIRECTS {
            let (answer, location) = once(action, address, secure, &shown, &path, agent, &url).await?;
            let same = location.as_deref().and_then(|location| same_host(location, scheme, &shown, port));
            match same {
                Some(next) if (300..400).contains(&answer.status) => path = next,
                _ => return Ok(answer),
            }
        }
        Err(GetError::Protocol { url: url.clone(), why: "stopped after 10 redirects".to_owned() })
    };
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(GetError::Timeout { url: url.clone() }),
    }
}

/// The path of a redirect that stays here; one that leads elsewhere is not followed and counts as success.
fn same_host(location: &str, scheme: &str, host: &str, port: u16) -> Option<String> {
    if location.starts_with('/') && !location.starts_with("//") {
        return Some(location.to_owned());
    }
    let rest = location.strip_prefix(&format!("{scheme}://{host}"))?;
    let rest = rest.strip_prefix(&format!(":{port}")).unwrap_or(rest);
    if rest.is_empty() { Some("/".to_owned()) } else { rest.starts_with('/').then(|| rest.to_owned()) }
}

async fn once(
    action: &HTTPGetAction,
    address: SocketAddr,
    secure: bool,
    host: &str,
    path: &str,
    agent: &str,
    url: &str,
) -> Result<(Answer, Option<String>), GetError> {
    let protocol = |why: String| GetError::Protocol { url: url.to_owned(), why };
    let mut request = Request::get(path)
        .header(header::HOST, format!("{host}:{}", address.port()))
        .header(header::USER_AGENT, agent)
        .header(header::ACCEPT, "*/*")
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| protocol(error.to_string()))?;
    for own in action.http_headers.iter().flatten() {
        let (Ok(name), Ok(value)) = (HeaderName::try_from(&own.name), HeaderValue::try_from(&own.value)) else {
            continue;
        };
        // An empty Accept or User-Agent asks to send none.
        if value.is_empty() && (name == header::ACCEPT || name == header::USER_AGENT) {
            request.headers_mut().remove(name);
        } else {
            request.headers_mut().insert(name, value);
        }
    }
    let stream = TcpStream::connect(address).await.map_err(|error| GetError::Connect {
        url: url.to_owned(),
        address,
        why: kernel_text(&error),
    })?;
    if !secure {
        return exchange(stream, request).await.map_err(protocol);
    }
    let connector = tokio_rustls::TlsConnector::from(tls_config().map_err(|error| protocol(error.to_string()))?);
    let name = ServerName::IpAddress(address.ip().into());
    let stream = connector.connect(name, stream).await.map_err(|error| protocol(error.to_string()))?;
    exchange(stream, request).await.map_err(protocol)
}

async fn exchange<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<(Answer, Option<String>), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    let connection = tokio::spawn(connection);
    let result = async {
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let location =
            response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await;
        let body = body.map(|body| String::from_utf8_lossy(&body.to_bytes()).into_owned()).unwrap_or_default();
        Ok((Answer { status, body }, location))
    };
    let result = result.await;
    connection.abort();
    result
}

/// `connection refused` instead of `Connection refused (os error 111)`.
pub fn kernel_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| first.to_lowercase().chain(chars).collect())
}

/// Probes check that something answers, not who it is: as upstream, certificates are not verified.
fn tls_config() -> Result<Arc<rustls::ClientConfig>, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[derive(Debug)]
struct Anyone(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
