//! What is known about one pod from the outside world: the input of [`super::plan`] and [`super::status`].

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::SystemTime;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::containers;
use crate::runtime::{ContainerState, ContainerStatus, PodSandboxState, PodSandboxStatus};
use k8s_openapi::api::core::v1::Pod;

/// The runtime's view of one pod.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// Newest first.
    pub sandboxes: Vec<PodSandboxStatus>,
    /// Newest first, of all sandboxes.
    pub containers: Vec<ContainerStatus>,
}

impl Observed {
    /// Sorts what the runtime listed.
    pub fn new(mut sandboxes: Vec<PodSandboxStatus>, mut containers: Vec<ContainerStatus>) -> Self {
        sandboxes.sort_by_key(|s| std::cmp::Reverse((s.metadata.attempt, s.created_at)));
        containers.sort_by_key(|c| std::cmp::Reverse((c.created_at, c.metadata.attempt)));
        Self { sandboxes, containers }
    }

    /// The newest container of this name.
    pub fn latest(&self, name: &str) -> Option<&ContainerStatus> {
        self.containers.iter().find(|container| container.metadata.name == name)
    }

    /// All containers of this name, newest first.
    pub fn of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a ContainerStatus> {
        self.containers.iter().filter(move |container| container.metadata.name == name)
    }

    /// The container with this id.
    pub fn by_id(&self, id: &str) -> Option<&ContainerStatus> {
        self.containers.iter().find(|container| container.id == id)
    }

    /// The newest sandbox when it can hold containers.
    pub fn ready_sandbox(&self) -> Option<&PodSandboxStatus> {
        self.sandboxes.first().filter(|sandbox| sandbox.state == PodSandboxState::Ready)
    }

    /// Containers that run.
    pub fn running(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.containers.iter().filter(|container| container.state == ContainerState::Running)
    }

    /// Addresses of the pod; those of the last sandbox also after it has stopped.
    pub fn ips(&self) -> &[IpAddr] {
        self.sandboxes.first().map(|sandbox| sandbox.ips.as_slice()).unwrap_or_default()
    }

    /// (a new sandbox is needed, its attempt).
    pub fn sandbox_change(&self, pod: &Pod) -> Option<u32> {
        let Some(newest) = self.sandboxes.first() else { return Some(0) };
        if newest.state != PodSandboxState::Ready {
            return Some(newest.metadata.attempt + 1);
        }
        let without_address = !containers::is_host_network(pod) && newest.ips.is_empty();
        without_address.then_some(newest.metadata.attempt + 1)
    }
}

/// Which question a probe asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProbeKind {
    /// Should it be restarted?
    Liveness,
    /// Should it get requests?
    Readiness,
    /// Has it started?
    Startup,
}

impl ProbeKind {
    /// The word in upstream's event messages.
    pub fn title(self) -> &'static str {
        match self {
            ProbeKind::Liveness => "Liveness",
            ProbeKind::Readiness => "Readiness",
            ProbeKind::Startup => "Startup",
        }
    }
}

/// The latest verdicts of a pod's probes, by container id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProbeResults {
    results: HashMap<(String, ProbeKind), bool>,
}

impl ProbeResults {
    /// The verdict, `None` before the first.
    pub fn get(&self, id: &str, kind: ProbeKind) -> Option<bool> {
        self.results.get(&(id.to_owned(), kind)).copied()
    }

    /// Notes a verdict; true when it changed.
    pub fn set(&mut self, id: &str, kind: ProbeKind, success: bool) -> bool {
        self.results.insert((id.to_owned(), kind), success) != Some(success)
    }

    /// Drops the verdicts on containers that are gone.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.results.retain(|(id, _), _| keep(id));
    }
}

/// Why a container is not running although it should: `state.waiting`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitReason {
    /// `CrashLoopBackOff`, `ErrImagePull`, ...
    pub reason: String,
    /// For people.
    pub message: String,
}

/// Start failures by container name.
pub type WaitReasons = BTreeMap<String, WaitReason>;

/// API time of a runtime's time, whole seconds as the API has them.
pub fn api_time(time: SystemTime) -> Time {
    let timestamp = Timestamp::try_from(time).unwrap_or(Timestamp::UNIX_EPOCH);
    Time(Timestamp::from_second(timestamp.as_second()).unwrap_or(Timestamp::UNIX_EPOCH))
}
