//! The Node object: what this machine is, and how it feels.

use std::net::IpAddr;
use std::path::Path;

use k8s_openapi::api::core::v1::{
    ContainerImage, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};

use super::quantity::{ResourceList, milli};
use crate::AgentConfig;
use crate::image::Image;
use crate::runtime::{RuntimeStatus, RuntimeVersion};

/// What the kubelet calls itself.
pub const KUBELET_VERSION: &str = "v1.35.4+coracle";
/// Images shown in the status.
const MAX_IMAGES: usize = 50;

/// What the machine is; read once.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// CPUs.
    pub cpus: i64,
    /// Bytes of memory.
    pub memory: i64,
    /// Bytes of the file system that holds the data directory.
    pub storage: i64,
    /// Sizes of huge pages (`2Mi`) to bytes set aside.
    pub huge_pages: Vec<(String, i64)>,
    info: NodeSystemInfo,
}

impl Machine {
    /// Reads `/proc`, `/sys` and `/etc`; what cannot be read stays empty.
    pub fn read(data_dir: &Path, runtime: &RuntimeVersion) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let meminfo = text("/proc/meminfo");
        let total = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<i64>().ok());
        let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(1);
        let storage = nix::sys::statvfs::statvfs(data_dir)
            .map(|stat| i64::try_from(stat.blocks() * stat.fragment_size()).unwrap_or(i64::MAX))
            .unwrap_or(0);
        let kernel =
            nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
        let os = text("/etc/os-release");
        let os_image =
            os.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).unwrap_or("Linux").trim_matches('"');
        let machine_id = text("/etc/machine-id");
        let uuid = text("/sys/class/dmi/id/product_uuid");
        Self {
            cpus,
            memory: total.unwrap_or(0) * 1024,
            storage,
            huge_pages: huge_pages(),
            info: NodeSystemInfo {
                architecture: architecture().to_owned(),
                boot_id: text("/proc/sys/kernel/random/boot_id"),
                container_runtime_version: format!("{}://{}", runtime.runtime_name, runtime.runtime_version),
                kernel_version: kernel,
                kube_proxy_version: String::new(),
                kubelet_version: KUBELET_VERSION.to_owned(),
                system_uuid: if uuid.is_empty() { machine_id.clone() } else { uuid },
                machine_id,
                operating_system: "linux".to_owned(),
                os_image: os_image.to_owned(),
                swap: None,
            },
        }
    }

    /// `status.capacity`.
    pub fn capacity(&self, max_pods: u32) -> ResourceList {
        let mut list = ResourceList::new();
        list.insert("cpu".to_owned(), Quantity(self.cpus.to_string()));
        list.insert("memory".to_owned(), Quantity(format!("{}Ki", self.memory / 1024)));
        list.insert("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", self.storage / 1024)));
        list.insert("pods".to_owned(), Quantity(max_pods.to_string()));
        for (size, bytes) in &self.huge_pages {
            let quantity = super::quantity::bytes_quantity(*bytes);
            list.insert(format!("hugepages-{size}"), quantity);
        }
        list
    }

    /// `status.allocatable`: all but the part of the disk that eviction keeps free.
    pub fn allocatable(&self, max_pods: u32) -> ResourceList {
        let mut list = self.capacity(max_pods);
        list.insert("ephemeral-storage".to_owned(), Quantity((self.storage / 100 * 95).to_string()));
        list
    }
}

/// GOARCH's word.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn huge_pages() -> Vec<(String, i64)> {
    let mut pages = Vec::new();
    for entry in std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(kib) = name.strip_prefix("hugepages-").and_then(|rest| rest.strip_suffix("kB")?.parse::<i64>().ok())
        else {
            continue;
        };
        let count = std::fs::read_to_string(entry.path().join("nr_hugepages")).ok();
        let count: i64 = count.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
        pages.push((super::quantity::bytes_quantity(kib * 1024).0, count * kib * 1024));
    }
    pages.sort();
    pages
}

/// What the machine is short of.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Less than 100 MiB of memory are available.
    pub memory: bool,
    /// Of the disk with the data directory less than 5 % and less than 2 GiB are available, or less than 5 % of its
    /// inodes. The percentage alone would close a big disk that has room for months.
    pub disk: bool,
    /// More than 9 of 10 process ids are taken.
    pub pid: bool,
}

impl Pressure {
    /// Asks the kernel; what it does not say is no pressure.
    pub fn read(data_dir: &Path) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let meminfo = text("/proc/meminfo");
        let available = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
        let disk = nix::sys::statvfs::statvfs(data_dir);
        let most: Option<u64> = text("/proc/sys/kernel/pid_max").trim().parse().ok();
        let taken = text("/proc/loadavg");
        let taken: Option<u64> = taken.split_whitespace().nth(3).and_then(|pair| pair.split_once('/')?.1.parse().ok());
        Self {
            memory: available.is_some_and(|kib| kib < 100 * 1024),
            disk: disk.is_ok_and(|disk| {
                let available = disk.blocks_available().saturating_mul(disk.fragment_size());
                is_short_of_disk(available, disk.blocks().saturating_mul(disk.fragment_size()))
                    || disk.files_available().saturating_mul(20) < disk.files()
            }),
            pid: most.zip(taken).is_some_and(|(most, taken)| taken * 10 > most * 9),
        }
    }
}

