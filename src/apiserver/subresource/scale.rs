//! The scale subresource: `autoscaling/v1` Scale as a window on `spec.replicas` of any workload.

use super::read_body;
use crate::apiserver::body::Body;
use crate::apiserver::call::Call;
use crate::apiserver::codec::{self, Kind};
use crate::apiserver::field::FieldError;
use crate::apiserver::metadata;
use crate::apiserver::object::{self, meta};
use crate::apiserver::options::WriteOptions;
use crate::apiserver::patch;
use crate::apiserver::read;
use crate::apiserver::status::Status;
use crate::apiserver::write;
use http::{Response, StatusCode};
use serde_json::{Value, json};

const SCALE: Kind<'static> = Kind { group: "autoscaling", version: "v1", kind: "Scale" };

/// A selector object, or a plain map of labels, as the text of a label selector.
pub fn selector_text(selector: Option<&Value>) -> String {
    let Some(selector) = selector.and_then(Value::as_object) else { return String::new() };
    let is_object = selector.get("matchLabels").is_some_and(Value::is_object)
        || selector.get("matchExpressions").is_some_and(Value::is_array);
    let labels = if is_object { selector.get("matchLabels").and_then(Value::as_object) } else { Some(selector) };
    let mut parts: Vec<(String, String)> = labels
        .into_iter()
        .flatten()
        .map(|(key, value)| (key.clone(), format!("{key}={}", value.as_str().unwrap_or_default())))
        .collect();
    let expressions = selector.get("matchExpressions").and_then(Value::as_array);
    for expression in expressions.into_iter().flatten() {
        let text = |key: &str| expression.get(key).and_then(Value::as_str).unwrap_or_default();
        let values = expression.get("values").and_then(Value::as_array);
        let mut values: Vec<&str> = values.into_iter().flatten().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let (key, values) = (text("key"), values.join(","));
        let part = match text("operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            _ => continue,
        };
        parts.push((key.to_owned(), part));
    }
    parts.sort();
    parts.into_iter().map(|(_, part)| part).collect::<Vec<_>>().join(",")
}

/// The Scale of a workload.
fn of(object: &Value) -> Value {
    let mut fields = json!({});
    for key in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        if let Some(value) = object.get("metadata").and_then(|m| m.get(key)) {
            fields[key] = value.clone();
        }
    }
    let replicas = |part: &str| object.get(part).and_then(|p| p.get("replicas")).and_then(Value::as_i64).unwrap_or(0);
    let mut spec = json!({});
    if replicas("spec") != 0 {
        spec["replicas"] = json!(replicas("spec"));
    }
    let mut status = json!({ "replicas": replicas("status") });
    let selector = selector_text(object.pointer("/spec/selector"));
    if !selector.is_empty() {
        status["selector"] = json!(selector);
    }
    json!({ "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": fields, "spec": spec, "status": status })
}

/// The workload with what a Scale says.
fn write_back(call: &Call<'_>, scale: &Value, old: &Value) -> Result<Value, Status> {
    let replicas = scale.pointer("/spec/replicas").and_then(Value::as_i64).unwrap_or(0);
    if replicas < 0 {
        let why = "must be greater than or equal to 0";
        let errors = vec![FieldError::invalid("spec.replicas", replicas, why)];
        return Err(Status::invalid("autoscaling", "Scale", &call.info.name, &errors));
    }
    let mut object = old.clone();
    object["spec"]["replicas"] = json!(replicas);
    for key in ["resourceVersion", "uid"] {
        let sent = meta(scale, key);
        if !sent.is_empty() {
            object["metadata"][key] = json!(sent);
        }
    }
    Ok(object)
}

/// get
pub async fn get(call: &Call<'_>) -> Result<Response<Body>, Status> {
    read::fresh(call, None).await?;
    let kv = call.server.backend().get(&call.key())?.ok_or_else(|| call.not_found())?;
    call.value(StatusCode::OK, &of(&object::decode_kv(&kv)?))
}

/// update
pub async fn update(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let options = WriteOptions::new(call.query, "UpdateOptions", false)?;
    let scale = read_body(call, SCALE, body, &options).await?;
    let name = meta(&scale, "name");
    if !name.is_empty() && name != call.info.name {
        return Err(Status::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.info.name
        )));
    }
    let change = |old: Option<&Value>| write_back(call, &scale, old.ok_or_else(|| call.not_found())?);
    answer(call, write::modify_existing(call, &options, &change).await?)
}

/// patch
pub async fn patch(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let request = patch::read(call, body).await?;
    let now = metadata::now();
    let change = |old: Option<&Value>| {
        let old = old.ok_or_else(|| call.not_found())?;
        let scale = patch::apply(call, &request, SCALE, Some(&of(old)), &now)?;
        write_back(call, &scale, old)
    };
    answer(call, write::modify_existing(call, &request.options, &change).await?)
}

fn answer(call: &Call<'_>, written: write::Written) -> Result<Response<Body>, Status> {
    let mut object = written.object()?;
    codec::from_storage(call.resource, call.info.version, &mut object);
    call.value(StatusCode::OK, &of(&object))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_read_as_text() {
        let selector = json!({ "matchLabels": { "b": "1" }, "matchExpressions": [
            { "key": "a", "operator": "In", "values": ["y", "x"] }, { "key": "c", "operator": "DoesNotExist" }] });
        assert_eq!(selector_text(Some(&selector)), "a in (x,y),b=1,!c");
        assert_eq!(selector_text(Some(&json!({ "app": "web" }))), "app=web");
    }
}
