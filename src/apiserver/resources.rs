//! `RESOURCES`: one row per kind. Routes, discovery, OpenAPI paths, storage keys, short names and selectable fields
//! follow from it. Built-in rows are plain data; rows of custom resources have the same type.

use crate::strategy::{self, Strategy};
use bytes::Bytes;
use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, LazyLock};

pub use super::verbs::{Dependents, Scope, Subresource, SubresourceKind, Verbs, Virtual};

/// Text of a row: static for built-in kinds, owned for custom ones.
pub type Text = Cow<'static, str>;

/// One kind of object.
#[derive(Clone)]
pub struct Resource {
    /// API group, empty for core.
    pub group: Text,
    /// Served versions, the preferred one first.
    pub versions: Vec<Text>,
    /// The version objects are stored in.
    pub storage_version: Text,
    pub kind: Text,
    pub plural: Text,
    pub singular: Text,
    pub short_names: Vec<Text>,
    pub categories: Vec<Text>,
    pub scope: Scope,
    pub verbs: Verbs,
    pub subresources: Vec<Subresource>,
    pub strategy: &'static Strategy,
    /// Fields a field selector may name besides `metadata.name` and `metadata.namespace`.
    pub fields: Vec<Text>,
    /// Seconds after which an object disappears by itself; 0 keeps it.
    pub ttl_seconds: u64,
    /// Set when nothing is stored.
    pub answers: Option<Virtual>,
    /// Whether a delete answers with the object instead of a `Status`.
    pub returns_deleted: bool,
    /// What a delete without a policy does to dependents.
    pub dependents: Dependents,
    /// `apiVersion` of stored values.
    storage_api_version: String,
    shared: bool,
    /// `/registry/<group or "core">/<plural>/`.
    prefix: Bytes,
    /// `{"apiVersion":"..","kind":"..","metadata":{` with which each stored value begins.
    head: Bytes,
}