/// See [`Pressure::disk`]; bytes.
fn is_short_of_disk(available: u64, size: u64) -> bool {
    available < (size / 20).min(2 << 30)
}

/// Everything a Node object follows from.
pub struct Input<'a> {
    /// Configuration.
    pub config: &'a AgentConfig,
    /// The machine.
    pub machine: &'a Machine,
    /// Its addresses.
    pub ips: &'a [IpAddr],
    /// Whether the runtime and the network work.
    pub runtime: Result<RuntimeStatus, String>,
    /// What the machine is short of.
    pub pressure: Pressure,
    /// Images in the store.
    pub images: &'a [Image],
    /// The status as it was, for the times of its conditions.
    pub old: Option<&'a NodeStatus>,
    /// The clock, whole seconds.
    pub now: Time,
}

/// Labels the kubelet owns, and those of the command line.
pub fn labels(config: &AgentConfig) -> std::collections::BTreeMap<String, String> {
    let arch = architecture();
    let own = [
        ("beta.kubernetes.io/arch", arch),
        ("beta.kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/instance-type", "coracle"),
        ("kubernetes.io/arch", arch),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/hostname", config.node_name.as_str()),
        ("node.kubernetes.io/instance-type", "coracle"),
    ];
    let own = own.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
    own.chain(config.node_labels.iter().cloned()).collect()
}

/// The object to register.
pub fn node(input: &Input<'_>) -> Node {
    Node {
        metadata: ObjectMeta {
            name: Some(input.config.node_name.clone()),
            labels: Some(labels(input.config)),
            annotations: Some(
                [("volumes.kubernetes.io/controller-managed-attach-detach".to_owned(), "true".to_owned())].into(),
            ),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            taints: (!input.config.node_taints.is_empty()).then(|| input.config.node_taints.clone()),
            provider_id: Some(format!("coracle://{}", input.config.node_name)),
            ..NodeSpec::default()
        }),
        status: Some(status(input)),
    }
}

/// The status.
pub fn status(input: &Input<'_>) -> NodeStatus {
    let mut addresses: Vec<_> =
        input.ips.iter().map(|ip| NodeAddress { type_: "InternalIP".to_owned(), address: ip.to_string() }).collect();
    addresses.push(NodeAddress { type_: "Hostname".to_owned(), address: input.config.node_name.clone() });
    let images = input.images.iter().take(MAX_IMAGES).map(|image| ContainerImage {
        names: Some(image.repo_digests.iter().chain(&image.repo_tags).take(5).cloned().collect()),
        size_bytes: i64::try_from(image.size).ok(),
    });
    NodeStatus {
        addresses: Some(addresses),
        allocatable: Some(input.machine.allocatable(input.config.max_pods)),
        capacity: Some(input.machine.capacity(input.config.max_pods)),
        conditions: Some(conditions(input)),
        daemon_endpoints: Some(NodeDaemonEndpoints::default()),
        images: Some(images.collect()),
        node_info: Some(input.machine.info.clone()),
        ..NodeStatus::default()
    }
}

fn conditions(input: &Input<'_>) -> Vec<NodeCondition> {
    let ready = match &input.runtime {
        Ok(status) if status.runtime_ready && status.network_ready => Ok("kubelet is posting ready status".to_owned()),
        Ok(status) if !status.runtime_ready => Err(format!("container runtime not ready: {}", status.message)),
        Ok(status) => Err(format!(
            "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:{}",
            status.message
        )),
        Err(error) => Err(format!("container runtime status check may not have completed yet: {error}")),
    };
    let (ready, reason, message) = match ready {
        Ok(message) => ("True", "KubeletReady", message),
        Err(message) => ("False", "KubeletNotReady", message),
    };
    let short = |kind, is: bool, bad: [&str; 2], good: [&str; 2]| {
        let [reason, message] = if is { bad } else { good };
        condition(input, kind, if is { "True" } else { "False" }, reason, message.to_owned())
    };
    let pressure = input.pressure;
    vec![
        short(
            "MemoryPressure",
            pressure.memory,
            ["KubeletHasInsufficientMemory", "kubelet has insufficient memory available"],
            ["KubeletHasSufficientMemory", "kubelet has sufficient memory available"],
        ),
        short(
            "DiskPressure",
            pressure.disk,
            ["KubeletHasDiskPressure", "kubelet has disk pressure"],
            ["KubeletHasNoDiskPressure", "kubelet has no disk pressure"],
        ),
        short(
            "PIDPressure",
            pressure.pid,
            ["KubeletHasInsufficientPID", "kubelet has insufficient PID available"],
            ["KubeletHasSufficientPID", "kubelet has sufficient PID available"],
        ),
        condition(input, "Ready", ready, reason, message),
    ]
}

