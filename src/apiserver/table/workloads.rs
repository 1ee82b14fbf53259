//! How workloads are printed: what makes pods.

use super::format::{age, condition, containers, items, labels, name, number, or, scalar, selector, since, text};
use super::format::{between, human_duration};
use super::{Column, Printer};
use crate::apiserver::metadata;
use serde_json::{Value, json};

/// Containers, Images, Selector.
const CONTAINERS: Column = Column::wide("Containers");
const IMAGES: Column = Column::wide("Images");
const SELECTOR: Column = Column::wide("Selector");
const TEMPLATE: &str = "/spec/template/spec/containers";

fn with_containers(mut cells: Vec<Value>, object: &Value, pointer: &str) -> Vec<Value> {
    cells.extend(containers(object, pointer));
    cells
}

pub const REPLICAS: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::integer("Desired"),
        Column::integer("Current"),
        Column::integer("Ready"),
        Column::text("Age"),
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |set| {
        let cells = vec![
            name(set),
            json!(number(set, "/spec/replicas")),
            json!(number(set, "/status/replicas")),
            json!(number(set, "/status/readyReplicas")),
            age(set),
        ];
        let mut cells = with_containers(cells, set, TEMPLATE);
        cells.push(json!(selector(set, "/spec/selector")));
        cells
    },
};

pub const DEPLOYMENT: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Ready"),
        Column::text("Up-to-date"),
        Column::text("Available"),
        Column::text("Age"),
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |deployment| {
        let cells = vec![
            name(deployment),
            json!(ready(deployment)),
            json!(number(deployment, "/status/updatedReplicas")),
            json!(number(deployment, "/status/availableReplicas")),
            age(deployment),
        ];
        let mut cells = with_containers(cells, deployment, TEMPLATE);
        let text = selector(deployment, "/spec/selector");
        cells.push(json!(if text == "<none>" { "" } else { &text }));
        cells
    },
};

fn ready(object: &Value) -> String {
    format!("{}/{}", number(object, "/status/readyReplicas"), number(object, "/spec/replicas"))
}

pub const STATEFUL_SET: Printer = Printer {
    columns: &[Column::NAME, Column::text("Ready"), Column::text("Age"), CONTAINERS, IMAGES],
    cells: |set| with_containers(vec![name(set), json!(ready(set)), age(set)], set, TEMPLATE),
};

pub const DAEMON_SET: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::integer("Desired"),
        Column::integer("Current"),
        Column::integer("Ready"),
        Column::integer("Up-to-date"),
        Column::integer("Available"),
        Column::text("Node Selector"),
        Column::text("Age"),
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |set| {
        let count = |key: &str| json!(number(set, &format!("/status/{key}")));
        let cells = vec![
            name(set),
            count("desiredNumberScheduled"),
            count("currentNumberScheduled"),
            count("numberReady"),
            count("updatedNumberScheduled"),
            count("numberAvailable"),
            json!(labels(set, "/spec/template/spec/nodeSelector")),
            age(set),
        ];
        let mut cells = with_containers(cells, set, TEMPLATE);
        cells.push(json!(selector(set, "/spec/selector")));
        cells
    },
};

pub const JOB: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Status"),
        Column::text("Completions"),
        Column::text("Duration"),
        Column::text("Age"),
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |job| {
        let succeeded = number(job, "/status/succeeded");
        let parallelism = number(job, "/spec/parallelism");
        let completions = match job.pointer("/spec/completions").and_then(Value::as_i64) {
            Some(wanted) => format!("{succeeded}/{wanted}"),
            None if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
            None => format!("{succeeded}/1"),
        };
        let now = metadata::now();
        let end = or(text(job, "/status/completionTime"), &now);
        let duration = between(text(job, "/status/startTime"), end).map(human_duration).unwrap_or_default();
        let cells = vec![name(job), json!(job_status(job)), json!(completions), json!(duration), age(job)];
        let mut cells = with_containers(cells, job, TEMPLATE);
        cells.push(json!(selector(job, "/spec/selector")));
        cells
    },
};

