//! The status that new objects begin with, and what else the server writes into them before validation.

use super::Context;
use serde_json::{Value, json};

/// Pods wait for a node; their quality of service is known from their resources.
pub fn pod(_: &Context<'_>, pod: &mut Value) {
    let class = qos_class(pod);
    pod["status"] = json!({ "phase": "Pending", "qosClass": class });
}

/// Namespaces are active, and stay until their content is gone.
pub fn namespace(_: &Context<'_>, namespace: &mut Value) {
    namespace["status"] = json!({ "phase": "Active" });
    let finalizers = namespace.pointer("/spec/finalizers").and_then(Value::as_array).cloned().unwrap_or_default();
    if !finalizers.iter().any(|f| f == "kubernetes") {
        let mut finalizers = finalizers;
        finalizers.push(json!("kubernetes"));
        namespace["spec"]["finalizers"] = Value::Array(finalizers);
    }
}

/// Volumes and claims wait for each other.
pub fn pending(_: &Context<'_>, object: &mut Value) {
    object["status"] = json!({ "phase": "Pending" });
}

/// `Guaranteed`, `Burstable` or `BestEffort` (`k8s.io/component-helpers`' rule).
pub fn qos_class(pod: &Value) -> &'static str {
    let amount = |resources: &Value, kind: &str, name: &str| {
        let text = resources.get(kind)?.get(name)?;
        let text = text.as_str().map_or_else(|| text.to_string(), str::to_owned);
        let nanos = crate::schema::quantity::Quantity::parse(&text).ok()?.nanos();
        (nanos > 0).then_some(nanos)
    };
    let (mut any, mut guaranteed) = (false, true);
    let lists = ["containers", "initContainers"].map(|list| pod.pointer(&format!("/spec/{list}")));
    let containers: Vec<&Value> = lists.into_iter().flatten().filter_map(Value::as_array).flatten().collect();
    let whole = pod.pointer("/spec/resources").filter(|r| r.as_object().is_some_and(|r| !r.is_empty()));
    let sources: Vec<&Value> = match whole {
        Some(resources) => vec![resources],
        None => containers.iter().map(|c| c.get("resources").unwrap_or(&Value::Null)).collect(),
    };
    for resources in sources {
        for name in ["cpu", "memory"] {
            let (request, limit) = (amount(resources, "requests", name), amount(resources, "limits", name));
            any |= request.is_some() || limit.is_some();
            guaranteed &= limit.is_some() && request.or(limit) == limit;
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_of_service() {
        let pod = |resources: Value| json!({ "spec": { "containers": [{ "resources": resources }] } });
        assert_eq!(qos_class(&pod(json!({}))), "BestEffort");
        assert_eq!(qos_class(&pod(json!({ "requests": { "cpu": "1" } }))), "Burstable");
        let both = json!({ "cpu": "1", "memory": "1Gi" });
        assert_eq!(qos_class(&pod(json!({ "requests": both, "limits": both }))), "Guaranteed");
        assert_eq!(qos_class(&pod(json!({ "requests": { "cpu": "100m" }, "limits": both }))), "Burstable");
        assert_eq!(qos_class(&pod(json!({ "requests": { "cpu": "0" } }))), "BestEffort");
    }
}
