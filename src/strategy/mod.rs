//! What differs between kinds when an object is written: conditional defaults, validation, names, generation.
//!
//! The engine in [`crate::apiserver`] is the same for all kinds; a row of `RESOURCES` points to one [`Strategy`].
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`address`] | IPAddresses, ServiceCIDRs |
//! | [`config`] | ConfigMaps, Secrets, Namespaces |
//! | [`fixed`] | fields that must not change, and kinds with few rules |
//! | [`job`] | Jobs and CronJobs |
//! | [`pod`] | pods and pod templates |
//! | [`service`] | Services, their addresses and node ports |
//! | [`workload`] | what has a selector, a template and a count |
//! | [`value`] | small readings of JSON objects |
//!
//! The schema's own defaults and structural checks have already run when these are called, and objects are in the
//! storage version.

pub mod address;
pub mod config;
pub mod fixed;
pub mod job;
pub mod pod;
pub mod service;
pub mod value;
pub mod workload;

use crate::apiserver::ApiServer;
use crate::apiserver::field::ErrorList;
use crate::apiserver::resources::Resource;
use crate::apiserver::status::Status;
use crate::auth::Identity;
use crate::strategy::service::allocation::ServiceNetwork;
use futures::future::BoxFuture;
use serde_json::Value;

/// Which write this is.
pub struct Context<'a> {
    pub resource: &'a Resource,
    /// Empty for the resource itself; `status`, `ephemeralcontainers`, `resize`, `approval`, ...
    pub subresource: &'a str,
    /// Empty for cluster scope.
    pub namespace: &'a str,
    pub name: &'a str,
    pub identity: &'a Identity,
    /// Now, RFC 3339 in seconds, as it goes into `metav1.Time` fields.
    pub now: &'a str,
    pub dry_run: bool,
    /// Where Services get their addresses.
    pub services: &'a ServiceNetwork,
}

/// What names a kind allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameRule {
    /// RFC 1123 subdomain: most kinds.
    Subdomain,
    /// RFC 1123 label: namespaces.
    Label,
    /// RFC 1035 label: Services.
    Label1035,
    /// Anything that fits in one path segment: RBAC, webhooks' kinds of old.
    PathSegment,
    /// An IP address in its canonical form.
    Address,
}

/// The rules of one kind. Function pointers, so that a row of the table is plain data.
pub struct Strategy {
    /// Conditional defaults, and dropping what a client may not set (for example `status` is already dropped by the engine).
    pub prepare_create: fn(&Context<'_>, new: &mut Value),
    /// The same for updates, also through subresources (the engine has already kept `spec` or `status` of the old object).
    pub prepare_update: fn(&Context<'_>, new: &mut Value, old: &Value),
    /// Everything wrong with a new object, in upstream's order; metadata is checked by the engine.
    pub validate_create: fn(&Context<'_>, new: &Value) -> ErrorList,
    /// Everything wrong with an update, in upstream's order; metadata is checked by the engine.
    pub validate_update: fn(&Context<'_>, new: &Value, old: &Value) -> ErrorList,
    /// Texts for `Warning:` headers.
    pub warnings: fn(&Context<'_>, new: &Value) -> Vec<String>,
    /// What needs the cluster's state before the write, e.g. Service addresses and node ports. `old` is none for a create.
    /// After a failed write the next attempt calls it again, so it must be repeatable.
    pub allocate: Option<Allocate>,
    /// Gives back what `allocate` took, after a write or a deletion (`new` is none) has been committed.
    pub released: Option<Released>,
    pub names: NameRule,
    /// Whether `metadata.generation` counts changes outside `metadata` and `status`.
    pub generation: bool,
    /// Whether a PUT of a name that does not exist creates it.
    pub create_on_update: bool,
    /// Whether a PUT without a resource version overwrites whatever is there.
    pub unconditional_update: bool,
}

/// See [`Strategy::allocate`].
pub type Allocate = for<'a> fn(
    server: &'a ApiServer,
    context: &'a Context<'a>,
    new: &'a mut Value,
    old: Option<&'a Value>,
) -> BoxFuture<'a, Result<(), Status>>;

/// See [`Strategy::released`].
pub type Released = for<'a> fn(
    server: &'a ApiServer,
    context: &'a Context<'a>,
    old: &'a Value,
    new: Option<&'a Value>,
) -> BoxFuture<'a, ()>;

fn no_prepare_create(_: &Context<'_>, _: &mut Value) {}
fn no_prepare_update(_: &Context<'_>, _: &mut Value, _: &Value) {}
fn no_validate_create(_: &Context<'_>, _: &Value) -> ErrorList {
    ErrorList::new()
}
fn no_warnings(_: &Context<'_>, _: &Value) -> Vec<String> {
    Vec::new()
}

impl Strategy {
    /// Nothing beyond what the schema says.
    pub const DEFAULT: Strategy = Strategy {
        prepare_create: no_prepare_create,
        prepare_update: no_prepare_update,
        validate_create: no_validate_create,
        validate_update: fixed::changes,
        warnings: no_warnings,
        allocate: None,
        released: None,
        names: NameRule::Subdomain,
        generation: false,
        create_on_update: false,
        unconditional_update: true,
    };
}

/// A kind with nothing of its own.
pub static DEFAULT: Strategy = Strategy::DEFAULT;
/// A kind whose generation counts changes of its spec.
pub static GENERATION: Strategy = Strategy { generation: true, ..Strategy::DEFAULT };
/// A kind that must be updated with its resource version.
pub static CONDITIONAL: Strategy = Strategy { unconditional_update: false, ..Strategy::DEFAULT };
/// The same, counting generations.
pub static CONDITIONAL_GENERATION: Strategy =
    Strategy { unconditional_update: false, generation: true, ..Strategy::DEFAULT };
/// Leases and runtime classes: a PUT creates, or needs the resource version.
pub static CONDITIONAL_CREATE: Strategy =
    Strategy { unconditional_update: false, create_on_update: true, ..Strategy::DEFAULT };
/// Kinds whose PUT creates, with subdomain names (Endpoints, Leases, ...).
pub static CREATE_ON_UPDATE: Strategy = Strategy { create_on_update: true, ..Strategy::DEFAULT };
/// RBAC: any path segment is a name, and a PUT creates.
pub static RBAC: Strategy = Strategy { names: NameRule::PathSegment, create_on_update: true, ..Strategy::DEFAULT };