fn job_status(job: &Value) -> &'static str {
    let ending = job.pointer("/metadata/deletionTimestamp").is_some();
    match () {
        () if condition(job, "Complete") => "Complete",
        () if condition(job, "Failed") => "Failed",
        () if ending => "Terminating",
        () if condition(job, "Suspended") => "Suspended",
        () if condition(job, "FailureTarget") => "FailureTarget",
        () if condition(job, "SuccessCriteriaMet") => "SuccessCriteriaMet",
        () => "Running",
    }
}

pub const CRON_JOB: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Schedule"),
        Column::text("Timezone"),
        Column::boolean("Suspend"),
        Column::integer("Active"),
        Column::text("Last Schedule"),
        Column::text("Age"),
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |job| {
        let suspend = match job.pointer("/spec/suspend").and_then(Value::as_bool) {
            None => "<unset>",
            Some(true) => "True",
            Some(false) => "False",
        };
        let last = match text(job, "/status/lastScheduleTime") {
            "" => "<none>".to_owned(),
            time => since(time),
        };
        let cells = vec![
            name(job),
            json!(text(job, "/spec/schedule")),
            json!(or(text(job, "/spec/timeZone"), "<none>")),
            json!(suspend),
            json!(items(job, "/status/active").len()),
            json!(last),
            age(job),
        ];
        let mut cells = with_containers(cells, job, "/spec/jobTemplate/spec/template/spec/containers");
        cells.push(json!(selector(job, "/spec/jobTemplate/spec/selector")));
        cells
    },
};

pub const POD_TEMPLATE: Printer = Printer {
    columns: &[Column::NAME, Column::text("Containers"), Column::text("Images"), Column::text("Pod Labels")],
    cells: |template| {
        let mut cells = with_containers(vec![name(template)], template, "/template/spec/containers");
        cells.push(json!(labels(template, "/template/metadata/labels")));
        cells
    },
};

pub const DISRUPTION_BUDGET: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Min Available"),
        Column::text("Max Unavailable"),
        Column::integer("Allowed Disruptions"),
        Column::text("Age"),
    ],
    cells: |budget| {
        let bound = |key: &str| json!(or(&scalar(budget.pointer(key)), "N/A"));
        vec![
            name(budget),
            bound("/spec/minAvailable"),
            bound("/spec/maxUnavailable"),
            json!(number(budget, "/status/disruptionsAllowed")),
            age(budget),
        ]
    },
};

pub const CONTROLLER_REVISION: Printer = Printer {
    columns: &[Column::NAME, Column::text("Controller"), Column::text("Revision"), Column::text("Age")],
    cells: |revision| {
        let mut owners = items(revision, "/metadata/ownerReferences");
        let owner = owners.find(|o| o["controller"] == true).map_or_else(
            || "<none>".to_owned(),
            |owner| {
                let group = text(owner, "/apiVersion").rsplit_once('/').map_or("", |(group, _)| group);
                let kind = text(owner, "/kind").to_lowercase();
                let dot = if group.is_empty() { "" } else { "." };
                format!("{kind}{dot}{group}/{}", text(owner, "/name"))
            },
        );
        vec![name(revision), json!(owner), json!(number(revision, "/revision")), age(revision)]
    },
};

pub const AUTOSCALER: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Reference"),
        Column::text("Targets"),
        Column::text("MinPods"),
        Column::text("MaxPods"),
        Column::text("Replicas"),
        Column::text("Age"),
    ],
    cells: |scaler| {
        let reference =
            format!("{}/{}", text(scaler, "/spec/scaleTargetRef/kind"), text(scaler, "/spec/scaleTargetRef/name"));
        let least = scaler.pointer("/spec/minReplicas").and_then(Value::as_i64);
        vec![
            name(scaler),
            json!(reference),
            json!(targets(scaler)),
            json!(least.map_or("<unset>".to_owned(), |n| n.to_string())),
            json!(number(scaler, "/spec/maxReplicas")),
            json!(number(scaler, "/status/currentReplicas")),
            age(scaler),
        ]
    },
};

