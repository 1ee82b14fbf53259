//! log, exec, attach and portforward: requests that go on to the node of a pod, and `nodes/proxy`. After a `101` the bytes of both sides are
//! spliced; WebSocket and SPDY are the node's business.

use crate::admission::{Operation, Request as AdmissionRequest};
use crate::apiserver::body::Body;
use crate::apiserver::call::{Call, respond};
use crate::apiserver::field::FieldError;
use crate::apiserver::object::{self, meta};
use crate::apiserver::query;
use crate::apiserver::resources::SubresourceKind;
use crate::apiserver::status::Status;
use crate::apiserver::subresource::log_socket;
use coracle_agent::{NodeLink, websocket};
use http::{HeaderMap, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

/// Most of a node's error text that is read.
const ERROR_TEXT_MAX: usize = 64 * 1024;

/// What arrives with a request that may be upgraded.
pub struct Incoming {
    pub method: http::Method,
    pub headers: HeaderMap,
    /// The other half of the client's connection, if it can be taken over.
    pub upgrade: Option<hyper::upgrade::OnUpgrade>,
    pub body: Body,
}

/// Sends a request on to where it is answered.
pub async fn connect(call: &Call<'_>, incoming: Incoming) -> Result<Response<Body>, Status> {
    let Some(subresource) = call.subresource else { return Err(Status::no_such_resource()) };
    if subresource.does == SubresourceKind::Proxy {
        return super::proxy::proxy(call, incoming).await;
    }
    let kv = call.server.backend().get(&call.key())?;
    let kv = match kv {
        Some(kv) => kv,
        None => {
            call.server.backend().barrier().await?;
            call.server.backend().get(&call.key())?.ok_or_else(|| call.not_found())?
        }
    };
    let pod = object::decode_kv(&kv)?;
    match subresource.does {
        SubresourceKind::Log => log(call, &pod, incoming).await,
        SubresourceKind::Exec | SubresourceKind::Attach => stream(call, &pod, incoming).await,
        SubresourceKind::PortForward => port_forward(call, &pod, incoming).await,
        _ => Err(Status::method_not_allowed()),
    }
}

fn node_of(pod: &Value) -> &str {
    pod.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default()
}

fn names(pod: &Value, list: &str) -> Vec<String> {
    let containers = pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array);
    containers.into_iter().flatten().filter_map(|c| c["name"].as_str()).map(str::to_owned).collect()
}

/// The container that a request means.
fn container(pod: &Value, asked: Option<&str>) -> Result<String, Status> {
    let name = meta(pod, "name");
    let containers = names(pod, "containers");
    match asked.filter(|a| !a.is_empty()) {
        Some(asked) => {
            let known = ["containers", "initContainers", "ephemeralContainers"];
            if known.iter().any(|list| names(pod, list).iter().any(|c| c == asked)) {
                return Ok(asked.to_owned());
            }
            Err(Status::bad_request(format!("container {asked} is not valid for pod {name}")))
        }
        None => match containers.as_slice() {
            [one] => Ok(one.clone()),
            [] => Err(Status::bad_request(format!("a container name must be specified for pod {name}"))),
            _ => {
                let mut text = format!(
                    "a container name must be specified for pod {name}, choose one of: [{}]",
                    containers.join(" ")
                );
                let init = names(pod, "initContainers");
                if !init.is_empty() {
                    text.push_str(&format!(" or one of the init containers: [{}]", init.join(" ")));
                }
                Err(Status::bad_request(text))
            }
        },
    }
}

/// Asks admission about a connection.
pub async fn admit(call: &Call<'_>, options: &mut Value) -> Result<(), Status> {
    let kind = call.subresource.map_or("", |s| s.kind);
    let mut request = AdmissionRequest {
        identity: call.identity,
        operation: Operation::Connect,
        group: &call.resource.group,
        version: call.info.version,
        resource: &call.resource.plural,
        subresource: call.subresource_name(),
        kind,
        namespace: call.info.namespace,
        name: &call.info.name,
        object: options,
        old: None,
        dry_run: false,
        options: None,
    };
    call.warn(call.server.admission().admit(&mut request).await?);
    Ok(())
}

/// The link to a node.
pub fn link(call: &Call<'_>, node: &str) -> Result<NodeLink, Status> {
    call.server.links().get(node).ok_or_else(|| {
        let text = format!("error dialing backend: no connection to node \"{node}\"");
        Status::new(StatusCode::BAD_GATEWAY, "", text)
    })
}

const LOG_PARAMETERS: [&str; 8] =
    ["follow", "previous", "sinceSeconds", "sinceTime", "timestamps", "tailLines", "limitBytes", "stream"];

