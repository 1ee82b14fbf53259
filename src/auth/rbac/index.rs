//! Roles and bindings of the store, indexed by subject.

use super::rule::{PolicyRule, null_as_empty};
use crate::auth::live::Fold;
use crate::auth::{Attributes, UserInfo};
use coracle_store::KeyValue;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Key prefix of everything RBAC.
pub const PREFIX: &str = "/registry/rbac.authorization.k8s.io/";

/// `RoleRef` of a binding.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct RoleRef {
    pub kind: String,
    pub name: String,
}

/// `Subject` of a binding.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Subject {
    pub kind: String,
    pub name: String,
    pub namespace: String,
}

#[derive(Deserialize)]
struct Role {
    #[serde(default, deserialize_with = "null_as_empty")]
    rules: Vec<PolicyRule>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct BindingObject {
    #[serde(default)]
    role_ref: RoleRef,
    #[serde(default, deserialize_with = "null_as_empty")]
    subjects: Vec<Subject>,
}

/// A RoleBinding (with namespace) or ClusterRoleBinding.
#[derive(Debug)]
struct Binding {
    name: String,
    namespace: String,
    role_ref: RoleRef,
    subjects: Vec<Subject>,
}

/// Bindings of one namespace, or of the cluster.
#[derive(Default)]
struct Scope {
    bindings: BTreeMap<String, Arc<Binding>>,
    users: HashMap<String, Vec<Arc<Binding>>>,
    groups: HashMap<String, Vec<Arc<Binding>>>,
}

impl Scope {
    fn insert(&mut self, binding: Binding) {
        self.remove(&binding.name);
        let binding = Arc::new(binding);
        for subject in &binding.subjects {
            let of = match subject.user(&binding.namespace) {
                Some(user) => self.users.entry(user).or_default(),
                None if subject.kind == "Group" => self.groups.entry(subject.name.clone()).or_default(),
                None => continue,
            };
            if !of.iter().any(|known| Arc::ptr_eq(known, &binding)) {
                of.push(binding.clone());
            }
        }
        self.bindings.insert(binding.name.clone(), binding);
    }

    fn remove(&mut self, name: &str) {
        let Some(binding) = self.bindings.remove(name) else { return };
        for map in [&mut self.users, &mut self.groups] {
            map.retain(|_, bindings| {
                bindings.retain(|known| !Arc::ptr_eq(known, &binding));
                !bindings.is_empty()
            });
        }
    }

    /// Bindings that apply to `user`, each once.
    fn applying(&self, user: &UserInfo) -> Vec<&Arc<Binding>> {
        let groups = user.groups.iter().filter_map(|group| self.groups.get(group));
        let mut found: Vec<&Arc<Binding>> = Vec::new();
        for binding in self.users.get(&user.name).into_iter().chain(groups).flatten() {
            if !found.iter().any(|known| Arc::ptr_eq(known, binding)) {
                found.push(binding);
            }
        }
        found
    }
}

impl Subject {
    /// The user name that this subject stands for when it is no group.
    fn user(&self, binding_namespace: &str) -> Option<String> {
        let namespace = if self.namespace.is_empty() { binding_namespace } else { &self.namespace };
        match self.kind.as_str() {
            "User" => Some(self.name.clone()),
            "ServiceAccount" if !namespace.is_empty() => {
                Some(format!("system:serviceaccount:{namespace}:{}", self.name))
            }
            _ => None,
        }
    }

    fn describe(&self, binding_namespace: &str) -> String {
        let namespace = if self.namespace.is_empty() { binding_namespace } else { &self.namespace };
        match self.kind.as_str() {
            "ServiceAccount" => format!("{} \"{}/{namespace}\"", self.kind, self.name),
            _ => format!("{} \"{}\"", self.kind, self.name),
        }
    }
}

impl Binding {
    /// Upstream's words for why `user` was allowed.
    fn describe(&self, user: &UserInfo) -> String {
        let subject = self.subjects.iter().find(|subject| match subject.user(&self.namespace) {
            Some(name) => name == user.name,
            None => subject.kind == "Group" && user.in_group(&subject.name),
        });
        let subject = subject.map(|s| s.describe(&self.namespace)).unwrap_or_default();
        let RoleRef { kind, name } = &self.role_ref;
        if self.namespace.is_empty() {
            format!("ClusterRoleBinding \"{}\" of {kind} \"{name}\" to {subject}", self.name)
        } else {
            format!("RoleBinding \"{}/{}\" of {kind} \"{name}\" to {subject}", self.name, self.namespace)
        }
    }
}

/// The whole of RBAC.
#[derive(Default)]
pub struct RbacIndex {
    cluster_roles: HashMap<String, Vec<PolicyRule>>,
    /// By namespace, then name.
    roles: HashMap<String, HashMap<String, Vec<PolicyRule>>>,
    cluster: Scope,
    namespaces: HashMap<String, Scope>,
}

/// Outcome of an evaluation.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Allowed, with upstream's reason.
    Allowed(String),
    /// Nobody allows it; the text names roles that bindings refer to but that are missing.
    NoOpinion(String),
}

