//! The configuration of an image, as docker and OCI write it.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ImageConfig;

/// What is read from a configuration.
pub struct ParsedConfig {
    pub architecture: String,
    pub diff_ids: Vec<String>,
    pub config: ImageConfig,
}

/// Docker writes `null` for what is empty.
#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    config: Option<RawConfig>,
    rootfs: Rootfs,
}

#[derive(Deserialize)]
struct Rootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct RawConfig {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    stop_signal: Option<String>,
    volumes: Option<BTreeMap<String, serde_json::Value>>,
    labels: Option<BTreeMap<String, String>>,
}

/// Reads a configuration.
pub fn parse_config(text: &[u8]) -> Result<ParsedConfig, serde_json::Error> {
    let raw: Raw = serde_json::from_slice(text)?;
    let config = raw.config.unwrap_or_default();
    Ok(ParsedConfig {
        architecture: raw.architecture.unwrap_or_default(),
        diff_ids: raw.rootfs.diff_ids.unwrap_or_default(),
        config: ImageConfig {
            user: config.user.unwrap_or_default(),
            env: config.env.unwrap_or_default(),
            entrypoint: config.entrypoint.unwrap_or_default(),
            cmd: config.cmd.unwrap_or_default(),
            working_dir: config.working_dir.unwrap_or_default(),
            stop_signal: config.stop_signal.unwrap_or_default(),
            volumes: config.volumes.unwrap_or_default().into_keys().collect(),
            labels: config.labels.unwrap_or_default(),
        },
    })
}
