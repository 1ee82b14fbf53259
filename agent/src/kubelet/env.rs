//! The environment of a container: `envFrom`, `env` with its sources, Services; later entries win.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{ConfigMap, Container, EnvVarSource, Pod, Secret};

use super::api::ApiError;
use super::containers;
use super::expansion::expand;
use super::field_ref::{self, NodeFacts};
use super::reads::Reads;
use super::service_env::{ServiceFacts, service_environment};
use crate::runtime::KeyValue;

/// Why the environment cannot be made; the text is the container's waiting message.
#[derive(Debug, thiserror::Error)]
pub enum EnvError {
    /// An object that must exist does not.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap` or `secret`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// An object has no such key.
    #[error("couldn't find key {key} in {kind} {namespace}/{name}")]
    NoKey {
        /// `ConfigMap` or `Secret`.
        kind: &'static str,
        /// The key.
        key: String,
        /// Namespace of the object.
        namespace: String,
        /// Its name.
        name: String,
    },
    /// A field cannot be read.
    #[error(transparent)]
    Field(#[from] field_ref::FieldError),
    /// A value is not text.
    #[error("value of key {key} in {name} is not UTF-8")]
    NotText {
        /// The key.
        key: String,
        /// Name of the object.
        name: String,
    },
    /// A file of variables (`fileKeyRef`) could not be read.
    #[error("{0}")]
    File(String),
    /// The API could not be asked.
    #[error(transparent)]
    Api(ApiError),
}

/// ConfigMaps and Secrets a container's environment needs; `None` when they don't exist.
#[derive(Debug, Default)]
pub struct Sources {
    /// By name.
    pub config_maps: HashMap<String, Option<ConfigMap>>,
    /// By name.
    pub secrets: HashMap<String, Option<Secret>>,
    /// Services of the namespace.
    pub services: Vec<ServiceFacts>,
    /// Variables of `fileKeyRef` by (volume, path).
    pub files: HashMap<(String, String), Option<BTreeMap<String, String>>>,
}

/// Names of the (ConfigMaps, Secrets) that the environment refers to.
pub fn references(container: &Container) -> (BTreeSet<&str>, BTreeSet<&str>) {
    let mut config_maps = BTreeSet::new();
    let mut secrets = BTreeSet::new();
    for source in container.env_from.iter().flatten() {
        config_maps.extend(source.config_map_ref.as_ref().map(|found| found.name.as_str()));
        secrets.extend(source.secret_ref.as_ref().map(|found| found.name.as_str()));
    }
    for source in container.env.iter().flatten().filter_map(|var| var.value_from.as_ref()) {
        config_maps.extend(source.config_map_key_ref.as_ref().map(|found| found.name.as_str()));
        secrets.extend(source.secret_key_ref.as_ref().map(|found| found.name.as_str()));
    }
    (config_maps, secrets)
}

/// Fetches what the environment refers to.
///
/// # Errors
/// When the API does not answer; an object that does not exist is no error here.
pub async fn fetch(reads: &Reads, pod: &Pod, container: &Container) -> Result<Sources, EnvError> {
    let namespace = containers::namespace(pod);
    let (config_maps, secrets) = references(container);
    let mut sources = Sources::default();
    for name in config_maps {
        let object = optional(reads.get(&format!("/api/v1/namespaces/{namespace}/configmaps/{name}")).await)?;
        sources.config_maps.insert(name.to_owned(), object);
    }
    for name in secrets {
        let object = optional(reads.get(&format!("/api/v1/namespaces/{namespace}/secrets/{name}")).await)?;
        sources.secrets.insert(name.to_owned(), object);
    }
    Ok(sources)
}

fn optional<T>(result: Result<T, ApiError>) -> Result<Option<T>, EnvError> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(EnvError::Api(error)),
    }
}

/// An environment and what had to be left out of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// In order of definition, each name once.
    pub variables: Vec<KeyValue>,
    /// Messages of `InvalidEnvironmentVariableNames` events.
    pub invalid: Vec<String>,
}

