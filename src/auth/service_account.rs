//! Tokens of service accounts: ES256 JWTs bound to the account and, mostly, to a pod, secret or node. A token lives no longer
//! than what it is bound to, so every use looks those objects up.

use super::UserInfo;
use super::jwt::{self, JwtError};
use super::objects::{Meta, Metadata, ObjectError, Objects};
use super::pki::ClusterKeys;
use rand::RngCore;
use serde::Deserialize;
use serde_json::{Value, json};
use std::sync::Arc;

/// The expiry kubelet asks for in `kube-api-access-*` volumes (seconds), which upstream secretly extends.
pub const WARN_ONLY_EXPIRATION: i64 = 60 * 60 + 7;
/// What that expiry is extended to when only the API server is in the audience: a year (seconds).
pub const EXTENDED_EXPIRATION: i64 = 24 * 365 * 60 * 60;
/// Tolerated difference between clocks (seconds), as go-jose's default.
const LEEWAY: i64 = 60;

/// `name` and `uid` of a bound object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ObjectRef {
    pub name: String,
    pub uid: String,
}

impl From<&Meta> for ObjectRef {
    fn from(meta: &Meta) -> ObjectRef {
        ObjectRef { name: meta.name.clone(), uid: meta.uid.clone() }
    }
}

impl ObjectRef {
    fn claim(&self) -> Value {
        let mut claim = json!({ "name": self.name });
        if !self.uid.is_empty() {
            claim["uid"] = self.uid.as_str().into();
        }
        claim
    }
}

/// A token to be issued.
#[derive(Clone, Debug, Default)]
pub struct TokenSpec {
    pub namespace: String,
    pub service_account: ObjectRef,
    pub pod: Option<ObjectRef>,
    pub secret: Option<ObjectRef>,
    pub node: Option<ObjectRef>,
    pub audiences: Vec<String>,
    /// Seconds.
    pub expiration: i64,
    /// Seconds after which use of the token is worth a warning; 0 for none.
    pub warn_after: i64,
}

