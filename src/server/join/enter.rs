//! This server asks to be let into a cluster: the CA is proved by the token's hash before anything is said, then the keys of
//! the cluster come back and are kept, and with them this server is a member whatever happens next.

use std::path::Path;
use std::time::Duration;

use base64::{Engine, engine::general_purpose::STANDARD};
use coracle_agent::join::introduction::{IntroductionError, introduce};
use coracle_agent::join::request::{RequestError, post};
use coracle_agent::join::{BadToken, Login, Token};
use coracle_agent::servers::resolve::Resolver;
use http::StatusCode;
use tokio::sync::watch;

use super::door::{ServerAnswer, ServerRequest};
use crate::auth::pki::{CLUSTER_KEY, ClusterKey, PkiError, record};
use crate::controllers::backoff::Backoff;
use crate::server::cluster::remembered;
use crate::server::explain;

/// Delays between attempts while no server answers.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));

/// Why this server was not let in.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// `--server` without a token.
    #[error(
        "--server needs --token or --token-file: the server token of the cluster is in DATA/server/token on any of its servers"
    )]
    NoToken,
    /// No token at all.
    #[error("--token")]
    BadToken(#[from] BadToken),
    /// A token that cannot let a server in, seen without asking.
    #[error(
        "--token: this is a token for agents; a server joins with the server token (DATA/server/token on a server of the cluster)"
    )]
    AgentToken,
    /// The server was not spoken to.
    #[error(transparent)]
    Introduction(#[from] IntroductionError),
    /// Something else listens there.
    #[error(
        "--server {0}: what listens there does not speak TLS (an HTTP proxy, or another program?); give the https:// address of \
         a Coracle server's port 6443"
    )]
    NotTls(String),
    /// It knows nothing of joining.
    #[error("--server {0}: this is no Coracle server that servers can join")]
    NoServer(String),
    /// The token's secret is wrong, or was changed.
    #[error("--server {server} refuses the token: {message}")]
    Token {
        /// Who.
        server: String,
        /// Its words.
        message: String,
    },
    /// It says no for another reason.
    #[error("--server {server} does not let this server in: {message}")]
    Refused {
        /// Who.
        server: String,
        /// Its words.
        message: String,
    },
    /// The exchange broke, or the server is not ready for it.
    #[error("--server {server} gave no answer")]
    Request {
        /// Who.
        server: String,
        /// How.
        #[source]
        source: RequestError,
    },
    /// What it sent cannot be used.
    #[error("what --server {0} sent is not understood; is it of the same version?")]
    Answer(String),
    /// The keys cannot be kept.
    #[error("keeping the keys of the cluster")]
    Pki(#[from] PkiError),
}

impl EnterError {
    /// Whether trying again cannot help.
    pub fn is_final(&self) -> bool {
        match self {
            EnterError::Introduction(error) => error.is_final(),
            EnterError::Request { .. } => false,
            _ => true,
        }
    }
}

/// The token of the command line, as far as it can be judged here.
///
/// # Errors
/// It is none, or not one for servers.
pub fn server_token(text: Option<&str>) -> Result<Token, EnterError> {
    let token = Token::parse(text.ok_or(EnterError::NoToken)?)?;
    match &token.login {
        Login::User(user, _) if user == "server" => Ok(token),
        Login::User(..) | Login::Bootstrap(_) => Err(EnterError::AgentToken),
    }
}

/// Asks until a server answers; then everything that makes this server a member is on disk.
///
/// # Errors
/// It is refused, or what comes cannot be kept; see [`EnterError::is_final`].
pub async fn enter(
    resolver: &Resolver,
    server: &str,
    token: &Token,
    request: &ServerRequest,
    data_dir: &Path,
    state: &watch::Sender<Option<String>>,
) -> Result<(), EnterError> {
    let mut retry = Backoff::new(RETRY.0, RETRY.1);
    loop {
        match ask(resolver, server, token, request).await {
            Ok(answer) => return keep(server, answer, data_dir),
            Err(error) if error.is_final() => return Err(error),
            Err(error) => {
                let why = explain(&error);
                tracing::warn!(server, error = why, "not let in yet; trying on");
                state.send_replace(Some(format!("joining: {why}")));
                tokio::time::sleep(retry.fail()).await;
            }
        }
    }
}

async fn ask(
    resolver: &Resolver,
    server: &str,
    token: &Token,
    request: &ServerRequest,
) -> Result<ServerAnswer, EnterError> {
    let introduced = introduce(resolver, server, token.ca_hash).await.map_err(|error| match &error {
        IntroductionError::Connect(_, io) if speaks_no_tls(io) => EnterError::NotTls(server.to_owned()),
        _ => error.into(),
    })?;
    let body = serde_json::to_value(request).unwrap_or_default();
    let answer = post::<ServerAnswer>(introduced, super::SERVER_PATH, &token.authorization(), &body).await;
    answer.map_err(|error| meaning(server, error))
}