impl Environment {
    /// The value of a variable.
    pub fn get(&self, name: &str) -> Option<String> {
        self.variables.iter().find(|variable| variable.key == name).map(|variable| variable.value.clone())
    }

    fn set(&mut self, key: String, value: String) {
        match self.variables.iter_mut().find(|variable| variable.key == key) {
            Some(variable) => variable.value = value,
            None => self.variables.push(KeyValue { key, value }),
        }
    }
}

/// Computes the environment.
///
/// # Errors
/// When something that is not optional is missing.
pub fn environment(
    pod: &Pod,
    container: &Container,
    sources: &Sources,
    pod_ips: &[IpAddr],
    node: &NodeFacts,
) -> Result<Environment, EnvError> {
    let links = containers::spec(pod).enable_service_links.unwrap_or(true);
    let services = service_environment(&sources.services, containers::namespace(pod), links);
    let mut environment = Environment::default();
    from_objects(pod, container, sources, &mut environment)?;
    for variable in container.env.iter().flatten() {
        let value = match &variable.value_from {
            None => {
                let raw = variable.value.as_deref().unwrap_or_default();
                Some(expand(raw, |name| environment.get(name).or_else(|| services.get(name).cloned())))
            }
            Some(source) => from_source(pod, container, source, sources, pod_ips, node)?,
        };
        if let Some(value) = value {
            environment.set(variable.name.clone(), value);
        }
    }
    for (key, value) in services {
        if environment.get(&key).is_none() {
            environment.variables.push(KeyValue { key, value });
        }
    }
    Ok(environment)
}

fn from_objects(pod: &Pod, container: &Container, sources: &Sources, into: &mut Environment) -> Result<(), EnvError> {
    let namespace = containers::namespace(pod);
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let (kind, name, pairs) = if let Some(reference) = &source.config_map_ref {
            let Some(object) = sources.config_maps.get(&reference.name).and_then(Option::as_ref) else {
                missing(reference.optional, "configmap", &reference.name)?;
                continue;
            };
            ("configMap", &reference.name, object.data.clone().unwrap_or_default())
        } else if let Some(reference) = &source.secret_ref {
            let Some(object) = sources.secrets.get(&reference.name).and_then(Option::as_ref) else {
                missing(reference.optional, "secret", &reference.name)?;
                continue;
            };
            let mut pairs = BTreeMap::new();
            for (key, value) in object.data.iter().flatten() {
                pairs.insert(key.clone(), text(&value.0, key, &reference.name)?);
            }
            ("secret", &reference.name, pairs)
        } else {
            continue;
        };
        let mut invalid = Vec::new();
        for (key, value) in pairs {
            let key = format!("{prefix}{key}");
            if is_valid_name(&key) { into.set(key, value) } else { invalid.push(key) }
        }
        if !invalid.is_empty() {
            into.invalid.push(format!(
                "Keys [{}] from the EnvFrom {kind} {namespace}/{name} were skipped since they are considered invalid environment variable names.",
                invalid.join(", ")
            ));
        }
    }
    Ok(())
}

/// Printable ASCII without `=`.
fn is_valid_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| (0x20..0x7f).contains(&byte) && byte != b'=')
}

fn missing(optional: Option<bool>, kind: &'static str, name: &str) -> Result<(), EnvError> {
    if optional == Some(true) { Ok(()) } else { Err(EnvError::NotFound { kind, name: name.to_owned() }) }
}

fn text(bytes: &[u8], key: &str, name: &str) -> Result<String, EnvError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| EnvError::NotText { key: key.to_owned(), name: name.to_owned() })
}

