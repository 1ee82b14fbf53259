//! Certificate signing requests: what they ask for, and whether a built-in signer may sign it.

use super::pki::server_name;
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::Value;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::OID_X509_EXT_SUBJECT_ALT_NAME;
use x509_parser::prelude::FromDer;

pub const KUBE_APISERVER_CLIENT: &str = "kubernetes.io/kube-apiserver-client";
pub const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
pub const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
pub const LEGACY_UNKNOWN: &str = "kubernetes.io/legacy-unknown";

/// Why a request cannot be used; the texts end up in conditions and refusals.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("PEM block type must be CERTIFICATE REQUEST")]
    NotPem,
    #[error("the certificate request cannot be parsed")]
    Malformed,
    #[error("the certificate request's signature does not verify")]
    BadSignature,
    #[error("{0}")]
    Refused(String),
}

/// The content of a PKCS#10 request, its signature checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateRequest {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub dns_names: Vec<String>,
    pub ip_addresses: Vec<Vec<u8>>,
    pub emails: Vec<String>,
    pub uris: Vec<String>,
    /// DER of the subject and of the public key, as they go into the certificate.
    pub subject: Vec<u8>,
    pub public_key: Vec<u8>,
    /// DER of the subject alternative names' value, if there are any.
    pub alternative_names: Option<Vec<u8>>,
}

impl CertificateRequest {
    /// Reads `spec.request` of a CertificateSigningRequest object.
    pub fn of(object: &Value) -> Result<CertificateRequest, RequestError> {
        let encoded = object["spec"]["request"].as_str().ok_or(RequestError::NotPem)?;
        let pem = STANDARD.decode(encoded).map_err(|_| RequestError::NotPem)?;
        CertificateRequest::from_pem(&pem)
    }

    /// Reads PEM.
    pub fn from_pem(pem: &[u8]) -> Result<CertificateRequest, RequestError> {
        let (_, block) = x509_parser::pem::parse_x509_pem(pem).map_err(|_| RequestError::NotPem)?;
        if block.label != "CERTIFICATE REQUEST" {
            return Err(RequestError::NotPem);
        }
        let (rest, request) =
            X509CertificationRequest::from_der(&block.contents).map_err(|_| RequestError::Malformed)?;
        if !rest.is_empty() {
            return Err(RequestError::Malformed);
        }
        request.verify_signature().map_err(|_| RequestError::BadSignature)?;
        let info = &request.certification_request_info;
        let text = |attribute: &x509_parser::x509::AttributeTypeAndValue<'_>| {
            attribute.as_str().map(str::to_owned).map_err(|_| RequestError::Malformed)
        };
        let mut parsed = CertificateRequest {
            common_name: info.subject.iter_common_name().last().map(text).transpose()?.unwrap_or_default(),
            organizations: info.subject.iter_organization().map(text).collect::<Result<_, _>>()?,
            dns_names: Vec::new(),
            ip_addresses: Vec::new(),
            emails: Vec::new(),
            uris: Vec::new(),
            subject: info.subject.as_raw().to_vec(),
            public_key: info.subject_pki.raw.to_vec(),
            alternative_names: None,
        };
        for extension in request.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(names) = extension {
                parsed.add_names(&names.general_names)?;
            }
        }
        for attribute in info.iter_attributes() {
            if let ParsedCriAttribute::ExtensionRequest(asked) = attribute.parsed_attribute() {
                let names = asked.extensions.iter().find(|e| e.oid == OID_X509_EXT_SUBJECT_ALT_NAME);
                parsed.alternative_names = names.map(|extension| extension.value.to_vec());
            }
        }
        Ok(parsed)
    }

    fn add_names(&mut self, names: &[GeneralName<'_>]) -> Result<(), RequestError> {
        for name in names {
            match name {
                GeneralName::DNSName(name) => self.dns_names.push((*name).to_owned()),
                GeneralName::IPAddress(bytes) => self.ip_addresses.push(bytes.to_vec()),
                GeneralName::RFC822Name(name) => self.emails.push((*name).to_owned()),
                GeneralName::URI(name) => self.uris.push((*name).to_owned()),
                // A kind of name that nobody judges must not end up in a certificate.
                _ => return Err(RequestError::Malformed),
            }
        }
        Ok(())
    }
}

/// CN of the request in a CertificateSigningRequest object.
pub fn request_common_name(object: &Value) -> Result<String, RequestError> {
    Ok(CertificateRequest::of(object)?.common_name)
}

fn refused(why: impl Into<String>) -> RequestError {
    RequestError::Refused(why.into())
}

/// Whether the signer may sign this request with these usages.
pub fn check(signer: &str, request: &CertificateRequest, usages: &[&str]) -> Result<(), RequestError> {
    if server_name::is_reserved(&request.common_name, &request.organizations, &request.dns_names) {
        return Err(refused("the names of servers are not given to others"));
    }
    match signer {
        KUBE_APISERVER_CLIENT => check_client_usages(usages),
        KUBELET_CLIENT => check_kubelet_client(request, usages),
        KUBELET_SERVING => check_kubelet_serving(request, usages),
        LEGACY_UNKNOWN => Ok(()),
        other => Err(refused(format!("unrecognized signerName: {other:?}"))),
    }
}

