//! Jobs and CronJobs: a selector made of the Job's own identity, and what of a spec may change.

use jiff::tz::TimeZone;
use serde_json::{Value, json};

use super::pod;
use super::value::{int, object_mut, text, truth};
use super::workload::{NOT_NEGATIVE, label_selector, selector_matches};
use super::{Context, Strategy};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::controllers::schedule::Schedule;
use crate::controllers::timezone;

/// Jobs.
pub static JOB: Strategy = Strategy {
    prepare_create: |_, new| {
        new["status"] = json!({});
        pod::default_template(&mut new["spec"]["template"]);
        if !truth(new, "/spec/manualSelector") {
            generate_selector(new);
        }
    },
    prepare_update: |context, new, _| {
        if context.subresource.is_empty() {
            pod::default_template(&mut new["spec"]["template"]);
        }
    },
    validate_create: |context, new| job(context, new),
    validate_update: update,
    generation: true,
    ..Strategy::DEFAULT
};

/// CronJobs.
pub static CRON_JOB: Strategy = Strategy {
    prepare_create: |_, new| {
        new["status"] = json!({});
        pod::default_template(&mut new["spec"]["jobTemplate"]["spec"]["template"]);
    },
    prepare_update: |context, new, _| {
        if context.subresource.is_empty() {
            pod::default_template(&mut new["spec"]["jobTemplate"]["spec"]["template"]);
        }
    },
    validate_create: |context, new| cron_job(context, new, None),
    validate_update: |context, new, old| {
        if context.subresource.is_empty() { cron_job(context, new, Some(old)) } else { ErrorList::new() }
    },
    generation: true,
    ..Strategy::DEFAULT
};

/// Pods of a Job are found by its uid, under the label of today and of old.
fn generate_selector(job: &mut Value) {
    let (name, uid) = (text(job, "/metadata/name").to_owned(), text(job, "/metadata/uid").to_owned());
    if !job["spec"]["template"].is_object() {
        return;
    }
    let metadata = object_mut(&mut job["spec"]["template"], "metadata");
    let labels = metadata.entry("labels").or_insert_with(|| json!({}));
    if let Some(labels) = labels.as_object_mut() {
        for (key, value) in [
            ("job-name", &name),
            ("batch.kubernetes.io/job-name", &name),
            ("controller-uid", &uid),
            ("batch.kubernetes.io/controller-uid", &uid),
        ] {
            labels.entry(key).or_insert_with(|| json!(value));
        }
    }
    let selector = object_mut(&mut job["spec"], "selector");
    let match_labels = selector.entry("matchLabels").or_insert_with(|| json!({}));
    if let Some(labels) = match_labels.as_object_mut() {
        labels.entry("batch.kubernetes.io/controller-uid").or_insert_with(|| json!(uid));
    }
}

fn job(context: &Context<'_>, job: &Value) -> ErrorList {
    let mut errors = spec(context, &job["spec"], "spec");
    let selector = &job["spec"]["selector"];
    if selector.is_null() {
        errors.push(FieldError::required("spec.selector", ""));
    } else {
        errors.extend(label_selector(selector, "spec.selector"));
        let labels = &job["spec"]["template"]["metadata"]["labels"];
        if !selector_matches(selector, labels) {
            let text = "`selector` does not match template `labels`";
            errors.push(FieldError::invalid("spec.template.metadata.labels", labels.clone(), text));
        }
    }
    errors
}

fn spec(context: &Context<'_>, spec: &Value, field: &str) -> ErrorList {
    let mut errors = ErrorList::new();
    let at = |name: &str| format!("{field}.{name}");
    for key in [
        "parallelism",
        "completions",
        "activeDeadlineSeconds",
        "backoffLimit",
        "ttlSecondsAfterFinished",
        "backoffLimitPerIndex",
        "maxFailedIndexes",
    ] {
        if let Some(n) = spec[key].as_i64().filter(|n| *n < 0) {
            errors.push(FieldError::invalid(at(key), n, NOT_NEGATIVE));
        }
    }
    if int(spec, "/maxFailedIndexes").is_some() && int(spec, "/backoffLimitPerIndex").is_none() {
        errors.push(FieldError::required(at("backoffLimitPerIndex"), "when maxFailedIndexes is specified"));
    }
    let mode = text(spec, "/completionMode");
    match mode {
        "Indexed" => {
            if int(spec, "/completions").is_none() {
                errors.push(FieldError::required(at("completions"), "when completion mode is Indexed"));
            }
            if let (Some(max), Some(all)) = (int(spec, "/maxFailedIndexes"), int(spec, "/completions"))
                && max > all
            {
                errors.push(FieldError::invalid(
                    at("maxFailedIndexes"),
                    max,
                    "must be less than or equal to completions",
                ));
            }
        }
        "" | "NonIndexed" => {
            for key in ["backoffLimitPerIndex", "maxFailedIndexes"] {
                if let Some(n) = spec[key].as_i64() {
                    errors.push(FieldError::invalid(at(key), n, "requires indexed completion mode"));
                }
            }
            if !spec["successPolicy"].is_null() {
                errors.push(FieldError::invalid(
                    at("successPolicy"),
                    spec["successPolicy"].clone(),
                    "requires indexed completion mode",
                ));
            }
        }
        other => errors.push(FieldError::not_supported(at("completionMode"), other, &["Indexed", "NonIndexed"])),
    }
    errors.extend(pod::template(context, &spec["template"], &at("template")));
    let failure_policy = !spec["podFailurePolicy"].is_null();
    let restart = at("template.spec.restartPolicy");
    match text(spec, "/template/spec/restartPolicy") {
        "" | "Always" => errors.push(FieldError::required(restart, "valid values: \"OnFailure\", \"Never\"")),
        "OnFailure" if failure_policy => {
            let text = "only \"Never\" is supported when podFailurePolicy is specified";
            errors.push(FieldError::invalid(restart, "OnFailure", text));
        }
        "OnFailure" | "Never" => {}
        other => errors.push(FieldError::not_supported(restart, other, &["Never", "OnFailure"])),
    }
    errors
}

