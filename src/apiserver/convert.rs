//! Conversion between served versions and the storage version, for the few kinds that have more than one shape.
//! Everything else (custom resources without a webhook) only changes its `apiVersion`.

use super::resources::Resource;
use serde_json::{Map, Value, json};

/// Annotation that keeps what version 1 of the autoscaler cannot say.
const METRICS: &str = "autoscaling.alpha.kubernetes.io/metrics";
const CONDITIONS: &str = "autoscaling.alpha.kubernetes.io/conditions";
const CURRENT_METRICS: &str = "autoscaling.alpha.kubernetes.io/current-metrics";
const BEHAVIOR: &str = "autoscaling.alpha.kubernetes.io/behavior";

/// From a served version to the storage version, in place.
pub fn to_storage(resource: &Resource, version: &str, object: &mut Value) {
    match (&*resource.group, &*resource.kind, version) {
        ("events.k8s.io", "Event", _) => rename(object, &EVENT_NAMES),
        ("autoscaling", "HorizontalPodAutoscaler", "v1") => autoscaler_from_v1(object),
        _ => {}
    }
    object["apiVersion"] = Value::String(resource.storage_api_version());
}

/// From the storage version to a served version, in place.
pub fn from_storage(resource: &Resource, version: &str, object: &mut Value) {
    match (&*resource.group, &*resource.kind, version) {
        ("events.k8s.io", "Event", _) => {
            let back: Vec<(&str, &str)> = EVENT_NAMES.iter().map(|(new, old)| (*old, *new)).collect();
            rename(object, &back);
        }
        ("autoscaling", "HorizontalPodAutoscaler", "v1") => autoscaler_to_v1(object),
        _ => {}
    }
    object["apiVersion"] = Value::String(resource.api_version(version));
}

/// The fields of `events.k8s.io/v1` and what core calls them.
const EVENT_NAMES: [(&str, &str); 7] = [
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

fn rename(object: &mut Value, names: &[(&str, &str)]) {
    let Some(fields) = object.as_object_mut() else { return };
    for (from, to) in names {
        if let Some(value) = fields.remove(*from) {
            fields.insert((*to).to_owned(), value);
        }
    }
}

fn annotations(object: &mut Value) -> Option<&mut Map<String, Value>> {
    object.get_mut("metadata")?.get_mut("annotations")?.as_object_mut()
}

fn take_annotation(object: &mut Value, key: &str) -> Option<Value> {
    let annotations = annotations(object)?;
    let text = annotations.remove(key)?;
    let empty = annotations.is_empty();
    if empty && let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("annotations");
    }
    serde_json::from_str(text.as_str()?).ok()
}

fn put_annotation(object: &mut Value, key: &str, value: &Value) {
    if !object["metadata"]["annotations"].is_object() {
        object["metadata"]["annotations"] = json!({});
    }
    object["metadata"]["annotations"][key] = Value::String(value.to_string());
}

fn autoscaler_from_v1(object: &mut Value) {
    let mut metrics: Vec<Value> = Vec::new();
    if let Some(cpu) = object["spec"].as_object_mut().and_then(|s| s.remove("targetCPUUtilizationPercentage")) {
        metrics.push(json!({ "type": "Resource", "resource": { "name": "cpu",
            "target": { "type": "Utilization", "averageUtilization": cpu } } }));
    }
    if let Some(Value::Array(more)) = take_annotation(object, METRICS) {
        metrics.extend(more);
    }
    if !metrics.is_empty() {
        object["spec"]["metrics"] = Value::Array(metrics);
    }
    if let Some(behavior) = take_annotation(object, BEHAVIOR) {
        object["spec"]["behavior"] = behavior;
    }
    let mut current: Vec<Value> = Vec::new();
    let cpu = object.get_mut("status").and_then(Value::as_object_mut);
    if let Some(cpu) = cpu.and_then(|s| s.remove("currentCPUUtilizationPercentage")) {
        current.push(json!({ "type": "Resource", "resource": { "name": "cpu",
            "current": { "averageUtilization": cpu, "averageValue": "0" } } }));
    }
    if let Some(Value::Array(more)) = take_annotation(object, CURRENT_METRICS) {
        current.extend(more);
    }
    if !current.is_empty() {
        object["status"]["currentMetrics"] = Value::Array(current);
    }
    if let Some(conditions) = take_annotation(object, CONDITIONS) {
        object["status"]["conditions"] = conditions;
    }
}

fn is_cpu(metric: &Value, value: &str) -> bool {
    metric["type"] == "Resource"
        && metric["resource"]["name"] == "cpu"
        && metric["resource"].pointer(value).is_some_and(|v| !v.is_null())
}

fn autoscaler_to_v1(object: &mut Value) {
    let mut take =
        |part: &str, key: &str| object.get_mut(part).and_then(Value::as_object_mut).and_then(|p| p.remove(key));
    let metrics = take("spec", "metrics");
    let behavior = take("spec", "behavior");
    let current = take("status", "currentMetrics");
    let conditions = take("status", "conditions");
    for (list, part, field, pointer, annotation) in [
        (metrics, "spec", "targetCPUUtilizationPercentage", "/target/averageUtilization", METRICS),
        (current, "status", "currentCPUUtilizationPercentage", "/current/averageUtilization", CURRENT_METRICS),
    ] {
        let Some(Value::Array(mut list)) = list else { continue };
        if let Some(at) = list.iter().position(|m| is_cpu(m, pointer)) {
            let cpu = list.remove(at);
            object[part][field] = cpu["resource"].pointer(pointer).cloned().unwrap_or(Value::Null);
        }
        if !list.is_empty() {
            put_annotation(object, annotation, &Value::Array(list));
        }
    }
    if let Some(behavior) = behavior {
        put_annotation(object, BEHAVIOR, &behavior);
    }
    if let Some(conditions) = conditions.filter(|c| c.as_array().is_some_and(|c| !c.is_empty())) {
        put_annotation(object, CONDITIONS, &conditions);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;

    #[test]
    fn versions_convert_there_and_back() {
        let find = |group: &str, kind: &str| RESOURCES.iter().find(|r| r.group == group && r.kind == kind).unwrap();
        let hpa = find("autoscaling", "HorizontalPodAutoscaler");
        let v1 = json!({ "apiVersion": "autoscaling/v1", "kind": "HorizontalPodAutoscaler", "metadata": {},
            "spec": { "maxReplicas": 3, "targetCPUUtilizationPercentage": 80 }, "status": {} });
        let mut object = v1.clone();
        to_storage(hpa, "v1", &mut object);
        assert_eq!(object["apiVersion"], "autoscaling/v2");
        assert_eq!(object["spec"]["metrics"][0]["resource"]["target"]["averageUtilization"], 80);
        from_storage(hpa, "v1", &mut object);
        assert_eq!(object, v1);
        let events = find("events.k8s.io", "Event");
        let mut event = json!({ "apiVersion": "events.k8s.io/v1", "regarding": { "name": "p" }, "note": "n" });
        to_storage(events, "v1", &mut event);
        assert_eq!(event, json!({ "apiVersion": "v1", "involvedObject": { "name": "p" }, "message": "n" }));
    }
}
