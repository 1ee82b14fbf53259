//! `/api`, `/apis` and below: what is served, plain and aggregated (`apidiscovery.k8s.io`), with ETags.

use super::body::Body;
use super::call::respond;
use super::negotiate::{Format, clauses};
use super::registry::{Group, Snapshot};
use super::resources::Resource;
use super::status::Status;
use base64::Engine;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What a client wants of discovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Plain,
    /// Version of `apidiscovery.k8s.io`.
    Aggregated(&'static str),
}

fn shape(headers: &HeaderMap) -> Result<Shape, Status> {
    for clause in clauses(headers) {
        if !matches!(clause.format(), Some(Format::Json)) {
            continue;
        }
        match (clause.parameter("as"), clause.parameter("g"), clause.parameter("v")) {
            ("", ..) => return Ok(Shape::Plain),
            ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2") => return Ok(Shape::Aggregated("v2")),
            ("APIGroupDiscoveryList", "apidiscovery.k8s.io", "v2beta1") => return Ok(Shape::Aggregated("v2beta1")),
            _ => {}
        }
    }
    Err(Status::not_acceptable(&["application/json"]))
}

/// Answers a discovery path; none when it is no such path.
pub fn answer(
    snapshot: &Snapshot,
    path: &str,
    headers: &HeaderMap,
    address: &str,
) -> Option<Result<Response<Body>, Status>> {
    let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
    let plain = |value: Option<Value>| {
        value.map(|v| Ok(respond(StatusCode::OK, "application/json", (v.to_string() + "\n").into())))
    };
    match parts.as_slice() {
        ["api"] => Some(top(headers, || core_versions(address), || aggregated(snapshot, true))),
        ["apis"] => Some(top(headers, || groups(snapshot), || aggregated(snapshot, false))),
        ["apis", group] => plain(snapshot.find_group(group).filter(|g| !g.name.is_empty()).map(|g| {
            let mut value = group_value(g);
            value["kind"] = json!("APIGroup");
            value["apiVersion"] = json!("v1");
            value
        })),
        ["api", version] => plain(snapshot.find_group("").and_then(|g| resource_list(g, version))),
        ["apis", group, version] => plain(snapshot.find_group(group).and_then(|g| resource_list(g, version))),
        _ => None,
    }
}

fn top(
    headers: &HeaderMap,
    plain: impl FnOnce() -> Value,
    aggregated: impl FnOnce() -> Vec<Value>,
) -> Result<Response<Body>, Status> {
    let mut response = match shape(headers)? {
        Shape::Plain => respond(StatusCode::OK, "application/json", (plain().to_string() + "\n").into()),
        Shape::Aggregated(version) => {
            let list = json!({ "kind": "APIGroupDiscoveryList",
                "apiVersion": format!("apidiscovery.k8s.io/{version}"), "metadata": {}, "items": aggregated() });
            let bytes = list.to_string();
            let digest = Sha256::digest(bytes.as_bytes());
            let etag = format!("\"{}\"", base64::engine::general_purpose::STANDARD.encode(digest));
            let media_type = match version {
                "v2" => "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
                _ => "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList",
            };
            let unchanged = headers.get(header::IF_NONE_MATCH).is_some_and(|h| h.as_bytes() == etag.as_bytes());
            let mut response = if unchanged {
                respond(StatusCode::NOT_MODIFIED, media_type, Body::empty())
            } else {
                respond(StatusCode::OK, media_type, (bytes + "\n").into())
            };
            if let Ok(value) = HeaderValue::from_str(&etag) {
                response.headers_mut().insert(header::ETAG, value);
            }
            response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("public"));
            response
        }
    };
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

fn core_versions(address: &str) -> Value {
    json!({ "kind": "APIVersions", "versions": ["v1"],
        "serverAddressByClientCIDRs": [{ "clientCIDR": "0.0.0.0/0", "serverAddress": address }] })
}

fn group_value(group: &Group) -> Value {
    let version = |v: &String| json!({ "groupVersion": format!("{}/{v}", group.name), "version": v });
    json!({
        "name": group.name,
        "versions": group.versions.iter().map(version).collect::<Vec<_>>(),
        "preferredVersion": group.versions.first().map(version),
    })
}

fn groups(snapshot: &Snapshot) -> Value {
    let groups: Vec<Value> = snapshot.groups().filter(|g| !g.name.is_empty()).map(group_value).collect();
    json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups })
}

