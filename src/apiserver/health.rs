//! `/livez`, `/readyz`, `/healthz`, `/version`.

use super::body::Body;
use super::call::respond;
use super::query::Query;
use http::{HeaderValue, Response, StatusCode, header};
use parking_lot::RwLock;
use serde_json::json;
use std::sync::Arc;

/// The Kubernetes version this server implements.
pub const GIT_VERSION: &str = "v1.35.4+coracle";

/// A named check; an error says why it fails, to everybody who asks: it must hold no secret and name no object.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The checks of one server.
#[derive(Default)]
pub struct Health {
    live: RwLock<Vec<(String, Check)>>,
    ready: RwLock<Vec<(String, Check)>>,
}

impl Health {
    /// Adds a check that must pass for the process to be alive.
    pub fn add_live(&self, name: &str, check: Check) {
        self.live.write().push((name.to_owned(), check));
    }

    /// Adds a check that must pass for the server to be ready.
    pub fn add_ready(&self, name: &str, check: Check) {
        self.ready.write().push((name.to_owned(), check));
    }

    /// Answers a health path; none when it is no such path.
    pub fn answer(&self, path: &str, query: &Query<'_>) -> Option<Response<Body>> {
        let path = path.trim_end_matches('/');
        let (endpoint, one) = match path.trim_start_matches('/').split_once('/') {
            Some((endpoint, check)) => (endpoint, Some(check)),
            None => (path.trim_start_matches('/'), None),
        };
        let mut checks: Vec<(String, Check)> = vec![("ping".to_owned(), Arc::new(|| Ok(())))];
        checks.extend(self.live.read().iter().cloned());
        match endpoint {
            "livez" => {}
            "readyz" | "healthz" => checks.extend(self.ready.read().iter().cloned()),
            _ => return None,
        }
        if let Some(one) = one {
            checks.retain(|(name, _)| name == one);
            if checks.is_empty() {
                return Some(text(StatusCode::NOT_FOUND, "404 page not found\n".to_owned()));
            }
        }
        let excluded: Vec<&str> = query.all("exclude").collect();
        let mut report = String::new();
        let mut failed = Vec::new();
        for (name, check) in &checks {
            if excluded.contains(&name.as_str()) {
                report.push_str(&format!("[+]{name} excluded: ok\n"));
            } else if let Err(why) = check() {
                tracing::debug!(check = %name, why, "health check failed");
                report.push_str(&format!("[-]{name} failed: {why}\n"));
                failed.push(name.clone());
            } else {
                report.push_str(&format!("[+]{name} ok\n"));
            }
        }
        if !failed.is_empty() {
            return Some(text(StatusCode::INTERNAL_SERVER_ERROR, format!("{report}{endpoint} check failed\n")));
        }
        Some(match query.get("verbose") {
            Some(_) => text(StatusCode::OK, format!("{report}{endpoint} check passed\n")),
            None => text(StatusCode::OK, "ok".to_owned()),
        })
    }
}

fn text(code: StatusCode, body: String) -> Response<Body> {
    let mut response = respond(code, "text/plain; charset=utf-8", body.into());
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Go's name of the processor architecture.
fn go_arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// `/version`.
pub fn version() -> Response<Body> {
    let version = json!({
        "major": "1",
        "minor": "35",
        "emulationMajor": "1",
        "emulationMinor": "35",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "34",
        "gitVersion": GIT_VERSION,
        "gitCommit": option_env!("CORACLE_GIT_COMMIT").unwrap_or_default(),
        "gitTreeState": "clean",
        "buildDate": option_env!("CORACLE_BUILD_DATE").unwrap_or("1970-01-01T00:00:00Z"),
        "goVersion": "",
        "compiler": "rustc",
        "platform": format!("linux/{}", go_arch()),
    });
    respond(StatusCode::OK, "application/json", version.to_string().into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failing_check_makes_it_unready_but_not_dead() {
        let health = Health::default();
        health.add_ready("etcd", Arc::new(|| Err("down".to_owned())));
        let code = |path: &str| health.answer(path, &Query::default()).unwrap().status();
        assert_eq!(code("/livez"), 200);
        assert_eq!(code("/readyz"), 500);
        assert_eq!(code("/readyz/ping"), 200);
        assert_eq!(code("/readyz/x"), 404);
        assert!(health.answer("/version", &Query::default()).is_none());
    }
}
