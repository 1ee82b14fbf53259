//! Services: families and addresses that follow from each other, and what a Service must not say.
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`validation`] | faults with upstream's texts |
//! | [`allocation`] | cluster addresses (as `IPAddress` objects) and node ports |

pub mod allocation;
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

fn prepare_create(_: &Context<'_>, new: &mut Value) {
    new["status"] = json!({"loadBalancer": {}});
    let spec = object_mut(new, "spec");
    defaults(spec);
    sync_cluster_ips(spec, None);
}

fn prepare_update(context: &Context<'_>, new: &mut Value, old: &Value) {
    if context.subresource == "status" {
        return;
    }
    let spec = object_mut(new, "spec");
    let old_spec = &old["spec"];
    // A client that does not know of an allocated field keeps it by leaving it out.
    let (now, before) = (text_of(spec, "type"), text(old_spec, "/type").to_owned());
    let needs_ip = now != "ExternalName";
    let had_ip = before != "ExternalName" && !text(old_spec, "/clusterIP").is_empty();
    if needs_ip && had_ip && text_of(spec, "clusterIP").is_empty() && spec.get("clusterIPs").is_none_or(no_items) {
        for key in ["clusterIP", "clusterIPs"] {
            if let Some(value) = old_spec.get(key) {
                spec.insert(key.to_owned(), value.clone());
            }
        }
    }
    for key in ["ipFamilies", "ipFamilyPolicy"] {
        if needs_ip
            && had_ip
            && spec.get(key).is_none_or(no_items)
            && let Some(value) = old_spec.get(key)
        {
            spec.insert(key.to_owned(), value.clone());
        }
    }
    defaults(spec);
    keep_node_ports(spec, old_spec);
    sync_cluster_ips(spec, Some(old_spec));
    drop_type_dependent(spec, old_spec);
}

fn text_of(spec: &Map<String, Value>, key: &str) -> String {
    spec.get(key).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn no_items(value: &Value) -> bool {
    value.is_null() || value.as_array().is_some_and(Vec::is_empty)
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

/// `clusterIP` and `clusterIPs` say the same; families follow. Addresses themselves come from the allocator.
fn sync_cluster_ips(spec: &mut Map<String, Value>, old: Option<&Value>) {
    if text_of(spec, "type") == "ExternalName" {
        for key in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
            spec.remove(key);
        }
        return;
    }
    let ip = text_of(spec, "clusterIP");
    let ips = spec.get("clusterIPs").filter(|v| !no_items(v)).cloned();
    let before = old.map(|old| text(old, "/clusterIP").to_owned()).unwrap_or_default();
    if !ip.is_empty() && (ips.is_none() || (!before.is_empty() && ip != before)) {
        // Only the old field was set or changed: it carries the intent.
        if ips.as_ref().is_none_or(|ips| Some(before.as_str()) == ips[0].as_str()) {
            spec.insert("clusterIPs".to_owned(), json!([ip]));
        }
    } else if ip.is_empty()
        && let Some(first) = ips.as_ref().and_then(|ips| ips[0].as_str())
        && before.is_empty()
    {
        spec.insert("clusterIP".to_owned(), json!(first));
    }
    default(spec, "ipFamilyPolicy", || json!("SingleStack"));
    if spec.get("ipFamilies").is_none_or(no_items) {
        let v6 = text_of(spec, "clusterIP").contains(':');
        spec.insert("ipFamilies".to_owned(), json!([if v6 { "IPv6" } else { "IPv4" }]));
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

    fn prepared(mut service: Value) -> Value {
        let spec = object_mut(&mut service, "spec");
        defaults(spec);
        sync_cluster_ips(spec, None);
        service["spec"].take()
    }

    #[test]
    fn defaults_follow_from_the_type() {
        let spec =
            prepared(json!({"spec": {"type": "NodePort", "ports": [{"port": 80}], "sessionAffinity": "ClientIP"}}));
        assert_eq!(spec["ports"][0], json!({"port": 80, "protocol": "TCP", "targetPort": 80}));
        assert_eq!(spec["externalTrafficPolicy"], "Cluster");
        assert_eq!(spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"], 10800);
        assert_eq!(spec["ipFamilies"], json!(["IPv4"]));
        let spec = prepared(json!({"spec": {"type": "ExternalName", "externalName": "a.b", "clusterIP": ""}}));
        assert_eq!(spec.get("ipFamilies"), None);
        let spec = prepared(json!({"spec": {"clusterIP": "None"}}));
        assert_eq!(spec["clusterIPs"], json!(["None"]));
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
