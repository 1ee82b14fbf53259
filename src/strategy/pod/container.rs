//! Faults of containers; texts and order of upstream's `validateContainerCommon` and its callers.

use std::collections::HashSet;

use serde_json::Value;

use super::{probe, spec};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::apiserver::names;
use crate::schema::quantity::Quantity;
use crate::strategy::value::{int, list, text, truth};

const PORT_RANGE: &str = "must be between 1 and 65535, inclusive";
/// Field paths that an environment variable may take from the pod.
const ENV_FIELDS: [&str; 8] = [
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
];
/// Resources that a field reference may name.
const FIELD_RESOURCES: [&str; 6] = [
    "limits.cpu",
    "limits.ephemeral-storage",
    "limits.memory",
    "requests.cpu",
    "requests.ephemeral-storage",
    "requests.memory",
];

/// `spec.containers`.
pub(super) fn regular(containers: &[Value], volumes: &HashSet<String>, grace: Option<i64>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    if containers.is_empty() {
        errors.push(FieldError::required(field, ""));
        return errors;
    }
    let mut names = HashSet::new();
    for (i, container) in containers.iter().enumerate() {
        let at = format!("{field}[{i}]");
        errors.extend(common(container, volumes, &at));
        if !names.insert(text(container, "/name")) {
            errors.push(FieldError::duplicate(format!("{at}.name"), text(container, "/name")));
        }
        errors.extend(probe::lifecycle(&container["lifecycle"], grace, &format!("{at}.lifecycle")));
        errors.extend(probe::probes(container, grace, &at));
        if container.get("restartPolicy").is_some_and(|p| !p.is_null()) {
            let policy = text(container, "/restartPolicy");
            if !["Always", "Never", "OnFailure"].contains(&policy) {
                errors.push(FieldError::not_supported(
                    format!("{at}.restartPolicy"),
                    policy,
                    &["Always", "Never", "OnFailure"],
                ));
            }
        }
    }
    errors.extend(host_port_conflicts(containers, field));
    errors
}

/// `spec.initContainers`; those with restartPolicy Always are sidecars and may have probes.
pub(super) fn init(pod: &Value, volumes: &HashSet<String>, grace: Option<i64>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut names: HashSet<&str> = list(pod, "/containers").iter().map(|c| text(c, "/name")).collect();
    for (i, container) in list(pod, "/initContainers").iter().enumerate() {
        let at = format!("{field}[{i}]");
        errors.extend(common(container, volumes, &at));
        let sidecar = text(container, "/restartPolicy") == "Always";
        if !names.insert(text(container, "/name")) && !text(container, "/name").is_empty() {
            errors.push(FieldError::duplicate(format!("{at}.name"), text(container, "/name")));
        }
        if sidecar {
            errors.extend(probe::lifecycle(&container["lifecycle"], grace, &format!("{at}.lifecycle")));
            errors.extend(probe::probes(container, grace, &at));
        } else {
            for key in ["lifecycle", "livenessProbe", "readinessProbe", "startupProbe"] {
                if !container[key].is_null() {
                    errors.push(FieldError::forbidden(
                        format!("{at}.{key}"),
                        "may not be set for init containers without restartPolicy=Always",
                    ));
                }
            }
        }
        errors.extend(host_port_conflicts(std::slice::from_ref(container), field));
    }
    errors
}

/// What an ephemeral container may not have.
const EPHEMERAL_FORBIDDEN: [&str; 7] =
    ["ports", "livenessProbe", "readinessProbe", "startupProbe", "lifecycle", "resources", "resizePolicy"];

