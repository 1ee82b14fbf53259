//! What the network keeps of Node objects, read from their JSON.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

/// `topology.kubernetes.io/zone`.
const LABEL_ZONE: &str = "topology.kubernetes.io/zone";

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// `metadata.name`.
    pub name: String,
    /// Addresses of type `InternalIP`, in their order.
    pub internal_ips: Vec<IpAddr>,
    /// `spec.podCIDRs`, or `spec.podCIDR` when that is all there is.
    pub pod_cidrs: Vec<IpNet>,
    /// The zone that the node is in, by its label.
    pub zone: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawNode {
    metadata: RawMeta,
    spec: RawSpec,
    status: RawStatus,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawMeta {
    name: String,
    labels: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawSpec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawStatus {
    addresses: Option<Vec<RawAddress>>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawAddress {
    #[serde(rename = "type")]
    kind: String,
    address: String,
}

impl Node {
    /// Reads a Node; addresses and ranges that are none are left out.
    ///
    /// # Errors
    /// The JSON is no Node.
    pub fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let raw: RawNode = serde_json::from_slice(json)?;
        let addresses = raw.status.addresses.unwrap_or_default();
        let internal = addresses.iter().filter(|address| address.kind == "InternalIP");
        let texts = raw.spec.pod_cidrs.filter(|all| !all.is_empty());
        let texts = texts.unwrap_or_else(|| raw.spec.pod_cidr.into_iter().collect());
        Ok(Self {
            internal_ips: internal.filter_map(|address| address.address.parse().ok()).collect(),
            pod_cidrs: texts.iter().filter_map(|text| Some(text.parse::<IpNet>().ok()?.trunc())).collect(),
            zone: raw.metadata.labels.unwrap_or_default().remove(LABEL_ZONE).filter(|zone| !zone.is_empty()),
            name: raw.metadata.name,
        })
    }

    /// The first internal address of a family.
    pub fn internal_ip(&self, ipv6: bool) -> Option<IpAddr> {
        self.internal_ips.iter().copied().find(|ip| ip.is_ipv6() == ipv6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_the_range_are_read_and_nonsense_is_left_out() {
        let json = r#"{"metadata":{"name":"a","labels":{"topology.kubernetes.io/zone":"z"}},
            "spec":{"podCIDR":"10.42.0.0/24","podCIDRs":["10.42.0.0/24","fd42::/64","x"]},
            "status":{"addresses":[{"type":"Hostname","address":"a"},{"type":"InternalIP","address":"192.0.2.1"},
            {"type":"InternalIP","address":"2001:db8::1"},{"type":"ExternalIP","address":"203.0.113.1"}]}}"#;
        let node = Node::parse(json.as_bytes()).unwrap();
        assert_eq!((node.name.as_str(), node.zone.as_deref(), node.pod_cidrs.len()), ("a", Some("z"), 2));
        assert_eq!(node.internal_ip(false), Some("192.0.2.1".parse().unwrap()));
        assert_eq!(node.internal_ip(true), Some("2001:db8::1".parse().unwrap()));
        let node = Node::parse(br#"{"spec":{"podCIDR":"10.42.7.0/24"}}"#).unwrap();
        assert_eq!(node.pod_cidrs, ["10.42.7.0/24".parse().unwrap()]);
        assert_eq!(node.internal_ip(false), None);
    }
}
