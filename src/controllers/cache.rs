//! The objects of one resource as last seen: ordered by key, indexed by controlling owner and by node.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

use super::object::{Key, Object};

/// A change of one object. `new` is `None` when it is gone.
#[derive(Clone, Debug)]
pub struct Delta {
    /// The object before.
    pub old: Option<Arc<Object>>,
    /// The object now.
    pub new: Option<Arc<Object>>,
}

impl Delta {
    /// The object as it is, or as it was last.
    pub fn latest(&self) -> Option<&Arc<Object>> {
        self.new.as_ref().or(self.old.as_ref())
    }

    /// Both states that there are.
    pub fn states(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.old.iter().chain(self.new.iter())
    }
}

/// Objects of one resource. Revisions decide: nothing older replaces anything newer.
#[derive(Default)]
pub struct Cache {
    objects: BTreeMap<Key, Arc<Object>>,
    by_controller: HashMap<Box<str>, HashSet<Key>>,
    by_node: HashMap<Box<str>, HashSet<Key>>,
    /// Objects that we deleted and whose deletion the watch has not told yet.
    tombstones: HashSet<Box<str>>,
    /// All changes up to this revision have been seen on the watch.
    watched: u64,
}

impl Cache {
    /// The object with this key.
    pub fn get(&self, key: &str) -> Option<&Arc<Object>> {
        self.objects.get(key)
    }

    /// All objects, ordered by key.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Object>> {
        self.objects.values()
    }

    /// Number of objects.
    pub fn len(&self) -> usize {
        self.objects.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// The objects of a namespace, ordered by name.
    pub fn namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<Object>> {
        // '0' follows '/' in ASCII.
        let (start, end) = (format!("{namespace}/"), format!("{namespace}0"));
        self.objects
            .range::<str, _>((Bound::Included(start.as_str()), Bound::Excluded(end.as_str())))
            .map(|(_, object)| object)
            .collect::<Vec<_>>()
            .into_iter()
    }

    /// The objects whose controller has the uid.
    pub fn controlled_by(&self, uid: &str) -> impl Iterator<Item = &Arc<Object>> {
        self.by_controller.get(uid).into_iter().flatten().filter_map(|key| self.objects.get(key))
    }

    /// The objects bound to a node.
    pub fn on_node(&self, node: &str) -> impl Iterator<Item = &Arc<Object>> {
        self.by_node.get(node).into_iter().flatten().filter_map(|key| self.objects.get(key))
    }

    /// Takes in a state of an object that the watch told; `None` when it is old news.
    pub fn watched(&mut self, object: Arc<Object>) -> Option<Delta> {
        self.watched = self.watched.max(object.resource_version);
        self.put(object)
    }

    /// Takes in the answer to one of our writes.
    pub fn written(&mut self, object: Arc<Object>) -> Option<Delta> {
        // The watch is past this state and does not hold the object any more: it was deleted meanwhile.
        if object.resource_version <= self.watched && !self.objects.contains_key(&object.key) {
            return None;
        }
        self.put(object)
    }

    fn put(&mut self, object: Arc<Object>) -> Option<Delta> {
        if self.tombstones.contains(&object.uid) {
            return None;
        }
        if let Some(current) = self.objects.get(&object.key)
            && current.resource_version >= object.resource_version
        {
            return None;
        }
        let old = self.objects.insert(object.key.clone(), object.clone());
        if let Some(old) = &old {
            self.unindex(old);
        }
        self.index(&object);
        Some(Delta { old, new: Some(object) })
    }

    /// Takes in a deletion that the watch told at `revision`.
    pub fn deleted(&mut self, key: &Key, uid: &str, revision: u64) -> Option<Delta> {
        self.watched = self.watched.max(revision);
        self.tombstones.remove(uid);
        let current = self.objects.get(key)?;
        if *current.uid != *uid { None } else { self.remove(key) }
    }

    /// Takes in that we deleted the object.
    pub fn forget(&mut self, key: &Key, uid: &str) -> Option<Delta> {
        let current = self.objects.get(key)?;
        if *current.uid != *uid {
            return None;
        }
        self.tombstones.insert(uid.into());
        self.remove(key)
    }

    /// After a full list at `revision`: everything older that was not listed is gone.
    pub fn relisted(&mut self, listed: &HashSet<Key>, revision: u64) -> Vec<Delta> {
        self.watched = self.watched.max(revision);
        self.tombstones.clear();
        let gone: Vec<Key> = self
            .objects
            .values()
            .filter(|object| object.resource_version <= revision && !listed.contains(&object.key))
            .map(|object| object.key.clone())
            .collect();
        gone.iter().filter_map(|key| self.remove(key)).collect()
    }

    /// The watch has told everything up to this revision.
    pub fn advance(&mut self, revision: u64) {
        self.watched = self.watched.max(revision);
    }

    fn remove(&mut self, key: &Key) -> Option<Delta> {
        let old = self.objects.remove(key)?;
        self.unindex(&old);
        Some(Delta { old: Some(old), new: None })
    }

    fn index(&mut self, object: &Object) {
        if let Some(owner) = object.controller() {
            self.by_controller.entry(owner.uid.as_str().into()).or_default().insert(object.key.clone());
        }
        if let Some(node) = &object.node {
            self.by_node.entry(node.clone()).or_default().insert(object.key.clone());
        }
    }

    fn unindex(&mut self, object: &Object) {
        if let Some(owner) = object.controller() {
            unindex(&mut self.by_controller, &owner.uid, &object.key);
        }
        if let Some(node) = &object.node {
            unindex(&mut self.by_node, node, &object.key);
        }
    }
}

