//! Kinds of which only some fields must not change once set. One table instead of a file per kind.

use serde_json::{Value, json};

use super::value::{int, list, text};
use super::workload::{count_or_percent, label_selector};
use super::{Context, Strategy};
use crate::apiserver::field::{ErrorList, FieldError};

const IMMUTABLE: &str = "field is immutable";

/// How upstream words the refusal of a change.
#[derive(Clone, Copy)]
enum Refusal {
    /// `Invalid value: ...: field is immutable`.
    Immutable,
    /// `Forbidden: <text>`.
    Forbidden(&'static str),
}

/// Kind, field (a path of keys), refusal.
const FIXED: &[(&str, &[&str], Refusal)] = &[
    ("ControllerRevision", &["data"], Refusal::Immutable),
    ("CSIDriver", &["spec", "attachRequired"], Refusal::Immutable),
    ("CSIDriver", &["spec", "volumeLifecycleModes"], Refusal::Immutable),
    ("CSIStorageCapacity", &["nodeTopology"], Refusal::Immutable),
    ("CSIStorageCapacity", &["storageClassName"], Refusal::Immutable),
    ("EndpointSlice", &["addressType"], Refusal::Immutable),
    ("IngressClass", &["spec", "controller"], Refusal::Immutable),
    ("IPAddress", &["spec", "parentRef"], Refusal::Immutable),
    ("PriorityClass", &["value"], Refusal::Forbidden("may not be changed in an update.")),
    ("PriorityClass", &["preemptionPolicy"], Refusal::Immutable),
    ("ResourceClaim", &["spec"], Refusal::Immutable),
    ("ResourceClaimTemplate", &["spec"], Refusal::Immutable),
    ("RuntimeClass", &["handler"], Refusal::Immutable),
    ("StorageClass", &["parameters"], Refusal::Forbidden("updates to parameters are forbidden.")),
    ("StorageClass", &["provisioner"], Refusal::Forbidden("updates to provisioner are forbidden.")),
    ("StorageClass", &["reclaimPolicy"], Refusal::Forbidden("updates to reclaimPolicy are forbidden.")),
    ("StorageClass", &["volumeBindingMode"], Refusal::Immutable),
    ("VolumeAttachment", &["spec"], Refusal::Immutable),
];

fn at<'a>(object: &'a Value, path: &[&str]) -> &'a Value {
    path.iter().fold(object, |value, key| &value[*key])
}

/// The refusals of changes of fixed fields; the default for every kind.
pub(super) fn changes(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let kind = context.resource.kind.as_ref();
    for (_, path, refusal) in FIXED.iter().filter(|(k, ..)| *k == kind && context.subresource.is_empty()) {
        let now = at(new, path);
        if now != at(old, path) {
            errors.push(match refusal {
                Refusal::Immutable => FieldError::invalid(path.join("."), now.clone(), IMMUTABLE),
                Refusal::Forbidden(text) => FieldError::forbidden(path.join("."), *text),
            });
        }
    }
    errors
}

/// PersistentVolumeClaims: pending until bound, and a spec that only grows.
pub static CLAIM: Strategy = Strategy {
    prepare_create: |_, new| new["status"] = json!({"phase": "Pending"}),
    validate_create: |_, new| claim(new),
    validate_update: |context, new, old| {
        if !context.subresource.is_empty() {
            return ErrorList::new();
        }
        let mut errors = claim(new);
        let stays = |object: &Value| {
            let mut spec = object["spec"].clone();
            if let Some(map) = spec.as_object_mut() {
                map.remove("resources");
                map.remove("volumeAttributesClassName");
                if text(old, "/spec/volumeName").is_empty() {
                    map.remove("volumeName");
                }
            }
            spec
        };
        if stays(new) != stays(old) {
            let text = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims\n";
            errors.push(FieldError::forbidden("spec", text));
        }
        errors
    },
    ..Strategy::DEFAULT
};

fn claim(object: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let modes = list(object, "/spec/accessModes");
    if modes.is_empty() {
        errors.push(FieldError::required("spec.accessModes", "at least 1 access mode is required"));
    }
    let supported = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
    for mode in modes.iter().filter_map(Value::as_str).filter(|m| !supported.contains(m)) {
        errors.push(FieldError::not_supported("spec.accessModes", mode, &supported));
    }
    if object.pointer("/spec/resources/requests/storage").is_none() {
        errors.push(FieldError::required("spec.resources[storage]", ""));
    }
    errors
}

