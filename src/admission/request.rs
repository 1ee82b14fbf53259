//! One write on its way through admission.

use crate::auth::Identity;
use serde_json::Value;

/// What the write does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

/// A write (or a connect) as the plug-ins see it; upstream's `admission.Attributes`.
pub struct Request<'a> {
    pub identity: &'a Identity,
    pub operation: Operation,
    /// API group of the resource, empty for core.
    pub group: &'a str,
    pub version: &'a str,
    /// Lower-case plural.
    pub resource: &'a str,
    pub subresource: &'a str,
    /// Kind of `object` (for `pods/binding` it is `Binding`).
    pub kind: &'a str,
    /// Empty for cluster scope; for the resource `namespaces` the name itself, as in upstream's RequestInfo.
    pub namespace: &'a str,
    /// Empty when a create leaves the name to `generateName`.
    pub name: &'a str,
    /// The new object in its request version, whole (also for subresources such as `status`); `Null` for deletes. Object metadata
    /// of a create (namespace, generated name) is already filled in, uid and creationTimestamp may be missing.
    pub object: &'a mut Value,
    /// The stored object for updates and deletes.
    pub old: Option<&'a Value>,
    pub dry_run: bool,
    /// CreateOptions, UpdateOptions or DeleteOptions as sent, for webhooks.
    pub options: Option<&'a Value>,
}

/// Texts for `Warning:` headers of the answer.
pub type Warnings = Vec<String>;
