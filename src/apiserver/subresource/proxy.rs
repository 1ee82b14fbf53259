//! `nodes/proxy`, `pods/proxy` and `services/proxy`: HTTP through the API server.

use super::connect::{self, Incoming};
use crate::apiserver::body::Body;
use crate::apiserver::call::Call;
use crate::apiserver::object::{self};
use crate::apiserver::scan;
use crate::apiserver::status::Status;
use coracle_store::{RangeRequest, prefix_end};
use http::uri::PathAndQuery;
use http::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use tokio::net::TcpStream;

/// How long a connection to a pod may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// `scheme:name:port`, of which scheme and port may be missing.
fn split(name: &str) -> Option<(&str, &str, &str)> {
    let parts: Vec<&str> = name.split(':').collect();
    match parts.as_slice() {
        [name] => Some(("", name, "")),
        [name, port] => Some(("", name, port)),
        [scheme @ ("" | "http" | "https"), name, port] => Some((scheme, name, port)),
        _ => None,
    }
}

/// Any method on a proxied path.
pub async fn proxy(call: &Call<'_>, incoming: Incoming) -> Result<Response<Body>, Status> {
    let invalid = || Status::bad_request(format!("invalid {} request \"{}\"", call.resource.singular, call.info.name));
    let (scheme, name, port) = split(&call.info.name).ok_or_else(invalid)?;
    let kind = call.subresource.map_or("", |s| s.kind);
    let path = format!("/{}", call.info.rest);
    connect::admit(call, &mut json!({ "apiVersion": "v1", "kind": kind, "path": path })).await?;
    // A path without the slash behind `proxy` is answered with the one that has it.
    if !call.info.has_rest && matches!(incoming.method, http::Method::GET | http::Method::HEAD) {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
        let location = format!("{}/{}", call.info.path, query_text(call));
        if let Ok(location) = header::HeaderValue::from_str(&location) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        return Ok(response);
    }
    let target = format!("{}{}", encode_path(&path), query_text(call));
    if call.resource.plural == "nodes" {
        return to_node(call, name, &target, incoming).await;
    }
    if scheme == "https" {
        return Err(Status::unavailable("proxying to https backends is not supported"));
    }
    let address = match &*call.resource.plural {
        "pods" => pod_address(call, name, port)?,
        _ => service_address(call, name, port)?,
    };
    to_address(address, &target, incoming).await
}

fn query_text(call: &Call<'_>) -> String {
    let pairs: Vec<String> = call
        .query
        .pairs()
        .map(|(key, value)| {
            format!("{}={}", crate::apiserver::query::encode(key), crate::apiserver::query::encode(value))
        })
        .collect();
    if pairs.is_empty() { String::new() } else { format!("?{}", pairs.join("&")) }
}

fn encode_path(path: &str) -> String {
    path.split('/').map(crate::apiserver::query::encode).collect::<Vec<_>>().join("/")
}

async fn to_node(call: &Call<'_>, node: &str, target: &str, incoming: Incoming) -> Result<Response<Body>, Status> {
    let key = call.resource.key("", node);
    if call.server.backend().get(&key)?.is_none() {
        return Err(Status::not_found("", "nodes", node));
    }
    let link = connect::link(call, node)?;
    if incoming.headers.contains_key(header::UPGRADE) {
        return connect::upgrade(&link, target, incoming).await;
    }
    let response = connect::send(&link, target, incoming.method, incoming.headers, incoming.body).await?;
    Ok(response.map(Body::new))
}

fn pod_address(call: &Call<'_>, name: &str, port: &str) -> Result<SocketAddr, Status> {
    let key = call.resource.key(call.namespace(), name);
    let kv = call.server.backend().get(&key)?.ok_or_else(|| Status::not_found("", "pods", name))?;
    let pod = object::decode_kv(&kv)?;
    let address = pod.pointer("/status/podIP").and_then(Value::as_str).unwrap_or_default();
    let address: IpAddr = address.parse().map_err(|_| Status::bad_request("address not allowed"))?;
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
    let ports = containers.into_iter().flatten().filter_map(|c| c["ports"].as_array()).flatten();
    let port = match port {
        "" => ports.filter_map(|p| p["containerPort"].as_u64()).next().unwrap_or(80),
        number if number.parse::<u16>().is_ok() => number.parse().unwrap_or(80),
        named => ports
            .filter(|p| p["name"] == named)
            .find_map(|p| p["containerPort"].as_u64())
            .ok_or_else(|| Status::bad_request(format!("pod \"{name}\" has no port \"{named}\"")))?,
    };
    Ok(SocketAddr::new(address, u16::try_from(port).unwrap_or(80)))
}