/// What an autoscaler aims at: `cpu: 10%/80%`.
fn targets(scaler: &Value) -> String {
    let mut all = Vec::new();
    for (index, metric) in items(scaler, "/spec/metrics").enumerate() {
        let kind = text(metric, "/type");
        let mut key = kind.to_owned();
        if let Some(first) = key.get_mut(..1) {
            first.make_ascii_lowercase();
        }
        let current = scaler.pointer(&format!("/status/currentMetrics/{index}/{key}/current"));
        let target = metric.pointer(&format!("/{key}/target"));
        let of = |source: Option<&Value>, field: &str| source.and_then(|s| s.get(field)).map(|v| scalar(Some(v)));
        let unknown = || "<unknown>".to_owned();
        let resource = text(metric, &format!("/{key}/name"));
        all.push(match kind {
            "Resource" | "ContainerResource" => match of(target, "averageValue") {
                Some(wanted) => format!("{resource}: {}/{wanted}", of(current, "averageValue").unwrap_or_else(unknown)),
                None => {
                    let percent = |value: Option<String>| value.map(|v| format!("{v}%"));
                    let now = percent(of(current, "averageUtilization")).unwrap_or_else(unknown);
                    let wanted = percent(of(target, "averageUtilization")).unwrap_or_else(|| "<auto>".to_owned());
                    format!("{resource}: {now}/{wanted}")
                }
            },
            "Pods" => format!(
                "{}/{}",
                of(current, "averageValue").unwrap_or_else(unknown),
                of(target, "averageValue").unwrap_or_default()
            ),
            "Object" | "External" => match of(target, "averageValue") {
                Some(wanted) => format!("{}/{wanted} (avg)", of(current, "averageValue").unwrap_or_else(unknown)),
                None => {
                    format!(
                        "{}/{}",
                        of(current, "value").unwrap_or_else(unknown),
                        of(target, "value").unwrap_or_default()
                    )
                }
            },
            _ => "<unknown type>".to_owned(),
        });
    }
    if let Some(percent) = scaler.pointer("/spec/targetCPUUtilizationPercentage") {
        let now = scaler.pointer("/status/currentCPUUtilizationPercentage");
        let now = now.map_or("<unknown>".to_owned(), |n| format!("{n}%"));
        all.insert(0, format!("cpu: {now}/{percent}%"));
    }
    match all.len() {
        0 => "<none>".to_owned(),
        1 | 2 => all.join(", "),
        more => format!("{} + {} more...", all[..2].join(", "), more - 2),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn autoscaler_targets() {
        let scaler = json!({ "spec": { "metrics": [
            { "type": "Resource", "resource": { "name": "cpu", "target": { "averageUtilization": 80 } } },
            { "type": "Pods", "pods": { "target": { "averageValue": "5" } } }] },
            "status": { "currentMetrics": [{ "resource": { "current": { "averageUtilization": 10 } } }] } });
        assert_eq!(targets(&scaler), "cpu: 10%/80%, <unknown>/5");
    }

    #[test]
    fn every_row_has_as_many_cells_as_columns() {
        for printer in [
            &REPLICAS,
            &DEPLOYMENT,
            &STATEFUL_SET,
            &DAEMON_SET,
            &JOB,
            &CRON_JOB,
            &POD_TEMPLATE,
            &DISRUPTION_BUDGET,
            &CONTROLLER_REVISION,
            &AUTOSCALER,
        ] {
            assert_eq!((printer.cells)(&json!({ "metadata": {} })).len(), printer.columns.len());
        }
    }
}
