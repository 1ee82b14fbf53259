//! `pods/eviction`: a deletion that respects the pod's disruption budget.

use super::binding::set_condition;
use super::{read_body, success};
use crate::admission::{Operation, Request};
use crate::apiserver::body::Body;
use crate::apiserver::call::Call;
use crate::apiserver::codec::Kind;
use crate::apiserver::delete;
use crate::apiserver::metadata;
use crate::apiserver::object::{self, meta, metadata_mut};
use crate::apiserver::options::{DeleteOptions, WriteOptions};
use crate::apiserver::selector::{LabelSelector, Lookup};
use crate::apiserver::status::Status;
use crate::apiserver::write;
use coracle_store::{RangeRequest, prefix_end};
use http::{Response, StatusCode};
use serde_json::{Map, Value, json};

/// Most evictions of one budget that its controller has not seen yet.
const DISRUPTED_MAX: usize = 2000;
/// Attempts while the pod or the budget changes.
const ATTEMPTS: usize = 20;
const VIOLATES: &str = "Cannot evict pod as it would violate the pod's disruption budget.";

/// create
pub async fn create(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let options = WriteOptions::new(call.query, "CreateOptions", false)?;
    let kind = Kind { group: "policy", version: "v1", kind: "Eviction" };
    let mut eviction = read_body(call, kind, body, &options).await?;
    write::place(call, &mut eviction)?;
    match meta(&eviction, "name") {
        "" => {
            metadata_mut(&mut eviction).insert("name".to_owned(), json!(call.info.name));
        }
        found if found == call.info.name => {}
        _ => return Err(Status::bad_request("name in URL does not match name in Eviction object")),
    }
    let raw = options.to_value("CreateOptions");
    let mut request = Request {
        identity: call.identity,
        operation: Operation::Create,
        group: "",
        version: "v1",
        resource: "pods",
        subresource: "eviction",
        kind: "Eviction",
        namespace: call.namespace(),
        name: &call.info.name,
        object: &mut eviction,
        old: None,
        dry_run: options.dry_run,
        options: Some(&raw),
    };
    call.warn(call.server.admission().admit(&mut request).await?);
    let mut delete_options = DeleteOptions::new(eviction.get("deleteOptions"), call.query)?;
    delete_options.dry_run |= options.dry_run;
    evict(call, &delete_options).await?;
    success(call)
}

async fn evict(call: &Call<'_>, options: &DeleteOptions) -> Result<(), Status> {
    let mut conflict = None;
    for _ in 0..ATTEMPTS {
        call.server.backend().barrier().await?;
        let kv = call.server.backend().get(&call.key())?.ok_or_else(|| call.not_found())?;
        let pod = object::decode_kv(&kv)?;
        let free = ignores_budget(&pod);
        let pinned = if free { pins_version(&pod) } else { spend(call, &pod, options).await? };
        let mut pinned_options = options.clone();
        if pinned && options.resource_version.is_none() {
            pinned_options.resource_version = Some(meta(&pod, "resourceVersion").to_owned());
        }
        match mark_and_delete(call, &pinned_options).await {
            // The pod changed under a decision that depended on it.
            Err(status) if status.reason() == "Conflict" && pinned && options.resource_version.is_none() => {
                conflict = Some(status);
                if !free {
                    return Err(still_processed("", 10));
                }
            }
            other => return other,
        }
    }
    Err(conflict.unwrap_or_else(|| call.modified(&call.info.name)))
}

fn phase(pod: &Value) -> &str {
    pod.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default()
}

/// Pods that serve nobody count for no budget.
fn ignores_budget(pod: &Value) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed" | "Pending") || !meta(pod, "deletionTimestamp").is_empty()
}

/// A pending pod may start to run in the meantime.
fn pins_version(pod: &Value) -> bool {
    !matches!(phase(pod), "Succeeded" | "Failed") && meta(pod, "deletionTimestamp").is_empty()
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    conditions.into_iter().flatten().any(|c| c["type"] == "Ready" && c["status"] == "True")
}

