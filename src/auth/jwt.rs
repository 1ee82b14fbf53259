//! JSON Web Tokens signed with ES256 (RFC 7515, RFC 7518 section 3.4): compact form only, one algorithm only.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// DER of a P-256 SubjectPublicKeyInfo up to the point (RFC 5480).
const SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// No token of ours is longer; longer input is not looked at.
const MAX_TOKEN: usize = 16 * 1024;

/// Why a token was refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("the token is malformed")]
    Malformed,
    #[error("invalid signature, no keys found")]
    UnknownKey,
    #[error("the token's signature is not valid")]
    BadSignature,
    #[error("a signing key was refused")]
    BadKey,
}

/// A P-256 key that signs tokens.
pub struct SigningKey {
    pkcs8: Vec<u8>,
    pair: EcdsaKeyPair,
    key_id: String,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").field("key_id", &self.key_id).finish_non_exhaustive()
    }
}

impl SigningKey {
    pub fn generate() -> Result<SigningKey, JwtError> {
        let rng = SystemRandom::new();
        let pkcs8 =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &rng).map_err(|_| JwtError::BadKey)?;
        SigningKey::from_pkcs8(pkcs8.as_ref().to_vec())
    }

    fn from_pkcs8(pkcs8: Vec<u8>) -> Result<SigningKey, JwtError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8, &SystemRandom::new())
            .map_err(|_| JwtError::BadKey)?;
        let spki = [SPKI_PREFIX.as_slice(), pair.public_key().as_ref()].concat();
        let key_id = URL_SAFE_NO_PAD.encode(digest(&SHA256, &spki));
        Ok(SigningKey { pkcs8, pair, key_id })
    }

    /// From PKCS#8 PEM.
    pub fn from_pem(pem: &str) -> Result<SigningKey, JwtError> {
        use rustls_pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(|_| JwtError::BadKey)?;
        SigningKey::from_pkcs8(key.secret_pkcs8_der().to_vec())
    }

    /// As PKCS#8 PEM.
    pub fn to_pem(&self) -> String {
        pem("PRIVATE KEY", &self.pkcs8)
    }

    /// Base64url of the SHA-256 of the public key's DER, as upstream derives it.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// The public half as a JSON Web Key (RFC 7517).
    pub fn jwk(&self) -> Value {
        let point = self.pair.public_key().as_ref();
        json!({
            "use": "sig", "kty": "EC", "kid": self.key_id, "crv": "P-256", "alg": "ES256",
            "x": URL_SAFE_NO_PAD.encode(&point[1..33]), "y": URL_SAFE_NO_PAD.encode(&point[33..65]),
        })
    }

    /// A signed token with these claims.
    pub fn sign(&self, claims: &Value) -> Result<String, JwtError> {
        let header = json!({ "alg": "ES256", "kid": self.key_id });
        let mut token = URL_SAFE_NO_PAD.encode(header.to_string());
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(claims.to_string(), &mut token);
        let signature = self.pair.sign(&SystemRandom::new(), token.as_bytes()).map_err(|_| JwtError::BadKey)?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
        Ok(token)
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    #[serde(default)]
    kid: String,
}

/// The issuer a token claims, before anything about it is verified: decides which authenticator looks at it.
pub fn unverified_issuer(token: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Issuer {
        iss: String,
    }
    let mut parts = token.split('.');
    let (_, claims, _) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || token.len() > MAX_TOKEN {
        return None;
    }
    let claims = URL_SAFE_NO_PAD.decode(claims).ok()?;
    Some(serde_json::from_slice::<Issuer>(&claims).ok()?.iss)
}

/// The claims of `token` when one of `keys` signed it. Nothing inside the claims is judged here.
pub fn verify<T: serde::de::DeserializeOwned>(token: &str, keys: &[SigningKey]) -> Result<T, JwtError> {
    if token.len() > MAX_TOKEN {
        return Err(JwtError::Malformed);
    }
    let (signed, signature) = token.rsplit_once('.').ok_or(JwtError::Malformed)?;
    let (header, claims) = signed.split_once('.').ok_or(JwtError::Malformed)?;
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| JwtError::Malformed);
    let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| JwtError::Malformed)?;
    if header.alg != "ES256" {
        return Err(JwtError::BadSignature);
    }
    let signature = decode(signature)?;
    let mut candidates = keys.iter().filter(|key| header.kid.is_empty() || key.key_id == header.kid).peekable();
    if candidates.peek().is_none() {
        return Err(JwtError::UnknownKey);
    }
    let valid = candidates.any(|key| {
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.pair.public_key().as_ref())
            .verify(signed.as_bytes(), &signature)
            .is_ok()
    });
    if !valid {
        return Err(JwtError::BadSignature);
    }
    serde_json::from_slice(&decode(claims)?).map_err(|_| JwtError::Malformed)
}

/// PEM of a DER value.
pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    for line in body.as_bytes().chunks(64) {
        text.push_str(&String::from_utf8_lossy(line));
        text.push('\n');
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_untouched_token_of_a_known_key_verifies() {
        let key = SigningKey::from_pem(&SigningKey::generate().unwrap().to_pem()).unwrap();
        let stranger = SigningKey::generate().unwrap();
        let token = key.sign(&json!({ "iss": "me", "sub": "you" })).unwrap();
        let keys = [stranger, key];
        assert_eq!(verify::<Value>(&token, &keys).unwrap()["sub"], "you");
        assert_eq!(unverified_issuer(&token).as_deref(), Some("me"));
        assert_eq!(verify::<Value>(&token, &keys[..1]), Err(JwtError::UnknownKey));

        let parts: Vec<&str> = token.split('.').collect();
        let claims = URL_SAFE_NO_PAD.encode(r#"{"iss":"me","sub":"root"}"#);
        let none = URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#);
        let hmac = URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#);
        let unkeyed = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256"}"#);
        for forged in [
            format!("{}.{claims}.{}", parts[0], parts[2]),
            format!("{none}.{claims}."),
            format!("{hmac}.{}.{}", parts[1], parts[2]),
            format!("{unkeyed}.{}.{}", parts[1], parts[2]),
            format!("{}.{}.{}", parts[0], parts[1], "AAAA"),
        ] {
            assert_eq!(verify::<Value>(&forged, &keys), Err(JwtError::BadSignature), "{forged}");
        }
        for malformed in ["", ".", "..", "a.b.c", &format!("{token}."), &"x".repeat(MAX_TOKEN + 1)] {
            assert!(verify::<Value>(malformed, &keys).is_err(), "{malformed}");
        }
    }
}
