//! Levels and versions of Pod Security Standards, and the labels that choose them.

use serde_json::Value;
use std::fmt;

/// The minor version of Kubernetes that `latest` means.
const LATEST: u32 = 35;
const PREFIX: &str = "pod-security.kubernetes.io/";

/// How much a pod may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Privileged,
    Baseline,
    Restricted,
}

/// A level as of a Kubernetes version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LevelVersion {
    pub level: Level,
    /// Minor version; `None` for the latest.
    pub minor: Option<u32>,
}

impl LevelVersion {
    /// The minor version whose checks run.
    pub fn effective_minor(self) -> u32 {
        self.minor.unwrap_or(LATEST).min(LATEST)
    }
}

impl fmt::Display for LevelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = match self.level {
            Level::Privileged => "privileged",
            Level::Baseline => "baseline",
            Level::Restricted => "restricted",
        };
        match self.minor {
            Some(minor) => write!(f, "{level}:v1.{minor}"),
            None => write!(f, "{level}:latest"),
        }
    }
}

/// What a namespace asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub enforce: LevelVersion,
    pub audit: LevelVersion,
    pub warn: LevelVersion,
}

/// A label that is not understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelError {
    pub label: String,
    pub value: String,
    pub why: &'static str,
}

fn parse_level(text: &str) -> Option<Level> {
    match text {
        "privileged" => Some(Level::Privileged),
        "baseline" => Some(Level::Baseline),
        "restricted" => Some(Level::Restricted),
        _ => None,
    }
}

/// `latest` or `v1.<minor>`.
fn parse_version(text: &str) -> Option<Option<u32>> {
    if text == "latest" {
        return Some(None);
    }
    let minor = text.strip_prefix("v1.")?;
    let plain = minor == "0" || (!minor.starts_with('0') && minor.bytes().all(|b| b.is_ascii_digit()));
    if plain { minor.parse().ok().map(Some) } else { None }
}

impl Policy {
    /// Reads labels; what is not understood counts as the strictest (for enforcing: restricted, latest) and is reported.
    pub fn of(labels: &Value) -> (Policy, Vec<LabelError>) {
        let mut errors = Vec::new();
        let mut read = |mode: &str, broken: Level, fallback: LevelVersion| {
            let mut result = fallback;
            let label = format!("{PREFIX}{mode}");
            let given = labels[&label].as_str();
            if let Some(value) = given {
                result = LevelVersion { level: Level::Privileged, minor: None };
                result.level = parse_level(value).unwrap_or_else(|| {
                    let why = "must be one of privileged, baseline, restricted";
                    errors.push(LabelError { label, value: value.to_owned(), why });
                    broken
                });
            }
            let label = format!("{PREFIX}{mode}-version");
            if let Some(value) = labels[&label].as_str() {
                result.minor = parse_version(value).unwrap_or_else(|| {
                    let why = "must be \"latest\" or \"v1.x\"";
                    errors.push(LabelError { label, value: value.to_owned(), why });
                    None
                });
            }
            result
        };
        let privileged = LevelVersion { level: Level::Privileged, minor: None };
        let enforce = read("enforce", Level::Restricted, privileged);
        let audit = read("audit", Level::Privileged, privileged);
        // Whoever enforces without saying what to warn about is warned about the same.
        let enforces = labels[format!("{PREFIX}enforce")].as_str().is_some_and(|level| parse_level(level).is_some());
        let warn = read("warn", Level::Privileged, if enforces { enforce } else { privileged });
        (Policy { enforce, audit, warn }, errors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn labels_choose_level_and_version() {
        let (policy, errors) = Policy::of(&json!({
            "pod-security.kubernetes.io/enforce": "baseline",
            "pod-security.kubernetes.io/enforce-version": "v1.29",
            "pod-security.kubernetes.io/audit": "restricted",
        }));
        assert!(errors.is_empty());
        assert_eq!(policy.enforce.to_string(), "baseline:v1.29");
        assert_eq!(policy.audit.to_string(), "restricted:latest");
        assert_eq!(policy.warn.to_string(), "baseline:v1.29");
        assert_eq!(Policy::of(&Value::Null).0.enforce.level, Level::Privileged);
        let wrong = json!({ "pod-security.kubernetes.io/enforce": "strict", "pod-security.kubernetes.io/warn-version": "v1.035" });
        let (policy, errors) = Policy::of(&wrong);
        assert_eq!(policy.enforce.level, Level::Restricted);
        assert_eq!(errors.len(), 2);
    }
}