fn check_client_usages(usages: &[&str]) -> Result<(), RequestError> {
    let odd = usages.iter().find(|u| !matches!(**u, "digital signature" | "key encipherment" | "client auth"));
    if let Some(odd) = odd {
        return Err(refused(format!("invalid usage for client certificate: {odd}")));
    }
    if usages.contains(&"client auth") {
        Ok(())
    } else {
        Err(refused("missing required usage for client certificate: client auth"))
    }
}

fn check_node_subject(request: &CertificateRequest) -> Result<(), RequestError> {
    if request.organizations != ["system:nodes"] {
        return Err(refused("subject organization is not system:nodes"));
    }
    if !request.common_name.starts_with("system:node:") {
        return Err(refused("subject common name does not begin with system:node:"));
    }
    Ok(())
}

fn check_usages(usages: &[&str], last: &str) -> Result<(), RequestError> {
    let mut sorted = usages.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let mut full = ["digital signature", "key encipherment", last];
    full.sort_unstable();
    let mut short = ["digital signature", last];
    short.sort_unstable();
    if sorted == full || sorted == short {
        return Ok(());
    }
    Err(refused(format!("usages did not match [{}]", full.join(" "))))
}

fn check_kubelet_client(request: &CertificateRequest, usages: &[&str]) -> Result<(), RequestError> {
    check_node_subject(request)?;
    for (names, what) in [
        (request.dns_names.is_empty(), "DNS subjectAltNames are not allowed"),
        (request.emails.is_empty(), "Email subjectAltNames are not allowed"),
        (request.ip_addresses.is_empty(), "IP subjectAltNames are not allowed"),
        (request.uris.is_empty(), "URI subjectAltNames are not allowed"),
    ] {
        if !names {
            return Err(refused(what));
        }
    }
    check_usages(usages, "client auth")
}

fn check_kubelet_serving(request: &CertificateRequest, usages: &[&str]) -> Result<(), RequestError> {
    check_node_subject(request)?;
    if request.dns_names.is_empty() && request.ip_addresses.is_empty() {
        return Err(refused("DNS or IP subjectAltName is required"));
    }
    if !request.emails.is_empty() {
        return Err(refused("Email subjectAltNames are not allowed"));
    }
    if !request.uris.is_empty() {
        return Err(refused("URI subjectAltNames are not allowed"));
    }
    check_usages(usages, "server auth")
}

#[cfg(test)]
pub(crate) mod testing {
    //! Requests made with rcgen.

    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    pub fn request_pem(common_name: &str, organization: &str, names: &[&str]) -> (String, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.distinguished_name.push(DnType::CommonName, common_name);
        (params.serialize_request(&key).unwrap().pem().unwrap(), key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(common_name: &str, organization: &str, names: &[&str]) -> CertificateRequest {
        CertificateRequest::from_pem(testing::request_pem(common_name, organization, names).0.as_bytes()).unwrap()
    }

    #[test]
    fn signers_accept_their_kind_of_request_only() {
        let node = request("system:node:n1", "system:nodes", &[]);
        let serving = request("system:node:n1", "system:nodes", &["n1", "10.0.0.1"]);
        let jane = request("jane", "dev", &[]);
        let client = ["digital signature", "client auth"];
        let server = ["digital signature", "key encipherment", "server auth"];
        assert_eq!(check(KUBELET_CLIENT, &node, &client), Ok(()));
        assert_eq!(check(KUBELET_SERVING, &serving, &server), Ok(()));
        assert_eq!(check(KUBE_APISERVER_CLIENT, &jane, &client), Ok(()));
        for (signer, request, usages, why) in [
            (KUBELET_CLIENT, &jane, &client[..], "subject organization is not system:nodes"),
            (KUBELET_CLIENT, &serving, &client, "DNS subjectAltNames are not allowed"),
            (KUBELET_CLIENT, &node, &server, "usages did not match [client auth digital signature key encipherment]"),
            (KUBELET_SERVING, &node, &server, "DNS or IP subjectAltName is required"),
            (KUBE_APISERVER_CLIENT, &jane, &server, "invalid usage for client certificate: server auth"),
            (KUBE_APISERVER_CLIENT, &jane, &client[..1], "missing required usage for client certificate: client auth"),
        ] {
            assert_eq!(check(signer, request, usages), Err(refused(why)));
        }
    }

    #[test]
    fn garbage_is_refused_not_believed() {
        for bad in ["", "x", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"] {
            assert!(CertificateRequest::from_pem(bad.as_bytes()).is_err(), "{bad}");
        }
        let (pem, _) = testing::request_pem("jane", "dev", &[]);
        let mut der = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap().1.contents;
        let at = der.windows(4).position(|w| w == b"jane").unwrap();
        der[at] = b'J';
        let body = STANDARD.encode(&der);
        let altered = format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n");
        assert_eq!(CertificateRequest::from_pem(altered.as_bytes()), Err(RequestError::BadSignature));
    }
}