/// PersistentVolumes.
pub static VOLUME: Strategy = Strategy {
    prepare_create: |context, new| {
        new["status"] = json!({"phase": "Pending", "lastPhaseTransitionTime": context.now});
    },
    prepare_update: |context, new, old| {
        if context.subresource == "status" && new["status"]["phase"] != old["status"]["phase"] {
            new["status"]["lastPhaseTransitionTime"] = json!(context.now);
        }
    },
    validate_create: |_, new| {
        let mut errors = ErrorList::new();
        if list(new, "/spec/accessModes").is_empty() {
            errors.push(FieldError::required("spec.accessModes", ""));
        }
        if new.pointer("/spec/capacity/storage").is_none() {
            errors.push(FieldError::required("spec.capacity", ""));
        }
        let common = [
            "accessModes",
            "capacity",
            "claimRef",
            "mountOptions",
            "nodeAffinity",
            "persistentVolumeReclaimPolicy",
            "storageClassName",
            "volumeAttributesClassName",
            "volumeMode",
        ];
        let sources =
            new["spec"].as_object().map_or(0, |spec| spec.keys().filter(|k| !common.contains(&k.as_str())).count());
        match sources {
            0 => errors.push(FieldError::required("spec", "must specify a volume type")),
            1 => {}
            _ => errors.push(FieldError::forbidden("spec", "may not specify more than 1 volume type")),
        }
        errors
    },
    ..Strategy::DEFAULT
};

/// PodDisruptionBudgets.
pub static BUDGET: Strategy = Strategy {
    prepare_create: |_, new| {
        new["status"] = json!({"disruptionsAllowed": 0, "currentHealthy": 0, "desiredHealthy": 0, "expectedPods": 0});
    },
    validate_create: |_, new| budget(&new["spec"]),
    validate_update: |context, new, _| {
        if context.subresource.is_empty() { budget(&new["spec"]) } else { ErrorList::new() }
    },
    generation: true,
    unconditional_update: false,
    ..Strategy::DEFAULT
};

fn budget(spec: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    if !spec["minAvailable"].is_null() && !spec["maxUnavailable"].is_null() {
        errors.push(FieldError::invalid("spec", spec.clone(), "minAvailable and maxUnavailable cannot be both set"));
    }
    for key in ["minAvailable", "maxUnavailable"] {
        errors.extend(count_or_percent(&spec[key], &format!("spec.{key}")));
    }
    errors.extend(label_selector(&spec["selector"], "spec.selector"));
    errors
}

/// HorizontalPodAutoscalers.
pub static AUTOSCALER: Strategy = Strategy {
    validate_create: |_, new| autoscaler(&new["spec"]),
    validate_update: |context, new, _| {
        if context.subresource.is_empty() { autoscaler(&new["spec"]) } else { ErrorList::new() }
    },
    ..Strategy::DEFAULT
};

fn autoscaler(spec: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let (min, max) = (int(spec, "/minReplicas").unwrap_or(1), int(spec, "/maxReplicas").unwrap_or(0));
    if min < 1 {
        errors.push(FieldError::invalid("spec.minReplicas", min, "must be greater than or equal to 1"));
    }
    if max < 1 {
        errors.push(FieldError::invalid("spec.maxReplicas", max, "must be greater than 0"));
    } else if max < min {
        errors.push(FieldError::invalid("spec.maxReplicas", max, "must be greater than or equal to `minReplicas`"));
    }
    for key in ["kind", "name"] {
        if text(spec, &format!("/scaleTargetRef/{key}")).is_empty() {
            errors.push(FieldError::required(format!("spec.scaleTargetRef.{key}"), ""));
        }
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_and_claims_say_what_is_wrong() {
        let errors = budget(&json!({"minAvailable": 1, "maxUnavailable": "10x"}));
        assert_eq!(errors.len(), 2);
        let texts: Vec<String> =
            claim(&json!({"spec": {"accessModes": ["X"]}})).iter().map(ToString::to_string).collect();
        assert!(texts[0].starts_with("spec.accessModes: Unsupported value: \"X\""), "{texts:?}");
        assert_eq!(texts[1], "spec.resources[storage]: Required value");
    }
}
