//! Pods: what is computed at creation, what is valid, what may change.
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`qos`] | the quality of service class |
//! | [`spec`] | faults of a pod's spec |
//! | [`container`] | faults of containers |
//! | [`probe`] | faults of probes and life cycle hooks |
//! | [`volume`] | faults of volumes |
//! | [`update`] | what of a pod may change, by which subresource |

pub mod container;
pub mod probe;
pub mod qos;
pub mod spec;
pub mod update;
pub mod volume;

use serde_json::{Value, json};

use super::value::{list, object_mut, text, truth};
use super::{Context, Strategy};
use crate::apiserver::field::ErrorList;

/// Pods.
pub static POD: Strategy = Strategy {
    prepare_create,
    prepare_update,
    validate_create: |context, new| spec::pod(context, new, false),
    validate_update: update::validate,
    generation: true,
    ..Strategy::DEFAULT
};

fn prepare_create(_: &Context<'_>, new: &mut Value) {
    default_spec(&mut new["spec"]);
    let class = qos::class(&new["spec"]);
    new["status"] = json!({"phase": "Pending", "qosClass": class});
    if !list(new, "/spec/schedulingGates").is_empty() {
        new["status"]["conditions"] = json!([{
            "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
        }]);
    }
}

fn prepare_update(context: &Context<'_>, new: &mut Value, old: &Value) {
    if context.subresource == "status" {
        // The class never changes, and a client that does not know of it must not drop it.
        if let Some(class) = old.pointer("/status/qosClass").cloned() {
            object_mut(new, "status").insert("qosClass".to_owned(), class);
        }
        return;
    }
    default_spec(&mut new["spec"]);
    if context.subresource.is_empty() {
        let mut status = old["status"].clone();
        let was_gated = !list(old, "/spec/schedulingGates").is_empty();
        if was_gated
            && list(new, "/spec/schedulingGates").is_empty()
            && let Some(Value::Array(conditions)) = status.get_mut("conditions")
        {
            conditions.retain(|c| c["reason"] != "SchedulingGated");
        }
        new["status"] = status;
    }
}

/// The conditional defaults of a pod template.
pub(crate) fn default_template(template: &mut Value) {
    if template.get("spec").is_some_and(Value::is_object) {
        default_spec(&mut template["spec"]);
    }
}

fn default_spec(spec: &mut Value) {
    // `serviceAccount` is the deprecated alias of `serviceAccountName`; both are always shown.
    let name = [text(spec, "/serviceAccountName"), text(spec, "/serviceAccount")].into_iter().find(|n| !n.is_empty());
    if let Some(name) = name.map(str::to_owned) {
        spec["serviceAccountName"] = json!(name);
        spec["serviceAccount"] = json!(name);
    }
    let host_network = truth(spec, "/hostNetwork");
    for key in ["containers", "initContainers"] {
        let Some(Value::Array(containers)) = spec.get_mut(key) else { continue };
        for container in containers.iter_mut().filter(|c| c.is_object()) {
            requests_from_limits(container);
            if host_network && let Some(Value::Array(ports)) = container.get_mut("ports") {
                for port in ports {
                    let number = port["containerPort"].clone();
                    if port.get("hostPort").is_none_or(|p| p.is_null() || *p == json!(0)) {
                        port["hostPort"] = number;
                    }
                }
            }
        }
    }
}

/// A resource that is limited and not requested is requested up to its limit.
fn requests_from_limits(container: &mut Value) {
    let Some(Value::Object(limits)) = container.pointer("/resources/limits").cloned() else { return };
    let requests = object_mut(&mut container["resources"], "requests");
    for (name, limit) in limits {
        requests.entry(name).or_insert(limit);
    }
}

/// Faults of a pod template, for workloads.
pub(crate) fn template(context: &Context<'_>, template: &Value, field: &str) -> ErrorList {
    spec::template(context, template, field)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_follow_limits_and_host_ports_follow_the_host_network() {
        let mut spec = json!({"hostNetwork": true, "serviceAccountName": "x", "containers": [{
            "ports": [{"containerPort": 80}],
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m"}},
        }]});
        default_spec(&mut spec);
        assert_eq!(spec["containers"][0]["resources"]["requests"], json!({"cpu": "500m", "memory": "1Gi"}));
        assert_eq!(spec["containers"][0]["ports"][0]["hostPort"], 80);
        assert_eq!(spec["serviceAccount"], "x");
    }
}
