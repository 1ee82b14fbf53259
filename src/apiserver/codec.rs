//! Bodies in and out: decoding by content type, defaults, conversion between served versions, YAML answers.

use super::convert;
use super::negotiate::{JSON, MEDIA_TYPES, PROTOBUF, YAML};
use super::resources::Resource;
use super::status::Status;
use super::yaml;
use crate::schema::decode::FieldValidation;
use crate::schema::{self, TypeId, proto};
use http::HeaderMap;
use serde_json::Value;

/// Where the types of `meta.k8s.io` are in the schema.
const META_TYPES: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";
/// Largest request body, in bytes (upstream's).
pub const BODY_MAX: usize = 3 * 1024 * 1024;

/// The kind of a body.
#[derive(Clone, Copy, Debug)]
pub struct Kind<'a> {
    pub group: &'a str,
    pub version: &'a str,
    pub kind: &'a str,
}

impl Kind<'_> {
    /// `group/version`, or the version alone for core.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_owned() } else { format!("{}/{}", self.group, self.version) }
    }
}

/// How a body is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyFormat {
    Json,
    Yaml,
    Protobuf,
}

impl BodyFormat {
    /// From `Content-Type`; JSON when absent.
    ///
    /// # Errors
    /// 415 for anything unknown.
    pub fn of(headers: &HeaderMap) -> Result<BodyFormat, Status> {
        let Some(header) = headers.get(http::header::CONTENT_TYPE) else { return Ok(BodyFormat::Json) };
        let text = header.to_str().unwrap_or_default();
        match text.split(';').next().unwrap_or_default().trim() {
            "" | JSON => Ok(BodyFormat::Json),
            YAML => Ok(BodyFormat::Yaml),
            PROTOBUF => Ok(BodyFormat::Protobuf),
            _ => Err(Status::unsupported_media_type(&MEDIA_TYPES)),
        }
    }
}

/// A decoded body in Go form, and what was questionable about it.
#[derive(Debug)]
pub struct Decoded {
    pub value: Value,
    pub warnings: Vec<String>,
}

/// The type of a kind.
///
/// # Errors
/// 500 when the schema does not know it.
pub fn type_of(kind: Kind<'_>) -> Result<TypeId, Status> {
    schema::builtin()
        .by_gvk(kind.group, kind.version, kind.kind)
        .ok_or_else(|| Status::internal(format!("no schema of {}, Kind={}", kind.api_version(), kind.kind)))
}

/// Decodes a body that must be of this kind; absent `apiVersion` and `kind` are filled in.
///
/// # Errors
/// 400 with upstream's text.
pub fn decode(kind: Kind<'_>, body: &[u8], format: BodyFormat, validation: FieldValidation) -> Result<Decoded, Status> {
    let node = type_of(kind)?;
    let expected = schema::decode::Expected { group: kind.group, version: kind.version, kind: kind.kind, node };
    let format = match format {
        BodyFormat::Json => schema::decode::Format::Json,
        BodyFormat::Yaml => schema::decode::Format::Yaml,
        BodyFormat::Protobuf => schema::decode::Format::Protobuf,
    };
    let decoded = schema::decode::decode(schema::builtin(), &expected, body, format, validation)
        .map_err(|error| Status::bad_request(error.to_string()))?;
    Ok(Decoded { value: decoded.value, warnings: decoded.warnings })
}

/// An object as protobuf; none when its type has no such form (custom resources).
pub fn to_protobuf(object: &Value) -> Option<Vec<u8>> {
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let (group, version) = api_version.rsplit_once('/').unwrap_or(("", api_version));
    let table = schema::builtin();
    let id = match kind {
        "Status" | "Table" | "PartialObjectMetadata" | "PartialObjectMetadataList" => {
            table.by_name(&format!("{META_TYPES}.{kind}"))?
        }
        _ => table.by_gvk(group, version, kind)?,
    };
    Some(proto::encode(table, id, object))
}

