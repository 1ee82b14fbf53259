//! Wakes pod workers when a ConfigMap or Secret of theirs changes: one watch per object that somebody mounts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::volume::pod_volumes::Watched;
use crate::watch::{Event, Target, Watcher};

struct Entry {
    followers: BTreeMap<String, Arc<Notify>>,
    stop: CancellationToken,
}

/// The watched objects of the node. Cheap to clone.
#[derive(Clone)]
pub struct ObjectWatches {
    client: kube::Client,
    shutdown: CancellationToken,
    entries: Arc<Mutex<BTreeMap<Watched, Entry>>>,
}

impl ObjectWatches {
    /// No watches yet.
    pub fn new(client: kube::Client, shutdown: CancellationToken) -> Self {
        Self { client, shutdown, entries: Arc::default() }
    }

    /// From now on `wake` is notified about exactly these objects on behalf of the pod `uid`.
    pub fn follow(&self, uid: &str, objects: &BTreeSet<Watched>, wake: &Arc<Notify>) {
        let mut entries = self.entries.lock();
        entries.retain(|object, entry| {
            if !objects.contains(object) {
                entry.followers.remove(uid);
            }
            if entry.followers.is_empty() {
                entry.stop.cancel();
            }
            !entry.followers.is_empty()
        });
        for object in objects {
            let entry = entries.entry(object.clone()).or_insert_with(|| {
                let stop = self.shutdown.child_token();
                tokio::spawn(self.clone().run(object.clone(), stop.clone()));
                Entry { followers: BTreeMap::new(), stop }
            });
            entry.followers.insert(uid.to_owned(), wake.clone());
        }
    }

    /// The pod is gone.
    pub fn forget(&self, uid: &str) {
        self.follow(uid, &BTreeSet::new(), &Arc::new(Notify::new()));
    }

    async fn run(self, object: Watched, stop: CancellationToken) {
        let path = format!("/api/v1/namespaces/{}/{}", object.namespace, object.resource);
        let target = Target::all(path).with_fields(format!("metadata.name={}", object.name));
        let mut watcher = Watcher::new(self.client.clone(), target);
        let mut synced = false;
        loop {
            let event = tokio::select! {
                event = watcher.next() => event,
                () = stop.cancelled() => return,
            };
            let changed = match event {
                Event::Restarted => false,
                // Also what was deleted while nobody watched shows only here.
                Event::Synced => {
                    synced = true;
                    true
                }
                Event::Applied(_) | Event::Deleted(_) => synced,
            };
            if changed {
                let entries = self.entries.lock();
                for wake in entries.get(&object).into_iter().flat_map(|entry| entry.followers.values()) {
                    wake.notify_one();
                }
            }
        }
    }
}
