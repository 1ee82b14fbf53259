//! One JSON request over an introduced connection.

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::introduction::Introduced;

/// The longest answer.
const MAX_ANSWER: usize = 1 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The exchange broke.
    #[error("exchange with the server")]
    Http(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The server said no; its own words.
    #[error("{message}")]
    Refused {
        /// HTTP status code.
        code: StatusCode,
        /// `Status.message`, or the text of the answer.
        message: String,
    },
    /// Not what was expected.
    #[error("the server's answer is not understood")]
    Answer(#[source] serde_json::Error),
}

/// POSTs `body` to `path`.
///
/// # Errors
/// See [`RequestError`].
pub async fn post<T: DeserializeOwned>(
    to: Introduced,
    path: &str,
    authorization: &str,
    body: &Value,
) -> Result<T, RequestError> {
    let broke = |error: hyper::Error| RequestError::Http(error.into());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(to.stream)).await.map_err(broke)?;
    let driver = tokio::spawn(connection);
    let request = Request::post(path)
        .header(header::HOST, crate::servers::dial::SERVER_NAME)
        .header(header::AUTHORIZATION, authorization)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::ACCEPT, "application/json")
        .body(Full::new(Bytes::from(body.to_string())))
        .map_err(|error| RequestError::Http(error.into()))?;
    let response = sender.send_request(request).await.map_err(broke)?;
    let code = response.status();
    let bytes = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(RequestError::Http)?.to_bytes();
    driver.abort();
    if code.is_success() {
        return serde_json::from_slice(&bytes).map_err(RequestError::Answer);
    }
    let status: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let message = status["message"].as_str().unwrap_or_else(|| text.trim()).to_owned();
    Err(RequestError::Refused { code, message })
}
