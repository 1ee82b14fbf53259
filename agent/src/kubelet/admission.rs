//! What the node refuses although the scheduler has sent it: such a pod fails at once.

use k8s_openapi::api::core::v1::Pod;

use super::containers;

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

#[cfg(test)]
mod tests {
    use super::*;

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
