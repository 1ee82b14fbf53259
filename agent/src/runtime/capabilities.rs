//! Capabilities by name and number, and the set that a container gets.

use super::{Capabilities, RuntimeError};

/// Names by number, `linux/capability.h`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What containers have unless told otherwise, the same as with containerd and CRI-O's predecessors.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// A set of capabilities as a bit mask.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CapabilitySet(pub u64);

impl CapabilitySet {
    /// Every capability with a name.
    pub const ALL: CapabilitySet = CapabilitySet((1 << NAMES.len()) - 1);

    pub fn contains(self, name: &str) -> bool {
        NAMES.iter().position(|known| *known == name).is_some_and(|number| self.0 & 1 << number != 0)
    }

    /// `CAP_…` names, lowest number first.
    pub fn names(self) -> Vec<String> {
        NAMES
            .iter()
            .enumerate()
            .filter(|(number, _)| self.0 & 1 << number != 0)
            .map(|(_, n)| format!("CAP_{n}"))
            .collect()
    }

    /// What this process could hand on (`CapBnd` in proc(5)): what the host forbids cannot be given to anybody.
    pub fn of_host() -> CapabilitySet {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
        CapabilitySet(
            line.and_then(|value| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(u64::MAX) & Self::ALL.0,
        )
    }

    /// The set of a container.
    pub fn of_container(changes: &Capabilities, privileged: bool) -> Result<CapabilitySet, RuntimeError> {
        if privileged {
            return Ok(Self::ALL);
        }
        let all = |list: &[String]| list.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
        let mut mask = DEFAULT.iter().filter_map(|name| bit(name)).fold(0, |mask, bit| mask | bit);
        if all(&changes.add_capabilities) {
            mask = Self::ALL.0;
        }
        if all(&changes.drop_capabilities) {
            mask = 0;
        }
        for name in changes.add_capabilities.iter().filter(|name| !name.eq_ignore_ascii_case("ALL")) {
            mask |= known(name)?;
        }
        for name in changes.drop_capabilities.iter().filter(|name| !name.eq_ignore_ascii_case("ALL")) {
            mask &= !known(name)?;
        }
        Ok(CapabilitySet(mask))
    }
}

fn bit(name: &str) -> Option<u64> {
    NAMES.iter().position(|known| *known == name).map(|number| 1 << number)
}

fn known(name: &str) -> Result<u64, RuntimeError> {
    let upper = name.to_ascii_uppercase();
    bit(upper.strip_prefix("CAP_").unwrap_or(&upper))
        .ok_or_else(|| RuntimeError::Invalid(format!("unknown capability {name:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(add: &[&str], drop: &[&str]) -> CapabilitySet {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let changes = Capabilities { add_capabilities: list(add), drop_capabilities: list(drop) };
        CapabilitySet::of_container(&changes, false).unwrap()
    }

    #[test]
    fn adding_and_dropping() {
        assert_eq!(set(&[], &[]).names().len(), 14);
        assert_eq!(set(&[], &["ALL"]), CapabilitySet(0));
        assert_eq!(set(&["NET_ADMIN"], &["all"]).names(), ["CAP_NET_ADMIN"]);
        assert_eq!(set(&["ALL"], &["CAP_SYS_ADMIN"]).0, CapabilitySet::ALL.0 & !(1 << 21));
        assert!(!set(&[], &["mknod"]).contains("MKNOD"));
        assert_eq!(CapabilitySet::ALL.names().len(), 41);
        let wrong = Capabilities { add_capabilities: vec!["NOPE".into()], drop_capabilities: vec![] };
        assert!(CapabilitySet::of_container(&wrong, false).is_err());
    }
}
