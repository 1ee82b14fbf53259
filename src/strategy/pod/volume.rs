//! Faults of volumes.

use std::collections::HashSet;

use serde_json::Value;

use super::container::{descending_path, resource_field_ref};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::apiserver::names;
use crate::strategy::value::{int, list, text};

const MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";
const HOST_PATH_TYPES: [&str; 8] =
    ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
/// Field paths that a volume may take from the pod.
const VOLUME_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];

/// All volumes: the names that mounts may use, and the faults.
pub(super) fn all(volumes: &[Value], field: &str) -> (HashSet<String>, ErrorList) {
    let (mut names, mut errors) = (HashSet::new(), ErrorList::new());
    for (i, volume) in volumes.iter().enumerate() {
        let at = format!("{field}[{i}]");
        let mut faults = source(volume, &at);
        let name = text(volume, "/name");
        if name.is_empty() {
            faults.push(FieldError::required(format!("{at}.name"), ""));
        } else {
            let wrong = names::dns1123_label(name).into_iter();
            faults.extend(wrong.map(|f| FieldError::invalid(format!("{at}.name"), name, f)));
        }
        if names.contains(name) {
            faults.push(FieldError::duplicate(format!("{at}.name"), name));
        }
        if faults.is_empty() {
            names.insert(name.to_owned());
        }
        errors.extend(faults);
    }
    (names, errors)
}

fn source(volume: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut found = false;
    let Some(volume) = volume.as_object() else { return errors };
    for (kind, source) in volume.iter().filter(|(k, v)| *k != "name" && !v.is_null()) {
        let at = format!("{field}.{kind}");
        if found {
            errors.push(FieldError::forbidden(at, "may not specify more than 1 volume type"));
            continue;
        }
        found = true;
        match kind.as_str() {
            "hostPath" => errors.extend(host_path(source, &at)),
            "secret" => errors.extend(items_of(source, "secretName", &at)),
            "configMap" => errors.extend(items_of(source, "name", &at)),
            "downwardAPI" => errors.extend(downward_api(source, &at)),
            "projected" => errors.extend(projected(source, &at)),
            "persistentVolumeClaim" if text(source, "/claimName").is_empty() => {
                errors.push(FieldError::required(format!("{at}.claimName"), ""));
            }
            "nfs" => {
                for key in ["server", "path"] {
                    if text(source, &format!("/{key}")).is_empty() {
                        errors.push(FieldError::required(format!("{at}.{key}"), ""));
                    }
                }
            }
            "csi" if text(source, "/driver").is_empty() => {
                errors.push(FieldError::required(format!("{at}.driver"), ""))
            }
            "ephemeral" if source["volumeClaimTemplate"].is_null() => {
                errors.push(FieldError::required(format!("{at}.volumeClaimTemplate"), ""));
            }
            _ => {}
        }
    }
    if !found {
        errors.push(FieldError::required(field, "must specify a volume type"));
    }
    errors
}

fn host_path(source: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let path = text(source, "/path");
    if path.is_empty() {
        errors.push(FieldError::required(format!("{field}.path"), ""));
        return errors;
    }
    if path.split('/').any(|part| part == "..") {
        errors.push(FieldError::invalid(format!("{field}.path"), path, "must not contain '..'"));
    }
    let kind = text(source, "/type");
    if !HOST_PATH_TYPES.contains(&kind) {
        errors.push(FieldError::not_supported(format!("{field}.type"), kind, &HOST_PATH_TYPES));
    }
    errors
}

/// A source of keys: its name, the mode, the items.
fn items_of(source: &Value, name: &str, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    if text(source, &format!("/{name}")).is_empty() {
        errors.push(FieldError::required(format!("{field}.{name}"), ""));
    }
    errors.extend(mode(source, "defaultMode", field));
    errors.extend(items(source, field));
    errors
}

fn items(source: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    for (i, item) in list(source, "/items").iter().enumerate() {
        let at = format!("{field}.items[{i}]");
        if text(item, "/key").is_empty() {
            errors.push(FieldError::required(format!("{at}.key"), ""));
        }
        errors.extend(item_path(text(item, "/path"), &format!("{at}.path")));
        errors.extend(mode(item, "mode", &at));
    }
    errors
}