fn unindex(index: &mut HashMap<Box<str>, HashSet<Key>>, value: &str, key: &Key) {
    if let Some(keys) = index.get_mut(value) {
        keys.remove(key);
        if keys.is_empty() {
            index.remove(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::object::parse;
    use crate::controllers::resource::PODS;

    fn pod(name: &str, uid: &str, revision: u64, node: &str) -> Arc<Object> {
        let json = serde_json::json!({
            "metadata": {"name": name, "namespace": "n", "uid": uid, "resourceVersion": revision.to_string(),
                "ownerReferences": [{"apiVersion": "v1", "kind": "X", "name": "x", "uid": "owner", "controller": true}]},
            "spec": {"nodeName": node}});
        Arc::new(parse(&PODS, json.to_string().as_bytes(), false).unwrap())
    }

    #[test]
    fn a_write_is_seen_at_once_and_its_echo_on_the_watch_is_no_news() {
        let mut cache = Cache::default();
        assert!(cache.written(pod("a", "1", 5, "")).is_some());
        assert!(cache.watched(pod("a", "1", 5, "")).is_none());
        assert!(cache.watched(pod("a", "1", 4, "")).is_none());
        assert!(cache.watched(pod("a", "1", 6, "")).is_some());
    }

    #[test]
    fn an_answer_that_arrives_after_the_deletion_does_not_bring_a_ghost_back() {
        let mut cache = Cache::default();
        cache.watched(pod("a", "1", 5, ""));
        assert!(cache.deleted(&Key::new("n", "a"), "1", 6).is_some());
        assert!(cache.written(pod("a", "1", 5, "")).is_none());
        assert!(cache.written(pod("a", "2", 7, "")).is_some());
    }

    #[test]
    fn after_our_own_deletion_older_events_do_not_bring_the_object_back() {
        let mut cache = Cache::default();
        cache.watched(pod("a", "1", 5, ""));
        assert!(cache.forget(&Key::new("n", "a"), "1").is_some());
        assert!(cache.watched(pod("a", "1", 6, "")).is_none());
        assert!(cache.deleted(&Key::new("n", "a"), "1", 7).is_none());
        assert!(cache.watched(pod("a", "2", 8, "")).is_some());
    }

    #[test]
    fn a_list_removes_what_it_does_not_hold_unless_it_is_newer_than_the_list() {
        let mut cache = Cache::default();
        cache.watched(pod("old", "1", 5, ""));
        cache.written(pod("new", "2", 50, ""));
        let gone = cache.relisted(&HashSet::new(), 40);
        assert_eq!(gone.len(), 1);
        assert!(cache.get("n/new").is_some() && cache.get("n/old").is_none());
    }

    #[test]
    fn indexes_follow_the_objects() {
        let mut cache = Cache::default();
        cache.watched(pod("a", "1", 1, ""));
        cache.watched(pod("a", "1", 2, "node"));
        assert_eq!((cache.on_node("node").count(), cache.controlled_by("owner").count()), (1, 1));
        assert_eq!((cache.namespace("n").count(), cache.namespace("nn").count()), (1, 0));
        cache.deleted(&Key::new("n", "a"), "1", 3);
        assert_eq!((cache.on_node("node").count(), cache.controlled_by("owner").count()), (0, 0));
    }
}
