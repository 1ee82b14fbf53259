//! What every write passes after it was authorized and before it is stored: plug-ins that fill in and plug-ins that refuse.
//!
//! The API service calls [`Admission::mutate`], applies schema and strategy, then calls [`Admission::validate`]; or
//! [`Admission::admit`] where nothing lies between (deletes, connects). The plug-ins are upstream's default set, in its order;
//! webhooks and policies will come before the quota.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`request`] | [`Request`], [`Operation`] |
//! | [`pod`] | walking pod specs in JSON |
//! | [`namespace_lifecycle`] | NamespaceLifecycle |
//! | [`limit_ranger`] | LimitRanger |
//! | [`service_account`] | ServiceAccount |
//! | [`node_restriction`] | NodeRestriction |
//! | [`pod_security`] | PodSecurity |
//! | [`priority`] | Priority |
//! | [`defaults`] | DefaultTolerationSeconds, TaintNodesByCondition, DefaultStorageClass, DefaultIngressClass, StorageObjectInUseProtection, RuntimeClass, PodTopologyLabels |
//! | [`claim_resize`] | PersistentVolumeClaimResize |
//! | [`certificates`] | CertificateApproval, CertificateSigning, CertificateSubjectRestriction |
//! | [`rbac_escalation`] | nobody grants what they do not hold |
//! | [`quota`], [`resource_list`] | ResourceQuota; amounts of resources |

pub mod certificates;
pub mod claim_resize;
pub mod defaults;
pub mod limit_ranger;
pub mod namespace_lifecycle;
pub mod node_restriction;
pub mod pod;
pub mod pod_security;
pub mod priority;
pub mod quota;
pub mod rbac_escalation;
pub mod request;
pub mod resource_list;
pub mod service_account;

pub use request::{Operation, Request, Warnings};

use crate::apiserver::backend::Backend;
use crate::apiserver::status::Status;
use crate::auth::Authorizer;
use serde::de::DeserializeOwned;
use std::sync::Arc;

/// The chain of plug-ins in upstream's order. Cheap to clone.
#[derive(Clone)]
pub struct Admission {
    world: Arc<World>,
}

/// What plug-ins decide by: the objects in the store and the rights of callers.
pub struct World {
    pub authorizer: Authorizer,
    pub backend: Backend,
}

impl World {
    /// A stored object.
    pub fn get<T: DeserializeOwned>(
        &self,
        group: &str,
        plural: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<T>, Status> {
        self.authorizer.objects().get(group, plural, namespace, name).map_err(Status::internal)
    }

    /// All objects of a resource, in `namespace` or (empty) everywhere.
    pub fn list<T: DeserializeOwned>(&self, group: &str, plural: &str, namespace: &str) -> Result<Vec<T>, Status> {
        self.authorizer.objects().list(group, plural, namespace).map_err(Status::internal)
    }
}

impl Admission {
    pub fn new(backend: Backend, authorizer: Authorizer) -> Admission {
        Admission { world: Arc::new(World { authorizer, backend }) }
    }

    /// The mutating phase: may change `request.object`.
    pub async fn mutate(&self, request: &mut Request<'_>) -> Result<Warnings, Status> {
        let world = &*self.world;
        namespace_lifecycle::check(world, request)?;
        limit_ranger::mutate(world, request)?;
        service_account::mutate(world, request).await?;
        node_restriction::check(world, request)?;
        defaults::taint_new_node(request);
        priority::mutate(world, request)?;
        defaults::toleration_seconds(request);
        defaults::storage_class(world, request)?;
        defaults::protect_storage(request);
        defaults::runtime_class(world, request)?;
        certificates::mutate(request);
        defaults::ingress_class(world, request)?;
        defaults::topology_labels(world, request)?;
        Ok(Warnings::new())
    }

    /// The validating phase: changes nothing but may charge quotas, so call it last and once per attempt.
    pub async fn validate(&self, request: &Request<'_>) -> Result<Warnings, Status> {
        let world = &*self.world;
        limit_ranger::validate(world, request)?;
        service_account::validate(world, request)?;
        let warnings = pod_security::validate(world, request)?;
        priority::validate(world, request)?;
        claim_resize::validate(world, request)?;
        certificates::validate(world, request)?;
        rbac_escalation::check(world, request)?;
        quota::charge(world, request).await?;
        Ok(warnings)
    }

    /// Both phases.
    pub async fn admit(&self, request: &mut Request<'_>) -> Result<Warnings, Status> {
        let mut warnings = self.mutate(request).await?;
        warnings.extend(self.validate(request).await?);
        Ok(warnings)
    }
}
