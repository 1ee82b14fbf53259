//! The agent's request to be let into the cluster.

use std::net::IpAddr;

use http::StatusCode;
use ipnet::IpNet;
use rustls::pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::credentials::FreshKey;
use super::introduction::{IntroductionError, introduce};
use super::request::{RequestError, post};
use super::token::Token;
use crate::net::Backend;
use crate::servers::resolve::Resolver;

/// Where agents ask.
const PATH: &str = "/coracle/v1/join/agent";

/// What every node of a cluster must agree on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterSettings {
    /// Address ranges of pods.
    #[serde(with = "as_texts")]
    pub cluster_cidrs: Vec<IpNet>,
    /// Address ranges of Services.
    #[serde(with = "as_texts")]
    pub service_cidrs: Vec<IpNet>,
    /// Addresses of the cluster DNS.
    pub cluster_dns: Vec<IpAddr>,
    /// DNS domain of the cluster.
    pub cluster_domain: String,
    /// How pods of different nodes reach each other.
    #[serde(default)]
    pub flannel_backend: Backend,
}

/// Ranges as everybody writes them.
mod as_texts {
    use ipnet::IpNet;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(ranges: &[IpNet], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(ranges.iter().map(ToString::to_string))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpNet>, D::Error> {
        let texts = Vec::<String>::deserialize(from)?;
        texts.iter().map(|text| text.parse().map_err(|_| D::Error::custom(format!("{text:?} is no range")))).collect()
    }
}

#[derive(Deserialize)]
struct Answer {
    certificate: String,
    #[serde(flatten)]
    settings: ClusterSettings,
    #[serde(default)]
    servers: Vec<String>,
}

/// What an admitted agent gets.
pub struct Admitted {
    /// Client certificate, PEM.
    pub certificate: String,
    /// CA of the servers.
    pub ca: CertificateDer<'static>,
    /// Settings of the cluster.
    pub settings: ClusterSettings,
    /// `host:port` of the servers.
    pub servers: Vec<String>,
}

/// Why an agent was not let in.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    /// The server was not spoken to.
    #[error(transparent)]
    Introduction(#[from] IntroductionError),
    /// Wrong, expired or deleted.
    #[error("{server} refuses the token: {message}. `coracle token list` on a server shows the ones that are good")]
    Token {
        /// Who.
        server: String,
        /// Its words.
        message: String,
    },
    /// The name belongs to another machine, or the request is not allowed.
    #[error("{server} does not let this node in: {message}")]
    Refused {
        /// Who.
        server: String,
        /// Its words.
        message: String,
    },
    /// It knows nothing of joining.
    #[error("{0} is no Coracle server that agents can join")]
    NoServer(String),
    /// The exchange broke, or the server is not ready for it.
    #[error("{server} gave no answer")]
    Request {
        /// Who.
        server: String,
        /// How.
        #[source]
        source: RequestError,
    },
}

impl AdmissionError {
    /// Whether trying again cannot help.
    #[must_use]
    pub fn is_final(&self) -> bool {
        match self {
            AdmissionError::Introduction(error) => error.is_final(),
            AdmissionError::Token { .. } | AdmissionError::Refused { .. } | AdmissionError::NoServer(_) => true,
            AdmissionError::Request { .. } => false,
        }
    }
}

/// Who asks.
pub struct Applicant<'a> {
    /// Name of the node.
    pub node_name: &'a str,
    /// Its secret.
    pub node_secret: &'a str,
    /// Its key.
    pub key: &'a FreshKey,
}

/// Asks one server.
///
/// # Errors
/// See [`AdmissionError`].
pub async fn ask(
    resolver: &Resolver,
    server: &str,
    token: &Token,
    applicant: &Applicant<'_>,
) -> Result<Admitted, AdmissionError> {
    let introduced = introduce(resolver, server, token.ca_hash).await?;
    let ca = introduced.ca.clone();
    let body = json!({
        "nodeName": applicant.node_name, "nodeSecret": applicant.node_secret, "csr": applicant.key.csr,
    });
    let answer = post::<Answer>(introduced, PATH, &token.authorization(), &body).await;
    let answer = answer.map_err(|error| meaning(server, error))?;
    Ok(Admitted { certificate: answer.certificate, ca, settings: answer.settings, servers: answer.servers })
}

fn meaning(server: &str, error: RequestError) -> AdmissionError {
    let server = server.to_owned();
    match error {
        RequestError::Refused { code: StatusCode::UNAUTHORIZED, message } => AdmissionError::Token { server, message },
        RequestError::Refused { code: StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED, .. } => {
            AdmissionError::NoServer(server)
        }
        RequestError::Refused { code, message } if code.is_client_error() && code != StatusCode::TOO_MANY_REQUESTS => {
            AdmissionError::Refused { server, message }
        }
        source => AdmissionError::Request { server, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let of = |code: u16| {
            let code = StatusCode::from_u16(code).unwrap();
            meaning("s:1", RequestError::Refused { code, message: "no".into() })
        };
        for code in [400, 401, 403, 404] {
            assert!(of(code).is_final(), "{code}");
        }
        for code in [429, 500, 503] {
            assert!(!of(code).is_final(), "{code}");
        }
        assert!(of(401).to_string().contains("refuses the token: no"));
    }
}
