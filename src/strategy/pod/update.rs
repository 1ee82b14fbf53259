//! What of a pod may change, by which subresource.

use serde_json::Value;

use super::spec;
use crate::apiserver::field::{ErrorList, FieldError};
use crate::strategy::Context;
use crate::strategy::value::{int, list, text};

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub(super) fn validate(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    match context.subresource {
        "ephemeralcontainers" => ephemeral(context, new, old),
        "resize" => resize(context, new, old),
        "" => whole(context, new, old),
        _ => ErrorList::new(),
    }
}

fn whole(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    let mut errors = spec::pod(context, new, true);
    let (new, old) = (&new["spec"], &old["spec"]);
    for key in ["containers", "initContainers"] {
        let pointer = format!("/{key}");
        if list(new, &pointer).len() != list(old, &pointer).len() {
            errors.push(FieldError::forbidden(format!("spec.{key}"), "pod updates may not add or remove containers"));
            return errors;
        }
    }
    let (before, after) = (int(old, "/activeDeadlineSeconds"), int(new, "/activeDeadlineSeconds"));
    match (before, after) {
        (Some(_), None) => {
            let text = "must not update from a positive integer to nil value";
            errors.push(FieldError::invalid("spec.activeDeadlineSeconds", Value::Null, text));
        }
        (Some(before), Some(after)) if after > before => {
            let text = "must be less than or equal to previous value";
            errors.push(FieldError::invalid("spec.activeDeadlineSeconds", after, text));
            return errors;
        }
        _ => {}
    }
    let (old_tolerations, new_tolerations) = (list(old, "/tolerations"), list(new, "/tolerations"));
    if old_tolerations.iter().any(|t| !new_tolerations.iter().any(|n| same_toleration(n, t))) {
        let text = "existing toleration can not be modified except its tolerationSeconds";
        errors.push(FieldError::forbidden("spec.tolerations", text));
    }
    let had = |gate: &&Value| list(old, "/schedulingGates").iter().any(|g| g == *gate);
    if let Some(gate) = list(new, "/schedulingGates").iter().find(|gate| !had(gate)) {
        let name = text(gate, "/name");
        let text = "only deletion is allowed, but found new scheduling gate";
        errors.push(FieldError::forbidden("spec.schedulingGates", format!("{text} '{name}'")));
    }
    let gated = !list(old, "/schedulingGates").is_empty();
    if gated && let Some(selector) = old["nodeSelector"].as_object() {
        let kept = selector.iter().all(|(k, v)| new["nodeSelector"].get(k) == Some(v));
        if !kept {
            let text = "only additions to spec.nodeSelector are allowed (no mutations or deletions)";
            errors.push(FieldError::invalid("spec.nodeSelector", new["nodeSelector"].clone(), text));
        }
    }
    if fixed(new, old, gated) != *old {
        errors
            .push(FieldError::forbidden("spec", format!("pod updates may not change fields other than {UPDATABLE}\n")));
    }
    errors
}

fn same_toleration(a: &Value, b: &Value) -> bool {
    ["key", "operator", "value", "effect"].iter().all(|key| a[key] == b[key])
}

/// The new spec with everything that may change set back.
fn fixed(new: &Value, old: &Value, gated: bool) -> Value {
    let mut munged = new.clone();
    let mut back = vec!["activeDeadlineSeconds", "tolerations", "schedulingGates"];
    if gated {
        back.extend(["nodeSelector", "affinity"]);
    }
    if int(old, "/terminationGracePeriodSeconds").is_some_and(|s| s < 0)
        && int(new, "/terminationGracePeriodSeconds") == Some(1)
    {
        back.push("terminationGracePeriodSeconds");
    }
    if let Some(map) = munged.as_object_mut() {
        for key in back {
            match old.get(key) {
                Some(value) => map.insert(key.to_owned(), value.clone()),
                None => map.remove(key),
            };
        }
    }
    for key in ["containers", "initContainers"] {
        if let Some(Value::Array(containers)) = munged.get_mut(key) {
            for (container, old) in containers.iter_mut().zip(list(old, &format!("/{key}"))) {
                container["image"] = old["image"].clone();
            }
        }
    }
    munged
}

fn ephemeral(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    let mut errors = spec::pod(context, new, true);
    let now = list(new, "/spec/ephemeralContainers");
    for container in list(old, "/spec/ephemeralContainers") {
        let name = text(container, "/name");
        match now.iter().find(|c| text(c, "/name") == name) {
            None => {
                let text = format!("existing ephemeral containers {name:?} may not be removed\n");
                errors.push(FieldError::forbidden("spec.ephemeralContainers", text));
            }
            Some(same) if same != container => {
                let text = format!("existing ephemeral containers {name:?} may not be changed\n");
                errors.push(FieldError::forbidden("spec.ephemeralContainers", text));
            }
            Some(_) => {}
        }
    }
    errors
}

/// In-place resize: only cpu and memory of containers, and the quality of service class stays.
fn resize(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    let mut errors = spec::pod(context, new, true);
    if super::qos::class(&new["spec"]) != super::qos::class(&old["spec"]) {
        errors.push(FieldError::invalid(
            "spec",
            super::qos::class(&new["spec"]),
            "Pod QOS Class may not change as a result of resizing",
        ));
    }
    let mut munged = new["spec"].clone();
    for key in ["containers", "initContainers"] {
        if let Some(Value::Array(containers)) = munged.get_mut(key) {
            for (container, old) in containers.iter_mut().zip(list(&old["spec"], &format!("/{key}"))) {
                container["resources"] = old["resources"].clone();
                if old.get("resources").is_none() {
                    container.as_object_mut().map(|c| c.remove("resources"));
                }
            }
        }
    }
    if munged != old["spec"] {
        errors.push(FieldError::forbidden("spec", "only cpu and memory resources are mutable"));
    }
    errors
}