/// A ready endpoint of a Service, chosen at random.
fn service_address(call: &Call<'_>, name: &str, port: &str) -> Result<SocketAddr, Status> {
    let key = call.resource.key(call.namespace(), name);
    let kv = call.server.backend().get(&key)?.ok_or_else(|| Status::not_found("", "services", name))?;
    let service = object::decode_kv(&kv)?;
    let ports: Vec<&Value> = service.pointer("/spec/ports").and_then(Value::as_array).into_iter().flatten().collect();
    let wanted = match port {
        "" if ports.len() == 1 => Some(ports[0]),
        "" => None,
        number if number.parse::<u64>().is_ok() => {
            let number = number.parse::<u64>().ok();
            ports.iter().find(|p| p["port"].as_u64() == number).copied()
        }
        named => ports.iter().find(|p| p["name"] == named).copied(),
    };
    let none = || Status::unavailable(format!("no endpoints available for service \"{}\"", call.info.name));
    let Some(wanted) = wanted else {
        return Err(Status::unavailable(format!("no service port \"{port}\" found for service \"{name}\"")));
    };
    let port_name = wanted["name"].as_str().unwrap_or_default();
    let snapshot = call.server.registry().snapshot();
    let slices = snapshot.find("discovery.k8s.io", "v1", "endpointslices").ok_or_else(none)?;
    let start = slices.collection_key(call.namespace());
    let end = prefix_end(&start);
    let range = call.server.backend().range(&RangeRequest { start, end, ..RangeRequest::default() })?;
    let mut found = Vec::new();
    for kv in &range.kvs {
        let label = scan::text(&kv.value, &["metadata", "labels", "kubernetes.io/service-name"]);
        if label.as_deref() != Some(name) {
            continue;
        }
        let slice = object::decode_kv(kv)?;
        let slice_ports = slice["ports"].as_array();
        let number = slice_ports
            .into_iter()
            .flatten()
            .find(|p| p["name"].as_str().unwrap_or_default() == port_name)
            .and_then(|p| p["port"].as_u64());
        let Some(number) = number.and_then(|n| u16::try_from(n).ok()) else { continue };
        for endpoint in slice["endpoints"].as_array().into_iter().flatten() {
            if endpoint.pointer("/conditions/ready") == Some(&json!(false)) {
                continue;
            }
            let address = endpoint.pointer("/addresses/0").and_then(Value::as_str).and_then(|a| a.parse().ok());
            found.extend(address.map(|address| SocketAddr::new(address, number)));
        }
    }
    if found.is_empty() {
        return Err(none());
    }
    Ok(found.swap_remove(rand::random_range(0..found.len())))
}

async fn to_address(address: SocketAddr, target: &str, incoming: Incoming) -> Result<Response<Body>, Status> {
    let failed = |error: &dyn std::fmt::Display| {
        Status::unavailable(format!("error trying to reach service: dial tcp {address}: {error}"))
    };
    let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
        .await
        .map_err(|_| failed(&"i/o timeout"))?
        .map_err(|error| failed(&error))?;
    let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
        .preserve_header_case(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "proxied connection ended");
        }
    });
    let path: PathAndQuery = target.parse().map_err(|_| Status::bad_request("the path does not decode"))?;
    let mut request =
        Request::builder().method(incoming.method).uri(path.as_str()).body(incoming.body).map_err(Status::internal)?;
    *request.headers_mut() = incoming.headers;
    let headers = request.headers_mut();
    headers.remove(header::AUTHORIZATION);
    let host = header::HeaderValue::from_str(&address.to_string()).map_err(Status::internal)?;
    headers.insert(header::HOST, host);
    let upgrades = headers.contains_key(header::UPGRADE);
    let mut response = sender.send_request(request).await.map_err(|error| failed(&error))?;
    if upgrades && response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(client) = incoming.upgrade else {
            return Err(Status::bad_request("this connection cannot be upgraded"));
        };
        let pod = hyper::upgrade::on(&mut response);
        tokio::spawn(connect::splice(client, pod));
    }
    Ok(response.map(Body::new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_scheme_and_port() {
        assert_eq!(split("web"), Some(("", "web", "")));
        assert_eq!(split("web:80"), Some(("", "web", "80")));
        assert_eq!(split("https:web:"), Some(("https", "web", "")));
        assert_eq!(split("ftp:web:80"), None);
        assert_eq!(encode_path("/a b/c"), "/a%20b/c");
    }
}
