//! One request to a resource on its way through a verb, and the answers verbs give.

use super::body::Body;
use super::codec;
use super::negotiate::{self, Accepted, Format, View};
use super::object;
use super::query::Query;
use super::request::RequestInfo;
use super::resources::{Resource, Subresource};
use super::service::ApiServer;
use super::status::Status;
use super::table;
use crate::auth::Identity;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;

/// What a verb gets.
pub struct Call<'a> {
    pub server: &'a ApiServer,
    pub identity: &'a Identity,
    pub info: &'a RequestInfo<'a>,
    pub query: &'a Query<'a>,
    pub headers: &'a HeaderMap,
    pub resource: &'a Arc<Resource>,
    pub subresource: Option<&'a Subresource>,
    /// Texts for `Warning:` headers of the answer.
    pub warnings: Mutex<Vec<String>>,
}

impl Call<'_> {
    /// The namespace of keys: empty for cluster scope, where a path may still name one (`namespaces`).
    pub fn namespace(&self) -> &str {
        if self.resource.is_namespaced() { self.info.namespace } else { "" }
    }

    /// The store key of the named object.
    pub fn key(&self) -> Bytes {
        self.resource.key(self.namespace(), &self.info.name)
    }

    /// The name of the subresource; empty for the resource itself.
    pub fn subresource_name(&self) -> &str {
        self.subresource.map_or("", |s| s.name)
    }

    /// 404 for the named object.
    pub fn not_found(&self) -> Status {
        Status::not_found(&self.resource.group, &self.resource.plural, &self.info.name)
    }

    /// 409 for a stale resource version of the named object.
    pub fn modified(&self, name: &str) -> Status {
        Status::modified(&self.resource.group, &self.resource.plural, name)
    }

    /// Adds texts for `Warning:` headers.
    pub fn warn(&self, texts: impl IntoIterator<Item = String>) {
        self.warnings.lock().extend(texts);
    }

    /// The user agent, for field managers.
    pub fn user_agent(&self) -> Option<&str> {
        self.headers.get(header::USER_AGENT).and_then(|h| h.to_str().ok())
    }

    /// The kind of bodies of this resource in the request's version.
    pub fn kind(&self) -> codec::Kind<'_> {
        codec::Kind { group: &self.resource.group, version: self.info.version, kind: &self.resource.kind }
    }

    /// The kind of stored objects.
    pub fn storage_kind(&self) -> codec::Kind<'_> {
        let group = if self.resource.shares_storage() { "" } else { &self.resource.group };
        codec::Kind { group, version: &self.resource.storage_version, kind: &self.resource.kind }
    }

    /// Answers with a stored value: spliced when the client wants JSON in the stored version, parsed otherwise.
    ///
    /// # Errors
    /// 406 when the client accepts nothing we can write.
    pub fn stored(&self, code: StatusCode, value: &[u8], revision: u64) -> Result<Response<Body>, Status> {
        let accepted = negotiate::negotiate(self.headers, true)?;
        let plain = accepted.view == View::Object && accepted.format == Format::Json;
        if plain && codec::is_stored_form(self.resource, self.info.version) {
            let mut out = BytesMut::new();
            if object::splice(self.resource, value, revision, &mut out) {
                out.extend_from_slice(b"\n");
                return Ok(self.bytes(code, Format::Json, out.freeze()));
            }
        }
        self.stored_value(code, object::decode(value, revision)?)
    }

    /// Answers with an object in the storage version.
    ///
    /// # Errors
    /// 406 when the client accepts nothing we can write.
    pub fn stored_value(&self, code: StatusCode, mut object: Value) -> Result<Response<Body>, Status> {
        let accepted = negotiate::negotiate(self.headers, true)?;
        codec::from_storage(self.resource, self.info.version, &mut object);
        let shown = match accepted.view {
            View::Object => object,
            View::Metadata => partial_metadata(&object, accepted.meta_version),
            View::Table => {
                let include = table::Include::of(self.query)?;
                let meta = json!({ "resourceVersion": object::meta(&object, "resourceVersion") });
                table::render(self.resource, &[object], meta, include, accepted.meta_version)
            }
        };
        self.format(code, accepted, &shown)
    }

    /// Answers with any object as it is (subresources of another kind, statuses).
    ///
    /// # Errors
    /// 406 when the client accepts nothing we can write.
    pub fn value(&self, code: StatusCode, object: &Value) -> Result<Response<Body>, Status> {
        let accepted = negotiate::negotiate(self.headers, false)?;
        self.format(code, accepted, object)
    }

    /// Writes an object in the negotiated format.
    ///
    /// # Errors
    /// 500 when it cannot be written.
    pub fn format(&self, code: StatusCode, accepted: Accepted, object: &Value) -> Result<Response<Body>, Status> {
        if accepted.format == Format::Protobuf
            && let Some(bytes) = codec::to_protobuf(object)
        {
            return Ok(self.bytes(code, Format::Protobuf, bytes.into()));
        }
        let mut json = serde_json::to_vec(object).map_err(Status::internal)?;
        match accepted.format {
            Format::Yaml => Ok(self.bytes(code, Format::Yaml, codec::to_yaml(&json)?.into())),
            Format::Json | Format::Protobuf => {
                json.push(b'\n');
                Ok(self.bytes(code, Format::Json, json.into()))
            }
        }
    }

    fn bytes(&self, code: StatusCode, format: Format, bytes: Bytes) -> Response<Body> {
        respond(code, format.media_type(), Body::full(bytes))
    }
}

/// A response with a content type, not to be cached.
pub fn respond(code: StatusCode, media_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = code;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}

/// `Warning:` headers of an answer (RFC 7234, code 299).
pub fn add_warnings(response: &mut Response<Body>, warnings: &[String]) {
    let mut seen: Vec<&String> = Vec::new();
    for warning in warnings {
        if seen.contains(&warning) {
            continue;
        }
        seen.push(warning);
        let text: String = warning.chars().filter(|c| !c.is_control()).collect();
        let quoted = text.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
}

/// An object's metadata alone.
pub fn partial_metadata(object: &Value, meta_version: &str) -> Value {
    json!({
        "kind": "PartialObjectMetadata",
        "apiVersion": format!("meta.k8s.io/{meta_version}"),
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}
