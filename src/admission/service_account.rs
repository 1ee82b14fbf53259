//! ServiceAccount: every pod runs as an account that exists, with its pull secrets and its token mounted.

use super::pod::{self, is_mirror, items, push, text};
use super::{Request, World};
use crate::apiserver::{names, status::Status};
use crate::auth::service_account::WARN_ONLY_EXPIRATION;
use serde_json::{Value, json};
use std::time::Duration;

const DEFAULT: &str = "default";
const VOLUME: &str = "kube-api-access-";
const MOUNT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
const ENFORCE_SECRETS: &str = "kubernetes.io/enforce-mountable-secrets";
/// How often and how long the `default` account of a young namespace is waited for.
const PATIENCE: (u32, Duration) = (20, Duration::from_millis(75));

/// Sets account, pull secrets and token volume of a new pod.
pub async fn mutate(world: &World, request: &mut Request<'_>) -> Result<(), Status> {
    if !request.is("", "pods") || !request.creates() {
        return Ok(());
    }
    if is_mirror(request.object) {
        return check_mirror(request);
    }
    let spec = &mut request.object["spec"];
    if text(spec, "serviceAccountName").is_empty() {
        spec["serviceAccountName"] = DEFAULT.into();
    }
    spec["serviceAccount"] = spec["serviceAccountName"].clone();
    let account = wait_for_account(world, request).await?;
    let spec = &mut request.object["spec"];
    let preference = [&spec["automountServiceAccountToken"], &account["automountServiceAccountToken"]];
    if preference.into_iter().find_map(Value::as_bool).unwrap_or(true) {
        mount_token(spec);
    }
    if items(&spec["imagePullSecrets"]).next().is_none() {
        let secrets: Vec<Value> = items(&account["imagePullSecrets"]).map(|s| json!({ "name": s["name"] })).collect();
        if !secrets.is_empty() {
            spec["imagePullSecrets"] = secrets.into();
        }
    }
    Ok(())
}

/// Refuses accounts that do not exist, and secrets that an account does not list when it asks for that.
pub fn validate(world: &World, request: &Request<'_>) -> Result<(), Status> {
    let ephemeral = request.is_sub("", "pods", "ephemeralcontainers") && request.updates();
    let created = request.is("", "pods") && request.creates();
    if !ephemeral && !created {
        return Ok(());
    }
    if created && is_mirror(request.object) {
        return check_mirror(request);
    }
    let name = text(&request.object["spec"], "serviceAccountName");
    if name.is_empty() {
        let pod = text(&request.object["metadata"], "name");
        return Err(request.forbidden(format_args!("no service account specified for pod {}/{pod}", request.namespace)));
    }
    let account = find(world, request, name)?.ok_or_else(|| missing(request, name))?;
    let enforced = text(&account["metadata"]["annotations"], ENFORCE_SECRETS);
    if !matches!(enforced, "1" | "t" | "T" | "true" | "TRUE" | "True") {
        return Ok(());
    }
    match unlisted_secret(&account, &request.object["spec"], ephemeral) {
        Some(why) => Err(request.forbidden(why)),
        None => Ok(()),
    }
}

fn find(world: &World, request: &Request<'_>, name: &str) -> Result<Option<Value>, Status> {
    world.get("", "serviceaccounts", request.namespace, name)
}

fn missing(request: &Request<'_>, name: &str) -> Status {
    let namespace = request.namespace;
    request.forbidden(format_args!(
        "error looking up service account {namespace}/{name}: serviceaccount \"{name}\" not found"
    ))
}

async fn wait_for_account(world: &World, request: &Request<'_>) -> Result<Value, Status> {
    let name = text(&request.object["spec"], "serviceAccountName");
    let attempts = if name == DEFAULT { PATIENCE.0 } else { 1 };
    for attempt in 0..attempts {
        if attempt > 0 {
            tokio::time::sleep(PATIENCE.1).await;
        }
        if let Some(account) = find(world, request, name)? {
            return Ok(account);
        }
    }
    Err(missing(request, name))
}

/// A mirror pod is made by a node and may not draw on anything of the cluster.
fn check_mirror(request: &Request<'_>) -> Result<(), Status> {
    let spec = &request.object["spec"];
    let why = if !text(spec, "serviceAccountName").is_empty() {
        "a mirror pod may not reference service accounts"
    } else if !pod_secrets(spec).is_empty() {
        "a mirror pod may not reference secrets"
    } else if items(&spec["volumes"])
        .flat_map(|volume| items(&volume["projected"]["sources"]))
        .any(|source| source.get("serviceAccountToken").is_some())
    {
        "a mirror pod may not use ServiceAccountToken volume projections"
    } else {
        return Ok(());
    };
    Err(request.forbidden(why))
}

/// Names of secrets in the places a pod spec can name them.
pub(super) fn pod_secrets(spec: &Value) -> Vec<&str> {
    let mut found: Vec<&str> = items(&spec["imagePullSecrets"]).map(|secret| text(secret, "name")).collect();
    for (_, container) in pod::containers(spec) {
        found.extend(items(&container["env"]).map(|e| text(&e["valueFrom"]["secretKeyRef"], "name")));
        found.extend(items(&container["envFrom"]).map(|e| text(&e["secretRef"], "name")));
    }
    for volume in items(&spec["volumes"]) {
        found.push(text(&volume["secret"], "secretName"));
        found.push(text(&volume["azureFile"], "secretName"));
        found.push(text(&volume["csi"]["nodePublishSecretRef"], "name"));
        found.extend(items(&volume["projected"]["sources"]).map(|source| text(&source["secret"], "name")));
        for driver in ["cephfs", "flexVolume", "rbd", "scaleIO", "iscsi", "storageos"] {
            found.push(text(&volume[driver]["secretRef"], "name"));
        }
    }
    found.retain(|name| !name.is_empty());
    found
}

