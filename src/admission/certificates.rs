//! CertificateApproval, CertificateSigning, CertificateSubjectRestriction; and who asked, which only the server says.

use super::{Request, World};
use crate::apiserver::status::Status;
use crate::auth::Attributes;
use crate::auth::certificates::{CertificateRequest, KUBE_APISERVER_CLIENT};
use crate::auth::identity::SYSTEM_MASTERS;
use crate::auth::reviews::user_value;

const GROUP: &str = "certificates.k8s.io";
const RESOURCE: &str = "certificatesigningrequests";

/// Writes the caller into a new request, whatever it claims; keeps the spec of an existing one.
pub fn mutate(request: &mut Request<'_>) {
    if request.group != GROUP || request.resource != RESOURCE {
        return;
    }
    if request.creates() && request.object["spec"].is_object() {
        let user = user_value(request.identity.user());
        let spec = &mut request.object["spec"];
        for field in ["username", "uid", "groups", "extra"] {
            match user.get(field) {
                Some(value) => spec[field] = value.clone(),
                None => drop(spec.as_object_mut().and_then(|spec| spec.remove(field))),
            }
        }
    } else if let (true, Some(old)) = (request.updates(), request.old) {
        request.object["spec"] = old["spec"].clone();
    }
}

pub fn validate(world: &World, request: &Request<'_>) -> Result<(), Status> {
    if request.group != GROUP || request.resource != RESOURCE {
        return Ok(());
    }
    match (request.subresource, request.old) {
        ("approval", Some(old)) if request.updates() => {
            let signer = old["spec"]["signerName"].as_str().unwrap_or("");
            permitted(world, request, "approve", signer)
        }
        ("status", Some(old)) if request.updates() => {
            let same = |field: &str| old["status"][field] == request.object["status"][field];
            if same("certificate") && same("conditions") {
                return Ok(());
            }
            let signer = old["spec"]["signerName"].as_str().unwrap_or("");
            permitted(world, request, "sign", signer)
        }
        ("", _) if request.object["spec"]["signerName"] == KUBE_APISERVER_CLIENT => {
            let parsed = CertificateRequest::of(request.object)
                .map_err(|error| request.forbidden(format_args!("failed to parse CSR: {error}")))?;
            if parsed.organizations.iter().any(|group| group == SYSTEM_MASTERS) {
                return Err(request.forbidden(format_args!(
                    "use of {KUBE_APISERVER_CLIENT} signer with system:masters group is not allowed"
                )));
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The right to `verb` requests for this signer, or for all signers of its domain.
fn permitted(world: &World, request: &Request<'_>, verb: &str, signer: &str) -> Result<(), Status> {
    let domain = signer.split_once('/').map_or(signer, |(domain, _)| domain);
    let wildcard = format!("{domain}/*");
    let allowed = [signer, &wildcard].into_iter().any(|name| {
        let attributes = Attributes {
            verb,
            group: GROUP,
            version: "*",
            resource: "signers",
            name,
            is_resource: true,
            ..Attributes::default()
        };
        world.authorizer.authorize(request.identity, &attributes).allowed
    });
    if allowed {
        return Ok(());
    }
    Err(request.forbidden(format_args!("user not permitted to {verb} requests with signerName \"{signer}\"")))
}
