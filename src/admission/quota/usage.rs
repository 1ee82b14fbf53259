//! What an object uses of a namespace's quota. Pods, services and volume claims are measured; everything else is counted.

use crate::admission::Request;
use crate::admission::pod::{items, text};
use crate::admission::resource_list::{ResourceList, add, count, of_pod, read};
use serde_json::Value;
use std::collections::BTreeMap;

/// Resources of a pod that a quota may name, besides prefixed ones.
const POD: [&str; 10] = [
    "pods",
    "cpu",
    "memory",
    "ephemeral-storage",
    "requests.cpu",
    "requests.memory",
    "requests.ephemeral-storage",
    "limits.cpu",
    "limits.memory",
    "limits.ephemeral-storage",
];
/// Of these every container must say how much it wants once a quota limits them.
const MUST_SPECIFY: [&str; 6] = ["cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pod,
    Service,
    Claim,
    Other,
}

/// How one kind of object is measured.
#[derive(Debug)]
pub struct Evaluator {
    kind: Kind,
    /// `count/<resource>[.<group>]`
    count_name: String,
    /// The name that counted this kind before `count/` existed.
    alias: Option<&'static str>,
}

impl Evaluator {
    /// The evaluator of a request; none when the request changes nobody's usage.
    pub fn of(request: &Request<'_>) -> Option<Evaluator> {
        let kind = match (request.group, request.resource) {
            ("", "pods") => Kind::Pod,
            ("", "services") => Kind::Service,
            ("", "persistentvolumeclaims") => Kind::Claim,
            _ => Kind::Other,
        };
        let handles = match (kind, request.subresource) {
            (Kind::Pod, "resize") => request.updates(),
            (Kind::Pod, "") if request.updates() => {
                request.old.is_some_and(|old| is_terminating(old) != is_terminating(request.object))
            }
            (Kind::Service | Kind::Claim, "") => true,
            (_, "") => request.creates(),
            _ => false,
        };
        let count_name = match request.group {
            "" => format!("count/{}", request.resource),
            group => format!("count/{}.{group}", request.resource),
        };
        let alias = match (request.group, request.resource) {
            ("", "configmaps") => Some("configmaps"),
            ("", "resourcequotas") => Some("resourcequotas"),
            ("", "replicationcontrollers") => Some("replicationcontrollers"),
            ("", "secrets") => Some("secrets"),
            _ => None,
        };
        handles.then_some(Evaluator { kind, count_name, alias })
    }

    /// Whether this kind of object uses the resource.
    pub fn counts(&self, resource: &str) -> bool {
        if resource == self.count_name || Some(resource) == self.alias {
            return true;
        }
        match self.kind {
            Kind::Pod => {
                POD.contains(&resource)
                    || resource.starts_with("hugepages-")
                    || resource
                        .strip_prefix("requests.")
                        .is_some_and(|name| name.starts_with("hugepages-") || (name.contains('/') && !is_native(name)))
            }
            Kind::Service => matches!(resource, "services" | "services.nodeports" | "services.loadbalancers"),
            Kind::Claim => {
                matches!(resource, "persistentvolumeclaims" | "requests.storage")
                    || resource.ends_with(".storageclass.storage.k8s.io/requests.storage")
                    || resource.ends_with(".storageclass.storage.k8s.io/persistentvolumeclaims")
            }
            Kind::Other => false,
        }
    }

    /// What the object uses.
    pub fn usage(&self, object: &Value) -> ResourceList {
        let mut used = ResourceList::from([(self.count_name.clone(), count(1))]);
        if let Some(alias) = self.alias {
            used.insert(alias.to_owned(), count(1));
        }
        match self.kind {
            Kind::Pod if matches!(text(&object["status"], "phase"), "Failed" | "Succeeded") => {}
            Kind::Pod => {
                let spec = &object["spec"];
                add(&mut used, &pod_usage(&of_pod(spec, "requests"), &of_pod(spec, "limits")));
            }
            Kind::Service => service_usage(&object["spec"], &mut used),
            Kind::Claim => claim_usage(object, &mut used),
            Kind::Other => {}
        }
        used
    }

