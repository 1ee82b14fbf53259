//! Services: families and addresses that follow from each other, and what a Service must not say.
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`families`] | IP families: what is inferred, what may change |
//! | [`validation`] | faults with upstream's texts |
//! | [`allocation`] | cluster addresses (as `IPAddress` objects) and node ports |

pub mod allocation;
pub mod families;
pub mod validation;

use serde_json::{Map, Value, json};

use super::value::{default, int, list, object_mut, text};
use super::{Context, NameRule, Strategy};

/// Services.
pub static SERVICE: Strategy = Strategy {
    prepare_create,
    prepare_update,
    validate_create: validation::create,
    validate_update: validation::update,
    allocate: Some(allocation::allocate),
    released: Some(allocation::released),
    names: NameRule::Label1035,
    create_on_update: true,
    ..Strategy::DEFAULT
};

/// Whether the Service has cluster addresses: all but ExternalName.
pub(crate) fn has_cluster_ip(spec: &Value) -> bool {
    text(spec, "/type") != "ExternalName"
}

pub(crate) fn is_headless(spec: &Value) -> bool {
    text(spec, "/clusterIP") == "None"
}

/// Whether the Service's ports get node ports.
pub(crate) fn wants_node_ports(spec: &Value) -> bool {
    match text(spec, "/type") {
        "NodePort" => true,
        "LoadBalancer" => spec.get("allocateLoadBalancerNodePorts").and_then(Value::as_bool).unwrap_or(true),
        _ => false,
    }
}

fn prepare_create(context: &Context<'_>, new: &mut Value) {
    new["status"] = json!({"loadBalancer": {}});
    defaults(object_mut(new, "spec"));
    let spec = &mut new["spec"];
    families::synchronize(spec, None);
    // A fault is told by the validation, which does this again.
    drop(families::init(spec, None, &context.services.families()));
}

fn prepare_update(context: &Context<'_>, new: &mut Value, old: &Value) {
    if context.subresource == "status" {
        return;
    }
    let spec = object_mut(new, "spec");
    let old_spec = &old["spec"];
    let is_external = |kind: &str| kind == "ExternalName";
    let (now, before) = (is_external(&text_of(spec, "type")), is_external(text(old_spec, "/type")));
    if !now && !before {
        families::keep_addresses(spec, old_spec);
    }
    defaults(spec);
    keep_node_ports(spec, old_spec);
    drop_type_dependent(spec, old_spec);
    if now {
        // Defaulted for this type once, and of no use to it.
        spec.remove("internalTrafficPolicy");
    }
    if now && !before {
        families::drop_fields(spec, old_spec);
    }
    let spec = &mut new["spec"];
    families::synchronize(spec, Some(old_spec));
    // A fault is told by the validation, which does this again.
    drop(families::init(spec, Some(old_spec), &context.services.families()));
}

