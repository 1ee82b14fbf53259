//! One write on its way through admission.

use crate::apiserver::status::Status;
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
    /// The new object in its storage version, whole (also for subresources such as `status`); `Null` for deletes. Object metadata
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

impl Request<'_> {
    /// Whether it is about `resource` of `group` itself, not about a subresource.
    pub fn is(&self, group: &str, resource: &str) -> bool {
        self.is_sub(group, resource, "")
    }

    /// Whether it is about this subresource.
    pub fn is_sub(&self, group: &str, resource: &str, subresource: &str) -> bool {
        self.group == group && self.resource == resource && self.subresource == subresource
    }

    pub fn creates(&self) -> bool {
        self.operation == Operation::Create
    }

    pub fn updates(&self) -> bool {
        self.operation == Operation::Update
    }

    /// The name for messages: that of the request or of the object, or its `generateName`.
    pub fn display_name(&self) -> &str {
        let of_object = |key: &str| self.object["metadata"][key].as_str().filter(|text| !text.is_empty());
        match self.name {
            "" => of_object("name").or_else(|| of_object("generateName")).unwrap_or("Unknown"),
            name => name,
        }
    }

    /// 403 as upstream's `admission.NewForbidden`.
    pub fn forbidden(&self, why: impl std::fmt::Display) -> Status {
        Status::forbidden(self.group, self.resource, self.display_name(), why)
    }
}
