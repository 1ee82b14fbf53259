//! The last known objects of each collection, on disk: what a node goes by when it starts and no server answers.
//!
//! One file per object in `DATA/agent/net/<collection>/`, named by a hash, holding what the network reads of it and no
//! more: heartbeats and the like change nothing and so write nothing. No fsync: after a power cut a server or an older
//! state must do. A collection counts once it was listed completely.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::mailbox::{Mailbox, Nothing, mailbox};
use crate::watch::{Event, Object};

/// A change is written when nothing new came for so long …
const QUIET: Duration = Duration::from_millis(300);
/// … or so long after the first one.
const LATEST: Duration = Duration::from_secs(2);
const COMPLETE: &str = "complete";
const TEMPORARY: &str = "new";

/// A collection that the network follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collection {
    /// Path in the API.
    pub path: &'static str,
    /// Folder on disk.
    pub folder: &'static str,
    /// What is kept of an object, besides names and labels.
    pub keep: &'static [&'static [&'static str]],
}

/// Services.
pub const SERVICES: Collection =
    Collection { path: "/api/v1/services", folder: "services", keep: &[&["spec"], &["status", "loadBalancer"]] };
/// EndpointSlices.
pub const SLICES: Collection = Collection {
    path: "/apis/discovery.k8s.io/v1/endpointslices",
    folder: "endpointslices",
    keep: &[&["addressType"], &["ports"], &["endpoints"]],
};
/// Namespaces.
pub const NAMESPACES: Collection = Collection { path: "/api/v1/namespaces", folder: "namespaces", keep: &[] };
/// Nodes.
pub const NODES: Collection = Collection {
    path: "/api/v1/nodes",
    folder: "nodes",
    keep: &[&["spec", "podCIDR"], &["spec", "podCIDRs"], &["status", "addresses"]],
};

/// What the network reads of an object's metadata.
const METADATA: [&[&str]; 4] =
    [&["metadata", "name"], &["metadata", "namespace"], &["metadata", "uid"], &["metadata", "labels"]];

