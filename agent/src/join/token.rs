//! Tokens as the joiner reads them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

const FORM: &str = "K10<64 hexadecimal digits>::<user>:<secret> or K10<64 hexadecimal digits>::<id>.<secret>";

/// A token, of which the secret is told only to servers that the hash proves.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// SHA-256 of the PEM of the cluster's server CA.
    pub ca_hash: [u8; 32],
    /// What the server is told.
    pub login: Login,
}

/// The secret part.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// A token of the cluster: user (`server` or `node`) and secret.
    User(String, String),
    /// A bootstrap token: `<id>.<secret>`.
    Bootstrap(String),
}

/// Secrets don't reach logs.
impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").finish_non_exhaustive()
    }
}

/// Why a text is no token. The text itself is not repeated: it may be a secret.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadToken {
    /// Nothing there.
    #[error("the token is empty; a server prints its tokens into DATA/server/token and DATA/server/agent-token")]
    Empty,
    /// No hash in front.
    #[error(
        "the token has no CA hash in front, without which a server cannot be told from an impostor; expected {FORM}"
    )]
    NoHash,
    /// Something else.
    #[error("the token is malformed; expected {FORM}")]
    Malformed,
}

impl Token {
    /// Reads a token.
    ///
    /// # Errors
    /// See [`BadToken`].
    pub fn parse(text: &str) -> Result<Token, BadToken> {
        let text = text.trim();
        if text.is_empty() {
            return Err(BadToken::Empty);
        }
        let (hash, login) = text.strip_prefix("K10").and_then(|rest| rest.split_once("::")).ok_or(BadToken::NoHash)?;
        let ca_hash = from_hex(hash).ok_or(BadToken::Malformed)?;
        let filled = |a: &str, b: &str| !a.is_empty() && !b.is_empty();
        let login = match (login.split_once(':'), login.split_once('.')) {
            (Some((user, secret)), _) if filled(user, secret) => Login::User(user.to_owned(), secret.to_owned()),
            (None, Some((id, secret))) if filled(id, secret) => Login::Bootstrap(login.to_owned()),
            _ => return Err(BadToken::Malformed),
        };
        Ok(Token { ca_hash, login })
    }

    /// Value of the `Authorization` header.
    #[must_use]
    pub fn authorization(&self) -> String {
        match &self.login {
            Login::User(user, secret) => format!("Basic {}", STANDARD.encode(format!("{user}:{secret}"))),
            Login::Bootstrap(token) => format!("Bearer {token}"),
        }
    }
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_read_and_each_fault_has_its_message() {
        let hash = "ab".repeat(32);
        let token = Token::parse(&format!(" K10{hash}::node:s3cret\n")).unwrap();
        assert_eq!((token.ca_hash, token.authorization()), ([0xab; 32], "Basic bm9kZTpzM2NyZXQ=".to_owned()));
        let token = Token::parse(&format!("K10{hash}::abcdef.0123456789abcdef")).unwrap();
        assert_eq!(token.authorization(), "Bearer abcdef.0123456789abcdef");
        assert_eq!(Token::parse("  "), Err(BadToken::Empty));
        assert_eq!(Token::parse("s3cret"), Err(BadToken::NoHash));
        for bad in ["K10::node:x", &format!("K10{hash}::node:"), &format!("K10{hash}::node"), "K10xyz::node:x"] {
            assert_eq!(Token::parse(bad), Err(BadToken::Malformed), "{bad}");
        }
        let text = format!("{:?}", Token::parse(&format!("K10{hash}::node:s3cret")).unwrap());
        assert!(!text.contains("s3cret"), "{text}");
    }
}