impl Resource {
    /// A row with the usual verbs, stored under its own group and plural in the first of `versions`.
    pub fn new(
        group: impl Into<Text>,
        versions: &[&'static str],
        kind: impl Into<Text>,
        plural: impl Into<Text>,
        scope: Scope,
    ) -> Resource {
        let kind = kind.into();
        let mut row = Resource {
            group: group.into(),
            versions: versions.iter().map(|v| Text::Borrowed(*v)).collect(),
            storage_version: versions.first().map_or(Text::Borrowed("v1"), |v| Text::Borrowed(*v)),
            singular: Text::Owned(kind.to_ascii_lowercase()),
            kind,
            plural: plural.into(),
            short_names: Vec::new(),
            categories: Vec::new(),
            scope,
            verbs: Verbs::ALL,
            subresources: Vec::new(),
            strategy: &strategy::DEFAULT,
            fields: Vec::new(),
            ttl_seconds: 0,
            answers: None,
            returns_deleted: false,
            dependents: Dependents::Background,
            storage_api_version: String::new(),
            shared: false,
            prefix: Bytes::new(),
            head: Bytes::new(),
        };
        row.set_storage(None);
        row
    }

    /// Derives key prefix and head of stored values; call after changing group, plural, kind or storage version.
    /// `shared` names the group, version and plural that hold the objects when it is another resource's storage.
    pub fn set_storage(&mut self, shared: Option<(&str, &str, &str)>) {
        let (group, version, plural) = shared.unwrap_or((&self.group, &self.storage_version, &self.plural));
        let folder = if group.is_empty() { "core" } else { group };
        let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
        self.prefix = format!("/registry/{folder}/{plural}/").into();
        self.head = format!("{{\"apiVersion\":\"{api_version}\",\"kind\":\"{}\",\"metadata\":{{", self.kind).into();
        (self.shared, self.storage_api_version) = (shared.is_some(), api_version);
    }

    fn short(mut self, names: &[&'static str]) -> Resource {
        self.short_names = names.iter().map(|n| Text::Borrowed(*n)).collect();
        self
    }

    fn category(mut self, name: &'static str) -> Resource {
        self.categories.push(Text::Borrowed(name));
        self
    }

    fn verbs(mut self, verbs: Verbs) -> Resource {
        self.verbs = verbs;
        self
    }

    fn fields(mut self, names: &[&'static str]) -> Resource {
        self.fields = names.iter().map(|n| Text::Borrowed(*n)).collect();
        self
    }

    fn strategy(mut self, strategy: &'static Strategy) -> Resource {
        self.strategy = strategy;
        self
    }

    fn answers(mut self, answers: Virtual) -> Resource {
        self.answers = Some(answers);
        self
    }

    fn returned(mut self) -> Resource {
        self.returns_deleted = true;
        self
    }

    fn orphans(mut self) -> Resource {
        self.dependents = Dependents::Orphan;
        self
    }

    fn sub(mut self, name: &'static str, does: SubresourceKind, verbs: Verbs) -> Resource {
        self.subresources.push(Subresource { name, does, verbs, group: "", version: "", kind: "" });
        self
    }

    fn sub_of(
        mut self,
        name: &'static str,
        does: SubresourceKind,
        verbs: Verbs,
        (group, version, kind): (&'static str, &'static str, &'static str),
    ) -> Resource {
        self.subresources.push(Subresource { name, does, verbs, group, version, kind });
        self
    }

    fn status(self) -> Resource {
        self.sub("status", SubresourceKind::Status, Verbs::GET_PATCH_UPDATE)
    }

    fn scale(self) -> Resource {
        self.sub_of("scale", SubresourceKind::Scale, Verbs::GET_PATCH_UPDATE, ("autoscaling", "v1", "Scale"))
    }

    /// Whether objects live in a namespace.
    pub fn is_namespaced(&self) -> bool {
        self.scope == Scope::Namespaced
    }

    /// Whether this version is served.
    pub fn serves(&self, version: &str) -> bool {
        self.versions.iter().any(|v| v == version)
    }

    /// The subresource of this name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// `group/version`, or the version alone for core.
    pub fn api_version(&self, version: &str) -> String {
        if self.group.is_empty() { version.to_owned() } else { format!("{}/{version}", self.group) }
    }

    /// Whether the status of a new object is the server's to say. Nodes come with theirs.
    pub fn resets_status(&self) -> bool {
        self.subresource("status").is_some() && self.kind != "Node"
    }

    /// Whether a client's `metadata.generation` stays although the kind does not count changes.
    pub fn keeps_generation(&self) -> bool {
        false
    }

    /// `apiVersion` of stored values.
    pub fn storage_api_version(&self) -> String {
        self.storage_api_version.clone()
    }

    /// Whether the objects are stored as those of another group (events).
    pub fn shares_storage(&self) -> bool {
        self.shared
    }

    /// The key prefix of all objects of the kind; ends in a slash.
    pub fn prefix(&self) -> &Bytes {
        &self.prefix
    }

    /// The bytes each stored value begins with, up to and including the brace that opens `metadata`.
    pub fn head(&self) -> &Bytes {
        &self.head
    }

    /// The key prefix of a namespace's objects (all objects when `namespace` is empty); ends in a slash.
    pub fn collection_key(&self, namespace: &str) -> Bytes {
        if namespace.is_empty() {
            return self.prefix.clone();
        }
        let mut key = Vec::with_capacity(self.prefix.len() + namespace.len() + 1);
        key.extend_from_slice(&self.prefix);
        key.extend_from_slice(namespace.as_bytes());
        key.push(b'/');
        key.into()
    }

    /// The key of one object; `namespace` is empty for cluster scope.
    pub fn key(&self, namespace: &str, name: &str) -> Bytes {
        let mut key = Vec::with_capacity(self.prefix.len() + namespace.len() + 1 + name.len());
        key.extend_from_slice(&self.prefix);
        if !namespace.is_empty() {
            key.extend_from_slice(namespace.as_bytes());
            key.push(b'/');
        }
        key.extend_from_slice(name.as_bytes());
        key.into()
    }
}

impl fmt::Debug for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.plural, self.group)
    }
}

/// All built-in kinds in the order discovery lists groups.
pub static RESOURCES: LazyLock<Vec<Arc<Resource>>> = LazyLock::new(|| rows().into_iter().map(Arc::new).collect());

/// The row of a built-in kind.
pub fn builtin(group: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|r| r.group == group && r.plural == plural).map(Arc::as_ref)
}

