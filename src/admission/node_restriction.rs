//! NodeRestriction: what a kubelet may write about itself, its pods and nothing else.

use super::pod::{self, MIRROR, items, text};
use super::service_account::pod_secrets;
use super::{Operation, Request, World};
use crate::apiserver::status::Status;
use crate::auth::Attributes;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Labels in kubernetes.io that a kubelet may set on its node, besides those under the two prefixes below.
const KUBELET_LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "node.kubernetes.io/instance-type",
    "beta.kubernetes.io/instance-type",
    "kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "beta.kubernetes.io/arch",
];
const KUBELET_LABEL_NAMESPACES: [&str; 2] = ["kubelet.kubernetes.io", "node.kubernetes.io"];
const RESTRICTED: &str = "node-restriction.kubernetes.io";

pub fn check(world: &World, request: &Request<'_>) -> Result<(), Status> {
    let Some(node) = request.identity.user().as_node() else { return Ok(()) };
    let check = Check { world, request, node };
    match (request.group, request.resource, request.subresource) {
        ("", "pods", "") => check.pod(),
        ("", "pods", "status") => check.pod_status(),
        ("", "pods", "eviction") => check.eviction(),
        ("", "pods", other) => {
            check.refuse(format!("unexpected pod subresource \"{other}\", only 'status' and 'eviction' are allowed"))
        }
        ("", "nodes", _) => check.node(),
        ("", "persistentvolumeclaims", "status") => check.claim_status(),
        ("", "persistentvolumeclaims", _) => check.refuse("may only update PVC status"),
        ("", "serviceaccounts", "token") if request.creates() => check.token(),
        ("coordination.k8s.io", "leases", _) => check.lease(),
        ("storage.k8s.io", "csinodes", _) => check.csi_node(),
        ("resource.k8s.io", "resourceslices", _) => check.resource_slice(),
        ("certificates.k8s.io", "certificatesigningrequests", _) if request.creates() => check.csr(),
        _ => Ok(()),
    }
}

struct Check<'a> {
    world: &'a World,
    request: &'a Request<'a>,
    node: &'a str,
}

type Checked = Result<(), Status>;

