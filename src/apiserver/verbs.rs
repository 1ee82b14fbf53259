//! What can be done with a kind: scope, verbs, subresources, answers without storage.

/// Whether objects of a kind live in a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Namespaced,
    Cluster,
}

/// A set of verbs. Discovery prints them in alphabetical order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verbs(u16);

impl Verbs {
    pub const CREATE: Verbs = Verbs(1);
    pub const DELETE: Verbs = Verbs(1 << 1);
    pub const DELETECOLLECTION: Verbs = Verbs(1 << 2);
    pub const GET: Verbs = Verbs(1 << 3);
    pub const LIST: Verbs = Verbs(1 << 4);
    pub const PATCH: Verbs = Verbs(1 << 5);
    pub const UPDATE: Verbs = Verbs(1 << 6);
    pub const WATCH: Verbs = Verbs(1 << 7);
    pub const ALL: Verbs = Verbs(0xff);
    /// What a status-like subresource has.
    pub const GET_PATCH_UPDATE: Verbs = Verbs(Self::GET.0 | Self::PATCH.0 | Self::UPDATE.0);
    /// What a proxy subresource has.
    pub const PROXY: Verbs = Verbs(Self::CREATE.0 | Self::DELETE.0 | Self::GET_PATCH_UPDATE.0);
    /// What exec, attach and port-forward have.
    pub const CONNECT: Verbs = Verbs(Self::CREATE.0 | Self::GET.0);
    const NAMES: [&'static str; 8] =
        ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

    /// Both sets.
    pub const fn or(self, other: Verbs) -> Verbs {
        Verbs(self.0 | other.0)
    }

    /// This set without `other`.
    pub const fn without(self, other: Verbs) -> Verbs {
        Verbs(self.0 & !other.0)
    }

    /// Whether all of `other` is in this set.
    pub const fn contains(self, other: Verbs) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the verb of this name is in the set.
    pub fn contains_name(self, verb: &str) -> bool {
        Self::NAMES.iter().position(|name| *name == verb).is_some_and(|bit| self.0 & (1 << bit) != 0)
    }

    /// The names, alphabetically.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES.into_iter().enumerate().filter(move |(bit, _)| self.0 & (1 << bit) != 0).map(|(_, name)| name)
    }
}

/// What a subresource does; the engine has one implementation of each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubresourceKind {
    /// Writes only `status`.
    Status,
    /// `autoscaling/v1` Scale over spec.replicas.
    Scale,
    /// Binds a pod to a node.
    Binding,
    /// Deletes a pod when its disruption budgets allow it.
    Eviction,
    /// Issues a token of a service account.
    Token,
    /// Approves or denies a certificate request.
    Approval,
    /// Writes `spec.finalizers` of a namespace.
    Finalize,
    EphemeralContainers,
    Resize,
    Log,
    Exec,
    Attach,
    PortForward,
    Proxy,
}

/// One subresource of a kind.
#[derive(Clone, Debug)]
pub struct Subresource {
    pub name: &'static str,
    pub does: SubresourceKind,
    pub verbs: Verbs,
    /// Group and version when the body is of another group than the parent (both empty otherwise).
    pub group: &'static str,
    pub version: &'static str,
    /// Kind of the body; empty means the parent's.
    pub kind: &'static str,
}

/// What a kind without storage answers to a create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtual {
    Binding,
    ComponentStatus,
    SelfSubjectReview,
    TokenReview,
    SubjectAccessReview,
    LocalSubjectAccessReview,
    SelfSubjectAccessReview,
    SelfSubjectRulesReview,
}

/// What a delete without a propagation policy does to the objects an object owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dependents {
    Background,
    Orphan,
    /// The kind can own nothing.
    None,
}