fn condition(input: &Input<'_>, kind: &str, status: &str, reason: &str, message: String) -> NodeCondition {
    let old = input.old.and_then(|old| old.conditions.as_deref()).unwrap_or_default();
    let same = old.iter().find(|old| old.type_ == kind && old.status == status);
    let since = same.and_then(|old| old.last_transition_time.clone()).unwrap_or_else(|| input.now.clone());
    NodeCondition {
        type_: kind.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_heartbeat_time: Some(input.now.clone()),
        last_transition_time: Some(since),
    }
}

/// Whether a condition of the node is "True".
pub fn holds(status: &NodeStatus, kind: &str) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == kind && condition.status == "True")
}

/// Whether what the API holds already says everything that is wanted, apart from when it was said. Others may have
/// added to it: extended resources, conditions, volumes.
pub fn says(held: &NodeStatus, wanted: &NodeStatus) -> bool {
    fn resources(held: Option<&ResourceList>, wanted: Option<&ResourceList>) -> bool {
        wanted.into_iter().flatten().all(|(name, quantity)| {
            held.and_then(|held| held.get(name)).is_some_and(|held| milli(&held.0) == milli(&quantity.0))
        })
    }
    let condition = |wanted: &NodeCondition| {
        let held = held.conditions.iter().flatten().find(|held| held.type_ == wanted.type_);
        held.is_some_and(|held| {
            *wanted == NodeCondition { last_heartbeat_time: wanted.last_heartbeat_time.clone(), ..held.clone() }
        })
    };
    resources(held.capacity.as_ref(), wanted.capacity.as_ref())
        && resources(held.allocatable.as_ref(), wanted.allocatable.as_ref())
        && wanted.conditions.iter().flatten().all(condition)
        && held.addresses == wanted.addresses
        && held.images.as_deref().unwrap_or_default() == wanted.images.as_deref().unwrap_or_default()
        && held.node_info == wanted.node_info
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubelet::observed::api_time;
    use std::time::{Duration, SystemTime};

    #[test]
    fn a_disk_is_short_when_both_its_share_and_its_room_are() {
        const GIB: u64 = 1 << 30;
        assert!(is_short_of_disk(GIB, 64 * GIB));
        assert!(!is_short_of_disk(3 * GIB, 256 * GIB), "1 % of a big disk is room enough");
        assert!(!is_short_of_disk(GIB, 16 * GIB), "and so is 6 % of a small one");
        assert!(is_short_of_disk(GIB / 2, 16 * GIB));
    }

    #[test]
    fn readiness_follows_the_runtime_and_transitions_keep_their_time() {
        let config = AgentConfig::new("/data".into(), "n1".into());
        let machine = Machine::default();
        let mut input = Input {
            config: &config,
            machine: &machine,
            ips: &[IpAddr::from([10, 0, 0, 1])],
            runtime: Ok(RuntimeStatus { runtime_ready: true, network_ready: false, message: "no range".into() }),
            pressure: Pressure::default(),
            images: &[],
            old: None,
            now: api_time(SystemTime::UNIX_EPOCH),
        };
        let first = status(&input);
        let ready = &first.conditions.as_ref().unwrap()[3];
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("KubeletNotReady")));
        input.runtime = Ok(RuntimeStatus { runtime_ready: true, network_ready: true, message: String::new() });
        input.now = api_time(SystemTime::UNIX_EPOCH + Duration::from_secs(5));
        input.old = Some(&first);
        let second = status(&input);
        let conditions = second.conditions.as_ref().unwrap();
        assert_eq!(conditions[3].message.as_deref(), Some("kubelet is posting ready status"));
        assert_eq!(conditions[3].last_transition_time, Some(input.now.clone()));
        assert_eq!(conditions[0].last_transition_time, first.conditions.as_ref().unwrap()[0].last_transition_time);
        assert!(!says(&first, &second));
    }

    #[test]
    fn a_status_that_others_added_to_still_says_it_and_one_they_overruled_does_not() {
        let config = AgentConfig::new("/data".into(), "n1".into());
        let machine = Machine { storage: 100_000, ..Machine::default() };
        let input = Input {
            config: &config,
            machine: &machine,
            ips: &[IpAddr::from([10, 0, 0, 1])],
            runtime: Ok(RuntimeStatus { runtime_ready: true, network_ready: true, message: String::new() }),
            pressure: Pressure::default(),
            images: &[],
            old: None,
            now: api_time(SystemTime::UNIX_EPOCH),
        };
        let wanted = status(&input);
        let mut held = wanted.clone();
        let capacity = held.capacity.as_mut().unwrap();
        capacity.insert("example.com/dongle".to_owned(), Quantity("1".to_owned()));
        held.allocatable.as_mut().unwrap().insert("ephemeral-storage".to_owned(), Quantity("95k".to_owned()));
        for condition in held.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = Some(api_time(SystemTime::UNIX_EPOCH + Duration::from_secs(9)));
        }
        held.images = None;
        assert!(says(&held, &wanted));
        held.conditions.as_mut().unwrap()[3].status = "Unknown".to_owned();
        assert!(!says(&held, &wanted), "the node life cycle controller overruled it");
        assert!(!says(&NodeStatus::default(), &wanted));
    }
}
