//! Gives every pod of this node its worker: pods of the API, and after a restart without an API server their durable
//! copies. What is left over from pods that nobody wants any more is cleaned up here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::containers;
use super::context::Context;
use super::files;
use super::static_pods::StaticPods;
use super::worker::{Board, Wanted, Worker};
use crate::runtime::PodSandboxFilter;
use crate::volume::pod_volumes;
use crate::watch::{Event, Target, Watcher};

/// How long the API server may take before the durable copies are started.
const PATIENCE: Duration = Duration::from_secs(5);
/// Uids of finished pods that are remembered, so that a late event does not start them again.
const TOMBSTONES: usize = 512;
/// Changes of pods that may wait for the manager.
const CHANGES: usize = 64;

struct Handle {
    mailbox: watch::Sender<Wanted>,
    wake: Arc<Notify>,
}

/// The pods of the node.
pub struct Manager {
    context: Arc<Context>,
    board: Board,
    shutdown: CancellationToken,
    workers: BTreeMap<String, Handle>,
    tasks: TaskTracker,
    finished: (mpsc::UnboundedSender<String>, mpsc::UnboundedReceiver<String>),
    tombstones: VecDeque<String>,
    /// Uids seen since the list began.
    listed: Option<BTreeSet<String>>,
    synced: bool,
}

impl Manager {
    /// No pods yet.
    pub fn new(context: Arc<Context>, board: Board, shutdown: CancellationToken) -> Self {
        Self {
            context,
            board,
            shutdown,
            workers: BTreeMap::new(),
            tasks: TaskTracker::new(),
            finished: mpsc::unbounded_channel(),
            tombstones: VecDeque::new(),
            listed: None,
            synced: false,
        }
    }

    /// Runs until the agent stops; workers end with it, their pods go on.
    pub async fn run(mut self, client: kube::Client, mut static_pods: StaticPods) {
        let target =
            Target::all("/api/v1/pods").with_fields(format!("spec.nodeName={}", self.context.config.node_name));
        let mut changes = follow(Watcher::new(client, target), self.shutdown.clone());
        let mut events = self.context.runtime.events();
        let patience = tokio::time::sleep(PATIENCE);
        tokio::pin!(patience);
        let mut waiting = true;
        loop {
            tokio::select! {
                Some(event) = changes.recv() => self.handle(event).await,
                event = events.recv() => match event {
                    Ok(event) => self.wake(Some(&event.pod_uid)),
                    // Some were missed: everybody looks.
                    Err(RecvError::Lagged(_)) => self.wake(None),
                    Err(RecvError::Closed) => return self.end().await,
                },
                changed = static_pods.next() => {
                    for pod in changed.removed {
                        self.remove(&pod, None);
                    }
                    for pod in changed.applied {
                        self.apply(pod);
                    }
                }
                Some(uid) = self.finished.1.recv() => {
                    self.workers.remove(&uid);
                    self.tombstones.push_back(uid);
                    if self.tombstones.len() > TOMBSTONES {
                        self.tombstones.pop_front();
                    }
                }
                () = &mut patience, if waiting => {
                    waiting = false;
                    if !self.synced {
                        self.start_copies();
                    }
                }
                () = self.shutdown.cancelled() => return self.end().await,
            }
        }
    }

    async fn end(self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn wake(&self, uid: Option<&str>) {
        match uid {
            Some(uid) => {
                if let Some(handle) = self.workers.get(uid) {
                    handle.wake.notify_one();
                }
            }
            None => self.workers.values().for_each(|handle| handle.wake.notify_one()),
        }
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Restarted => self.listed = Some(BTreeSet::new()),
            Event::Applied(object) => {
                if let Some(listed) = &mut self.listed {
                    listed.insert(object.uid.clone());
                }
                match serde_json::from_slice::<Pod>(&object.json) {
                    Ok(pod) => self.apply(pod),
                    Err(error) => {
                        tracing::error!(%error, namespace = object.namespace, name = object.name, "pod not understood");
                    }
                }
            }
            Event::Deleted(object) => {
                let last = serde_json::from_slice::<Pod>(&object.json).ok();
                self.remove(&object.uid, last);
            }
            Event::Synced => {
                let listed = self.listed.take().unwrap_or_default();
                let gone: Vec<String> = self.workers.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
                for uid in gone {
                    let from_api = self
                        .workers
                        .get(&uid)
                        .is_some_and(|handle| !containers::is_static(&handle.mailbox.borrow().pod));
                    if from_api {
                        self.remove(&uid, None);
                    }
                }
                if !std::mem::replace(&mut self.synced, true) {
                    self.clean_orphans().await;
                }
            }
        }
    }

