//! All volumes of one pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use k8s_openapi::api::core::v1::{Pod, Volume};
use parking_lot::RwLock;

use super::payload::{self, Objects};
use super::token::Tokens;
use super::{VolumeError, atomic_writer, empty_dir, host_path, ownership, persistent};
use crate::kubelet::api::{ApiClient, ApiError};
use crate::kubelet::field_ref::NodeFacts;
use crate::kubelet::reads::Reads;
use crate::kubelet::{containers, qos};

/// What volumes need from the node.
#[derive(Clone)]
pub struct VolumeHost {
    /// The API.
    pub api: ApiClient,
    /// `DATA/agent/pods`.
    pub pods_dir: PathBuf,
    /// Folder in memory for what must not reach a disk, one folder per pod below it.
    pub memory_dir: PathBuf,
    /// Facts for downward API files.
    pub node: Arc<RwLock<NodeFacts>>,
}

impl VolumeHost {
    /// The API as a pod reads it.
    pub fn reads(&self, pod: &Pod) -> Reads {
        Reads::new(self.api.clone(), self.pods_dir.join(containers::uid(pod)).join("objects"))
    }

    /// The API for what the pods of a namespace share.
    pub fn shared_reads(&self) -> Reads {
        Reads::new(self.api.clone(), self.pods_dir.with_file_name("objects"))
    }
}

/// A volume that is ready to be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    /// Folder (or file) on the node.
    pub path: PathBuf,
    /// Containers may only read it.
    pub read_only: bool,
}

/// An object whose changes show in a pod's volumes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Watched {
    /// `configmaps` or `secrets`.
    pub resource: &'static str,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// The volumes of one pod. Its worker is the only one that changes them.
#[derive(Default)]
pub struct PodVolumes {
    mounted: BTreeMap<String, Mounted>,
    tokens: Tokens,
}

impl PodVolumes {
    /// What is ready, by volume name.
    pub fn mounted(&self) -> &BTreeMap<String, Mounted> {
        &self.mounted
    }

    /// Whether every volume of the pod is ready.
    pub fn is_complete(&self, pod: &Pod) -> bool {
        containers::spec(pod).volumes.iter().flatten().all(|volume| self.mounted.contains_key(&volume.name))
    }

    /// When a token wants to be renewed: call [`PodVolumes::refresh`] then.
    pub fn renew_at(&self) -> Option<SystemTime> {
        self.tokens.renew_at()
    }

    /// Sets up what is not ready. Answers the failures by volume; calling again tries those again.
    pub async fn set_up(&mut self, host: &VolumeHost, pod: &Pod, ips: &[IpAddr]) -> Vec<(String, VolumeError)> {
        let mut failures = Vec::new();
        for volume in containers::spec(pod).volumes.iter().flatten() {
            if self.mounted.contains_key(&volume.name) {
                continue;
            }
            match self.set_up_one(host, pod, volume, ips).await {
                Ok(mounted) => {
                    self.mounted.insert(volume.name.clone(), mounted);
                }
                Err(error) => failures.push((volume.name.clone(), error)),
            }
        }
        failures
    }

    /// Brings computed files up to date: an object, a label or the clock has changed. Failures keep the old files.
    pub async fn refresh(&mut self, host: &VolumeHost, pod: &Pod, ips: &[IpAddr]) -> Vec<(String, VolumeError)> {
        let mut failures = Vec::new();
        for volume in containers::spec(pod).volumes.iter().flatten().filter(|volume| payload::is_computed(volume)) {
            if let Err(error) = self.set_up_one(host, pod, volume, ips).await {
                failures.push((volume.name.clone(), error));
            }
        }
        failures
    }

    async fn set_up_one(
        &mut self,
        host: &VolumeHost,
        pod: &Pod,
        volume: &Volume,
        ips: &[IpAddr],
    ) -> Result<Mounted, VolumeError> {
        if payload::is_computed(volume) {
            return self.set_up_files(host, pod, volume, ips).await;
        }
        if let Some(source) = volume.host_path.clone() {
            let path = PathBuf::from(&source.path);
            blocking(move || host_path::set_up(&source)).await?;
            return Ok(Mounted { path, read_only: false });
        }
        if let Some(source) = volume.empty_dir.clone() {
            let path = volume_dir(&host.pods_dir, pod, "empty-dir", &volume.name);
            let limit = qos::PodResources::of(pod).memory_limit;
            let group = fs_group(pod);
            let made = path.clone();
            blocking(move || {
                empty_dir::set_up(&made, &source, limit)?;
                group.map_or(Ok(()), |group| ownership::give(&made, group, false))
            })
            .await?;
            return Ok(Mounted { path, read_only: false });
        }
        if let Some(claim) = &volume.persistent_volume_claim {
            let read_only = claim.read_only == Some(true);
            let found = persistent::resolve(&host.reads(pod), pod, &claim.claim_name, read_only).await?;
            return Ok(Mounted { path: found.path, read_only: found.read_only });
        }
        if volume.ephemeral.is_some() {
            let claim = format!("{}-{}", containers::name(pod), volume.name);
            let found = persistent::resolve(&host.reads(pod), pod, &claim, false).await?;
            return Ok(Mounted { path: found.path, read_only: found.read_only });
        }
        Err(VolumeError::Unsupported(format!("the kind of volume {:?}", volume.name)))
    }

