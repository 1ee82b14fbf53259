//! The verb patch: JSON patch, merge patch, strategic merge patch and server-side apply, all of them on the request's version.

use super::body::Body;
use super::call::Call;
use super::codec;
use super::object::meta;
use super::options::WriteOptions;
use super::status::Status;
use super::write;
use crate::schema::patch::PatchKind;
use crate::schema::{self};
use http::{HeaderMap, Response, header};
use serde_json::Value;

const MEDIA_TYPES: [&str; 4] = [
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

/// Which patch a body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Patch(PatchKind),
    Apply,
}

fn kind(headers: &HeaderMap) -> Result<Kind, Status> {
    let text = headers.get(header::CONTENT_TYPE).and_then(|h| h.to_str().ok()).unwrap_or_default();
    match text.split(';').next().unwrap_or_default().trim() {
        "application/json-patch+json" => Ok(Kind::Patch(PatchKind::Json)),
        "application/merge-patch+json" => Ok(Kind::Patch(PatchKind::Merge)),
        "application/strategic-merge-patch+json" => Ok(Kind::Patch(PatchKind::Strategic)),
        "application/apply-patch+yaml" => Ok(Kind::Apply),
        _ => Err(Status::unsupported_media_type(&MEDIA_TYPES)),
    }
}

/// The verb patch, also of status-like subresources.
pub async fn patch(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let kind = kind(call.headers)?;
    let options = WriteOptions::new(call.query, "PatchOptions", kind == Kind::Apply)?;
    let bytes = body.collect(codec::BODY_MAX).await?;
    match kind {
        Kind::Patch(kind) => {
            let change = |old: Option<&Value>| {
                let mut current = old.ok_or_else(|| call.not_found())?.clone();
                codec::from_storage(call.resource, call.info.version, &mut current);
                let mut patched = apply_to(call, kind, &current, &bytes, &options)?;
                codec::to_storage(call.resource, call.info.version, &mut patched);
                Ok(patched)
            };
            write::modify_existing(call, &options, &change).await?.respond(call)
        }
        Kind::Apply => Err(Status::unsupported_media_type(&MEDIA_TYPES[..3])),
    }
}

fn apply_to(
    call: &Call<'_>,
    kind: PatchKind,
    current: &Value,
    patch: &[u8],
    options: &WriteOptions,
) -> Result<Value, Status> {
    let node = codec::type_of(call.kind())?;
    let patched = schema::patch::apply(schema::builtin(), node, kind, current, patch, options.field_validation)?;
    call.warn(patched.warnings);
    for (key, what) in [("name", "name"), ("namespace", "namespace")] {
        if meta(&patched.value, key) != meta(current, key) {
            return Err(Status::bad_request(format!(
                "the {what} of the object ({}) does not match the {what} on the URL ({})",
                meta(&patched.value, key),
                meta(current, key)
            )));
        }
    }
    Ok(patched.value)
}