fn unlisted_secret(account: &Value, spec: &Value, ephemeral: bool) -> Option<String> {
    let owner = text(&account["metadata"], "name");
    let listed = |list: &str, name: &str| items(&account[list]).any(|secret| secret["name"] == name);
    let refused = format!("is not allowed because service account {owner} does not reference that");
    if !ephemeral {
        for name in items(&spec["volumes"]).filter_map(|volume| volume["secret"]["secretName"].as_str()) {
            if !listed("secrets", name) {
                return Some(format!("volume with secret.secretName=\"{name}\" {refused} secret"));
            }
        }
    }
    for (list, container) in pod::containers(spec) {
        let what = match list {
            "initContainers" => "init container",
            "containers" => "container",
            _ => "ephemeral container",
        };
        if ephemeral != (list == "ephemeralContainers") {
            continue;
        }
        let who = text(container, "name");
        for variable in items(&container["env"]) {
            if let Some(name) = variable["valueFrom"]["secretKeyRef"]["name"].as_str().filter(|n| !listed("secrets", n))
            {
                let variable = text(variable, "name");
                return Some(format!(
                    "{what} {who} with envVar {variable} referencing secret.secretName=\"{name}\" {refused} secret"
                ));
            }
        }
        for name in items(&container["envFrom"]).filter_map(|source| source["secretRef"]["name"].as_str()) {
            if !listed("secrets", name) {
                return Some(format!(
                    "{what} {who} with envFrom referencing secret.secretName=\"{name}\" {refused} secret"
                ));
            }
        }
    }
    if ephemeral {
        return None;
    }
    for (at, secret) in items(&spec["imagePullSecrets"]).enumerate() {
        let name = text(secret, "name");
        if !listed("imagePullSecrets", name) {
            return Some(format!("imagePullSecrets[{at}].name=\"{name}\" {refused} imagePullSecret"));
        }
    }
    None
}

/// Mounts the token volume in every container that mounts nothing else there; adds the volume if one needs it.
fn mount_token(spec: &mut Value) {
    let existing = items(&spec["volumes"]).map(|volume| text(volume, "name")).find(|name| name.starts_with(VOLUME));
    let (name, exists) = match existing {
        Some(name) => (name.to_owned(), true),
        None => (names::generate(VOLUME), false),
    };
    let mut needed = false;
    for container in pod::containers_mut(spec) {
        if items(&container["volumeMounts"]).any(|mount| mount["mountPath"] == MOUNT_PATH) {
            continue;
        }
        push(container, "volumeMounts", json!({ "name": name, "readOnly": true, "mountPath": MOUNT_PATH }));
        needed = true;
    }
    if needed && !exists {
        let sources = json!([
            { "serviceAccountToken": { "expirationSeconds": WARN_ONLY_EXPIRATION, "path": "token" } },
            { "configMap": { "name": "kube-root-ca.crt", "items": [{ "key": "ca.crt", "path": "ca.crt" }] } },
            { "downwardAPI": { "items": [
                { "path": "namespace", "fieldRef": { "apiVersion": "v1", "fieldPath": "metadata.namespace" } },
            ] } },
        ]);
        push(spec, "volumes", json!({ "name": name, "projected": { "sources": sources, "defaultMode": 420 } }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_mounted_where_nothing_else_is() {
        let mut spec = json!({
            "containers": [{ "name": "a" }, { "name": "b", "volumeMounts": [{ "name": "own", "mountPath": MOUNT_PATH }] }],
            "initContainers": [{ "name": "i" }],
        });
        mount_token(&mut spec);
        let volume = spec["volumes"][0]["name"].as_str().unwrap().to_owned();
        assert!(volume.starts_with(VOLUME) && volume.len() == VOLUME.len() + 5);
        assert_eq!(spec["containers"][0]["volumeMounts"][0]["name"], volume.as_str());
        assert_eq!(spec["containers"][1]["volumeMounts"].as_array().unwrap().len(), 1);
        assert_eq!(spec["initContainers"][0]["volumeMounts"][0]["readOnly"], true);
        let before = spec.clone();
        mount_token(&mut spec);
        assert_eq!(spec, before, "a template that went through admission is not mounted twice");
    }

    #[test]
    fn an_account_that_enforces_its_secrets_names_the_one_that_is_missing() {
        let account = json!({ "metadata": { "name": "sa" }, "secrets": [{ "name": "ok" }] });
        let spec = json!({ "volumes": [{ "secret": { "secretName": "ok" } }],
            "containers": [{ "name": "c", "env": [{ "name": "E", "valueFrom": { "secretKeyRef": { "name": "no" } } }] }] });
        assert_eq!(
            unlisted_secret(&account, &spec, false).unwrap(),
            "container c with envVar E referencing secret.secretName=\"no\" is not allowed because service account sa does not reference that secret"
        );
        assert_eq!(unlisted_secret(&account, &spec, true), None);
    }
}
