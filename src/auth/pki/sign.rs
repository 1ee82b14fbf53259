//! Certificates for keys that others hold. The subject of a request goes into the certificate byte for byte (a name may carry
//! several organizations, which are groups, and rcgen keeps one), so the certificate is put together here (RFC 5280).

use super::{Authority, PkiError};
use crate::auth::certificates::CertificateRequest;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};

const BOOLEAN: u8 = 0x01;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const OID: u8 = 0x06;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
/// ecdsa-with-SHA256
const ECDSA_SHA256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];
/// How far `notBefore` lies in the past, as upstream's signer has it.
const BACKDATE: Duration = Duration::from_secs(5 * 60);

/// Bits of the key usage extension, first bit first.
const KEY_USAGES: [&str; 9] = [
    "digital signature",
    "content commitment",
    "key encipherment",
    "data encipherment",
    "key agreement",
    "cert sign",
    "crl sign",
    "encipher only",
    "decipher only",
];
/// Last arc of the extended key usages below 1.3.6.1.5.5.7.3.
const EXTENDED_USAGES: [(&str, u8); 6] = [
    ("server auth", 1),
    ("client auth", 2),
    ("code signing", 3),
    ("email protection", 4),
    ("timestamping", 8),
    ("ocsp signing", 9),
];

/// Tag, length, content.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = content.len();
    if length < 0x80 {
        // Fits: below 128.
        out.push(length as u8);
    } else {
        let bytes: Vec<u8> = length.to_be_bytes().into_iter().skip_while(|byte| *byte == 0).collect();
        out.push(0x80 | bytes.len() as u8);
        out.extend(bytes);
    }
    out.extend_from_slice(content);
    out
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    element(SEQUENCE, &parts.concat())
}

fn time(at: SystemTime) -> Result<Vec<u8>, PkiError> {
    let at = jiff::Timestamp::try_from(at).map_err(|_| PkiError::BadAuthority)?.to_zoned(jiff::tz::TimeZone::UTC);
    let (year, month, day) = (at.year(), at.month(), at.day());
    let clock = format!("{month:02}{day:02}{:02}{:02}{:02}Z", at.hour(), at.minute(), at.second());
    Ok(match year {
        1950..2050 => element(UTC_TIME, format!("{:02}{clock}", year % 100).as_bytes()),
        _ => element(GENERALIZED_TIME, format!("{year:04}{clock}").as_bytes()),
    })
}

/// An extension below 2.5.29.
fn extension(arc: u8, critical: bool, value: &[u8]) -> Vec<u8> {
    let flag = if critical { element(BOOLEAN, &[0xff]) } else { Vec::new() };
    sequence(&[&element(OID, &[0x55, 0x1d, arc]), &flag, &element(OCTET_STRING, value)])
}

fn key_usage(usages: &[&str]) -> Option<Vec<u8>> {
    let mut bits = [0u8; 2];
    let set = KEY_USAGES.iter().enumerate().filter(|(_, usage)| usages.contains(usage)).map(|(at, _)| at);
    let mut last = None;
    for at in set {
        bits[at / 8] |= 0x80 >> (at % 8);
        last = Some(at);
    }
    let last = last?;
    let bytes = &bits[..=last / 8];
    // Unused bits of the last byte go first.
    let unused = (7 - last % 8) as u8;
    Some(element(BIT_STRING, &[&[unused][..], bytes].concat()))
}

fn extended_key_usage(usages: &[&str]) -> Option<Vec<u8>> {
    let mut oids = Vec::new();
    for (_, arc) in EXTENDED_USAGES.iter().filter(|(usage, _)| usages.contains(usage)) {
        oids.extend(element(OID, &[0x2b, 0x06, 0x01, 0x05, 0x05, 0x07, 0x03, *arc]));
    }
    if usages.contains(&"any") {
        oids.extend(element(OID, &[0x55, 0x1d, 0x25, 0x00]));
    }
    (!oids.is_empty()).then(|| element(SEQUENCE, &oids))
}

/// Signs the request's key and subject for `usages`, until `now + lifetime` or the authority's own end.
pub fn sign(
    authority: &Authority,
    request: &CertificateRequest,
    usages: &[&str],
    lifetime: Duration,
    now: SystemTime,
) -> Result<CertificateDer<'static>, PkiError> {
    sign_between(authority, request, usages, now - BACKDATE, now + lifetime)
}

