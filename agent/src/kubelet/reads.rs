//! What pods need of the API, read through to copies on disk: a container starts again, and a pod after a reboot, while no
//! server answers.
//!
//! Copies of a pod lie in its folder and go with it; what all pods of a namespace share lies in `DATA/agent/objects`.
//! Both are for root alone (0700, files 0600): Secrets and tokens are among them.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::api::{ApiClient, ApiError, ApiResult, query_escape};
use crate::files;

/// The API, and the copies of one owner.
#[derive(Clone)]
pub struct Reads {
    /// The API, for what is no read.
    pub api: ApiClient,
    folder: PathBuf,
}

impl Reads {
    /// Copies are kept in `folder`, which is made when needed.
    #[must_use]
    pub fn new(api: ApiClient, folder: PathBuf) -> Self {
        Self { api, folder }
    }

    /// GET of an object; its copy while no server answers.
    ///
    /// # Errors
    /// What the API says, or what kept it from answering when there is no copy.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> ApiResult<T> {
        match self.api.get_bytes(path).await {
            Ok(bytes) => {
                let object = serde_json::from_slice(&bytes).map_err(ApiError::Decode)?;
                self.keep_bytes(path, bytes).await;
                Ok(object)
            }
            Err(error) if error.is_no_answer() => self.recall(path).await.ok_or(error),
            Err(error) => Err(error),
        }
    }

    /// Keeps something under a name.
    pub async fn keep<T: Serialize>(&self, name: &str, value: &T) {
        match serde_json::to_vec(value) {
            Ok(bytes) => self.keep_bytes(name, bytes.into()).await,
            Err(error) => tracing::warn!(%error, name, "not kept"),
        }
    }

    async fn keep_bytes(&self, name: &str, bytes: Bytes) {
        let (folder, file) = (self.folder.clone(), file_name(name));
        let written = tokio::task::spawn_blocking(move || write_if_changed(&folder, &file, &bytes)).await;
        if let Err(error) = written.unwrap_or_else(|error| Err(io::Error::other(error))) {
            tracing::warn!(%error, name, "copy for times without a server not kept");
        }
    }

    /// What was kept under a name.
    pub async fn recall<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        let path = self.folder.join(file_name(name));
        let bytes = tokio::fs::read(&path).await.ok()?;
        tracing::debug!(name, "no server answers; the kept copy is used");
        serde_json::from_slice(&bytes)
            .inspect_err(|error| tracing::warn!(%error, path = %path.display(), "damaged copy"))
            .ok()
    }
}

/// A path of the API, or another name, as the name of one file.
fn file_name(name: &str) -> String {
    format!("{}.json", query_escape(name.trim_start_matches('/')))
}

fn write_if_changed(folder: &Path, file: &str, bytes: &[u8]) -> io::Result<()> {
    let path = folder.join(file);
    if fs::read(&path).is_ok_and(|known| known == bytes) {
        return Ok(());
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    files::write(&path, bytes, 0o600)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::Full;
    use kube::client::Body;
    use serde_json::{Value, json};
    use std::os::unix::fs::PermissionsExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU16, Ordering};

    /// An API that answers with this code.
    fn api(code: &Arc<AtomicU16>) -> ApiClient {
        let code = code.clone();
        let service = tower::service_fn(move |_: http::Request<Body>| {
            let code = code.load(Ordering::SeqCst);
            async move {
                if code == 0 {
                    return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
                }
                let body = Full::new(Bytes::from(r#"{"data":{"a":"1"}}"#));
                Ok(http::Response::builder().status(code).body(body).unwrap())
            }
        });
        ApiClient::new(kube::Client::new(service, "default"))
    }

    #[tokio::test]
    async fn copies_stand_in_while_no_server_answers_and_only_then() {
        let dir = tempfile::tempdir().unwrap();
        let code = Arc::new(AtomicU16::new(0));
        let reads = Reads::new(api(&code), dir.path().join("objects"));
        let path = "/api/v1/namespaces/d/secrets/s";
        assert!(reads.get::<Value>(path).await.is_err());
        code.store(200, Ordering::SeqCst);
        reads.get::<Value>(path).await.unwrap();
        for away in [0, 500, 503, 504] {
            code.store(away, Ordering::SeqCst);
            assert_eq!(reads.get::<Value>(path).await.unwrap(), json!({"data": {"a": "1"}}), "{away}");
        }
        for answer in [403, 404] {
            code.store(answer, Ordering::SeqCst);
            assert_eq!(reads.get::<Value>(path).await.unwrap_err().code(), Some(answer));
        }
        let file = dir.path().join("objects/api%2Fv1%2Fnamespaces%2Fd%2Fsecrets%2Fs.json");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&file), mode(&dir.path().join("objects"))), (0o600, 0o700));
    }
}