    async fn set_up_files(
        &mut self,
        host: &VolumeHost,
        pod: &Pod,
        volume: &Volume,
        ips: &[IpAddr],
    ) -> Result<Mounted, VolumeError> {
        let objects = self.fetch(host, pod, volume).await?;
        let node = host.node.read().clone();
        let input = payload::Input { pod, objects: &objects, pod_ips: ips, node: &node };
        let files = payload::payload(volume, &input)?;
        let path = files_dir(host, pod, volume);
        let group = fs_group(pod);
        let target = path.clone();
        blocking(move || {
            fs::create_dir_all(&target).map_err(VolumeError::io("create", &target))?;
            use std::os::unix::fs::PermissionsExt;
            fs::set_permissions(&target, fs::Permissions::from_mode(0o777))
                .map_err(VolumeError::io("chmod", &target))?;
            let give = |folder: &Path| group.map_or(Ok(()), |group| ownership::give(folder, group, true));
            atomic_writer::write(&target, &files, give)?;
            match group.filter(|group| !ownership::is_given(&target, *group, true)) {
                Some(group) => ownership::give(&target, group, true),
                None => Ok(()),
            }
        })
        .await?;
        Ok(Mounted { path, read_only: true })
    }

    async fn fetch(&mut self, host: &VolumeHost, pod: &Pod, volume: &Volume) -> Result<Objects, VolumeError> {
        let namespace = containers::namespace(pod);
        let wanted = payload::references(volume);
        let reads = host.reads(pod);
        let mut objects = Objects::default();
        for name in wanted.config_maps {
            let object = optional(reads.get(&format!("/api/v1/namespaces/{namespace}/configmaps/{name}")).await)?;
            objects.config_maps.insert(name, object);
        }
        for name in wanted.secrets {
            let object = optional(reads.get(&format!("/api/v1/namespaces/{namespace}/secrets/{name}")).await)?;
            objects.secrets.insert(name, object);
        }
        for wish in wanted.tokens {
            let token = self.tokens.get(&reads, pod, &wish).await?;
            objects.tokens.insert(wish, token);
        }
        Ok(objects)
    }
}

fn optional<T>(result: Result<T, ApiError>) -> Result<Option<T>, VolumeError> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The objects whose changes must show in the volumes of `pod`.
pub fn watched(pod: &Pod) -> BTreeSet<Watched> {
    let namespace = containers::namespace(pod);
    let mut all = BTreeSet::new();
    for volume in containers::spec(pod).volumes.iter().flatten() {
        let references = payload::references(volume);
        let watched = |resource| move |name| Watched { resource, namespace: namespace.to_owned(), name };
        all.extend(references.config_maps.into_iter().map(watched("configmaps")));
        all.extend(references.secrets.into_iter().map(watched("secrets")));
    }
    all
}

/// `spec.securityContext.fsGroup`.
fn fs_group(pod: &Pod) -> Option<u32> {
    let group = containers::spec(pod).security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

fn volume_dir(pods_dir: &Path, pod: &Pod, kind: &str, name: &str) -> PathBuf {
    pods_dir.join(containers::uid(pod)).join("volumes").join(format!("kubernetes.io~{kind}")).join(name)
}

/// ConfigMaps may lie on disk; everything that can hold a secret stays in memory.
fn files_dir(host: &VolumeHost, pod: &Pod, volume: &Volume) -> PathBuf {
    if volume.config_map.is_some() {
        return volume_dir(&host.pods_dir, pod, "configmap", &volume.name);
    }
    volume_dir(&host.memory_dir, pod, "projected", &volume.name)
}

/// Unmounts and removes everything below `pods_dir/<uid>` and `memory_dir/<uid>` except the pod's durable copy.
///
/// # Errors
/// When something stays mounted; nothing below it is removed then.
pub fn tear_down(pods_dir: &Path, memory_dir: &Path, uid: &str) -> Result<(), VolumeError> {
    let pod_dir = pods_dir.join(uid);
    unmount_below(&pod_dir)?;
    for folder in [pod_dir.join("volumes"), pod_dir.join("volume-subpaths"), memory_dir.join(uid)] {
        match fs::remove_dir_all(&folder) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(VolumeError::io("remove", folder)(error)),
        }
    }
    Ok(())
}

/// Detaches every mount below `folder`, the deepest first, as `/proc/self/mountinfo` lists them.
fn unmount_below(folder: &Path) -> Result<(), VolumeError> {
    let info = fs::read_to_string("/proc/self/mountinfo").map_err(VolumeError::io("read", "/proc/self/mountinfo"))?;
    let mut points: Vec<PathBuf> = info
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(folder))
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    for point in points {
        nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH)
            .map_err(|errno| VolumeError::io("unmount", &point)(errno.into()))?;
    }
    Ok(())
}

/// Octal escapes of proc(5): space, tab, newline, backslash.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

async fn blocking(work: impl FnOnce() -> Result<(), VolumeError> + Send + 'static) -> Result<(), VolumeError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(VolumeError::io("run", PathBuf::new())(std::io::Error::other(error))),
    }
}
