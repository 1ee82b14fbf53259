//! The checks of the Pod Security Standards. Each looks at a pod and says what is wrong with it: a reason and a detail.
//! Those of the baseline level are here, those that the restricted level adds in [`restricted`].

mod restricted;

use super::policy::{Level, LevelVersion};
use super::{containers, quoted};
use crate::admission::pod::{items, text};
use serde_json::Value;
use std::collections::BTreeSet;

const APPARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";
const SECCOMP_POD: &str = "seccomp.security.alpha.kubernetes.io/pod";
const SECCOMP_CONTAINER: &str = "container.seccomp.security.alpha.kubernetes.io/";

const CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Safe sysctls with the minor version that allowed them.
const SYSCTLS: [(&str, u32); 12] = [
    ("kernel.shm_rmid_forced", 0),
    ("net.ipv4.ip_local_port_range", 0),
    ("net.ipv4.tcp_syncookies", 0),
    ("net.ipv4.ping_group_range", 0),
    ("net.ipv4.ip_unprivileged_port_start", 0),
    ("net.ipv4.ip_local_reserved_ports", 27),
    ("net.ipv4.tcp_keepalive_time", 29),
    ("net.ipv4.tcp_fin_timeout", 29),
    ("net.ipv4.tcp_keepalive_intvl", 29),
    ("net.ipv4.tcp_keepalive_probes", 29),
    ("net.ipv4.tcp_rmem", 32),
    ("net.ipv4.tcp_wmem", 32),
];

/// What a check found.
struct Problem {
    reason: String,
    detail: String,
}

type Found = Option<Problem>;

fn problem(reason: impl Into<String>, detail: String) -> Found {
    Some(Problem { reason: reason.into(), detail })
}

/// Whether an annotation stands for a seccomp or AppArmor profile.
pub fn is_profile_annotation(key: &str) -> bool {
    key == SECCOMP_POD || key.starts_with(SECCOMP_CONTAINER) || key.starts_with(APPARMOR)
}

/// What is wrong with the pod at this level, as `reason (detail)`.
pub fn evaluate(at: LevelVersion, pod: &Value) -> Vec<String> {
    let text = |p: Problem| if p.detail.is_empty() { p.reason } else { format!("{} ({})", p.reason, p.detail) };
    problems(at, pod).into_iter().map(text).collect()
}

/// The reasons alone.
pub fn reasons(at: LevelVersion, pod: &Value) -> Vec<String> {
    problems(at, pod).into_iter().map(|p| p.reason).collect()
}

/// Runs the checks in upstream's order: baseline, then restricted, each by name. A restricted check replaces the baseline one
/// of the same matter.
fn problems(at: LevelVersion, pod: &Value) -> Vec<Problem> {
    if at.level == Level::Privileged {
        return Vec::new();
    }
    let minor = at.effective_minor();
    let restricted = at.level == Level::Restricted;
    let check = Check { pod, spec: &pod["spec"], minor };
    let mut found = vec![check.apparmor()];
    if !(restricted && minor >= 22) {
        found.push(check.capabilities_baseline());
    }
    found.push(check.host_namespaces());
    if !restricted {
        found.push(check.host_path());
    }
    found.extend([check.host_ports(), check.probe_hosts(), check.privileged()]);
    if !(restricted && minor >= 35) {
        found.push(check.proc_mount());
    }
    found.push(check.selinux());
    if !(restricted && minor >= 19) {
        found.push(check.seccomp_baseline());
    }
    found.extend([check.sysctls(), check.windows_host_process()]);
    if restricted {
        found.push(check.privilege_escalation());
        if minor >= 22 {
            found.push(check.capabilities_restricted());
        }
        if minor >= 35 {
            found.push(check.unmasked_proc());
        }
        found.extend([check.volumes(), check.non_root()]);
        if minor >= 23 {
            found.push(check.run_as_user());
        }
        if minor >= 19 {
            found.push(check.seccomp_restricted());
        }
    }
    found.into_iter().flatten().collect()
}

