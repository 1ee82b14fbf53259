//! What the node refuses although the scheduler has sent it: such a pod fails at once.

use k8s_openapi::api::core::v1::Pod;

use super::{config, containers};
use crate::runtime::PortMapping;

/// Kernel settings that belong to a namespace of the pod alone.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// (reason, message) of a pod that cannot run here.
pub fn refuse(pod: &Pod) -> Option<(String, String)> {
    let spec = containers::spec(pod);
    let os = spec.os.as_ref().map_or("linux", |os| os.name.as_str());
    if os != "linux" {
        let message =
            format!("Failed to admit pod as the OS field doesn't match node OS; pod OS: {os}, node OS: linux");
        return Some(("PodOSNotSupported".to_owned(), message));
    }
    let sysctls = spec.security_context.as_ref().and_then(|context| context.sysctls.as_deref()).unwrap_or_default();
    for sysctl in sysctls {
        let name = sysctl.name.replace('/', ".");
        let why = if !SAFE_SYSCTLS.contains(&name.as_str()) {
            "not allowlisted"
        } else if name.starts_with("net.") && spec.host_network == Some(true) {
            "not allowed with host net enabled"
        } else if name.starts_with("kernel.") && spec.host_ipc == Some(true) {
            "not allowed with host ipc enabled"
        } else {
            continue;
        };
        return Some(("SysctlForbidden".to_owned(), format!("forbidden sysctl: {name:?} {why}")));
    }
    None
}

/// (reason, message) of a pod whose host ports another pod of this node has.
pub fn conflict<'a>(pod: &Pod, others: impl Iterator<Item = &'a Pod>) -> Option<(String, String)> {
    let wanted: Vec<_> = config::host_ports(pod).collect();
    let mut others = others.filter(|other| containers::uid(other) != containers::uid(pod));
    let taken = !wanted.is_empty()
        && others.any(|other| config::host_ports(other).any(|port| wanted.iter().any(|own| same_port(own, &port))));
    taken.then(|| {
        let message = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
        ("NodePorts".to_owned(), message.to_owned())
    })
}

/// Two mappings of one protocol and port meet unless they are of different addresses.
fn same_port(one: &PortMapping, other: &PortMapping) -> bool {
    let everywhere = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
    one.host_port == other.host_port
        && one.protocol == other.protocol
        && (everywhere(&one.host_ip) || everywhere(&other.host_ip) || one.host_ip == other.host_ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_port_is_given_once() {
        let pod = |uid: &str, ip: &str, port: u16| -> Pod {
            let ports = serde_json::json!([{"containerPort": 80, "hostPort": port, "hostIP": ip, "protocol": "TCP"}]);
            serde_json::from_value(serde_json::json!({"metadata": {"uid": uid},
                "spec": {"containers": [{"name": "c", "ports": ports}]}}))
            .unwrap()
        };
        let (first, second) = (pod("a", "", 8080), pod("b", "10.0.0.1", 8080));
        assert_eq!(conflict(&second, [&first].into_iter()).unwrap().0, "NodePorts");
        assert_eq!(conflict(&first, [&first].into_iter()), None);
        assert_eq!(conflict(&second, [&pod("c", "10.0.0.2", 8080), &pod("d", "", 8081)].into_iter()), None);
    }

    #[test]
    fn only_settings_of_the_pods_own_namespaces_are_let_through() {
        let pod = |name: &str, host: bool| -> Pod {
            let spec = serde_json::json!({"containers": [], "hostNetwork": host, "securityContext": {"sysctls": [{"name": name, "value": "1"}]}});
            serde_json::from_value(serde_json::json!({"spec": spec})).unwrap()
        };
        assert_eq!(refuse(&pod("kernel.shm_rmid_forced", false)), None);
        let (reason, message) = refuse(&pod("kernel.msgmax", false)).unwrap();
        assert_eq!(
            (reason.as_str(), message.as_str()),
            ("SysctlForbidden", "forbidden sysctl: \"kernel.msgmax\" not allowlisted")
        );
        assert!(refuse(&pod("net.ipv4.tcp_syncookies", true)).unwrap().1.contains("host net"));
    }
}