fn from_source(
    pod: &Pod,
    container: &Container,
    source: &EnvVarSource,
    sources: &Sources,
    pod_ips: &[IpAddr],
    node: &NodeFacts,
) -> Result<Option<String>, EnvError> {
    let no_key = |optional: Option<bool>, kind: &'static str, key: &str, name: &str| {
        if optional == Some(true) {
            return Ok(None);
        }
        let namespace = containers::namespace(pod).to_owned();
        Err(EnvError::NoKey { kind, key: key.to_owned(), namespace, name: name.to_owned() })
    };
    if let Some(selector) = &source.field_ref {
        return Ok(Some(field_ref::field(pod, &selector.field_path, pod_ips, node)?));
    }
    if let Some(selector) = &source.resource_field_ref {
        return Ok(Some(field_ref::resource(pod, Some(container), selector, node)?));
    }
    if let Some(selector) = &source.config_map_key_ref {
        let Some(object) = sources.config_maps.get(&selector.name).and_then(Option::as_ref) else {
            missing(selector.optional, "configmap", &selector.name)?;
            return Ok(None);
        };
        return match object.data.as_ref().and_then(|data| data.get(&selector.key)) {
            Some(value) => Ok(Some(value.clone())),
            None => no_key(selector.optional, "ConfigMap", &selector.key, &selector.name),
        };
    }
    if let Some(selector) = &source.secret_key_ref {
        let Some(object) = sources.secrets.get(&selector.name).and_then(Option::as_ref) else {
            missing(selector.optional, "secret", &selector.name)?;
            return Ok(None);
        };
        return match object.data.as_ref().and_then(|data| data.get(&selector.key)) {
            Some(value) => Ok(Some(text(&value.0, &selector.key, &selector.name)?)),
            None => no_key(selector.optional, "Secret", &selector.key, &selector.name),
        };
    }
    if let Some(selector) = &source.file_key_ref {
        let found = sources.files.get(&(selector.volume_name.clone(), selector.path.clone())).and_then(Option::as_ref);
        return match found.and_then(|file| file.get(&selector.key)) {
            Some(value) => Ok(Some(value.clone())),
            None if selector.optional == Some(true) => Ok(None),
            None => Err(EnvError::File(format!(
                "environment variable key {:?} not found in file {:?}",
                selector.key, selector.path
            ))),
        };
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn container(value: serde_json::Value) -> Container {
        serde_json::from_value(value).unwrap()
    }

    fn pod() -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": {"containers": []}}))
            .unwrap()
    }

    fn sources() -> Sources {
        let map: ConfigMap =
            serde_json::from_value(json!({"data": {"A": "1", "bad=key": "x", "dash-ed": "2"}})).unwrap();
        Sources { config_maps: [("m".to_owned(), Some(map)), ("none".to_owned(), None)].into(), ..Sources::default() }
    }

    #[test]
    fn later_definitions_win_and_references_see_earlier_ones() {
        let container = container(json!({"name": "c",
            "envFrom": [{"prefix": "P_", "configMapRef": {"name": "m"}}, {"configMapRef": {"name": "none", "optional": true}}],
            "env": [{"name": "P_A", "value": "own"}, {"name": "B", "value": "$(P_A)/$(NOPE)"},
                    {"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "K", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "zz", "optional": true}}}]}));
        let environment = environment(&pod(), &container, &sources(), &[], &NodeFacts::default()).unwrap();
        assert_eq!(environment.get("P_A").unwrap(), "own");
        assert_eq!(environment.get("B").unwrap(), "own/$(NOPE)");
        assert_eq!(environment.get("P_dash-ed").unwrap(), "2");
        assert_eq!(environment.get("N").unwrap(), "p");
        assert_eq!(environment.get("K"), None);
        assert_eq!(environment.invalid.len(), 1);
        assert!(environment.invalid[0].starts_with("Keys [P_bad=key] from the EnvFrom configMap n/m"));
    }

    #[test]
    fn what_is_missing_and_not_optional_is_named() {
        let refer = |name: &str, key: &str| {
            container(
                json!({"name": "c", "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": name, "key": key}}}]}),
            )
        };
        let fail = |container: &Container| {
            environment(&pod(), container, &sources(), &[], &NodeFacts::default()).unwrap_err().to_string()
        };
        assert_eq!(fail(&refer("none", "A")), "configmap \"none\" not found");
        assert_eq!(fail(&refer("m", "zz")), "couldn't find key zz in ConfigMap n/m");
    }
}
