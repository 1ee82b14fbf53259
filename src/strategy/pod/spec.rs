//! Faults of a pod's spec; texts and order of upstream's `ValidatePodSpec`.

use std::net::IpAddr;

use serde_json::Value;

use super::{container, volume};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::apiserver::names;
use crate::strategy::Context;
use crate::strategy::value::{int, list, text};
use crate::strategy::workload::label_selector;

/// A whole pod. `update`: it exists already, so what only a new one must not have is let through.
pub(super) fn pod(_: &Context<'_>, pod: &Value, update: bool) -> ErrorList {
    let mut errors = spec(&pod["spec"], "spec");
    if !update && !list(pod, "/spec/ephemeralContainers").is_empty() {
        errors.push(FieldError::forbidden("spec.ephemeralContainers", "cannot be set on create"));
    }
    if !update && !text(pod, "/spec/nodeName").is_empty() && !list(pod, "/spec/schedulingGates").is_empty() {
        errors
            .push(FieldError::forbidden("spec.nodeName", "cannot be set until all schedulingGates have been cleared"));
    }
    errors
}

/// A template: metadata and spec.
pub(super) fn template(_: &Context<'_>, template: &Value, field: &str) -> ErrorList {
    let mut errors = labels(&template["metadata"]["labels"], &format!("{field}.metadata.labels"));
    errors.extend(spec(&template["spec"], &format!("{field}.spec")));
    if !list(template, "/spec/ephemeralContainers").is_empty() {
        let text = "ephemeral containers not allowed in pod template";
        errors.push(FieldError::forbidden(format!("{field}.spec.ephemeralContainers"), text));
    }
    errors
}

/// A map of labels.
pub(crate) fn labels(labels: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    if let Some(labels) = labels.as_object() {
        for (key, value) in labels {
            errors.extend(names::qualified_name(key).into_iter().map(|f| FieldError::invalid(field, key.as_str(), f)));
            let value = value.as_str().unwrap_or_default();
            errors.extend(names::label_value(value).into_iter().map(|f| FieldError::invalid(field, value, f)));
        }
    }
    errors
}

