//! Everything secret that the servers of a cluster share.

use super::seal::to_hex;
use super::{Authority, PkiError};
use crate::auth::jwt::SigningKey;
use ring::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};
use std::time::SystemTime;

/// The authorities, the service-account key and the secrets of the join tokens.
#[derive(Debug)]
pub struct ClusterKeys {
    /// Signs serving certificates; clients trust it.
    pub server_ca: Authority,
    /// Signs client certificates: what it signs names a user.
    pub client_ca: Authority,
    /// Signs the front proxy's certificate towards aggregated API servers.
    pub request_header_ca: Authority,
    /// Keys of service-account tokens; the first signs, all verify.
    pub service_account: Vec<SigningKey>,
    /// Secret of the token that servers and agents join with.
    pub server_secret: String,
    /// Secret of the token that only agents join with.
    pub agent_secret: String,
}

/// The record form; JSON inside the seal.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    server_ca: Pair,
    client_ca: Pair,
    request_header_ca: Pair,
    /// PKCS#8 PEM.
    service_account: Vec<String>,
    server_secret: String,
    agent_secret: String,
}

#[derive(Serialize, Deserialize)]
struct Pair {
    certificate: String,
    key: String,
}

impl Pair {
    fn of(authority: &Authority) -> Pair {
        Pair { certificate: authority.certificate_pem().to_owned(), key: authority.key_pem() }
    }

    fn open(&self) -> Result<Authority, PkiError> {
        Authority::from_pem(&self.certificate, &self.key)
    }
}

fn random_secret() -> Result<String, PkiError> {
    let mut bytes = [0u8; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| PkiError::Random)?;
    Ok(to_hex(&bytes))
}

impl ClusterKeys {
    /// Keys for a new cluster. The authorities' names carry the time, so that those of two clusters never look alike.
    pub fn generate(now: SystemTime) -> Result<ClusterKeys, PkiError> {
        let seconds = now.duration_since(SystemTime::UNIX_EPOCH).map(|d| d.as_secs()).unwrap_or_default();
        let authority = |name: &str| Authority::create(&format!("coracle-{name}-ca@{seconds}"), now);
        Ok(ClusterKeys {
            server_ca: authority("server")?,
            client_ca: authority("client")?,
            request_header_ca: authority("request-header")?,
            service_account: vec![SigningKey::generate().map_err(|_| PkiError::BadKey)?],
            server_secret: random_secret()?,
            agent_secret: random_secret()?,
        })
    }

    /// Replaces the secrets of both join tokens; what they let in before stays.
    pub(super) fn renew_secrets(&mut self) -> Result<(), PkiError> {
        self.server_secret = random_secret()?;
        self.agent_secret = random_secret()?;
        Ok(())
    }

    pub(super) fn to_record(&self) -> Result<Vec<u8>, PkiError> {
        let record = Record {
            server_ca: Pair::of(&self.server_ca),
            client_ca: Pair::of(&self.client_ca),
            request_header_ca: Pair::of(&self.request_header_ca),
            service_account: self.service_account.iter().map(SigningKey::to_pem).collect(),
            server_secret: self.server_secret.clone(),
            agent_secret: self.agent_secret.clone(),
        };
        serde_json::to_vec(&record).map_err(PkiError::BadRecord)
    }

    pub(super) fn from_record(bytes: &[u8]) -> Result<ClusterKeys, PkiError> {
        let record: Record = serde_json::from_slice(bytes).map_err(PkiError::BadRecord)?;
        let service_account: Vec<SigningKey> = record
            .service_account
            .iter()
            .map(|pem| SigningKey::from_pem(pem).map_err(|_| PkiError::BadKey))
            .collect::<Result<_, _>>()?;
        if service_account.is_empty() {
            return Err(PkiError::BadKey);
        }
        Ok(ClusterKeys {
            server_ca: record.server_ca.open()?,
            client_ca: record.client_ca.open()?,
            request_header_ca: record.request_header_ca.open()?,
            service_account,
            server_secret: record.server_secret,
            agent_secret: record.agent_secret,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_brings_back_the_same_keys() {
        let keys = ClusterKeys::generate(SystemTime::now()).unwrap();
        let again = ClusterKeys::from_record(&keys.to_record().unwrap()).unwrap();
        assert_eq!(again.server_ca.certificate_pem(), keys.server_ca.certificate_pem());
        assert_eq!(again.service_account[0].key_id(), keys.service_account[0].key_id());
        assert_eq!(again.agent_secret, keys.agent_secret);
        assert_ne!(keys.agent_secret, keys.server_secret);
        assert!(matches!(ClusterKeys::from_record(b"{}"), Err(PkiError::BadRecord(_))));
    }
}