fn text_of(spec: &Map<String, Value>, key: &str) -> String {
    spec.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn defaults(spec: &mut Map<String, Value>) {
    default(spec, "type", || json!("ClusterIP"));
    default(spec, "sessionAffinity", || json!("None"));
    let kind = text_of(spec, "type");
    if text_of(spec, "sessionAffinity") == "ClientIP" {
        let config = spec.entry("sessionAffinityConfig").or_insert_with(|| json!({}));
        default(object_mut(config, "clientIP"), "timeoutSeconds", || json!(10800));
    } else {
        spec.remove("sessionAffinityConfig");
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        default(spec, "externalTrafficPolicy", || json!("Cluster"));
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", || json!(true));
    }
    if kind == "ExternalName" {
        if text_of(spec, "clusterIP").is_empty() {
            spec.remove("clusterIP");
        }
        return;
    }
    default(spec, "internalTrafficPolicy", || json!("Cluster"));
    if let Some(Value::Array(ports)) = spec.get_mut("ports") {
        for port in ports.iter_mut().filter_map(Value::as_object_mut) {
            default(port, "protocol", || json!("TCP"));
            let number = port.get("port").cloned().unwrap_or_default();
            let target = port.get("targetPort");
            if target.is_none_or(|t| t.is_null() || *t == json!(0) || *t == json!("")) {
                port.insert("targetPort".to_owned(), number);
            }
        }
    }
}

/// A port that names no node port keeps the one that it had, found by port and protocol.
fn keep_node_ports(spec: &mut Map<String, Value>, old: &Value) {
    let both = [Value::Object(spec.clone()), old.clone()].iter().all(wants_node_ports);
    if !both {
        return;
    }
    let mut used: Vec<i64> =
        list(&Value::Object(spec.clone()), "/ports").iter().filter_map(|p| int(p, "/nodePort")).collect();
    let Some(Value::Array(ports)) = spec.get_mut("ports") else { return };
    for port in ports {
        if int(port, "/nodePort").unwrap_or(0) != 0 {
            continue;
        }
        let same = |p: &&Value| p["port"] == port["port"] && p["protocol"] == port["protocol"];
        let kept = list(old, "/ports").iter().find(same).and_then(|p| int(p, "/nodePort"));
        if let Some(kept) = kept.filter(|kept| *kept != 0 && !used.contains(kept)) {
            port["nodePort"] = json!(kept);
            used.push(kept);
        }
    }
}

/// What only another type has, and the client did not touch, goes with the change of type.
fn drop_type_dependent(spec: &mut Map<String, Value>, old: &Value) {
    let kind = text_of(spec, "type");
    let (is, was) = (wants_node_ports(&Value::Object(spec.clone())), wants_node_ports(old));
    if was
        && !is
        && let Some(Value::Array(ports)) = spec.get_mut("ports")
    {
        for port in ports.iter_mut().filter_map(Value::as_object_mut) {
            let number = port.get("nodePort").and_then(Value::as_i64);
            if list(old, "/ports").iter().any(|p| int(p, "/nodePort") == number) {
                port.remove("nodePort");
            }
        }
    }
    let external = matches!(kind.as_str(), "NodePort" | "LoadBalancer");
    let unchanged = |spec: &Map<String, Value>, key: &str| spec.get(key) == old.get(key);
    if !external && unchanged(spec, "externalTrafficPolicy") {
        spec.remove("externalTrafficPolicy");
    }
    if kind != "LoadBalancer" {
        for key in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if unchanged(spec, key) {
                spec.remove(key);
            }
        }
    }
    let local = kind == "LoadBalancer" && text_of(spec, "externalTrafficPolicy") == "Local";
    if !local && unchanged(spec, "healthCheckNodePort") {
        spec.remove("healthCheckNodePort");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn defaulted(mut service: Value) -> Value {
        defaults(object_mut(&mut service, "spec"));
        service["spec"].take()
    }

    #[test]
    fn defaults_follow_from_the_type() {
        let spec =
            defaulted(json!({"spec": {"type": "NodePort", "ports": [{"port": 80}], "sessionAffinity": "ClientIP"}}));
        assert_eq!(spec["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
        assert_eq!(spec["externalTrafficPolicy"], "Cluster");
        assert_eq!(spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10800);
        let spec = defaulted(json!({"spec": {"type": "ExternalName", "externalName": "a.b", "clusterIP": ""}}));
        assert_eq!(spec.get("internalTrafficPolicy"), None);
    }

    #[test]
    fn node_ports_are_kept_by_port_and_dropped_with_the_type() {
        let old = json!({"type": "NodePort", "externalTrafficPolicy": "Cluster",
            "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30001}]});
        let mut new =
            json!({"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP"}, {"port": 81, "protocol": "TCP"}]});
        keep_node_ports(new.as_object_mut().unwrap(), &old);
        assert_eq!(new["ports"][0]["nodePort"], 30001);
        assert_eq!(new["ports"][1].get("nodePort"), None);
        let mut new = old.clone();
        new["type"] = json!("ClusterIP");
        drop_type_dependent(new.as_object_mut().unwrap(), &old);
        assert_eq!(new, json!({"type": "ClusterIP", "ports": [{"port": 80, "protocol": "TCP"}]}));
    }
}
