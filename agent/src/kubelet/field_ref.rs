//! `fieldRef` and `resourceFieldRef`: facts about a pod, for environment variables and downward API files.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};

use super::containers;
use super::quantity::{self, ResourceList};

/// A selector that names nothing; the API server lets none of these through.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FieldError {
    /// Not a field that can be referred to.
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    /// Not a resource that can be referred to.
    #[error("unsupported container resource : {0}")]
    Resource(String),
    /// The container does not exist.
    #[error("container {0} not found")]
    Container(String),
}

/// What is known of the node when a field is read.
#[derive(Debug, Clone, Default)]
pub struct NodeFacts {
    /// Addresses of the node.
    pub host_ips: Vec<IpAddr>,
    /// Allocatable resources: the limit of a container that sets none.
    pub allocatable: ResourceList,
}

/// The value of `path`; `pod_ips` are empty until the sandbox has addresses.
///
/// # Errors
/// [`FieldError::Field`] for a path that is not supported.
pub fn field(pod: &Pod, path: &str, pod_ips: &[IpAddr], node: &NodeFacts) -> Result<String, FieldError> {
    let spec = containers::spec(pod);
    let join = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let first = |ips: &[IpAddr]| ips.first().map(ToString::to_string).unwrap_or_default();
    let own_ips = if containers::is_host_network(pod) { &node.host_ips } else { pod_ips };
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => &pod.metadata.labels,
            "metadata.annotations" => &pod.metadata.annotations,
            _ => return Err(FieldError::Field(path.to_owned())),
        };
        return Ok(map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => containers::name(pod).to_owned(),
        "metadata.namespace" => containers::namespace(pod).to_owned(),
        "metadata.uid" => containers::uid(pod).to_owned(),
        "metadata.labels" => format_map(pod.metadata.labels.as_ref()),
        "metadata.annotations" => format_map(pod.metadata.annotations.as_ref()),
        "spec.nodeName" => spec.node_name.clone().unwrap_or_default(),
        "spec.serviceAccountName" => spec.service_account_name.clone().unwrap_or_default(),
        "status.hostIP" => first(&node.host_ips),
        "status.hostIPs" => join(&node.host_ips),
        "status.podIP" => first(own_ips),
        "status.podIPs" => join(own_ips),
        _ => return Err(FieldError::Field(path.to_owned())),
    })
}

/// `metadata.labels['key']` in its parts.
fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

/// One `key="value"` per line, sorted, values quoted as Go quotes them.
pub fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<_> = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quote(value))).collect();
    lines.join("\n")
}

fn quote(value: &str) -> String {
    let mut quoted = String::with_capacity(value.len() + 2);
    quoted.push('"');
    for c in value.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{b}' => quoted.push_str("\\v"),
            '\u{c}' => quoted.push_str("\\f"),
            c if c.is_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

/// The value of a `resourceFieldRef` in units of its divisor, rounded up.
///
/// # Errors
/// When the container or resource does not exist.
pub fn resource(
    pod: &Pod,
    own: Option<&Container>,
    selector: &ResourceFieldSelector,
    node: &NodeFacts,
) -> Result<String, FieldError> {
    let named = selector.container_name.as_deref().filter(|name| !name.is_empty());
    let found = named.and_then(|name| containers::find(pod, name));
    let container = match (named, &found, own) {
        (None, _, Some(own)) => own,
        (_, Some(found), _) => &found.container,
        (name, _, _) => return Err(FieldError::Container(name.unwrap_or_default().to_owned())),
    };
    let unsupported = || FieldError::Resource(selector.resource.clone());
    let (list, name) = selector.resource.split_once('.').ok_or_else(unsupported)?;
    let resources = container.resources.clone().unwrap_or_default();
    let quantity = match list {
        "limits" => resources.limits.unwrap_or_default().remove(name).or_else(|| node.allocatable.get(name).cloned()),
        "requests" => resources.requests.unwrap_or_default().remove(name),
        _ => return Err(unsupported()),
    };
    if !matches!(name, "cpu" | "memory" | "ephemeral-storage") && !name.starts_with("hugepages-") {
        return Err(unsupported());
    }
    let value = quantity.map_or(0, |quantity| quantity::milli(&quantity.0).unwrap_or(0));
    let divisor =
        selector.divisor.as_ref().and_then(|divisor| quantity::milli(&divisor.0)).filter(|divisor| *divisor > 0);
    let divisor = divisor.unwrap_or(1000);
    Ok((value / divisor + i128::from(value % divisor != 0)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_read_as_upstream_reads_them() {
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "labels": {"b": "x\"y", "a": "1"}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "1250m"}, "requests": {"memory": "32Mi"}}}]}
        }))
        .unwrap();
        let node = NodeFacts {
            host_ips: vec![IpAddr::from([10, 0, 0, 1])],
            allocatable: [("memory".to_owned(), k8s_openapi::apimachinery::pkg::api::resource::Quantity("1Gi".into()))]
                .into(),
        };
        assert_eq!(field(&pod, "metadata.labels", &[], &node).unwrap(), "a=\"1\"\nb=\"x\\\"y\"");
        assert_eq!(field(&pod, "metadata.labels['a']", &[], &node).unwrap(), "1");
        assert_eq!(field(&pod, "status.hostIP", &[], &node).unwrap(), "10.0.0.1");
        assert!(field(&pod, "spec.hostname", &[], &node).is_err());
        let read = |resource: &str, divisor: &str| {
            let selector = ResourceFieldSelector {
                container_name: Some("c".into()),
                divisor: Some(k8s_openapi::apimachinery::pkg::api::resource::Quantity(divisor.into())),
                resource: resource.into(),
            };
            super::resource(&pod, None, &selector, &node).unwrap()
        };
        assert_eq!(read("limits.cpu", "0"), "2");
        assert_eq!(read("limits.cpu", "1m"), "1250");
        assert_eq!(read("requests.memory", "1Mi"), "32");
        assert_eq!(read("limits.memory", "0"), (1_u64 << 30).to_string());
    }
}