/// API groups in the order `/apis` lists them (upstream's priorities), the core group left out.
pub const GROUPS: [&str; 20] = [
    "apiregistration.k8s.io",
    "apps",
    "events.k8s.io",
    "authentication.k8s.io",
    "authorization.k8s.io",
    "autoscaling",
    "batch",
    "certificates.k8s.io",
    "networking.k8s.io",
    "policy",
    "rbac.authorization.k8s.io",
    "storage.k8s.io",
    "admissionregistration.k8s.io",
    "apiextensions.k8s.io",
    "scheduling.k8s.io",
    "coordination.k8s.io",
    "node.k8s.io",
    "discovery.k8s.io",
    "resource.k8s.io",
    "flowcontrol.apiserver.k8s.io",
];

/// Fields of `Event` that selectors may name, in the core version.
const EVENT_FIELDS: [&str; 11] = [
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];

/// How long events live.
const EVENT_TTL_SECONDS: u64 = 3600;

fn rows() -> Vec<Resource> {
    let mut rows = core();
    rows.extend(workloads());
    rows.extend(cluster());
    rows.extend(extension());
    rows.extend(reviews());
    rows
}

fn core() -> Vec<Resource> {
    use Scope::{Cluster, Namespaced};
    use SubresourceKind as S;
    let row = |kind: &'static str, plural: &'static str, scope| Resource::new("", &["v1"], kind, plural, scope);
    let mut event = row("Event", "events", Namespaced).short(&["ev"]).fields(&EVENT_FIELDS);
    event.ttl_seconds = EVENT_TTL_SECONDS;
    event.strategy = &strategy::CREATE_ON_UPDATE;
    event.dependents = Dependents::None;
    vec![
        row("Binding", "bindings", Namespaced).verbs(Verbs::CREATE).answers(Virtual::Binding),
        row("ComponentStatus", "componentstatuses", Cluster)
            .short(&["cs"])
            .verbs(Verbs::GET.or(Verbs::LIST))
            .answers(Virtual::ComponentStatus),
        row("ConfigMap", "configmaps", Namespaced).strategy(&strategy::config::CONFIG_MAP).short(&["cm"]),
        row("Endpoints", "endpoints", Namespaced).short(&["ep"]).strategy(&strategy::CREATE_ON_UPDATE),
        event,
        row("LimitRange", "limitranges", Namespaced).short(&["limits"]).strategy(&strategy::CREATE_ON_UPDATE),
        row("Namespace", "namespaces", Cluster)
            .returned()
            .short(&["ns"])
            .verbs(Verbs::ALL.without(Verbs::DELETECOLLECTION))
            .strategy(&strategy::config::NAMESPACE)
            .fields(&["status.phase"])
            .sub("finalize", S::Finalize, Verbs::UPDATE)
            .status(),
        row("Node", "nodes", Cluster)
            .short(&["no"])
            .fields(&["spec.unschedulable"])
            .sub_of("proxy", S::Proxy, Verbs::PROXY, ("", "", "NodeProxyOptions"))
            .status(),
        row("PersistentVolumeClaim", "persistentvolumeclaims", Namespaced)
            .strategy(&strategy::fixed::CLAIM)
            .returned()
            .short(&["pvc"])
            .status(),
        row("PersistentVolume", "persistentvolumes", Cluster)
            .strategy(&strategy::fixed::VOLUME)
            .returned()
            .short(&["pv"])
            .status(),
        row("Pod", "pods", Namespaced)
            .returned()
            .short(&["po"])
            .category("all")
            .strategy(&strategy::pod::POD)
            .fields(&[
                "spec.nodeName",
                "spec.restartPolicy",
                "spec.schedulerName",
                "spec.serviceAccountName",
                "spec.hostNetwork",
                "status.phase",
                "status.podIP",
                "status.podIPs",
                "status.nominatedNodeName",
            ])
            .sub_of("attach", S::Attach, Verbs::CONNECT, ("", "", "PodAttachOptions"))
            .sub_of("binding", S::Binding, Verbs::CREATE, ("", "", "Binding"))
            .sub("ephemeralcontainers", S::EphemeralContainers, Verbs::GET_PATCH_UPDATE)
            .sub_of("eviction", S::Eviction, Verbs::CREATE, ("policy", "v1", "Eviction"))
            .sub_of("exec", S::Exec, Verbs::CONNECT, ("", "", "PodExecOptions"))
            .sub("log", S::Log, Verbs::GET)
            .sub_of("portforward", S::PortForward, Verbs::CONNECT, ("", "", "PodPortForwardOptions"))
            .sub_of("proxy", S::Proxy, Verbs::PROXY, ("", "", "PodProxyOptions"))
            .sub("resize", S::Resize, Verbs::GET_PATCH_UPDATE)
            .status(),
        row("PodTemplate", "podtemplates", Namespaced).returned().strategy(&strategy::GENERATION),
        row("ReplicationController", "replicationcontrollers", Namespaced)
            .orphans()
            .short(&["rc"])
            .category("all")
            .strategy(&strategy::workload::REPLICATION_CONTROLLER)
            .fields(&["status.replicas"])
            .scale()
            .status(),
        row("ResourceQuota", "resourcequotas", Namespaced).returned().short(&["quota"]).status(),
        row("Secret", "secrets", Namespaced).strategy(&strategy::config::SECRET).fields(&["type"]),
        row("ServiceAccount", "serviceaccounts", Namespaced).returned().short(&["sa"]).sub_of(
            "token",
            S::Token,
            Verbs::CREATE,
            ("authentication.k8s.io", "v1", "TokenRequest"),
        ),
        row("Service", "services", Namespaced)
            .returned()
            .short(&["svc"])
            .category("all")
            .strategy(&strategy::service::SERVICE)
            .fields(&["spec.clusterIP", "spec.type"])
            .sub_of("proxy", S::Proxy, Verbs::PROXY, ("", "", "ServiceProxyOptions"))
            .status(),
    ]
}

