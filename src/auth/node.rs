//! The node authorizer: a kubelet reads only what the pods bound to it refer to.

use super::live::Fold;
use super::objects::{ObjectError, Objects};
use super::rbac::PolicyRule;
use super::{Attributes, Decision};
use coracle_store::KeyValue;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeSet, HashMap, HashSet};

/// Key prefix of what the graph is built from.
pub const PREFIX: &str = "/registry/core/pods/";
const MIRROR: &str = "kubernetes.io/config.mirror";

/// What a pod may refer to, by name in its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Referent {
    ServiceAccount,
    Secret,
    ConfigMap,
    Claim,
    ResourceClaim,
}

type Reference = (Referent, Box<str>);

/// A pod on a node.
struct Pod {
    node: Box<str>,
    references: Box<[Reference]>,
}

/// Which node's pods refer to what.
#[derive(Default)]
pub struct NodeGraph {
    /// By `namespace/name`.
    pods: HashMap<Box<str>, Pod>,
    /// By node: `namespace/name` of its pods.
    nodes: HashMap<Box<str>, HashSet<Box<str>>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PodObject {
    metadata: PodMeta,
    spec: Value,
    status: Value,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct PodMeta {
    name: String,
    annotations: HashMap<String, serde::de::IgnoredAny>,
}

impl NodeGraph {
    fn remove(&mut self, key: &str) {
        let Some(pod) = self.pods.remove(key) else { return };
        if let Some(pods) = self.nodes.get_mut(&pod.node) {
            pods.remove(key);
            if pods.is_empty() {
                self.nodes.remove(&pod.node);
            }
        }
    }

    /// Whether a pod of `node` in `namespace` refers to the object.
    pub fn refers(&self, node: &str, referent: Referent, namespace: &str, name: &str) -> bool {
        let in_namespace = |key: &str| key.split_once('/').is_some_and(|(of, _)| of == namespace);
        self.nodes.get(node).into_iter().flatten().filter(|key| in_namespace(key)).any(|key| {
            self.pods.get(key).is_some_and(|pod| pod.references.iter().any(|(r, n)| *r == referent && **n == *name))
        })
    }

    /// Whether the pod is bound to `node`.
    pub fn runs(&self, node: &str, namespace: &str, name: &str) -> bool {
        self.pods.get(format!("{namespace}/{name}").as_str()).is_some_and(|pod| *pod.node == *node)
    }
}

impl Fold for NodeGraph {
    fn clear(&mut self) {
        *self = NodeGraph::default();
    }

    fn put(&mut self, key: &str, row: &KeyValue) {
        self.remove(key);
        let Ok(pod) = serde_json::from_slice::<PodObject>(&row.value) else {
            tracing::error!(key, "a pod in the store cannot be read: its node gets no access through it");
            return;
        };
        let Some(node) = pod.spec["nodeName"].as_str().filter(|node| !node.is_empty()) else { return };
        // A mirror pod is made by its node: it must not give that node anything.
        let mirror = pod.metadata.annotations.contains_key(MIRROR);
        let references = if mirror { BTreeSet::new() } else { references(&pod) };
        self.nodes.entry(node.into()).or_default().insert(key.into());
        self.pods.insert(key.into(), Pod { node: node.into(), references: references.into_iter().collect() });
    }

    fn delete(&mut self, key: &str) {
        self.remove(key);
    }
}

/// Every secret, config map, claim and service account that the pod names.
fn references(pod: &PodObject) -> BTreeSet<Reference> {
    let spec = &pod.spec;
    let mut found = BTreeSet::new();
    let mut add = |referent, name: &Value| {
        if let Some(name) = name.as_str().filter(|name| !name.is_empty()) {
            found.insert((referent, name.into()));
        }
    };
    add(Referent::ServiceAccount, &spec["serviceAccountName"]);
    for secret in items(&spec["imagePullSecrets"]) {
        add(Referent::Secret, &secret["name"]);
    }
    for kind in ["containers", "initContainers", "ephemeralContainers"] {
        for container in items(&spec[kind]) {
            for source in items(&container["envFrom"]) {
                add(Referent::ConfigMap, &source["configMapRef"]["name"]);
                add(Referent::Secret, &source["secretRef"]["name"]);
            }
            for variable in items(&container["env"]) {
                add(Referent::ConfigMap, &variable["valueFrom"]["configMapKeyRef"]["name"]);
                add(Referent::Secret, &variable["valueFrom"]["secretKeyRef"]["name"]);
            }
        }
    }
    for volume in items(&spec["volumes"]) {
        add(Referent::ConfigMap, &volume["configMap"]["name"]);
        add(Referent::Secret, &volume["secret"]["secretName"]);
        add(Referent::Claim, &volume["persistentVolumeClaim"]["claimName"]);
        if let (Some(_), Some(name)) = (volume.get("ephemeral"), volume["name"].as_str()) {
            add(Referent::Claim, &format!("{}-{name}", pod.metadata.name).into());
        }
        for source in items(&volume["projected"]["sources"]) {
            add(Referent::ConfigMap, &source["configMap"]["name"]);
            add(Referent::Secret, &source["secret"]["name"]);
        }
        for driver in ["cephfs", "flexVolume", "rbd", "scaleIO", "iscsi", "storageos"] {
            add(Referent::Secret, &volume[driver]["secretRef"]["name"]);
        }
        add(Referent::Secret, &volume["azureFile"]["secretName"]);
        add(Referent::Secret, &volume["csi"]["nodePublishSecretRef"]["name"]);
    }
    for claim in items(&spec["resourceClaims"]) {
        add(Referent::ResourceClaim, &claim["resourceClaimName"]);
    }
    for claim in items(&pod.status["resourceClaimStatuses"]) {
        add(Referent::ResourceClaim, &claim["resourceClaimName"]);
    }
    add(Referent::ResourceClaim, &pod.status["extendedResourceClaimStatus"]["resourceClaimName"]);
    found
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn allowed() -> Decision {
    Decision { allowed: true, reason: String::new() }
}

fn no_opinion(reason: impl Into<String>) -> Decision {
    Decision { allowed: false, reason: reason.into() }
}

/// Decides for the kubelet of `node`. `rules` are the static rules (`system:node`) for what is not subdivided.
pub fn authorize(
    graph: &NodeGraph,
    objects: &Objects,
    rules: &[PolicyRule],
    node: &str,
    request: &Attributes<'_>,
) -> Result<Decision, ObjectError> {
    let question = Question { graph, objects, node, request };
    if request.is_resource {
        match (request.group, request.resource) {
            ("", "secrets") => return question.read(Referent::Secret),
            ("", "configmaps") => return question.read(Referent::ConfigMap),
            ("", "persistentvolumeclaims") => return question.claim(),
            ("", "persistentvolumes") => return question.get_if(Question::volume),
            ("resource.k8s.io", "resourceclaims") => {
                return question.get_if(|q| Ok(q.refers(Referent::ResourceClaim)));
            }
            ("storage.k8s.io", "volumeattachments") => return question.get_if(Question::attachment),
            ("", "serviceaccounts") => return question.service_account(),
            ("coordination.k8s.io", "leases") => return Ok(question.lease()),
            ("storage.k8s.io", "csinodes") => return Ok(question.csi_node()),
            ("resource.k8s.io", "resourceslices") => return question.resource_slice(),
            ("", "nodes") => return Ok(question.nodes()),
            ("", "pods") => return question.pods(),
            ("certificates.k8s.io", "podcertificaterequests") => return Ok(no_opinion("")),
            _ => {}
        }
    }
    Ok(if rules.iter().any(|rule| rule.allows(request)) { allowed() } else { no_opinion("") })
}

struct Question<'a> {
    graph: &'a NodeGraph,
    objects: &'a Objects,
    node: &'a str,
    request: &'a Attributes<'a>,
}

type Answer = Result<Decision, ObjectError>;

impl Question<'_> {
    fn refers(&self, referent: Referent) -> bool {
        self.graph.refers(self.node, referent, self.request.namespace, self.request.name)
    }

    fn unrelated(&self) -> Decision {
        no_opinion(format!("no relationship found between node '{}' and this object", self.node))
    }

    fn related(&self, related: bool) -> Decision {
        match self.request.name {
            "" => no_opinion("No Object name found"),
            _ if related => allowed(),
            _ => self.unrelated(),
        }
    }

    fn read(&self, referent: Referent) -> Answer {
        if !self.request.is_read_only() {
            return Ok(no_opinion("can only read resources of this type"));
        }
        if !self.request.subresource.is_empty() {
            return Ok(no_opinion("cannot read subresource"));
        }
        if self.request.namespace.is_empty() {
            return Ok(no_opinion("can only read namespaced object of this type"));
        }
        let related = match referent {
            // Secrets that a volume of a claim of one of the node's pods refers to.
            Referent::Secret => self.refers(referent) || self.secret_of_volume()?,
            _ => self.refers(referent),
        };
        Ok(self.related(related))
    }

    fn get_if(&self, related: impl Fn(&Self) -> Result<bool, ObjectError>) -> Answer {
        if self.request.verb != "get" {
            return Ok(no_opinion("can only get individual resources of this type"));
        }
        if !self.request.subresource.is_empty() {
            return Ok(no_opinion("cannot get subresource"));
        }
        Ok(self.related(related(self)?))
    }

    fn claim(&self) -> Answer {
        if self.request.subresource != "status" {
            return self.get_if(|q| Ok(q.refers(Referent::Claim)));
        }
        Ok(match self.request.verb {
            "update" | "patch" => self.related(self.refers(Referent::Claim)),
            _ => no_opinion("can only get/update/patch this type"),
        })
    }

    /// Whether the claim that the volume is bound to belongs to a pod of the node.
    fn bound_here(&self, volume: &Value) -> bool {
        let claim = &volume["spec"]["claimRef"];
        match (claim["namespace"].as_str(), claim["name"].as_str()) {
            (Some(namespace), Some(name)) => self.graph.refers(self.node, Referent::Claim, namespace, name),
            _ => false,
        }
    }

    fn volume(&self) -> Result<bool, ObjectError> {
        let volume: Option<Value> = self.objects.get("", "persistentvolumes", "", self.request.name)?;
        Ok(volume.is_some_and(|volume| self.bound_here(&volume)))
    }

    fn secret_of_volume(&self) -> Result<bool, ObjectError> {
        let volumes: Vec<Value> = self.objects.list("", "persistentvolumes", "")?;
        Ok(volumes.iter().any(|volume| self.bound_here(volume) && self.volume_names_secret(volume)))
    }

    fn volume_names_secret(&self, volume: &Value) -> bool {
        let spec = &volume["spec"];
        let claim_namespace = &spec["claimRef"]["namespace"];
        let csi = ["nodePublishSecretRef", "nodeStageSecretRef", "nodeExpandSecretRef", "controllerExpandSecretRef"];
        let drivers = ["cephfs", "flexVolume", "rbd", "scaleIO", "iscsi", "storageos"];
        let references = csi.iter().map(|r| &spec["csi"][r]).chain(drivers.iter().map(|d| &spec[d]["secretRef"]));
        let azure = (&spec["azureFile"]["secretName"], &spec["azureFile"]["secretNamespace"]);
        references.map(|r| (&r["name"], &r["namespace"])).chain([azure]).any(|(name, namespace)| {
            let namespace = namespace.as_str().or(claim_namespace.as_str());
            name == self.request.name && namespace == Some(self.request.namespace)
        })
    }

    fn attachment(&self) -> Result<bool, ObjectError> {
        let attachment: Option<Value> =
            self.objects.get("storage.k8s.io", "volumeattachments", "", self.request.name)?;
        Ok(attachment.is_some_and(|attachment| attachment["spec"]["nodeName"] == self.node))
    }

    fn service_account(&self) -> Answer {
        let request = self.request;
        if request.verb == "get" && request.subresource.is_empty() {
            return self.read(Referent::ServiceAccount);
        }
        if request.verb != "create" || request.name.is_empty() {
            return Ok(no_opinion("can only create tokens for individual service accounts"));
        }
        if request.subresource != "token" {
            return Ok(no_opinion("can only create token subresource of serviceaccount"));
        }
        Ok(self.related(self.refers(Referent::ServiceAccount)))
    }

    fn lease(&self) -> Decision {
        let request = self.request;
        if !matches!(request.verb, "get" | "create" | "update" | "patch" | "delete") {
            return no_opinion("can only get, create, update, patch, or delete a node lease");
        }
        if request.namespace != "kube-node-lease" {
            return no_opinion("can only access leases in the \"kube-node-lease\" system namespace");
        }
        if request.verb != "create" && request.name != self.node {
            return no_opinion("can only access node lease with the same name as the requesting node");
        }
        allowed()
    }

    fn csi_node(&self) -> Decision {
        let request = self.request;
        if !matches!(request.verb, "get" | "create" | "update" | "patch" | "delete") {
            return no_opinion("can only get, create, update, patch, or delete a CSINode");
        }
        if !request.subresource.is_empty() {
            return no_opinion("cannot authorize CSINode subresources");
        }
        if request.verb != "create" && request.name != self.node {
            return no_opinion("can only access CSINode with the same name as the requesting node");
        }
        allowed()
    }

    fn resource_slice(&self) -> Answer {
        let request = self.request;
        if !request.subresource.is_empty() {
            return Ok(no_opinion("cannot authorize ResourceSlice subresources"));
        }
        Ok(match request.verb {
            "create" => allowed(),
            "get" | "update" | "patch" | "delete" => {
                let slice: Option<Value> = self.objects.get(request.group, "resourceslices", "", request.name)?;
                self.related(slice.is_some_and(|slice| slice["spec"]["nodeName"] == self.node))
            }
            "watch" | "list" | "deletecollection" if request.selects_field("spec.nodeName", self.node) => allowed(),
            "watch" | "list" | "deletecollection" => {
                no_opinion("can only list/watch/deletecollection resourceslices with nodeName field selector")
            }
            _ => no_opinion(
                "only the following verbs are allowed for a ResourceSlice: get, watch, list, create, update, patch, delete, deletecollection",
            ),
        })
    }

    fn nodes(&self) -> Decision {
        let request = self.request;
        let named = request.name == self.node || request.selects_field("metadata.name", self.node);
        match (request.subresource, request.verb) {
            // NodeRestriction limits these to the node's own object.
            ("", "create" | "update" | "patch") | ("status", "update" | "patch") => allowed(),
            ("", "get" | "list" | "watch") if named => allowed(),
            ("", "get" | "list" | "watch") if request.name.is_empty() => {
                no_opinion(format!("node '{}' cannot read all nodes, only its own Node object", self.node))
            }
            ("", "get" | "list" | "watch") => {
                no_opinion(format!("node '{}' cannot read '{}', only its own Node object", self.node, request.name))
            }
            _ => no_opinion(""),
        }
    }

    fn pods(&self) -> Answer {
        let request = self.request;
        let runs = || self.graph.runs(self.node, request.namespace, request.name);
        Ok(match (request.subresource, request.verb) {
            ("", "get") => self.related(runs()),
            ("", "list" | "watch") if request.selects_field("spec.nodeName", self.node) => allowed(),
            ("", "list" | "watch") if !request.name.is_empty() => self.related(runs()),
            ("", "list" | "watch") => no_opinion("can only list/watch pods with spec.nodeName field selector"),
            // NodeRestriction limits these to mirror pods and to pods bound to the node.
            ("", "create" | "delete") | ("status", "update" | "patch") | ("eviction", "create") => allowed(),
            _ => no_opinion(""),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::live::Live;
    use crate::auth::objects::testing::World;
    use serde_json::json;

    #[test]
    fn a_node_reads_what_its_pods_refer_to_and_nothing_else() {
        let mut world = World::new();
        let spec = json!({
            "nodeName": "n1", "serviceAccountName": "sa", "imagePullSecrets": [{ "name": "pull" }],
            "containers": [{ "env": [{ "valueFrom": { "secretKeyRef": { "name": "env" } } }] }],
            "volumes": [
                { "name": "c", "persistentVolumeClaim": { "claimName": "claim" } },
                { "name": "p", "projected": { "sources": [{ "configMap": { "name": "root" } }] } },
            ],
        });
        world.put("", "pods", json!({ "metadata": { "namespace": "a", "name": "p" }, "spec": spec }));
        let mirror = json!({ "namespace": "a", "name": "m", "annotations": { MIRROR: "x" } });
        let own = json!({ "nodeName": "n1", "imagePullSecrets": [{ "name": "stolen" }] });
        world.put("", "pods", json!({ "metadata": mirror, "spec": own }));
        let claim = json!({ "claimRef": { "namespace": "a", "name": "claim" },
            "csi": { "nodeStageSecretRef": { "name": "stage", "namespace": "vault" } } });
        world.put("", "persistentvolumes", json!({ "metadata": { "name": "pv" }, "spec": claim }));
        let graph: Live<NodeGraph> = Live::new(world.objects.store().clone(), PREFIX);
        let ask = |node: &str, request: Attributes<'_>| {
            authorize(&graph.read().unwrap(), &world.objects, &[], node, &request).unwrap().allowed
        };
        let get = |resource, namespace, name| Attributes {
            verb: "get",
            resource,
            namespace,
            name,
            is_resource: true,
            ..Attributes::default()
        };
        for (resource, namespace, name, expected) in [
            ("secrets", "a", "pull", true),
            ("secrets", "a", "env", true),
            ("secrets", "a", "other", false),
            ("secrets", "a", "stolen", false),
            ("secrets", "b", "pull", false),
            ("secrets", "vault", "stage", true),
            ("configmaps", "a", "root", true),
            ("configmaps", "a", "", false),
            ("persistentvolumeclaims", "a", "claim", true),
            ("persistentvolumes", "", "pv", true),
            ("persistentvolumes", "", "pv2", false),
            ("serviceaccounts", "a", "sa", true),
            ("nodes", "", "n1", true),
            ("nodes", "", "n2", false),
            ("pods", "a", "p", true),
        ] {
            assert_eq!(ask("n1", get(resource, namespace, name)), expected, "{resource} {namespace}/{name}");
            let node_named = resource == "nodes" && name == "n2";
            assert_eq!(ask("n2", get(resource, namespace, name)), node_named, "n2: {resource} {namespace}/{name}");
        }
        let token = Attributes { verb: "create", subresource: "token", ..get("serviceaccounts", "a", "sa") };
        assert!(ask("n1", token) && !ask("n2", token));
        let list = Attributes { verb: "list", ..get("pods", "", "") };
        assert!(!ask("n1", list));
        assert!(ask("n1", Attributes { field_selector: "spec.nodeName=n1", ..list }));
        assert!(!ask("n1", Attributes { field_selector: "spec.nodeName=n2", ..list }));
        assert!(!ask("n1", Attributes { field_selector: "spec.nodeName!=n1", ..list }));
        // The comma is part of the name here: this selects nearly all pods.
        assert!(!ask("n1", Attributes { field_selector: r"metadata.name!=a\,spec.nodeName=n1", ..list }));
        assert!(!ask("n1", Attributes { verb: "update", ..get("secrets", "a", "pull") }));
    }
}