struct Check<'a> {
    pod: &'a Value,
    spec: &'a Value,
    minor: u32,
}

fn plural<'a>(one: &'a str, many: &'a str, count: usize) -> &'a str {
    if count == 1 { one } else { many }
}

/// `container "a"` or `containers "a", "b"`.
fn named(names: &[&str]) -> String {
    format!("{} {}", plural("container", "containers", names.len()), quoted(names))
}

/// `pod and container "a"`.
fn setters(pod: bool, names: &[&str]) -> Option<String> {
    let mut all = Vec::new();
    if pod {
        all.push("pod".to_owned());
    }
    if !names.is_empty() {
        all.push(named(names));
    }
    (!all.is_empty()).then(|| all.join(" and "))
}

impl<'a> Check<'a> {
    /// Names of the containers for which `bad` holds.
    fn bad(&self, mut bad: impl FnMut(&'a Value) -> bool) -> Vec<&'a str> {
        containers(self.spec).filter(|c| bad(c)).map(|c| text(c, "name")).collect()
    }

    fn is_windows(&self) -> bool {
        self.minor >= 25 && self.spec["os"]["name"] == "windows"
    }

    /// Root in a user namespace of its own is nobody on the host.
    fn has_user_namespace(&self) -> bool {
        self.minor >= 35 && self.spec["hostUsers"] == false
    }

    fn annotations(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let all = self.pod["metadata"]["annotations"].as_object().into_iter().flatten();
        all.map(|(key, value)| (key.as_str(), value.as_str().unwrap_or("")))
    }

    fn apparmor(&self) -> Found {
        let mut values: BTreeSet<&str> = BTreeSet::new();
        let mut bad_type = |context: &'a Value| match context["appArmorProfile"]["type"].as_str() {
            Some("RuntimeDefault" | "Localhost") => false,
            None => context["appArmorProfile"].is_object() && values.insert(""),
            Some(other) => {
                values.insert(other);
                true
            }
        };
        let pod = bad_type(&self.spec["securityContext"]);
        let names = self.bad(|c| bad_type(&c["securityContext"]));
        let allowed = |value: &str| value.is_empty() || value == "runtime/default" || value.starts_with("localhost/");
        let mut annotations: Vec<String> = self
            .annotations()
            .filter(|(key, value)| key.starts_with(APPARMOR) && !allowed(value))
            .map(|(key, value)| format!("{key}={value:?}"))
            .collect();
        annotations.sort();
        let mut who: Vec<String> = setters(pod, &names).into_iter().collect();
        if !annotations.is_empty() {
            who.push(plural("annotation", "annotations", annotations.len()).to_owned());
        }
        if who.is_empty() {
            return None;
        }
        let all: Vec<String> = values.into_iter().map(str::to_owned).chain(annotations).collect();
        let detail = format!("{} must not set AppArmor profile type to {}", who.join(" and "), quoted(&all));
        problem(plural("forbidden AppArmor profile", "forbidden AppArmor profiles", all.len()), detail)
    }

    fn capabilities_baseline(&self) -> Found {
        let mut added: BTreeSet<&str> = BTreeSet::new();
        let names = self.bad(|c| {
            let odd: Vec<&str> = items(&c["securityContext"]["capabilities"]["add"])
                .filter_map(Value::as_str)
                .filter(|name| !CAPABILITIES.contains(name))
                .collect();
            added.extend(&odd);
            !odd.is_empty()
        });
        if names.is_empty() {
            return None;
        }
        let detail =
            format!("{} must not include {} in securityContext.capabilities.add", named(&names), quoted(added));
        problem("non-default capabilities", detail)
    }

    fn host_namespaces(&self) -> Found {
        let set: Vec<String> = ["hostNetwork", "hostPID", "hostIPC"]
            .into_iter()
            .filter(|field| self.spec[*field] == true)
            .map(|field| format!("{field}=true"))
            .collect();
        if set.is_empty() { None } else { problem("host namespaces", set.join(", ")) }
    }

    fn host_path(&self) -> Found {
        let names: Vec<&str> =
            items(&self.spec["volumes"]).filter(|v| v["hostPath"].is_object()).map(|v| text(v, "name")).collect();
        if names.is_empty() {
            return None;
        }
        problem("hostPath volumes", format!("{} {}", plural("volume", "volumes", names.len()), quoted(names)))
    }

    fn host_ports(&self) -> Found {
        let mut ports: BTreeSet<String> = BTreeSet::new();
        let names = self.bad(|c| {
            let mut any = false;
            for port in items(&c["ports"]).filter_map(|p| p["hostPort"].as_i64()).filter(|p| *p != 0) {
                ports.insert(port.to_string());
                any = true;
            }
            any
        });
        if names.is_empty() {
            return None;
        }
        let listed = ports.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        let detail = format!(
            "{} {} {} {listed}",
            named(&names),
            plural("uses", "use", names.len()),
            plural("hostPort", "hostPorts", ports.len())
        );
        problem("hostPort", detail)
    }

    fn probe_hosts(&self) -> Found {
        if self.minor < 34 {
            return None;
        }
        let mut hosts: BTreeSet<&str> = BTreeSet::new();
        let mut names = self.bad(|c| {
            let lifecycle = &c["lifecycle"];
            let handlers = [
                &c["livenessProbe"],
                &c["readinessProbe"],
                &c["startupProbe"],
                &lifecycle["postStart"],
                &lifecycle["preStop"],
            ];
            let before = hosts.len();
            let mut any = false;
            for handler in handlers {
                for action in ["httpGet", "tcpSocket"] {
                    let host = text(&handler[action], "host");
                    if !host.is_empty() {
                        hosts.insert(host);
                        any = true;
                    }
                }
            }
            any || hosts.len() > before
        });
        if names.is_empty() {
            return None;
        }
        names.sort_unstable();
        let detail = format!(
            "{} {} {} {}",
            named(&names),
            plural("uses", "use", names.len()),
            plural("probe or lifecycle host", "probe or lifecycle hosts", hosts.len()),
            quoted(hosts)
        );
        problem("probe or lifecycle host", detail)
    }

    fn privileged(&self) -> Found {
        let names = self.bad(|c| c["securityContext"]["privileged"] == true);
        if names.is_empty() {
            return None;
        }
        problem("privileged", format!("{} must not set securityContext.privileged=true", named(&names)))
    }

    fn proc_mount(&self) -> Found {
        if self.has_user_namespace() { None } else { self.unmasked_proc() }
    }

    fn unmasked_proc(&self) -> Found {
        let mut kinds: BTreeSet<&str> = BTreeSet::new();
        let names = self.bad(|c| match c["securityContext"]["procMount"].as_str() {
            None | Some("Default") => false,
            Some(other) => {
                kinds.insert(other);
                true
            }
        });
        if names.is_empty() {
            return None;
        }
        let detail = format!("{} must not set securityContext.procMount to {}", named(&names), quoted(kinds));
        problem("procMount", detail)
    }

    fn selinux(&self) -> Found {
        let (mut kinds, mut user, mut role) = (BTreeSet::new(), false, false);
        let mut bad = |context: &'a Value| {
            let options = &context["seLinuxOptions"];
            let kind = text(options, "type");
            let known = matches!(kind, "" | "container_t" | "container_init_t" | "container_kvm_t")
                || (self.minor >= 31 && kind == "container_engine_t");
            if !known {
                kinds.insert(kind);
            }
            let (sets_user, sets_role) = (!text(options, "user").is_empty(), !text(options, "role").is_empty());
            user |= sets_user;
            role |= sets_role;
            !known || sets_user || sets_role
        };
        let pod = bad(&self.spec["securityContext"]);
        let names = self.bad(|c| bad(&c["securityContext"]));
        let who = setters(pod, &names)?;
        let mut what = Vec::new();
        if !kinds.is_empty() {
            what.push(format!("{} {}", plural("type", "types", kinds.len()), quoted(kinds)));
        }
        if user {
            what.push("user may not be set".to_owned());
        }
        if role {
            what.push("role may not be set".to_owned());
        }
        problem("seLinuxOptions", format!("{who} set forbidden securityContext.seLinuxOptions: {}", what.join("; ")))
    }

