//! Who is calling. An [`Identity`] exists only when a credential was checked or when this process made it for one of
//! its own tasks: there is no public constructor.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Group of callers that authorization lets do anything; only certificates of our own CA carry it.
pub const SYSTEM_MASTERS: &str = "system:masters";
/// Group of every authenticated caller.
pub const SYSTEM_AUTHENTICATED: &str = "system:authenticated";
/// Group of callers without credentials.
pub const SYSTEM_UNAUTHENTICATED: &str = "system:unauthenticated";
/// Name of callers without credentials.
pub const SYSTEM_ANONYMOUS: &str = "system:anonymous";
/// Group of all kubelets.
pub const SYSTEM_NODES: &str = "system:nodes";

/// Name, uid, groups and extra attributes of a caller (`authentication.k8s.io/v1` UserInfo).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    /// The identity of the service account `namespace/name`, as its tokens carry it.
    pub fn service_account(namespace: &str, name: &str, uid: &str) -> UserInfo {
        UserInfo {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            uid: uid.to_owned(),
            groups: vec![
                "system:serviceaccounts".to_owned(),
                format!("system:serviceaccounts:{namespace}"),
                SYSTEM_AUTHENTICATED.to_owned(),
            ],
            extra: BTreeMap::new(),
        }
    }

    /// Whether the caller is a member of `group`.
    pub fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|g| g == group)
    }

    /// Namespace and name when the caller is a service account.
    pub fn as_service_account(&self) -> Option<(&str, &str)> {
        let (namespace, name) = self.name.strip_prefix("system:serviceaccount:")?.split_once(':')?;
        (!namespace.is_empty() && !name.is_empty() && !name.contains(':')).then_some((namespace, name))
    }

    /// Name of the node when the caller is a kubelet (`system:node:<name>` in group `system:nodes`).
    pub fn as_node(&self) -> Option<&str> {
        let name = self.name.strip_prefix("system:node:")?;
        (!name.is_empty() && self.in_group(SYSTEM_NODES)).then_some(name)
    }
}

/// An authenticated caller; a request extension. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Identity {
    user: Arc<UserInfo>,
    /// Who really called when `user` is impersonated.
    impersonator: Option<Arc<UserInfo>>,
}

impl Identity {
    /// A checked credential; only [`crate::auth`]'s authentication calls this, on behalf of the listener.
    pub(in crate::auth) fn authenticated(user: impl Into<Arc<UserInfo>>) -> Identity {
        Identity { user: user.into(), impersonator: None }
    }

    /// The same connection acting as `user`, after authorization of each impersonated attribute.
    pub(in crate::auth) fn acting_as(&self, user: UserInfo) -> Identity {
        Identity { user: Arc::new(user), impersonator: Some(self.user.clone()) }
    }

    /// A task of this process, e.g. `system:kube-scheduler`; `system:authenticated` is added to `groups`.
    pub(crate) fn in_process(name: &str, groups: &[&str]) -> Identity {
        let groups = groups.iter().copied().chain([SYSTEM_AUTHENTICATED]).map(str::to_owned).collect();
        Identity::authenticated(UserInfo { name: name.to_owned(), groups, ..UserInfo::default() })
    }

    /// A controller of this process under its own service account in `kube-system`, e.g. `deployment-controller`:
    /// the bootstrap policy binds `system:controller:<name>` to it.
    pub(crate) fn controller(name: &str) -> Identity {
        Identity::authenticated(UserInfo::service_account("kube-system", name, ""))
    }

    /// The agent of this process: `system:node:<name>`.
    pub(crate) fn node(name: &str) -> Identity {
        Identity::in_process(&format!("system:node:{name}"), &[SYSTEM_NODES])
    }

    /// The server itself (bootstrap of namespaces, RBAC, the `kubernetes` Service).
    pub(crate) fn apiserver() -> Identity {
        Identity::in_process("system:apiserver", &[SYSTEM_MASTERS])
    }

    /// The effective caller.
    pub fn user(&self) -> &UserInfo {
        &self.user
    }

    /// The caller whose credential it was, when it acts as somebody else.
    pub fn impersonator(&self) -> Option<&UserInfo> {
        self.impersonator.as_deref()
    }
}
