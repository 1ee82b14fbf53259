//! `--flannel-backend`: how pods of different nodes reach each other.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The ways that there are, named as k3s names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// In UDP packets between the nodes' addresses.
    #[default]
    Vxlan,
    /// By routes; all nodes are on one L2 segment.
    HostGw,
    /// Somebody else makes the routes.
    None,
}

impl Backend {
    /// The flag's value.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::None => "none",
        }
    }

    /// Bytes that are added to a packet on its way over machines' addresses of that family.
    pub fn overhead(self, ipv6: bool) -> u32 {
        match self {
            Self::Vxlan if ipv6 => 70,
            Self::Vxlan => 50,
            Self::HostGw | Self::None => 0,
        }
    }
}

impl std::fmt::Display for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A value of the flag that cannot be used; its text says why and what would do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// WireGuard needs the kernel's module.
    #[error(
        "this kernel has no WireGuard (`modprobe wireguard`, or CONFIG_WIREGUARD), and Coracle has no WireGuard backend yet; use vxlan or host-gw"
    )]
    KernelLacksWireguard,
    /// The kernel could, we cannot.
    #[error("Coracle has no WireGuard backend yet; use vxlan or host-gw")]
    Wireguard,
    /// Backends of flannel that k3s has removed, or nothing that was ever there.
    #[error("expected vxlan, host-gw or none")]
    Unknown,
}

impl FromStr for Backend {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, BackendError> {
        match text {
            "vxlan" => Ok(Self::Vxlan),
            "host-gw" => Ok(Self::HostGw),
            "none" => Ok(Self::None),
            "wireguard-native" if super::super::check::has_link_kind("wireguard") => Err(BackendError::Wireguard),
            "wireguard-native" => Err(BackendError::KernelLacksWireguard),
            _ => Err(BackendError::Unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_k3s_and_others_are_refused_with_what_would_do() {
        for backend in [Backend::Vxlan, Backend::HostGw, Backend::None] {
            assert_eq!(backend.name().parse(), Ok(backend));
            assert_eq!(serde_json::to_value(backend).unwrap(), backend.name());
        }
        for other in ["wireguard-native", "ipsec", ""] {
            let text = other.parse::<Backend>().unwrap_err().to_string();
            assert!(text.contains("vxlan"), "{other}: {text}");
        }
    }
}
