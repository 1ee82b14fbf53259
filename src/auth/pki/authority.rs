//! A certificate authority of the cluster and the leaves it issues.

use super::PkiError;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

/// Lifetime of an authority: ten years.
pub const AUTHORITY_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 60 * 60);
/// Lifetime of a leaf: one year.
pub const LEAF_LIFETIME: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// How far `notBefore` lies in the past, so that peers whose clocks are behind, or ours when it is ahead, do no harm.
const BACKDATE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// What a leaf is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    Server,
    Client,
}

/// A leaf to be issued.
#[derive(Clone, Debug)]
pub struct LeafRequest<'a> {
    /// CN; the user name of a client.
    pub common_name: &'a str,
    /// O; the group of a client.
    pub organization: Option<&'a str>,
    /// DNS names and IP addresses.
    pub names: &'a [String],
    pub usage: Usage,
}

/// A fresh key and its certificate.
pub struct Leaf {
    pub certificate: CertificateDer<'static>,
    pub certificate_pem: String,
    key: KeyPair,
    pub not_after: SystemTime,
}

impl Leaf {
    /// The private key as PKCS#8 PEM.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }

    /// The private key as rustls takes it.
    pub fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }
}

/// A P-256 certificate authority with its key.
pub struct Authority {
    certificate_pem: String,
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

fn random_serial() -> Result<SerialNumber, PkiError> {
    let mut bytes = [0u8; 16];
    SystemRandom::new().fill(&mut bytes).map_err(|_| PkiError::Random)?;
    // A positive number that keeps its length (RFC 5280, 4.1.2.2).
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

impl Authority {
    /// A new self-signed authority, valid for ten years from `now`.
    pub fn create(common_name: &str, now: SystemTime) -> Result<Authority, PkiError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + AUTHORITY_LIFETIME).into();
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate_pem = params.self_signed(&key)?.pem();
        Authority::from_pem(&certificate_pem, &key.serialize_pem())
    }

    /// An authority from its stored PEM forms.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Authority, PkiError> {
        use rustls_pki_types::pem::PemObject;
        let certificate =
            CertificateDer::from_pem_slice(certificate_pem.as_bytes()).map_err(|_| PkiError::BadAuthority)?;
        let issuer = Issuer::from_ca_cert_der(&certificate, KeyPair::from_pem(key_pem)?)?;
        let (not_before, not_after) = validity(&certificate).ok_or(PkiError::BadAuthority)?;
        Ok(Authority { certificate_pem: certificate_pem.to_owned(), certificate, issuer, not_before, not_after })
    }

    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// The private key as PKCS#8 PEM.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    pub(super) fn key_der(&self) -> Vec<u8> {
        self.issuer.key().serialize_der()
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// A fresh key with a certificate for a year from `now`, never beyond this authority's own end.
    pub fn issue(&self, request: &LeafRequest<'_>, now: SystemTime) -> Result<Leaf, PkiError> {
        let key = KeyPair::generate()?;
        let not_after = (now + LEAF_LIFETIME).min(self.not_after);
        let mut params = CertificateParams::default();
        params.not_before = (now - BACKDATE).max(self.not_before).into();
        params.not_after = not_after.into();
        params.serial_number = Some(random_serial()?);
        params.use_authority_key_identifier_extension = true;
        params.distinguished_name = DistinguishedName::new();
        if let Some(organization) = request.organization {
            params.distinguished_name.push(DnType::OrganizationName, organization);
        }
        params.distinguished_name.push(DnType::CommonName, request.common_name);
        for name in request.names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(name.as_str().try_into().map_err(|_| PkiError::BadName(name.clone()))?),
            });
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match request.usage {
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Leaf { certificate_pem: certificate.pem(), certificate: certificate.der().clone(), key, not_after })
    }
}

fn from_unix(seconds: i64) -> SystemTime {
    match u64::try_from(seconds) {
        Ok(seconds) => SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        Err(_) => SystemTime::UNIX_EPOCH,
    }
}

/// `notBefore` and `notAfter` of a certificate.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Option<(SystemTime, SystemTime)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let validity = parsed.validity();
    Some((from_unix(validity.not_before.timestamp()), from_unix(validity.not_after.timestamp())))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 60 * 60);

    #[test]
    fn a_leaf_carries_names_and_a_year_inside_its_authoritys_life() {
        let now = SystemTime::now();
        let authority = Authority::create("test-ca", now).unwrap();
        let again = Authority::from_pem(authority.certificate_pem(), &authority.key_pem()).unwrap();
        let names = ["kubernetes.default".to_owned(), "10.43.0.1".to_owned()];
        let request = LeafRequest {
            common_name: "system:admin",
            organization: Some("system:masters"),
            names: &names,
            usage: Usage::Server,
        };
        let leaf = again.issue(&request, now).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&leaf.certificate).unwrap();
        let subject = parsed.subject();
        assert_eq!(subject.iter_common_name().next().unwrap().as_str().unwrap(), "system:admin");
        assert_eq!(subject.iter_organization().next().unwrap().as_str().unwrap(), "system:masters");
        let san = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(san.value.general_names.len(), 2);
        let (not_before, not_after) = validity(&leaf.certificate).unwrap();
        assert!(not_before < now && not_after > now + 364 * DAY && not_after < now + 366 * DAY);
        let late = again.issue(&request, now + AUTHORITY_LIFETIME - 10 * DAY).unwrap();
        assert!(late.not_after <= again.not_after());
    }
}
