//! LimitRanger: defaults and bounds for the resources of containers, pods and volume claims in a namespace.

use super::pod::{items, text};
use super::resource_list::{ResourceList, of_pod, read};
use super::{Request, World};
use crate::apiserver::status::Status;
use crate::schema::quantity::Quantity;
use serde_json::{Value, json};

const ANNOTATION: &str = "kubernetes.io/limit-ranger";
/// Largest amount that still has room for thousandths in 64 bits.
const MAX_MILLI_VALUE: i64 = i64::MAX / 1000;

fn concerns(request: &Request<'_>) -> bool {
    let resized = request.is_sub("", "pods", "resize") && request.updates();
    let claim = request.is("", "persistentvolumeclaims") && (request.creates() || request.updates());
    let created = request.is("", "pods") && request.creates();
    let dying = request.old.is_some_and(|old| !old["metadata"]["deletionTimestamp"].is_null());
    (resized || claim || created) && !dying
}

/// Gives containers of new pods the default requests and limits.
pub fn mutate(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    if !concerns(request) || request.resource != "pods" || request.updates() {
        return Ok(());
    }
    for range in world.list::<Value>("", "limitranges", request.namespace)? {
        apply_defaults(request.object, &range);
    }
    Ok(())
}

/// Refuses what is out of bounds.
pub fn validate(world: &World, request: &Request<'_>) -> Result<(), Status> {
    if !concerns(request) {
        return Ok(());
    }
    for range in world.list::<Value>("", "limitranges", request.namespace)? {
        let problems = if request.resource == "pods" {
            pod_problems(&request.object["spec"], &range)
        } else {
            claim_problems(&request.object["spec"], &range)
        };
        match problems.as_slice() {
            [] => {}
            [one] => return Err(request.forbidden(one)),
            many => return Err(request.forbidden(format_args!("[{}]", many.join(", ")))),
        }
    }
    Ok(())
}

fn apply_defaults(pod: &mut Value, range: &Value) {
    let mut notes = Vec::new();
    for (list, what) in [("containers", "container"), ("initContainers", "init container")] {
        let containers = pod["spec"].get_mut(list).and_then(Value::as_array_mut);
        for container in containers.into_iter().flatten() {
            for (field, default, word) in [("requests", "defaultRequest", "request"), ("limits", "default", "limit")] {
                let mut set: Vec<&String> = Vec::new();
                for limit in items(&range["spec"]["limits"]).filter(|limit| limit["type"] == "Container") {
                    for (name, amount) in limit[default].as_object().into_iter().flatten() {
                        if container["resources"][field].get(name).is_none() || set.contains(&name) {
                            container["resources"][field][name.as_str()] = amount.clone();
                            set.push(name);
                        }
                    }
                }
                if !set.is_empty() {
                    set.sort();
                    set.dedup();
                    let names = set.iter().map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
                    notes.push(format!("{names} {word} for {what} {}", text(container, "name")));
                }
            }
        }
    }
    if !notes.is_empty() {
        let note = format!("LimitRanger plugin set: {}", notes.join("; "));
        match pod["metadata"]["annotations"].as_object_mut() {
            Some(annotations) => drop(annotations.insert(ANNOTATION.to_owned(), note.into())),
            None => pod["metadata"]["annotations"] = json!({ ANNOTATION: note }),
        }
    }
}

fn pod_problems(spec: &Value, range: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    for limit in items(&range["spec"]["limits"]) {
        match text(limit, "type") {
            "Container" => {
                for container in items(&spec["containers"]).chain(items(&spec["initContainers"])) {
                    let resources = &container["resources"];
                    check(limit, &read(&resources["requests"]), &read(&resources["limits"]), &mut problems);
                }
            }
            "Pod" => check(limit, &of_pod(spec, "requests"), &of_pod(spec, "limits"), &mut problems),
            _ => {}
        }
    }
    problems
}

fn claim_problems(spec: &Value, range: &Value) -> Vec<String> {
    let requests = read(&spec["resources"]["requests"]);
    let mut problems = Vec::new();
    for limit in items(&range["spec"]["limits"]).filter(|limit| limit["type"] == "PersistentVolumeClaim") {
        let bound = Bound { kind: "PersistentVolumeClaim", requests: &requests, limits: &ResourceList::new() };
        for (name, enforced) in read(&limit["min"]) {
            problems.extend(bound.minimum(&name, enforced));
        }
        for (name, enforced) in read(&limit["max"]) {
            problems.extend(bound.maximum_request(&name, enforced));
        }
    }
    problems
}

fn check(limit: &Value, requests: &ResourceList, limits: &ResourceList, problems: &mut Vec<String>) {
    let bound = Bound { kind: text(limit, "type"), requests, limits };
    for (name, enforced) in read(&limit["min"]) {
        problems.extend(bound.minimum(&name, enforced));
    }
    for (name, enforced) in read(&limit["max"]) {
        problems.extend(bound.maximum(&name, enforced));
    }
    for (name, enforced) in read(&limit["maxLimitRequestRatio"]) {
        problems.extend(bound.ratio(&name, enforced));
    }
}