fn update(context: &Context<'_>, new: &Value, old: &Value) -> ErrorList {
    if !context.subresource.is_empty() {
        return ErrorList::new();
    }
    let mut errors = job(context, new);
    let (is, was) = (&new["spec"], &old["spec"]);
    let immutable = |key: &str| FieldError::invalid(format!("spec.{key}"), is[key].clone(), "field is immutable");
    // An Indexed Job may change its size, together with its parallelism.
    let elastic = text(is, "/completionMode") == "Indexed" && is["completions"] == is["parallelism"];
    if is["completions"] != was["completions"] && !elastic {
        errors.push(immutable("completions"));
    }
    for key in ["selector", "completionMode", "podFailurePolicy", "backoffLimitPerIndex", "managedBy", "successPolicy"]
    {
        if is[key] != was[key] {
            errors.push(immutable(key));
        }
    }
    let never_started = truth(was, "/suspend") && old["status"]["startTime"].is_null();
    if template_that_stays(is, never_started) != template_that_stays(was, never_started) {
        errors.push(immutable("template"));
    }
    errors
}

/// The template without what a suspended Job that never ran may change (KEP-2926).
fn template_that_stays(spec: &Value, never_started: bool) -> Value {
    let mut template = spec["template"].clone();
    if never_started {
        for key in ["nodeSelector", "affinity", "tolerations", "schedulingGates"] {
            template["spec"].as_object_mut().map(|spec| spec.remove(key));
        }
        for key in ["labels", "annotations"] {
            template["metadata"].as_object_mut().map(|metadata| metadata.remove(key));
        }
    }
    template
}

fn time_zone(name: &str) -> Option<FieldError> {
    let why = if name.is_empty() {
        "timeZone must be nil or non-empty string".to_owned()
    } else if name.eq_ignore_ascii_case("local") {
        "timeZone must be an explicit time zone as defined in https://www.iana.org/time-zones".to_owned()
    } else {
        timezone::load(name).err()?.to_string()
    };
    Some(FieldError::invalid("spec.timeZone", name, why))
}

fn cron_job(context: &Context<'_>, object: &Value, old: Option<&Value>) -> ErrorList {
    let mut errors = ErrorList::new();
    let spec_of = &object["spec"];
    let schedule = text(spec_of, "/schedule");
    if schedule.is_empty() {
        errors.push(FieldError::required("spec.schedule", ""));
    } else {
        let zoned = schedule.starts_with("TZ=") || schedule.starts_with("CRON_TZ=");
        if let Some(error) = Schedule::parse(schedule, TimeZone::UTC).err().filter(|_| !zoned) {
            errors.push(FieldError::invalid("spec.schedule", schedule, error.to_string()));
        }
        if schedule.contains("TZ") {
            let text = "cannot use TZ or CRON_TZ in schedule, use timeZone field instead";
            errors.push(FieldError::invalid("spec.schedule", schedule, text));
        }
    }
    let known = old.is_some_and(|old| old["spec"]["timeZone"] == spec_of["timeZone"]);
    if let Some(name) = spec_of["timeZone"].as_str().filter(|_| !known) {
        errors.extend(time_zone(name));
    }
    for key in ["startingDeadlineSeconds", "successfulJobsHistoryLimit", "failedJobsHistoryLimit"] {
        if let Some(n) = spec_of[key].as_i64().filter(|n| *n < 0) {
            errors.push(FieldError::invalid(format!("spec.{key}"), n, NOT_NEGATIVE));
        }
    }
    match text(spec_of, "/concurrencyPolicy") {
        "" => errors.push(FieldError::required("spec.concurrencyPolicy", "")),
        "Allow" | "Forbid" | "Replace" => {}
        other => {
            errors.push(FieldError::not_supported("spec.concurrencyPolicy", other, &["Allow", "Forbid", "Replace"]))
        }
    }
    errors.extend(spec(context, &spec_of["jobTemplate"]["spec"], "spec.jobTemplate.spec"));
    if object["metadata"]["name"].as_str().is_some_and(|name| name.len() > 52) {
        errors.push(FieldError::invalid(
            "metadata.name",
            object["metadata"]["name"].clone(),
            "must be no more than 52 characters",
        ));
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_selects_its_own_pods() {
        let mut job = json!({"metadata": {"name": "j", "uid": "u"}, "spec": {"template": {"spec": {}}}});
        generate_selector(&mut job);
        assert_eq!(job["spec"]["selector"]["matchLabels"], json!({"batch.kubernetes.io/controller-uid": "u"}));
        assert!(selector_matches(&job["spec"]["selector"], &job["spec"]["template"]["metadata"]["labels"]));
        assert_eq!(job["spec"]["template"]["metadata"]["labels"]["job-name"], "j");
    }
}
