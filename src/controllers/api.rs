//! One identity's way to the API: plain requests over JSON bytes, with every answer to a write put into the shared
//! caches at once, so that a loop always reads its own writes and never creates anything twice.

use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::BodyExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Status};
use kube::client::Body;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::informer::Informers;
use super::object::{Key, Object};
use super::resource::Resource;

/// Why a request to the API did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The server answered with a `metav1.Status`.
    #[error("{}", status.message.as_deref().unwrap_or("the server answered without a message"))]
    Status {
        /// HTTP status.
        code: u16,
        /// The answer.
        status: Box<Status>,
    },
    /// The request could not be built, sent or its answer not be read.
    #[error("sending a request to the API")]
    Transport(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An object could not be written as JSON or an answer not be read.
    #[error("converting an API object")]
    Json(#[from] serde_json::Error),
}

impl ApiError {
    fn transport(cause: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> ApiError {
        ApiError::Transport(cause.into())
    }

    /// HTTP status, 0 when there was none.
    pub fn code(&self) -> u16 {
        match self {
            ApiError::Status { code, .. } => *code,
            ApiError::Transport(_) | ApiError::Json(_) => 0,
        }
    }

    /// `reason` of the Status.
    pub fn reason(&self) -> &str {
        match self {
            ApiError::Status { status, .. } => status.reason.as_deref().unwrap_or_default(),
            ApiError::Transport(_) | ApiError::Json(_) => "",
        }
    }

    /// The object (or its namespace) does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == 404
    }

    /// Someone else wrote the object first.
    pub fn is_conflict(&self) -> bool {
        self.code() == 409 && self.reason() != "AlreadyExists"
    }

    /// An object of that name exists.
    pub fn is_already_exists(&self) -> bool {
        self.code() == 409 && self.reason() == "AlreadyExists"
    }

    /// The revision asked for is compacted away.
    pub fn is_gone(&self) -> bool {
        self.code() == 410
    }

    /// The object is refused as it is; trying again does not help.
    pub fn is_invalid(&self) -> bool {
        self.code() == 422
    }

    /// Nothing can be created because the namespace is being deleted.
    pub fn is_namespace_terminating(&self) -> bool {
        let ApiError::Status { status, code: 403 } = self else { return false };
        let causes = status.details.iter().flat_map(|details| details.causes.iter().flatten());
        causes.into_iter().any(|cause| cause.reason.as_deref() == Some("NamespaceTerminating"))
            || status.message.as_deref().is_some_and(|message| message.contains("because it is being terminated"))
    }
}

/// What a deletion found.
#[derive(Debug, PartialEq, Eq)]
pub enum Deleted {
    /// It is gone from the API.
    Gone,
    /// It waits for its grace period or finalizers.
    Terminating,
    /// It was not there.
    NotFound,
}

/// How a patch is written.
#[derive(Clone, Copy, Debug)]
pub enum PatchKind {
    /// RFC 7386.
    Merge,
    /// Kubernetes' own, by the merge keys of the schema.
    Strategic,
    /// RFC 6902.
    Json,
}

impl PatchKind {
    /// The `Content-Type` of such a patch.
    pub fn media_type(self) -> &'static str {
        match self {
            PatchKind::Merge => "application/merge-patch+json",
            PatchKind::Strategic => "application/strategic-merge-patch+json",
            PatchKind::Json => "application/json-patch+json",
        }
    }
}

/// An identity's handle on the API. Cheap to clone.
#[derive(Clone)]
pub struct Api {
    client: kube::Client,
    informers: Arc<Informers>,
}

impl Api {
    /// A handle that writes through to the caches of `informers`.
    pub fn new(client: kube::Client, informers: Arc<Informers>) -> Api {
        Api { client, informers }
    }

    /// The caches shared by all loops.
    pub fn informers(&self) -> &Arc<Informers> {
        &self.informers
    }

    /// Sends a request and reads the whole answer; an error status becomes [`ApiError::Status`].
    pub async fn send(&self, method: Method, path: &str, content_type: &str, body: Vec<u8>) -> Result<Bytes, ApiError> {
        send(&self.client, method, path, content_type, "application/json", body).await
    }

