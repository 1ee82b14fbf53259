//! The files of configMap, secret, downwardAPI and projected volumes, computed from the objects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, PodSpec, ProjectedVolumeSource, Secret, Volume,
};

use super::VolumeError;
use super::atomic_writer::{File, Payload};
use crate::kubelet::containers;
use crate::kubelet::field_ref::{self, NodeFacts};

/// Permission bits of files unless the volume says otherwise.
const DEFAULT_MODE: u32 = 0o644;

/// A token that a volume projects.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenWish {
    /// Empty: the API server's.
    pub audience: String,
    /// Wanted lifetime.
    pub expiration_seconds: i64,
}

/// What the files are made of, as the API had it; `None` for what does not exist.
#[derive(Debug, Default)]
pub struct Objects {
    /// By name.
    pub config_maps: BTreeMap<String, Option<ConfigMap>>,
    /// By name.
    pub secrets: BTreeMap<String, Option<Secret>>,
    /// Issued tokens.
    pub tokens: BTreeMap<TokenWish, String>,
}

/// What a volume's files refer to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct References {
    /// Names.
    pub config_maps: BTreeSet<String>,
    /// Names.
    pub secrets: BTreeSet<String>,
    /// Tokens to request.
    pub tokens: BTreeSet<TokenWish>,
}

/// What `volume` needs from the API; empty for volumes without such files.
pub fn references(volume: &Volume) -> References {
    let mut references = References::default();
    references.config_maps.extend(volume.config_map.as_ref().map(|source| source.name.clone()));
    references.secrets.extend(volume.secret.as_ref().and_then(|source| source.secret_name.clone()));
    for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
        references.config_maps.extend(source.config_map.as_ref().map(|source| source.name.clone()));
        references.secrets.extend(source.secret.as_ref().map(|source| source.name.clone()));
        references.tokens.extend(source.service_account_token.as_ref().map(token_wish));
    }
    references
}

fn token_wish(source: &k8s_openapi::api::core::v1::ServiceAccountTokenProjection) -> TokenWish {
    TokenWish {
        audience: source.audience.clone().unwrap_or_default(),
        expiration_seconds: source.expiration_seconds.unwrap_or(3600),
    }
}

/// Whether the volume consists of computed files.
pub fn is_computed(volume: &Volume) -> bool {
    volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some()
}

/// Everything a payload follows from.
pub struct Input<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// What the API has.
    pub objects: &'a Objects,
    /// Addresses, once the sandbox has them.
    pub pod_ips: &'a [IpAddr],
    /// The node.
    pub node: &'a NodeFacts,
}

/// Computes the files of `volume`.
///
/// # Errors
/// When something that is not optional is missing.
pub fn payload(volume: &Volume, input: &Input<'_>) -> Result<Payload, VolumeError> {
    let mut files = Payload::new();
    if let Some(source) = &volume.config_map {
        let list = List { items: source.items.as_deref(), mode: mode(source.default_mode), optional: source.optional };
        add_config_map(&mut files, input, &source.name, &list)?;
    } else if let Some(source) = &volume.secret {
        let list = List { items: source.items.as_deref(), mode: mode(source.default_mode), optional: source.optional };
        add_secret(&mut files, input, source.secret_name.as_deref().unwrap_or_default(), &list)?;
    } else if let Some(source) = &volume.downward_api {
        add_downward(&mut files, input, source.items.as_deref().unwrap_or_default(), mode(source.default_mode))?;
    } else if let Some(source) = &volume.projected {
        add_projected(&mut files, input, source)?;
    }
    Ok(files)
}

fn mode(bits: Option<i32>) -> u32 {
    bits.and_then(|bits| u32::try_from(bits).ok()).unwrap_or(DEFAULT_MODE) & 0o7777
}

struct List<'a> {
    items: Option<&'a [KeyToPath]>,
    mode: u32,
    optional: Option<bool>,
}

impl List<'_> {
    /// Files from `data`: all of it, or the items asked for.
    fn add(&self, files: &mut Payload, data: BTreeMap<String, Vec<u8>>, kind: &'static str) -> Result<(), VolumeError> {
        let Some(items) = self.items.filter(|items| !items.is_empty()) else {
            for (key, data) in data {
                files.insert(key, File { data, mode: self.mode, owner: None });
            }
            return Ok(());
        };
        for item in items {
            let Some(data) = data.get(&item.key) else {
                if self.optional == Some(true) {
                    continue;
                }
                return Err(VolumeError::NoKey { kind, key: item.key.clone() });
            };
            let mode = item.mode.map_or(self.mode, |bits| mode(Some(bits)));
            files.insert(item.path.clone(), File { data: data.clone(), mode, owner: None });
        }
        Ok(())
    }

    fn missing(&self, kind: &'static str, name: &str) -> Result<(), VolumeError> {
        if self.optional == Some(true) { Ok(()) } else { Err(VolumeError::NotFound { kind, name: name.to_owned() }) }
    }
}

fn add_config_map(files: &mut Payload, input: &Input<'_>, name: &str, list: &List<'_>) -> Result<(), VolumeError> {
    let Some(object) = input.objects.config_maps.get(name).and_then(Option::as_ref) else {
        return list.missing("configmap", name);
    };
    let mut data: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    data.extend(object.data.iter().flatten().map(|(key, value)| (key.clone(), value.clone().into_bytes())));
    data.extend(object.binary_data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())));
    list.add(files, data, "config")
}