pub(super) fn spec(spec: &Value, field: &str) -> ErrorList {
    let at = |name: &str| format!("{field}.{name}");
    let (volumes, mut errors) = volume::all(list(spec, "/volumes"), &at("volumes"));
    let grace = int(spec, "/terminationGracePeriodSeconds");
    errors.extend(container::regular(list(spec, "/containers"), &volumes, grace, &at("containers")));
    errors.extend(container::init(spec, &volumes, grace, &at("initContainers")));
    errors.extend(container::ephemeral(spec, &volumes, &at("ephemeralContainers")));
    one_of(&mut errors, spec, "restartPolicy", field, &["Always", "OnFailure", "Never"]);
    one_of(&mut errors, spec, "dnsPolicy", field, &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"]);
    errors.extend(labels(&spec["nodeSelector"], &at("nodeSelector")));
    errors.extend(security_context(&spec["securityContext"], &at("securityContext")));
    for (i, secret) in list(spec, "/imagePullSecrets").iter().enumerate() {
        if text(secret, "/name").is_empty() {
            errors.push(FieldError::required(format!("{field}.imagePullSecrets[{i}].name"), ""));
        }
    }
    errors.extend(affinity(&spec["affinity"], &at("affinity")));
    errors.extend(dns_config(spec, &at("dnsConfig")));
    for (i, gate) in list(spec, "/readinessGates").iter().enumerate() {
        let kind = text(gate, "/conditionType");
        let at = format!("{field}.readinessGates[{i}].conditionType");
        errors.extend(names::qualified_name(kind).into_iter().map(|f| FieldError::invalid(&at, kind, f)));
    }
    errors.extend(topology_spread(list(spec, "/topologySpreadConstraints"), &at("topologySpreadConstraints")));
    for (name, check) in [
        ("serviceAccountName", names::dns1123_subdomain as fn(&str) -> Vec<String>),
        ("nodeName", names::dns1123_subdomain),
        ("hostname", names::dns1123_label),
        ("subdomain", names::dns1123_label),
        ("priorityClassName", names::dns1123_subdomain),
        ("runtimeClassName", names::dns1123_subdomain),
    ] {
        let value = spec[name].as_str().unwrap_or_default();
        if !value.is_empty() {
            errors.extend(check(value).into_iter().map(|f| FieldError::invalid(at(name), value, f)));
        }
    }
    if let Some(seconds) = int(spec, "/activeDeadlineSeconds").filter(|s| !(1..=i64::from(i32::MAX)).contains(s)) {
        errors.push(FieldError::invalid(
            at("activeDeadlineSeconds"),
            seconds,
            "must be between 1 and 2147483647, inclusive",
        ));
    }
    errors.extend(tolerations(list(spec, "/tolerations"), &at("tolerations")));
    for (i, alias) in list(spec, "/hostAliases").iter().enumerate() {
        let ip = text(alias, "/ip");
        if ip.parse::<IpAddr>().is_err() {
            let text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.push(FieldError::invalid(format!("{field}.hostAliases[{i}].ip"), ip, text));
        }
        for (j, name) in list(alias, "/hostnames").iter().filter_map(Value::as_str).enumerate() {
            let at = format!("{field}.hostAliases[{i}].hostnames[{j}]");
            errors.extend(names::dns1123_subdomain(name).into_iter().map(|f| FieldError::invalid(&at, name, f)));
        }
    }
    errors
}

fn one_of(errors: &mut ErrorList, object: &Value, key: &str, field: &str, supported: &[&str]) {
    let mut sorted = supported.to_vec();
    sorted.sort_unstable();
    match object[key].as_str().unwrap_or_default() {
        "" => errors.push(FieldError::required(format!("{field}.{key}"), "")),
        value if supported.contains(&value) => {}
        value => errors.push(FieldError::not_supported(format!("{field}.{key}"), value, &sorted)),
    }
}

/// The pod's security context; also the shared parts of a container's.
fn security_context(context: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let id_range = "must be between 0 and 2147483647, inclusive";
    for key in ["fsGroup", "runAsUser", "runAsGroup"] {
        if let Some(id) = context[key].as_i64().filter(|id| !(0..=i64::from(i32::MAX)).contains(id)) {
            errors.push(FieldError::invalid(format!("{field}.{key}"), id, id_range));
        }
    }
    for (i, id) in list(context, "/supplementalGroups").iter().filter_map(Value::as_i64).enumerate() {
        if !(0..=i64::from(i32::MAX)).contains(&id) {
            errors.push(FieldError::invalid(format!("{field}.supplementalGroups[{i}]"), id, id_range));
        }
    }
    let mut seen = Vec::new();
    for (i, sysctl) in list(context, "/sysctls").iter().enumerate() {
        let name = text(sysctl, "/name");
        let at = format!("{field}.sysctls[{i}].name");
        if name.is_empty() {
            errors.push(FieldError::required(at, ""));
        } else if !is_sysctl_name(name) {
            let text = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
            errors.push(FieldError::invalid(at, name, text));
        } else if seen.contains(&name) {
            errors.push(FieldError::duplicate(at, name));
        }
        seen.push(name);
    }
    if let Some(policy) = context["fsGroupChangePolicy"].as_str().filter(|p| !["Always", "OnRootMismatch"].contains(p))
    {
        errors.push(FieldError::not_supported(
            format!("{field}.fsGroupChangePolicy"),
            policy,
            &["Always", "OnRootMismatch"],
        ));
    }
    errors.extend(seccomp(&context["seccompProfile"], &format!("{field}.seccompProfile")));
    errors
}

pub(super) fn seccomp(profile: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    if profile.is_null() {
        return errors;
    }
    let local = text(profile, "/localhostProfile");
    match text(profile, "/type") {
        "" => errors.push(FieldError::required(format!("{field}.type"), "type is required when seccompProfile is set")),
        "Localhost" if local.is_empty() => {
            errors.push(FieldError::required(
                format!("{field}.localhostProfile"),
                "must be set when seccomp type is Localhost",
            ));
        }
        "Localhost" => {}
        "RuntimeDefault" | "Unconfined" => {
            if !local.is_empty() {
                let text = "can only be set when seccomp type is Localhost";
                errors.push(FieldError::invalid(format!("{field}.localhostProfile"), local, text));
            }
        }
        other => errors.push(FieldError::not_supported(
            format!("{field}.type"),
            other,
            &["Localhost", "RuntimeDefault", "Unconfined"],
        )),
    }
    errors
}

fn is_sysctl_name(name: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let inner = |b: u8| edge(b) || b == b'-' || b == b'_';
    let segment = |s: &str| {
        let bytes = s.as_bytes();
        !bytes.is_empty() && edge(bytes[0]) && edge(bytes[bytes.len() - 1]) && bytes.iter().all(|b| inner(*b))
    };
    name.len() <= 253 && name.split(['.', '/']).all(segment)
}

/// Tolerations of a pod.
pub(crate) fn tolerations(tolerations: &[Value], field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, toleration) in tolerations.iter().enumerate() {
        let at = |name: &str| format!("{field}[{i}].{name}");
        let (key, value) = (text(toleration, "/key"), text(toleration, "/value"));
        if !key.is_empty() {
            errors.extend(names::qualified_name(key).into_iter().map(|f| FieldError::invalid(at("key"), key, f)));
        }
        let operator = text(toleration, "/operator");
        if key.is_empty() && operator != "Exists" {
            let text = "operator must be Exists when `key` is empty, which means \"match all values and all keys\"";
            errors.push(FieldError::invalid(at("operator"), operator, text));
        }
        if int(toleration, "/tolerationSeconds").is_some() && text(toleration, "/effect") != "NoExecute" {
            let text = "effect must be 'NoExecute' when `tolerationSeconds` is set";
            errors.push(FieldError::invalid(at("effect"), text_of(toleration, "effect"), text));
        }
        match operator {
            "" | "Equal" => {
                let faults = names::label_value(value);
                if !faults.is_empty() {
                    errors.push(FieldError::invalid(at("operator"), value, faults.join(";")));
                }
            }
            "Exists" if !value.is_empty() => {
                errors.push(FieldError::invalid(
                    at("operator"),
                    value,
                    "value must be empty when `operator` is 'Exists'",
                ));
            }
            "Exists" => {}
            other => errors.push(FieldError::not_supported(at("operator"), other, &["Equal", "Exists"])),
        }
        let effect = text(toleration, "/effect");
        if !["", "NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
            errors.push(FieldError::not_supported(
                at("effect"),
                effect,
                &["NoExecute", "NoSchedule", "PreferNoSchedule"],
            ));
        }
    }
    errors
}