/// `pods/log`
async fn log(call: &Call<'_>, pod: &Value, incoming: Incoming) -> Result<Response<Body>, Status> {
    check_log_options(call)?;
    let container = container(pod, call.query.get("container"))?;
    let node = node_of(pod);
    if node.is_empty() {
        // Nothing runs yet, so nothing was written.
        return Ok(respond(StatusCode::OK, "text/plain", Body::empty()));
    }
    let mut parameters = Vec::new();
    for name in LOG_PARAMETERS {
        let Some(value) = call.query.get(name) else { continue };
        match name {
            "follow" | "previous" | "timestamps" => {
                if call.query.bool(name) {
                    parameters.push(format!("{name}=true"));
                }
            }
            _ => parameters.push(format!("{name}={}", query::encode(value))),
        }
    }
    let path = path("containerLogs", pod, &[&container], &parameters);
    let socket = websocket::is_wanted(&incoming.headers).then(|| log_socket::Form::choose(&incoming.headers));
    let socket = socket.transpose()?;
    let mut headers = incoming.headers.clone();
    for name in [header::ACCEPT_ENCODING, header::CONNECTION, header::UPGRADE] {
        headers.remove(name);
    }
    let response = send(&link(call, node)?, &path, http::Method::GET, headers, Body::empty()).await?;
    if !response.status().is_success() {
        return Err(node_error(response).await);
    }
    if let Some(form) = socket {
        return log_socket::answer(&incoming.headers, form, incoming.upgrade, response.into_body());
    }
    let mut answer = Response::new(Body::new(response.into_body()));
    answer.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    Ok(answer)
}

fn check_log_options(call: &Call<'_>) -> Result<(), Status> {
    let mut errors = Vec::new();
    let at_least = |field: &str, least: i64, errors: &mut Vec<FieldError>| -> Result<(), Status> {
        if let Some(value) = call.query.int(field)?.filter(|value| *value < least) {
            let why = if least == 0 { "must be greater than or equal to 0" } else { "must be greater than 0" };
            errors.push(FieldError::invalid(field, value, why));
        }
        Ok(())
    };
    at_least("tailLines", 0, &mut errors)?;
    at_least("limitBytes", 1, &mut errors)?;
    if call.query.get("sinceSeconds").is_some() && call.query.get("sinceTime").is_some() {
        errors.push(FieldError::forbidden("", "at most one of `sinceTime` or `sinceSeconds` may be specified"));
    } else {
        at_least("sinceSeconds", 1, &mut errors)?;
    }
    if let Some(stream) = call.query.get("stream") {
        if !matches!(stream, "All" | "Stdout" | "Stderr") {
            errors.push(FieldError::not_supported("stream", stream, &["All", "Stderr", "Stdout"]));
        } else if stream != "All" && call.query.get("tailLines").is_some() {
            errors.push(FieldError::forbidden("", "`tailLines` and specific `stream` are mutually exclusive for now"));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid("", "PodLogOptions", &call.info.name, &errors)) }
}

/// `pods/exec` and `pods/attach`
async fn stream(call: &Call<'_>, pod: &Value, incoming: Incoming) -> Result<Response<Body>, Status> {
    let flag = |name: &str, default: bool| call.query.optional_bool(name).unwrap_or(default);
    let exec = call.subresource_name() == "exec";
    // Go's defaults of PodExecOptions and PodAttachOptions.
    let (stdin, tty) = (flag("stdin", false), flag("tty", false));
    let (stdout, stderr) = (flag("stdout", true), flag("stderr", true));
    if !stdin && !stdout && !stderr {
        return Err(Status::bad_request("you must specify at least 1 of stdin, stdout, stderr"));
    }
    let container = container(pod, call.query.get("container"))?;
    let command: Vec<&str> = call.query.all("command").collect();
    let node = node_of(pod);
    if node.is_empty() {
        return Err(Status::bad_request(format!("pod {} does not have a host assigned", meta(pod, "name"))));
    }
    let kind = if exec { "PodExecOptions" } else { "PodAttachOptions" };
    let mut options = json!({ "apiVersion": "v1", "kind": kind, "container": container });
    for (name, value) in [("stdin", stdin), ("stdout", stdout), ("stderr", stderr), ("tty", tty)] {
        if value {
            options[name] = json!(true);
        }
    }
    if exec {
        options["command"] = json!(command);
    }
    admit(call, &mut options).await?;
    // The kubelet's names of the streams.
    let mut parameters: Vec<String> = [("input", stdin), ("output", stdout), ("error", stderr && !tty), ("tty", tty)]
        .into_iter()
        .filter(|(_, on)| *on)
        .map(|(name, _)| format!("{name}=1"))
        .collect();
    parameters.extend(command.iter().map(|c| format!("command={}", query::encode(c))));
    let path = path(call.subresource_name(), pod, &[&container], &parameters);
    upgrade(&link(call, node)?, &path, incoming).await
}

