//! NamespaceLifecycle: nothing is made in a namespace that is missing or going away, and the system's own stay.

use super::{Operation, Request, World};
use crate::apiserver::status::Status;
use serde_json::{Value, json};

const IMMORTAL: [&str; 3] = ["default", "kube-system", "kube-public"];

pub fn check(world: &World, request: &Request<'_>) -> Result<(), Status> {
    let about_namespace = request.group.is_empty() && request.resource == "namespaces";
    if about_namespace {
        if request.operation == Operation::Delete && request.subresource.is_empty() && IMMORTAL.contains(&request.name)
        {
            return Err(Status::forbidden("", "namespaces", request.name, "this namespace may not be deleted"));
        }
        return Ok(());
    }
    let review = request.group == "authorization.k8s.io" && request.resource == "localsubjectaccessreviews";
    let concerned = matches!(request.operation, Operation::Create | Operation::Update);
    if request.namespace.is_empty() || review || !concerned {
        return Ok(());
    }
    let Some(namespace) = world.get::<Value>("", "namespaces", "", request.namespace)? else {
        return Err(Status::not_found("", "namespaces", request.namespace));
    };
    if request.creates() && namespace["status"]["phase"] == "Terminating" {
        let name = request.namespace;
        let why = format!("unable to create new content in namespace {name} because it is being terminated");
        let cause = json!({
            "reason": "NamespaceTerminating", "field": "metadata.namespace",
            "message": format!("namespace {name} is being terminated"),
        });
        return Err(request.forbidden(why).with_causes(vec![cause]));
    }
    Ok(())
}