/// Takes one disruption from the pod's budget, if it has one. True when the deletion must meet the pod as it was seen.
async fn spend(call: &Call<'_>, pod: &Value, options: &DeleteOptions) -> Result<bool, Status> {
    let mut budgets = budgets_of(call, pod)?;
    if budgets.len() > 1 {
        let why = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.";
        return Err(Status::new(StatusCode::INTERNAL_SERVER_ERROR, "", why));
    }
    let Some(budget) = budgets.pop() else { return Ok(false) };
    if !is_ready(pod) {
        let number = |key: &str| budget["status"][key].as_i64().unwrap_or(0);
        let healthy = number("currentHealthy") >= number("desiredHealthy") && number("desiredHealthy") > 0;
        if budget.pointer("/spec/unhealthyPodEvictionPolicy") == Some(&json!("AlwaysAllow")) || healthy {
            return Ok(true);
        }
    }
    let snapshot = call.server.registry().snapshot();
    let resource = snapshot.find("policy", "v1", "poddisruptionbudgets").ok_or_else(Status::no_such_resource)?;
    let (name, now) = (meta(&budget, "name").to_owned(), metadata::now());
    let change = |budget: &Value| decrement(budget, meta(pod, "name"), &now);
    write::direct(call.server, resource, call.namespace(), &name, options.dry_run, &change).await?;
    Ok(false)
}

fn budgets_of(call: &Call<'_>, pod: &Value) -> Result<Vec<Value>, Status> {
    let snapshot = call.server.registry().snapshot();
    let resource = snapshot.find("policy", "v1", "poddisruptionbudgets").ok_or_else(Status::no_such_resource)?;
    let start = resource.collection_key(call.namespace());
    let end = prefix_end(&start);
    let range = call.server.backend().range(&RangeRequest { start, end, ..RangeRequest::default() })?;
    let none = Map::new();
    let labels = pod.pointer("/metadata/labels").and_then(Value::as_object).unwrap_or(&none);
    let mut budgets = Vec::new();
    for kv in &range.kvs {
        let budget = object::decode_kv(kv)?;
        // No selector selects nothing, an empty one everything.
        let selector = budget.pointer("/spec/selector").and_then(LabelSelector::from_object);
        if selector.is_some_and(|s| s.matches(labels as &dyn Lookup)) {
            budgets.push(budget);
        }
    }
    Ok(budgets)
}

fn cause(status: Status, message: String) -> Status {
    status.with_causes(vec![json!({ "reason": "DisruptionBudget", "message": message })])
}

fn still_processed(budget: &str, seconds: u64) -> Status {
    let message = format!("The disruption budget {budget} is still being processed by the server.");
    cause(Status::too_many_requests(VIOLATES, seconds), message)
}

/// The budget with one disruption less.
fn decrement(budget: &Value, pod: &str, now: &str) -> Result<Value, Status> {
    let name = meta(budget, "name");
    let number = |key: &str| budget["status"][key].as_i64().unwrap_or(0);
    let generation = budget.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0);
    if number("observedGeneration") < generation {
        return Err(still_processed(name, 10));
    }
    let forbidden = |why: &str| Err(Status::forbidden("policy", "poddisruptionbudget", name, why));
    if number("disruptionsAllowed") < 0 {
        return forbidden("pdb disruptions allowed is negative");
    }
    if budget.pointer("/status/disruptedPods").and_then(Value::as_object).is_some_and(|p| p.len() > DISRUPTED_MAX) {
        return forbidden("DisruptedPods map too big - too many evictions not confirmed by PDB controller");
    }
    if number("disruptionsAllowed") == 0 {
        return Err(cause(Status::too_many_requests(VIOLATES, 0), why_not(budget, name)));
    }
    let mut budget = budget.clone();
    let left = number("disruptionsAllowed") - 1;
    budget["status"]["disruptionsAllowed"] = json!(left);
    if !budget["status"]["disruptedPods"].is_object() {
        budget["status"]["disruptedPods"] = json!({});
    }
    budget["status"]["disruptedPods"][pod] = json!(now);
    let conditions = budget.pointer_mut("/status/conditions").and_then(Value::as_array_mut);
    let allowed = conditions.into_iter().flatten().find(|c| c["type"] == "DisruptionAllowed");
    if let Some(condition) = allowed.filter(|c| left == 0 && c["status"] != "False") {
        condition["status"] = json!("False");
        condition["reason"] = json!("InsufficientPods");
        condition["message"] = json!("");
        condition["lastTransitionTime"] = json!(now);
    }
    Ok(budget)
}

