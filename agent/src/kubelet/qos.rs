//! Quality-of-service classes and what they mean for cgroups.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use super::containers::{self, ContainerKind};
use super::quantity::{ResourceList, cpu_milli, memory_bytes};
use crate::runtime::LinuxContainerResources;

/// Microseconds of a CPU bandwidth period.
const CPU_PERIOD: u64 = 100_000;
const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
const MIN_QUOTA: i64 = 1_000;

/// `status.qosClass`.
pub fn class(pod: &Pod) -> &'static str {
    if let Some(resources) = &containers::spec(pod).resources
        && (has_compute(resources.requests.as_ref()) || has_compute(resources.limits.as_ref()))
    {
        return class_of([resources].into_iter());
    }
    class_of(
        containers::init_containers(pod)
            .iter()
            .chain(&containers::spec(pod).containers)
            .map(|container| container.resources.as_ref().unwrap_or(&NONE)),
    )
}

static NONE: ResourceRequirements = ResourceRequirements { claims: None, limits: None, requests: None };

fn has_compute(list: Option<&ResourceList>) -> bool {
    ["cpu", "memory"].iter().any(|name| positive(list, name).is_some())
}

fn positive(list: Option<&ResourceList>, name: &str) -> Option<i128> {
    super::quantity::milli(&list?.get(name)?.0).filter(|value| *value > 0)
}

