//! The token a machine joins with: `K10<sha256 of the server CA bundle>::<user>:<secret>`. The hash lets the joiner check
//! the server before it says anything secret.

use super::seal::to_hex;
use ring::digest::{SHA256, digest};

const PREFIX: &str = "K10";

/// A parsed or freshly formatted join token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// Lower-case hexadecimal SHA-256 of the PEM bundle of the server CA.
    pub ca_hash: String,
    /// `server` or `node`.
    pub user: String,
    pub secret: String,
}

/// Why a token was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a join token of the form K10<64 hexadecimal digits>::<user>:<secret>")]
pub struct BadJoinToken;

/// Hash of a CA bundle as tokens carry it.
pub fn ca_hash(bundle_pem: &str) -> String {
    to_hex(digest(&SHA256, bundle_pem.as_bytes()).as_ref())
}

impl JoinToken {
    pub fn new(bundle_pem: &str, user: &str, secret: &str) -> JoinToken {
        JoinToken { ca_hash: ca_hash(bundle_pem), user: user.to_owned(), secret: secret.to_owned() }
    }

    pub fn parse(text: &str) -> Result<JoinToken, BadJoinToken> {
        let (ca_hash, login) =
            text.trim().strip_prefix(PREFIX).and_then(|rest| rest.split_once("::")).ok_or(BadJoinToken)?;
        let (user, secret) = login.split_once(':').ok_or(BadJoinToken)?;
        let hex = ca_hash.len() == 64 && ca_hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !hex || user.is_empty() || secret.is_empty() {
            return Err(BadJoinToken);
        }
        Ok(JoinToken { ca_hash: ca_hash.to_owned(), user: user.to_owned(), secret: secret.to_owned() })
    }

    /// Whether `bundle_pem` is the bundle this token was made for.
    pub fn trusts(&self, bundle_pem: &str) -> bool {
        self.ca_hash == ca_hash(bundle_pem)
    }
}

impl std::fmt::Display for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{PREFIX}{}::{}:{}", self.ca_hash, self.user, self.secret)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_it_prints_and_nothing_else() {
        let token = JoinToken::new("bundle", "server", "s3cret");
        assert_eq!(JoinToken::parse(&format!("{token}\n")), Ok(token.clone()));
        assert!(token.trusts("bundle") && !token.trusts("bundle "));
        let hash = ca_hash("bundle");
        for bad in ["", "K10", "K10ab::server:x", &format!("K11{hash}::server:x"), &format!("K10{hash}:server:x")] {
            assert_eq!(JoinToken::parse(bad), Err(BadJoinToken), "{bad}");
        }
        for bad in [format!("K10{hash}::server:"), format!("K10{hash}:::x"), format!("K10{hash}::server")] {
            assert_eq!(JoinToken::parse(&bad), Err(BadJoinToken), "{bad}");
        }
    }
}
