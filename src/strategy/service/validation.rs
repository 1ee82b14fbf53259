//! What a Service must not say; texts and order of upstream's `ValidateService`.

use std::collections::HashSet;
use std::net::IpAddr;

use serde_json::Value;

use super::{families, is_headless};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::apiserver::names;
use crate::strategy::Context;
use crate::strategy::pod::container::port_name;
use crate::strategy::value::{int, list, text};

const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
const PORT_RANGE: &str = "must be between 1 and 65535, inclusive";

pub(super) fn create(context: &Context<'_>, new: &Value) -> ErrorList {
    match families::init(&mut new["spec"].clone(), None, &context.services.families()) {
        Ok(()) => service(new),
        Err(errors) => errors,
    }
}

pub(super) fn update(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    if context.subresource == "status" {
        return ErrorList::new();
    }
    let (was, is) = (&old["spec"], &new["spec"]);
    if let Err(errors) = families::init(&mut is.clone(), Some(was), &context.services.families()) {
        return errors;
    }
    let mut errors = families::transition(is, was);
    errors.extend(service(new));
    errors
}

fn service(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let spec = &object["spec"];
    let kind = text(spec, "/type");
    let ports = list(spec, "/ports");
    if ports.is_empty() && !is_headless(spec) && kind != "ExternalName" {
        errors.push(FieldError::required("spec.ports", ""));
    }
    match kind {
        "LoadBalancer" if is_headless(spec) => {
            errors.push(FieldError::invalid(
                "spec.clusterIPs[0]",
                "None",
                "may not be set to 'None' for LoadBalancer services",
            ));
        }
        "NodePort" if is_headless(spec) => {
            errors.push(FieldError::invalid(
                "spec.clusterIPs[0]",
                "None",
                "may not be set to 'None' for NodePort services",
            ));
        }
        "ExternalName" => {
            for key in ["clusterIPs", "ipFamilies"] {
                if !list(spec, &format!("/{key}")).is_empty() {
                    errors.push(not_for_external_name(key));
                }
            }
            if !text(spec, "/ipFamilyPolicy").is_empty() {
                errors.push(not_for_external_name("ipFamilyPolicy"));
            }
            let name = text(spec, "/externalName").trim_end_matches('.');
            if name.is_empty() {
                errors.push(FieldError::required("spec.externalName", ""));
            } else {
                for fault in names::dns1123_subdomain(name) {
                    errors.push(FieldError::invalid("spec.externalName", name, fault));
                }
            }
        }
        _ => {}
    }
    errors.extend(all_ports(ports, kind, is_headless(spec)));
    if let Some(Value::Object(selector)) = spec.get("selector") {
        for (key, value) in selector {
            errors.extend(
                names::qualified_name(key).into_iter().map(|f| FieldError::invalid("spec.selector", key.as_str(), f)),
            );
            let value = value.as_str().unwrap_or_default();
            errors
                .extend(names::label_value(value).into_iter().map(|f| FieldError::invalid("spec.selector", value, f)));
        }
    }
    match text(spec, "/sessionAffinity") {
        "" => errors.push(FieldError::required("spec.sessionAffinity", "")),
        "None" => {}
        "ClientIP" => {
            let timeout = int(spec, "/sessionAffinityConfig/clientIP/timeoutSeconds").unwrap_or(0);
            if !(1..=86400).contains(&timeout) {
                let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
                errors.push(FieldError::invalid(field, timeout, "must be greater than 0 and less than 86400"));
            }
        }
        other => errors.push(FieldError::not_supported("spec.sessionAffinity", other, &["ClientIP", "None"])),
    }
    errors.extend(families::related(spec));
    for (i, ip) in list(spec, "/externalIPs").iter().filter_map(Value::as_str).enumerate() {
        if ip.parse::<IpAddr>().is_err() {
            let field = format!("spec.externalIPs[{i}]");
            errors.push(FieldError::invalid(
                field,
                ip,
                "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
            ));
        }
    }
    if kind.is_empty() {
        errors.push(FieldError::required("spec.type", ""));
    } else if !TYPES.contains(&kind) {
        errors.push(FieldError::not_supported("spec.type", kind, &TYPES));
    }
    errors.extend(traffic_policies(spec, kind));
    for (i, range) in list(spec, "/loadBalancerSourceRanges").iter().filter_map(Value::as_str).enumerate() {
        if range.trim().parse::<ipnet::IpNet>().is_err() {
            let field = format!("spec.LoadBalancerSourceRanges[{i}]");
            errors.push(FieldError::invalid(
                field,
                range,
                "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)",
            ));
        }
    }
    errors
}

