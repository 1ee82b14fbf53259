//! Workloads: Deployment, ReplicaSet, ReplicationController, DaemonSet, StatefulSet, Job, CronJob. They share a selector, a
//! pod template and a count.

use serde_json::{Value, json};

use super::pod;
use super::value::{int, list, text};
use super::{Context, Strategy};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::apiserver::names;

pub(crate) const NOT_NEGATIVE: &str = "must be greater than or equal to 0";
const IMMUTABLE: &str = "field is immutable";

/// Deployments.
pub static DEPLOYMENT: Strategy = Strategy {
    prepare_create,
    prepare_update,
    validate_create: deployment_create,
    validate_update: deployment_update,
    generation: true,
    ..Strategy::DEFAULT
};
/// ReplicaSets.
pub static REPLICA_SET: Strategy = Strategy {
    prepare_create,
    prepare_update,
    validate_create: replica_set_create,
    validate_update: replica_set_update,
    generation: true,
    ..Strategy::DEFAULT
};
/// ReplicationControllers.
pub static REPLICATION_CONTROLLER: Strategy = Strategy {
    prepare_create: prepare_rc,
    prepare_update,
    validate_create: replication_controller,
    validate_update: |context, new, _| {
        if context.subresource.is_empty() { replication_controller(context, new) } else { status_counts(new) }
    },
    generation: true,
    ..Strategy::DEFAULT
};
/// DaemonSets.
pub static DAEMON_SET: Strategy = Strategy {
    prepare_create,
    prepare_update,
    validate_create: daemon_set,
    validate_update: |context, new, old| {
        if context.subresource.is_empty() {
            with_immutable_selector(daemon_set(context, new), new, old)
        } else {
            status_counts(new)
        }
    },
    generation: true,
    ..Strategy::DEFAULT
};
/// StatefulSets.
pub static STATEFUL_SET: Strategy = Strategy {
    prepare_create,
    prepare_update,
    validate_create: stateful_set,
    validate_update: stateful_set_update,
    generation: true,
    ..Strategy::DEFAULT
};

fn prepare_create(_: &Context<'_>, new: &mut Value) {
    new["status"] = json!({});
    pod::default_template(&mut new["spec"]["template"]);
}

fn prepare_update(context: &Context<'_>, new: &mut Value, _: &Value) {
    if context.subresource.is_empty() {
        pod::default_template(&mut new["spec"]["template"]);
    }
}

/// The selector of a ReplicationController is the template's labels unless said otherwise.
fn prepare_rc(_: &Context<'_>, new: &mut Value) {
    new["status"] = json!({"replicas": 0});
    let labels = new["spec"]["template"]["metadata"]["labels"].clone();
    if new["spec"]["selector"].as_object().is_none_or(|s| s.is_empty()) && labels.is_object() {
        new["spec"]["selector"] = labels.clone();
    }
    if new["metadata"]["labels"].as_object().is_none_or(|l| l.is_empty()) && labels.is_object() {
        new["metadata"]["labels"] = labels;
    }
    if !new["spec"]["template"].is_null() {
        pod::default_template(&mut new["spec"]["template"]);
    }
}

fn not_negative(errors: &mut ErrorList, object: &Value, pointer: &str, field: &str) {
    if let Some(n) = int(object, pointer).filter(|n| *n < 0) {
        errors.push(FieldError::invalid(field, n, NOT_NEGATIVE));
    }
}

/// The counts of a status are never negative.
fn status_counts(new: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    if let Some(Value::Object(status)) = new.get("status") {
        for (key, value) in status {
            if let Some(n) = value.as_i64().filter(|n| *n < 0) {
                errors.push(FieldError::invalid(format!("status.{key}"), n, NOT_NEGATIVE));
            }
        }
    }
    errors
}

