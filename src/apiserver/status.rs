//! `metav1.Status`: the one place that turns what went wrong into what a client sees. The texts are upstream's
//! (`k8s.io/apimachinery/pkg/api/errors`): tools match on them.

use super::body::{Body, CollectError};
use super::field::{ErrorList, FieldError, aggregate, quote};
use crate::schema::patch::PatchError;
use http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Map, Value, json};
use std::fmt;

/// The text of a failed optimistic lock.
pub const OBJECT_MODIFIED: &str =
    "the object has been modified; please apply your changes to the latest version and try again";

/// A failure on its way to the client. `Display` is the message.
#[derive(Clone, Debug, PartialEq)]
pub struct Status(Box<Inner>);

#[derive(Clone, Debug, PartialEq)]
struct Inner {
    code: u16,
    reason: &'static str,
    message: String,
    details: Map<String, Value>,
    /// Whether `details` are shown also when they are empty.
    empty_details: bool,
    /// `metadata.continue`
    continue_token: String,
}

/// `resource.group` or `resource` alone: how messages name a resource (or a kind).
pub fn qualified(group: &str, resource: &str) -> String {
    if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") }
}

impl Status {
    /// A failure with nothing but code, reason and message.
    pub fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Status {
        Status(Box::new(Inner {
            code: code.as_u16(),
            reason,
            message: message.into(),
            details: Map::new(),
            empty_details: false,
            continue_token: String::new(),
        }))
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Status {
        let value = value.into();
        if value != "" && value != 0 {
            self.0.details.insert(key.to_owned(), value);
        }
        self
    }

    fn of(self, group: &str, kind: &str, name: &str) -> Status {
        self.with("group", group).with("kind", kind).with("name", name)
    }

    /// Adds `retryAfterSeconds` (also sent as the header `Retry-After`).
    pub fn retry_after(self, seconds: u64) -> Status {
        self.with("retryAfterSeconds", seconds)
    }

    /// Adds causes: objects with `reason`, `message`, `field`.
    pub fn with_causes(mut self, causes: Vec<Value>) -> Status {
        self.0.details.insert("causes".to_owned(), Value::Array(causes));
        self
    }

    /// Adds the uid of the object the failure is about.
    pub fn with_uid(self, uid: &str) -> Status {
        self.with("uid", uid)
    }

    /// 404 `pods "x" not found`.
    pub fn not_found(group: &str, resource: &str, name: &str) -> Status {
        let message = format!("{} {} not found", qualified(group, resource), quote(name));
        Status::new(StatusCode::NOT_FOUND, "NotFound", message).of(group, resource, name)
    }

    /// 404 for a path or a verb nobody serves.
    pub fn no_such_resource() -> Status {
        Status::new(StatusCode::NOT_FOUND, "NotFound", "the server could not find the requested resource")
            .with_empty_details()
    }

    /// 409 `pods "x" already exists`.
    pub fn already_exists(group: &str, resource: &str, name: &str) -> Status {
        let message = format!("{} {} already exists", qualified(group, resource), quote(name));
        Status::new(StatusCode::CONFLICT, "AlreadyExists", message).of(group, resource, name)
    }

    /// 409 when no free name was found for `generateName`.
    pub fn generate_name_conflict(group: &str, resource: &str, name: &str) -> Status {
        let message = format!(
            "{} {} already exists, the server was not able to generate a unique name for the object",
            qualified(group, resource),
            quote(name)
        );
        Status::new(StatusCode::CONFLICT, "AlreadyExists", message).of(group, resource, name).retry_after(1)
    }

    /// 409 `Operation cannot be fulfilled on pods "x": <why>`.
    pub fn conflict(group: &str, resource: &str, name: &str, why: impl fmt::Display) -> Status {
        let message = format!("Operation cannot be fulfilled on {} {}: {why}", qualified(group, resource), quote(name));
        Status::new(StatusCode::CONFLICT, "Conflict", message).of(group, resource, name)
    }

    /// 409 of a stale resourceVersion.
    pub fn modified(group: &str, resource: &str, name: &str) -> Status {
        Status::conflict(group, resource, name, OBJECT_MODIFIED)
    }

    /// 409 of server-side apply; `causes` name the fields and their owners.
    pub fn apply_conflict(message: String, causes: Vec<Value>) -> Status {
        Status::new(StatusCode::CONFLICT, "Conflict", message).with_causes(causes)
    }

    /// 410 `Gone`.
    pub fn gone(message: impl Into<String>) -> Status {
        Status::new(StatusCode::GONE, "Gone", message)
    }

    /// 410 `Expired`: the revision was compacted.
    pub fn expired(message: impl Into<String>) -> Status {
        Status::new(StatusCode::GONE, "Expired", message)
    }

    /// 401 without a hint of what was wrong.
    pub fn unauthorized() -> Status {
        Status::new(StatusCode::UNAUTHORIZED, "Unauthorized", "Unauthorized")
    }

    /// 403 `pods "x" is forbidden: <why>`.
    pub fn forbidden(group: &str, resource: &str, name: &str, why: impl fmt::Display) -> Status {
        let what = qualified(group, resource);
        let message = match (resource, name) {
            ("", _) => format!("forbidden: {why}"),
            (_, "") => format!("{what} is forbidden: {why}"),
            _ => format!("{what} {} is forbidden: {why}", quote(name)),
        };
        Status::new(StatusCode::FORBIDDEN, "Forbidden", message).of(group, resource, name)
    }

    /// 403 with a message that is already whole (of the authorizer).
    pub fn forbidden_message(group: &str, resource: &str, name: &str, message: String) -> Status {
        Status::new(StatusCode::FORBIDDEN, "Forbidden", message).of(group, resource, name)
    }

    /// 400 with this message.
    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// 422 of field errors; `kind` is the Kind.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &ErrorList) -> Status {
        let what = qualified(group, kind);
        let message = match aggregate(errors.iter().map(ToString::to_string)) {
            None => format!("{what} {} is invalid", quote(name)),
            Some(all) => format!("{what} {} is invalid: {all}", quote(name)),
        };
        let causes =
            errors.iter().map(|e| json!({ "reason": e.kind.cause(), "message": e.body(), "field": e.field })).collect();
        Status::new(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", message).of(group, kind, name).with_causes(causes)
    }

    /// 405 `delete is not supported on resources of kind "bindings"`.
    pub fn method_not_supported(group: &str, resource: &str, action: &str) -> Status {
        let message = format!("{action} is not supported on resources of kind {}", quote(&qualified(group, resource)));
        Status::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message).of(group, resource, "")
    }