fn workloads() -> Vec<Resource> {
    use Scope::Namespaced;
    let apps = |kind: &'static str, plural: &'static str| Resource::new("apps", &["v1"], kind, plural, Namespaced);
    let batch = |kind: &'static str, plural: &'static str| Resource::new("batch", &["v1"], kind, plural, Namespaced);
    vec![
        apps("ControllerRevision", "controllerrevisions"),
        apps("DaemonSet", "daemonsets")
            .short(&["ds"])
            .category("all")
            .strategy(&strategy::workload::DAEMON_SET)
            .status(),
        apps("Deployment", "deployments")
            .short(&["deploy"])
            .category("all")
            .strategy(&strategy::workload::DEPLOYMENT)
            .scale()
            .status(),
        apps("ReplicaSet", "replicasets")
            .short(&["rs"])
            .category("all")
            .strategy(&strategy::workload::REPLICA_SET)
            .fields(&["status.replicas"])
            .scale()
            .status(),
        apps("StatefulSet", "statefulsets")
            .short(&["sts"])
            .category("all")
            .strategy(&strategy::workload::STATEFUL_SET)
            .scale()
            .status(),
        Resource::new("autoscaling", &["v2", "v1"], "HorizontalPodAutoscaler", "horizontalpodautoscalers", Namespaced)
            .strategy(&strategy::fixed::AUTOSCALER)
            .short(&["hpa"])
            .category("all")
            .status(),
        batch("CronJob", "cronjobs").short(&["cj"]).category("all").strategy(&strategy::job::CRON_JOB).status(),
        batch("Job", "jobs")
            .orphans()
            .category("all")
            .strategy(&strategy::job::JOB)
            .fields(&["status.successful"])
            .status(),
        Resource::new("policy", &["v1"], "PodDisruptionBudget", "poddisruptionbudgets", Namespaced)
            .short(&["pdb"])
            .strategy(&strategy::fixed::BUDGET)
            .status(),
    ]
}