fn resource_list(group: &Group, version: &str) -> Option<Value> {
    if !group.versions.iter().any(|v| v == version) {
        return None;
    }
    let mut resources: Vec<Value> = Vec::new();
    for resource in group.of_version(version) {
        let namespaced = resource.is_namespaced();
        let mut row = json!({ "name": resource.plural, "singularName": resource.singular, "namespaced": namespaced,
            "kind": resource.kind, "verbs": resource.verbs.names().collect::<Vec<_>>() });
        if !resource.short_names.is_empty() {
            row["shortNames"] = json!(resource.short_names);
        }
        if !resource.categories.is_empty() {
            row["categories"] = json!(resource.categories);
        }
        if resource.answers.is_none() {
            row["storageVersionHash"] = json!(storage_hash(resource));
        }
        resources.push(row);
        let mut subresources: Vec<_> = resource.subresources.iter().collect();
        subresources.sort_by_key(|s| s.name);
        for sub in subresources {
            let kind = if sub.kind.is_empty() { &*resource.kind } else { sub.kind };
            let mut row = json!({ "name": format!("{}/{}", resource.plural, sub.name), "singularName": "",
                "namespaced": namespaced, "kind": kind, "verbs": sub.verbs.names().collect::<Vec<_>>() });
            if !sub.version.is_empty() {
                row["group"] = json!(sub.group);
                row["version"] = json!(sub.version);
            }
            resources.push(row);
        }
    }
    let group_version = if group.name.is_empty() { version.to_owned() } else { format!("{}/{version}", group.name) };
    let mut list = json!({ "kind": "APIResourceList", "groupVersion": group_version, "resources": resources });
    // The core group's list is older than the field.
    if !group.name.is_empty() {
        list["apiVersion"] = json!("v1");
    }
    Some(list)
}

/// Upstream's hash: the first eight bytes of the sha256 of `group/version/kind` of the storage version.
fn storage_hash(resource: &Resource) -> String {
    let (group, version) =
        if resource.shares_storage() { ("", "v1") } else { (&*resource.group, &*resource.storage_version) };
    let digest = Sha256::digest(format!("{group}/{version}/{}", resource.kind));
    base64::engine::general_purpose::STANDARD.encode(&digest[..8])
}

fn aggregated(snapshot: &Snapshot, core: bool) -> Vec<Value> {
    snapshot
        .groups()
        .filter(|g| g.name.is_empty() == core)
        .map(|group| {
            let versions: Vec<Value> = group
                .versions
                .iter()
                .map(|version| {
                    let resources: Vec<Value> =
                        group.of_version(version).map(|r| aggregated_resource(group, version, r)).collect();
                    json!({ "version": version, "resources": resources, "freshness": "Current" })
                })
                .collect();
            let metadata = if core {
                json!({ "creationTimestamp": null })
            } else {
                json!({ "name": group.name, "creationTimestamp": null })
            };
            json!({ "metadata": metadata, "versions": versions })
        })
        .collect()
}

fn aggregated_resource(group: &Group, version: &str, resource: &Resource) -> Value {
    let scope = if resource.is_namespaced() { "Namespaced" } else { "Cluster" };
    let mut row = json!({
        "resource": resource.plural,
        "responseKind": { "group": group.name, "version": version, "kind": resource.kind },
        "scope": scope,
        "singularResource": resource.singular,
        "verbs": resource.verbs.names().collect::<Vec<_>>(),
    });
    if !resource.short_names.is_empty() {
        row["shortNames"] = json!(resource.short_names);
    }
    if !resource.categories.is_empty() {
        row["categories"] = json!(resource.categories);
    }
    let mut subresources: Vec<_> = resource.subresources.iter().collect();
    subresources.sort_by_key(|s| s.name);
    let subresources: Vec<Value> = subresources
        .into_iter()
        .map(|sub| {
            let kind = if sub.kind.is_empty() { &*resource.kind } else { sub.kind };
            let (group, version) =
                if sub.version.is_empty() { (group.name.as_str(), version) } else { (sub.group, sub.version) };
            json!({ "subresource": sub.name, "responseKind": { "group": group, "version": version, "kind": kind },
                "verbs": sub.verbs.names().collect::<Vec<_>>() })
        })
        .collect();
    if !subresources.is_empty() {
        row["subresources"] = Value::Array(subresources);
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::registry::Registry;

    #[tokio::test]
    async fn discovery_is_plain_or_aggregated() {
        let snapshot = Registry::default().snapshot();
        let read = async |path: &str, accept: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, accept.parse().unwrap());
            let response = answer(&snapshot, path, &headers, "10.0.0.1:6443").unwrap().unwrap();
            let etag = response.headers().get(header::ETAG).cloned();
            let bytes = response.into_body().collect(1 << 20).await.unwrap();
            (serde_json::from_slice::<Value>(&bytes).unwrap(), etag)
        };
        let (list, _) = read("/api/v1", "application/json").await;
        let names: Vec<&str> =
            list["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
        assert!(names.contains(&"pods/exec") && names.contains(&"configmaps"));
        let (apps, _) = read("/apis/apps", "*/*").await;
        assert_eq!(apps["preferredVersion"]["groupVersion"], "apps/v1");
        let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        let (groups, etag) = read("/apis", accept).await;
        assert_eq!(groups["apiVersion"], "apidiscovery.k8s.io/v2");
        assert_eq!(groups["items"][0]["metadata"]["name"], "apiregistration.k8s.io");
        assert!(etag.is_some());
        assert!(answer(&snapshot, "/apis/nope", &HeaderMap::new(), "").is_none());
    }
}