/// Why a token that claims our issuer was refused. Goes to the log and into TokenReviews, never into a 401.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(transparent)]
    Jwt(#[from] JwtError),
    #[error("service account token has expired")]
    Expired,
    #[error("service account token is not valid yet")]
    NotYet,
    #[error("service account token is issued in the future")]
    FromTheFuture,
    #[error("token audiences {token:?} is invalid for the target audiences {wanted:?}")]
    Audience { token: Vec<String>, wanted: Vec<String> },
    #[error("serviceaccounts \"{0}\" not found")]
    NoAccount(String),
    #[error("service account UID ({actual}) does not match claim ({claimed})")]
    OtherAccount { actual: String, claimed: String },
    #[error("service account {0} has been deleted")]
    DeletedAccount(String),
    #[error("service account token has been invalidated")]
    Invalidated,
    #[error("looking up what the token is bound to")]
    Objects(#[from] ObjectError),
}

#[derive(Deserialize)]
struct Claims {
    #[serde(default)]
    aud: Audience,
    exp: i64,
    #[serde(default)]
    iat: i64,
    #[serde(default)]
    nbf: i64,
    #[serde(default)]
    jti: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

/// A string or a list of them (RFC 7519, 4.1.3).
#[derive(Deserialize)]
#[serde(untagged)]
enum Audience {
    One(String),
    Many(Vec<String>),
}

impl Default for Audience {
    fn default() -> Audience {
        Audience::Many(Vec::new())
    }
}

#[derive(Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: ObjectRef,
    pod: Option<ObjectRef>,
    secret: Option<ObjectRef>,
    node: Option<ObjectRef>,
}

/// Issues and checks tokens.
#[derive(Clone)]
pub struct ServiceAccountTokens {
    keys: Arc<ClusterKeys>,
    objects: Objects,
    issuer: Arc<str>,
}

/// A random version 4 UUID (RFC 9562).
pub(crate) fn uuid() -> String {
    let mut bytes = [0u8; 16];
    rand::rng().fill_bytes(&mut bytes);
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex = super::pki::seal::to_hex(&bytes);
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn seconds_now() -> i64 {
    jiff::Timestamp::now().as_second()
}

impl ServiceAccountTokens {
    /// `issuer` is `https://kubernetes.default.svc.<cluster domain>`; it is also the audience of the API server.
    pub fn new(keys: Arc<ClusterKeys>, objects: Objects, issuer: &str) -> ServiceAccountTokens {
        ServiceAccountTokens { keys, objects, issuer: issuer.into() }
    }

    pub fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The audiences that mean this API server.
    pub fn api_audiences(&self) -> Vec<String> {
        vec![self.issuer.to_string()]
    }

    /// Signs a token.
    pub fn issue(&self, spec: &TokenSpec) -> Result<String, JwtError> {
        self.issue_at(spec, seconds_now())
    }

    fn issue_at(&self, spec: &TokenSpec, now: i64) -> Result<String, JwtError> {
        let mut kubernetes = json!({ "namespace": spec.namespace });
        for (kind, bound) in [("node", &spec.node), ("pod", &spec.pod), ("secret", &spec.secret)] {
            if let Some(bound) = bound {
                kubernetes[kind] = bound.claim();
            }
        }
        kubernetes["serviceaccount"] = spec.service_account.claim();
        if spec.warn_after != 0 {
            kubernetes["warnafter"] = (now + spec.warn_after).into();
        }
        let claims = json!({
            "aud": spec.audiences, "exp": now + spec.expiration, "iat": now, "iss": &*self.issuer, "jti": uuid(),
            "kubernetes.io": kubernetes, "nbf": now,
            "sub": format!("system:serviceaccount:{}:{}", spec.namespace, spec.service_account.name),
        });
        self.keys.service_account.first().ok_or(JwtError::BadKey)?.sign(&claims)
    }

    /// Whether `token` claims to be one of ours; only then [`ServiceAccountTokens::authenticate`] has a say.
    pub fn claims(&self, token: &str) -> bool {
        jwt::unverified_issuer(token).is_some_and(|issuer| issuer == *self.issuer)
    }

    /// The account that `token` speaks for, and the audiences that it and `wanted` (none: the API server) share.
    pub fn authenticate(&self, token: &str, wanted: &[String]) -> Result<(UserInfo, Vec<String>), TokenError> {
        self.authenticate_at(token, wanted, seconds_now())
    }

    fn authenticate_at(&self, token: &str, wanted: &[String], now: i64) -> Result<(UserInfo, Vec<String>), TokenError> {
        let claims: Claims = jwt::verify(token, &self.keys.service_account)?;
        let audiences = match claims.aud {
            Audience::One(audience) => vec![audience],
            Audience::Many(audiences) => audiences,
        };
        let wanted = if wanted.is_empty() { self.api_audiences() } else { wanted.to_vec() };
        let shared: Vec<String> = audiences.iter().filter(|a| wanted.contains(a)).cloned().collect();
        if shared.is_empty() {
            return Err(TokenError::Audience { token: audiences, wanted });
        }
        if now > claims.exp + LEEWAY {
            return Err(TokenError::Expired);
        }
        if now < claims.nbf - LEEWAY {
            return Err(TokenError::NotYet);
        }
        if now < claims.iat - LEEWAY {
            return Err(TokenError::FromTheFuture);
        }
        self.check_bound(&claims.kubernetes, now)?;
        Ok((user(&claims.kubernetes, &claims.jti), shared))
    }

    fn check_bound(&self, claims: &Kubernetes, now: i64) -> Result<(), TokenError> {
        let namespace = claims.namespace.as_str();
        let name = &claims.serviceaccount.name;
        let account: Option<Metadata> = self.objects.get("", "serviceaccounts", namespace, name)?;
        let account = account.ok_or_else(|| TokenError::NoAccount(name.clone()))?.metadata;
        if account.uid != claims.serviceaccount.uid {
            let claimed = claims.serviceaccount.uid.clone();
            return Err(TokenError::OtherAccount { actual: account.uid, claimed });
        }
        if deleted(&account, now) {
            return Err(TokenError::DeletedAccount(format!("{namespace}/{name}")));
        }
        // The node of a pod-bound token is information, not a bond.
        let node = if claims.pod.is_some() { None } else { claims.node.as_ref() };
        let bonds = [("secrets", namespace, claims.secret.as_ref()), ("pods", namespace, claims.pod.as_ref())];
        for (plural, namespace, bound) in bonds.into_iter().chain([("nodes", "", node)]) {
            let Some(bound) = bound else { continue };
            let found: Option<Metadata> = self.objects.get("", plural, namespace, &bound.name)?;
            let lives = found.is_some_and(|found| {
                found.metadata.uid == bound.uid && !bound.uid.is_empty() && !deleted(&found.metadata, now)
            });
            if !lives {
                return Err(TokenError::Invalidated);
            }
        }
        Ok(())
    }
}

/// Whether the object's time was up more than the leeway ago.
fn deleted(meta: &Meta, now: i64) -> bool {
    meta.deletion_timestamp
        .as_ref()
        .is_some_and(|at| at.parse::<jiff::Timestamp>().map_or(true, |at| at.as_second() < now - LEEWAY))
}

fn user(claims: &Kubernetes, jti: &str) -> UserInfo {
    let account = &claims.serviceaccount;
    let mut user = UserInfo::service_account(&claims.namespace, &account.name, &account.uid);
    let mut extra = |key: &str, value: String| {
        user.extra.insert(format!("authentication.kubernetes.io/{key}"), vec![value]);
    };
    for (kind, bound) in [("pod", &claims.pod), ("node", &claims.node)] {
        if let Some(bound) = bound {
            extra(&format!("{kind}-name"), bound.name.clone());
            if !bound.uid.is_empty() {
                extra(&format!("{kind}-uid"), bound.uid.clone());
            }
        }
    }
    if !jti.is_empty() {
        extra("credential-id", format!("JTI={jti}"));
    }
    user
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use std::time::SystemTime;

    const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
    const NOW: i64 = 1_800_000_000;

    fn tokens(world: &World) -> ServiceAccountTokens {
        let keys = Arc::new(ClusterKeys::generate(SystemTime::now()).unwrap());
        ServiceAccountTokens::new(keys, world.objects.clone(), ISSUER)
    }

    fn account(uid: &str) -> Value {
        json!({ "metadata": { "namespace": "a", "name": "sa", "uid": uid } })
    }

    fn spec() -> TokenSpec {
        TokenSpec {
            namespace: "a".into(),
            service_account: ObjectRef { name: "sa".into(), uid: "u1".into() },
            audiences: vec![ISSUER.into(), "vault".into()],
            expiration: 600,
            ..TokenSpec::default()
        }
    }

    #[test]
    fn a_token_speaks_for_its_account_inside_its_time_and_audience() {
        let mut world = World::new();
        world.put("", "serviceaccounts", account("u1"));
        let tokens = tokens(&world);
        let token = tokens.issue_at(&spec(), NOW).unwrap();
        assert!(tokens.claims(&token));
        let (user, audiences) = tokens.authenticate_at(&token, &[], NOW).unwrap();
        assert_eq!(user.name, "system:serviceaccount:a:sa");
        assert_eq!(user.groups, ["system:serviceaccounts", "system:serviceaccounts:a", "system:authenticated"]);
        assert_eq!(audiences, [ISSUER]);
        assert_eq!(tokens.authenticate_at(&token, &["vault".into(), "x".into()], NOW).unwrap().1, ["vault"]);
        let fails = |wanted: &[String], now| tokens.authenticate_at(&token, wanted, now).unwrap_err();
        assert!(matches!(fails(&["x".into()], NOW), TokenError::Audience { .. }));
        assert!(matches!(fails(&[], NOW + 600 + LEEWAY + 1), TokenError::Expired));
        assert!(matches!(fails(&[], NOW - LEEWAY - 1), TokenError::NotYet));
        let other = super::tests::tokens(&world);
        assert!(matches!(other.authenticate_at(&token, &[], NOW), Err(TokenError::Jwt(JwtError::UnknownKey))));
    }

    #[test]
    fn a_token_dies_with_what_it_is_bound_to() {
        let mut world = World::new();
        world.put("", "serviceaccounts", account("u1"));
        let pod = |uid: &str| json!({ "metadata": { "namespace": "a", "name": "p", "uid": uid } });
        world.put("", "pods", pod("p1"));
        let tokens = tokens(&world);
        let bound = ObjectRef { name: "p".into(), uid: "p1".into() };
        let gone = ObjectRef { name: "node".into(), uid: "gone".into() };
        let token = tokens.issue_at(&TokenSpec { pod: Some(bound), node: Some(gone), ..spec() }, NOW).unwrap();
        let check = || tokens.authenticate_at(&token, &[], NOW);
        let (user, _) = check().unwrap();
        assert_eq!(user.extra["authentication.kubernetes.io/pod-name"], ["p"]);
        assert_eq!(user.extra["authentication.kubernetes.io/node-name"], ["node"]);
        world.put("", "pods", pod("p2"));
        assert!(matches!(check(), Err(TokenError::Invalidated)));
        world.delete("", "pods", "a", "p");
        assert!(matches!(check(), Err(TokenError::Invalidated)));
        world.put("", "pods", pod("p1"));
        assert!(check().is_ok());
        let mut dying = pod("p1");
        dying["metadata"]["deletionTimestamp"] = "2020-01-01T00:00:00Z".into();
        world.put("", "pods", dying);
        assert!(matches!(check(), Err(TokenError::Invalidated)));
        world.put("", "pods", pod("p1"));
        world.put("", "serviceaccounts", account("u2"));
        assert!(matches!(check(), Err(TokenError::OtherAccount { .. })));
        world.delete("", "serviceaccounts", "a", "sa");
        assert!(matches!(check(), Err(TokenError::NoAccount(_))));
    }
}
