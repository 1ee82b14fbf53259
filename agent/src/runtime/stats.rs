//! Statistics of containers and pods.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::embedded::{Embedded, Phase, matches, step};
use super::record::ContainerRecord;
use super::{
    CgroupStats, ContainerStats, FilesystemUsage, NetworkInterfaceUsage, PodSandboxFilter, PodSandboxStats,
    RuntimeError, RuntimeResult,
};

impl Embedded {
    pub(super) async fn stats_of(&self, id: &str) -> RuntimeResult<ContainerStats> {
        let (record, log) = {
            let record = self.record(id)?;
            let state = self.inner.state.lock();
            let sandbox = state.sandboxes.get(&record.sandbox);
            let log = sandbox.map(|sandbox| sandbox.record.config.log_directory.join(&record.config.log_path));
            (record, log.unwrap_or_default())
        };
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.read_stats(&record, &log))
            .await
            .map_err(|error| RuntimeError::WrongState(error.to_string()))?
    }

    fn read_stats(&self, record: &ContainerRecord, log: &Path) -> RuntimeResult<ContainerStats> {
        let usage = self.inner.cgroups.stats(&record.cgroup).map_err(step("read the container's cgroup"))?;
        let mut writable_layer = FilesystemUsage::default();
        measure(&self.writable_dir(&record.id).join("upper"), &mut writable_layer);
        let mut logs = FilesystemUsage::default();
        let prefix = log.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
        for entry in log.parent().map(fs::read_dir).into_iter().flatten().flatten().flatten() {
            if entry.file_name().as_encoded_bytes().starts_with(&prefix) {
                measure(&entry.path(), &mut logs);
            }
        }
        Ok(ContainerStats {
            id: record.id.clone(),
            metadata: record.config.metadata.clone(),
            labels: record.config.labels.clone(),
            usage,
            writable_layer,
            logs,
        })
    }

    pub(super) async fn sandbox_stats(&self, filter: &PodSandboxFilter) -> RuntimeResult<Vec<PodSandboxStats>> {
        let mut found = Vec::new();
        for status in super::Runtime::list_pod_sandboxes(self, filter).await? {
            debug_assert!(matches(filter, &status));
            let (cgroup, containers) = {
                let state = self.inner.state.lock();
                let Some(sandbox) = state.sandboxes.get(&status.id) else { continue };
                let running = state
                    .containers
                    .values()
                    .filter(|container| container.record.sandbox == status.id && container.phase == Phase::Running);
                let ids: Vec<String> = running.map(|container| container.record.id.clone()).collect();
                (sandbox.record.config.linux.cgroup_parent.clone(), ids)
            };
            let mut containers_stats = Vec::new();
            for id in containers {
                // One that ends meanwhile has no statistics.
                if let Ok(stats) = self.stats_of(&id).await {
                    containers_stats.push(stats);
                }
            }
            let usage = match self.inner.cgroups.stats(&cgroup) {
                Ok(usage) if !cgroup.is_empty() => usage,
                _ => empty(),
            };
            let network = self.network_usage(&status.id);
            found.push(PodSandboxStats {
                id: status.id,
                metadata: status.metadata,
                usage,
                network,
                containers: containers_stats,
            });
        }
        Ok(found)
    }

    /// Counters of the pod's interfaces, read through the network namespace of one of its processes.
    fn network_usage(&self, sandbox: &str) -> Vec<NetworkInterfaceUsage> {
        let pid = {
            let state = self.inner.state.lock();
            state.containers.values().filter(|container| container.record.sandbox == sandbox).find_map(|c| c.pid)
        };
        let table = pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()).unwrap_or_default();
        table.lines().filter_map(interface).filter(|usage| usage.name != "lo").collect()
    }
}

/// One line of `/proc/net/dev`.
fn interface(line: &str) -> Option<NetworkInterfaceUsage> {
    let (name, rest) = line.split_once(':')?;
    let numbers: Vec<u64> = rest.split_whitespace().map_while(|field| field.parse().ok()).collect();
    (numbers.len() >= 11).then(|| NetworkInterfaceUsage {
        name: name.trim().to_owned(),
        rx_bytes: numbers[0],
        rx_errors: numbers[2],
        tx_bytes: numbers[8],
        tx_errors: numbers[10],
    })
}

fn empty() -> CgroupStats {
    CgroupStats {
        at: SystemTime::now(),
        cpu: Duration::ZERO,
        memory_usage_bytes: 0,
        memory_working_set_bytes: 0,
        memory_rss_bytes: 0,
        memory_limit_bytes: None,
        page_faults: 0,
        major_page_faults: 0,
        process_count: 0,
    }
}

/// Adds up blocks and inodes, without following links.
fn measure(path: &Path, usage: &mut FilesystemUsage) {
    let Ok(data) = fs::symlink_metadata(path) else { return };
    usage.used_bytes += data.blocks() * 512;
    usage.inodes_used += 1;
    if data.is_dir() {
        for entry in fs::read_dir(path).into_iter().flatten().flatten() {
            measure(&entry.path(), usage);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read() {
        let usage = interface("  eth0: 10 2 1 0 0 0 0 0 20 4 3 0 0 0 0 0").unwrap();
        assert_eq!(
            (usage.name.as_str(), usage.rx_bytes, usage.rx_errors, usage.tx_bytes, usage.tx_errors),
            ("eth0", 10, 1, 20, 3)
        );
        assert!(interface("Inter-|   Receive").is_none());
    }
}
