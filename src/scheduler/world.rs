//! The scheduler's picture of the cluster: nodes with the pods on them, those just assumed among them.
//!
//! One task owns it and is the only one that changes it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node as ApiNode, PersistentVolume, PersistentVolumeClaim, Taint};
use k8s_openapi::api::storage::v1::StorageClass;

use super::pod_info::{NodeTerm, PodInfo, Resources};
use crate::controllers::object::Key;
use crate::controllers::quantity::{milli, units};
use crate::controllers::selector::{Labels, Selector};

/// A node and what is on it.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Name.
    pub name: Box<str>,
    /// Labels.
    pub labels: Labels,
    /// What pods may request together.
    pub allocatable: Resources,
    /// How many pods may be there.
    pub max_pods: usize,
    /// `spec.unschedulable`.
    pub unschedulable: bool,
    /// Taints.
    pub taints: Vec<Taint>,
    /// Image names and their sizes in bytes.
    pub images: HashMap<Box<str>, i64>,
    /// Sum of the pods' requests.
    pub requested: Resources,
    /// Sum of the pods' estimated CPU (milli) and memory (bytes).
    pub estimated: (i64, i64),
    /// The pods.
    pub pods: Vec<Arc<PodInfo>>,
}

impl Node {
    fn read(&mut self, node: &ApiNode) {
        self.name = node.metadata.name.as_deref().unwrap_or_default().into();
        self.labels = Labels::from_map(node.metadata.labels.as_ref());
        let spec = node.spec.as_ref();
        self.unschedulable = spec.and_then(|spec| spec.unschedulable).unwrap_or(false);
        self.taints = spec.and_then(|spec| spec.taints.clone()).unwrap_or_default();
        let status = node.status.as_ref();
        let allocatable = status.and_then(|status| status.allocatable.as_ref().or(status.capacity.as_ref()));
        self.allocatable = Resources::from_quantities(allocatable);
        let pods = allocatable.and_then(|allocatable| allocatable.get("pods"));
        self.max_pods = usize::try_from(pods.map_or(0, units)).unwrap_or(0);
        self.images.clear();
        for image in status.and_then(|status| status.images.as_ref()).into_iter().flatten() {
            for name in image.names.iter().flatten() {
                self.images.insert(name.as_str().into(), image.size_bytes.unwrap_or(0));
            }
        }
    }

    /// Puts a pod on the node.
    pub fn add(&mut self, pod: Arc<PodInfo>) {
        self.requested.add(&pod.requests);
        self.estimated.0 += pod.estimated.0;
        self.estimated.1 += pod.estimated.1;
        self.pods.push(pod);
    }

    /// Takes a pod off the node.
    pub fn remove(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let index = self.pods.iter().position(|pod| *pod.uid == *uid)?;
        let pod = self.pods.swap_remove(index);
        self.requested.subtract(&pod.requests);
        self.estimated.0 -= pod.estimated.0;
        self.estimated.1 -= pod.estimated.1;
        Some(pod)
    }
}

/// A claim as volume binding sees it.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    /// `spec.volumeName`.
    pub volume: Box<str>,
    /// Phase is `Bound` (by annotation or status).
    pub bound: bool,
    /// Being deleted.
    pub deleting: bool,
    /// `spec.storageClassName`.
    pub class: Box<str>,
    /// Access modes wanted.
    pub modes: Vec<String>,
    /// Bytes wanted.
    pub request: i64,
}

/// A volume as volume binding sees it.
#[derive(Clone, Debug, Default)]
pub struct Volume {
    /// Where it can be used; `None` is everywhere.
    pub affinity: Option<Vec<NodeTerm>>,
    /// The claim it is for, `namespace/name`.
    pub claim: Option<Key>,
    /// `spec.storageClassName`.
    pub class: Box<str>,
    /// Access modes offered.
    pub modes: Vec<String>,
    /// Bytes offered.
    pub capacity: i64,
}

