//! Who sent this request: client certificate, bearer token (service account, bootstrap), or nobody.

use super::bootstrap_token::BootstrapTokens;
use super::identity::{SYSTEM_ANONYMOUS, SYSTEM_AUTHENTICATED, SYSTEM_UNAUTHENTICATED};
use super::objects::Objects;
use super::pki::ClusterKeys;
use super::service_account::{ServiceAccountTokens, TokenError};
use super::{Identity, UserInfo, x509};
use http::{HeaderMap, header};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;
use std::time::SystemTime;

/// The only paths that answer a caller without credentials (with their sub-paths).
const ANONYMOUS_PATHS: [&str; 4] = ["/livez", "/readyz", "/healthz", "/version"];
/// Bearer token of a browser's WebSocket, which cannot set headers.
const WEBSOCKET_TOKEN: &str = "base64url.bearer.authorization.k8s.io.";

/// What the TLS handshake brought along, judged once per connection.
#[derive(Clone, Debug)]
pub enum PeerCertificate {
    /// The client sent none.
    None,
    /// Signed by our client CA.
    Verified { user: Arc<UserInfo>, not_after: SystemTime },
    /// Anything else; such a client is not anonymous, it is refused unless it has a token.
    Rejected,
}

/// The credentials are missing or wrong: 401, without a hint which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Unauthorized")]
pub struct Unauthenticated;

/// A token that was accepted.
#[derive(Debug)]
pub struct AcceptedToken {
    pub user: UserInfo,
    /// Audiences that token and question share.
    pub audiences: Vec<String>,
}

/// Checks credentials. Cheap to clone.
#[derive(Clone)]
pub struct Authenticator {
    certificates: Arc<x509::ClientCertificates>,
    service_accounts: ServiceAccountTokens,
    bootstrap: BootstrapTokens,
}

impl Authenticator {
    pub fn new(
        keys: &ClusterKeys,
        service_accounts: ServiceAccountTokens,
        objects: Objects,
    ) -> Result<Authenticator, rustls::Error> {
        let certificates = Arc::new(x509::ClientCertificates::new(keys)?);
        Ok(Authenticator { certificates, service_accounts, bootstrap: BootstrapTokens::new(objects) })
    }

    /// The verifier that the listener gives to TLS: asks for a certificate, judges nothing (see [`PeerCertificate`]).
    pub fn tls_verifier(&self) -> Arc<dyn rustls::server::danger::ClientCertVerifier> {
        self.certificates.tls_verifier()
    }