fn text_of(object: &Value, key: &str) -> String {
    object[key].as_str().unwrap_or_default().to_owned()
}

fn dns_config(spec: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let config = &spec["dnsConfig"];
    let servers = list(config, "/nameservers");
    if text(spec, "/dnsPolicy") == "None" {
        if config.is_null() {
            let text = "must provide `dnsConfig` when `dnsPolicy` is None";
            errors.push(FieldError::required(field, text));
            return errors;
        }
        if servers.is_empty() {
            let text = "must provide at least one DNS nameserver when `dnsPolicy` is None";
            errors.push(FieldError::required(format!("{field}.nameservers"), text));
            return errors;
        }
    }
    if servers.len() > 3 {
        let text = "must not have more than 3 nameservers";
        errors.push(FieldError::invalid(format!("{field}.nameservers"), Value::Array(servers.to_vec()), text));
    }
    for (i, server) in servers.iter().filter_map(Value::as_str).enumerate() {
        if server.parse::<IpAddr>().is_err() {
            let text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            errors.push(FieldError::invalid(format!("{field}.nameservers[{i}]"), server, text));
        }
    }
    for (i, search) in list(config, "/searches").iter().filter_map(Value::as_str).enumerate() {
        let name = search.strip_suffix('.').unwrap_or(search).replace('_', "-");
        if search != "." {
            let at = format!("{field}.searches[{i}]");
            errors.extend(names::dns1123_subdomain(&name).into_iter().map(|f| FieldError::invalid(&at, search, f)));
        }
    }
    for (i, option) in list(config, "/options").iter().enumerate() {
        if text(option, "/name").is_empty() {
            errors.push(FieldError::required(format!("{field}.options[{i}]"), "must not be empty"));
        }
    }
    errors
}

