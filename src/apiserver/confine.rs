//! What an update may not change: fields of other (sub)resources, system metadata.

use super::call::Call;
use super::object::{self, meta, metadata_mut};
use super::resources::{Resource, SubresourceKind};
use serde_json::{Value, json};

/// Keeps what the (sub)resource of the call may not write.
pub fn confine(call: &Call<'_>, object: &mut Value, old: &Value) {
    let keep = |object: &mut Value, key: &str| match old.get(key) {
        Some(value) => object[key] = value.clone(),
        None => {
            if let Some(fields) = object.as_object_mut() {
                fields.remove(key);
            }
        }
    };
    match call.subresource.map(|s| s.does) {
        None => {
            if call.resource.resets_status() || call.resource.subresource("status").is_some() {
                keep(object, "status");
            }
        }
        Some(SubresourceKind::Status | SubresourceKind::Approval) => {
            let kept: Vec<String> = old
                .as_object()
                .into_iter()
                .chain(object.as_object())
                .flat_map(|o| o.keys())
                .filter(|k| !matches!(k.as_str(), "metadata" | "status" | "apiVersion" | "kind"))
                .cloned()
                .collect();
            for key in kept {
                keep(object, &key);
            }
            for key in ["ownerReferences", "finalizers"] {
                keep_metadata(object, old, key);
            }
            if call.subresource.is_some_and(|s| s.does == SubresourceKind::Approval) {
                let conditions = object.pointer("/status/conditions").cloned();
                keep(object, "status");
                if let Some(conditions) = conditions {
                    object["status"]["conditions"] = conditions;
                }
            }
        }
        Some(SubresourceKind::EphemeralContainers) => {
            let containers = object.pointer("/spec/ephemeralContainers").cloned();
            replace_spec(object, old, |spec| match containers {
                Some(containers) => spec["ephemeralContainers"] = containers,
                None => {
                    if let Some(fields) = spec.as_object_mut() {
                        fields.remove("ephemeralContainers");
                    }
                }
            });
        }
        Some(SubresourceKind::Resize) => {
            let new = object.get("spec").cloned().unwrap_or(Value::Null);
            replace_spec(object, old, |spec| resize(spec, &new));
        }
        Some(SubresourceKind::Finalize) => {
            let left = object.pointer("/spec/finalizers").cloned();
            replace_spec(object, old, |spec| match left {
                Some(left) => spec["finalizers"] = left,
                None => {
                    if let Some(fields) = spec.as_object_mut() {
                        fields.remove("finalizers");
                    }
                }
            });
        }
        // A scale changes exactly what it means to.
        Some(_) => {}
    }
}

/// The old object with the new resource version and a changed spec.
fn replace_spec(object: &mut Value, old: &Value, change: impl FnOnce(&mut Value)) {
    let mut result = old.clone();
    change(&mut result["spec"]);
    *object = result;
}

/// Takes over what a resize may change: resources and resize policies of containers, by name.
fn resize(spec: &mut Value, new: &Value) {
    for list in ["containers", "initContainers"] {
        let Some(containers) = spec.get_mut(list).and_then(Value::as_array_mut) else { continue };
        for container in containers {
            let named = new.get(list).and_then(Value::as_array);
            let Some(other) = named.into_iter().flatten().find(|c| c["name"] == container["name"]) else { continue };
            for key in ["resources", "resizePolicy"] {
                match other.get(key) {
                    Some(value) => container[key] = value.clone(),
                    None => {
                        if let Some(fields) = container.as_object_mut() {
                            fields.remove(key);
                        }
                    }
                }
            }
        }
    }
    if let Some(resources) = new.get("resources") {
        spec["resources"] = resources.clone();
    }
}

fn keep_metadata(object: &mut Value, old: &Value, key: &str) {
    match old.get("metadata").and_then(|m| m.get(key)) {
        Some(value) => {
            let value = value.clone();
            metadata_mut(object).insert(key.to_owned(), value);
        }
        None => {
            metadata_mut(object).remove(key);
        }
    }
}

/// System metadata that an update does not change.
pub fn carry_over(object: &mut Value, old: &Value) {
    for key in ["uid", "creationTimestamp", "generation", "deletionTimestamp", "generateName"] {
        if key != "generateName" || meta(object, key).is_empty() {
            keep_metadata(object, old, key);
        }
    }
    if object.pointer("/metadata/deletionGracePeriodSeconds").is_none() {
        keep_metadata(object, old, "deletionGracePeriodSeconds");
    }
    let version = meta(old, "resourceVersion").to_owned();
    let metadata = metadata_mut(object);
    metadata.remove("selfLink");
    metadata.insert("resourceVersion".to_owned(), Value::String(version));
}

/// Counts a change of anything but metadata and status.
pub fn count_generation(resource: &Resource, object: &mut Value, old: &Value) {
    if !resource.strategy.generation {
        return;
    }
    let changed = |a: &Value, b: &Value| {
        a.as_object().into_iter().flatten().any(|(key, value)| {
            !matches!(key.as_str(), "metadata" | "status" | "apiVersion" | "kind") && b.get(key) != Some(value)
        })
    };
    if changed(object, old) || changed(old, object) {
        let generation = old.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0);
        metadata_mut(object).insert("generation".to_owned(), json!(generation + 1));
    }
}

/// Whether this update removed the last thing that kept a deleted object.
pub fn completes_deletion(resource: &Resource, object: &Value, old: &Value) -> bool {
    if !object::finalizers(object).is_empty() || old.pointer("/metadata/deletionTimestamp").is_none() {
        return false;
    }
    if resource.kind == "Namespace" && resource.group.is_empty() {
        let left = object.pointer("/spec/finalizers").and_then(Value::as_array);
        return left.is_none_or(Vec::is_empty);
    }
    old.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0) == 0
}