fn all_ports(ports: &[Value], kind: &str, headless: bool) -> ErrorList {
    let mut errors = ErrorList::new();
    let (mut used_names, mut used_ports, mut used_node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (i, port) in ports.iter().enumerate() {
        let at = |field: &str| format!("spec.ports[{i}].{field}");
        let name = text(port, "/name");
        if name.is_empty() {
            if ports.len() > 1 {
                errors.push(FieldError::required(at("name"), ""));
            }
        } else {
            let faults = names::dns1123_label(name);
            if faults.is_empty() && !used_names.insert(name) {
                errors.push(FieldError::duplicate(at("name"), name));
            }
            errors.extend(faults.into_iter().map(|f| FieldError::invalid(at("name"), name, f)));
        }
        let number = int(port, "/port").unwrap_or(0);
        if !(1..=65535).contains(&number) {
            errors.push(FieldError::invalid(at("port"), number, PORT_RANGE));
        }
        let protocol = text(port, "/protocol");
        if protocol.is_empty() {
            errors.push(FieldError::required(at("protocol"), ""));
        } else if !["SCTP", "TCP", "UDP"].contains(&protocol) {
            errors.push(FieldError::not_supported(at("protocol"), protocol, &["SCTP", "TCP", "UDP"]));
        }
        match &port["targetPort"] {
            Value::Number(n) if !n.as_i64().is_some_and(|n| (1..=65535).contains(&n)) => {
                errors.push(FieldError::invalid(at("targetPort"), port["targetPort"].clone(), PORT_RANGE));
            }
            Value::String(name) => {
                errors.extend(
                    port_name(name).into_iter().map(|f| FieldError::invalid(at("targetPort"), name.as_str(), f)),
                );
            }
            _ => {}
        }
        if (!headless || number != 0) && !used_ports.insert((number, protocol)) {
            errors.push(FieldError::duplicate(at("").trim_end_matches('.'), port.clone()));
        }
        let node_port = int(port, "/nodePort").unwrap_or(0);
        if node_port != 0 {
            if matches!(kind, "ClusterIP" | "ExternalName") {
                errors.push(FieldError::forbidden(at("nodePort"), format!("may not be used when `type` is '{kind}'")));
            } else if !used_node_ports.insert((node_port, protocol)) {
                errors.push(FieldError::duplicate(at("nodePort"), node_port));
            }
        }
    }
    errors
}

fn not_for_external_name(key: &str) -> FieldError {
    FieldError::forbidden(format!("spec.{key}"), "may not be set for ExternalName services")
}

fn traffic_policies(spec: &Value, kind: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let external = text(spec, "/externalTrafficPolicy");
    let has_external =
        matches!(kind, "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && !list(spec, "/externalIPs").is_empty());
    if !external.is_empty() {
        if !has_external {
            errors.push(FieldError::invalid(
                "spec.externalTrafficPolicy",
                external,
                "may only be set for externally-accessible services",
            ));
        } else if !["Cluster", "Local"].contains(&external) {
            errors.push(FieldError::not_supported("spec.externalTrafficPolicy", external, &["Cluster", "Local"]));
        }
    }
    let check = int(spec, "/healthCheckNodePort").unwrap_or(0);
    if check != 0 && !(kind == "LoadBalancer" && external == "Local") {
        let text = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'";
        errors.push(FieldError::invalid("spec.healthCheckNodePort", check, text));
    }
    let internal = text(spec, "/internalTrafficPolicy");
    if kind != "ExternalName" && !["Cluster", "Local"].contains(&internal) {
        errors.push(FieldError::not_supported("spec.internalTrafficPolicy", internal, &["Cluster", "Local"]));
    }
    if kind != "LoadBalancer" {
        if spec.get("allocateLoadBalancerNodePorts").is_some_and(|v| !v.is_null()) {
            errors.push(FieldError::forbidden(
                "spec.allocateLoadBalancerNodePorts",
                "may only be used when `type` is 'LoadBalancer'",
            ));
        }
        if spec.get("loadBalancerClass").is_some_and(|v| !v.is_null()) {
            errors.push(FieldError::forbidden(
                "spec.loadBalancerClass",
                "may only be used when `type` is 'LoadBalancer'",
            ));
        }
    }
    errors
}