    /// Upstream's complaint about containers that do not say how much they want of what is limited.
    pub fn unspecified(&self, counted: &[&String], object: &Value) -> Option<String> {
        let spec = &object["spec"];
        if self.kind != Kind::Pod || spec["resources"].as_object().is_some_and(|r| !r.is_empty()) {
            return None;
        }
        let mut missing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for container in items(&spec["containers"]).chain(items(&spec["initContainers"])) {
            let resources = &container["resources"];
            let has = pod_usage(&read(&resources["requests"]), &read(&resources["limits"]));
            for resource in counted.iter().filter(|r| MUST_SPECIFY.contains(&r.as_str()) && !has.contains_key(**r)) {
                missing.entry(resource).or_default().push(text(container, "name"));
            }
        }
        if missing.is_empty() {
            return None;
        }
        let one = |(resource, mut names): (&str, Vec<&str>)| {
            names.sort_unstable();
            names.dedup();
            format!("{resource} for: {}", names.join(","))
        };
        Some(format!("must specify {}", missing.into_iter().map(one).collect::<Vec<_>>().join("; ")))
    }

    /// Whether all scopes of the quota take in the object.
    pub fn in_scope(&self, quota_spec: &Value, object: &Value) -> bool {
        let named = items(&quota_spec["scopes"])
            .all(|scope| self.matches_scope(scope.as_str().unwrap_or(""), "Exists", &[], object));
        named
            && items(&quota_spec["scopeSelector"]["matchExpressions"]).all(|expression| {
                let values: Vec<&str> = items(&expression["values"]).filter_map(Value::as_str).collect();
                self.matches_scope(text(expression, "scopeName"), text(expression, "operator"), &values, object)
            })
    }

    fn matches_scope(&self, scope: &str, operator: &str, values: &[&str], object: &Value) -> bool {
        let by_name = |name: &str| match operator {
            "Exists" => !name.is_empty(),
            "DoesNotExist" => name.is_empty(),
            "In" => !name.is_empty() && values.contains(&name),
            "NotIn" => !values.contains(&name),
            _ => false,
        };
        if self.kind == Kind::Claim && scope == "VolumeAttributesClass" {
            return by_name(text(&object["spec"], "volumeAttributesClassName"));
        }
        if self.kind != Kind::Pod {
            return false;
        }
        match scope {
            "Terminating" => is_terminating(object),
            "NotTerminating" => !is_terminating(object),
            "BestEffort" => is_best_effort(&object["spec"]),
            "NotBestEffort" => !is_best_effort(&object["spec"]),
            "PriorityClass" => by_name(text(&object["spec"], "priorityClassName")),
            "CrossNamespacePodAffinity" => has_cross_namespace_affinity(&object["spec"]["affinity"]),
            _ => false,
        }
    }
}

/// Whether a resource name belongs to Kubernetes itself rather than to a device.
fn is_native(name: &str) -> bool {
    let domain = name.split_once('/').map_or("", |(domain, _)| domain);
    domain == "kubernetes.io" || domain.ends_with(".kubernetes.io")
}

fn is_terminating(pod: &Value) -> bool {
    pod["spec"]["activeDeadlineSeconds"].as_i64().is_some_and(|seconds| seconds >= 0)
}

fn is_best_effort(spec: &Value) -> bool {
    let wants = |resources: &Value| {
        ["requests", "limits"].iter().any(|which| {
            read(&resources[which])
                .iter()
                .any(|(name, amount)| (name == "cpu" || name == "memory") && amount.nanos() > 0)
        })
    };
    !wants(&spec["resources"])
        && !items(&spec["containers"]).chain(items(&spec["initContainers"])).any(|c| wants(&c["resources"]))
}

fn has_cross_namespace_affinity(affinity: &Value) -> bool {
    let crosses = |term: &Value| items(&term["namespaces"]).next().is_some() || term["namespaceSelector"].is_object();
    ["podAffinity", "podAntiAffinity"].iter().any(|kind| {
        items(&affinity[kind]["requiredDuringSchedulingIgnoredDuringExecution"]).any(crosses)
            || items(&affinity[kind]["preferredDuringSchedulingIgnoredDuringExecution"])
                .any(|weighted| crosses(&weighted["podAffinityTerm"]))
    })
}

fn pod_usage(requests: &ResourceList, limits: &ResourceList) -> ResourceList {
    let mut used = ResourceList::from([("pods".to_owned(), count(1))]);
    for (name, amount) in requests {
        if matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-") {
            used.insert(name.clone(), *amount);
            used.insert(format!("requests.{name}"), *amount);
        } else if name.contains('/') && !is_native(name) {
            used.insert(format!("requests.{name}"), *amount);
        }
    }
    for (name, amount) in limits {
        if matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") {
            used.insert(format!("limits.{name}"), *amount);
        }
    }
    used
}