    /// Judges the chain of a handshake.
    pub fn judge(&self, chain: Option<&[CertificateDer<'_>]>, now: SystemTime) -> PeerCertificate {
        match chain {
            None | Some([]) => PeerCertificate::None,
            Some(chain) => match self.certificates.verify(chain, now) {
                Ok((user, not_after)) => PeerCertificate::Verified { user: Arc::new(user), not_after },
                Err(error) => {
                    tracing::debug!(%error, "client certificate refused");
                    PeerCertificate::Rejected
                }
            },
        }
    }

    /// Who sent a request for `path` with these headers over a connection with this certificate.
    pub fn authenticate(
        &self,
        peer: &PeerCertificate,
        headers: &HeaderMap,
        path: &str,
        now: SystemTime,
    ) -> Result<Identity, Unauthenticated> {
        if let PeerCertificate::Verified { user, not_after } = peer
            && now <= *not_after
        {
            return Ok(Identity::authenticated(user.clone()));
        }
        match bearer_token(headers)? {
            Some(token) => {
                let accepted = self.authenticate_token(&token, &[]).map_err(|error| {
                    tracing::debug!(error = &error as &dyn std::error::Error, "bearer token refused");
                    Unauthenticated
                })?;
                Ok(Identity::authenticated(accepted.ok_or(Unauthenticated)?.user))
            }
            None if matches!(peer, PeerCertificate::None) && is_anonymous_path(path) => {
                Ok(Identity::authenticated(UserInfo {
                    name: SYSTEM_ANONYMOUS.to_owned(),
                    groups: vec![SYSTEM_UNAUTHENTICATED.to_owned()],
                    ..UserInfo::default()
                }))
            }
            None => Err(Unauthenticated),
        }
    }

    /// Whom `token` speaks for; `None` when it is of no kind that we know. `audiences` empty means the API server.
    pub fn authenticate_token(&self, token: &str, audiences: &[String]) -> Result<Option<AcceptedToken>, TokenError> {
        if self.service_accounts.claims(token) {
            let (user, audiences) = self.service_accounts.authenticate(token, audiences)?;
            return Ok(Some(AcceptedToken { user, audiences }));
        }
        let api = self.service_accounts.api_audiences();
        let shared: Vec<String> = match audiences {
            [] => api,
            wanted => api.into_iter().filter(|a| wanted.contains(a)).collect(),
        };
        if shared.is_empty() {
            return Ok(None);
        }
        let user = self.bootstrap.authenticate(token, jiff::Timestamp::now())?;
        Ok(user.map(|mut user| {
            user.groups.push(SYSTEM_AUTHENTICATED.to_owned());
            AcceptedToken { user, audiences: shared }
        }))
    }
}

fn is_anonymous_path(path: &str) -> bool {
    ANONYMOUS_PATHS.iter().any(|allowed| {
        path.strip_prefix(allowed)
            .is_some_and(|rest| rest.is_empty() || (rest.starts_with('/') && *allowed != "/version"))
    })
}

/// The token of `Authorization: Bearer` or of the WebSocket sub-protocol. A header that is there but is no bearer token (Basic,
/// say) is a wrong credential, not a missing one.
fn bearer_token(headers: &HeaderMap) -> Result<Option<String>, Unauthenticated> {
    if let Some(value) = headers.get(header::AUTHORIZATION) {
        let text = value.to_str().map_err(|_| Unauthenticated)?;
        let (scheme, token) = text.trim().split_once(' ').ok_or(Unauthenticated)?;
        let token = token.trim();
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
            return Err(Unauthenticated);
        }
        return Ok(Some(token.to_owned()));
    }
    let is_upgrade = headers.get(header::UPGRADE).is_some_and(|u| u.as_bytes().eq_ignore_ascii_case(b"websocket"));
    if !is_upgrade {
        return Ok(None);
    }
    let protocols = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    for protocol in protocols.flat_map(|value| value.split(',')) {
        if let Some(encoded) = protocol.trim().strip_prefix(WEBSOCKET_TOKEN) {
            use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
            let bytes = URL_SAFE_NO_PAD.decode(encoded).map_err(|_| Unauthenticated)?;
            return String::from_utf8(bytes).map(Some).map_err(|_| Unauthenticated);
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use crate::auth::pki::{LeafRequest, Usage};
    use crate::auth::service_account::{ObjectRef, TokenSpec};
    use serde_json::json;
    use std::time::Duration;

    struct Scene {
        keys: Arc<ClusterKeys>,
        authenticator: Authenticator,
        tokens: ServiceAccountTokens,
    }

    fn scene(world: &World) -> Scene {
        let keys = Arc::new(ClusterKeys::generate(SystemTime::now()).unwrap());
        let objects = world.objects.clone();
        let tokens = ServiceAccountTokens::new(keys.clone(), objects.clone(), "https://issuer");
        let authenticator = Authenticator::new(&keys, tokens.clone(), objects).unwrap();
        Scene { keys, authenticator, tokens }
    }

    fn authorization(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if !value.is_empty() {
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn without_credentials_only_health_and_version_answer() {
        let world = World::new();
        let Scene { authenticator, .. } = scene(&world);
        let ask = |path| {
            let identity =
                authenticator.authenticate(&PeerCertificate::None, &HeaderMap::new(), path, SystemTime::now());
            identity.map(|identity| identity.user().name.clone())
        };
        for path in ["/livez", "/readyz", "/healthz", "/version", "/readyz/etcd"] {
            assert_eq!(ask(path), Ok(SYSTEM_ANONYMOUS.to_owned()), "{path}");
        }
        for path in ["/", "/api", "/apis", "/livezz", "/version/x", "/metrics", "/openid/v1/jwks", "/api/v1/pods"] {
            assert_eq!(ask(path), Err(Unauthenticated), "{path}");
        }
    }

    #[test]
    fn a_wrong_credential_is_refused_even_where_none_is_needed() {
        let mut world = World::new();
        world.put("", "serviceaccounts", json!({ "metadata": { "namespace": "a", "name": "sa", "uid": "u" } }));
        let Scene { authenticator, tokens, .. } = scene(&world);
        let ask = |peer: &PeerCertificate, value: &str| {
            authenticator
                .authenticate(peer, &authorization(value), "/livez", SystemTime::now())
                .map(|i| i.user().name.clone())
        };
        for value in
            ["Bearer x", "Basic YTpi", "Bearer", "bearer ", "x", "Bearer a.b.c", "Bearer abcdef.0123456789abcdef"]
        {
            assert_eq!(ask(&PeerCertificate::None, value), Err(Unauthenticated), "{value}");
        }
        assert_eq!(ask(&PeerCertificate::Rejected, ""), Err(Unauthenticated));
        let spec = TokenSpec {
            namespace: "a".into(),
            service_account: ObjectRef { name: "sa".into(), uid: "u".into() },
            audiences: tokens.api_audiences(),
            expiration: 600,
            ..TokenSpec::default()
        };
        let token = tokens.issue(&spec).unwrap();
        let name = Ok("system:serviceaccount:a:sa".to_owned());
        assert_eq!(ask(&PeerCertificate::None, &format!("Bearer {token}")), name);
        assert_eq!(ask(&PeerCertificate::Rejected, &format!("bearer  {token}")), name);
    }

    #[test]
    fn a_certificate_names_the_user_while_it_lasts() {
        let world = World::new();
        let Scene { authenticator, keys, .. } = scene(&world);
        let now = SystemTime::now();
        let request = LeafRequest { common_name: "jane", organization: Some("dev"), names: &[], usage: Usage::Client };
        let leaf = keys.client_ca.issue(&request, now).unwrap();
        let judged = authenticator.judge(Some(std::slice::from_ref(&leaf.certificate)), now);
        let ask = |peer: &PeerCertificate, now| authenticator.authenticate(peer, &HeaderMap::new(), "/api", now);
        let identity = ask(&judged, now).unwrap();
        assert_eq!(identity.user().name, "jane");
        assert_eq!(identity.user().groups, ["dev", SYSTEM_AUTHENTICATED]);
        let late = now + Duration::from_secs(400 * 86_400);
        assert!(ask(&judged, late).is_err(), "a connection that outlives the certificate");
        assert!(matches!(authenticator.judge(Some(&[leaf.certificate]), late), PeerCertificate::Rejected));

        // The right name from the wrong authority, and a server's certificate, log nobody in.
        let foreign = ClusterKeys::generate(now).unwrap().client_ca.issue(&request, now).unwrap();
        assert!(matches!(authenticator.judge(Some(&[foreign.certificate]), now), PeerCertificate::Rejected));
        let server = keys.client_ca.issue(&LeafRequest { usage: Usage::Server, ..request.clone() }, now).unwrap();
        assert!(matches!(authenticator.judge(Some(&[server.certificate]), now), PeerCertificate::Rejected));
        let by_server_ca = keys.server_ca.issue(&request, now).unwrap();
        assert!(matches!(authenticator.judge(Some(&[by_server_ca.certificate]), now), PeerCertificate::Rejected));
    }
}