/// `spec.ephemeralContainers`.
pub(super) fn ephemeral(pod: &Value, volumes: &HashSet<String>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let others = list(pod, "/containers").iter().chain(list(pod, "/initContainers"));
    let mut names: HashSet<&str> = others.map(|c| text(c, "/name")).collect();
    for (i, container) in list(pod, "/ephemeralContainers").iter().enumerate() {
        let at = format!("{field}[{i}]");
        errors.extend(common(container, volumes, &at));
        if !names.insert(text(container, "/name")) {
            errors.push(FieldError::duplicate(format!("{at}.name"), text(container, "/name")));
        }
        let target = text(container, "/targetContainerName");
        let known =
            list(pod, "/containers").iter().chain(list(pod, "/initContainers")).any(|c| text(c, "/name") == target);
        if !target.is_empty() && !known {
            errors.push(FieldError::not_found(format!("{at}.targetContainerName"), target));
        }
        for key in EPHEMERAL_FORBIDDEN {
            let value = &container[key];
            let empty = value.is_null()
                || value.as_object().is_some_and(|o| o.is_empty())
                || value.as_array().is_some_and(Vec::is_empty);
            if !empty {
                errors.push(FieldError::forbidden(format!("{at}.{key}"), "cannot be set for an Ephemeral Container"));
            }
        }
        for (j, mount) in list(container, "/volumeMounts").iter().enumerate() {
            for key in ["subPath", "subPathExpr"] {
                if !text(mount, &format!("/{key}")).is_empty() {
                    let at = format!("{at}.volumeMounts[{j}].{key}");
                    errors.push(FieldError::forbidden(at, "cannot be set for an Ephemeral Container"));
                }
            }
        }
    }
    errors
}

fn common(container: &Value, volumes: &HashSet<String>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let name = text(container, "/name");
    if name.is_empty() {
        errors.push(FieldError::required(format!("{field}.name"), ""));
    } else {
        errors.extend(
            names::dns1123_label(name).into_iter().map(|f| FieldError::invalid(format!("{field}.name"), name, f)),
        );
    }
    let image = text(container, "/image");
    if image.is_empty() {
        errors.push(FieldError::required(format!("{field}.image"), ""));
    } else if image.trim() != image {
        errors.push(FieldError::invalid(
            format!("{field}.image"),
            image,
            "must not have leading or trailing whitespace",
        ));
    }
    let policy = text(container, "/terminationMessagePolicy");
    if policy.is_empty() {
        errors.push(FieldError::required(format!("{field}.terminationMessagePolicy"), ""));
    } else if !["File", "FallbackToLogsOnError"].contains(&policy) {
        let at = format!("{field}.terminationMessagePolicy");
        errors.push(FieldError::not_supported(at, policy, &["FallbackToLogsOnError", "File"]));
    }
    errors.extend(ports(list(container, "/ports"), &format!("{field}.ports")));
    errors.extend(env(list(container, "/env"), &format!("{field}.env")));
    errors.extend(env_from(list(container, "/envFrom"), &format!("{field}.envFrom")));
    errors.extend(volume_mounts(container, volumes, &format!("{field}.volumeMounts")));
    let policy = text(container, "/imagePullPolicy");
    if policy.is_empty() {
        errors.push(FieldError::required(format!("{field}.imagePullPolicy"), ""));
    } else if !["Always", "IfNotPresent", "Never"].contains(&policy) {
        errors.push(FieldError::not_supported(
            format!("{field}.imagePullPolicy"),
            policy,
            &["Always", "IfNotPresent", "Never"],
        ));
    }
    errors.extend(resources(&container["resources"], &format!("{field}.resources")));
    errors.extend(security_context(&container["securityContext"], &format!("{field}.securityContext")));
    errors
}

