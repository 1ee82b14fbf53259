//! Nodes and pods for the scheduler's tests.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Node as ApiNode;
use serde_json::{Value, json};

use super::pod_info::PodInfo;
use super::world::World;

/// A node with 4 CPUs, 8 GiB and room for 110 pods, changed by `extra`.
pub fn node(name: &str, extra: Value) -> ApiNode {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "110", "ephemeral-storage": "100Gi"}}});
    json_patch::merge(&mut node, &extra);
    serde_json::from_value(node).unwrap()
}

/// A pod whose uid is its name, changed by `extra`.
pub fn pod(name: &str, extra: Value) -> Arc<PodInfo> {
    let mut pod =
        json!({"metadata": {"name": name, "namespace": "n", "uid": name}, "spec": {"containers": [{"name": "c"}]}});
    json_patch::merge(&mut pod, &extra);
    PodInfo::new(&serde_json::from_value(pod).unwrap())
}

/// A cluster of these.
pub fn world(nodes: &[ApiNode], pods: &[Arc<PodInfo>]) -> World {
    let mut world = World::default();
    nodes.iter().for_each(|node| world.set_node(node));
    pods.iter().for_each(|pod| world.set_pod(pod.clone()));
    world
}
