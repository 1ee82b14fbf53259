//! Priority: the number behind a pod's priority class, and at most one class that is the default.

use super::pod::text;
use super::{Request, World};
use crate::apiserver::status::Status;
use serde_json::Value;

const GROUP: &str = "scheduling.k8s.io";
const PREEMPT_LOWER: &str = "PreemptLowerPriority";

pub fn mutate(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    if !request.is("", "pods") {
        return Ok(());
    }
    if request.updates() {
        if let Some(old) = request.old {
            for field in ["priority", "preemptionPolicy"] {
                if request.object["spec"][field].is_null() && !old["spec"][field].is_null() {
                    request.object["spec"][field] = old["spec"][field].clone();
                }
            }
        }
        return Ok(());
    }
    if !request.creates() {
        return Ok(());
    }
    let name = text(&request.object["spec"], "priorityClassName").to_owned();
    let class = if name.is_empty() {
        default_class(world)?
    } else {
        let found: Option<Value> = world.get(GROUP, "priorityclasses", "", &name)?;
        Some(found.ok_or_else(|| request.forbidden(format_args!("no PriorityClass with name {name} was found")))?)
    };
    let (priority, policy) = match &class {
        Some(class) => (class["value"].as_i64().unwrap_or(0), class["preemptionPolicy"].as_str().unwrap_or("")),
        None => (0, PREEMPT_LOWER),
    };
    let spec = &request.object["spec"];
    if let Some(given) = spec["priority"].as_i64().filter(|given| *given != priority) {
        return Err(request.forbidden(format_args!(
            "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed {priority} from the given PriorityClass name"
        )));
    }
    if let Some(given) = spec["preemptionPolicy"].as_str().filter(|given| !policy.is_empty() && *given != policy) {
        return Err(request.forbidden(format_args!(
            "the string value of PreemptionPolicy ({given}) must not be provided in pod spec; priority admission controller computed {policy} from the given PriorityClass name"
        )));
    }
    let spec = &mut request.object["spec"];
    if let (true, Some(class)) = (name.is_empty(), &class) {
        spec["priorityClassName"] = class["metadata"]["name"].clone();
    }
    spec["priority"] = priority.into();
    if !policy.is_empty() {
        spec["preemptionPolicy"] = policy.into();
    }
    Ok(())
}

pub fn validate(world: &World, request: &Request<'_>) -> Result<(), Status> {
    let concerned = request.is(GROUP, "priorityclasses") && (request.creates() || request.updates());
    if !concerned || request.object["globalDefault"] != true {
        return Ok(());
    }
    match default_class(world)? {
        Some(class) if request.creates() || class["metadata"]["name"] != request.object["metadata"]["name"] => {
            let other = text(&class["metadata"], "name");
            Err(request.forbidden(format_args!(
                "PriorityClass {other} is already marked as default. Only one default can exist"
            )))
        }
        _ => Ok(()),
    }
}

fn default_class(world: &World) -> Result<Option<Value>, Status> {
    let classes: Vec<Value> = world.list(GROUP, "priorityclasses", "")?;
    Ok(classes.into_iter().filter(|c| c["globalDefault"] == true).min_by_key(|c| c["value"].as_i64().unwrap_or(0)))
}