fn class_of<'a>(all: impl Iterator<Item = &'a ResourceRequirements>) -> &'static str {
    let mut any = false;
    let mut guaranteed = true;
    for resources in all {
        for name in ["cpu", "memory"] {
            let limit = positive(resources.limits.as_ref(), name);
            let request = positive(resources.requests.as_ref(), name);
            any |= limit.is_some() || request.is_some();
            guaranteed &= limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// The pod's cgroup below the instance's: `kubepods/<qos>/pod<uid>`.
pub fn cgroup_parent(root: &str, pod: &Pod) -> String {
    let uid = containers::uid(pod);
    match class(pod) {
        "Guaranteed" => format!("{root}/kubepods/pod{uid}"),
        "Burstable" => format!("{root}/kubepods/burstable/pod{uid}"),
        _ => format!("{root}/kubepods/besteffort/pod{uid}"),
    }
}

/// `cpu.shares` for a request in milli-CPU.
pub fn shares(milli: i64) -> u64 {
    let shares = if milli == 0 { MIN_SHARES } else { (milli * 1024 / 1000).clamp(MIN_SHARES, MAX_SHARES) };
    u64::try_from(shares).unwrap_or(2)
}

/// `cpu.cfs_quota_us` for a limit in milli-CPU.
pub fn quota(milli: i64) -> i64 {
    (milli * 100_000 / 1000).max(MIN_QUOTA)
}

/// Limits of one container's cgroup.
pub fn container_resources(pod: &Pod, container: &Container, node_memory: i64) -> LinuxContainerResources {
    let resources = container.resources.as_ref().unwrap_or(&NONE);
    let cpu_limit = cpu_milli(resources.limits.as_ref()).filter(|milli| *milli > 0);
    let cpu_request = cpu_milli(resources.requests.as_ref()).or(cpu_limit).unwrap_or(0);
    let memory_limit = memory_bytes(resources.limits.as_ref()).filter(|bytes| *bytes > 0);
    LinuxContainerResources {
        cpu_period: Some(CPU_PERIOD),
        cpu_quota: Some(cpu_limit.map_or(-1, quota)),
        cpu_shares: Some(shares(cpu_request)),
        memory_limit_in_bytes: Some(memory_limit.unwrap_or(-1)),
        memory_swap_limit_in_bytes: memory_limit,
        oom_score_adj: Some(oom_score_adj(pod, container, node_memory)),
        hugepage_limits: hugepages(resources.limits.as_ref()),
        ..LinuxContainerResources::default()
    }
}

/// `hugepages-2Mi: 4Mi` becomes `2MB` -> 4 MiB.
fn hugepages(limits: Option<&ResourceList>) -> std::collections::BTreeMap<String, u64> {
    let mut pages = std::collections::BTreeMap::new();
    for (name, quantity) in limits.into_iter().flatten() {
        let Some(size) = name.strip_prefix("hugepages-") else { continue };
        let bytes = super::quantity::milli(size).unwrap_or(0) / 1000;
        let (count, unit) = if bytes >= 1 << 30 {
            (bytes >> 30, "GB")
        } else if bytes >= 1 << 20 {
            (bytes >> 20, "MB")
        } else {
            (bytes >> 10, "KB")
        };
        pages.insert(format!("{count}{unit}"), u64::try_from(super::quantity::value(quantity)).unwrap_or(0));
    }
    pages
}

/// Limits of the pod's cgroup: shares always, quota and memory when every container is limited.
pub fn pod_resources(pod: &Pod) -> LinuxContainerResources {
    let total = PodResources::of(pod);
    LinuxContainerResources {
        cpu_period: Some(CPU_PERIOD),
        cpu_quota: total.cpu_limit.map(quota),
        cpu_shares: Some(shares(total.cpu_request)),
        memory_limit_in_bytes: total.memory_limit,
        ..LinuxContainerResources::default()
    }
}

/// What a pod as a whole asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodResources {
    /// Milli-CPU.
    pub cpu_request: i64,
    /// Bytes.
    pub memory_request: i64,
    /// Milli-CPU, when every container has a limit.
    pub cpu_limit: Option<i64>,
    /// Bytes, when every container has a limit.
    pub memory_limit: Option<i64>,
}

impl PodResources {
    /// Sums regular containers and sidecars; an init container counts when it needs more than they do together.
    pub fn of(pod: &Pod) -> Self {
        let mut sum = Self { cpu_limit: Some(0), memory_limit: Some(0), ..Self::default() };
        let mut peak = Self::default();
        let mut sidecars = Self::default();
        let add = |total: Option<i64>, more: Option<i64>| Some(total? + more.filter(|more| *more > 0)?);
        for found in containers::containers(pod) {
            let resources = found.container.resources.as_ref().unwrap_or(&NONE);
            let (limits, requests) = (resources.limits.as_ref(), resources.requests.as_ref());
            let cpu = cpu_milli(requests).or(cpu_milli(limits)).unwrap_or(0);
            let memory = memory_bytes(requests).or(memory_bytes(limits)).unwrap_or(0);
            match found.kind {
                ContainerKind::Init => {
                    peak.cpu_request = peak.cpu_request.max(cpu + sidecars.cpu_request);
                    peak.memory_request = peak.memory_request.max(memory + sidecars.memory_request);
                    // Unlimited while it runs, so the pod is unlimited.
                    sum.cpu_limit = sum.cpu_limit.filter(|_| cpu_milli(limits).is_some_and(|limit| limit > 0));
                    sum.memory_limit = sum.memory_limit.filter(|_| memory_bytes(limits).is_some_and(|limit| limit > 0));
                    peak.cpu_limit = peak.cpu_limit.max(cpu_milli(limits));
                    peak.memory_limit = peak.memory_limit.max(memory_bytes(limits));
                }
                ContainerKind::Sidecar | ContainerKind::Regular => {
                    sum.cpu_request += cpu;
                    sum.memory_request += memory;
                    sum.cpu_limit = add(sum.cpu_limit, cpu_milli(limits));
                    sum.memory_limit = add(sum.memory_limit, memory_bytes(limits));
                    if found.kind == ContainerKind::Sidecar {
                        sidecars.cpu_request += cpu;
                        sidecars.memory_request += memory;
                    }
                }
                ContainerKind::Ephemeral => {
                    sum.cpu_limit = None;
                    sum.memory_limit = None;
                }
            }
        }
        sum.cpu_request = sum.cpu_request.max(peak.cpu_request);
        sum.memory_request = sum.memory_request.max(peak.memory_request);
        sum.cpu_limit = sum.cpu_limit.map(|limit| limit.max(peak.cpu_limit.unwrap_or(0)));
        sum.memory_limit = sum.memory_limit.map(|limit| limit.max(peak.memory_limit.unwrap_or(0)));
        sum.with_pod_level(pod)
    }

    fn with_pod_level(mut self, pod: &Pod) -> Self {
        let spec = containers::spec(pod);
        if let Some(resources) = &spec.resources {
            let (limits, requests) = (resources.limits.as_ref(), resources.requests.as_ref());
            self.cpu_request = cpu_milli(requests).or(cpu_milli(limits)).unwrap_or(self.cpu_request);
            self.memory_request = memory_bytes(requests).or(memory_bytes(limits)).unwrap_or(self.memory_request);
            self.cpu_limit = cpu_milli(limits).or(self.cpu_limit);
            self.memory_limit = memory_bytes(limits).or(self.memory_limit);
        }
        if let Some(overhead) = &spec.overhead {
            let (cpu, memory) = (cpu_milli(Some(overhead)).unwrap_or(0), memory_bytes(Some(overhead)).unwrap_or(0));
            self.cpu_request += cpu;
            self.memory_request += memory;
            self.cpu_limit = self.cpu_limit.map(|limit| limit + cpu);
            self.memory_limit = self.memory_limit.map(|limit| limit + memory);
        }
        self
    }
}

/// How early the kernel kills a container when memory runs out; sidecars of burstable pods go with the main ones.
pub fn oom_score_adj(pod: &Pod, container: &Container, node_memory: i64) -> i64 {
    if containers::spec(pod).priority_class_name.as_deref() == Some("system-node-critical") {
        return -997;
    }
    match class(pod) {
        "Guaranteed" => -997,
        "BestEffort" => 1000,
        _ => {
            let own = container.resources.as_ref().and_then(|resources| memory_bytes(resources.requests.as_ref()));
            let request = own.unwrap_or(0);
            let score = 1000 - (1000 * i128::from(request) / i128::from(node_memory.max(1)));
            let score = i64::try_from(score).unwrap_or(0);
            if score < 3 { 3 } else { score.min(999) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(containers: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({
            "metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": {"containers": containers}
        }))
        .unwrap()
    }

    #[test]
    fn classes_follow_requests_and_limits() {
        assert_eq!(class(&pod(serde_json::json!([{"name": "a"}]))), "BestEffort");
        let limits = serde_json::json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "1000m", "memory": "1024Mi"}});
        let guaranteed = pod(serde_json::json!([{"name": "a", "resources": limits}]));
        assert_eq!(class(&guaranteed), "Guaranteed");
        assert_eq!(cgroup_parent("coracle-1", &guaranteed), "coracle-1/kubepods/podu");
        let burstable = pod(serde_json::json!([{"name": "a", "resources": limits}, {"name": "b"}]));
        assert_eq!(class(&burstable), "Burstable");
        assert_eq!(pod_resources(&burstable).memory_limit_in_bytes, None);
        assert_eq!(pod_resources(&guaranteed).cpu_quota, Some(100_000));
    }

    #[test]
    fn cpu_shares_and_quota_scale_as_upstream() {
        assert_eq!((shares(0), shares(1), shares(500), shares(1_000_000_000)), (2, 2, 512, 262_144));
        assert_eq!((quota(5), quota(100)), (1000, 10_000));
    }
}
