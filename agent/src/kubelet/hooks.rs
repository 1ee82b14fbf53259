//! Lifecycle hooks: `postStart` and `preStop`.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler};

use super::http_get::{self, GetError};
use crate::runtime::{Runtime, RuntimeError};

/// A hook over HTTP gets this long.
const HTTP_TIMEOUT: Duration = Duration::from_secs(60);
const AGENT: &str = "kube-lifecycle/1.35";

/// A hook that failed.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The command ended with an error.
    #[error("command '{command}' exited with {code}: {output}")]
    Exit {
        /// Words joined by spaces.
        command: String,
        /// Exit code.
        code: i32,
        /// What it printed, cut.
        output: String,
    },
    /// The command could not be run.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The request failed.
    #[error(transparent)]
    Http(#[from] GetError),
    /// The request was answered with an error.
    #[error("HTTP lifecycle hook failed with status {0}")]
    Status(u16),
    /// No handler that this node knows.
    #[error("invalid handler")]
    Invalid,
}

/// Whom a hook is for.
pub struct Target<'a> {
    /// Runs commands.
    pub runtime: &'a dyn Runtime,
    /// The specification.
    pub container: &'a Container,
    /// The container.
    pub id: &'a str,
    /// Address of the pod.
    pub ip: Option<IpAddr>,
}

/// Runs a hook to its end.
///
/// # Errors
/// When it fails; the caller kills the container (postStart) or goes on (preStop).
pub async fn run(hook: &LifecycleHandler, target: &Target<'_>) -> Result<(), HookError> {
    if let Some(action) = &hook.exec {
        let command = action.command.clone().unwrap_or_default();
        let done = target.runtime.exec_sync(target.id, &command, None).await?;
        if done.exit_code == 0 {
            return Ok(());
        }
        let output = String::from_utf8_lossy(if done.stderr.is_empty() { &done.stdout } else { &done.stderr });
        let output = output.chars().take(1024).collect();
        return Err(HookError::Exit { command: command.join(" "), code: done.exit_code, output });
    }
    if let Some(action) = &hook.http_get {
        let answer = http_get::get(action, target.container, target.ip, AGENT, HTTP_TIMEOUT).await?;
        return if answer.status >= 400 { Err(HookError::Status(answer.status)) } else { Ok(()) };
    }
    if let Some(action) = &hook.sleep {
        let seconds = u64::try_from(action.seconds).unwrap_or(0);
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        return Ok(());
    }
    Err(HookError::Invalid)
}