/// Whether the peer answered with something that is no TLS at all.
fn speaks_no_tls(error: &std::io::Error) -> bool {
    let of_tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(of_tls, Some(rustls::Error::InvalidMessage(_)))
}

fn meaning(server: &str, error: RequestError) -> EnterError {
    let server = server.to_owned();
    match error {
        RequestError::Refused { code: StatusCode::UNAUTHORIZED, message } => EnterError::Token { server, message },
        RequestError::Refused { code: StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED, .. } => {
            EnterError::NoServer(server)
        }
        RequestError::Refused { code, message } if code.is_client_error() && code != StatusCode::TOO_MANY_REQUESTS => {
            EnterError::Refused { server, message }
        }
        RequestError::Answer(_) => EnterError::Answer(server),
        source => EnterError::Request { server, source },
    }
}

/// The sealed keys are written last: where they are, this server is a member.
fn keep(server: &str, answer: ServerAnswer, data_dir: &Path) -> Result<(), EnterError> {
    let wrong = || EnterError::Answer(server.to_owned());
    let sealed = STANDARD.decode(&answer.keys).map_err(|_| wrong())?;
    let key = ClusterKey::install(&data_dir.join(CLUSTER_KEY), &answer.cluster_key)?;
    record::open(&key, &sealed).map_err(|_| wrong())?;
    remembered::write(data_dir, &answer.members)?;
    record::write_cache(data_dir, &sealed)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::pki::ClusterKeys;
    use crate::server::cluster::Member;
    use crate::server::join::agreement::Agreement;
    use std::time::SystemTime;

    #[test]
    fn tokens_that_cannot_let_a_server_in_are_known_beforehand() {
        let hash = "ab".repeat(32);
        assert!(server_token(Some(&format!("K10{hash}::server:secret"))).is_ok());
        assert!(matches!(server_token(None), Err(EnterError::NoToken)));
        assert!(matches!(server_token(Some("secret")), Err(EnterError::BadToken(BadToken::NoHash))));
        for token in ["node:secret", "abcdef.0123456789abcdef"] {
            let token = format!("K10{hash}::{token}");
            assert!(matches!(server_token(Some(&token)), Err(EnterError::AgentToken)), "{token}");
        }
    }

    #[test]
    fn refusals_are_final_and_silence_is_not() {
        let of = |code: u16| {
            let code = StatusCode::from_u16(code).unwrap();
            meaning("s:1", RequestError::Refused { code, message: "no".into() })
        };
        for code in [400, 401, 403, 404, 409] {
            assert!(of(code).is_final(), "{code}");
        }
        for code in [429, 500, 503] {
            assert!(!of(code).is_final(), "{code}");
        }
        assert_eq!(of(401).to_string(), "--server s:1 refuses the token: no");
    }

    #[test]
    fn what_was_let_in_has_the_keys_on_disk() {
        let (there, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let key = ClusterKey::load_or_create(&there.path().join(CLUSTER_KEY)).unwrap();
        let keys = ClusterKeys::generate(SystemTime::now()).unwrap();
        let sealed = record::seal(&key, &keys).unwrap();
        let answer = |keys: &[u8]| ServerAnswer {
            cluster_key: key.text().unwrap(),
            keys: STANDARD.encode(keys),
            members: vec![Member::new(1, "n1", "10.0.0.1:6443")],
            settings: Agreement {
                cluster_cidr: vec!["10.42.0.0/16".into()],
                service_cidr: vec!["10.43.0.0/16".into()],
                flannel_backend: Default::default(),
                service_node_port_range: "30000-32767".into(),
                cluster_dns: vec!["10.43.0.10".parse().unwrap()],
                cluster_domain: "cluster.local".into(),
            },
        };
        assert!(matches!(keep("s:1", answer(b"nonsense"), here.path()), Err(EnterError::Answer(_))));
        assert!(!record::cache_path(here.path()).exists());
        keep("s:1", answer(&sealed), here.path()).unwrap();
        let key = ClusterKey::load(&here.path().join(CLUSTER_KEY)).unwrap().unwrap();
        let opened = record::read_cache(here.path(), &key).unwrap().unwrap();
        assert_eq!(opened.server_secret, keys.server_secret);
        assert_eq!(remembered::read(here.path()).len(), 1);
    }
}