fn item_path(path: &str, field: &str) -> ErrorList {
    if path.is_empty() {
        return vec![FieldError::required(field, "")];
    }
    let mut errors = descending_path(path, field);
    if path.starts_with("..") && !path.starts_with("../") {
        errors.push(FieldError::invalid(field, path, "must not start with '..'"));
    }
    errors
}

fn mode(source: &Value, key: &str, field: &str) -> ErrorList {
    match int(source, &format!("/{key}")).filter(|m| !(0..=0o777).contains(m)) {
        Some(mode) => vec![FieldError::invalid(format!("{field}.{key}"), mode, MODE)],
        None => ErrorList::new(),
    }
}

fn downward_api(source: &Value, field: &str) -> ErrorList {
    let mut errors = mode(source, "defaultMode", field);
    for (i, file) in list(source, "/items").iter().enumerate() {
        let at = format!("{field}.items[{i}]");
        if text(file, "/path").is_empty() {
            errors.push(FieldError::required(format!("{at}.path"), ""));
        } else {
            errors.extend(item_path(text(file, "/path"), &format!("{at}.path")));
        }
        let (reference, resource) = (&file["fieldRef"], &file["resourceFieldRef"]);
        if !reference.is_null() {
            let path = text(reference, "/fieldPath");
            let known = VOLUME_FIELDS.contains(&path) || path.ends_with("']");
            if path.is_empty() {
                errors.push(FieldError::required(format!("{at}.fieldRef.fieldPath"), ""));
            } else if !known {
                errors.push(FieldError::not_supported(format!("{at}.fieldRef.fieldPath"), path, &VOLUME_FIELDS));
            }
            if !resource.is_null() {
                errors.push(FieldError::invalid(
                    at.clone(),
                    "resource",
                    "fieldRef and resourceFieldRef can not be specified simultaneously",
                ));
            }
        } else if !resource.is_null() {
            errors.extend(resource_field_ref(resource, true, &format!("{at}.resourceFieldRef")));
        } else {
            errors.push(FieldError::required(at.clone(), "one of fieldRef and resourceFieldRef is required"));
        }
        errors.extend(mode(file, "mode", &at));
    }
    errors
}

fn projected(source: &Value, field: &str) -> ErrorList {
    let mut errors = mode(source, "defaultMode", field);
    let mut paths = HashSet::new();
    for (i, one) in list(source, "/sources").iter().enumerate() {
        let at = format!("{field}.sources[{i}]");
        let Some(kinds) = one.as_object() else { continue };
        let set: Vec<_> = kinds.iter().filter(|(_, v)| !v.is_null()).collect();
        if set.len() > 1 {
            errors.push(FieldError::forbidden(at.clone(), "may not specify more than 1 volume type per source"));
        }
        if set.is_empty() {
            errors.push(FieldError::required(at.clone(), "must specify a source"));
        }
        let Some((kind, source)) = set.first() else { continue };
        let at = format!("{at}.{kind}");
        match kind.as_str() {
            "secret" | "configMap" => {
                if text(source, "/name").is_empty() {
                    errors.push(FieldError::required(format!("{at}.name"), ""));
                }
                errors.extend(items(source, &at));
            }
            "downwardAPI" => errors.extend(downward_api(source, &at)),
            "serviceAccountToken" => {
                let path = text(source, "/path");
                errors.extend(item_path(path, &format!("{at}.path")));
                let seconds = int(source, "/expirationSeconds").unwrap_or(3600);
                if seconds < 600 {
                    let text = "may not specify a duration less than 10 minutes";
                    errors.push(FieldError::invalid(format!("{at}.expirationSeconds"), seconds, text));
                }
            }
            _ => {}
        }
        let own = ["/path"].into_iter().map(|p| text(source, p));
        for path in list(source, "/items").iter().map(|item| text(item, "/path")).chain(own).filter(|p| !p.is_empty()) {
            if !paths.insert(path) {
                let text = format!("conflicting duplicate paths {path}");
                errors.push(FieldError::invalid(at.clone(), path, text));
            }
        }
    }
    errors
}
