//! `serviceaccounts/token`: a fresh token for a service account, bound to a pod, secret or node when asked.

use super::Identity;
use super::objects::{Meta, Metadata, ObjectError};
use super::reviews::Answers;
use super::service_account::{EXTENDED_EXPIRATION, ObjectRef, TokenSpec, WARN_ONLY_EXPIRATION};
use crate::admission::{Operation, Request};
use crate::apiserver::field::FieldError;
use crate::apiserver::status::Status;
use serde::Deserialize;
use serde_json::{Value, json};

const GROUP: &str = "authentication.k8s.io";
const KIND: &str = "TokenRequest";
/// What a request that does not say gets (seconds).
const DEFAULT_EXPIRATION: i64 = 60 * 60;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Pod {
    metadata: Meta,
    spec: PodSpec,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct PodSpec {
    service_account_name: String,
    node_name: String,
}

/// RFC 3339 in whole seconds, as `metav1.Time`.
pub(super) fn timestamp(at: jiff::Timestamp) -> String {
    jiff::Timestamp::from_second(at.as_second()).unwrap_or(at).to_string()
}

fn unreadable(error: ObjectError) -> Status {
    Status::internal(error)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or("")
}

pub(super) async fn issue(
    answers: &Answers,
    caller: &Identity,
    namespace: &str,
    name: &str,
    mut request: Value,
    dry_run: bool,
) -> Result<Value, Status> {
    for (key, wanted) in [("name", name), ("namespace", namespace)] {
        let given = text(&request["metadata"], key);
        if !given.is_empty() && given != wanted {
            let why = format!("must match the service account {key} if specified");
            let errors = vec![FieldError::invalid(format!("metadata.{key}"), given, why)];
            return Err(Status::invalid(GROUP, KIND, name, &errors));
        }
    }
    let objects = answers.authorizer.objects();
    let account: Option<Metadata> = objects.get("", "serviceaccounts", namespace, name).map_err(unreadable)?;
    let account = account.ok_or_else(|| Status::not_found("", "serviceaccounts", name))?.metadata;
    let uid = text(&request["metadata"], "uid");
    if !uid.is_empty() && uid != account.uid {
        let why = format!(
            "the UID in the token request ({uid}) does not match the UID of the service account ({})",
            account.uid
        );
        return Err(Status::conflict(GROUP, KIND, name, why));
    }
    prepare(&mut request, &account, namespace)?;
    let mut attributes = Request {
        identity: caller,
        operation: Operation::Create,
        group: "",
        version: "v1",
        resource: "serviceaccounts",
        subresource: "token",
        kind: KIND,
        namespace,
        name,
        object: &mut request,
        old: None,
        dry_run,
        options: None,
    };
    answers.admission.admit(&mut attributes).await?;
    // Only now: admission compares what a node asked for with what the pod's volume says, and both may say nothing.
    if request["spec"]["audiences"].as_array().is_none_or(Vec::is_empty) {
        request["spec"]["audiences"] = json!(answers.tokens.api_audiences());
    }

    let mut spec = TokenSpec {
        namespace: namespace.to_owned(),
        service_account: ObjectRef::from(&Meta { name: name.to_owned(), ..account }),
        audiences: request["spec"]["audiences"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|a| a.as_str().map(str::to_owned))
            .collect(),
        expiration: request["spec"]["expirationSeconds"].as_i64().unwrap_or(DEFAULT_EXPIRATION),
        ..TokenSpec::default()
    };
    bind(answers, &request["spec"]["boundObjectRef"], &mut spec)?;
    let asked = spec.expiration;
    let api = answers.tokens.api_audiences();
    if spec.pod.is_some() && asked == WARN_ONLY_EXPIRATION && spec.audiences.iter().all(|a| api.contains(a)) {
        (spec.warn_after, spec.expiration) = (asked, EXTENDED_EXPIRATION);
    }
    let token =
        answers.tokens.issue(&spec).map_err(|error| Status::internal(format!("failed to generate token: {error}")))?;
    let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(asked);
    request["status"] = json!({ "token": token, "expirationTimestamp": timestamp(expires) });
    Ok(request)
}

/// Fills in what the request left open and checks the rest.
fn prepare(request: &mut Value, account: &Meta, namespace: &str) -> Result<(), Status> {
    if !request["spec"].is_object() {
        request["spec"] = json!({});
    }
    if request["spec"]["expirationSeconds"].is_null() {
        request["spec"]["expirationSeconds"] = DEFAULT_EXPIRATION.into();
    }
    let metadata = &mut request["metadata"];
    metadata["name"] = account.name.as_str().into();
    metadata["namespace"] = namespace.into();
    metadata["uid"] = account.uid.as_str().into();
    metadata["creationTimestamp"] = timestamp(jiff::Timestamp::now()).into();
    let seconds = request["spec"]["expirationSeconds"].as_i64().unwrap_or(0);
    let why = if seconds < 600 {
        "may not specify a duration less than 10 minutes"
    } else if seconds > 1 << 32 {
        "may not specify a duration larger than 2^32 seconds"
    } else {
        return Ok(());
    };
    let errors = vec![FieldError::invalid("spec.expirationSeconds", seconds, why)];
    Err(Status::invalid(GROUP, KIND, "", &errors))
}

fn bind(answers: &Answers, bound: &Value, spec: &mut TokenSpec) -> Result<(), Status> {
    if !bound.is_object() {
        return Ok(());
    }
    let objects = answers.authorizer.objects();
    let (version, kind, name) = (text(bound, "apiVersion"), text(bound, "kind"), text(bound, "name"));
    let uid = match (version, kind) {
        ("v1", "Pod") => {
            let pod: Option<Pod> = objects.get("", "pods", &spec.namespace, name).map_err(unreadable)?;
            let pod = pod.ok_or_else(|| Status::not_found("", "pods", name))?;
            if pod.spec.service_account_name != spec.service_account.name {
                return Err(Status::bad_request(format!(
                    "cannot bind token for serviceaccount \"{}\" to pod running with different serviceaccount name.",
                    spec.service_account.name
                )));
            }
            if !pod.spec.node_name.is_empty() {
                let node: Option<Metadata> = objects.get("", "nodes", "", &pod.spec.node_name).map_err(unreadable)?;
                let uid = node.map(|node| node.metadata.uid).unwrap_or_default();
                spec.node = Some(ObjectRef { name: pod.spec.node_name, uid });
            }
            spec.pod = Some(ObjectRef::from(&pod.metadata));
            pod.metadata.uid
        }
        ("v1", "Node" | "Secret") => {
            let (plural, namespace) = if kind == "Node" { ("nodes", "") } else { ("secrets", &*spec.namespace) };
            let found: Option<Metadata> = objects.get("", plural, namespace, name).map_err(unreadable)?;
            let found = found.ok_or_else(|| Status::not_found("", plural, name))?.metadata;
            let target = if kind == "Node" { &mut spec.node } else { &mut spec.secret };
            *target = Some(ObjectRef::from(&found));
            found.uid
        }
        _ => {
            let (group, version) = version.split_once('/').unwrap_or(("", version));
            return Err(Status::bad_request(format!(
                "cannot bind token to object of type {group}/{version}, Kind={kind}"
            )));
        }
    };
    let wanted = text(bound, "uid");
    if !wanted.is_empty() && wanted != uid {
        let why = format!(
            "the UID in the bound object reference ({wanted}) does not match the UID in record. The object might have been deleted and then recreated"
        );
        return Err(Status::conflict(GROUP, KIND, name, why));
    }
    Ok(())
}
