//! Files the kubelet writes for a pod below `DATA/agent/pods/<uid>`, and what it reads back from logs.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::Pod;

use super::context::Context;
use super::hosts::{self, ClusterDns, Hostname};
use super::{containers, labels};
use crate::runtime::{ContainerState, ContainerStatus, DnsConfig};

/// Bytes of a termination message; what is longer is cut.
const MESSAGE_BYTES: u64 = 4096;
/// Bytes and lines of the log that stand in for a missing message.
const FALLBACK_BYTES: u64 = 2048;
const FALLBACK_LINES: usize = 80;

/// A pod's names.
///
/// # Errors
/// The message for the event.
pub fn hostname(context: &Context, pod: &Pod) -> Result<Hostname, String> {
    let node = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    hosts::hostname(pod, &context.config.cluster_domain, &node)
}

/// A pod's resolver configuration; the node's is read each time, it may change.
pub fn dns(context: &Context, pod: &Pod) -> DnsConfig {
    let own = fs::read_to_string(&context.config.resolv_conf).unwrap_or_default();
    let cluster = ClusterDns { servers: &context.config.cluster_dns, domain: &context.config.cluster_domain };
    hosts::dns(pod, &cluster, &hosts::parse_resolv_conf(&own))
}

/// Writes hosts, hostname and resolver configuration. Files that are there change in place: containers have them
/// mounted.
///
/// # Errors
/// What the file system says.
pub fn write(context: &Context, pod: &Pod, names: &Hostname, dns: &DnsConfig, ips: &[IpAddr]) -> io::Result<()> {
    let folder = context.pod_dir(pod);
    fs::create_dir_all(&folder)?;
    let aliases = containers::spec(pod).host_aliases.as_deref().unwrap_or_default();
    let hosts = if containers::is_host_network(pod) {
        hosts::node_hosts(&fs::read_to_string("/etc/hosts").unwrap_or_default(), aliases)
    } else {
        hosts::pod_hosts(ips, names, aliases)
    };
    for (name, text) in [
        ("etc-hosts", hosts),
        ("hostname", format!("{}\n", names.hostname)),
        ("resolv.conf", hosts::format_resolv_conf(dns)),
    ] {
        let path = folder.join(name);
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// Makes the empty file that a container's `terminationMessagePath` is.
///
/// # Errors
/// What the file system says.
pub fn make_termination_message(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, "")?;
    // Any user of the container may write its last words.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}

/// Gives ended containers the message they left.
pub fn fill_messages(containers: &mut [ContainerStatus]) {
    for container in containers {
        if container.state == ContainerState::Exited && container.message.is_empty() {
            container.message = message(container);
        }
    }
}

fn message(container: &ContainerStatus) -> String {
    let Some(path) = container.annotations.get(labels::TERMINATION_MESSAGE) else { return String::new() };
    let mut text = Vec::new();
    if let Ok(file) = fs::File::open(path) {
        let _ = file.take(MESSAGE_BYTES).read_to_end(&mut text);
    }
    let fallback =
        container.annotations.get(labels::TERMINATION_MESSAGE_POLICY).is_some_and(|it| it == "FallbackToLogsOnError");
    if text.is_empty() && fallback && container.exit_code != 0 {
        return log_tail(&container.log_path);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// The last lines of a CRI log without its prefixes.
fn log_tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        // Prefixes of about 40 bytes a line are not part of the message.
        let window = FALLBACK_BYTES * 2 + FALLBACK_LINES as u64 * 64;
        file.seek(SeekFrom::Start(length.saturating_sub(window)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(4, ' ');
        let (Some(_), Some(stream), Some(tag), Some(content)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if !matches!(stream, "stdout" | "stderr") {
            continue;
        }
        lines.push(if tag.starts_with('P') { content.to_owned() } else { format!("{content}\n") });
    }
    let start = lines.len().saturating_sub(FALLBACK_LINES);
    let joined = lines[start..].concat();
    let cut = joined.len().saturating_sub(usize::try_from(FALLBACK_BYTES).unwrap_or(usize::MAX));
    let cut = (cut..joined.len()).find(|at| joined.is_char_boundary(*at)).unwrap_or(joined.len());
    joined[cut..].to_owned()
}

/// The highest restart count among the log files of a container.
pub fn last_log(folder: &Path) -> Option<u32> {
    let entries = fs::read_dir(folder).ok()?;
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.split('.').next()?.parse().ok()).max()
}

/// Removes the logs of a container that is gone, rotated ones too.
pub fn remove_logs(pod_logs: &Path, container: &ContainerStatus) {
    let folder = pod_logs.join(&container.metadata.name);
    let prefix = format!("{}.log", container.metadata.attempt);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// The durable copy of a pod, from which it starts when no API server answers.
pub fn durable_path(pods_dir: &Path, uid: &str) -> PathBuf {
    pods_dir.join(uid).join("pod.json")
}

/// Writes the durable copy by rename.
///
/// # Errors
/// What the file system says.
pub fn save_durable(pods_dir: &Path, pod: &Pod) -> io::Result<()> {
    crate::files::write(&durable_path(pods_dir, containers::uid(pod)), &serde_json::to_vec(pod)?, 0o600)
}

/// The durable copies of all pods; damaged ones are skipped.
pub fn load_durable(pods_dir: &Path) -> Vec<Pod> {
    let entries = fs::read_dir(pods_dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let bytes = fs::read(entry.path().join("pod.json")).ok()?;
            serde_json::from_slice(&bytes)
                .inspect_err(|error| tracing::warn!(%error, path = %entry.path().display(), "damaged copy of a pod"))
                .ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_stands_in_for_a_missing_message() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        fs::write(
            &path,
            "2026-01-01T00:00:00.0Z stdout F first\n2026-01-01T00:00:00.0Z stderr P sec\n2026-01-01T00:00:00.0Z stderr F ond\n",
        )
        .unwrap();
        assert_eq!(log_tail(&path), "first\nsecond\n");
        assert_eq!(last_log(dir.path()), Some(0));
    }
}