fn cluster() -> Vec<Resource> {
    use Scope::{Cluster, Namespaced};
    let row = |group: &'static str, kind: &'static str, plural: &'static str, scope| {
        Resource::new(group, &["v1"], kind, plural, scope)
    };
    let (net, rbac, storage) = ("networking.k8s.io", "rbac.authorization.k8s.io", "storage.k8s.io");
    let (resource, flow) = ("resource.k8s.io", "flowcontrol.apiserver.k8s.io");
    let mut event = row("events.k8s.io", "Event", "events", Namespaced).short(&["ev"]).fields(&[
        "regarding.kind",
        "regarding.namespace",
        "regarding.name",
        "regarding.uid",
        "regarding.apiVersion",
        "regarding.resourceVersion",
        "regarding.fieldPath",
        "reason",
        "reportingController",
        "type",
    ]);
    event.ttl_seconds = EVENT_TTL_SECONDS;
    event.strategy = &strategy::CREATE_ON_UPDATE;
    event.dependents = Dependents::None;
    event.set_storage(Some(("", "v1", "events")));
    vec![
        event,
        row("certificates.k8s.io", "CertificateSigningRequest", "certificatesigningrequests", Cluster)
            .short(&["csr"])
            .fields(&["spec.signerName"])
            .sub("approval", SubresourceKind::Approval, Verbs::GET_PATCH_UPDATE)
            .status(),
        row(net, "IngressClass", "ingressclasses", Cluster).strategy(&strategy::GENERATION),
        row(net, "Ingress", "ingresses", Namespaced).short(&["ing"]).strategy(&strategy::GENERATION).status(),
        row(net, "IPAddress", "ipaddresses", Cluster).short(&["ip"]).strategy(&strategy::address::ADDRESS),
        row(net, "NetworkPolicy", "networkpolicies", Namespaced).short(&["netpol"]).strategy(&strategy::GENERATION),
        row(net, "ServiceCIDR", "servicecidrs", Cluster).strategy(&strategy::address::RANGE).status(),
        row(rbac, "ClusterRoleBinding", "clusterrolebindings", Cluster).strategy(&strategy::RBAC),
        row(rbac, "ClusterRole", "clusterroles", Cluster).strategy(&strategy::RBAC),
        row(rbac, "RoleBinding", "rolebindings", Namespaced).strategy(&strategy::RBAC),
        row(rbac, "Role", "roles", Namespaced).strategy(&strategy::RBAC),
        row(storage, "CSIDriver", "csidrivers", Cluster).returned().strategy(&strategy::CONDITIONAL),
        row(storage, "CSINode", "csinodes", Cluster).returned().strategy(&strategy::CONDITIONAL),
        row(storage, "CSIStorageCapacity", "csistoragecapacities", Namespaced).strategy(&strategy::CONDITIONAL),
        row(storage, "StorageClass", "storageclasses", Cluster).returned().short(&["sc"]),
        row(storage, "VolumeAttachment", "volumeattachments", Cluster)
            .returned()
            .strategy(&strategy::CONDITIONAL)
            .status(),
        row(storage, "VolumeAttributesClass", "volumeattributesclasses", Cluster).returned().short(&["vac"]),
        row("scheduling.k8s.io", "PriorityClass", "priorityclasses", Cluster)
            .short(&["pc"])
            .strategy(&strategy::GENERATION),
        row("coordination.k8s.io", "Lease", "leases", Namespaced).strategy(&strategy::CONDITIONAL_CREATE),
        row("node.k8s.io", "RuntimeClass", "runtimeclasses", Cluster).strategy(&strategy::CONDITIONAL_CREATE),
        row("discovery.k8s.io", "EndpointSlice", "endpointslices", Namespaced).strategy(&strategy::GENERATION),
        row(resource, "DeviceClass", "deviceclasses", Cluster).returned().strategy(&strategy::GENERATION),
        row(resource, "ResourceClaim", "resourceclaims", Namespaced).returned().status(),
        row(resource, "ResourceClaimTemplate", "resourceclaimtemplates", Namespaced).returned(),
        row(resource, "ResourceSlice", "resourceslices", Cluster)
            .returned()
            .strategy(&strategy::GENERATION)
            .fields(&["spec.nodeName", "spec.driver"]),
        row(flow, "FlowSchema", "flowschemas", Cluster).strategy(&strategy::GENERATION).status(),
        row(flow, "PriorityLevelConfiguration", "prioritylevelconfigurations", Cluster)
            .strategy(&strategy::GENERATION)
            .status(),
    ]
}