fn service_usage(spec: &Value, used: &mut ResourceList) {
    let all = items(&spec["ports"]).count();
    let explicit = items(&spec["ports"]).filter(|port| port["nodePort"].as_i64().unwrap_or(0) != 0).count();
    let (node_ports, balancers) = match text(spec, "type") {
        "NodePort" => (all, 0),
        "LoadBalancer" if spec["allocateLoadBalancerNodePorts"] == false => (explicit, 1),
        "LoadBalancer" => (all, 1),
        _ => (0, 0),
    };
    used.insert("services".to_owned(), count(1));
    used.insert("services.nodeports".to_owned(), count(node_ports));
    used.insert("services.loadbalancers".to_owned(), count(balancers));
}

fn claim_usage(claim: &Value, used: &mut ResourceList) {
    let spec = &claim["spec"];
    let annotation = claim["metadata"]["annotations"]["volume.beta.kubernetes.io/storage-class"].as_str();
    let class = annotation.or(spec["storageClassName"].as_str()).unwrap_or("");
    let of_class = |resource: &str| format!("{class}.storageclass.storage.k8s.io/{resource}");
    used.insert("persistentvolumeclaims".to_owned(), count(1));
    if !class.is_empty() {
        used.insert(of_class("persistentvolumeclaims"), count(1));
    }
    let wanted = read(&spec["resources"]["requests"]).remove("storage");
    let allocated = read(&claim["status"]["allocatedResources"]).remove("storage");
    if let Some(storage) = wanted.into_iter().chain(allocated).max() {
        used.insert("requests.storage".to_owned(), storage);
        if !class.is_empty() {
            used.insert(of_class("requests.storage"), storage);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn evaluator(kind: Kind, count_name: &str) -> Evaluator {
        Evaluator { kind, count_name: count_name.to_owned(), alias: None }
    }

    #[test]
    fn what_objects_use() {
        let show = |used: ResourceList| {
            used.into_iter().map(|(name, amount)| format!("{name}={amount}")).collect::<Vec<_>>().join(" ")
        };
        let pod = json!({ "spec": { "containers": [{ "resources": {
            "requests": { "cpu": "100m", "example.com/gpu": "1" }, "limits": { "memory": "1Gi" } } }] } });
        assert_eq!(
            show(evaluator(Kind::Pod, "count/pods").usage(&pod)),
            "count/pods=1 cpu=100m limits.memory=1Gi pods=1 requests.cpu=100m requests.example.com/gpu=1"
        );
        let service = json!({ "spec": { "type": "LoadBalancer", "ports": [{}, {}] } });
        assert_eq!(
            show(evaluator(Kind::Service, "count/services").usage(&service)),
            "count/services=1 services=1 services.loadbalancers=1 services.nodeports=2"
        );
        let claim =
            json!({ "spec": { "storageClassName": "fast", "resources": { "requests": { "storage": "1Gi" } } } });
        assert_eq!(
            show(evaluator(Kind::Claim, "count/persistentvolumeclaims").usage(&claim)),
            "count/persistentvolumeclaims=1 fast.storageclass.storage.k8s.io/persistentvolumeclaims=1 \
             fast.storageclass.storage.k8s.io/requests.storage=1Gi persistentvolumeclaims=1 requests.storage=1Gi"
        );
    }

    #[test]
    fn scopes_choose_pods() {
        let pods = evaluator(Kind::Pod, "count/pods");
        let effortless = json!({ "spec": { "containers": [{}] } });
        let burst = json!({ "spec": { "containers": [{ "resources": { "requests": { "cpu": "1" } } }],
            "activeDeadlineSeconds": 5, "priorityClassName": "high" } });
        let quota = |scope: &str| json!({ "scopes": [scope] });
        for (scope, first, second) in [
            ("BestEffort", true, false),
            ("NotBestEffort", false, true),
            ("Terminating", false, true),
            ("NotTerminating", true, false),
            ("PriorityClass", false, true),
            ("Unheard", false, false),
        ] {
            assert_eq!(pods.in_scope(&quota(scope), &effortless), first, "{scope}");
            assert_eq!(pods.in_scope(&quota(scope), &burst), second, "{scope}");
        }
        let selector = json!({ "scopeSelector": { "matchExpressions": [
            { "scopeName": "PriorityClass", "operator": "In", "values": ["high"] } ] } });
        assert!(pods.in_scope(&selector, &burst) && !pods.in_scope(&selector, &effortless));
        assert!(pods.in_scope(&json!({}), &effortless));
    }
}
