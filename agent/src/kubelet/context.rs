//! What every pod worker shares.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;

use super::api::ApiClient;
use super::containers;
use super::events::Recorder;
use super::field_ref::NodeFacts;
use super::object_watch::ObjectWatches;
use crate::AgentConfig;
use crate::image::Images;
use crate::runtime::Runtime;
use crate::volume::VolumeHost;

/// The node as its pods see it.
pub struct Context {
    /// Checked configuration.
    pub config: AgentConfig,
    /// Name of the instance's top cgroup.
    pub cgroup_root: String,
    /// The API under the node's identity.
    pub api: ApiClient,
    /// Runs containers.
    pub runtime: Arc<dyn Runtime>,
    /// Knows images.
    pub images: Arc<dyn Images>,
    /// Writes events.
    pub recorder: Recorder,
    /// Wakes workers when an object in a volume changes.
    pub watches: ObjectWatches,
    /// Makes volumes.
    pub volumes: VolumeHost,
    /// Addresses and allocatable resources.
    pub node: Arc<RwLock<NodeFacts>>,
    /// Bytes of memory of the machine.
    pub memory: i64,
}

impl Context {
    /// Addresses of the node, one per family.
    pub fn host_ips(&self) -> Vec<IpAddr> {
        self.node.read().host_ips.clone()
    }

    /// `DATA/agent/pods/<uid>`.
    pub fn pod_dir(&self, pod: &Pod) -> PathBuf {
        self.volumes.pods_dir.join(containers::uid(pod))
    }

    /// Folder of a pod's logs, `DATA/agent/logs/pods/<namespace>_<name>_<uid>`.
    pub fn log_dir(&self, pod: &Pod) -> PathBuf {
        let folder = format!("{}_{}_{}", containers::namespace(pod), containers::name(pod), containers::uid(pod));
        self.config.agent_dir().join("logs/pods").join(folder)
    }
}