fn extension() -> Vec<Resource> {
    let row = |group: &'static str, kind: &'static str, plural: &'static str| {
        Resource::new(group, &["v1"], kind, plural, Scope::Cluster)
            .category("api-extensions")
            .strategy(&strategy::CONDITIONAL_GENERATION)
    };
    let admission = "admissionregistration.k8s.io";
    let mut service = row("apiregistration.k8s.io", "APIService", "apiservices").status();
    service.strategy = &strategy::CONDITIONAL;
    vec![
        row(admission, "MutatingWebhookConfiguration", "mutatingwebhookconfigurations"),
        row(admission, "ValidatingAdmissionPolicy", "validatingadmissionpolicies").status(),
        row(admission, "ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings"),
        row(admission, "ValidatingWebhookConfiguration", "validatingwebhookconfigurations"),
        row("apiextensions.k8s.io", "CustomResourceDefinition", "customresourcedefinitions")
            .short(&["crd", "crds"])
            .status(),
        service,
    ]
}

fn reviews() -> Vec<Resource> {
    use Scope::{Cluster, Namespaced};
    let row = |group: &'static str, kind: &'static str, plural: &'static str, scope, answers| {
        Resource::new(group, &["v1"], kind, plural, scope).verbs(Verbs::CREATE).answers(answers)
    };
    let (authn, authz) = ("authentication.k8s.io", "authorization.k8s.io");
    vec![
        row(authn, "SelfSubjectReview", "selfsubjectreviews", Cluster, Virtual::SelfSubjectReview),
        row(authn, "TokenReview", "tokenreviews", Cluster, Virtual::TokenReview),
        row(
            authz,
            "LocalSubjectAccessReview",
            "localsubjectaccessreviews",
            Namespaced,
            Virtual::LocalSubjectAccessReview,
        ),
        row(authz, "SelfSubjectAccessReview", "selfsubjectaccessreviews", Cluster, Virtual::SelfSubjectAccessReview),
        row(authz, "SelfSubjectRulesReview", "selfsubjectrulesreviews", Cluster, Virtual::SelfSubjectRulesReview),
        row(authz, "SubjectAccessReview", "subjectaccessreviews", Cluster, Virtual::SubjectAccessReview),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_groups_known() {
        let mut seen = std::collections::HashSet::new();
        for row in RESOURCES.iter() {
            assert!(seen.insert((row.group.clone(), row.plural.clone())), "{row:?} twice");
            assert!(row.group.is_empty() || GROUPS.contains(&&*row.group), "{row:?}: unknown group");
        }
    }

    #[test]
    fn keys_and_heads_follow_the_row() {
        let find = |group: &str, plural: &str| {
            RESOURCES.iter().find(|r| r.group == group && r.plural == plural).unwrap().clone()
        };
        let deployments = find("apps", "deployments");
        assert_eq!(deployments.key("default", "web"), "/registry/apps/deployments/default/web");
        assert_eq!(deployments.head(), "{\"apiVersion\":\"apps/v1\",\"kind\":\"Deployment\",\"metadata\":{");
        assert_eq!(find("", "nodes").key("", "n1"), "/registry/core/nodes/n1");
        assert_eq!(find("events.k8s.io", "events").prefix(), find("", "events").prefix());
        assert_eq!(find("events.k8s.io", "events").head(), find("", "events").head());
    }
}