    /// A pod exists or has changed.
    fn apply(&mut self, pod: Pod) {
        let uid = containers::uid(&pod).to_owned();
        // A mirror only shows a static pod, which has a worker of its own.
        if containers::annotation(&pod, "kubernetes.io/config.mirror").is_some() || self.tombstones.contains(&uid) {
            return;
        }
        let wanted = Wanted { pod: Arc::new(pod), removed: false };
        match self.workers.get(&uid) {
            Some(handle) => {
                handle.mailbox.send_replace(wanted);
            }
            None => self.start(uid, wanted),
        }
    }

    /// A pod is gone from its source.
    fn remove(&mut self, uid: &str, last: Option<Pod>) {
        let Some(handle) = self.workers.get(uid) else { return };
        let pod = last.map_or_else(|| handle.mailbox.borrow().pod.clone(), Arc::new);
        handle.mailbox.send_replace(Wanted { pod, removed: true });
    }

    fn start(&mut self, uid: String, wanted: Wanted) {
        let (mailbox, receiver) = watch::channel(wanted);
        let wake = Arc::new(Notify::new());
        let worker =
            Worker::new(self.context.clone(), self.board.clone(), receiver, wake.clone(), self.shutdown.clone());
        let finished = self.finished.0.clone();
        let name = uid.clone();
        self.tasks.spawn(async move {
            Box::pin(worker.run()).await;
            let _ = finished.send(name);
        });
        self.workers.insert(uid, Handle { mailbox, wake });
    }

    /// No API server answers: the pods of this node start from their copies.
    fn start_copies(&mut self) {
        for pod in files::load_durable(&self.context.volumes.pods_dir) {
            let uid = containers::uid(&pod).to_owned();
            if !self.workers.contains_key(&uid)
                && pod.metadata.deletion_timestamp.is_none()
                && !containers::is_static(&pod)
            {
                tracing::info!(pod = containers::describe(&pod), "no API server answers; pod started from its copy");
                self.start(uid, Wanted { pod: Arc::new(pod), removed: false });
            }
        }
    }

    /// Sandboxes and folders of pods that are not of this node any more.
    async fn clean_orphans(&mut self) {
        let copies: BTreeMap<String, Pod> = files::load_durable(&self.context.volumes.pods_dir)
            .into_iter()
            .map(|pod| (containers::uid(&pod).to_owned(), pod))
            .collect();
        let sandboxes = self.context.runtime.list_pod_sandboxes(&PodSandboxFilter::default()).await.unwrap_or_default();
        for sandbox in sandboxes {
            let uid = &sandbox.metadata.uid;
            if self.workers.contains_key(uid) {
                continue;
            }
            match copies.get(uid) {
                Some(pod) => self.start(uid.clone(), Wanted { pod: Arc::new(pod.clone()), removed: true }),
                None => {
                    let (runtime, id) = (self.context.runtime.clone(), sandbox.id.clone());
                    self.tasks.spawn(async move {
                        if let Err(error) = runtime.remove_pod_sandbox(&id).await {
                            tracing::warn!(%error, sandbox = id, "orphaned sandbox not removed");
                        }
                    });
                }
            }
        }
        let host = &self.context.volumes;
        let keep: BTreeSet<String> = self.workers.keys().cloned().collect();
        let (pods, memory) = (host.pods_dir.clone(), host.memory_dir.clone());
        let logs = self.context.config.agent_dir().join("logs/pods");
        let clean = move || {
            clean_folders(&pods, &memory, &keep);
            clean_logs(&logs, &keep);
        };
        let _ = tokio::task::spawn_blocking(clean).await;
    }
}

/// A task of its own: a list that is under way must not be given up because something else happens.
fn follow(mut watcher: Watcher, shutdown: CancellationToken) -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(CHANGES);
    tokio::spawn(async move {
        let follow = async {
            loop {
                let event = watcher.next().await;
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! {
            () = follow => {}
            () = shutdown.cancelled() => {}
        }
    });
    receiver
}

/// Folders are named `<namespace>_<name>_<uid>`.
fn clean_logs(logs: &Path, keep: &BTreeSet<String>) {
    for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.rsplit('_').next().is_some_and(|uid| keep.contains(uid)) {
            continue;
        }
        if let Err(error) = std::fs::remove_dir_all(entry.path()) {
            tracing::warn!(%error, name, "logs of a pod that is gone not removed");
        }
    }
}

fn clean_folders(pods: &Path, memory: &Path, keep: &BTreeSet<String>) {
    for folder in [pods, memory] {
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let uid = entry.file_name().to_string_lossy().into_owned();
            if keep.contains(&uid) {
                continue;
            }
            let result = pod_volumes::tear_down(pods, memory, &uid).map_err(|error| error.to_string());
            let result = result.and_then(|()| match std::fs::remove_dir_all(pods.join(&uid)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.to_string()),
                _ => Ok(()),
            });
            if let Err(error) = result {
                tracing::warn!(%error, uid, "folder of a pod that is gone not removed");
            }
        }
    }
}