    /// Reads one object from the API (not from a cache).
    pub async fn get<T: DeserializeOwned>(&self, resource: &Resource, key: &Key) -> Result<T, ApiError> {
        let bytes = self.get_path(&resource.object(key.namespace(), key.name())).await?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Reads any path.
    pub async fn get_path(&self, path: &str) -> Result<Bytes, ApiError> {
        self.send(Method::GET, path, "application/json", Vec::new()).await
    }

    /// Creates an object and returns it as stored.
    pub async fn create(
        &self,
        resource: &Resource,
        namespace: &str,
        object: &impl Serialize,
    ) -> Result<Arc<Object>, ApiError> {
        let body = serde_json::to_vec(object)?;
        let bytes = self.send(Method::POST, &resource.collection(namespace), "application/json", body).await?;
        self.written(resource, &bytes)
    }

    /// Replaces an object; `subresource` is empty, `status`, `scale`, ...
    pub async fn update(
        &self,
        resource: &Resource,
        key: &Key,
        subresource: &str,
        object: &impl Serialize,
    ) -> Result<Arc<Object>, ApiError> {
        let body = serde_json::to_vec(object)?;
        let path = subresource_path(resource, key, subresource);
        let bytes = self.send(Method::PUT, &path, "application/json", body).await?;
        self.written(resource, &bytes)
    }

    /// Replaces the status of a cached object; a conflict says that the cache was behind.
    pub async fn update_status(
        &self,
        resource: &Resource,
        object: &Object,
        status: &impl Serialize,
    ) -> Result<Arc<Object>, ApiError> {
        let mut body: Value = serde_json::from_slice(&object.bytes)?;
        if let Some(fields) = body.as_object_mut() {
            fields.insert("status".to_owned(), serde_json::to_value(status)?);
            fields.entry("apiVersion").or_insert_with(|| resource.api_version().into());
            fields.entry("kind").or_insert_with(|| resource.kind.as_ref().into());
        }
        self.update(resource, &object.key, "status", &body).await
    }

    /// Patches an object.
    pub async fn patch(
        &self,
        resource: &Resource,
        key: &Key,
        subresource: &str,
        kind: PatchKind,
        patch: &Value,
    ) -> Result<Arc<Object>, ApiError> {
        let path = subresource_path(resource, key, subresource);
        let bytes = self.send(Method::PATCH, &path, kind.media_type(), serde_json::to_vec(patch)?).await?;
        self.written(resource, &bytes)
    }

    /// Deletes the object with this uid. That it was gone already is no error.
    pub async fn delete(&self, resource: &Resource, key: &Key, uid: &str) -> Result<Deleted, ApiError> {
        let options = DeleteOptions {
            preconditions: Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Preconditions {
                uid: Some(uid.to_owned()),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.delete_with(resource, key, uid, &options).await
    }

    /// Deletes with options; `uid` is that of the cached object.
    pub async fn delete_with(
        &self,
        resource: &Resource,
        key: &Key,
        uid: &str,
        options: &DeleteOptions,
    ) -> Result<Deleted, ApiError> {
        let path = resource.object(key.namespace(), key.name());
        let answer = self.send(Method::DELETE, &path, "application/json", serde_json::to_vec(options)?).await;
        let bytes = match answer {
            Ok(bytes) => bytes,
            Err(error) if error.is_not_found() => return Ok(Deleted::NotFound),
            Err(error) => return Err(error),
        };
        match super::object::parse(resource, &bytes, false) {
            Ok(object) if object.deleting.is_some() && (*object.uid == *uid || uid.is_empty()) => {
                self.informers.observe(resource, &bytes);
                Ok(Deleted::Terminating)
            }
            _ => {
                self.informers.forget(resource, key, uid);
                Ok(Deleted::Gone)
            }
        }
    }

    fn written(&self, resource: &Resource, bytes: &Bytes) -> Result<Arc<Object>, ApiError> {
        let object = Arc::new(super::object::parse(resource, bytes, false)?);
        self.informers.observe_object(resource, &object);
        Ok(object)
    }
}

fn subresource_path(resource: &Resource, key: &Key, subresource: &str) -> String {
    let path = resource.object(key.namespace(), key.name());
    if subresource.is_empty() { path } else { format!("{path}/{subresource}") }
}

/// Sends one request; the one place where answers become errors.
pub async fn send(
    client: &kube::Client,
    method: Method,
    path: &str,
    content_type: &str,
    accept: &str,
    body: Vec<u8>,
) -> Result<Bytes, ApiError> {
    let response = open(client, method, path, content_type, accept, body).await?;
    Ok(response.into_body().collect().await.map_err(ApiError::transport)?.to_bytes())
}

/// Sends one request and hands back the answer's body unread, unless it is an error.
pub async fn open(
    client: &kube::Client,
    method: Method,
    path: &str,
    content_type: &str,
    accept: &str,
    body: Vec<u8>,
) -> Result<http::Response<Body>, ApiError> {
    let mut request = Request::builder().method(method).uri(path).header(header::ACCEPT, accept);
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, content_type);
    }
    let request = request.body(Body::from(body)).map_err(ApiError::transport)?;
    let response = client.send(request).await.map_err(ApiError::transport)?;
    let code = response.status();
    if code.is_success() {
        return Ok(response);
    }
    let bytes = response.into_body().collect().await.map_err(ApiError::transport)?.to_bytes();
    let status = serde_json::from_slice::<Status>(&bytes).unwrap_or_else(|_| Status {
        message: Some(String::from_utf8_lossy(&bytes).into_owned()),
        ..Status::default()
    });
    Err(ApiError::Status { code: code.as_u16(), status: Box::new(status) })
}
