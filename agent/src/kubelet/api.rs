//! The API as the kubelet uses it: plain requests over [`kube::Client`], JSON in and out, nothing generic per kind.

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt;
use kube::client::Body;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a request to the API did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The API server said no.
    #[error("{message}")]
    Status {
        /// HTTP status code.
        code: u16,
        /// `Status.reason`.
        reason: String,
        /// `Status.message`.
        message: String,
    },
    /// No answer.
    #[error("request to the API server")]
    Transport(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is not what was expected.
    #[error("answer of the API server: {0}")]
    Decode(#[source] serde_json::Error),
}

impl ApiError {
    /// HTTP status code, when there was an answer.
    pub fn code(&self) -> Option<u16> {
        match self {
            ApiError::Status { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// The object does not exist.
    pub fn is_not_found(&self) -> bool {
        self.code() == Some(404)
    }

    /// Nobody who can decide has answered: no connection, a server without its cluster, or one that does not know us
    /// (a certificate that has ended).
    pub fn is_no_answer(&self) -> bool {
        match self {
            ApiError::Status { code, .. } => matches!(code, 401 | 429 | 500..),
            ApiError::Transport(_) => true,
            ApiError::Decode(_) => false,
        }
    }

    /// Somebody else was faster, or the object is another one of the same name.
    pub fn is_conflict(&self) -> bool {
        self.code() == Some(409)
    }
}

/// Result of an API request.
pub type ApiResult<T> = Result<T, ApiError>;

/// How a PATCH body is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchType {
    /// RFC 7386.
    Merge,
    /// Kubernetes' own, lists merged by key.
    Strategic,
}

/// A handle on the API under the node's identity.
#[derive(Clone)]
pub struct ApiClient {
    client: kube::Client,
}

impl ApiClient {
    /// Wraps the client that carries the node's identity.
    pub fn new(client: kube::Client) -> Self {
        Self { client }
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Bytes,
    ) -> ApiResult<http::Response<Body>> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::CONTENT_TYPE, content_type)
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, "coracle-kubelet")
            .body(Body::from(body))
            .map_err(|error| ApiError::Transport(Box::new(error)))?;
        let response = self.client.send(request).await.map_err(|error| ApiError::Transport(Box::new(error)))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let code = response.status();
        let body = response.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        Err(status_error(code, &body))
    }

    async fn json<T: DeserializeOwned>(&self, method: Method, path: &str, kind: &str, body: Bytes) -> ApiResult<T> {
        let response = self.send(method, path, kind, body).await?;
        let body =
            response.into_body().collect().await.map_err(|error| ApiError::Transport(Box::new(error)))?.to_bytes();
        serde_json::from_slice(&body).map_err(ApiError::Decode)
    }

    /// GET of an object or list.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> ApiResult<T> {
        self.json(Method::GET, path, "application/json", Bytes::new()).await
    }

    /// GET of the raw bytes of an object or list.
    pub async fn get_bytes(&self, path: &str) -> ApiResult<Bytes> {
        let response = self.send(Method::GET, path, "application/json", Bytes::new()).await?;
        Ok(response.into_body().collect().await.map_err(|error| ApiError::Transport(Box::new(error)))?.to_bytes())
    }

    /// POST of a new object.
    pub async fn create<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> ApiResult<T> {
        let body = serde_json::to_vec(body).map_err(ApiError::Decode)?;
        self.json(Method::POST, path, "application/json", body.into()).await
    }

    /// PUT of an object.
    pub async fn replace<B: Serialize, T: DeserializeOwned>(&self, path: &str, body: &B) -> ApiResult<T> {
        let body = serde_json::to_vec(body).map_err(ApiError::Decode)?;
        self.json(Method::PUT, path, "application/json", body.into()).await
    }

    /// PATCH of an object.
    pub async fn patch<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        kind: PatchType,
        body: &B,
    ) -> ApiResult<T> {
        let body = serde_json::to_vec(body).map_err(ApiError::Decode)?;
        let kind = match kind {
            PatchType::Merge => "application/merge-patch+json",
            PatchType::Strategic => "application/strategic-merge-patch+json",
        };
        self.json(Method::PATCH, path, kind, body.into()).await
    }

    /// DELETE at once (grace period 0), only if the object still has this uid.
    pub async fn delete_now(&self, path: &str, uid: &str) -> ApiResult<()> {
        let body = serde_json::json!({
            "apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0, "preconditions": { "uid": uid },
        });
        let body = serde_json::to_vec(&body).map_err(ApiError::Decode)?;
        self.send(Method::DELETE, path, "application/json", body.into()).await.map(|_| ())
    }
}

fn status_error(code: StatusCode, body: &[u8]) -> ApiError {
    #[derive(serde::Deserialize, Default)]
    #[serde(default)]
    struct Status {
        reason: String,
        message: String,
    }
    let status: Status = serde_json::from_slice(body).unwrap_or_default();
    let message = if status.message.is_empty() { format!("the API server answered {code}") } else { status.message };
    ApiError::Status { code: code.as_u16(), reason: status.reason, message }
}

/// Percent-encodes a value for a query string.
pub fn query_escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}
