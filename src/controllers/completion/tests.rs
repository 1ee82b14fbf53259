use super::super::object::PodFacts;
use super::*;
use k8s_openapi::api::batch::v1::UncountedTerminatedPods;
use serde_json::{Value, json};

const NOW: &str = "2026-01-01T01:00:00Z";

fn job(spec: Value, status: Value) -> Job {
    let mut job = json!({"metadata": {"name": "j", "namespace": "n", "uid": "j"}, "status": status, "spec": {
        "parallelism": 2, "completions": 3, "backoffLimit": 2,
        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c"}]}}}});
    json_patch::merge(&mut job["spec"], &spec);
    serde_json::from_value(job).unwrap()
}

fn pod(name: &str, phase: &str, index: Option<i32>, extra: Value) -> JobPod {
    let annotations = index.map(|index| json!({INDEX: index.to_string()}));
    let mut pod = json!({"metadata": {"name": name, "namespace": "n", "uid": name, "finalizers": [TRACKING], "annotations": annotations},
        "status": {"phase": phase}});
    json_patch::merge(&mut pod, &extra);
    JobPod { pod: serde_json::from_value(pod).unwrap(), facts: PodFacts::default() }
}

fn planned(job: &Job, pods: &[JobPod]) -> Plan {
    plan(job, pods, Failures::default(), NOW.parse().unwrap())
}

fn has_uncounted(uncounted: Option<&UncountedTerminatedPods>) -> bool {
    uncounted.is_some_and(|all| {
        all.succeeded.iter().flatten().next().is_some() || all.failed.iter().flatten().next().is_some()
    })
}

fn kinds(plan: &Plan) -> Vec<(String, String)> {
    let conditions = plan.status.conditions.iter().flatten();
    conditions.map(|one| (one.type_.clone(), one.reason.clone().unwrap_or_default())).collect()
}

#[test]
fn pods_are_created_up_to_parallelism_and_counted_when_they_end() {
    let first = planned(&job(json!({}), json!({})), &[]);
    assert_eq!((first.create.len(), first.status.active), (2, Some(2)));
    let pods = [pod("a", "Succeeded", None, json!({})), pod("b", "Running", None, json!({}))];
    let next = planned(&job(json!({}), json!({"active": 2})), &pods);
    assert_eq!((next.create.len(), next.untrack.as_slice()), (1, &["a".to_owned()][..]));
    let uncounted = next.status.uncounted_terminated_pods.unwrap();
    assert_eq!(uncounted.succeeded, Some(vec!["a".to_owned()]));
    // Once the finalizer is gone, the count is final.
    let status = json!({"uncountedTerminatedPods": {"succeeded": ["a"]}});
    let settled =
        planned(&job(json!({}), status), &[pod("a", "Succeeded", None, json!({"metadata": {"finalizers": []}}))]);
    assert_eq!(settled.status.succeeded, Some(1));
    assert!(!has_uncounted(settled.status.uncounted_terminated_pods.as_ref()));
}

#[test]
fn a_job_is_complete_only_when_everything_is_counted() {
    let last = planned(&job(json!({}), json!({"succeeded": 2})), &[pod("c", "Succeeded", None, json!({}))]);
    assert_eq!(kinds(&last), [("SuccessCriteriaMet".to_owned(), "CompletionsReached".to_owned())]);
    assert!(last.events.is_empty());
    let status =
        json!({"succeeded": 2, "uncountedTerminatedPods": {"succeeded": ["c"]}, "conditions": last.status.conditions});
    let done = planned(&job(json!({}), status), &[]);
    assert_eq!(kinds(&done)[1], ("Complete".to_owned(), "CompletionsReached".to_owned()));
    assert!(is_finished(Some(&done.status)) && done.status.completion_time.is_some());
    assert_eq!(done.events[0].2, "Job completed");
}

#[test]
fn failures_are_retried_with_backoff_until_the_limit() {
    let failed = pod("a", "Failed", None, json!({}));
    let first = planned(&job(json!({"parallelism": 1}), json!({})), &[failed]);
    assert_eq!((first.create.len(), first.failures.count), (0, 1));
    assert!(first.after.unwrap() <= Duration::from_secs(10));
    let over = planned(&job(json!({}), json!({"failed": 3})), &[pod("x", "Running", None, json!({}))]);
    assert_eq!(over.delete, ["x"]);
    assert_eq!(kinds(&over), [("FailureTarget".to_owned(), "BackoffLimitExceeded".to_owned())]);
    let status = json!({"failed": 3, "conditions": over.status.conditions});
    let ended = planned(&job(json!({}), status), &[]);
    assert_eq!(kinds(&ended)[1], ("Failed".to_owned(), "BackoffLimitExceeded".to_owned()));
    assert_eq!(ended.events[0].2, "Job has reached the specified backoff limit");
}

#[test]
fn indexed_jobs_fill_the_missing_indexes() {
    let spec = json!({"completionMode": "Indexed", "completions": 4, "parallelism": 3});
    let pods = [pod("a", "Succeeded", Some(1), json!({})), pod("b", "Running", Some(0), json!({}))];
    let next = planned(&job(spec, json!({"completedIndexes": "3"})), &pods);
    assert_eq!(next.status.completed_indexes.as_deref(), Some("1,3"));
    assert_eq!(next.create, [NewPod { index: Some(2), failures: None }]);
}

#[test]
fn a_failure_policy_decides_what_counts() {
    let spec = |action: &str| json!({"podFailurePolicy": {"rules": [{"action": action, "onExitCodes": {"operator": "In", "values": [42]}}]}});
    let exit = json!({"status": {"containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
        "state": {"terminated": {"exitCode": 42}}}]}});
    let fatal = planned(&job(spec("FailJob"), json!({})), &[pod("a", "Failed", None, exit.clone())]);
    let condition = &fatal.status.conditions.as_ref().unwrap()[0];
    assert_eq!(
        condition.message.as_deref(),
        Some("Container c for pod n/a failed with exit code 42 matching FailJob rule at index 0")
    );
    let ignored = planned(&job(spec("Ignore"), json!({})), &[pod("a", "Failed", None, exit)]);
    assert!(!has_uncounted(ignored.status.uncounted_terminated_pods.as_ref()));
    assert_eq!(ignored.untrack, ["a"]);
}

#[test]
fn each_index_has_its_own_limit_when_asked() {
    let spec = json!({"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimitPerIndex": 1, "backoffLimit": i32::MAX});
    let failed = |name: &str, index, before: &str, at: &str| {
        pod(
            name,
            "Failed",
            Some(index),
            json!({"metadata": {"annotations": {INDEX_FAILURES: before}}, "status": {"containerStatuses": [
            {"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"terminated": {"exitCode": 1, "finishedAt": at}}}]}}),
        )
    };
    let retried = planned(
        &job(spec.clone(), json!({})),
        &[failed("a", 0, "0", "2026-01-01T00:00:00Z"), pod("b", "Running", Some(1), json!({}))],
    );
    assert_eq!(retried.create, [NewPod { index: Some(0), failures: Some(1) }]);
    assert!(retried.untrack.is_empty(), "the failed pod carries the count until the next one does");
    let given_up = planned(
        &job(spec, json!({})),
        &[failed("a", 0, "1", "2026-01-01T00:00:00Z"), pod("b", "Succeeded", Some(1), json!({}))],
    );
    assert_eq!(given_up.status.failed_indexes.as_deref(), Some("0"));
    assert_eq!(kinds(&given_up), [("FailureTarget".to_owned(), "FailedIndexes".to_owned())]);
}

#[test]
fn a_suspended_job_loses_its_pods_and_says_so() {
    let plan = planned(&job(json!({"suspend": true}), json!({})), &[pod("a", "Running", None, json!({}))]);
    assert_eq!((plan.delete.as_slice(), plan.status.start_time), (&["a".to_owned()][..], None));
    assert_eq!(plan.status.conditions.unwrap()[0].reason.as_deref(), Some("JobSuspended"));
}

#[test]
fn indexes_are_written_as_ranges() {
    let text = |text: &str| Indexes::parse(text, 10).to_string();
    assert_eq!(text("1,3-5,7,8"), "1,3-5,7,8");
    assert_eq!(text("8-20"), "8,9");
    assert_eq!(text(""), "");
}
