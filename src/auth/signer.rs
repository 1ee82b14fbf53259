//! The built-in signers: approves the certificate requests of kubelets that may have them, signs what is approved.

use super::certificates::{self, CertificateRequest, KUBELET_CLIENT, KUBELET_SERVING};
use super::follow::Client;
use super::objects::Objects;
use super::pki::{ClusterKeys, sign};
use super::reviews::asked_user;
use super::{Attributes, Authorizer};
use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const GROUP: &str = "certificates.k8s.io";
const PATH: &str = "/apis/certificates.k8s.io/v1/certificatesigningrequests";
/// Key prefix of what is watched.
pub const PREFIX: &str = "/registry/certificates.k8s.io/certificatesigningrequests/";
/// The longest and the shortest life of a signed certificate.
const LIFETIME: (Duration, Duration) = (Duration::from_secs(365 * 24 * 60 * 60), Duration::from_secs(600));

/// What the loop decides by.
pub struct Signer {
    pub keys: Arc<ClusterKeys>,
    pub authorizer: Authorizer,
    pub client: Client,
}

/// What is to be done with one request.
#[derive(Debug, PartialEq)]
enum Step {
    Approve(&'static str),
    Fail(String),
    Sign,
}

fn condition<'a>(csr: &'a Value, kind: &str) -> Option<&'a Value> {
    csr["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == kind && c["status"] == "True")
}

fn usages(csr: &Value) -> Vec<&str> {
    csr["spec"]["usages"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

impl Signer {
    /// Looks at every request once.
    pub async fn sweep(&self, objects: &Objects) {
        let all: Vec<Value> = match objects.list_versioned(GROUP, "certificatesigningrequests") {
            Ok(all) => all,
            Err(error) => return tracing::error!(%error, "reading certificate requests"),
        };
        for csr in all {
            let Some(step) = self.plan(&csr) else { continue };
            if let Err(error) = self.act(csr, step).await {
                tracing::warn!(%error, "handling a certificate request");
            }
        }
    }

    fn plan(&self, csr: &Value) -> Option<Step> {
        if csr["status"]["certificate"].as_str().is_some_and(|c| !c.is_empty())
            || condition(csr, "Denied").is_some()
            || condition(csr, "Failed").is_some()
        {
            return None;
        }
        let signer = csr["spec"]["signerName"].as_str()?;
        if !signer.starts_with("kubernetes.io/") {
            return None;
        }
        let request = CertificateRequest::of(csr);
        if condition(csr, "Approved").is_none() {
            let request = request.ok()?;
            let is_kubelets = signer == KUBELET_CLIENT && certificates::check(signer, &request, &usages(csr)).is_ok();
            return if is_kubelets { self.approval(csr, &request).map(Step::Approve) } else { None };
        }
        let checked = request.and_then(|request| certificates::check(signer, &request, &usages(csr)));
        Some(checked.map_or_else(|error| Step::Fail(error.to_string()), |()| Step::Sign))
    }

    /// Why the kubelet may have its certificate without anybody's approval.
    fn approval(&self, csr: &Value, request: &CertificateRequest) -> Option<&'static str> {
        let mut user = asked_user(&csr["spec"]);
        user.name = csr["spec"]["username"].as_str().unwrap_or("").to_owned();
        let may = |subresource| {
            let attributes = Attributes {
                verb: "create",
                group: GROUP,
                version: "*",
                resource: "certificatesigningrequests",
                subresource,
                is_resource: true,
                ..Attributes::default()
            };
            self.authorizer.authorize_user(&user, &attributes).allowed
        };
        if user.name == request.common_name && may("selfnodeclient") {
            return Some("Auto approving self kubelet client certificate after SubjectAccessReview.");
        }
        may("nodeclient").then_some("Auto approving kubelet client certificate after SubjectAccessReview.")
    }

    async fn act(&self, mut csr: Value, step: Step) -> Result<(), kube::Error> {
        let now = super::token_request::timestamp(jiff::Timestamp::now());
        let add = |csr: &mut Value, kind: &str, reason: &str, message: &str| {
            let condition = json!({ "type": kind, "status": "True", "reason": reason, "message": message,
                "lastUpdateTime": now, "lastTransitionTime": now });
            match csr["status"]["conditions"].as_array_mut() {
                Some(conditions) => conditions.push(condition),
                None => csr["status"]["conditions"] = json!([condition]),
            }
        };
        let subresource = match step {
            Step::Approve(message) => {
                add(&mut csr, "Approved", "AutoApproved", message);
                "approval"
            }
            Step::Fail(message) => {
                add(&mut csr, "Failed", "SignerValidationFailure", &message);
                "status"
            }
            Step::Sign => {
                match self.sign(&csr) {
                    Ok(certificate) => csr["status"]["certificate"] = STANDARD.encode(certificate).into(),
                    Err(message) => add(&mut csr, "Failed", "SignerValidationFailure", &message),
                }
                "status"
            }
        };
        let name = csr["metadata"]["name"].as_str().unwrap_or("").to_owned();
        self.client.replace(&format!("{PATH}/{name}/{subresource}"), &csr).await
    }

    fn sign(&self, csr: &Value) -> Result<String, String> {
        let request = CertificateRequest::of(csr).map_err(|error| error.to_string())?;
        let serving = csr["spec"]["signerName"] == KUBELET_SERVING;
        let authority = if serving { &self.keys.server_ca } else { &self.keys.client_ca };
        let asked = csr["spec"]["expirationSeconds"].as_u64().map(Duration::from_secs);
        let lifetime = asked.unwrap_or(LIFETIME.0).clamp(LIFETIME.1, LIFETIME.0);
        let der = sign::sign(authority, &request, &usages(csr), lifetime, SystemTime::now())
            .map_err(|error| error.to_string())?;
        Ok(super::jwt::pem("CERTIFICATE", &der))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::certificates::testing::request_pem;
    use crate::auth::objects::testing::World;

    #[test]
    fn approved_requests_are_signed_wrong_ones_fail_others_wait() {
        let world = World::new();
        let keys = Arc::new(ClusterKeys::generate(SystemTime::now()).unwrap());
        let authorizer = Authorizer::new(world.objects.store().clone());
        let signer = Signer { keys, authorizer, client: Client::none() };
        let csr = |signer: &str, usages: Value, approved: bool| {
            let request = STANDARD.encode(request_pem("jane", "dev", &[]).0);
            let conditions = if approved { json!([{ "type": "Approved", "status": "True" }]) } else { json!([]) };
            json!({ "metadata": { "name": "x" }, "status": { "conditions": conditions },
                "spec": { "signerName": signer, "usages": usages, "request": request, "username": "jane" } })
        };
        let client = json!(["client auth", "digital signature"]);
        let name = "kubernetes.io/kube-apiserver-client";
        assert_eq!(signer.plan(&csr(name, client.clone(), false)), None);
        assert_eq!(signer.plan(&csr("example.com/own", client.clone(), true)), None);
        let approved = csr(name, client, true);
        assert_eq!(signer.plan(&approved), Some(Step::Sign));
        assert!(signer.sign(&approved).unwrap().starts_with("-----BEGIN CERTIFICATE-----"));
        let wrong = csr(name, json!(["server auth"]), true);
        assert!(matches!(signer.plan(&wrong), Some(Step::Fail(_))));
        let mut done = approved.clone();
        done["status"]["certificate"] = "x".into();
        assert_eq!(signer.plan(&done), None);
    }
}