/// Signs for this time, as far as it lies within the authority's own.
pub fn sign_between(
    authority: &Authority,
    request: &CertificateRequest,
    usages: &[&str],
    from: SystemTime,
    until: SystemTime,
) -> Result<CertificateDer<'static>, PkiError> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(authority.certificate()).map_err(|_| PkiError::BadAuthority)?;
    let issuer = parsed.subject().as_raw().to_vec();
    let key_id = parsed.iter_extensions().find_map(|extension| match extension.parsed_extension() {
        x509_parser::extensions::ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
        _ => None,
    });
    let rng = SystemRandom::new();
    let mut serial = [0u8; 16];
    rng.fill(&mut serial).map_err(|_| PkiError::Random)?;
    serial[0] = (serial[0] & 0x7f) | 0x40;

    let mut extensions: Vec<Vec<u8>> = Vec::new();
    extensions.extend(key_usage(usages).map(|value| extension(15, true, &value)));
    extensions.extend(extended_key_usage(usages).map(|value| extension(37, false, &value)));
    // Never an authority, whatever was asked for.
    extensions.push(extension(19, true, &element(SEQUENCE, &[])));
    extensions.extend(key_id.map(|id| extension(35, false, &sequence(&[&element(0x80, &id)]))));
    extensions.extend(request.alternative_names.as_ref().map(|names| extension(17, false, names)));

    let algorithm = element(SEQUENCE, &ECDSA_SHA256);
    let until = until.min(authority.not_after());
    let from = from.max(authority.not_before());
    let to_be_signed = sequence(&[
        &element(0xa0, &element(INTEGER, &[2])),
        &element(INTEGER, &serial),
        &algorithm,
        &issuer,
        &sequence(&[&time(from)?, &time(until)?]),
        &request.subject,
        &request.public_key,
        &element(0xa3, &element(SEQUENCE, &extensions.concat())),
    ]);
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &authority.key_der(), &rng)
        .map_err(|_| PkiError::BadKey)?;
    let signature = key.sign(&rng, &to_be_signed).map_err(|_| PkiError::BadKey)?;
    let bits = element(BIT_STRING, &[&[0][..], signature.as_ref()].concat());
    Ok(sequence(&[&to_be_signed, &algorithm, &bits]).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::certificates::testing::request_pem;
    use crate::auth::pki::ClusterKeys;
    use crate::auth::x509::ClientCertificates;

    #[test]
    fn a_signed_request_logs_its_subject_in() {
        let now = SystemTime::now();
        let keys = ClusterKeys::generate(now).unwrap();
        let (pem, _) = request_pem("jane", "dev", &[]);
        let request = CertificateRequest::from_pem(pem.as_bytes()).unwrap();
        let hour = Duration::from_secs(3600);
        let usages = ["client auth", "digital signature"];
        let certificate = sign(&keys.client_ca, &request, &usages, hour, now).unwrap();
        let certificates = ClientCertificates::new(&keys).unwrap();
        let (user, until) = certificates.verify(std::slice::from_ref(&certificate), now).unwrap();
        assert_eq!((user.name.as_str(), user.groups[0].as_str()), ("jane", "dev"));
        assert!(until <= now + hour && until > now + hour / 2);
        assert!(certificates.verify(&[certificate], now + 2 * hour).is_err());
        let serving = sign(&keys.client_ca, &request, &["server auth"], hour, now).unwrap();
        assert!(certificates.verify(&[serving], now).is_err(), "for servers only");
    }

    #[test]
    fn names_and_usages_are_carried_over() {
        let now = SystemTime::now();
        let keys = ClusterKeys::generate(now).unwrap();
        let (pem, _) = request_pem("system:node:n1", "system:nodes", &["n1", "10.0.0.1"]);
        let request = CertificateRequest::from_pem(pem.as_bytes()).unwrap();
        let usages = ["digital signature", "key encipherment", "server auth"];
        let der = sign(&keys.server_ca, &request, &usages, Duration::from_secs(3600), now).unwrap();
        let (rest, parsed) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(rest.is_empty());
        let names = parsed.subject_alternative_name().unwrap().unwrap();
        assert_eq!(names.value.general_names.len(), 2);
        let usage = parsed.key_usage().unwrap().unwrap().value;
        assert!(usage.digital_signature() && usage.key_encipherment() && !usage.key_cert_sign());
        assert!(!parsed.basic_constraints().unwrap().unwrap().value.ca);
        assert_eq!(parsed.validity().not_after.timestamp() - parsed.validity().not_before.timestamp(), 3900);
    }
}