fn why_not(budget: &Value, name: &str) -> String {
    let number = |key: &str| budget["status"][key].as_i64().unwrap_or(0);
    let conditions = budget.pointer("/status/conditions").and_then(Value::as_array);
    let condition =
        conditions.into_iter().flatten().find(|c| c["type"] == "DisruptionAllowed" && c["status"] == "False");
    let text = |key: &str| condition.and_then(|c| c[key].as_str()).unwrap_or_default();
    let (reason, message) = (text("reason"), text("message"));
    if reason == "SyncFailed" && !message.is_empty() {
        return format!(
            "The disruption budget {name} does not allow evicting pods currently because it failed sync: {message}"
        );
    }
    let (healthy, desired) = (number("currentHealthy"), number("desiredHealthy"));
    if healthy <= desired {
        return format!("The disruption budget {name} needs {desired} healthy pods and has {healthy} currently");
    }
    if message.is_empty() {
        return format!("The disruption budget {name} does not allow evicting pods currently");
    }
    format!("The disruption budget {name} does not allow evicting pods currently ({reason}): {message}")
}

/// Says in the pod why it goes, then deletes it.
async fn mark_and_delete(call: &Call<'_>, options: &DeleteOptions) -> Result<(), Status> {
    let mut options = options.clone();
    if !options.dry_run {
        let now = metadata::now();
        let change = |pod: &Value| {
            delete::check_preconditions(call.resource, pod, &options)?;
            let mut pod = pod.clone();
            let condition = json!({ "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI",
                "message": "Eviction API: evicting" });
            set_condition(&mut pod, condition, &now);
            Ok(pod)
        };
        let name = &call.info.name;
        let marked = write::direct(call.server, call.resource, call.namespace(), name, false, &change).await?;
        if options.resource_version.is_some() {
            options.resource_version = Some(marked.revision.to_string());
        }
    }
    delete::remove(call, &call.info.name, call.namespace(), &options).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(allowed: i64) -> Value {
        json!({ "metadata": { "name": "b", "generation": 1 }, "status": { "observedGeneration": 1,
            "disruptionsAllowed": allowed, "desiredHealthy": 2, "currentHealthy": 2,
            "conditions": [{ "type": "DisruptionAllowed", "status": "True" }] } })
    }

    #[test]
    fn a_budget_is_spent_and_then_refuses() {
        let spent = decrement(&budget(1), "p", "t").unwrap();
        assert_eq!(
            (&spent["status"]["disruptionsAllowed"], &spent["status"]["disruptedPods"]["p"]),
            (&json!(0), &json!("t"))
        );
        assert_eq!(spent["status"]["conditions"][0]["reason"], "InsufficientPods");
        let refused = decrement(&budget(0), "p", "t").unwrap_err();
        assert_eq!((refused.code(), refused.message()), (429, VIOLATES));
        assert_eq!(
            refused.to_value()["details"]["causes"][0]["message"],
            "The disruption budget b needs 2 healthy pods and has 2 currently"
        );
        let mut stale = budget(1);
        stale["metadata"]["generation"] = json!(2);
        assert!(
            decrement(&stale, "p", "t").unwrap_err().to_value()["details"]["causes"][0]["message"]
                .as_str()
                .unwrap()
                .contains("still being processed")
        );
    }
}
