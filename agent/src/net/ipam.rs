//! Addresses of this node's pods, and what is known of each attachment, on disk.
//!
//! One file per pod in `DATA/agent/ipam/`, written by rename. No fsync: what is lost in a power cut belongs to pods that
//! the power cut ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{HostPort, NetworkError};

/// The first addresses of a range are kept for the node itself (the overlay's device, a bridge).
const RESERVED: u128 = 2;
const RANGES: &str = "ranges";

/// One attached pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// `metadata.uid`.
    pub uid: String,
    /// `metadata.namespace`.
    pub namespace: String,
    /// `metadata.name`.
    pub name: String,
    /// Addresses, primary family first.
    pub ips: Vec<IpAddr>,
    /// Name of the link on the node's side.
    pub link: String,
    /// `hostPort`s.
    #[serde(default)]
    pub host_ports: Vec<HostPort>,
}

/// The node's ranges and what is taken of them.
#[derive(Debug, Default)]
pub struct Ipam {
    directory: PathBuf,
    ranges: Vec<IpNet>,
    attachments: BTreeMap<String, Attachment>,
    /// Where the search for a free address begins, so that an address rests before it is used again.
    cursor: BTreeMap<IpNet, u128>,
}

impl Ipam {
    /// Reads what is on disk. A file that cannot be understood is removed: it is of a pod before a power cut.
    pub fn load(directory: PathBuf) -> Result<Self, NetworkError> {
        let storage = |step| {
            let path = directory.clone();
            move |source| NetworkError::Storage { step, path, source }
        };
        std::fs::create_dir_all(&directory).map_err(storage("create"))?;
        let mut ipam = Self { directory: directory.clone(), ..Self::default() };
        for entry in std::fs::read_dir(&directory).map_err(storage("read"))? {
            let path = entry.map_err(storage("read"))?.path();
            let bytes = std::fs::read(&path).map_err(storage("read"))?;
            if path.file_name().is_some_and(|name| name == RANGES) {
                let texts: Vec<String> = serde_json::from_slice(&bytes).unwrap_or_default();
                ipam.ranges = texts.iter().filter_map(|text| text.parse().ok()).collect();
                continue;
            }
            match serde_json::from_slice::<Attachment>(&bytes) {
                Ok(attachment) => {
                    ipam.attachments.insert(attachment.uid.clone(), attachment);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "address record is damaged, removing it");
                    std::fs::remove_file(&path).map_err(storage("remove"))?;
                }
            }
        }
        Ok(ipam)
    }

    /// The node's ranges.
    pub fn ranges(&self) -> &[IpNet] {
        &self.ranges
    }

    /// Takes other ranges from now on. Pods keep the addresses that they have.
    pub fn set_ranges(&mut self, ranges: &[IpNet]) -> Result<(), NetworkError> {
        if self.ranges != ranges {
            self.ranges = ranges.to_vec();
            let texts: Vec<String> = ranges.iter().map(ToString::to_string).collect();
            self.write(RANGES, &texts)?;
        }
        Ok(())
    }

    /// All attached pods.
    pub fn attachments(&self) -> impl Iterator<Item = &Attachment> {
        self.attachments.values()
    }

    /// One attached pod.
    pub fn get(&self, uid: &str) -> Option<&Attachment> {
        self.attachments.get(uid)
    }

    /// One free address of each range.
    pub fn allocate(&mut self) -> Result<Vec<IpAddr>, NetworkError> {
        if self.ranges.is_empty() {
            return Err(NetworkError::NoPodCidr);
        }
        let used: BTreeSet<IpAddr> = self.attachments.values().flat_map(|attachment| attachment.ips.clone()).collect();
        let mut ips = Vec::new();
        for range in self.ranges.clone() {
            let cursor = self.cursor.get(&range).copied().unwrap_or_default();
            let (ip, next) = free(range, &used, cursor).ok_or(NetworkError::Exhausted { range })?;
            self.cursor.insert(range, next);
            ips.push(ip);
        }
        Ok(ips)
    }

    /// Remembers an attachment.
    pub fn insert(&mut self, attachment: Attachment) -> Result<(), NetworkError> {
        self.write(&attachment.uid, &attachment)?;
        self.attachments.insert(attachment.uid.clone(), attachment);
        Ok(())
    }

    /// Forgets an attachment; its addresses are free again.
    pub fn remove(&mut self, uid: &str) -> Result<Option<Attachment>, NetworkError> {
        let path = self.directory.join(uid);
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(NetworkError::Storage { step: "remove", path, source }),
        }
        Ok(self.attachments.remove(uid))
    }

    fn write(&self, name: &str, value: &impl Serialize) -> Result<(), NetworkError> {
        // A uid comes from the API, where it cannot hold a slash; a file name from outside would be a way out of here.
        let path = self.directory.join(name);
        if path.parent() != Some(self.directory.as_path()) {
            let source = io::ErrorKind::InvalidInput.into();
            return Err(NetworkError::Storage { step: "write", path, source });
        }
        write_by_rename(&path, value).map_err(|source| NetworkError::Storage { step: "write", path, source })
    }
}

