//! ClusterRoles with an aggregation rule hold the rules of all roles it selects.

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};

use super::Term;
use super::api::Api;
use super::informer::Informer;
use super::object::{Key, Object};
use super::queue::Queue;
use super::resource::CLUSTER_ROLES;
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::selector::Selector;

/// Starts the loop.
pub fn start(term: &Term) {
    let (queue, roles) = (Arc::new(Queue::default()), term.informers.of(&CLUSTER_ROLES));
    let again = queue.clone();
    let known = roles.clone();
    let subscription = roles.subscribe(move |delta| {
        // Any role may be part of any aggregate; aggregates are few.
        if delta.latest().is_some() {
            for role in known.read().iter().filter(|role| is_aggregate(role)) {
                again.add(role.key.clone());
            }
        }
    });
    let reconcile = Arc::new(Aggregation { api: term.api("clusterrole-aggregation-controller"), roles: roles.clone() });
    let subscriptions = vec![subscription];
    term.start(Controller {
        name: "clusterrole-aggregation",
        queue,
        concurrency: 2,
        needs: vec![roles],
        subscriptions,
        reconcile,
    });
}

/// Cheaper than decoding every role: the field's name is in the bytes.
fn is_aggregate(role: &Object) -> bool {
    let needle = b"\"clusterRoleSelectors\"";
    role.bytes.windows(needle.len()).any(|window| window == needle)
}

struct Aggregation {
    api: Api,
    roles: Arc<Informer>,
}

/// The rules of the roles, in their order, each once.
fn union(roles: &[ClusterRole]) -> Vec<PolicyRule> {
    let mut rules: Vec<PolicyRule> = Vec::new();
    for rule in roles.iter().flat_map(|role| role.rules.iter().flatten()) {
        if !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    rules
}

impl Reconcile for Aggregation {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl Aggregation {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        let Some(object) = self.roles.get(key) else { return Ok(Next::Done) };
        let mut role: ClusterRole = object.decode()?;
        let Some(selectors) = role.aggregation_rule.as_ref().and_then(|rule| rule.cluster_role_selectors.clone())
        else {
            return Ok(Next::Done);
        };
        let selectors: Vec<Selector> =
            selectors.iter().filter_map(|selector| Selector::of_label_selector(Some(selector))).collect();
        let selected: Vec<Arc<Object>> = self
            .roles
            .read()
            .iter()
            .filter(|other| other.key != *key && selectors.iter().any(|selector| selector.matches(&other.labels)))
            .cloned()
            .collect();
        let parts: Vec<ClusterRole> = selected.iter().map(|part| part.decode()).collect::<Result<_, _>>()?;
        let rules = union(&parts);
        if role.rules.clone().unwrap_or_default() == rules {
            return Ok(Next::Done);
        }
        role.rules = Some(rules);
        self.api.update(&CLUSTER_ROLES, key, "", &role).await?;
        Ok(Next::Done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use serde_json::json;

    #[test]
    fn rules_are_joined_without_repeats() {
        let role = |verbs: &[&str]| -> ClusterRole {
            let rules: Vec<_> = verbs.iter().map(|verb| json!({"verbs": [verb]})).collect();
            serde_json::from_value(json!({"rules": rules})).unwrap()
        };
        let verbs: Vec<_> = union(&[role(&["get", "list"]), role(&["list", "watch"])])
            .into_iter()
            .flat_map(|rule| rule.verbs)
            .collect();
        assert_eq!(verbs, ["get", "list", "watch"]);
        let aggregate = json!({"metadata": {"name": "a"}, "aggregationRule": {"clusterRoleSelectors": []}}).to_string();
        assert!(is_aggregate(&parse(&CLUSTER_ROLES, aggregate.as_bytes(), false).unwrap()));
    }
}
