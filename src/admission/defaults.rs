//! Small plug-ins that only fill something in: DefaultTolerationSeconds, TaintNodesByCondition, DefaultStorageClass,
//! DefaultIngressClass, StorageObjectInUseProtection, RuntimeClass, PodTopologyLabels.

use super::pod::{items, push, text};
use super::{Request, World};
use crate::apiserver::status::Status;
use serde_json::{Value, json};

const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
/// How long a pod stays on a node that is gone unless it says otherwise (seconds).
const TOLERATION_SECONDS: i64 = 300;

/// DefaultTolerationSeconds: pods leave a node that is not ready or unreachable after five minutes.
pub fn toleration_seconds(request: &mut Request<'_>) {
    if !request.is("", "pods") || !(request.creates() || request.updates()) {
        return;
    }
    let spec = &mut request.object["spec"];
    for taint in [NOT_READY, UNREACHABLE] {
        let tolerated = items(&spec["tolerations"]).any(|toleration| {
            let (key, effect) = (text(toleration, "key"), text(toleration, "effect"));
            (key == taint || key.is_empty()) && (effect == "NoExecute" || effect.is_empty())
        });
        if !tolerated {
            let toleration = json!({
                "key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": TOLERATION_SECONDS,
            });
            push(spec, "tolerations", toleration);
        }
    }
}

/// TaintNodesByCondition: a new node takes no pods until it is ready.
pub fn taint_new_node(request: &mut Request<'_>) {
    if !request.is("", "nodes") || !request.creates() {
        return;
    }
    if request.object["spec"].is_null() {
        request.object["spec"] = json!({});
    }
    let spec = &mut request.object["spec"];
    let tainted = items(&spec["taints"]).any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule");
    if !tainted {
        push(spec, "taints", json!({ "key": NOT_READY, "effect": "NoSchedule" }));
    }
}

/// Labels of a node that its pods get.
const TOPOLOGY: [&str; 2] = ["topology.kubernetes.io/region", "topology.kubernetes.io/zone"];

/// PodTopologyLabels: a pod carries zone and region of the node it is bound to (or created for).
pub fn topology_labels(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    if !request.creates() {
        return Ok(());
    }
    let node = match (request.group, request.resource, request.subresource) {
        ("", "pods", "binding") if matches!(text(&request.object["target"], "kind"), "" | "Node") => {
            text(&request.object["target"], "name")
        }
        ("", "pods", "") => text(&request.object["spec"], "nodeName"),
        _ => return Ok(()),
    };
    if node.is_empty() {
        return Ok(());
    }
    let Some(node) = world.get::<Value>("", "nodes", "", node)? else { return Ok(()) };
    for label in TOPOLOGY {
        if let Some(value) = node["metadata"]["labels"].get(label) {
            request.object["metadata"]["labels"][label] = value.clone();
        }
    }
    Ok(())
}

/// StorageObjectInUseProtection: a volume or claim goes only when nobody uses it.
pub fn protect_storage(request: &mut Request<'_>) {
    let finalizer = match (request.group, request.resource) {
        ("", "persistentvolumes") => "kubernetes.io/pv-protection",
        ("", "persistentvolumeclaims") => "kubernetes.io/pvc-protection",
        ("storage.k8s.io", "volumeattributesclasses") => "kubernetes.io/vac-protection",
        _ => return,
    };
    if !request.creates() || !request.subresource.is_empty() {
        return;
    }
    let metadata = &mut request.object["metadata"];
    if !items(&metadata["finalizers"]).any(|f| f == finalizer) {
        push(metadata, "finalizers", finalizer.into());
    }
}

/// Of several defaults the newest counts, then the first by name.
fn default_of(classes: Vec<Value>, annotations: &[&str]) -> Option<Value> {
    let marked = |class: &Value| annotations.iter().any(|a| class["metadata"]["annotations"][*a] == "true");
    classes.into_iter().filter(marked).reduce(|best, next| {
        let created = |class: &Value| text(&class["metadata"], "creationTimestamp").to_owned();
        if created(&next) > created(&best) { next } else { best }
    })
}

/// DefaultStorageClass: a claim that names no class gets the default one, if there is one.
pub fn storage_class(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    let names_none = request.is("", "persistentvolumeclaims")
        && request.creates()
        && request.object["spec"]["storageClassName"].is_null()
        && request.object["metadata"]["annotations"].get("volume.beta.kubernetes.io/storage-class").is_none();
    if !names_none {
        return Ok(());
    }
    let classes = world.list("storage.k8s.io", "storageclasses", "")?;
    let annotations =
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
    if let Some(class) = default_of(classes, &annotations) {
        request.object["spec"]["storageClassName"] = class["metadata"]["name"].clone();
    }
    Ok(())
}

/// DefaultIngressClass: likewise for an ingress.
pub fn ingress_class(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    let names_none = request.is("networking.k8s.io", "ingresses")
        && request.creates()
        && request.object["spec"]["ingressClassName"].is_null()
        && request.object["metadata"]["annotations"].get("kubernetes.io/ingress.class").is_none();
    if !names_none {
        return Ok(());
    }
    let classes = world.list("networking.k8s.io", "ingressclasses", "")?;
    if let Some(class) = default_of(classes, &["ingressclass.kubernetes.io/is-default-class"]) {
        request.object["spec"]["ingressClassName"] = class["metadata"]["name"].clone();
    }
    Ok(())
}

/// RuntimeClass: overhead, node selector and tolerations of the class become the pod's.
pub fn runtime_class(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    if !request.is("", "pods") || !request.creates() {
        return Ok(());
    }
    let Some(name) = request.object["spec"]["runtimeClassName"].as_str().filter(|n| !n.is_empty()) else {
        if request.object["spec"]["overhead"].as_object().is_some_and(|overhead| !overhead.is_empty()) {
            return Err(
                request.forbidden("pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead")
            );
        }
        return Ok(());
    };
    let Some(class) = world.get::<Value>("node.k8s.io", "runtimeclasses", "", name)? else {
        return Err(request.forbidden(format_args!("pod rejected: RuntimeClass \"{name}\" not found")));
    };
    let overhead = &class["overhead"]["podFixed"];
    let given = &request.object["spec"]["overhead"];
    let empty = |value: &Value| value.as_object().is_none_or(serde_json::Map::is_empty);
    if !empty(given) && given != overhead {
        return Err(request.forbidden("pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead"));
    }
    if !empty(overhead) {
        request.object["spec"]["overhead"] = overhead.clone();
    }
    for (key, value) in class["scheduling"]["nodeSelector"].as_object().into_iter().flatten() {
        let mine = request.object["spec"]["nodeSelector"][key.as_str()].clone();
        if !mine.is_null() && mine != *value {
            return Err(request.forbidden(format_args!(
                "conflict: runtimeClass.scheduling.nodeSelector[{key}] = {}; pod.spec.nodeSelector[{key}] = {}",
                value.as_str().unwrap_or(""),
                mine.as_str().unwrap_or("")
            )));
        }
        request.object["spec"]["nodeSelector"][key.as_str()] = value.clone();
    }
    for toleration in items(&class["scheduling"]["tolerations"]) {
        if !items(&request.object["spec"]["tolerations"]).any(|have| have == toleration) {
            push(&mut request.object["spec"], "tolerations", toleration.clone());
        }
    }
    Ok(())
}