impl Check<'_> {
    fn refuse(&self, why: impl std::fmt::Display) -> Checked {
        Err(self.request.forbidden(why))
    }

    fn unexpected(&self) -> Checked {
        let operation = format!("{:?}", self.request.operation).to_uppercase();
        self.refuse(format!("unexpected operation \"{operation}\""))
    }

    fn require(&self, holds: bool, why: impl std::fmt::Display) -> Checked {
        if holds { Ok(()) } else { self.refuse(why) }
    }

    fn existing_pod(&self, name: &str) -> Result<Value, Status> {
        let found = self.world.get("", "pods", self.request.namespace, name)?;
        found.ok_or_else(|| Status::not_found("", "pods", name))
    }

    fn pod(&self) -> Checked {
        let (request, node) = (self.request, self.node);
        match request.operation {
            Operation::Delete => {
                let pod = self.existing_pod(request.name)?;
                self.require(
                    pod["spec"]["nodeName"] == node,
                    format_args!("node \"{node}\" can only delete pods with spec.nodeName set to itself"),
                )
            }
            Operation::Create => self.mirror_pod(),
            other => {
                let other = format!("{other:?}").to_uppercase();
                self.refuse(format_args!(
                    "unexpected operation \"{other}\", node \"{node}\" can only create and delete mirror pods"
                ))
            }
        }
    }

    fn mirror_pod(&self) -> Checked {
        let (pod, node) = (&*self.request.object, self.node);
        self.require(
            pod::is_mirror(pod),
            format_args!("pod does not have \"{MIRROR}\" annotation, node \"{node}\" can only create mirror pods"),
        )?;
        self.require(
            pod["spec"]["nodeName"] == node,
            format_args!("node \"{node}\" can only create pods with spec.nodeName set to itself"),
        )?;
        let owners: Vec<&Value> = items(&pod["metadata"]["ownerReferences"]).collect();
        let owner = match owners.as_slice() {
            [owner] => *owner,
            [] => {
                return self.refuse(format_args!(
                    "node \"{node}\" can only create pods with an owner reference set to itself"
                ));
            }
            _ => {
                return self.refuse(format_args!(
                    "node \"{node}\" can only create pods with a single owner reference set to itself"
                ));
            }
        };
        self.require(
            owner["apiVersion"] == "v1" && owner["kind"] == "Node" && owner["name"] == node,
            format_args!("node \"{node}\" can only create pods with an owner reference set to itself"),
        )?;
        self.require(
            owner["controller"] == true,
            format_args!("node \"{node}\" can only create pods with a controller owner reference set to itself"),
        )?;
        self.require(
            owner["blockOwnerDeletion"] != true,
            format_args!("node \"{node}\" must not set blockOwnerDeletion on an owner reference"),
        )?;
        let Some(own) = self.world.get::<Value>("", "nodes", "", node)? else {
            return Err(Status::not_found("", "nodes", node));
        };
        let (expected, got) = (text(owner, "uid"), text(&own["metadata"], "uid"));
        self.require(expected == got, format_args!("node {node} UID mismatch: expected {expected} got {got}"))?;
        match referenced_kind(&pod["spec"]) {
            Some(kind) => self.refuse(format_args!("node \"{node}\" can not create pods that reference {kind}")),
            None => Ok(()),
        }
    }

    fn pod_status(&self) -> Checked {
        let (request, node) = (self.request, self.node);
        let (true, Some(old)) = (request.updates(), request.old) else { return self.unexpected() };
        self.require(
            old["spec"]["nodeName"] == node,
            format_args!("node \"{node}\" can only update pod status for pods with spec.nodeName set to itself"),
        )?;
        self.require(
            old["metadata"]["labels"] == request.object["metadata"]["labels"],
            format_args!("node \"{node}\" cannot update labels through pod status"),
        )?;
        let same = |field: &str| old["status"][field] == request.object["status"][field];
        self.require(
            same("resourceClaimStatuses"),
            format_args!("node \"{node}\" cannot update resource claim statues"),
        )?;
        self.require(
            same("extendedResourceClaimStatus"),
            format_args!("node \"{node}\" cannot update extended resource claim status"),
        )
    }

    fn eviction(&self) -> Checked {
        if !self.request.creates() {
            return self.unexpected();
        }
        let name = match self.request.name {
            "" => text(&self.request.object["metadata"], "name"),
            name => name,
        };
        self.require(!name.is_empty(), "could not determine pod from request data")?;
        let node = self.node;
        self.require(
            self.existing_pod(name)?["spec"]["nodeName"] == node,
            format_args!("node {node} can only evict pods with spec.nodeName set to itself"),
        )
    }

    fn claim_status(&self) -> Checked {
        let (true, Some(old)) = (self.request.updates(), self.request.old) else { return self.unexpected() };
        let rest = |claim: &Value| {
            let mut claim = claim.clone();
            if let Some(metadata) = claim["metadata"].as_object_mut() {
                metadata.remove("resourceVersion");
                metadata.remove("managedFields");
            }
            if let Some(status) = claim["status"].as_object_mut() {
                for field in ["capacity", "conditions", "allocatedResources", "allocatedResourceStatuses"] {
                    status.remove(field);
                }
            }
            claim
        };
        let node = self.node;
        self.require(
            rest(old) == rest(self.request.object),
            format_args!(
                "node \"{node}\" is not allowed to update fields other than status.quantity and status.conditions"
            ),
        )
    }

    fn node(&self) -> Checked {
        let (request, node) = (self.request, self.node);
        let name = match request.name {
            "" => text(&request.object["metadata"], "name"),
            name => name,
        };
        self.require(name == node, format_args!("node \"{node}\" is not allowed to modify node \"{name}\""))?;
        let empty = Map::new();
        let labels = |object: &Value| object["metadata"]["labels"].as_object().cloned().unwrap_or_default();
        if request.creates() {
            self.require(
                request.object["spec"]["configSource"].is_null(),
                format_args!("node \"{node}\" is not allowed to create pods with a non-nil configSource"),
            )?;
            let forbidden = forbidden_labels(&labels(request.object), &empty);
            return self.require(
                forbidden.is_empty(),
                format_args!("node \"{node}\" is not allowed to set the following labels: {}", forbidden.join(", ")),
            );
        }
        let (true, Some(old)) = (request.updates(), request.old) else { return Ok(()) };
        let (new, old_spec) = (&request.object["spec"], &old["spec"]);
        self.require(
            new["configSource"].is_null() || new["configSource"] == old_spec["configSource"],
            format_args!("node \"{node}\" is not allowed to update configSource to a new non-nil configSource"),
        )?;
        let list = |value: &Value| items(value).cloned().collect::<Vec<_>>();
        self.require(
            list(&new["taints"]) == list(&old_spec["taints"]),
            format_args!("node \"{node}\" is not allowed to modify taints"),
        )?;
        self.require(
            list(&request.object["metadata"]["ownerReferences"]) == list(&old["metadata"]["ownerReferences"]),
            format_args!("node \"{node}\" is not allowed to modify ownerReferences"),
        )?;
        let forbidden = forbidden_labels(&labels(request.object), &labels(old));
        self.require(forbidden.is_empty(), format_args!("is not allowed to modify labels: {}", forbidden.join(", ")))
    }

    fn token(&self) -> Checked {
        let bound = &self.request.object["spec"]["boundObjectRef"];
        let to_pod = bound["apiVersion"] == "v1" && bound["kind"] == "Pod" && !text(bound, "name").is_empty();
        self.require(to_pod, "node requested token not bound to a pod")?;
        let uid = text(bound, "uid");
        self.require(!uid.is_empty(), "node requested token with a pod binding without a uid")?;
        let pod = self.existing_pod(text(bound, "name"))?;
        self.require(
            pod["metadata"]["uid"] == uid,
            format_args!(
                "the UID in the bound object reference ({uid}) does not match the UID in record. The object might have been deleted and then recreated"
            ),
        )?;
        self.require(
            pod["spec"]["nodeName"] == self.node,
            "node requested token bound to a pod scheduled on a different node",
        )?;
        self.audience(&pod)
    }

    /// A node gets tokens only for audiences that a volume of the pod asks for, or that it was granted.
    fn audience(&self, pod: &Value) -> Checked {
        let audiences: Vec<&str> = items(&self.request.object["spec"]["audiences"]).filter_map(Value::as_str).collect();
        let audience = match audiences.as_slice() {
            [] => "",
            [one] => *one,
            _ => return self.refuse("node may only request 0 or 1 audiences"),
        };
        let projected = items(&pod["spec"]["volumes"])
            .flat_map(|volume| items(&volume["projected"]["sources"]))
            .filter_map(|source| source.get("serviceAccountToken"))
            .any(|token| text(token, "audience") == audience);
        if projected || self.driver_audience(pod, audience)? {
            return Ok(());
        }
        let attributes = Attributes {
            verb: "request-serviceaccounts-token-audience",
            version: "v1",
            resource: audience,
            name: self.request.name,
            namespace: self.request.namespace,
            is_resource: true,
            ..Attributes::default()
        };
        let user = &self.request.identity.user().name;
        self.require(
            self.world.authorizer.authorize(self.request.identity, &attributes).allowed,
            format_args!(
                "audience \"{audience}\" not found in pod spec volume, {user} is not authorized to request tokens for this audience"
            ),
        )
    }

    /// Whether a CSI driver of one of the pod's volumes asks for tokens of that audience.
    fn driver_audience(&self, pod: &Value, audience: &str) -> Result<bool, Status> {
        for volume in items(&pod["spec"]["volumes"]) {
            let ephemeral = format!("{}-{}", text(&pod["metadata"], "name"), text(volume, "name"));
            let driver = if volume.get("ephemeral").is_some() {
                self.driver_of_claim(&ephemeral)?
            } else if let Some(claim) = volume["persistentVolumeClaim"]["claimName"].as_str() {
                self.driver_of_claim(claim)?
            } else {
                volume["csi"]["driver"].as_str().map(str::to_owned)
            };
            let Some(driver) = driver else { continue };
            let object: Option<Value> = self.world.get("storage.k8s.io", "csidrivers", "", &driver)?;
            if object.is_some_and(|d| items(&d["spec"]["tokenRequests"]).any(|t| text(t, "audience") == audience)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn driver_of_claim(&self, claim: &str) -> Result<Option<String>, Status> {
        let claim: Option<Value> = self.world.get("", "persistentvolumeclaims", self.request.namespace, claim)?;
        let Some(volume) = claim.as_ref().and_then(|c| c["spec"]["volumeName"].as_str()) else { return Ok(None) };
        let volume: Option<Value> = self.world.get("", "persistentvolumes", "", volume)?;
        Ok(volume.and_then(|v| v["spec"]["csi"]["driver"].as_str().map(str::to_owned)))
    }

    fn lease(&self) -> Checked {
        let request = self.request;
        self.require(
            request.namespace == "kube-node-lease",
            "can only access leases in the \"kube-node-lease\" system namespace",
        )?;
        let name = if request.creates() { text(&request.object["metadata"], "name") } else { request.name };
        self.require(name == self.node, "can only access node lease with the same name as the requesting node")
    }

    fn csi_node(&self) -> Checked {
        let request = self.request;
        let name = if request.creates() { text(&request.object["metadata"], "name") } else { request.name };
        self.require(name == self.node, "can only access CSINode with the same name as the requesting node")
    }

    fn resource_slice(&self) -> Checked {
        let owner = if self.request.creates() {
            Some(text(&self.request.object["spec"], "nodeName"))
        } else {
            self.request.old.map(|old| text(&old["spec"], "nodeName"))
        };
        self.require(
            owner.is_none_or(|owner| owner == self.node),
            "can only access ResourceSlice with the same NodeName as the requesting node",
        )
    }

    fn csr(&self) -> Checked {
        let signer = text(&self.request.object["spec"], "signerName");
        if !matches!(signer, "kubernetes.io/kubelet-serving" | "kubernetes.io/kube-apiserver-client-kubelet") {
            return Ok(());
        }
        let subject = crate::auth::certificates::request_common_name(self.request.object);
        let node = format!("system:node:{}", self.node);
        match subject {
            Ok(name) => self.require(name == node, format_args!("can only create a node CSR with CN={node}")),
            Err(why) => self.refuse(format_args!("unable to parse csr: {why}")),
        }
    }
}

/// Which labels changed that a kubelet may not change, sorted.
fn forbidden_labels(new: &Map<String, Value>, old: &Map<String, Value>) -> Vec<String> {
    let changed: BTreeSet<&String> =
        new.keys().chain(old.keys()).filter(|key| new.get(*key) != old.get(*key)).collect();
    changed.into_iter().filter(|label| is_forbidden(label)).cloned().collect()
}

fn is_forbidden(label: &str) -> bool {
    let namespace = label.split_once('/').map_or("", |(namespace, _)| namespace);
    let within =
        |domain: &str| namespace == domain || namespace.strip_suffix(domain).is_some_and(|head| head.ends_with('.'));
    if within(RESTRICTED) {
        return true;
    }
    let kubelets = KUBELET_LABELS.contains(&label) || KUBELET_LABEL_NAMESPACES.iter().any(|domain| within(domain));
    (within("kubernetes.io") || within("k8s.io")) && !kubelets
}

/// The kind of API object that a pod refers to, if any.
fn referenced_kind(spec: &Value) -> Option<&'static str> {
    if !text(spec, "serviceAccountName").is_empty() {
        return Some("serviceaccounts");
    }
    if !pod_secrets(spec).is_empty() {
        return Some("secrets");
    }
    let names_map = |container: &Value| {
        items(&container["env"]).any(|e| e["valueFrom"].get("configMapKeyRef").is_some())
            || items(&container["envFrom"]).any(|e| e.get("configMapRef").is_some())
    };
    if pod::containers(spec).any(|(_, container)| names_map(container)) {
        return Some("configmaps");
    }
    if items(&spec["resourceClaims"]).next().is_some() {
        return Some("resourceclaims");
    }
    items(&spec["volumes"]).find_map(|volume| {
        let has = |source: &str| volume.get(source).is_some();
        let projects = |source: &str| items(&volume["projected"]["sources"]).any(|s| s.get(source).is_some());
        if has("configMap") || projects("configMap") {
            Some("configmaps")
        } else if has("persistentVolumeClaim") || has("ephemeral") {
            Some("persistentvolumeclaims")
        } else if has("csi") {
            Some("csidrivers")
        } else if projects("serviceAccountToken") {
            Some("serviceaccounts")
        } else if projects("clusterTrustBundle") {
            Some("clustertrustbundles")
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_a_node_may_and_may_not_set() {
        for (label, forbidden) in [
            ("kubernetes.io/hostname", false),
            ("node.kubernetes.io/anything", false),
            ("sub.kubelet.kubernetes.io/x", false),
            ("example.com/x", false),
            ("plain", false),
            ("notkubernetes.io/x", false),
            ("node-restriction.kubernetes.io/x", true),
            ("a.node-restriction.kubernetes.io/x", true),
            ("node-role.kubernetes.io/control-plane", true),
            ("kubernetes.io/other", true),
            ("x.k8s.io/y", true),
        ] {
            assert_eq!(is_forbidden(label), forbidden, "{label}");
        }
        let map = |value: Value| value.as_object().cloned().unwrap();
        let old = map(json!({ "kubernetes.io/a": "1", "kubernetes.io/b": "1" }));
        let new = map(json!({ "kubernetes.io/a": "1", "kubernetes.io/b": "2", "x": "y" }));
        assert_eq!(forbidden_labels(&new, &old), ["kubernetes.io/b"]);
        assert_eq!(forbidden_labels(&Map::new(), &old).len(), 2);
    }

    #[test]
    fn what_a_mirror_pod_must_not_refer_to() {
        assert_eq!(referenced_kind(&json!({ "volumes": [{ "hostPath": { "path": "/" } }] })), None);
        for (spec, kind) in [
            (json!({ "serviceAccountName": "x" }), "serviceaccounts"),
            (json!({ "imagePullSecrets": [{ "name": "x" }] }), "secrets"),
            (json!({ "containers": [{ "envFrom": [{ "configMapRef": {} }] }] }), "configmaps"),
            (
                json!({ "volumes": [{ "projected": { "sources": [{ "serviceAccountToken": {} }] } }] }),
                "serviceaccounts",
            ),
            (json!({ "volumes": [{ "persistentVolumeClaim": {} }] }), "persistentvolumeclaims"),
        ] {
            assert_eq!(referenced_kind(&spec), Some(kind), "{spec}");
        }
    }
}
