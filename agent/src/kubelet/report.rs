//! How a computed status reaches the API: the smallest strategic merge patch, and what to think of the answer.

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use serde_json::{Map, Value, json};

use super::api::{ApiClient, ApiError, PatchType};
use super::containers;

/// Lists merged by key: a changed one is replaced as a whole.
const KEYED_LISTS: [&str; 3] = ["podIPs", "hostIPs", "resourceClaimStatuses"];

/// The patch that turns `old` into `new`; `None` when nothing changed.
pub fn patch(uid: &str, old: &PodStatus, new: &PodStatus) -> Option<Value> {
    let (old, new) = (object(old), object(new));
    let mut changes = Map::new();
    for (key, value) in &new {
        if old.get(key) == Some(value) {
            continue;
        }
        let value = match (key.as_str(), value) {
            ("conditions", Value::Array(list)) => match conditions(old.get(key), list) {
                Some(changed) => changed,
                None => continue,
            },
            (key, Value::Array(list)) if KEYED_LISTS.contains(&key) && old.contains_key(key) => {
                let mut list = list.clone();
                list.push(json!({"$patch": "replace"}));
                Value::Array(list)
            }
            _ => value.clone(),
        };
        changes.insert(key.clone(), value);
    }
    for key in old.keys().filter(|key| !new.contains_key(*key)) {
        changes.insert(key.clone(), Value::Null);
    }
    (!changes.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": changes}))
}

fn object(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// Conditions that changed, complete: fields that went away are null, because the list is merged.
fn conditions(old: Option<&Value>, new: &[Value]) -> Option<Value> {
    let old = old.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let mut changed = Vec::new();
    for condition in new {
        let before = old.iter().find(|before| before.get("type") == condition.get("type"));
        if before == Some(condition) {
            continue;
        }
        let mut condition = condition.clone();
        if let (Some(Value::Object(before)), Value::Object(after)) = (before, &mut condition) {
            for key in before.keys().filter(|key| !after.contains_key(*key)).cloned().collect::<Vec<_>>() {
                after.insert(key, Value::Null);
            }
        }
        changed.push(condition);
    }
    (!changed.is_empty()).then_some(Value::Array(changed))
}

/// Whether `new` says nothing but that a later generation was seen: worth reporting, but not at once.
pub fn is_only_newer(old: &PodStatus, new: &PodStatus) -> bool {
    let mut aged = new.clone();
    aged.observed_generation = old.observed_generation;
    for condition in aged.conditions.iter_mut().flatten() {
        let before = super::status::condition(old, &condition.type_);
        condition.observed_generation = before.and_then(|before| before.observed_generation);
    }
    patch("", old, &aged).is_none()
}

/// Whether the API shows something else than what was computed, in what the kubelet owns.
pub fn differs(uid: &str, api: &PodStatus, computed: &PodStatus) -> bool {
    patch(uid, api, computed).is_some()
}

/// Writes `new` over `old`. Answers the pod as it then is, `None` when there was nothing to write.
///
/// # Errors
/// 404 when the pod is gone, 409 when another of its name has taken its place.
pub async fn write(api: &ApiClient, pod: &Pod, old: &PodStatus, new: &PodStatus) -> Result<Option<Pod>, ApiError> {
    let Some(body) = patch(containers::uid(pod), old, new) else { return Ok(None) };
    let path = format!("/api/v1/namespaces/{}/pods/{}/status", containers::namespace(pod), containers::name(pod));
    api.patch(&path, PatchType::Strategic, &body).await.map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: Value) -> PodStatus {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_generation_alone_is_no_news() {
        let old = status(json!({"phase": "Running", "observedGeneration": 1,
            "conditions": [{"type": "Ready", "status": "True", "observedGeneration": 1}]}));
        let mut new = old.clone();
        new.observed_generation = Some(2);
        new.conditions.as_mut().unwrap()[0].observed_generation = Some(2);
        assert!(is_only_newer(&old, &new));
        new.phase = Some("Failed".into());
        assert!(!is_only_newer(&old, &new));
    }

    #[test]
    fn only_what_changed_is_sent() {
        let old = status(json!({"phase": "Pending", "reason": "x", "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "False", "reason": "r"}, {"type": "A", "status": "True"}]}));
        assert_eq!(patch("u", &old, &old), None);
        let new = status(json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.2"}],
            "conditions": [{"type": "Ready", "status": "True"}, {"type": "A", "status": "True"}]}));
        assert_eq!(
            patch("u", &old, &new).unwrap(),
            json!({"metadata": {"uid": "u"}, "status": {
                "phase": "Running", "reason": null,
                "podIPs": [{"ip": "10.0.0.2"}, {"$patch": "replace"}],
                "conditions": [{"type": "Ready", "status": "True", "reason": null}]
            }})
        );
    }
}
