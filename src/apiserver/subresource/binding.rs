//! `pods/binding` (and the old `bindings`): the one way a pod gets its node.

use super::{read_body, success};
use crate::admission::{Operation, Request};
use crate::apiserver::body::Body;
use crate::apiserver::call::Call;
use crate::apiserver::codec::Kind;
use crate::apiserver::field::{FieldError, aggregate};
use crate::apiserver::metadata;
use crate::apiserver::object::{meta, metadata_mut};
use crate::apiserver::options::WriteOptions;
use crate::apiserver::status::Status;
use crate::apiserver::write;
use http::Response;
use serde_json::{Value, json};

/// create; `name` is the pod's.
pub async fn create(call: &Call<'_>, name: &str, body: Body) -> Result<Response<Body>, Status> {
    let options = WriteOptions::new(call.query, "CreateOptions", false)?;
    let mut binding = read_body(call, Kind { group: "", version: "v1", kind: "Binding" }, body, &options).await?;
    write::place(call, &mut binding)?;
    bind(call, name, binding, &options).await?;
    success(call)
}

/// Checks and carries out a Binding.
async fn bind(call: &Call<'_>, name: &str, mut binding: Value, options: &WriteOptions) -> Result<(), Status> {
    let name = if name.is_empty() { meta(&binding, "name").to_owned() } else { name.to_owned() };
    match meta(&binding, "name") {
        "" => {
            metadata_mut(&mut binding).insert("name".to_owned(), json!(name));
        }
        found if found == name => {}
        _ => return Err(Status::bad_request("name in URL does not match name in Binding object")),
    }
    let target = |key: &str| binding.pointer(&format!("/target/{key}")).and_then(Value::as_str).unwrap_or_default();
    let mut errors = Vec::new();
    if !matches!(target("kind"), "" | "Node") {
        errors.push(FieldError::not_supported("target.kind", target("kind"), &["Node", "<empty>"]));
    }
    if target("name").is_empty() {
        errors.push(FieldError::required("target.name", ""));
    }
    if let Some(message) = aggregate(errors.iter().map(ToString::to_string)) {
        return Err(Status::new(http::StatusCode::INTERNAL_SERVER_ERROR, "", message));
    }
    let raw = options.to_value("CreateOptions");
    let mut request = Request {
        identity: call.identity,
        operation: Operation::Create,
        group: "",
        version: "v1",
        resource: "pods",
        subresource: "binding",
        kind: "Binding",
        namespace: call.namespace(),
        name: &name,
        object: &mut binding,
        old: None,
        dry_run: options.dry_run,
        options: Some(&raw),
    };
    call.warn(call.server.admission().admit(&mut request).await?);
    let now = metadata::now();
    let pods = call.server.registry().snapshot();
    let pods = pods.find("", "v1", "pods").ok_or_else(Status::no_such_resource)?;
    let change = |pod: &Value| assign(pod, &binding, &name, &now);
    write::direct(call.server, pods, call.namespace(), &name, options.dry_run, &change).await?;
    Ok(())
}

/// The pod on the node of a binding.
fn assign(pod: &Value, binding: &Value, name: &str, now: &str) -> Result<Value, Status> {
    let conflict = |why: String| Err(Status::conflict("", "pods/binding", name, why));
    for (key, what) in [("uid", "UID"), ("resourceVersion", "ResourceVersion")] {
        let (wanted, found) = (meta(binding, key), meta(pod, key));
        if !wanted.is_empty() && wanted != found {
            let why = format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}");
            return Err(Status::conflict("", "pods", name, why));
        }
    }
    if !meta(pod, "deletionTimestamp").is_empty() {
        return conflict(format!("pod {name} is being deleted, cannot be assigned to a host"));
    }
    let node = pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default();
    if !node.is_empty() {
        return conflict(format!("pod {name} is already assigned to node \"{node}\""));
    }
    if pod.pointer("/spec/schedulingGates").and_then(Value::as_array).is_some_and(|g| !g.is_empty()) {
        return conflict(format!("pod {name} has non-empty .spec.schedulingGates"));
    }
    let mut pod = pod.clone();
    pod["spec"]["nodeName"] = binding["target"]["name"].clone();
    if let Some(status) = pod.get_mut("status").and_then(Value::as_object_mut) {
        status.remove("nominatedNodeName");
    }
    for key in ["annotations", "labels"] {
        let Some(more) = binding.pointer(&format!("/metadata/{key}")).and_then(Value::as_object) else { continue };
        let target = metadata_mut(&mut pod).entry(key).or_insert_with(|| json!({}));
        for (name, value) in more {
            target[name] = value.clone();
        }
    }
    set_condition(&mut pod, json!({ "type": "PodScheduled", "status": "True" }), now);
    Ok(pod)
}

/// Sets a condition of a pod; the transition time stays when the status does.
pub fn set_condition(pod: &mut Value, mut condition: Value, now: &str) {
    if !pod["status"].is_object() {
        pod["status"] = json!({});
    }
    if !pod["status"]["conditions"].is_array() {
        pod["status"]["conditions"] = json!([]);
    }
    condition["lastTransitionTime"] = json!(now);
    condition["lastProbeTime"] = Value::Null;
    let Some(conditions) = pod["status"]["conditions"].as_array_mut() else { return };
    match conditions.iter_mut().find(|c| c["type"] == condition["type"]) {
        Some(old) => {
            if old["status"] == condition["status"] {
                condition["lastTransitionTime"] = old["lastTransitionTime"].clone();
            }
            if let Some(generation) = old.get("observedGeneration") {
                condition["observedGeneration"] = generation.clone();
            }
            *old = condition;
        }
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_bound_once() {
        let pod = json!({ "metadata": { "name": "p" }, "spec": {}, "status": {} });
        let binding = json!({ "metadata": { "annotations": { "a": "b" } }, "target": { "name": "n" } });
        let bound = assign(&pod, &binding, "p", "t").unwrap();
        assert_eq!((&bound["spec"]["nodeName"], &bound["metadata"]["annotations"]["a"]), (&json!("n"), &json!("b")));
        assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
        let again = assign(&bound, &binding, "p", "t").unwrap_err();
        assert_eq!(
            again.message(),
            "Operation cannot be fulfilled on pods/binding \"p\": pod p is already assigned to node \"n\""
        );
    }
}