    fn seccomp_baseline(&self) -> Found {
        if self.minor < 19 {
            return self.seccomp_annotations();
        }
        let mut kinds = BTreeSet::new();
        let mut bad = |context: &'a Value| is_bad_seccomp(context, &mut kinds);
        let pod = bad(&self.spec["securityContext"]);
        let names = self.bad(|c| bad(&c["securityContext"]));
        let who = setters(pod, &names)?;
        problem(
            "seccompProfile",
            format!("{who} must not set securityContext.seccompProfile.type to {}", quoted(kinds)),
        )
    }

    fn seccomp_annotations(&self) -> Found {
        let valid =
            |value: &str| matches!(value, "runtime/default" | "docker/default") || value.starts_with("localhost/");
        let mine = |key: &str| {
            key == SECCOMP_POD
                || key
                    .strip_prefix(SECCOMP_CONTAINER)
                    .is_some_and(|name| containers(self.spec).any(|c| c["name"] == name))
        };
        let found: BTreeSet<String> = self
            .annotations()
            .filter(|(key, value)| mine(key) && !valid(value))
            .map(|(key, value)| format!("{key}={value:?}"))
            .collect();
        if found.is_empty() {
            return None;
        }
        let listed = found.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        problem("seccompProfile", format!("forbidden {} {listed}", plural("annotation", "annotations", found.len())))
    }

