//! Pods from files: `DATA/agent/pod-manifests`. The API sees them as mirror pods.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use sha2::{Digest, Sha256};
use tokio::io::unix::AsyncFd;

use super::containers;

/// Files are read this long after the last change: writers write in pieces.
const SETTLE: Duration = Duration::from_millis(50);

/// What changed in the folder.
#[derive(Debug, Default)]
pub struct Changed {
    /// New or different pods.
    pub applied: Vec<Pod>,
    /// Uids of pods whose file is gone or different.
    pub removed: Vec<String>,
}

/// The folder of static pods.
pub struct StaticPods {
    folder: PathBuf,
    node_name: String,
    inotify: Option<AsyncFd<OwnedFd>>,
    /// Uid by file.
    known: BTreeMap<PathBuf, String>,
    started: bool,
}

impl StaticPods {
    /// Watches `folder`, which is made when missing. Without inotify the folder is read once.
    pub fn new(folder: PathBuf, node_name: String) -> Self {
        let inotify = std::fs::create_dir_all(&folder).and_then(|()| watch(&folder));
        let inotify = inotify.inspect_err(|error| tracing::warn!(%error, "folder of static pods not watched")).ok();
        Self { folder, node_name, inotify, known: BTreeMap::new(), started: false }
    }

    /// Waits for a change; the first call answers at once with what is there.
    pub async fn next(&mut self) -> Changed {
        loop {
            if std::mem::replace(&mut self.started, true) {
                self.wait().await;
            }
            let changed = self.read();
            if !changed.applied.is_empty() || !changed.removed.is_empty() {
                return changed;
            }
        }
    }

    async fn wait(&self) {
        let Some(inotify) = &self.inotify else { return std::future::pending().await };
        match inotify.readable().await {
            Ok(mut ready) => {
                tokio::time::sleep(SETTLE).await;
                // What exactly changed does not matter: the folder is read again.
                let mut buffer = [0; 4096];
                while nix::unistd::read(ready.get_inner(), &mut buffer).is_ok_and(|read| read > 0) {}
                ready.clear_ready();
            }
            Err(_) => std::future::pending().await,
        }
    }

    fn read(&mut self) -> Changed {
        let mut changed = Changed::default();
        let mut current = BTreeMap::new();
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let hidden = entry.file_name().to_string_lossy().starts_with('.');
            let known = matches!(path.extension().and_then(|ext| ext.to_str()), Some("yaml" | "yml" | "json"));
            if hidden || !known {
                continue;
            }
            match load(&path, &self.node_name) {
                Ok(pod) => {
                    current.insert(path, pod);
                }
                Err(error) => tracing::warn!(%error, path = %path.display(), "static pod not understood"),
            }
        }
        self.known.retain(|path, uid| {
            let same = current.get(path).is_some_and(|pod| containers::uid(pod) == uid);
            if !same {
                changed.removed.push(uid.clone());
            }
            same
        });
        for (path, pod) in current {
            if let std::collections::btree_map::Entry::Vacant(e) = self.known.entry(path) {
                e.insert(containers::uid(&pod).to_owned());
                changed.applied.push(pod);
            }
        }
        changed
    }
}

fn watch(folder: &Path) -> std::io::Result<AsyncFd<OwnedFd>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_DELETE;
    inotify.add_watch(folder, flags)?;
    #[allow(deprecated, reason = "an OwnedFd keeps its descriptor; the safe constructor is not out yet")]
    AsyncFd::new(OwnedFd::from(inotify))
}

/// The uid follows from node, file and content: a changed file is another pod.
fn load(path: &Path, node_name: &str) -> Result<Pod, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    let mut pod: Pod = serde_yaml::from_slice(&bytes).map_err(|error| error.to_string())?;
    let mut digest = Sha256::new();
    digest.update(node_name.as_bytes());
    digest.update(path.as_os_str().as_encoded_bytes());
    digest.update(&bytes);
    let hash: String = digest.finalize()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let meta = &mut pod.metadata;
    let name = meta.name.as_deref().filter(|name| !name.is_empty()).ok_or("metadata.name: Required value")?;
    meta.name = Some(format!("{name}-{node_name}"));
    meta.namespace.get_or_insert_with(|| "default".to_owned());
    meta.uid = Some(hash.clone());
    let annotations = meta.annotations.get_or_insert_default();
    annotations.insert("kubernetes.io/config.source".to_owned(), "file".to_owned());
    annotations.insert("kubernetes.io/config.hash".to_owned(), hash);
    let spec = pod.spec.as_mut().ok_or("spec: Required value")?;
    spec.node_name = Some(node_name.to_owned());
    // Without a schema in the agent: the defaults that running the pod depends on.
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    let taint = serde_json::json!({"operator": "Exists", "effect": "NoExecute"});
    let tolerations = spec.tolerations.get_or_insert_default();
    tolerations.extend(serde_json::from_value(taint).ok());
    Ok(pod)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_become_pods_and_a_changed_file_another_pod() {
        let dir = tempfile::tempdir().unwrap();
        let mut pods = StaticPods::new(dir.path().join("manifests"), "node".into());
        let file = dir.path().join("manifests/a.yaml");
        std::fs::write(&file, "metadata: {name: a}\nspec: {containers: [{name: c, image: i}]}").unwrap();
        let first = pods.next().await;
        assert_eq!(containers::name(&first.applied[0]), "a-node");
        assert!(containers::is_static(&first.applied[0]));
        std::fs::write(&file, "metadata: {name: a}\nspec: {containers: [{name: c, image: j}]}").unwrap();
        let second = pods.next().await;
        assert_eq!(second.removed, [containers::uid(&first.applied[0])]);
        assert_eq!(second.applied.len(), 1);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(pods.next().await.removed.len(), 1);
    }
}
