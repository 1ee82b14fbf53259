//! One attempt of a probe.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};
use tokio::net::TcpStream;

use super::grpc;
use crate::kubelet::http_get;
use crate::runtime::{Runtime, RuntimeError};

const AGENT: &str = "kube-probe/1.35";
/// Bytes of a command's output that are shown.
const MAX_OUTPUT: usize = 10 * 1024;

/// What an attempt said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Success,
    /// Counts as success, but somebody should look.
    Warning(String),
    /// Not as it should be.
    Failure(String),
    /// The question could not be asked; counts as failure.
    Error(String),
}

/// Whom to ask.
pub struct Target<'a> {
    /// Runs commands.
    pub runtime: &'a dyn Runtime,
    /// The specification.
    pub container: &'a Container,
    /// Container id.
    pub id: &'a str,
    /// Address of the pod.
    pub ip: Option<IpAddr>,
}

/// Asks once.
pub async fn check(probe: &Probe, target: &Target<'_>, timeout: Duration) -> Outcome {
    if let Some(action) = &probe.exec {
        return command(&action.command.clone().unwrap_or_default(), target, timeout).await;
    }
    if let Some(action) = &probe.http_get {
        return match http_get::get(action, target.container, target.ip, AGENT, timeout).await {
            Ok(answer) if (200..300).contains(&answer.status) => Outcome::Success,
            // A redirect to another host: something answers.
            Ok(answer) if (300..400).contains(&answer.status) => {
                Outcome::Warning(format!("Probe terminated redirects, Response body: {}", answer.body))
            }
            Ok(answer) => Outcome::Failure(format!("HTTP probe failed with statuscode: {}", answer.status)),
            Err(error @ http_get::GetError::Port(_)) => Outcome::Error(error.to_string()),
            Err(error) => Outcome::Failure(error.to_string()),
        };
    }
    if let Some(action) = &probe.tcp_socket {
        let port = match http_get::port(&action.port, target.container) {
            Ok(port) => port,
            Err(error) => return Outcome::Error(error.to_string()),
        };
        return match address(action.host.as_deref(), target.ip, port) {
            Ok(address) => tcp(address, timeout).await,
            Err(outcome) => outcome,
        };
    }
    if let Some(action) = &probe.grpc {
        let port = u16::try_from(action.port).unwrap_or(0);
        return match address(None, target.ip, port) {
            Ok(address) => grpc::check(address, action.service.as_deref().unwrap_or_default(), timeout).await,
            Err(outcome) => outcome,
        };
    }
    Outcome::Error("missing probe handler".to_owned())
}

fn address(host: Option<&str>, ip: Option<IpAddr>, port: u16) -> Result<SocketAddr, Outcome> {
    let ip = match host.filter(|host| !host.is_empty()) {
        Some("localhost") => Some(IpAddr::from([127, 0, 0, 1])),
        Some(host) => match host.parse() {
            Ok(ip) => Some(ip),
            Err(_) => return Err(Outcome::Failure(format!("dial tcp: lookup {host}: no such host"))),
        },
        None => ip,
    };
    ip.map(|ip| SocketAddr::new(ip, port)).ok_or_else(|| Outcome::Error("the pod has no address".to_owned()))
}

async fn tcp(address: SocketAddr, timeout: Duration) -> Outcome {
    match tokio::time::timeout(timeout, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Outcome::Success,
        Ok(Err(error)) => Outcome::Failure(format!("dial tcp {address}: connect: {}", http_get::kernel_text(&error))),
        Err(_) => Outcome::Failure(format!("dial tcp {address}: i/o timeout")),
    }
}

async fn command(command: &[String], target: &Target<'_>, timeout: Duration) -> Outcome {
    match target.runtime.exec_sync(target.id, command, Some(timeout)).await {
        Ok(done) if done.exit_code == 0 => Outcome::Success,
        Ok(done) => {
            let mut output = done.stdout;
            output.extend(done.stderr);
            output.truncate(MAX_OUTPUT);
            Outcome::Failure(String::from_utf8_lossy(&output).into_owned())
        }
        Err(error @ RuntimeError::Timeout { .. }) => Outcome::Failure(error.to_string()),
        Err(error) => Outcome::Error(error.to_string()),
    }
}