/// Decodes the body of a server-side apply (YAML, of which JSON is a part) as it stands: only what is there is applied.
/// Unknown fields are found when it is applied.
///
/// # Errors
/// 400 with upstream's text; under strict validation also for duplicate fields.
pub fn decode_apply(body: &[u8], validation: FieldValidation) -> Result<Decoded, Status> {
    let (value, duplicates) = schema::decode::configuration(body).map_err(Status::bad_request)?;
    match (validation, duplicates) {
        (FieldValidation::Strict, Some(text)) => {
            Err(Status::bad_request(format!("error strict decoding YAML: {text}")))
        }
        (FieldValidation::Warn, Some(text)) => Ok(Decoded { value, warnings: vec![text] }),
        _ => Ok(Decoded { value, warnings: Vec::new() }),
    }
}

/// Fills in what the schema's defaults say.
pub fn default(kind: Kind<'_>, value: &mut Value) {
    if let Ok(node) = type_of(kind) {
        schema::default::apply(schema::builtin(), node, value);
    }
}

/// Brings a value that was assembled (by a patch, or by resetting its status) back into Go form.
///
/// # Errors
/// The text of what does not fit the type.
pub fn normalize(kind: Kind<'_>, value: Value) -> Result<Value, String> {
    let node = type_of(kind).map_err(|status| status.to_string())?;
    let mut value = schema::typed::normalize(schema::builtin(), node, value)?;
    if let Some(fields) = value.as_object_mut() {
        fields.insert("apiVersion".to_owned(), Value::String(kind.api_version()));
        fields.insert("kind".to_owned(), Value::String(kind.kind.to_owned()));
    }
    Ok(value)
}

/// From a served version to the storage version.
pub fn to_storage(resource: &Resource, version: &str, value: &mut Value) {
    if version != resource.storage_version || resource.shares_storage() {
        convert::to_storage(resource, version, value);
    }
}

/// From the storage version to a served version.
pub fn from_storage(resource: &Resource, version: &str, value: &mut Value) {
    if version != resource.storage_version || resource.shares_storage() {
        convert::from_storage(resource, version, value);
        // What one version requires, another leaves out.
        let kind = Kind { group: &resource.group, version, kind: &resource.kind };
        if let Ok(normal) = normalize(kind, value.clone()) {
            *value = normal;
        }
    }
}

/// Whether a served version is byte for byte what is stored.
pub fn is_stored_form(resource: &Resource, version: &str) -> bool {
    version == resource.storage_version && !resource.shares_storage()
}

/// The bytes of an answer as YAML.
///
/// # Errors
/// 500 when the bytes are not JSON.
pub fn to_yaml(json: &[u8]) -> Result<Vec<u8>, Status> {
    let value: Value = serde_json::from_slice(json).map_err(Status::internal)?;
    Ok(yaml::write(&value).into_bytes())
}

/// The body of a delete: `DeleteOptions` of any group version, or one without type.
///
/// # Errors
/// 400 when it does not decode.
pub fn decode_delete_options(body: &[u8], format: BodyFormat) -> Result<Value, Status> {
    let mut value: Value = match format {
        BodyFormat::Json => serde_json::from_slice(body).map_err(|e| Status::bad_request(e.to_string()))?,
        BodyFormat::Yaml => serde_yaml::from_slice(body).map_err(|e| Status::bad_request(e.to_string()))?,
        BodyFormat::Protobuf => {
            let node = schema::builtin().by_name(&format!("{META_TYPES}.DeleteOptions"));
            let node = node.ok_or_else(|| Status::internal("no schema of DeleteOptions"))?;
            let refuse = |error: proto::ProtoError| Status::bad_request(error.to_string());
            proto::decode(schema::builtin(), node, proto::open(body).map_err(refuse)?.raw).map_err(refuse)?
        }
    };
    if value.is_null() {
        value = serde_json::json!({});
    }
    if !value.is_object() || value.get("kind").and_then(Value::as_str).is_some_and(|k| k != "DeleteOptions") {
        return Err(Status::bad_request("decoded object cannot be converted to DeleteOptions"));
    }
    Ok(value)
}
