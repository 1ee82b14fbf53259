//! The verb patch: JSON patch, merge patch, strategic merge patch and server-side apply, all of them on the request's version.

use super::body::Body;
use super::call::Call;
use super::codec::{self, Kind};
use super::metadata;
use super::object::{meta, metadata_mut};
use super::options::WriteOptions;
use super::status::Status;
use super::write;
use crate::schema;
use crate::schema::managed::{self, ApplyError};
use crate::schema::patch::PatchKind;
use bytes::Bytes;
use http::{HeaderMap, Response, header};
use serde_json::{Value, json};

/// What a body does to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Patch(PatchKind),
    Apply,
}

fn method(headers: &HeaderMap) -> Result<Method, Status> {
    let text = headers.get(header::CONTENT_TYPE).and_then(|h| h.to_str().ok()).unwrap_or_default();
    match text.split(';').next().unwrap_or_default().trim() {
        "application/json-patch+json" => Ok(Method::Patch(PatchKind::Json)),
        "application/merge-patch+json" => Ok(Method::Patch(PatchKind::Merge)),
        "application/strategic-merge-patch+json" => Ok(Method::Patch(PatchKind::Strategic)),
        "application/apply-patch+yaml" => Ok(Method::Apply),
        _ => Err(Status::unsupported_patch()),
    }
}

/// A patch as it was sent.
pub struct Request {
    pub method: Method,
    pub options: WriteOptions,
    bytes: Bytes,
}

/// Reads the patch of a call.
///
/// # Errors
/// 415 for an unknown kind of patch, 422 for wrong options.
pub async fn read(call: &Call<'_>, body: Body) -> Result<Request, Status> {
    let method = method(call.headers)?;
    let mut options = WriteOptions::new(call.query, "PatchOptions", method == Method::Apply)?;
    options.applied = method == Method::Apply;
    let bytes = body.collect(codec::BODY_MAX).await?;
    Ok(Request { method, options, bytes })
}

/// The verb patch, also of status-like subresources.
pub async fn patch(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let request = read(call, body).await?;
    let now = metadata::now();
    let change = |old: Option<&Value>| {
        let current = old.map(|old| {
            let mut current = old.clone();
            codec::from_storage(call.resource, call.info.version, &mut current);
            current
        });
        let mut patched = apply(call, &request, call.kind(), current.as_ref(), &now)?;
        if current.is_none() {
            write::place(call, &mut patched)?;
            write::check_name(call, &mut patched)?;
        }
        codec::to_storage(call.resource, call.info.version, &mut patched);
        Ok(patched)
    };
    let creates = request.method == Method::Apply && call.subresource.is_none();
    write::modify_or(call, &request.options, creates, &change).await?.respond(call)
}

/// The object of a kind after a patch.
///
/// # Errors
/// What is wrong with the patch, conflicts of an apply, 404 when there is nothing to patch.
pub fn apply(
    call: &Call<'_>,
    request: &Request,
    kind: Kind<'_>,
    current: Option<&Value>,
    now: &str,
) -> Result<Value, Status> {
    let node = codec::type_of(kind)?;
    let (table, validation) = (schema::builtin(), request.options.field_validation);
    let patched = match (request.method, current) {
        (Method::Patch(patch), Some(current)) => {
            let patched = schema::patch::apply(table, node, patch, current, &request.bytes, validation)?;
            call.warn(patched.warnings);
            patched.value
        }
        (Method::Patch(_), None) => return Err(call.not_found()),
        (Method::Apply, current) => {
            let decoded = codec::decode_apply(&request.bytes, validation)?;
            call.warn(decoded.warnings);
            let mut patch = decoded.value;
            check_target(call, &mut patch)?;
            let manager = request.options.manager(call.user_agent());
            let reset = managed::reset_fields(table, node, kind.group, kind.kind, call.subresource_name());
            let api_version = kind.api_version();
            let operation = managed::Operation {
                manager: &manager,
                api_version: &api_version,
                subresource: call.subresource_name(),
                now,
                reset: &reset,
            };
            managed::apply(table, node, current, &patch, &operation, request.options.force)?
        }
    };
    if let Some(current) = current {
        for what in ["name", "namespace"] {
            let (after, before) = (meta(&patched, what), meta(current, what));
            if after != before {
                return Err(Status::bad_request(format!(
                    "the {what} of the object ({after}) does not match the {what} on the URL ({before})"
                )));
            }
        }
    }
    Ok(patched)
}

/// An applied configuration names the object of the URL, or leaves that to it.
fn check_target(call: &Call<'_>, patch: &mut Value) -> Result<(), Status> {
    if !patch.is_object() {
        return Err(Status::bad_request("error decoding YAML: an object is expected"));
    }
    write::check_name(call, patch)?;
    let namespace = call.namespace().to_owned();
    match meta(patch, "namespace") {
        "" if !namespace.is_empty() => {
            metadata_mut(patch).insert("namespace".to_owned(), json!(namespace));
        }
        found if found != namespace => {
            return Err(Status::bad_request(format!(
                "the namespace of the object ({found}) does not match the namespace on the URL ({namespace})"
            )));
        }
        _ => {}
    }
    Ok(())
}

impl From<ApplyError> for Status {
    fn from(error: ApplyError) -> Status {
        match error {
            ApplyError::BadRequest(text) => Status::bad_request(text),
            ApplyError::Conflict { message, causes } => Status::apply_conflict(
                message,
                causes
                    .into_iter()
                    .map(|c| json!({ "reason": "FieldManagerConflict", "message": c.message, "field": c.field }))
                    .collect(),
            ),
            ApplyError::Internal(text) => Status::new(http::StatusCode::INTERNAL_SERVER_ERROR, "", text),
        }
    }
}