/// A disruption budget as preemption sees it.
#[derive(Clone, Debug)]
pub struct Budget {
    /// Namespace of the pods.
    pub namespace: Box<str>,
    /// The pods.
    pub selector: Selector,
    /// How many of them may go now.
    pub allowed: i32,
}

/// The cluster.
#[derive(Default)]
pub struct World {
    nodes: BTreeMap<Box<str>, Node>,
    /// Pods on nodes by uid; the node may not be known (yet).
    placed: HashMap<Box<str>, Arc<PodInfo>>,
    /// Uids of pods that are bound by us, but not yet by the API's word.
    assumed: HashSet<Box<str>>,
    /// Labels of namespaces.
    pub namespaces: HashMap<Box<str>, Labels>,
    /// Claims by key.
    pub claims: HashMap<Key, Claim>,
    /// Volumes by name.
    pub volumes: HashMap<Box<str>, Volume>,
    /// Storage classes by name: whether they wait for the first consumer, and whether someone provisions.
    pub classes: HashMap<Box<str>, (bool, bool)>,
    /// Disruption budgets by key.
    pub budgets: BTreeMap<Key, Budget>,
}

impl World {
    /// All nodes that exist, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|node| !node.name.is_empty())
    }

    /// A node.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name).filter(|node| !node.name.is_empty())
    }

    /// Labels of a namespace.
    pub fn namespace_labels(&self, name: &str) -> Labels {
        self.namespaces.get(name).cloned().unwrap_or_default()
    }

    /// Takes in a node.
    pub fn set_node(&mut self, node: &ApiNode) {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        self.nodes.entry(name.into()).or_default().read(node);
    }

    /// Takes in that a node is gone. Its pods stay known until they are gone too.
    pub fn remove_node(&mut self, name: &str) {
        let Some(node) = self.nodes.get_mut(name) else { return };
        if node.pods.is_empty() {
            self.nodes.remove(name);
        } else {
            let pods = std::mem::take(&mut node.pods);
            *node = Node::default();
            pods.into_iter().for_each(|pod| node.add(pod));
        }
    }

    /// Whether a pod of this uid is on a node, assumed or confirmed.
    pub fn placed(&self, uid: &str) -> Option<&Arc<PodInfo>> {
        self.placed.get(uid)
    }

    /// Whether we have bound the pod and wait for the API's word.
    pub fn is_assumed(&self, uid: &str) -> bool {
        self.assumed.contains(uid)
    }

    /// Counts a pod on a node before the API says so.
    pub fn assume(&mut self, pod: &PodInfo, node: &str) {
        let mut pod = pod.clone();
        pod.node = Some(node.into());
        self.assumed.insert(pod.uid.clone());
        self.place(Arc::new(pod));
    }

    /// Takes in a pod that the API says is on a node.
    pub fn set_pod(&mut self, pod: Arc<PodInfo>) {
        self.assumed.remove(&pod.uid);
        self.place(pod);
    }

    fn place(&mut self, pod: Arc<PodInfo>) {
        self.unplace(&pod.uid);
        if let Some(node) = &pod.node {
            self.nodes.entry(node.clone()).or_default().add(pod.clone());
        }
        self.placed.insert(pod.uid.clone(), pod);
    }

    fn unplace(&mut self, uid: &str) -> Option<Arc<PodInfo>> {
        let pod = self.placed.remove(uid)?;
        let name = pod.node.as_deref().unwrap_or_default();
        if let Some(node) = self.nodes.get_mut(name) {
            node.remove(uid);
            if node.name.is_empty() && node.pods.is_empty() {
                self.nodes.remove(name);
            }
        }
        Some(pod)
    }

    /// Takes in that a pod is gone, has ended or could not be bound.
    pub fn remove_pod(&mut self, uid: &str) -> bool {
        self.assumed.remove(uid);
        self.unplace(uid).is_some()
    }

    /// Takes in a claim.
    pub fn set_claim(&mut self, key: &Key, claim: &PersistentVolumeClaim) {
        let spec = claim.spec.as_ref();
        let annotations = claim.metadata.annotations.as_ref();
        let volume = spec.and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
        let completed = annotations.is_some_and(|all| all.contains_key("pv.kubernetes.io/bind-completed"));
        let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
        let requests = spec.and_then(|spec| spec.resources.as_ref()).and_then(|resources| resources.requests.as_ref());
        let entry = Claim {
            volume: volume.into(),
            bound: !volume.is_empty() && (completed || phase == Some("Bound")),
            deleting: claim.metadata.deletion_timestamp.is_some(),
            class: spec.and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default().into(),
            modes: spec.and_then(|spec| spec.access_modes.clone()).unwrap_or_default(),
            request: requests.and_then(|requests| requests.get("storage")).map_or(0, units),
        };
        self.claims.insert(key.clone(), entry);
    }

    /// Takes in a volume.
    pub fn set_volume(&mut self, name: &str, volume: &PersistentVolume) {
        let spec = volume.spec.as_ref();
        let required =
            spec.and_then(|spec| spec.node_affinity.as_ref()).and_then(|affinity| affinity.required.as_ref());
        let claim = spec.and_then(|spec| spec.claim_ref.as_ref()).map(|claim| {
            Key::new(claim.namespace.as_deref().unwrap_or_default(), claim.name.as_deref().unwrap_or_default())
        });
        let capacity = spec.and_then(|spec| spec.capacity.as_ref());
        let entry = Volume {
            affinity: required
                .map(|selector| selector.node_selector_terms.iter().map(|t| NodeTerm::new(t, 0)).collect()),
            claim,
            class: spec.and_then(|spec| spec.storage_class_name.as_deref()).unwrap_or_default().into(),
            modes: spec.and_then(|spec| spec.access_modes.clone()).unwrap_or_default(),
            capacity: capacity
                .and_then(|capacity| capacity.get("storage"))
                .map_or(0, |quantity| milli(quantity) / 1000),
        };
        self.volumes.insert(name.into(), entry);
    }

    /// Takes in a storage class.
    pub fn set_class(&mut self, name: &str, class: &StorageClass) {
        let waits = class.volume_binding_mode.as_deref() == Some("WaitForFirstConsumer");
        let provisions = class.provisioner != "kubernetes.io/no-provisioner";
        self.classes.insert(name.into(), (waits, provisions));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::testing::{node, pod};
    use serde_json::json;

    #[test]
    fn an_assumed_pod_counts_until_it_is_confirmed_or_forgotten_and_never_twice() {
        let mut world = World::default();
        world.set_node(&node("a", json!({})));
        let waiting =
            pod("p", json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "100m"}}}]}}));
        world.assume(&waiting, "a");
        assert_eq!(world.node("a").unwrap().requested.milli_cpu, 100);
        assert!(world.is_assumed("p"));
        let bound = Arc::new(PodInfo { node: Some("a".into()), ..(*waiting).clone() });
        world.set_pod(bound);
        assert!(!world.is_assumed("p"));
        assert_eq!((world.node("a").unwrap().requested.milli_cpu, world.node("a").unwrap().pods.len()), (100, 1));
        assert!(world.remove_pod("p"));
        assert_eq!((world.node("a").unwrap().requested.milli_cpu, world.remove_pod("p")), (0, false));
    }

    #[test]
    fn pods_of_an_unknown_node_are_counted_when_it_appears_and_outlive_it() {
        let mut world = World::default();
        world.set_pod(pod("p", json!({"spec": {"nodeName": "a"}})));
        assert_eq!(world.nodes().count(), 0);
        world.set_node(&node("a", json!({})));
        assert_eq!(world.node("a").unwrap().pods.len(), 1);
        world.remove_node("a");
        assert!(world.node("a").is_none());
        world.set_node(&node("a", json!({})));
        assert_eq!(world.node("a").unwrap().pods.len(), 1);
    }
}