    /// 405 of a method that the path does not have.
    pub fn method_not_allowed() -> Status {
        Status::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
        .with_empty_details()
    }

    /// 406 with the media types that can be served.
    pub fn not_acceptable(types: &[&str]) -> Status {
        let message = format!("406: Not Acceptable\n\nAvailable representations: {}", types.join(", "));
        Status::new(StatusCode::NOT_ACCEPTABLE, "NotAcceptable", message).with_empty_details()
    }

    /// 415 with the media types that can be read.
    pub fn unsupported_media_type(types: &[&str]) -> Status {
        let message = format!(
            "the body of the request was in an unknown format - accepted media types include: {}",
            types.join(", ")
        );
        Status::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message)
    }

    /// 415 of a patch whose content type is none of the known ones.
    pub fn unsupported_patch() -> Status {
        let message = "415: Unsupported Media Type";
        Status::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "UnsupportedMediaType", message).with_empty_details()
    }

    /// 413 `Request entity too large: <why>`.
    pub fn too_large(why: impl fmt::Display) -> Status {
        let message = format!("Request entity too large: {why}");
        Status::new(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", message)
    }

    /// 429 with the time to wait.
    pub fn too_many_requests(message: impl Into<String>, seconds: u64) -> Status {
        Status::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message).retry_after(seconds)
    }

    /// 503 with this message.
    pub fn unavailable(message: impl Into<String>) -> Status {
        Status::new(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable", message)
    }

    /// 500 `The <operation> operation against <resource> could not be completed at this time, please try again.`
    pub fn server_timeout(group: &str, resource: &str, operation: &str, seconds: u64) -> Status {
        let message = format!(
            "The {operation} operation against {} could not be completed at this time, please try again.",
            qualified(group, resource)
        );
        Status::new(StatusCode::INTERNAL_SERVER_ERROR, "ServerTimeout", message)
            .of(group, resource, operation)
            .retry_after(seconds)
    }

    /// 504 `Timeout: <why>`.
    pub fn timeout(why: impl fmt::Display, seconds: u64) -> Status {
        Status::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", format!("Timeout: {why}")).retry_after(seconds)
    }

    /// 504 of a resourceVersion from the future, which clients recognise by its cause.
    pub fn too_large_resource_version(wanted: u64, current: u64) -> Status {
        let cause = json!({ "reason": "ResourceVersionTooLarge", "message": "Too large resource version" });
        Status::timeout(format!("Too large resource version: {wanted}, current: {current}"), 1).with_causes(vec![cause])
    }

    /// 500 `Internal error occurred: <why>`.
    pub fn internal(why: impl fmt::Display) -> Status {
        Status::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", format!("Internal error occurred: {why}"))
            .with_causes(vec![json!({ "message": why.to_string() })])
    }

    /// The same with `details` that say nothing, as upstream's generic answers have them.
    fn with_empty_details(mut self) -> Status {
        self.0.empty_details = true;
        self
    }

    /// The same with `text` before its message.
    pub fn prefixed(mut self, text: &str) -> Status {
        self.0.message.insert_str(0, text);
        self
    }

    /// The same with a token with which a list goes on.
    pub fn with_continue(mut self, token: String) -> Status {
        self.0.continue_token = token;
        self
    }

    /// HTTP status code.
    pub fn code(&self) -> u16 {
        self.0.code
    }

    /// `metav1.StatusReason`.
    pub fn reason(&self) -> &'static str {
        self.0.reason
    }

    /// The text people read.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The object as it goes over the wire.
    pub fn to_value(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.0.message,
            "reason": self.0.reason,
            "code": self.0.code,
        });
        if self.0.reason.is_empty()
            && let Some(fields) = status.as_object_mut()
        {
            fields.remove("reason");
        }
        if !self.0.continue_token.is_empty() {
            status["metadata"]["continue"] = Value::String(self.0.continue_token.clone());
        }
        if !self.0.details.is_empty() || self.0.empty_details {
            status["details"] = Value::Object(self.0.details.clone());
        }
        status
    }

    /// The answer.
    pub fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::full(self.to_value().to_string() + "\n"));
        *response.status_mut() = StatusCode::from_u16(self.0.code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.0.details.get("retryAfterSeconds").and_then(Value::as_u64) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Status {}

impl From<CollectError> for Status {
    fn from(error: CollectError) -> Status {
        match error {
            CollectError::TooLarge { .. } => Status::too_large(error),
            CollectError::Read(source) => Status::bad_request(format!("unable to read the body: {source}")),
        }
    }
}

impl From<PatchError> for Status {
    fn from(error: PatchError) -> Status {
        match error {
            PatchError::BadRequest(text) => Status::bad_request(text),
            PatchError::TooLarge(text) => Status::too_large(text),
            // What was wrong stays here: upstream's generic answer has one text for all.
            PatchError::Unprocessable(_) => Status::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "Invalid",
                "the server rejected our request due to an error in our request",
            )
            .with_empty_details(),
            PatchError::Invalid { value, detail } => {
                Status::invalid("", "", "", &vec![FieldError::invalid("patch", value, detail)])
            }
            PatchError::Internal(text) => Status::new(StatusCode::INTERNAL_SERVER_ERROR, "", text),
        }
    }
}

/// The `Success` status that answers a delete which left nothing behind.
pub fn deleted(group: &str, resource: &str, name: &str, uid: &str) -> Value {
    let mut details = Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", resource), ("uid", uid)] {
        if !value.is_empty() {
            details.insert(key.to_owned(), Value::from(value));
        }
    }
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::field::FieldError;

    #[test]
    fn texts_read_as_upstreams() {
        assert_eq!(Status::not_found("apps", "deployments", "x").message(), r#"deployments.apps "x" not found"#);
        assert_eq!(
            Status::modified("", "pods", "x").message(),
            "Operation cannot be fulfilled on pods \"x\": the object has been modified; please apply your changes to the latest version and try again"
        );
        let invalid = Status::invalid("", "Pod", "p", &vec![FieldError::required("spec", "")]);
        assert_eq!(invalid.message(), r#"Pod "p" is invalid: spec: Required value"#);
        assert_eq!(
            invalid.to_value()["details"]["causes"][0],
            json!({ "reason": "FieldValueRequired", "message": "Required value", "field": "spec" })
        );
        let rejected = Status::forbidden("", "pods", "p", "no");
        assert_eq!(rejected.to_value()["details"], json!({ "name": "p", "kind": "pods" }));
    }
}