fn affinity(affinity: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let required = "requiredDuringSchedulingIgnoredDuringExecution";
    let preferred = "preferredDuringSchedulingIgnoredDuringExecution";
    let node = &affinity["nodeAffinity"];
    let at = format!("{field}.nodeAffinity");
    if !node[required].is_null() {
        let terms = list(&node[required], "/nodeSelectorTerms");
        if terms.is_empty() {
            let text = "must have at least one node selector term";
            errors.push(FieldError::required(format!("{at}.{required}.nodeSelectorTerms"), text));
        }
        for (i, term) in terms.iter().enumerate() {
            errors.extend(node_selector_term(term, &format!("{at}.{required}.nodeSelectorTerms[{i}]")));
        }
    }
    for (i, term) in list(node, &format!("/{preferred}")).iter().enumerate() {
        let at = format!("{at}.{preferred}[{i}]");
        errors.extend(weight(term, &at));
        errors.extend(node_selector_term(&term["preference"], &format!("{at}.preference")));
    }
    for kind in ["podAffinity", "podAntiAffinity"] {
        for (i, term) in list(&affinity[kind], &format!("/{required}")).iter().enumerate() {
            errors.extend(pod_affinity_term(term, &format!("{field}.{kind}.{required}[{i}]")));
        }
        for (i, term) in list(&affinity[kind], &format!("/{preferred}")).iter().enumerate() {
            let at = format!("{field}.{kind}.{preferred}[{i}]");
            errors.extend(weight(term, &at));
            errors.extend(pod_affinity_term(&term["podAffinityTerm"], &format!("{at}.podAffinityTerm")));
        }
    }
    errors
}

fn weight(term: &Value, field: &str) -> ErrorList {
    let weight = int(term, "/weight").unwrap_or(0);
    if (1..=100).contains(&weight) {
        return ErrorList::new();
    }
    vec![FieldError::invalid(format!("{field}.weight"), weight, "must be in the range 1-100")]
}

fn node_selector_term(term: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, requirement) in list(term, "/matchExpressions").iter().enumerate() {
        let at = |name: &str| format!("{field}.matchExpressions[{i}].{name}");
        let values = list(requirement, "/values");
        match text(requirement, "/operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.push(FieldError::required(at("values"), "must be specified when `operator` is 'In' or 'NotIn'"));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.push(FieldError::forbidden(
                    at("values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                ));
            }
            "Gt" | "Lt" if values.len() != 1 => {
                errors.push(FieldError::required(
                    at("values"),
                    "must be specified single value when `operator` is 'Lt' or 'Gt'",
                ));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" | "Gt" | "Lt" => {}
            other => errors.push(FieldError::invalid(at("operator"), other, "not a valid selector operator")),
        }
        let key = text(requirement, "/key");
        errors.extend(names::qualified_name(key).into_iter().map(|f| FieldError::invalid(at("key"), key, f)));
    }
    errors
}

fn pod_affinity_term(term: &Value, field: &str) -> ErrorList {
    let mut errors = label_selector(&term["labelSelector"], &format!("{field}.labelSelector"));
    errors.extend(label_selector(&term["namespaceSelector"], &format!("{field}.namespaceSelector")));
    for (i, name) in list(term, "/namespaces").iter().filter_map(Value::as_str).enumerate() {
        let at = format!("{field}.namespaces[{i}]");
        errors.extend(names::dns1123_label(name).into_iter().map(|f| FieldError::invalid(&at, name, f)));
    }
    let key = text(term, "/topologyKey");
    if key.is_empty() {
        errors.push(FieldError::required(format!("{field}.topologyKey"), "can not be empty"));
    }
    let faults = names::qualified_name(key).into_iter();
    errors.extend(faults.map(|f| FieldError::invalid(format!("{field}.topologyKey"), key, f)));
    errors
}

fn topology_spread(constraints: &[Value], field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, constraint) in constraints.iter().enumerate() {
        let at = |name: &str| format!("{field}[{i}].{name}");
        let skew = int(constraint, "/maxSkew").unwrap_or(0);
        if skew <= 0 {
            errors.push(FieldError::invalid(at("maxSkew"), skew, "must be greater than zero"));
        }
        if text(constraint, "/topologyKey").is_empty() {
            errors.push(FieldError::required(at("topologyKey"), "can not be empty"));
        }
        let when = text(constraint, "/whenUnsatisfiable");
        if !["DoNotSchedule", "ScheduleAnyway"].contains(&when) {
            errors.push(FieldError::not_supported(at("whenUnsatisfiable"), when, &["DoNotSchedule", "ScheduleAnyway"]));
        }
        if let Some(domains) = int(constraint, "/minDomains") {
            if domains <= 0 {
                errors.push(FieldError::invalid(at("minDomains"), domains, "must be greater than zero"));
            } else if when != "DoNotSchedule" {
                let text = format!("can only use minDomains if whenUnsatisfiable=DoNotSchedule, not {when}");
                errors.push(FieldError::invalid(at("minDomains"), domains, text));
            }
        }
        errors.extend(label_selector(&constraint["labelSelector"], &at("labelSelector")));
    }
    errors
}