/// A label selector, as `metav1.LabelSelector` allows it.
pub(crate) fn label_selector(selector: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    if let Some(Value::Object(labels)) = selector.get("matchLabels") {
        let field = format!("{field}.matchLabels");
        for (key, value) in labels {
            errors.extend(names::qualified_name(key).into_iter().map(|f| FieldError::invalid(&field, key.as_str(), f)));
            let value = value.as_str().unwrap_or_default();
            errors.extend(names::label_value(value).into_iter().map(|f| FieldError::invalid(&field, value, f)));
        }
    }
    for (i, requirement) in list(selector, "/matchExpressions").iter().enumerate() {
        let at = |name: &str| format!("{field}.matchExpressions[{i}].{name}");
        let values = list(requirement, "/values");
        match text(requirement, "/operator") {
            "In" | "NotIn" if values.is_empty() => {
                errors.push(FieldError::required(at("values"), "must be specified when `operator` is 'In' or 'NotIn'"));
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                errors.push(FieldError::forbidden(
                    at("values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                ));
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            other => errors.push(FieldError::invalid(at("operator"), other, "not a valid selector operator")),
        }
        let key = text(requirement, "/key");
        errors.extend(names::qualified_name(key).into_iter().map(|f| FieldError::invalid(at("key"), key, f)));
    }
    errors
}

/// Whether labels satisfy a label selector; an empty selector matches everything.
pub(crate) fn selector_matches(selector: &Value, labels: &Value) -> bool {
    let label = |key: &str| labels.get(key).and_then(Value::as_str);
    let pairs = selector.get("matchLabels").and_then(Value::as_object);
    let all_equal = pairs.is_none_or(|pairs| pairs.iter().all(|(k, v)| label(k) == v.as_str()));
    all_equal
        && list(selector, "/matchExpressions").iter().all(|r| {
            let value = label(text(r, "/key"));
            let listed = || value.is_some_and(|v| list(r, "/values").iter().any(|x| x.as_str() == Some(v)));
            match text(r, "/operator") {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => value.is_some(),
                _ => value.is_none(),
            }
        })
}

fn is_empty_selector(selector: &Value) -> bool {
    selector.get("matchLabels").and_then(Value::as_object).is_none_or(|m| m.is_empty())
        && list(selector, "/matchExpressions").is_empty()
}

fn selector_and_template(context: &Context<'_>, spec: &Value, kind: &str, restart: &[&str]) -> ErrorList {
    let mut errors = ErrorList::new();
    let selector = &spec["selector"];
    if selector.is_null() {
        errors.push(FieldError::required("spec.selector", ""));
    } else {
        errors.extend(label_selector(selector, "spec.selector"));
        if is_empty_selector(selector) {
            errors.push(FieldError::invalid(
                "spec.selector",
                selector.clone(),
                format!("empty selector is invalid for {kind}"),
            ));
        }
    }
    errors.extend(template(context, spec, selector, restart));
    errors
}

fn template(context: &Context<'_>, spec: &Value, selector: &Value, restart: &[&str]) -> ErrorList {
    let mut errors = ErrorList::new();
    let template = &spec["template"];
    if template.is_null() {
        errors.push(FieldError::required("spec.template", ""));
        return errors;
    }
    let labels = &template["metadata"]["labels"];
    if !selector.is_null() && !is_empty_selector(selector) && !selector_matches(selector, labels) {
        let text = "`selector` does not match template `labels`";
        let labels = if labels.is_null() { json!({}) } else { labels.clone() };
        errors.push(FieldError::invalid("spec.template.metadata.labels", labels, text));
    }
    errors.extend(pod::template(context, template, "spec.template"));
    let policy = text(template, "/spec/restartPolicy");
    if !restart.contains(&policy) {
        errors.push(FieldError::not_supported("spec.template.spec.restartPolicy", policy, restart));
    }
    if restart == ["Always"] && int(template, "/spec/activeDeadlineSeconds").is_some() {
        errors.push(FieldError::forbidden(
            "spec.template.spec.activeDeadlineSeconds",
            "activeDeadlineSeconds in ReplicaSet is not Supported",
        ));
    }
    errors
}

fn with_immutable_selector(mut errors: ErrorList, new: &Value, old: &Value) -> ErrorList {
    if new["spec"]["selector"] != old["spec"]["selector"] {
        errors.push(FieldError::invalid("spec.selector", new["spec"]["selector"].clone(), IMMUTABLE));
    }
    errors
}

fn deployment_create(context: &Context<'_>, new: &Value) -> ErrorList {
    let spec = &new["spec"];
    let mut errors = ErrorList::new();
    not_negative(&mut errors, spec, "/replicas", "spec.replicas");
    errors.extend(selector_and_template(context, spec, "deployment", &["Always"]));
    errors.extend(strategy(&spec["strategy"]));
    not_negative(&mut errors, spec, "/minReadySeconds", "spec.minReadySeconds");
    not_negative(&mut errors, spec, "/revisionHistoryLimit", "spec.revisionHistoryLimit");
    if let Some(deadline) = int(spec, "/progressDeadlineSeconds") {
        not_negative(&mut errors, spec, "/progressDeadlineSeconds", "spec.progressDeadlineSeconds");
        if deadline <= int(spec, "/minReadySeconds").unwrap_or(0) {
            errors.push(FieldError::invalid(
                "spec.progressDeadlineSeconds",
                deadline,
                "must be greater than minReadySeconds",
            ));
        }
    }
    errors
}

fn deployment_update(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    if !context.subresource.is_empty() {
        return status_counts(new);
    }
    with_immutable_selector(deployment_create(context, new), new, old)
}

fn strategy(strategy: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let rolling = &strategy["rollingUpdate"];
    match text(strategy, "/type") {
        "Recreate" => {
            if !rolling.is_null() {
                let text = "may not be specified when strategy `type` is 'Recreate'";
                errors.push(FieldError::forbidden("spec.strategy.rollingUpdate", text));
            }
        }
        "RollingUpdate" => {
            if rolling.is_null() {
                let text = "this should be defaulted and never be nil";
                errors.push(FieldError::required("spec.strategy.rollingUpdate", text));
                return errors;
            }
            for field in ["maxUnavailable", "maxSurge"] {
                errors.extend(count_or_percent(&rolling[field], &format!("spec.strategy.rollingUpdate.{field}")));
            }
            if is_zero(&rolling["maxUnavailable"]) && is_zero(&rolling["maxSurge"]) {
                let text = "may not be 0 when `maxSurge` is 0";
                errors.push(FieldError::invalid(
                    "spec.strategy.rollingUpdate.maxUnavailable",
                    rolling["maxUnavailable"].clone(),
                    text,
                ));
            }
        }
        other => errors.push(FieldError::not_supported("spec.strategy.type", other, &["Recreate", "RollingUpdate"])),
    }
    errors
}

fn is_zero(value: &Value) -> bool {
    value.as_i64() == Some(0) || matches!(value.as_str(), Some("0%" | "0"))
}

/// A number, or a percentage up to 100.
pub(crate) fn count_or_percent(value: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    match value {
        Value::String(text) => {
            let digits = text.strip_suffix('%').filter(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()));
            match digits.map(str::parse::<u64>) {
                None | Some(Err(_)) => {
                    let detail = "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')";
                    errors.push(FieldError::invalid(field, value.clone(), detail));
                }
                Some(Ok(n)) if n > 100 && field.ends_with("maxUnavailable") => {
                    errors.push(FieldError::invalid(field, value.clone(), "must not be greater than 100%"));
                }
                Some(Ok(_)) => {}
            }
        }
        Value::Number(n) if n.as_i64().is_some_and(|n| n < 0) => {
            errors.push(FieldError::invalid(field, value.clone(), NOT_NEGATIVE));
        }
        _ => {}
    }
    errors
}

fn replica_set_create(context: &Context<'_>, new: &Value) -> ErrorList {
    let spec = &new["spec"];
    let mut errors = ErrorList::new();
    not_negative(&mut errors, spec, "/replicas", "spec.replicas");
    not_negative(&mut errors, spec, "/minReadySeconds", "spec.minReadySeconds");
    errors.extend(selector_and_template(context, spec, "deployment", &["Always"]));
    errors
}

fn replica_set_update(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    if !context.subresource.is_empty() {
        return replica_status(new);
    }
    with_immutable_selector(replica_set_create(context, new), new, old)
}

fn replica_status(new: &Value) -> ErrorList {
    let mut errors = status_counts(new);
    let replicas = int(new, "/status/replicas").unwrap_or(0);
    for key in ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"] {
        if let Some(n) = int(new, &format!("/status/{key}")).filter(|n| *n > replicas) {
            errors.push(FieldError::invalid(format!("status.{key}"), n, "cannot be greater than status.replicas"));
        }
    }
    errors
}

fn replication_controller(context: &Context<'_>, new: &Value) -> ErrorList {
    let spec = &new["spec"];
    let mut errors = ErrorList::new();
    not_negative(&mut errors, spec, "/minReadySeconds", "spec.minReadySeconds");
    let selector = &spec["selector"];
    if selector.as_object().is_none_or(|s| s.is_empty()) {
        errors.push(FieldError::required("spec.selector", ""));
    }
    not_negative(&mut errors, spec, "/replicas", "spec.replicas");
    errors.extend(template(context, spec, &json!({"matchLabels": selector}), &["Always"]));
    errors
}

fn daemon_set(context: &Context<'_>, new: &Value) -> ErrorList {
    let spec = &new["spec"];
    let mut errors = selector_and_template(context, spec, "daemonset", &["Always"]);
    not_negative(&mut errors, spec, "/minReadySeconds", "spec.minReadySeconds");
    let update = &spec["updateStrategy"];
    match text(update, "/type") {
        "OnDelete" => {}
        "RollingUpdate" => {
            let rolling = &update["rollingUpdate"];
            for field in ["maxUnavailable", "maxSurge"] {
                errors.extend(count_or_percent(&rolling[field], &format!("spec.updateStrategy.rollingUpdate.{field}")));
            }
            if is_zero(&rolling["maxUnavailable"]) && (rolling["maxSurge"].is_null() || is_zero(&rolling["maxSurge"])) {
                let text = "cannot be 0 when maxSurge is 0";
                errors.push(FieldError::invalid(
                    "spec.updateStrategy.rollingUpdate.maxUnavailable",
                    rolling["maxUnavailable"].clone(),
                    text,
                ));
            }
        }
        other => {
            errors.push(FieldError::not_supported("spec.updateStrategy.type", other, &["OnDelete", "RollingUpdate"]))
        }
    }
    not_negative(&mut errors, spec, "/revisionHistoryLimit", "spec.revisionHistoryLimit");
    errors
}

fn stateful_set(context: &Context<'_>, new: &Value) -> ErrorList {
    let spec = &new["spec"];
    let mut errors = ErrorList::new();
    match text(spec, "/podManagementPolicy") {
        "" => errors.push(FieldError::required("spec.podManagementPolicy", "")),
        "OrderedReady" | "Parallel" => {}
        other => {
            let text = "must be 'OrderedReady' or 'Parallel'";
            errors.push(FieldError::invalid("spec.podManagementPolicy", other, text));
        }
    }
    match text(spec, "/updateStrategy/type") {
        "" => errors.push(FieldError::required("spec.updateStrategy", "")),
        "OnDelete" if !spec["updateStrategy"]["rollingUpdate"].is_null() => {
            let text = "only allowed for updateStrategy 'RollingUpdate'";
            errors.push(FieldError::invalid(
                "spec.updateStrategy.rollingUpdate",
                spec["updateStrategy"]["rollingUpdate"].clone(),
                text,
            ));
        }
        "OnDelete" => {}
        "RollingUpdate" => not_negative(
            &mut errors,
            spec,
            "/updateStrategy/rollingUpdate/partition",
            "spec.updateStrategy.rollingUpdate.partition",
        ),
        other => {
            let text = "must be 'RollingUpdate' or 'OnDelete'";
            errors.push(FieldError::invalid("spec.updateStrategy", json!({"type": other}), text));
        }
    }
    not_negative(&mut errors, spec, "/replicas", "spec.replicas");
    not_negative(&mut errors, spec, "/minReadySeconds", "spec.minReadySeconds");
    not_negative(&mut errors, spec, "/ordinals/start", "spec.ordinals.start");
    errors.extend(selector_and_template(context, spec, "statefulset", &["Always"]));
    errors
}

/// What of a StatefulSet's spec may change.
const STATEFUL_SET_MUTABLE: [&str; 7] = [
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "revisionHistoryLimit",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
];

fn stateful_set_update(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    if !context.subresource.is_empty() {
        return status_counts(new);
    }
    let mut errors = stateful_set(context, new);
    let fixed = |object: &Value| {
        let mut spec = object["spec"].clone();
        if let Some(map) = spec.as_object_mut() {
            map.retain(|key, _| !STATEFUL_SET_MUTABLE.contains(&key.as_str()));
        }
        spec
    };
    if fixed(new) != fixed(old) {
        let text = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";
        errors.push(FieldError::forbidden("spec", text));
    }
    errors
}