fn ports(ports: &[Value], field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut seen = HashSet::new();
    for (i, port) in ports.iter().enumerate() {
        let at = |name: &str| format!("{field}[{i}].{name}");
        let name = text(port, "/name");
        if !name.is_empty() {
            let faults = port_name(name);
            if faults.is_empty() && !seen.insert(name) {
                errors.push(FieldError::duplicate(at("name"), name));
            }
            errors.extend(faults.into_iter().map(|f| FieldError::invalid(at("name"), name, f)));
        }
        match int(port, "/containerPort").unwrap_or(0) {
            0 => errors.push(FieldError::required(at("containerPort"), "")),
            n if !(1..=65535).contains(&n) => errors.push(FieldError::invalid(at("containerPort"), n, PORT_RANGE)),
            _ => {}
        }
        if let Some(n) = int(port, "/hostPort").filter(|n| *n != 0 && !(1..=65535).contains(n)) {
            errors.push(FieldError::invalid(at("hostPort"), n, PORT_RANGE));
        }
        match text(port, "/protocol") {
            "" => errors.push(FieldError::required(at("protocol"), "")),
            "SCTP" | "TCP" | "UDP" => {}
            other => errors.push(FieldError::not_supported(at("protocol"), other, &["SCTP", "TCP", "UDP"])),
        }
    }
    errors
}

/// What is wrong with the name of a port (IANA service name, RFC 6335).
pub(crate) fn port_name(name: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if name.len() > 15 {
        faults.push("must be no more than 15 characters".to_owned());
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        faults.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".to_owned());
    }
    if !name.bytes().any(|b| b.is_ascii_lowercase()) {
        faults.push("must contain at least one letter (a-z)".to_owned());
    }
    if name.contains("--") {
        faults.push("must not contain consecutive hyphens".to_owned());
    }
    if name.starts_with('-') || name.ends_with('-') {
        faults.push("must not begin or end with a hyphen".to_owned());
    }
    faults
}

fn host_port_conflicts(containers: &[Value], field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut seen = HashSet::new();
    for (i, container) in containers.iter().enumerate() {
        for (j, port) in list(container, "/ports").iter().enumerate() {
            let number = int(port, "/hostPort").unwrap_or(0);
            if number != 0 {
                let key = format!("{}/{}/{number}", text(port, "/protocol"), text(port, "/hostIP"));
                if !seen.insert(key.clone()) {
                    errors.push(FieldError::duplicate(format!("{field}[{i}].ports[{j}].hostPort"), key));
                }
            }
        }
    }
    errors
}

fn env(vars: &[Value], field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, var) in vars.iter().enumerate() {
        let name = text(var, "/name");
        if name.is_empty() {
            errors.push(FieldError::required(format!("{field}[{i}].name"), ""));
        } else if !name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
            let text =
                "a valid environment variable name must consist only of printable ASCII characters other than '='";
            errors.push(FieldError::invalid(format!("{field}[{i}].name"), name, text));
        }
        let from = &var["valueFrom"];
        let at = format!("{field}[{i}].valueFrom");
        if from.is_null() {
            continue;
        }
        let mut sources = 0;
        if !from["fieldRef"].is_null() {
            sources += 1;
            errors.extend(field_ref(&from["fieldRef"], &format!("{at}.fieldRef")));
        }
        if !from["resourceFieldRef"].is_null() {
            sources += 1;
            errors.extend(resource_field_ref(&from["resourceFieldRef"], false, &format!("{at}.resourceFieldRef")));
        }
        for key in ["configMapKeyRef", "secretKeyRef"] {
            if !from[key].is_null() {
                sources += 1;
                errors.extend(key_ref(&from[key], &format!("{at}.{key}")));
            }
        }
        sources += usize::from(!from["fileKeyRef"].is_null());
        if sources == 0 {
            let text = "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef` or `secretKeyRef`";
            errors.push(FieldError::invalid(at, "", text));
        } else if !text(var, "/value").is_empty() {
            errors.push(FieldError::invalid(at, "", "may not be specified when `value` is not empty"));
        } else if sources > 1 {
            errors.push(FieldError::invalid(at, "", "may not have more than one field specified at a time"));
        }
    }
    errors
}