    fn sysctls(&self) -> Found {
        let safe = |name: &str| SYSCTLS.iter().any(|(known, since)| *known == name && self.minor >= *since);
        let found: Vec<&str> = items(&self.spec["securityContext"]["sysctls"])
            .map(|sysctl| text(sysctl, "name"))
            .filter(|name| !safe(name))
            .collect();
        if found.is_empty() { None } else { problem("forbidden sysctls", found.join(", ")) }
    }

    fn windows_host_process(&self) -> Found {
        let bad = |context: &Value| context["windowsOptions"]["hostProcess"] == true;
        let names = self.bad(|c| bad(&c["securityContext"]));
        let who = setters(bad(&self.spec["securityContext"]), &names)?;
        problem("hostProcess", format!("{who} must not set securityContext.windowsOptions.hostProcess=true"))
    }
}

fn is_bad_seccomp<'a>(context: &'a Value, kinds: &mut BTreeSet<&'a str>) -> bool {
    let profile = &context["seccompProfile"];
    let kind = text(profile, "type");
    let bad = profile.is_object() && !matches!(kind, "RuntimeDefault" | "Localhost");
    if bad {
        kinds.insert(kind);
    }
    bad
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const BASELINE: LevelVersion = LevelVersion { level: Level::Baseline, minor: None };
    const RESTRICTED: LevelVersion = LevelVersion { level: Level::Restricted, minor: None };

    fn pod(spec: Value) -> Value {
        json!({ "metadata": { "name": "p" }, "spec": spec })
    }

    #[test]
    fn a_plain_pod_is_baseline_but_not_restricted() {
        let plain = pod(json!({ "containers": [{ "name": "c" }] }));
        assert!(evaluate(BASELINE, &plain).is_empty());
        assert_eq!(
            evaluate(RESTRICTED, &plain).join(", "),
            "allowPrivilegeEscalation != false (container \"c\" must set securityContext.allowPrivilegeEscalation=false), \
             unrestricted capabilities (container \"c\" must set securityContext.capabilities.drop=[\"ALL\"]), \
             runAsNonRoot != true (pod or container \"c\" must set securityContext.runAsNonRoot=true), \
             seccompProfile (pod or container \"c\" must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")"
        );
    }

    #[test]
    fn a_careful_pod_is_restricted() {
        let careful = pod(json!({
            "securityContext": { "runAsNonRoot": true, "seccompProfile": { "type": "RuntimeDefault" } },
            "containers": [{ "name": "c", "securityContext": {
                "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"], "add": ["NET_BIND_SERVICE"] } } }],
            "volumes": [{ "name": "v", "emptyDir": {} }],
        }));
        assert_eq!(evaluate(RESTRICTED, &careful), Vec::<String>::new());
    }

    #[test]
    fn each_way_out_of_the_box_is_named() {
        let context = |context: Value| json!({ "containers": [{ "name": "c", "securityContext": context }] });
        for (spec, expected) in [
            (json!({ "hostNetwork": true, "hostPID": true }), "host namespaces (hostNetwork=true, hostPID=true)"),
            (json!({ "volumes": [{ "name": "v", "hostPath": { "path": "/" } }] }), "hostPath volumes (volume \"v\")"),
            (
                context(json!({ "privileged": true })),
                "privileged (container \"c\" must not set securityContext.privileged=true)",
            ),
            (
                context(json!({ "capabilities": { "add": ["SYS_ADMIN", "CHOWN"] } })),
                "non-default capabilities (container \"c\" must not include \"SYS_ADMIN\" in securityContext.capabilities.add)",
            ),
            (
                json!({ "initContainers": [{ "name": "i", "ports": [{ "hostPort": 80 }] }] }),
                "hostPort (container \"i\" uses hostPort 80)",
            ),
            (
                context(json!({ "procMount": "Unmasked" })),
                "procMount (container \"c\" must not set securityContext.procMount to \"Unmasked\")",
            ),
            (
                json!({ "securityContext": { "seccompProfile": { "type": "Unconfined" } } }),
                "seccompProfile (pod must not set securityContext.seccompProfile.type to \"Unconfined\")",
            ),
            (
                json!({ "securityContext": { "sysctls": [{ "name": "kernel.msgmax" }, { "name": "net.ipv4.tcp_rmem" }] } }),
                "forbidden sysctls (kernel.msgmax)",
            ),
            (
                json!({ "ephemeralContainers": [{ "name": "e", "securityContext": { "seLinuxOptions": { "type": "spc_t", "user": "u" } } }] }),
                "seLinuxOptions (container \"e\" set forbidden securityContext.seLinuxOptions: type \"spc_t\"; user may not be set)",
            ),
            (
                context(json!({ "appArmorProfile": { "type": "Unconfined" } })),
                "forbidden AppArmor profile (container \"c\" must not set AppArmor profile type to \"Unconfined\")",
            ),
            (
                json!({ "containers": [{ "name": "c", "livenessProbe": { "httpGet": { "host": "10.0.0.1" } } }] }),
                "probe or lifecycle host (container \"c\" uses probe or lifecycle host \"10.0.0.1\")",
            ),
        ] {
            assert_eq!(evaluate(BASELINE, &pod(spec.clone())), [expected], "{spec}");
        }
    }

    #[test]
    fn older_versions_know_less() {
        let old = LevelVersion { level: Level::Baseline, minor: Some(28) };
        let spec = json!({ "securityContext": { "sysctls": [{ "name": "net.ipv4.tcp_fin_timeout" }] } });
        assert_eq!(evaluate(old, &pod(spec.clone())).len(), 1);
        assert!(evaluate(BASELINE, &pod(spec)).is_empty());
        let probe = json!({ "containers": [{ "livenessProbe": { "httpGet": { "host": "h" } } }] });
        assert!(evaluate(old, &pod(probe)).is_empty());
    }
}
