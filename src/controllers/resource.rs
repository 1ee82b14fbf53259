//! What the control loops need to know of a resource to reach it: its names, group, version and scope.

use std::borrow::Cow;
use std::fmt;

use k8s_openapi::{ClusterResourceScope, NamespaceResourceScope};

/// One resource of the API, built in or found by discovery.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Resource {
    /// API group, empty for the core group.
    pub group: Cow<'static, str>,
    /// Version within the group.
    pub version: Cow<'static, str>,
    /// Plural name, as in the URL.
    pub plural: Cow<'static, str>,
    /// Kind of its objects.
    pub kind: Cow<'static, str>,
    /// Whether objects live in namespaces.
    pub namespaced: bool,
}

impl Resource {
    /// The namespaced resource of a Rust type.
    pub const fn namespaced<T: k8s_openapi::Resource<Scope = NamespaceResourceScope>>() -> Resource {
        Resource::new(T::GROUP, T::VERSION, T::URL_PATH_SEGMENT, T::KIND, true)
    }

    /// The cluster-scoped resource of a Rust type.
    pub const fn cluster<T: k8s_openapi::Resource<Scope = ClusterResourceScope>>() -> Resource {
        Resource::new(T::GROUP, T::VERSION, T::URL_PATH_SEGMENT, T::KIND, false)
    }

    const fn new(
        group: &'static str,
        version: &'static str,
        plural: &'static str,
        kind: &'static str,
        namespaced: bool,
    ) -> Resource {
        Resource {
            group: Cow::Borrowed(group),
            version: Cow::Borrowed(version),
            plural: Cow::Borrowed(plural),
            kind: Cow::Borrowed(kind),
            namespaced,
        }
    }

    /// `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_string() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Path of the collection: in one namespace, or over all when `namespace` is empty.
    pub fn collection(&self, namespace: &str) -> String {
        let root = if self.group.is_empty() { "/api/" } else { "/apis/" };
        let group = if self.group.is_empty() { String::new() } else { format!("{}/", self.group) };
        if self.namespaced && !namespace.is_empty() {
            format!("{root}{group}{}/namespaces/{namespace}/{}", self.version, self.plural)
        } else {
            format!("{root}{group}{}/{}", self.version, self.plural)
        }
    }

    /// Path of one object.
    pub fn object(&self, namespace: &str, name: &str) -> String {
        format!("{}/{name}", self.collection(namespace))
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.group.is_empty() { f.write_str(&self.plural) } else { write!(f, "{}.{}", self.plural, self.group) }
    }
}

macro_rules! resources {
    ($($name:ident = $scope:ident $type:path;)*) => {
        $(#[doc = concat!("`", stringify!($type), "`")] pub static $name: Resource = Resource::$scope::<$type>();)*
    };
}

resources! {
    PODS = namespaced k8s_openapi::api::core::v1::Pod;
    NODES = cluster k8s_openapi::api::core::v1::Node;
    NAMESPACES = cluster k8s_openapi::api::core::v1::Namespace;
    SERVICES = namespaced k8s_openapi::api::core::v1::Service;
    ENDPOINTS = namespaced k8s_openapi::api::core::v1::Endpoints;
    CONFIG_MAPS = namespaced k8s_openapi::api::core::v1::ConfigMap;
    EVENTS = namespaced k8s_openapi::api::core::v1::Event;
    SERVICE_ACCOUNTS = namespaced k8s_openapi::api::core::v1::ServiceAccount;
    REPLICATION_CONTROLLERS = namespaced k8s_openapi::api::core::v1::ReplicationController;
    RESOURCE_QUOTAS = namespaced k8s_openapi::api::core::v1::ResourceQuota;
    PERSISTENT_VOLUMES = cluster k8s_openapi::api::core::v1::PersistentVolume;
    PERSISTENT_VOLUME_CLAIMS = namespaced k8s_openapi::api::core::v1::PersistentVolumeClaim;
    DEPLOYMENTS = namespaced k8s_openapi::api::apps::v1::Deployment;
    REPLICA_SETS = namespaced k8s_openapi::api::apps::v1::ReplicaSet;
    STATEFUL_SETS = namespaced k8s_openapi::api::apps::v1::StatefulSet;
    DAEMON_SETS = namespaced k8s_openapi::api::apps::v1::DaemonSet;
    CONTROLLER_REVISIONS = namespaced k8s_openapi::api::apps::v1::ControllerRevision;
    JOBS = namespaced k8s_openapi::api::batch::v1::Job;
    CRON_JOBS = namespaced k8s_openapi::api::batch::v1::CronJob;
    ENDPOINT_SLICES = namespaced k8s_openapi::api::discovery::v1::EndpointSlice;
    LEASES = namespaced k8s_openapi::api::coordination::v1::Lease;
    POD_DISRUPTION_BUDGETS = namespaced k8s_openapi::api::policy::v1::PodDisruptionBudget;
    CLUSTER_ROLES = cluster k8s_openapi::api::rbac::v1::ClusterRole;
    VOLUME_ATTRIBUTES_CLASSES = cluster k8s_openapi::api::storage::v1::VolumeAttributesClass;
    SERVICE_CIDRS = cluster k8s_openapi::api::networking::v1::ServiceCIDR;
    IP_ADDRESSES = cluster k8s_openapi::api::networking::v1::IPAddress;
    STORAGE_CLASSES = cluster k8s_openapi::api::storage::v1::StorageClass;
    CUSTOM_RESOURCE_DEFINITIONS = cluster k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
    API_SERVICES = cluster k8s_openapi::kube_aggregator::pkg::apis::apiregistration::v1::APIService;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_follow_the_url_grammar() {
        assert_eq!(PODS.object("default", "a"), "/api/v1/namespaces/default/pods/a");
        assert_eq!(PODS.collection(""), "/api/v1/pods");
        assert_eq!(DEPLOYMENTS.collection("x"), "/apis/apps/v1/namespaces/x/deployments");
        assert_eq!(NODES.object("", "n"), "/api/v1/nodes/n");
        assert_eq!(DEPLOYMENTS.api_version(), "apps/v1");
    }
}