fn field_ref(reference: &Value, field: &str) -> ErrorList {
    let path = text(reference, "/fieldPath");
    if text(reference, "/apiVersion").is_empty() {
        return vec![FieldError::required(format!("{field}.apiVersion"), "")];
    }
    if path.is_empty() {
        return vec![FieldError::required(format!("{field}.fieldPath"), "")];
    }
    let subscripted = |map: &str| {
        path.strip_prefix(map).and_then(|rest| rest.strip_prefix("['")).is_some_and(|rest| rest.ends_with("']"))
    };
    if ENV_FIELDS.contains(&path)
        || path == "status.podIPs"
        || subscripted("metadata.annotations")
        || subscripted("metadata.labels")
    {
        return ErrorList::new();
    }
    let mut supported = ENV_FIELDS.to_vec();
    supported.push("status.podIPs");
    vec![FieldError::not_supported(format!("{field}.fieldPath"), path, &supported)]
}

/// A reference to a container's resource; volumes must name the container.
pub(super) fn resource_field_ref(reference: &Value, in_volume: bool, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let resource = text(reference, "/resource");
    if in_volume && text(reference, "/containerName").is_empty() {
        errors.push(FieldError::required(format!("{field}.containerName"), ""));
    } else if resource.is_empty() {
        errors.push(FieldError::required(format!("{field}.resource"), ""));
    } else if !FIELD_RESOURCES.contains(&resource)
        && !resource.starts_with("requests.hugepages-")
        && !resource.starts_with("limits.hugepages-")
    {
        errors.push(FieldError::not_supported(format!("{field}.resource"), resource, &FIELD_RESOURCES));
    }
    errors
}

fn key_ref(reference: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let key = text(reference, "/key");
    if key.is_empty() {
        errors.push(FieldError::required(format!("{field}.key"), ""));
    } else {
        errors.extend(config_key(key).into_iter().map(|f| FieldError::invalid(format!("{field}.key"), key, f)));
    }
    errors
}

/// What is wrong with a key of a ConfigMap or Secret.
pub(crate) fn config_key(key: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if key.len() > 253 {
        faults.push("must be no more than 253 characters".to_owned());
    }
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        faults.push("a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned());
    }
    match key {
        "." => faults.push("must not be '.'".to_owned()),
        ".." => faults.push("must not be '..'".to_owned()),
        key if key.starts_with("..") => faults.push("must not start with '..'".to_owned()),
        _ => {}
    }
    faults
}

fn env_from(sources: &[Value], field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, source) in sources.iter().enumerate() {
        let at = format!("{field}[{i}]");
        let mut count = 0;
        for key in ["configMapRef", "secretRef"] {
            if !source[key].is_null() {
                count += 1;
                if text(source, &format!("/{key}/name")).is_empty() {
                    errors.push(FieldError::required(format!("{at}.{key}.name"), ""));
                }
            }
        }
        if count == 0 {
            errors.push(FieldError::invalid(at, "", "must specify one of: `configMapRef` or `secretRef`"));
        } else if count > 1 {
            errors.push(FieldError::invalid(at, "", "may not have more than one field specified at a time"));
        }
    }
    errors
}