/// The folder of one collection.
#[derive(Debug)]
struct Shelf {
    directory: PathBuf,
    keep: &'static [&'static [&'static str]],
    /// Hash of the content of each file.
    written: BTreeMap<String, [u8; 8]>,
    /// Files that the list in progress has not shown yet.
    unseen: Option<BTreeSet<String>>,
    /// What is to be written, or (`None`) removed.
    pending: BTreeMap<String, Option<Vec<u8>>>,
    /// A list has just been completed.
    completed: bool,
}

fn file_name(namespace: &str, name: &str) -> String {
    hex(&Sha256::digest(format!("{namespace}/{name}"))[..16])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn fingerprint(content: &[u8]) -> [u8; 8] {
    let digest: [u8; 32] = Sha256::digest(content).into();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    first
}

/// The parts of an object that are kept.
fn project(json: &[u8], keep: &[&[&str]]) -> Option<Vec<u8>> {
    let whole: Value = serde_json::from_slice(json).ok()?;
    let mut kept = Value::Object(Map::new());
    for path in METADATA.iter().chain(keep) {
        let Some(value) = path.iter().try_fold(&whole, |value, key| value.get(key)) else { continue };
        let mut place = &mut kept;
        for key in *path {
            place = place.as_object_mut()?.entry(*key).or_insert_with(|| Value::Object(Map::new()));
        }
        *place = value.clone();
    }
    serde_json::to_vec(&kept).ok()
}

/// An object from what was kept of it.
fn restore(json: Vec<u8>) -> Option<Object> {
    let value: Value = serde_json::from_slice(&json).ok()?;
    let text = |key: &str| value.pointer(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let object = Object {
        namespace: text("/metadata/namespace"),
        name: text("/metadata/name"),
        uid: text("/metadata/uid"),
        json: Bytes::from(json),
    };
    (!object.name.is_empty()).then_some(object)
}

impl Shelf {
    /// Opens the folder; also returns what is in it, when it is complete. Files that cannot be understood are removed.
    fn open(root: &Path, collection: &Collection) -> io::Result<(Self, Option<Vec<Object>>)> {
        let directory = root.join(collection.folder);
        std::fs::create_dir_all(&directory)?;
        let mut shelf = Self {
            directory,
            keep: collection.keep,
            written: BTreeMap::new(),
            unseen: None,
            pending: BTreeMap::new(),
            completed: false,
        };
        let (mut objects, mut complete) = (Vec::new(), false);
        for entry in std::fs::read_dir(&shelf.directory)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name == COMPLETE {
                complete = true;
                continue;
            }
            let content = std::fs::read(entry.path())?;
            let print = fingerprint(&content);
            match restore(content).filter(|object| file_name(&object.namespace, &object.name) == name) {
                Some(object) => {
                    objects.push(object);
                    shelf.written.insert(name, print);
                }
                None => std::fs::remove_file(entry.path())?,
            }
        }
        Ok((shelf, complete.then_some(objects)))
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Restarted => {
                let pending = self.pending.iter().filter(|(_, content)| content.is_some()).map(|(name, _)| name);
                self.unseen = Some(self.written.keys().chain(pending).cloned().collect());
            }
            Event::Synced => {
                for name in self.unseen.take().into_iter().flatten() {
                    self.pending.insert(name, None);
                }
                self.completed = true;
            }
            Event::Applied(object) => {
                let name = file_name(&object.namespace, &object.name);
                if let Some(unseen) = &mut self.unseen {
                    unseen.remove(&name);
                }
                if let Some(content) = project(&object.json, self.keep) {
                    self.pending.insert(name, Some(content));
                }
            }
            Event::Deleted(object) => {
                self.pending.insert(file_name(&object.namespace, &object.name), None);
            }
        }
    }

    /// Writes what has changed. What fails is tried again with the object's next change.
    fn write(&mut self) -> io::Result<()> {
        for (name, content) in std::mem::take(&mut self.pending) {
            let path = self.directory.join(&name);
            match content {
                Some(content) => {
                    let print = fingerprint(&content);
                    if self.written.get(&name) != Some(&print) {
                        let temporary = self.directory.join(TEMPORARY);
                        std::fs::write(&temporary, content)?;
                        std::fs::rename(&temporary, path)?;
                        self.written.insert(name, print);
                    }
                }
                None => {
                    if self.written.remove(&name).is_some() {
                        std::fs::remove_file(path)?;
                    }
                }
            }
        }
        if std::mem::take(&mut self.completed) {
            std::fs::write(self.directory.join(COMPLETE), b"")?;
        }
        Ok(())
    }
}

/// The writing thread's mailbox: events of a collection, by its number.
pub type Recorder = Mailbox<(usize, Event)>;

/// Reads what is known of each collection from `DATA/agent/net`, and starts the thread that keeps it current. A folder
/// that cannot be used is told in the log; the node works without, until it has to start without a server.
///
/// # Errors
/// No thread could be started.
pub fn recall(root: &Path, collections: &[Collection]) -> io::Result<(Recorder, Vec<Option<Vec<Object>>>)> {
    let (mut shelves, mut known) = (Vec::new(), Vec::new());
    for collection in collections {
        match Shelf::open(root, collection) {
            Ok((shelf, objects)) => {
                shelves.push(Some(shelf));
                known.push(objects);
            }
            Err(error) => {
                tracing::error!(folder = %root.display(), collection = collection.folder, %error, "cannot keep the last known state of the network on disk");
                shelves.push(None);
                known.push(None);
            }
        }
    }
    let (sender, inbox) = mailbox::<(usize, Event)>();
    std::thread::Builder::new().name("network-recall".into()).spawn(move || {
        let take = |shelves: &mut Vec<Option<Shelf>>, (index, event): (usize, Event)| {
            if let Some(Some(shelf)) = shelves.get_mut(index) {
                shelf.take(event);
            }
        };
        loop {
            match inbox.receive(None) {
                Ok(news) => take(&mut shelves, news),
                Err(Nothing::Yet) => {}
                Err(Nothing::Ever) => return,
            }
            let goes_on = inbox.coalesce(QUIET, LATEST, |news| take(&mut shelves, news));
            for shelf in shelves.iter_mut().flatten() {
                if let Err(error) = shelf.write() {
                    tracing::warn!(folder = %shelf.directory.display(), %error, "cannot write down the last known state of the network");
                }
            }
            if !goes_on {
                return;
            }
        }
    })?;
    Ok((sender, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, more: &str) -> Object {
        let json = format!(
            r#"{{"metadata":{{"name":"{name}","annotations":{{"a":"b"}}}},"spec":{{"podCIDR":"10.42.0.0/24"}}{more}}}"#
        );
        Object { namespace: String::new(), name: name.into(), uid: String::new(), json: json.into() }
    }

    fn files(root: &Path) -> Vec<(String, std::time::SystemTime)> {
        let entries = std::fs::read_dir(root.join("nodes")).unwrap().map(Result::unwrap);
        entries.map(|e| (e.file_name().into_string().unwrap(), e.metadata().unwrap().modified().unwrap())).collect()
    }

    #[test]
    fn what_was_listed_completely_is_known_after_a_restart_without_what_has_gone() {
        let root = tempfile::tempdir().unwrap();
        let (mut shelf, known) = Shelf::open(root.path(), &NODES).unwrap();
        assert!(known.is_none());
        for event in [Event::Restarted, Event::Applied(node("a", "")), Event::Applied(node("b", ""))] {
            shelf.take(event);
        }
        shelf.write().unwrap();
        assert!(Shelf::open(root.path(), &NODES).unwrap().1.is_none(), "half a list is none");
        shelf.take(Event::Synced);
        shelf.take(Event::Deleted(node("b", "")));
        shelf.write().unwrap();
        let (mut shelf, known) = Shelf::open(root.path(), &NODES).unwrap();
        let known = known.unwrap();
        assert_eq!(known.iter().map(|object| object.name.as_str()).collect::<Vec<_>>(), ["a"]);
        let text = std::str::from_utf8(&known[0].json).unwrap();
        assert!(text.contains("podCIDR") && !text.contains("annotations"), "{text}");
        // The next list does not show it any more.
        for event in [Event::Restarted, Event::Applied(node("c", "")), Event::Synced] {
            shelf.take(event);
        }
        shelf.write().unwrap();
        let known = Shelf::open(root.path(), &NODES).unwrap().1.unwrap();
        assert_eq!(known.iter().map(|object| object.name.as_str()).collect::<Vec<_>>(), ["c"]);
    }

    #[test]
    fn a_change_of_what_nobody_reads_writes_nothing_and_a_damaged_file_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let (mut shelf, _) = Shelf::open(root.path(), &NODES).unwrap();
        shelf.take(Event::Applied(node("a", "")));
        shelf.write().unwrap();
        let before = files(root.path());
        shelf.take(Event::Applied(node("a", r#","status":{"conditions":[{"type":"Ready"}]}"#)));
        shelf.write().unwrap();
        assert_eq!(files(root.path()), before);
        std::fs::write(root.path().join("nodes/torn"), b"{").unwrap();
        Shelf::open(root.path(), &NODES).unwrap();
        assert_eq!(files(root.path()), before);
    }
}