fn add_secret(files: &mut Payload, input: &Input<'_>, name: &str, list: &List<'_>) -> Result<(), VolumeError> {
    let Some(object) = input.objects.secrets.get(name).and_then(Option::as_ref) else {
        return list.missing("secret", name);
    };
    let data = object.data.iter().flatten().map(|(key, value)| (key.clone(), value.0.clone())).collect();
    list.add(files, data, "secret")
}

fn add_downward(
    files: &mut Payload,
    input: &Input<'_>,
    items: &[DownwardAPIVolumeFile],
    default: u32,
) -> Result<(), VolumeError> {
    for item in items {
        let value = if let Some(field) = &item.field_ref {
            field_ref::field(input.pod, &field.field_path, input.pod_ips, input.node)?
        } else if let Some(resource) = &item.resource_field_ref {
            field_ref::resource(input.pod, None, resource, input.node)?
        } else {
            continue;
        };
        let mode = item.mode.map_or(default, |bits| mode(Some(bits)));
        files.insert(item.path.clone(), File { data: value.into_bytes(), mode, owner: None });
    }
    Ok(())
}

fn add_projected(files: &mut Payload, input: &Input<'_>, source: &ProjectedVolumeSource) -> Result<(), VolumeError> {
    let default = mode(source.default_mode);
    for source in source.sources.iter().flatten() {
        if let Some(source) = &source.config_map {
            let list = List { items: source.items.as_deref(), mode: default, optional: source.optional };
            add_config_map(files, input, &source.name, &list)?;
        } else if let Some(source) = &source.secret {
            let list = List { items: source.items.as_deref(), mode: default, optional: source.optional };
            add_secret(files, input, &source.name, &list)?;
        } else if let Some(source) = &source.downward_api {
            add_downward(files, input, source.items.as_deref().unwrap_or_default(), default)?;
        } else if let Some(source) = &source.service_account_token {
            let token = input.objects.tokens.get(&token_wish(source)).cloned().unwrap_or_default();
            let owner = common_user(containers::spec(input.pod));
            let fs_group = containers::spec(input.pod).security_context.as_ref().and_then(|context| context.fs_group);
            // The group gets its bit from the volume's ownership.
            let mode = if owner.is_some() || fs_group.is_some() { 0o600 } else { default };
            files.insert(source.path.clone(), File { data: token.into_bytes(), mode, owner });
        } else if source.cluster_trust_bundle.is_some() {
            return Err(VolumeError::Unsupported("projection of clusterTrustBundle".to_owned()));
        } else if source.pod_certificate.is_some() {
            return Err(VolumeError::Unsupported("projection of podCertificate".to_owned()));
        }
    }
    Ok(())
}

/// The user that all containers run as, when they agree.
fn common_user(spec: &PodSpec) -> Option<u32> {
    let pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let all = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut users = all.map(|container| container.security_context.as_ref().and_then(|own| own.run_as_user).or(pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then_some(first).and_then(|user| u32::try_from(user).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn volume(value: serde_json::Value) -> Volume {
        serde_json::from_value(value).unwrap()
    }

    fn objects() -> Objects {
        let map: ConfigMap = serde_json::from_value(json!({"data": {"a": "1"}, "binaryData": {"b": "AAE="}})).unwrap();
        Objects { config_maps: [("m".to_owned(), Some(map))].into(), ..Objects::default() }
    }

    fn compute(volume: &Volume, pod: serde_json::Value) -> Result<Payload, VolumeError> {
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let node = NodeFacts::default();
        payload(volume, &Input { pod: &pod, objects: &objects(), pod_ips: &[], node: &node })
    }

    #[test]
    fn items_choose_and_rename_keys() {
        let chosen = volume(json!({"name": "v", "configMap": {"name": "m", "defaultMode": 0o400,
            "items": [{"key": "b", "path": "x/y", "mode": 0o777}]}}));
        let files = compute(&chosen, json!({"spec": {"containers": []}})).unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!((files["x/y"].data.as_slice(), files["x/y"].mode), (&[0, 1][..], 0o777));
        let all = volume(json!({"name": "v", "configMap": {"name": "m", "defaultMode": 0o400}}));
        assert_eq!(compute(&all, json!({"spec": {"containers": []}})).unwrap()["a"].mode, 0o400);
    }

    #[test]
    fn what_is_missing_is_named_unless_optional() {
        let of = |optional: bool, name: &str, key: &str| {
            let volume = volume(json!({"name": "v", "configMap": {"name": name, "optional": optional,
                "items": [{"key": key, "path": "x"}]}}));
            compute(&volume, json!({"spec": {"containers": []}}))
        };
        assert_eq!(of(false, "zz", "a").unwrap_err().to_string(), "configmap \"zz\" not found");
        assert_eq!(of(false, "m", "zz").unwrap_err().to_string(), "references non-existent config key: zz");
        assert!(of(true, "zz", "a").unwrap().is_empty());
        assert!(of(true, "m", "zz").unwrap().is_empty());
    }

    #[test]
    fn a_token_belongs_to_the_user_all_containers_run_as() {
        let token = volume(
            json!({"name": "v", "projected": {"defaultMode": 0o644, "sources": [{"serviceAccountToken": {"path": "t"}}]}}),
        );
        let pod = |user: i64| {
            json!({"spec": {"securityContext": {"runAsUser": 7},
                "containers": [{"name": "a"}, {"name": "b", "securityContext": {"runAsUser": user}}]}})
        };
        let file = |user| compute(&token, pod(user)).unwrap().remove("t").unwrap();
        assert_eq!((file(7).owner, file(7).mode), (Some(7), 0o600));
        assert_eq!((file(8).owner, file(8).mode), (None, 0o644));
    }
}
