//! The checks that only the restricted level makes.

use super::super::quoted;
use super::{Check, Found, is_bad_seccomp, named, plural, problem, setters};
use crate::admission::pod::{items, text};
use serde_json::Value;
use std::collections::BTreeSet;

/// Volume sources that the restricted level takes.
const VOLUMES: [&str; 9] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
];

impl<'a> Check<'a> {
    pub(super) fn privilege_escalation(&self) -> Found {
        let names = self.bad(|c| c["securityContext"]["allowPrivilegeEscalation"] != false);
        if names.is_empty() || self.is_windows() {
            return None;
        }
        let detail = format!("{} must set securityContext.allowPrivilegeEscalation=false", named(&names));
        problem("allowPrivilegeEscalation != false", detail)
    }

    pub(super) fn capabilities_restricted(&self) -> Found {
        if self.is_windows() {
            return None;
        }
        let missing = self.bad(|c| !items(&c["securityContext"]["capabilities"]["drop"]).any(|name| name == "ALL"));
        let mut added: BTreeSet<&str> = BTreeSet::new();
        let adding = self.bad(|c| {
            let odd: Vec<&str> = items(&c["securityContext"]["capabilities"]["add"])
                .filter_map(Value::as_str)
                .filter(|name| *name != "NET_BIND_SERVICE")
                .collect();
            added.extend(&odd);
            !odd.is_empty()
        });
        let mut details = Vec::new();
        if !missing.is_empty() {
            details.push(format!("{} must set securityContext.capabilities.drop=[\"ALL\"]", named(&missing)));
        }
        if !adding.is_empty() {
            let added = quoted(added);
            details.push(format!("{} must not include {added} in securityContext.capabilities.add", named(&adding)));
        }
        if details.is_empty() { None } else { problem("unrestricted capabilities", details.join("; ")) }
    }

    pub(super) fn volumes(&self) -> Found {
        let mut kinds: BTreeSet<&str> = BTreeSet::new();
        let mut names = Vec::new();
        for volume in items(&self.spec["volumes"]) {
            let fields = || volume.as_object().into_iter().flatten().filter(|(_, value)| value.is_object());
            if fields().any(|(key, _)| VOLUMES.contains(&key.as_str())) {
                continue;
            }
            names.push(text(volume, "name"));
            kinds.insert(fields().map(|(key, _)| key.as_str()).next().unwrap_or("unknown"));
        }
        if names.is_empty() {
            return None;
        }
        let detail = format!(
            "{} {} {} {} {}",
            plural("volume", "volumes", names.len()),
            quoted(&names),
            plural("uses", "use", names.len()),
            plural("restricted volume type", "restricted volume types", kinds.len()),
            quoted(kinds)
        );
        problem("restricted volume types", detail)
    }

    pub(super) fn non_root(&self) -> Found {
        if self.has_user_namespace() {
            return None;
        }
        let setting = |context: &Value| context["runAsNonRoot"].as_bool();
        let of_pod = setting(&self.spec["securityContext"]);
        let explicit = self.bad(|c| setting(&c["securityContext"]) == Some(false));
        if let Some(who) = setters(of_pod == Some(false), &explicit) {
            let detail = format!("{who} must not set securityContext.runAsNonRoot=false");
            return problem("runAsNonRoot != true", detail);
        }
        let implicit = self.bad(|c| of_pod != Some(true) && setting(&c["securityContext"]).is_none());
        if implicit.is_empty() {
            return None;
        }
        let detail = format!("pod or {} must set securityContext.runAsNonRoot=true", named(&implicit));
        problem("runAsNonRoot != true", detail)
    }

    pub(super) fn run_as_user(&self) -> Found {
        if self.has_user_namespace() {
            return None;
        }
        let names = self.bad(|c| c["securityContext"]["runAsUser"] == 0);
        let who = setters(self.spec["securityContext"]["runAsUser"] == 0, &names)?;
        problem("runAsUser=0", format!("{who} must not set runAsUser=0"))
    }

    pub(super) fn seccomp_restricted(&self) -> Found {
        if self.is_windows() {
            return None;
        }
        let mut kinds = BTreeSet::new();
        let mut bad = |context: &'a Value| is_bad_seccomp(context, &mut kinds);
        let context = &self.spec["securityContext"];
        let pod = bad(context);
        let explicit = self.bad(|c| bad(&c["securityContext"]));
        if let Some(who) = setters(pod, &explicit) {
            let detail = format!("{who} must not set securityContext.seccompProfile.type to {}", quoted(kinds));
            return problem("seccompProfile", detail);
        }
        let of_pod = context["seccompProfile"].is_object();
        let implicit = self.bad(|c| !of_pod && !c["securityContext"]["seccompProfile"].is_object());
        if implicit.is_empty() {
            return None;
        }
        let detail = format!(
            "pod or {} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\"",
            named(&implicit)
        );
        problem("seccompProfile", detail)
    }
}
