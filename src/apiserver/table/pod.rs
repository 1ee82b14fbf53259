//! How pods are printed: the one kind whose cells are a story.

use super::format::{age, condition, flag, items, name, number, or, since, text};
use super::{Column, Printer};
use serde_json::{Value, json};

pub const POD: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Ready"),
        Column::text("Status"),
        Column::text("Restarts"),
        Column::text("Age"),
        Column::wide("IP"),
        Column::wide("Node"),
        Column::wide("Nominated Node"),
        Column::wide("Readiness Gates"),
    ],
    cells,
};

/// What the containers of a pod come to.
#[derive(Default)]
struct Summary {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    /// When a container last ended, RFC 3339 (which sorts as text).
    last_end: String,
}

fn cells(pod: &Value) -> Vec<Value> {
    let summary = summarize(pod);
    let restarts = match (summary.restarts, summary.last_end.as_str()) {
        (0, _) | (_, "") => summary.restarts.to_string(),
        (restarts, end) => format!("{restarts} ({} ago)", since(end)),
    };
    let gates = items(pod, "/spec/readinessGates");
    let gates = match gates.len() {
        0 => "<none>".to_owned(),
        all => {
            let open = gates.filter(|g| condition(pod, text(g, "/conditionType"))).count();
            format!("{open}/{all}")
        }
    };
    vec![
        name(pod),
        json!(format!("{}/{}", summary.ready, summary.total)),
        json!(summary.reason),
        json!(restarts),
        age(pod),
        json!(or(text(pod, "/status/podIPs/0/ip"), "<none>")),
        json!(or(text(pod, "/spec/nodeName"), "<none>")),
        json!(or(text(pod, "/status/nominatedNodeName"), "<none>")),
        json!(gates),
    ]
}

fn is_sidecar(pod: &Value, name: &str) -> bool {
    items(pod, "/spec/initContainers").any(|c| c["name"] == name && c["restartPolicy"] == "Always")
}

fn summarize(pod: &Value) -> Summary {
    let phase = text(pod, "/status/phase");
    let mut summary = Summary {
        reason: or(text(pod, "/status/reason"), phase).to_owned(),
        total: items(pod, "/spec/containers").len()
            + items(pod, "/spec/initContainers").filter(|c| c["restartPolicy"] == "Always").count(),
        ..Summary::default()
    };
    let gated =
        items(pod, "/status/conditions").any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated");
    if gated {
        summary.reason = "SchedulingGated".to_owned();
    }
    let (initializing, sidecar_restarts, sidecar_end) = init_containers(pod, &mut summary);
    if !initializing || condition(pod, "Initialized") {
        summary.restarts = sidecar_restarts;
        summary.last_end = sidecar_end;
        containers(pod, &mut summary);
    }
    if pod.pointer("/metadata/deletionTimestamp").is_some() {
        if text(pod, "/status/reason") == "NodeLost" {
            summary.reason = "Unknown".to_owned();
        } else if !matches!(phase, "Succeeded" | "Failed") {
            summary.reason = "Terminating".to_owned();
        }
    }
    summary
}

/// Why a container ended, in one word.
fn end_reason(terminated: &Value, prefix: &str) -> String {
    let reason = text(terminated, "/reason");
    match (reason, number(terminated, "/signal")) {
        ("", 0) => format!("{prefix}ExitCode:{}", number(terminated, "/exitCode")),
        ("", signal) => format!("{prefix}Signal:{signal}"),
        (reason, _) => format!("{prefix}{reason}"),
    }
}

fn later(end: &mut String, container: &Value) {
    let finished = text(container, "/lastState/terminated/finishedAt");
    if finished > end.as_str() {
        *end = finished.to_owned();
    }
}

