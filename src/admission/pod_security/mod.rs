//! PodSecurity: the labels `pod-security.kubernetes.io/{enforce,warn,audit}[-version]` of a namespace say which pods it takes.
//! Namespaces without them are privileged.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`policy`] | levels, versions, the labels |
//! | [`checks`] | the checks of the baseline and restricted levels, upstream's texts |

pub mod checks;
pub mod policy;

use super::pod::items;
use super::{Request, Warnings, World};
use crate::apiserver::field::FieldError;
use crate::apiserver::status::Status;
use policy::{Level, Policy};
use serde_json::Value;

const IGNORED: [&str; 8] = ["exec", "attach", "binding", "eviction", "log", "portforward", "proxy", "status"];

/// Refuses or warns.
pub fn validate(world: &World, request: &Request<'_>) -> Result<Warnings, Status> {
    if !request.creates() && !request.updates() {
        return Ok(Warnings::new());
    }
    if request.is("", "namespaces") {
        return validate_namespace(world, request);
    }
    let is_pod = request.group.is_empty() && request.resource == "pods";
    let template = if is_pod { None } else { template_of(request) };
    if (is_pod && IGNORED.contains(&request.subresource)) || (!is_pod && template.is_none()) {
        return Ok(Warnings::new());
    }
    let Some(namespace) = world.get::<Value>("", "namespaces", "", request.namespace)? else {
        return Ok(Warnings::new());
    };
    let policy = Policy::of(&namespace["metadata"]["labels"]).0;
    match template {
        None => {
            if request.updates() && !is_significant(request) {
                return Ok(Warnings::new());
            }
            evaluate(&policy, request.object).map_err(|why| request.forbidden(why))
        }
        // Controllers are only warned about: their pods are what is refused.
        Some(template) => Ok(warning(&policy, template).into_iter().collect()),
    }
}

fn evaluate(policy: &Policy, pod: &Value) -> Result<Warnings, String> {
    let problems = checks::evaluate(policy.enforce, pod);
    if !problems.is_empty() {
        return Err(format!("violates PodSecurity \"{}\": {}", policy.enforce, problems.join(", ")));
    }
    Ok(warning(policy, pod).into_iter().collect())
}

fn warning(policy: &Policy, pod: &Value) -> Option<String> {
    let problems = checks::evaluate(policy.warn, pod);
    (!problems.is_empty()).then(|| format!("would violate PodSecurity \"{}\": {}", policy.warn, problems.join(", ")))
}

/// The pod template of a workload.
fn template_of<'a>(request: &'a Request<'_>) -> Option<&'a Value> {
    if !request.subresource.is_empty() {
        return None;
    }
    let object = &*request.object;
    let template = match (request.group, request.resource) {
        ("", "podtemplates") => &object["template"],
        ("", "replicationcontrollers") | ("apps", "deployments" | "replicasets" | "statefulsets" | "daemonsets") => {
            &object["spec"]["template"]
        }
        ("batch", "jobs") => &object["spec"]["template"],
        ("batch", "cronjobs") => &object["spec"]["jobTemplate"]["spec"]["template"],
        _ => return None,
    };
    template["spec"].is_object().then_some(template)
}

/// Whether an update changes anything that checks look at: all but images, times and tolerations of the spec, and the
/// annotations that stand for profiles.
fn is_significant(request: &Request<'_>) -> bool {
    let Some(old) = request.old else { return true };
    let strip = |pod: &Value| {
        let mut spec = pod["spec"].clone();
        if let Some(fields) = spec.as_object_mut() {
            fields.remove("activeDeadlineSeconds");
            fields.remove("tolerations");
        }
        for list in ["containers", "initContainers", "ephemeralContainers"] {
            for container in spec[list].as_array_mut().into_iter().flatten() {
                if let Some(fields) = container.as_object_mut() {
                    fields.remove("image");
                    fields.remove("resources");
                }
            }
        }
        let annotations = pod["metadata"]["annotations"].as_object().into_iter().flatten();
        let profiles: Vec<(String, Value)> = annotations
            .filter(|(key, _)| checks::is_profile_annotation(key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        (spec, profiles)
    };
    strip(old) != strip(request.object)
}

fn validate_namespace(world: &World, request: &Request<'_>) -> Result<Warnings, Status> {
    let (policy, errors) = Policy::of(&request.object["metadata"]["labels"]);
    let before = request.old.map(|old| Policy::of(&old["metadata"]["labels"]));
    // Labels that were wrong before may stay wrong: nobody else's update shall fail for them.
    if !errors.is_empty() && before.as_ref().is_none_or(|(_, old)| *old != errors) {
        let errors: Vec<FieldError> = errors
            .into_iter()
            .map(|e| FieldError::invalid(format!("metadata.labels[{}]", e.label), e.value, e.why))
            .collect();
        return Err(Status::invalid("", "Namespace", request.display_name(), &errors));
    }
    let Some((before, _)) = before else { return Ok(Warnings::new()) };
    let stricter = policy.enforce != before.enforce && policy.enforce.level != Level::Privileged;
    if !stricter || (before.enforce.level >= policy.enforce.level && before.enforce.minor == policy.enforce.minor) {
        return Ok(Warnings::new());
    }
    let pods: Vec<Value> = world.list("", "pods", request.name)?;
    let mut found: Vec<(String, String, usize)> = Vec::new();
    for pod in &pods {
        let problems = checks::reasons(policy.enforce, pod);
        if problems.is_empty() {
            continue;
        }
        let problems = problems.join(", ");
        match found.iter_mut().find(|(_, known, _)| *known == problems) {
            Some((_, _, count)) => *count += 1,
            None => {
                let name = pod["metadata"]["name"].as_str().unwrap_or("").to_owned();
                found.push((name, problems, 1));
            }
        }
    }
    if found.is_empty() {
        return Ok(Warnings::new());
    }
    let head = format!(
        "existing pods in namespace \"{}\" violate the new PodSecurity enforce level \"{}\"",
        request.name, policy.enforce
    );
    let mut lines: Vec<String> = found
        .into_iter()
        .map(|(name, problems, count)| match count {
            1 => format!("{name}: {problems}"),
            2 => format!("{name} (and 1 other pod): {problems}"),
            many => format!("{name} (and {} other pods): {problems}", many - 1),
        })
        .collect();
    lines.sort();
    Ok(std::iter::once(head).chain(lines).collect())
}

/// Names joined as upstream's texts do.
fn quoted<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    names.into_iter().map(|name| format!("\"{}\"", name.as_ref())).collect::<Vec<_>>().join(", ")
}

/// All containers of a pod, init containers first, as upstream visits them.
fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers", "ephemeralContainers"].into_iter().flat_map(|list| items(&spec[list]))
}
