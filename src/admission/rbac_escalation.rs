//! Nobody grants what they do not hold: writes of roles and bindings are checked against the writer's own rules, unless the
//! verb `escalate` (roles) or `bind` (bindings) was granted.

use super::pod::text;
use super::{Request, World};
use crate::apiserver::status::Status;
use crate::auth::Attributes;
use crate::auth::identity::SYSTEM_MASTERS;
use crate::auth::rbac::{PolicyRule, missing_rules};
use serde_json::{Value, json};

const GROUP: &str = "rbac.authorization.k8s.io";

pub fn check(world: &World, request: &Request<'_>) -> Result<(), Status> {
    let concerned = request.group == GROUP && (request.creates() || request.updates());
    if !concerned || request.identity.user().in_group(SYSTEM_MASTERS) {
        return Ok(());
    }
    match request.resource {
        "roles" | "clusterroles" => check_role(world, request),
        "rolebindings" | "clusterrolebindings" => check_binding(world, request),
        _ => Ok(()),
    }
}

/// An update that only takes finalizers or owners off on the way to deletion changes no rights.
fn is_unchanged(request: &Request<'_>, fields: &[&str]) -> bool {
    request.old.is_some_and(|old| fields.iter().all(|field| old[*field] == request.object[*field]))
}

fn check_role(world: &World, request: &Request<'_>) -> Result<(), Status> {
    if is_unchanged(request, &["rules", "aggregationRule"]) {
        return Ok(());
    }
    let escalate = Attributes {
        verb: "escalate",
        group: GROUP,
        version: "v1",
        resource: request.resource,
        name: request.name,
        namespace: request.namespace,
        is_resource: true,
        ..Attributes::default()
    };
    if world.authorizer.authorize(request.identity, &escalate).allowed {
        return Ok(());
    }
    let mut rules = rules_of(request.object);
    if !request.object["aggregationRule"].is_null() {
        // Whoever chooses what is aggregated must hold everything.
        rules = rules_of(&json!({ "rules": [
            { "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"] },
            { "nonResourceURLs": ["*"], "verbs": ["*"] },
        ] }));
    }
    confirm(world, request, &rules)
}

fn check_binding(world: &World, request: &Request<'_>) -> Result<(), Status> {
    if is_unchanged(request, &["roleRef", "subjects"]) {
        return Ok(());
    }
    let role = &request.object["roleRef"];
    let (kind, name) = (text(role, "kind"), text(role, "name"));
    let bind = Attributes {
        verb: "bind",
        group: GROUP,
        version: "v1",
        resource: if kind == "Role" { "roles" } else { "clusterroles" },
        name,
        namespace: request.namespace,
        is_resource: true,
        ..Attributes::default()
    };
    if world.authorizer.authorize(request.identity, &bind).allowed {
        return Ok(());
    }
    let rules = world.authorizer.rbac().map_err(Status::internal)?.role_rules(kind, name, request.namespace).cloned();
    match rules {
        Some(rules) => confirm(world, request, &rules),
        None => Err(Status::not_found(GROUP, bind.resource, name)),
    }
}

fn rules_of(role: &Value) -> Vec<PolicyRule> {
    serde_json::from_value(role["rules"].clone()).unwrap_or_default()
}

fn confirm(world: &World, request: &Request<'_>, wanted: &[PolicyRule]) -> Result<(), Status> {
    let user = request.identity.user();
    let (own, errors) = world.authorizer.rules_for(user, request.namespace).map_err(Status::internal)?;
    let missing = missing_rules(&own, wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let groups: Vec<String> = user.groups.iter().map(|group| format!("{group:?}")).collect();
    let mut why = format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        user.name,
        groups.join(" "),
        missing.join("\n")
    );
    if !errors.is_empty() {
        why.push_str(&format!("; resolution errors: [{}]", errors.join(", ")));
    }
    Err(request.forbidden(why))
}