impl RbacIndex {
    /// Evaluates one request.
    pub fn authorize(&self, user: &UserInfo, request: &Attributes<'_>) -> Verdict {
        let mut missing = Vec::new();
        for (binding, rules) in self.applying(user, request.namespace) {
            match rules {
                Some(rules) if rules.iter().any(|rule| rule.allows(request)) => {
                    return Verdict::Allowed(format!("RBAC: allowed by {}", binding.describe(user)));
                }
                Some(_) => {}
                None => missing.push(not_found(&binding.role_ref)),
            }
        }
        missing.dedup();
        Verdict::NoOpinion(match missing.as_slice() {
            [] => String::new(),
            [one] => format!("RBAC: {one}"),
            many => format!("RBAC: [{}]", many.join(", ")),
        })
    }

    /// Every rule that `user` has in `namespace` (empty: cluster wide only), and what could not be resolved.
    pub fn rules_for(&self, user: &UserInfo, namespace: &str) -> (Vec<PolicyRule>, Vec<String>) {
        let (mut all, mut missing) = (Vec::new(), Vec::new());
        for (binding, rules) in self.applying(user, namespace) {
            match rules {
                Some(rules) => all.extend_from_slice(rules),
                None => missing.push(not_found(&binding.role_ref)),
            }
        }
        (all, missing)
    }

    /// The rules of the role that a binding in `namespace` (empty: a ClusterRoleBinding) refers to.
    pub fn role_rules(&self, kind: &str, name: &str, namespace: &str) -> Option<&Vec<PolicyRule>> {
        match kind {
            "ClusterRole" => self.cluster_roles.get(name),
            "Role" => self.roles.get(namespace)?.get(name),
            _ => None,
        }
    }

    fn applying(
        &self,
        user: &UserInfo,
        namespace: &str,
    ) -> impl Iterator<Item = (&Arc<Binding>, Option<&Vec<PolicyRule>>)> {
        let local = (!namespace.is_empty()).then(|| self.namespaces.get(namespace)).flatten();
        let scopes = std::iter::once(&self.cluster).chain(local);
        let bindings: Vec<_> = scopes.flat_map(|scope| scope.applying(user)).collect();
        bindings.into_iter().map(|b| (b, self.role_rules(&b.role_ref.kind, &b.role_ref.name, &b.namespace)))
    }
}

fn not_found(role: &RoleRef) -> String {
    format!("{}.rbac.authorization.k8s.io \"{}\" not found", role.kind.to_lowercase(), role.name)
}

impl Fold for RbacIndex {
    fn clear(&mut self) {
        *self = RbacIndex::default();
    }