/// What is asked for and what it is for.
struct Bound<'a> {
    kind: &'a str,
    requests: &'a ResourceList,
    limits: &'a ResourceList,
}

impl Bound<'_> {
    fn minimum(&self, name: &str, enforced: Quantity) -> Option<String> {
        let head = format!("minimum {name} usage per {} is {enforced}", self.kind);
        match (self.requests.get(name), self.limits.get(name)) {
            (None, _) => Some(format!("{head}.  No request is specified")),
            (Some(request), _) if *request < enforced => Some(format!("{head}, but request is {request}")),
            (_, Some(limit)) if *limit < enforced => Some(format!("{head}, but limit is {limit}")),
            _ => None,
        }
    }

    fn maximum(&self, name: &str, enforced: Quantity) -> Option<String> {
        let head = format!("maximum {name} usage per {} is {enforced}", self.kind);
        match (self.limits.get(name), self.requests.get(name)) {
            (None, _) => Some(format!("{head}.  No limit is specified")),
            (Some(limit), _) if *limit > enforced => Some(format!("{head}, but limit is {limit}")),
            (_, Some(request)) if *request > enforced => Some(format!("{head}, but request is {request}")),
            _ => None,
        }
    }

    fn maximum_request(&self, name: &str, enforced: Quantity) -> Option<String> {
        let head = format!("maximum {name} usage per {} is {enforced}", self.kind);
        match self.requests.get(name) {
            None => Some(format!("{head}.  No request is specified")),
            Some(request) if *request > enforced => Some(format!("{head}, but request is {request}")),
            Some(_) => None,
        }
    }

    fn ratio(&self, name: &str, enforced: Quantity) -> Option<String> {
        let head = format!("{name} max limit to request ratio per {} is {enforced}", self.kind);
        let amount = |list: &ResourceList| {
            let amount = list.get(name).copied()?;
            let value = if amount.value() <= MAX_MILLI_VALUE {
                amount.milli_value() as f64
            } else {
                amount.value() as f64 * 1e3
            };
            (value != 0.0).then_some(value)
        };
        let Some(request) = amount(self.requests) else {
            return Some(format!("{head}, but no request is specified or request is 0"));
        };
        let Some(limit) = amount(self.limits) else {
            return Some(format!("{head}, but no limit is specified or limit is 0"));
        };
        let ratio = limit / request;
        (ratio * 1e3 > enforced.milli_value() as f64).then(|| format!("{head}, but provided ratio is {ratio:.6}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(limit: Value) -> Value {
        json!({ "spec": { "limits": [limit] } })
    }

    #[test]
    fn defaults_fill_what_is_missing_and_are_noted() {
        let range = range(json!({ "type": "Container", "default": { "cpu": "500m", "memory": "1Gi" },
            "defaultRequest": { "cpu": "100m" } }));
        let mut pod = json!({ "metadata": {}, "spec": { "containers": [
            { "name": "a", "resources": {} }, { "name": "b", "resources": { "limits": { "cpu": "1" } } } ] } });
        apply_defaults(&mut pod, &range);
        assert_eq!(pod["spec"]["containers"][0]["resources"]["limits"], json!({ "cpu": "500m", "memory": "1Gi" }));
        assert_eq!(pod["spec"]["containers"][1]["resources"]["limits"], json!({ "cpu": "1", "memory": "1Gi" }));
        assert_eq!(
            pod["metadata"]["annotations"][ANNOTATION],
            "LimitRanger plugin set: cpu request for container a; cpu, memory limit for container a; cpu request for container b; memory limit for container b"
        );
    }

    #[test]
    fn bounds_are_enforced_in_upstreams_words() {
        let spec = json!({ "containers": [{ "name": "a",
            "resources": { "requests": { "cpu": "50m" }, "limits": { "cpu": "2" } } }] });
        for (limit, problem) in [
            (
                json!({ "type": "Container", "min": { "cpu": "100m" } }),
                "minimum cpu usage per Container is 100m, but request is 50m",
            ),
            (json!({ "type": "Pod", "max": { "cpu": "1" } }), "maximum cpu usage per Pod is 1, but limit is 2"),
            (
                json!({ "type": "Container", "max": { "memory": "1Gi" } }),
                "maximum memory usage per Container is 1Gi.  No limit is specified",
            ),
            (
                json!({ "type": "Container", "maxLimitRequestRatio": { "cpu": "10" } }),
                "cpu max limit to request ratio per Container is 10, but provided ratio is 40.000000",
            ),
        ] {
            assert_eq!(pod_problems(&spec, &range(limit)), [problem]);
        }
        assert!(
            pod_problems(&spec, &range(json!({ "type": "Container", "max": { "cpu": "2" }, "min": { "cpu": "50m" } })))
                .is_empty()
        );
        let claim = json!({ "resources": { "requests": { "storage": "2Gi" } } });
        let limit = range(json!({ "type": "PersistentVolumeClaim", "max": { "storage": "1Gi" } }));
        assert_eq!(
            claim_problems(&claim, &limit),
            ["maximum storage usage per PersistentVolumeClaim is 1Gi, but request is 2Gi"]
        );
    }
}