/// `pods/portforward`
async fn port_forward(call: &Call<'_>, pod: &Value, incoming: Incoming) -> Result<Response<Body>, Status> {
    let node = node_of(pod);
    if node.is_empty() {
        return Err(Status::bad_request(format!("pod {} does not have a host assigned", meta(pod, "name"))));
    }
    let ports: Vec<&str> = call.query.all("ports").collect();
    admit(call, &mut json!({ "apiVersion": "v1", "kind": "PodPortForwardOptions", "ports": ports })).await?;
    let parameters: Vec<String> = ports.iter().map(|p| format!("port={}", query::encode(p))).collect();
    upgrade(&link(call, node)?, &path("portForward", pod, &[], &parameters), incoming).await
}

/// A path of the kubelet about a pod.
fn path(endpoint: &str, pod: &Value, more: &[&str], parameters: &[String]) -> String {
    let mut path = format!("/{endpoint}/{}/{}", meta(pod, "namespace"), meta(pod, "name"));
    for part in more {
        path.push('/');
        path.push_str(part);
    }
    if !parameters.is_empty() {
        path.push('?');
        path.push_str(&parameters.join("&"));
    }
    path
}

/// One request to a node.
pub async fn send(
    link: &NodeLink,
    path: &str,
    method: http::Method,
    mut headers: HeaderMap,
    body: Body,
) -> Result<Response<hyper::body::Incoming>, Status> {
    // Who the client is has been settled here.
    headers.remove(header::AUTHORIZATION);
    headers.insert(header::HOST, header::HeaderValue::from_static("node"));
    let mut request = Request::builder().method(method).uri(path).body(body).map_err(Status::internal)?;
    *request.headers_mut() = headers;
    let failed = |error| Status::new(StatusCode::BAD_GATEWAY, "", format!("error dialing backend: {error}"));
    link.send(request).await.map_err(failed)
}

/// What a node's refusal means to the client.
async fn node_error(response: Response<hyper::body::Incoming>) -> Status {
    let code = response.status();
    let text = Body::new(response.into_body()).collect(ERROR_TEXT_MAX).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text).trim().to_owned();
    match code {
        StatusCode::BAD_REQUEST => Status::bad_request(text),
        StatusCode::INTERNAL_SERVER_ERROR => Status::internal(text),
        StatusCode::NOT_FOUND => {
            Status::new(code, "NotFound", format!("the server could not find the requested resource: {text}"))
        }
        code => Status::new(code, "", text),
    }
}

/// Sends a request that switches protocols, and splices both connections once it has.
pub async fn upgrade(link: &NodeLink, path: &str, incoming: Incoming) -> Result<Response<Body>, Status> {
    let Incoming { method, headers, upgrade, body } = incoming;
    let wants = headers.get(header::CONNECTION).and_then(|h| h.to_str().ok()).unwrap_or_default();
    if !wants.to_ascii_lowercase().contains("upgrade") || !headers.contains_key(header::UPGRADE) {
        return Err(Status::bad_request("Upgrade request required"));
    }
    let Some(client) = upgrade else {
        return Err(Status::bad_request("this connection cannot be upgraded"));
    };
    let _ = body;
    let mut response = send(link, path, method, headers, Body::empty()).await?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(node_error(response).await);
    }
    let node = hyper::upgrade::on(&mut response);
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *answer.headers_mut() = response.headers().clone();
    tokio::spawn(splice(client, node));
    Ok(answer)
}

/// Copies between two connections that switched protocols, until both are done.
pub async fn splice(client: hyper::upgrade::OnUpgrade, other: hyper::upgrade::OnUpgrade) {
    let (client, other) = match tokio::try_join!(client, other) {
        Ok(both) => both,
        Err(error) => {
            tracing::debug!(%error, "upgrade failed");
            return;
        }
    };
    let (mut client, mut other) = (TokioIo::new(client), TokioIo::new(other));
    if let Err(error) = tokio::io::copy_bidirectional(&mut client, &mut other).await {
        tracing::debug!(%error, "spliced connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_container_is_named_or_the_only_one() {
        let pod = |names: &[&str]| {
            let containers: Vec<Value> = names.iter().map(|n| json!({ "name": n })).collect();
            json!({ "metadata": { "name": "p", "namespace": "d" },
                "spec": { "containers": containers, "initContainers": [{ "name": "i" }] } })
        };
        assert_eq!(container(&pod(&["a"]), None).unwrap(), "a");
        assert_eq!(container(&pod(&["a", "b"]), Some("i")).unwrap(), "i");
        assert_eq!(
            container(&pod(&["a", "b"]), None).unwrap_err().message(),
            "a container name must be specified for pod p, choose one of: [a b] or one of the init containers: [i]"
        );
        assert_eq!(container(&pod(&["a"]), Some("x")).unwrap_err().message(), "container x is not valid for pod p");
        assert_eq!(path("exec", &pod(&["a"]), &["a"], &["tty=1".into()]), "/exec/d/p/a?tty=1");
    }
}