/// Writes JSON so that readers see the old or the new content.
pub fn write_by_rename(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, serde_json::to_vec(value).map_err(io::Error::other)?)?;
    std::fs::rename(&temporary, path)
}

/// The first free address at or after the cursor (a count from the range's begin), and the cursor behind it.
fn free(range: IpNet, used: &BTreeSet<IpAddr>, cursor: u128) -> Option<(IpAddr, u128)> {
    let bits = u32::from(range.max_prefix_len() - range.prefix_len());
    let size = 1_u128.checked_shl(bits).unwrap_or(u128::MAX);
    // The last address of an IPv4 range is its broadcast address.
    let end = if range.addr().is_ipv4() { size.saturating_sub(1) } else { size };
    if end <= RESERVED {
        return None;
    }
    let start = if (RESERVED..end).contains(&cursor) { cursor } else { RESERVED };
    // No more than all taken addresses can stand in the way.
    let tries = (end - RESERVED).min(used.len() as u128 + 1);
    (0..tries).find_map(|step| {
        let offset = RESERVED + (start - RESERVED + step) % (end - RESERVED);
        let ip = nth(range, offset);
        (!used.contains(&ip)).then_some((ip, offset + 1))
    })
}

fn nth(range: IpNet, offset: u128) -> IpAddr {
    match range.network() {
        IpAddr::V4(ip) => Ipv4Addr::from_bits(ip.to_bits().wrapping_add(offset as u32)).into(),
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits().wrapping_add(offset)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attachment(uid: &str, ips: &[IpAddr]) -> Attachment {
        Attachment {
            uid: uid.into(),
            namespace: "n".into(),
            name: "p".into(),
            ips: ips.to_vec(),
            link: "cv0".into(),
            host_ports: Vec::new(),
        }
    }

    #[test]
    fn addresses_rest_before_they_are_used_again_and_the_edges_are_never_given_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut ipam = Ipam::load(dir.path().join("ipam")).unwrap();
        assert!(matches!(ipam.allocate(), Err(NetworkError::NoPodCidr)));
        ipam.set_ranges(&["10.42.0.0/29".parse().unwrap()]).unwrap();
        let mut seen = Vec::new();
        for uid in ["a", "b", "c", "d", "e"] {
            let ips = ipam.allocate().unwrap();
            seen.push(ips[0].to_string());
            ipam.insert(attachment(uid, &ips)).unwrap();
            if uid == "a" {
                ipam.remove(uid).unwrap();
            }
        }
        assert_eq!(seen, ["10.42.0.2", "10.42.0.3", "10.42.0.4", "10.42.0.5", "10.42.0.6"]);
        let ips = ipam.allocate().unwrap();
        assert_eq!(ips[0].to_string(), "10.42.0.2", "the freed one comes after all others");
        ipam.insert(attachment("f", &ips)).unwrap();
        assert!(matches!(ipam.allocate(), Err(NetworkError::Exhausted { .. })));
    }

    #[test]
    fn attachments_survive_a_restart_and_damaged_files_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ipam");
        let mut ipam = Ipam::load(path.clone()).unwrap();
        ipam.set_ranges(&["10.42.3.0/24".parse().unwrap(), "fd00:42::/64".parse().unwrap()]).unwrap();
        let ips = ipam.allocate().unwrap();
        assert_eq!(ips[1].to_string(), "fd00:42::2");
        ipam.insert(attachment("a", &ips)).unwrap();
        std::fs::write(path.join("torn"), b"").unwrap();
        let ipam = Ipam::load(path.clone()).unwrap();
        assert_eq!(ipam.get("a").unwrap().ips, ips);
        assert_eq!(ipam.ranges().len(), 2);
        assert!(!path.join("torn").exists());
    }

    #[test]
    fn a_uid_cannot_lead_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut ipam = Ipam::load(dir.path().join("ipam")).unwrap();
        assert!(ipam.insert(attachment("../x", &[])).is_err());
    }
}