/// Whether the pod is still initializing, and restarts and last end of its sidecars.
fn init_containers(pod: &Value, summary: &mut Summary) -> (bool, i64, String) {
    let (mut sidecar_restarts, mut sidecar_end) = (0, String::new());
    let total = items(pod, "/spec/initContainers").len();
    for (index, container) in items(pod, "/status/initContainerStatuses").enumerate() {
        let sidecar = is_sidecar(pod, text(container, "/name"));
        summary.restarts += number(container, "/restartCount");
        later(&mut summary.last_end, container);
        if sidecar {
            sidecar_restarts += number(container, "/restartCount");
            later(&mut sidecar_end, container);
        }
        let terminated = container.pointer("/state/terminated");
        if terminated.is_some_and(|t| number(t, "/exitCode") == 0) {
            continue;
        }
        if sidecar && flag(container, "/started") {
            summary.ready += usize::from(flag(container, "/ready"));
            continue;
        }
        let waiting = text(container, "/state/waiting/reason");
        summary.reason = match terminated {
            Some(terminated) => end_reason(terminated, "Init:"),
            None if !matches!(waiting, "" | "PodInitializing") => format!("Init:{waiting}"),
            None => format!("Init:{index}/{total}"),
        };
        return (true, sidecar_restarts, sidecar_end);
    }
    (false, sidecar_restarts, sidecar_end)
}

fn containers(pod: &Value, summary: &mut Summary) {
    let (mut running, mut error) = (false, String::new());
    for container in items(pod, "/status/containerStatuses").rev() {
        summary.restarts += number(container, "/restartCount");
        later(&mut summary.last_end, container);
        let waiting = text(container, "/state/waiting/reason");
        if !waiting.is_empty() {
            summary.reason = waiting.to_owned();
        } else if let Some(terminated) = container.pointer("/state/terminated") {
            summary.reason = end_reason(terminated, "");
            if number(terminated, "/exitCode") != 0 {
                error = summary.reason.clone();
            }
        } else if flag(container, "/ready") && container.pointer("/state/running").is_some() {
            running = true;
            summary.ready += 1;
        }
    }
    if summary.reason == "Completed" {
        if running && condition(pod, "Ready") {
            summary.reason = "Running".to_owned();
        } else if !error.is_empty() {
            summary.reason = error;
        } else if running {
            summary.reason = "NotReady".to_owned();
        }
    }
}

/// The conditions of a pod's row: whether it has ended.
pub fn conditions(pod: &Value) -> Option<Value> {
    let (reason, message) = match text(pod, "/status/phase") {
        "Succeeded" => ("Succeeded", "The pod has completed successfully."),
        "Failed" => ("Failed", "The pod failed."),
        _ => return None,
    };
    Some(json!([{ "type": "Completed", "status": "True", "reason": reason, "message": message }]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(status: Value) -> (String, String, String) {
        let pod = json!({ "metadata": { "name": "p" }, "status": status,
            "spec": { "containers": [{ "name": "a" }, { "name": "b" }], "initContainers": [{ "name": "i" }] } });
        let cells = cells(&pod);
        let text = |at: usize| cells[at].as_str().unwrap().to_owned();
        (text(1), text(2), text(3))
    }

    #[test]
    fn a_pod_in_all_its_states() {
        let expect =
            |ready: &str, status: &str, restarts: &str| (ready.to_owned(), status.to_owned(), restarts.to_owned());
        assert_eq!(row(json!({ "phase": "Pending" })), expect("0/2", "Pending", "0"));
        let waiting =
            json!({ "phase": "Pending", "initContainerStatuses": [{ "name": "i", "state": { "running": {} } }] });
        assert_eq!(row(waiting), expect("0/2", "Init:0/1", "0"));
        let crash = json!({ "phase": "Running", "containerStatuses": [
            { "name": "a", "ready": true, "restartCount": 0, "state": { "running": {} } },
            { "name": "b", "restartCount": 3, "state": { "waiting": { "reason": "CrashLoopBackOff" } } }] });
        assert_eq!(row(crash), expect("1/2", "CrashLoopBackOff", "3"));
        let done = json!({ "phase": "Succeeded", "containerStatuses": [
            { "name": "a", "state": { "terminated": { "exitCode": 0, "reason": "Completed" } } }] });
        assert_eq!(row(done), expect("0/2", "Completed", "0"));
        let failed = json!({ "phase": "Failed", "containerStatuses": [
            { "name": "a", "state": { "terminated": { "exitCode": 2 } } }] });
        assert_eq!(row(failed), expect("0/2", "ExitCode:2", "0"));
    }
}
