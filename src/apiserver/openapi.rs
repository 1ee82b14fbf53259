//! `/openapi/v3`: the index and the documents, one per group and version, with hashes for caches; `/openapi/v2`: one for
//! all, as JSON or protobuf.

use super::body::Body;
use super::call::respond;
use super::query::Query;
use super::registry::Snapshot;
use super::resources::Resource;
use super::status::Status;
use crate::schema;
use crate::schema::openapi;
use crate::schema::openapi::v2::GroupVersion;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde_json::{Map, json};

/// Answers a path below `/openapi/v3`; none when nothing is there.
pub async fn answer(
    snapshot: &Snapshot,
    path: &str,
    query: &Query<'_>,
    headers: &HeaderMap,
) -> Option<Result<Response<Body>, Status>> {
    let path = path.trim_end_matches('/');
    if path == "/openapi/v2" {
        return Some(version_2(snapshot, headers).await);
    }
    let path = path.strip_prefix("/openapi/v3")?;
    if path.is_empty() {
        return Some(Ok(index(snapshot)));
    }
    let parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
    let (group, version) = match parts.as_slice() {
        ["api", version] => ("", *version),
        ["apis", group, version] => (*group, *version),
        _ => return None,
    };
    let found = snapshot.find_group(group).filter(|g| g.versions.iter().any(|v| v == version))?;
    let rows: Vec<_> = found.of_version(version).cloned().collect();
    let borrowed: Vec<&Resource> = rows.iter().map(|r| &**r).collect();
    let hash = openapi::hash(group, version, &borrowed);
    if let Some(wanted) = query.get("hash").filter(|wanted| *wanted != hash) {
        tracing::debug!(wanted, hash, "an old OpenAPI document was asked for");
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::MOVED_PERMANENTLY;
        if let Ok(location) = HeaderValue::from_str(&url(group, version, &hash)) {
            response.headers_mut().insert(header::LOCATION, location);
        }
        return Some(Ok(response));
    }
    let etag = format!("\"{hash}\"");
    let unchanged = headers.get(header::IF_NONE_MATCH).is_some_and(|h| h.as_bytes() == etag.as_bytes());
    let mut response = if unchanged {
        respond(StatusCode::NOT_MODIFIED, "application/json", Body::empty())
    } else {
        let (group, version) = (group.to_owned(), version.to_owned());
        // Tens of milliseconds of work, so not on a thread that serves others.
        let made = tokio::task::spawn_blocking(move || {
            let rows: Vec<&Resource> = rows.iter().map(|r| &**r).collect();
            openapi::document(schema::builtin(), &group, &version, &rows)
        });
        match made.await {
            Ok(document) => respond(StatusCode::OK, "application/json", Body::full(document)),
            Err(error) => return Some(Err(Status::internal(error))),
        }
    };
    let fields = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&etag) {
        fields.insert(header::ETAG, value);
    }
    fields.insert(header::VARY, HeaderValue::from_static("Accept"));
    if query.get("hash").is_some() {
        fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("public, immutable"));
    }
    Some(Ok(response))
}

/// The forms of v2's document, as clients ask for them (of old and of today) and as the answer names them.
const V2_FORMS: [(&str, &str); 5] = [
    ("application/json", "application/json"),
    ("application/*", "application/json"),
    ("*/*", "application/json"),
    ("application/com.github.proto-openapi.spec.v2@v1.0+protobuf", V2_PROTOBUF),
    (V2_PROTOBUF, V2_PROTOBUF),
];
const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

async fn version_2(snapshot: &Snapshot, headers: &HeaderMap) -> Result<Response<Body>, Status> {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or("*/*");
    let wanted = accept.split(',').map(|clause| clause.split(';').next().unwrap_or_default().trim());
    let form = wanted.into_iter().find_map(|wanted| V2_FORMS.iter().find(|(name, _)| *name == wanted));
    let Some((_, media_type)) = form.copied() else {
        return Ok(respond(StatusCode::NOT_ACCEPTABLE, "text/plain; charset=utf-8", Body::empty()));
    };
    let mut versions = Vec::new();
    let mut hashes = String::new();
    for group in snapshot.groups() {
        for version in &group.versions {
            let rows: Vec<_> = group.of_version(version).cloned().collect();
            let borrowed: Vec<&Resource> = rows.iter().map(|row| &**row).collect();
            hashes.push_str(&openapi::hash(&group.name, version, &borrowed));
            versions.push((group.name.to_string(), version.to_string(), rows));
        }
    }
    let etag = format!("\"{}\"", openapi::digest(&hashes));
    let mut response = if headers.get(header::IF_NONE_MATCH).is_some_and(|h| h.as_bytes() == etag.as_bytes()) {
        respond(StatusCode::NOT_MODIFIED, media_type, Body::empty())
    } else {
        let made = tokio::task::spawn_blocking(move || {
            let all = versions.iter().map(|(group, version, rows)| GroupVersion {
                group,
                version,
                rows: rows.iter().map(|row| &**row).collect(),
            });
            let all: Vec<GroupVersion<'_>> = all.collect();
            let write = if media_type == V2_PROTOBUF { openapi::v2::protobuf } else { openapi::v2::json };
            write(schema::builtin(), &all)
        });
        respond(StatusCode::OK, media_type, Body::full(made.await.map_err(Status::internal)?))
    };
    if let Ok(value) = HeaderValue::from_str(&etag) {
        response.headers_mut().insert(header::ETAG, value);
    }
    response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
    Ok(response)
}

fn url(group: &str, version: &str, hash: &str) -> String {
    format!("/openapi/v3/{}?hash={hash}", openapi::document_path(group, version))
}

fn index(snapshot: &Snapshot) -> Response<Body> {
    let mut paths = Map::new();
    for group in snapshot.groups() {
        for version in &group.versions {
            let rows: Vec<&Resource> = group.of_version(version).map(|r| &**r).collect();
            let hash = openapi::hash(&group.name, version, &rows);
            let url = url(&group.name, version, &hash);
            paths.insert(openapi::document_path(&group.name, version), json!({ "serverRelativeURL": url }));
        }
    }
    respond(StatusCode::OK, "application/json", json!({ "paths": paths }).to_string().into())
}
