//! Bootstrap tokens: `<id>.<secret>`, kept as Secrets `kube-system/bootstrap-token-<id>`.

use super::UserInfo;
use super::objects::{ObjectError, Objects};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde::Deserialize;
use std::collections::BTreeMap;

const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";
const DEFAULT_GROUP: &str = "system:bootstrappers";

/// What a token is worth. Anything but [`Verdict::Unknown`] means that its secret is right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It logs this user in.
    Good(UserInfo),
    /// It did until then.
    Expired(String),
    /// There is no such token.
    Unknown,
}

/// Checks tokens against the Secrets.
#[derive(Clone)]
pub struct BootstrapTokens {
    objects: Objects,
}

#[derive(Deserialize)]
struct Secret {
    #[serde(default)]
    metadata: super::objects::Meta,
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    data: BTreeMap<String, String>,
}

impl Secret {
    fn text(&self, key: &str) -> Option<String> {
        String::from_utf8(STANDARD.decode(self.data.get(key)?).ok()?).ok()
    }
}

/// Splits `[a-z0-9]{6}.[a-z0-9]{16}`.
fn parse(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    (id.len() == 6 && secret.len() == 16 && plain(id) && plain(secret)).then_some((id, secret))
}

/// Comparison whose time does not depend on where the texts differ.
pub(crate) fn same(left: &str, right: &str) -> bool {
    left.len() == right.len() && left.bytes().zip(right.bytes()).fold(0, |difference, (l, r)| difference | (l ^ r)) == 0
}

impl BootstrapTokens {
    pub fn new(objects: Objects) -> BootstrapTokens {
        BootstrapTokens { objects }
    }

    /// The user `system:bootstrap:<id>` when the token is known, for authentication, and not expired.
    pub fn authenticate(&self, token: &str, now: jiff::Timestamp) -> Result<Option<UserInfo>, ObjectError> {
        Ok(match self.verdict(token, now)? {
            Verdict::Good(user) => Some(user),
            Verdict::Expired(_) | Verdict::Unknown => None,
        })
    }

    /// Names of the Secrets whose tokens expired before that time.
    pub fn expired_before(&self, time: jiff::Timestamp) -> Result<Vec<String>, ObjectError> {
        let secrets: Vec<Secret> = self.objects.list("", "secrets", "kube-system")?;
        let over = |secret: &Secret| {
            let at = secret.text("expiration").and_then(|at| at.parse::<jiff::Timestamp>().ok());
            secret.kind == SECRET_TYPE && at.is_some_and(|at| at < time)
        };
        Ok(secrets.into_iter().filter(over).map(|secret| secret.metadata.name).collect())
    }

    /// What there is to say about a token to somebody who shows it.
    pub fn verdict(&self, token: &str, now: jiff::Timestamp) -> Result<Verdict, ObjectError> {
        let Some((id, secret)) = parse(token) else { return Ok(Verdict::Unknown) };
        let name = format!("bootstrap-token-{id}");
        let Some(stored): Option<Secret> = self.objects.get("", "secrets", "kube-system", &name)? else {
            return Ok(Verdict::Unknown);
        };
        let matches = stored.kind == SECRET_TYPE
            && stored.metadata.deletion_timestamp.is_none()
            && stored.text("token-id").is_some_and(|stored| stored == id)
            && stored.text("token-secret").is_some_and(|stored| same(&stored, secret))
            && stored.text("usage-bootstrap-authentication").is_some_and(|usage| usage == "true");
        if !matches {
            return Ok(Verdict::Unknown);
        }
        if let Some(at) = stored.text("expiration")
            && !at.parse::<jiff::Timestamp>().is_ok_and(|at| now < at)
        {
            return Ok(Verdict::Expired(at));
        }
        let mut groups = vec![DEFAULT_GROUP.to_owned()];
        for group in stored.text("auth-extra-groups").unwrap_or_default().split(',').filter(|g| !g.is_empty()) {
            if !group.starts_with("system:bootstrappers:") {
                return Ok(Verdict::Unknown);
            }
            groups.push(group.to_owned());
        }
        Ok(Verdict::Good(UserInfo { name: format!("system:bootstrap:{id}"), groups, ..UserInfo::default() }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use serde_json::json;

    #[test]
    fn a_token_must_be_known_meant_for_login_and_alive() {
        let mut world = World::new();
        let tokens = BootstrapTokens::new(world.objects.clone());
        let now: jiff::Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut put = |changes: &[(&str, &str)]| {
            let mut data = json!({});
            let standard = [
                ("token-id", "abcdef"),
                ("token-secret", "0123456789abcdef"),
                ("usage-bootstrap-authentication", "true"),
                ("expiration", "2026-01-02T00:00:00Z"),
                ("auth-extra-groups", "system:bootstrappers:agents"),
            ];
            for (key, value) in standard.iter().chain(changes) {
                data[*key] = STANDARD.encode(value).into();
            }
            let meta = json!({ "namespace": "kube-system", "name": "bootstrap-token-abcdef" });
            world.put("", "secrets", json!({ "metadata": meta, "type": SECRET_TYPE, "data": data }));
        };
        let ask = |token: &str| tokens.authenticate(token, now).unwrap();
        let good = "abcdef.0123456789abcdef";
        assert_eq!(ask(good), None);
        put(&[]);
        let expired = |at: &str| tokens.expired_before(at.parse().unwrap()).unwrap();
        assert!(expired("2026-01-02T00:00:00Z").is_empty());
        assert_eq!(expired("2026-01-02T00:00:01Z"), ["bootstrap-token-abcdef"]);
        let user = ask(good).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert_eq!(user.groups, [DEFAULT_GROUP, "system:bootstrappers:agents"]);
        for bad in ["abcdef.0123456789abcdee", "abcdeg.0123456789abcdef", "ABCDEF.0123456789abcdef", "abcdef.", "x"] {
            assert_eq!(ask(bad), None, "{bad}");
        }
        for change in [
            ("expiration", "2025-12-31T00:00:00Z"),
            ("expiration", "soon"),
            ("usage-bootstrap-authentication", "false"),
            ("auth-extra-groups", "system:masters"),
        ] {
            put(&[change]);
            assert_eq!(ask(good), None, "{change:?}");
        }
    }
}
