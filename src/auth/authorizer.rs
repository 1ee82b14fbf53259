//! The one question everything asks before it acts: may this caller do that?

use super::live::Live;
use super::node::{self, NodeGraph};
use super::objects::{ObjectError, Objects};
use super::rbac::{self, PolicyRule, RbacIndex, Verdict};
use super::{Attributes, Decision, Identity, UserInfo, identity};
use coracle_store::Store;
use parking_lot::RwLockReadGuard;
use std::sync::Arc;

/// The `system:node` rules apply to kubelets without a binding, as upstream's node authorizer has them built in.
const NODE_ROLE: &str = "system:node";

/// Node authorizer and RBAC in upstream's order; the first that allows decides. Cheap to clone.
#[derive(Clone)]
pub struct Authorizer {
    inner: Arc<Inner>,
}

struct Inner {
    objects: Objects,
    rbac: Live<RbacIndex>,
    graph: Live<NodeGraph>,
}

impl Authorizer {
    /// Reads what it decides by from `store`; needs no task.
    pub fn new(store: Store) -> Authorizer {
        let rbac = Live::new(store.clone(), rbac::index::PREFIX);
        let graph = Live::new(store.clone(), node::PREFIX);
        Authorizer { inner: Arc::new(Inner { objects: Objects::new(store), rbac, graph }) }
    }

    /// Decides one request. Synchronous; sees every write that was acknowledged before the call. When the store cannot be
    /// read the answer is no.
    pub fn authorize(&self, caller: &Identity, attributes: &Attributes<'_>) -> Decision {
        self.authorize_user(caller.user(), attributes)
    }

    /// The same for a user that is only asked about (SubjectAccessReview).
    pub fn authorize_user(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Decision {
        if user.in_group(identity::SYSTEM_MASTERS) {
            return Decision { allowed: true, reason: String::new() };
        }
        self.decide(user, attributes).unwrap_or_else(|error| {
            tracing::error!(%error, "authorization could not read the store");
            Decision { allowed: false, reason: "the authorizer could not read its rules".to_owned() }
        })
    }

    fn decide(&self, user: &UserInfo, attributes: &Attributes<'_>) -> Result<Decision, ObjectError> {
        let rbac = self.rbac()?;
        let mut reasons = Vec::new();
        if let Some(name) = user.as_node() {
            let graph = self.inner.graph.read()?;
            let rules = rbac.role_rules("ClusterRole", NODE_ROLE, "").map(Vec::as_slice).unwrap_or_default();
            let decision = node::authorize(&graph, &self.inner.objects, rules, name, attributes)?;
            if decision.allowed {
                return Ok(decision);
            }
            reasons.push(decision.reason);
        }
        match rbac.authorize(user, attributes) {
            Verdict::Allowed(reason) => return Ok(Decision { allowed: true, reason }),
            Verdict::NoOpinion(reason) => reasons.push(reason),
        }
        reasons.retain(|reason| !reason.is_empty());
        Ok(Decision { allowed: false, reason: reasons.join("\n") })
    }

    /// The objects that decisions are made by.
    pub(crate) fn objects(&self) -> &Objects {
        &self.inner.objects
    }

    /// Roles and bindings, as of now.
    pub(crate) fn rbac(&self) -> Result<RwLockReadGuard<'_, RbacIndex>, ObjectError> {
        self.inner.rbac.read()
    }

    /// Every RBAC rule that applies to `user` in `namespace`, and what could not be resolved.
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> Result<(Vec<PolicyRule>, Vec<String>), ObjectError> {
        Ok(self.rbac()?.rules_for(user, namespace))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use serde_json::json;

    #[test]
    fn masters_may_all_nodes_their_part_others_what_is_bound() {
        let mut world = World::new();
        let authorizer = Authorizer::new(world.objects.store().clone());
        let get = Attributes {
            verb: "get",
            resource: "secrets",
            namespace: "a",
            name: "s",
            is_resource: true,
            ..Attributes::default()
        };
        assert!(authorizer.authorize(&Identity::apiserver(), &get).allowed);
        let node = Identity::node("n1");
        let refused = authorizer.authorize(&node, &get);
        assert_eq!(refused.reason, "no relationship found between node 'n1' and this object");
        let spec = json!({ "nodeName": "n1", "imagePullSecrets": [{ "name": "s" }] });
        world.put("", "pods", json!({ "metadata": { "namespace": "a", "name": "p" }, "spec": spec }));
        assert!(authorizer.authorize(&node, &get).allowed);
        // The name alone makes no node: the group must be there too.
        let impostor = Identity::in_process("system:node:n1", &[]);
        assert!(!authorizer.authorize(&impostor, &get).allowed);
    }
}
