//! The token of a join request. What is wrong with it is said only to those who know its secret; to all others every token is
//! simply not good.

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, StatusCode, header};

use crate::apiserver::status::Status;
use crate::auth::bootstrap_token::{BootstrapTokens, Verdict, same};
use crate::auth::pki::ClusterKeys;

/// What a joiner shows.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// `Basic user:secret`.
    User(String, String),
    /// `Bearer id.secret`.
    Bootstrap(String),
}

/// Whom a token lets in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grade {
    /// Servers and agents.
    Server,
    /// Agents.
    Agent,
    /// Agents, for a time.
    Bootstrap,
}

impl Credential {
    /// Reads the `Authorization` header.
    pub fn of(headers: &HeaderMap) -> Option<Credential> {
        let text = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, value) = text.trim().split_once(' ')?;
        let value = value.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            return Some(Credential::Bootstrap(value.to_owned()));
        }
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let login = String::from_utf8(STANDARD.decode(value).ok()?).ok()?;
        let (user, secret) = login.split_once(':')?;
        Some(Credential::User(user.to_owned(), secret.to_owned()))
    }

    /// What the token lets in.
    ///
    /// # Errors
    /// 401: nothing, with the reason if the secret is right.
    pub fn grade(
        &self,
        keys: &ClusterKeys,
        bootstrap: &BootstrapTokens,
        now: jiff::Timestamp,
    ) -> Result<Grade, Status> {
        match self {
            Credential::User(user, secret) => match user.as_str() {
                "server" if same(secret, &keys.server_secret) => Ok(Grade::Server),
                "node" if same(secret, &keys.agent_secret) => Ok(Grade::Agent),
                _ => Err(refused("the token's secret is not, or no longer, one of this cluster".to_owned())),
            },
            Credential::Bootstrap(token) => match bootstrap.verdict(token, now).map_err(Status::internal)? {
                Verdict::Good(_) => Ok(Grade::Bootstrap),
                Verdict::Expired(at) => Err(refused(format!("the bootstrap token expired at {at}"))),
                Verdict::Unknown => Err(refused("the bootstrap token is not known to this cluster".to_owned())),
            },
        }
    }
}

/// The token is of no use.
pub fn refused(why: String) -> Status {
    Status::new(StatusCode::UNAUTHORIZED, "Unauthorized", why)
}

impl Grade {
    /// Whether a server may join.
    ///
    /// # Errors
    /// 403 with what would do.
    pub fn admits_server(self) -> Result<(), Status> {
        let kind = match self {
            Grade::Server => return Ok(()),
            Grade::Agent => "this is an agent token, which lets in agents only",
            Grade::Bootstrap => "this is a bootstrap token, which lets in agents only",
        };
        let why =
            format!("{kind}: a server joins with the server token (DATA/server/token on a server of the cluster)");
        Err(Status::new(StatusCode::FORBIDDEN, "Forbidden", why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use serde_json::json;
    use std::time::SystemTime;

    #[test]
    fn each_token_lets_in_what_it_is_for_and_wrong_ones_nothing() {
        let mut world = World::new();
        let data = |expiration: &str| {
            let fields = [
                ("token-id", "abcdef"),
                ("token-secret", "0123456789abcdef"),
                ("usage-bootstrap-authentication", "true"),
                ("expiration", expiration),
            ];
            let data: serde_json::Map<_, _> =
                fields.iter().map(|(key, value)| ((*key).to_owned(), STANDARD.encode(value).into())).collect();
            let meta = json!({ "namespace": "kube-system", "name": "bootstrap-token-abcdef" });
            json!({ "metadata": meta, "type": "bootstrap.kubernetes.io/token", "data": data })
        };
        let bootstrap = BootstrapTokens::new(world.objects.clone());
        let keys = ClusterKeys::generate(SystemTime::now()).unwrap();
        let now: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let grade = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            let credential = Credential::of(&headers).ok_or_else(|| refused("none".into()))?;
            credential.grade(&keys, &bootstrap, now)
        };
        let basic = |user: &str, secret: &str| format!("Basic {}", STANDARD.encode(format!("{user}:{secret}")));
        assert_eq!(grade(&basic("server", &keys.server_secret)), Ok(Grade::Server));
        assert_eq!(grade(&basic("node", &keys.agent_secret)), Ok(Grade::Agent));
        for (user, secret) in [("server", keys.agent_secret.as_str()), ("node", &keys.server_secret), ("root", "")] {
            assert_eq!(grade(&basic(user, secret)).unwrap_err().code(), 401, "{user}");
        }
        for none in ["Basic ???", "Digest x", "Bearer"] {
            assert!(grade(none).is_err(), "{none}");
        }
        let good = "Bearer abcdef.0123456789abcdef";
        assert!(grade(good).unwrap_err().message().contains("not known"));
        world.put("", "secrets", data("2026-01-02T00:00:00Z"));
        assert_eq!(grade(good), Ok(Grade::Bootstrap));
        world.put("", "secrets", data("2025-12-31T00:00:00Z"));
        assert_eq!(grade(good).unwrap_err().message(), "the bootstrap token expired at 2025-12-31T00:00:00Z");
        // Without the secret there is nothing to learn, not even that the token was one.
        assert!(grade("Bearer abcdef.0000000000000000").unwrap_err().message().contains("not known"));
        assert!(Grade::Server.admits_server().is_ok());
        assert!(Grade::Agent.admits_server().unwrap_err().message().contains("agent token"));
        assert_eq!(Grade::Bootstrap.admits_server().unwrap_err().code(), 403);
    }
}
