//! Names and addresses that the parts of the network share.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sha2::{Digest, Sha256};

use super::netlink::route::Mac;

/// How the names of all pod links begin on the node's side; rules match on it.
pub const LINK_PREFIX: &str = "cv";
/// The pod's link in its own namespace.
pub const POD_LINK: &str = "eth0";
/// Where pods send everything: answered by the node's end of the link, whatever addresses the node has.
pub const POD_GATEWAY_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 1, 1));
/// As [`POD_GATEWAY_V4`].
pub const POD_GATEWAY_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// How the names of the instance's other links begin.
pub const OVERLAY_PREFIX: &str = "co";

/// The overlay's link over machines' IPv4 (`co4-<id>`) or IPv6 addresses (`co6-<id>`).
pub fn overlay_link(instance_id: &str, ipv6: bool) -> String {
    format!("{OVERLAY_PREFIX}{}-{instance_id}", if ipv6 { 6 } else { 4 })
}

/// The link that IPv6 Services are routed to (`cos-<id>`), and its other end, where nothing ever arrives.
pub fn services_links(instance_id: &str) -> [String; 2] {
    ["s", "t"].map(|end| format!("{OVERLAY_PREFIX}{end}-{instance_id}"))
}

/// Hardware address of a node's overlay link. Every node knows it of every other by the name alone.
pub fn overlay_mac(node_name: &str, ipv6: bool) -> Mac {
    let digest: [u8; 32] = Sha256::digest(format!("overlay {} {node_name}", if ipv6 { 6 } else { 4 })).into();
    local_mac(&digest)
}

/// A locally administered, unicast address from the first six bytes.
fn local_mac(digest: &[u8]) -> Mac {
    let mut mac = [0; 6];
    mac.iter_mut().zip(digest).for_each(|(to, from)| *to = *from);
    mac[0] = (mac[0] & 0xfc) | 2;
    mac
}

/// The node's tables: `coracle-<id>`.
pub fn table(instance_id: &str) -> String {
    format!("coracle-{instance_id}")
}

/// Alias of an instance's links: `coracle-<id> <pod uid>`. Names are too short to tell the owner.
pub fn link_alias(instance_id: &str, uid: &str) -> String {
    format!("coracle-{instance_id} {uid}")
}

/// The node's end of a pod's link: at most 15 bytes.
pub fn link(instance_id: &str, uid: &str) -> String {
    let digest = digest(instance_id, uid, "link");
    digest[..5].iter().fold(LINK_PREFIX.to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// Hardware addresses of the node's and the pod's end: locally administered, unicast.
pub fn macs(instance_id: &str, uid: &str) -> (Mac, Mac) {
    let digest = digest(instance_id, uid, "mac");
    (local_mac(&digest), local_mac(&digest[6..]))
}

fn digest(instance_id: &str, uid: &str, purpose: &str) -> [u8; 32] {
    Sha256::digest(format!("{purpose} {instance_id} {uid}")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_differ_by_instance() {
        let name = link("0123abcd", "6f1c6d0e-0000-4000-8000-000000000000");
        assert!(name.len() <= 15 && name.starts_with(LINK_PREFIX));
        assert_ne!(name, link("0123abce", "6f1c6d0e-0000-4000-8000-000000000000"));
        let (node, pod) = macs("a", "b");
        assert_ne!(node, pod);
        assert_eq!((node[0] & 3, pod[0] & 3), (2, 2));
        assert!(overlay_link("0123abcd", true).len() <= 15);
        assert_ne!(overlay_mac("a", true), overlay_mac("a", false));
        assert_eq!(overlay_mac("a", true)[0] & 3, 2);
    }
}