fn volume_mounts(container: &Value, volumes: &HashSet<String>, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut points = HashSet::new();
    for (i, mount) in list(container, "/volumeMounts").iter().enumerate() {
        let at = |name: &str| format!("{field}[{i}].{name}");
        let (name, path) = (text(mount, "/name"), text(mount, "/mountPath"));
        if name.is_empty() {
            errors.push(FieldError::required(at("name"), ""));
        }
        if !volumes.contains(name) {
            errors.push(FieldError::not_found(at("name"), name));
        }
        if path.is_empty() {
            errors.push(FieldError::required(at("mountPath"), ""));
        }
        if !points.insert(path) {
            errors.push(FieldError::invalid(at("mountPath"), path, "must be unique"));
        }
        let (sub, expr) = (text(mount, "/subPath"), text(mount, "/subPathExpr"));
        if !sub.is_empty() {
            errors.extend(descending_path(sub, &format!("{field}.subPath")));
        }
        if !expr.is_empty() {
            if !sub.is_empty() {
                errors.push(FieldError::invalid(
                    at("subPathExpr"),
                    expr,
                    "subPathExpr and subPath are mutually exclusive",
                ));
            }
            errors.extend(descending_path(expr, &format!("{field}.subPathExpr")));
        }
        match text(mount, "/mountPropagation") {
            "" | "None" | "HostToContainer" => {}
            "Bidirectional" => {
                if !truth(container, "/securityContext/privileged") {
                    let text = "Bidirectional mount propagation is available only to privileged containers";
                    errors.push(FieldError::forbidden(format!("{field}.mountPropagation"), text));
                }
            }
            other => {
                let supported = ["Bidirectional", "HostToContainer", "None"];
                errors.push(FieldError::not_supported(format!("{field}.mountPropagation"), other, &supported));
            }
        }
    }
    errors
}

/// A relative path that does not climb.
pub(super) fn descending_path(path: &str, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    if path.starts_with('/') {
        errors.push(FieldError::invalid(field, path, "must be a relative path"));
    }
    if path.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(field, path, "must not contain '..'"));
    }
    errors
}

/// Requests and limits.
fn resources(resources: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let quantity = |value: &Value| value.as_str().and_then(|text| Quantity::parse(text).ok());
    for section in ["limits", "requests"] {
        let Some(Value::Object(amounts)) = resources.get(section) else { continue };
        for (name, value) in amounts {
            let at = format!("{field}.{section}[{name}]");
            let standard =
                ["cpu", "memory", "ephemeral-storage"].contains(&name.as_str()) || name.starts_with("hugepages-");
            if !name.contains('/') && !standard {
                errors.push(FieldError::invalid(
                    at.clone(),
                    name.as_str(),
                    "must be a standard resource type or fully qualified",
                ));
                errors.push(FieldError::invalid(
                    at.clone(),
                    name.as_str(),
                    "must be a standard resource for containers",
                ));
            }
            let Some(amount) = quantity(value) else { continue };
            if amount.nanos() < 0 {
                errors.push(FieldError::invalid(at, value.clone(), "must be greater than or equal to 0"));
                continue;
            }
            if section == "requests"
                && let Some(limit) = resources["limits"].get(name).and_then(quantity)
                && amount.nanos() > limit.nanos()
            {
                let limit = text(&resources["limits"], &format!("/{}", name.replace('/', "~1")));
                let text = format!("must be less than or equal to {name} limit of {limit}");
                errors.push(FieldError::invalid(format!("{field}.requests"), value.clone(), text));
            }
        }
    }
    errors
}

fn security_context(context: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for key in ["runAsUser", "runAsGroup"] {
        if let Some(id) = context[key].as_i64().filter(|id| !(0..=i64::from(i32::MAX)).contains(id)) {
            errors.push(FieldError::invalid(
                format!("{field}.{key}"),
                id,
                "must be between 0 and 2147483647, inclusive",
            ));
        }
    }
    if let Some(kind) = context["procMount"].as_str().filter(|k| !["Default", "Unmasked"].contains(k)) {
        errors.push(FieldError::not_supported(format!("{field}.procMount"), kind, &["Default", "Unmasked"]));
    }
    errors.extend(spec::seccomp(&context["seccompProfile"], &format!("{field}.seccompProfile")));
    if context["allowPrivilegeEscalation"].as_bool() == Some(false) {
        if truth(context, "/privileged") {
            let text = "cannot set `allowPrivilegeEscalation` to false and `privileged` to true";
            errors.push(FieldError::invalid(field, context.clone(), text));
        }
        if list(context, "/capabilities/add").iter().any(|c| c == "CAP_SYS_ADMIN") {
            let text = "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN";
            errors.push(FieldError::invalid(field, context.clone(), text));
        }
    }
    errors
}