    fn put(&mut self, key: &str, row: &KeyValue) {
        // A row that cannot be read grants nothing.
        self.delete(key);
        let mut parts = key.splitn(3, '/');
        let (plural, first, second) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next());
        let decoded = match (plural, second) {
            ("clusterroles", None) => serde_json::from_slice::<Role>(&row.value).map(|role| {
                self.cluster_roles.insert(first.to_owned(), role.rules);
            }),
            ("roles", Some(name)) => serde_json::from_slice::<Role>(&row.value).map(|role| {
                self.roles.entry(first.to_owned()).or_default().insert(name.to_owned(), role.rules);
            }),
            ("clusterrolebindings", None) => binding(row, "", first).map(|b| self.cluster.insert(b)),
            ("rolebindings", Some(name)) => {
                binding(row, first, name).map(|b| self.namespaces.entry(first.to_owned()).or_default().insert(b))
            }
            _ => Ok(()),
        };
        if let Err(error) = decoded {
            tracing::error!(key, %error, "an RBAC object in the store cannot be read and grants nothing");
        }
    }

    fn delete(&mut self, key: &str) {
        let mut parts = key.splitn(3, '/');
        let (plural, first, second) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""), parts.next());
        match (plural, second) {
            ("clusterroles", None) => {
                self.cluster_roles.remove(first);
            }
            ("roles", Some(name)) => {
                if let Some(roles) = self.roles.get_mut(first) {
                    roles.remove(name);
                    if roles.is_empty() {
                        self.roles.remove(first);
                    }
                }
            }
            ("clusterrolebindings", None) => self.cluster.remove(first),
            ("rolebindings", Some(name)) => {
                if let Some(scope) = self.namespaces.get_mut(first) {
                    scope.remove(name);
                    if scope.bindings.is_empty() {
                        self.namespaces.remove(first);
                    }
                }
            }
            _ => {}
        }
    }
}

fn binding(row: &KeyValue, namespace: &str, name: &str) -> Result<Binding, serde_json::Error> {
    let object: BindingObject = serde_json::from_slice(&row.value)?;
    Ok(Binding {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        role_ref: object.role_ref,
        subjects: object.subjects,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::live::Live;
    use crate::auth::objects::testing::World;
    use serde_json::{Value, json};

    const GROUP: &str = "rbac.authorization.k8s.io";

    fn role_binding(namespace: &str, name: &str, role: (&str, &str), subject: Value) -> Value {
        json!({ "metadata": { "namespace": namespace, "name": name },
            "roleRef": { "kind": role.0, "name": role.1 }, "subjects": [subject] })
    }

    #[test]
    fn bindings_grant_in_their_scope_until_they_go() {
        let mut world = World::new();
        let live: Live<RbacIndex> = Live::new(world.objects.store().clone(), PREFIX);
        let reads = json!([{ "apiGroups": [""], "resources": ["pods"], "verbs": ["get"] }]);
        world.put(GROUP, "clusterroles", json!({ "metadata": { "name": "reader" }, "rules": reads }));
        world.put(GROUP, "roles", json!({ "metadata": { "namespace": "a", "name": "reader" }, "rules": reads }));
        let jane = UserInfo { name: "jane".into(), groups: vec!["dev".into()], ..UserInfo::default() };
        let robot = UserInfo::service_account("a", "robot", "");
        let ask = |user: &UserInfo, namespace: &str| {
            let get =
                Attributes { verb: "get", resource: "pods", namespace, is_resource: true, ..Attributes::default() };
            live.read().unwrap().authorize(user, &get)
        };
        let none = Verdict::NoOpinion(String::new());
        assert_eq!(ask(&jane, "a"), none);

        let dev = json!({ "kind": "Group", "name": "dev" });
        world.put(GROUP, "rolebindings", role_binding("a", "b1", ("ClusterRole", "reader"), dev));
        let allowed = r#"RBAC: allowed by RoleBinding "b1/a" of ClusterRole "reader" to Group "dev""#;
        assert_eq!(ask(&jane, "a"), Verdict::Allowed(allowed.into()));
        assert_eq!(ask(&jane, "b"), none);
        assert_eq!(ask(&jane, ""), none);
        assert_eq!(ask(&robot, "a"), none);

        let account = json!({ "kind": "ServiceAccount", "name": "robot", "namespace": "a" });
        world.put(GROUP, "clusterrolebindings", role_binding("", "b2", ("ClusterRole", "reader"), account.clone()));
        assert!(matches!(ask(&robot, "b"), Verdict::Allowed(_)));
        assert!(matches!(ask(&robot, ""), Verdict::Allowed(_)));

        world.delete(GROUP, "clusterroles", "", "reader");
        let missing = r#"RBAC: clusterrole.rbac.authorization.k8s.io "reader" not found"#;
        assert_eq!(ask(&robot, "b"), Verdict::NoOpinion(missing.into()));
        world.put(GROUP, "rolebindings", role_binding("a", "b3", ("Role", "reader"), account));
        assert!(matches!(ask(&robot, "a"), Verdict::Allowed(_)));
        world.delete(GROUP, "clusterrolebindings", "", "b2");
        world.delete(GROUP, "rolebindings", "a", "b3");
        assert_eq!(ask(&robot, "a"), none);
    }
}
