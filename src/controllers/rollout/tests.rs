use super::status::find;
use super::*;
use serde_json::json;

const NOW: &str = "2026-01-01T00:10:00Z";

fn deployment(replicas: i32, image: &str, extra: Value) -> Deployment {
    let mut value = json!({
        "metadata": {"name": "web", "namespace": "n", "uid": "d", "generation": 1},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"a": "1"}}, "progressDeadlineSeconds": 600,
            "revisionHistoryLimit": 10,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "template": {"metadata": {"labels": {"a": "1"}}, "spec": {"containers": [{"name": "c", "image": image}]}}}});
    json_patch::merge(&mut value, &extra);
    serde_json::from_value(value).unwrap()
}

fn set(name: &str, image: &str, revision: i64, size: i32, available: i32, desired: i32) -> ReplicaSet {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "n", "uid": name, "generation": 1,
            "creationTimestamp": format!("2026-01-01T00:0{revision}:00Z"),
            "annotations": {REVISION: revision.to_string(), DESIRED_REPLICAS: desired.to_string(),
                MAX_REPLICAS: (desired + scaled(Some(&IntOrString::String("25%".into())), desired, true)).to_string()}},
        "spec": {"replicas": size, "selector": {}, "template": {"metadata": {"labels": {"a": "1", "pod-template-hash": "x"}},
            "spec": {"containers": [{"name": "c", "image": image}]}}},
        "status": {"replicas": size, "readyReplicas": available, "availableReplicas": available, "observedGeneration": 1}}))
    .unwrap()
}

fn planned(deployment: &Deployment, sets: Vec<ReplicaSet>) -> Plan {
    planned_with(deployment, sets, HashMap::new())
}

fn planned_with(deployment: &Deployment, sets: Vec<ReplicaSet>, pods: HashMap<String, usize>) -> Plan {
    let owner = OwnerReference { uid: "d".to_owned(), ..OwnerReference::default() };
    plan(Observed { deployment, owner, sets, pods, now: NOW.parse().unwrap() }).unwrap()
}

/// (name, size) of every set that the plan creates or resizes.
fn sizes(plan: &Plan) -> Vec<(String, i32)> {
    plan.changes
        .iter()
        .filter_map(|change| match change {
            Change::Create(set) | Change::Update(set) => Some((name(&set.metadata).to_owned(), replicas(set))),
            _ => None,
        })
        .collect()
}

fn status(plan: &Plan) -> DeploymentStatus {
    plan.changes
        .iter()
        .find_map(|change| if let Change::Status(status) = change { Some((**status).clone()) } else { None })
        .unwrap()
}

fn events(plan: &Plan) -> Vec<String> {
    plan.changes
        .iter()
        .filter_map(|change| if let Change::Event(_, _, message) = change { Some(message.clone()) } else { None })
        .collect()
}

#[test]
fn a_new_deployment_gets_its_replica_set_at_full_size_with_the_hash_everywhere() {
    let plan = planned(&deployment(3, "a", json!({})), vec![]);
    let Change::Create(set) = &plan.changes[0] else { panic!("{plan:?}") };
    let suffix = name(&set.metadata).strip_prefix("web-").unwrap();
    let spec = set.spec.as_ref().unwrap();
    assert_eq!(replicas(set), 3);
    assert_eq!(spec.selector.match_labels.as_ref().unwrap()[POD_TEMPLATE_HASH], suffix);
    let labels = spec.template.as_ref().unwrap().metadata.as_ref().unwrap().labels.as_ref().unwrap();
    assert_eq!(labels[POD_TEMPLATE_HASH], suffix);
    assert_eq!((annotation(set, REVISION), annotation(set, MAX_REPLICAS)), (Some("1"), Some("4")));
    assert!(plan.changes.contains(&Change::Revision("1".to_owned())));
    assert_eq!(events(&plan), [format!("Scaled up replica set web-{suffix} from 0 to 3")]);
    let status = status(&plan);
    assert_eq!(find(&status, PROGRESSING).unwrap().reason.as_deref(), Some("NewReplicaSetCreated"));
    assert_eq!(find(&status, "Available").unwrap().status, "False");
}

#[test]
fn a_rolling_update_surges_then_shrinks_the_old_set_as_the_new_becomes_available() {
    let wanted = deployment(10, "b", json!({}));
    let first = planned(&wanted, vec![set("old", "a", 1, 10, 10, 10)]);
    let Change::Create(new) = &first.changes[0] else { panic!("{first:?}") };
    // 25 % of 10 rounds up for the surge and down for what may be missing.
    assert_eq!(replicas(new), 3);
    assert_eq!(sizes(&first)[1], ("old".to_owned(), 8));
    let then = planned(&wanted, vec![set("old", "a", 1, 8, 8, 10), set("new", "b", 2, 3, 0, 10)]);
    assert_eq!(sizes(&then), [("new".to_owned(), 5)]);
    let later = planned(&wanted, vec![set("old", "a", 1, 8, 8, 10), set("new", "b", 2, 5, 2, 10)]);
    assert_eq!(sizes(&later), [("old".to_owned(), 6)]);
}

#[test]
fn unhealthy_old_pods_go_first() {
    let wanted = deployment(10, "b", json!({}));
    let plan = planned(&wanted, vec![set("old", "a", 1, 8, 3, 10), set("new", "b", 2, 5, 5, 10)]);
    assert_eq!(sizes(&plan), [("old".to_owned(), 3)]);
}

#[test]
fn recreate_waits_for_the_last_old_pod() {
    let wanted = deployment(2, "b", json!({"spec": {"strategy": {"type": "Recreate", "rollingUpdate": null}}}));
    let old = |size| set("old", "a", 1, size, 0, 2);
    assert_eq!(sizes(&planned(&wanted, vec![old(2)])), [("old".to_owned(), 0)]);
    let mut annotated = old(0);
    annotate_replicas(&mut annotated, 2, 2);
    let waiting = planned_with(&wanted, vec![annotated.clone()], HashMap::from([("old".to_owned(), 1)]));
    assert_eq!(sizes(&waiting), []);
    let created = sizes(&planned(&wanted, vec![annotated]));
    assert_eq!(created.len(), 1);
    assert_eq!(created[0].1, 2);
}

#[test]
fn scaling_in_the_middle_of_a_rollout_is_proportional() {
    let wanted = deployment(20, "b", json!({}));
    let plan = planned(&wanted, vec![set("old", "a", 1, 8, 8, 10), set("new", "b", 2, 5, 2, 10)]);
    let sizes: HashMap<String, i32> = sizes(&plan).into_iter().collect();
    assert_eq!(sizes.values().sum::<i32>(), 25, "{sizes:?}");
    assert!(sizes["old"] > sizes["new"]);
}

#[test]
fn a_paused_deployment_scales_but_does_not_roll() {
    let paused = deployment(4, "b", json!({"spec": {"paused": true}}));
    let plan = planned(&paused, vec![set("old", "a", 1, 2, 2, 2)]);
    assert_eq!(sizes(&plan), [("old".to_owned(), 4)]);
    assert_eq!(find(&status(&plan), PROGRESSING).unwrap().reason.as_deref(), Some("DeploymentPaused"));
}

#[test]
fn going_back_to_an_old_template_reuses_its_set_under_a_new_revision() {
    let wanted = deployment(1, "a", json!({"metadata": {"annotations": {REVISION: "2", "note": "x"}}}));
    let plan = planned(&wanted, vec![set("first", "a", 1, 0, 0, 1), set("second", "b", 2, 1, 1, 1)]);
    let updated = plan.changes.iter().find_map(|change| match change {
        Change::Update(set) if name(&set.metadata) == "first" => Some(set),
        _ => None,
    });
    let updated = updated.unwrap();
    assert_eq!((annotation(updated, REVISION), annotation(updated, REVISION_HISTORY)), (Some("3"), Some("1")));
    assert_eq!(annotation(updated, "note"), Some("x"));
    assert!(plan.changes.contains(&Change::Revision("3".to_owned())));
}

#[test]
fn a_rollout_without_progress_times_out_and_is_looked_at_again_before() {
    let stuck = |since: &str| {
        deployment(
            1,
            "b",
            json!({"metadata": {"annotations": {REVISION: "2"}}, "status": {"observedGeneration": 1, "replicas": 2,
            "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1, "unavailableReplicas": 1, "terminatingReplicas": 0,
            "conditions": [
                {"type": "Available", "status": "True", "reason": "MinimumReplicasAvailable"},
                {"type": "Progressing", "status": "True", "reason": "ReplicaSetUpdated", "lastUpdateTime": since}]}}),
        )
    };
    let sets = || vec![set("old", "a", 1, 1, 1, 1), set("new", "b", 2, 1, 0, 1)];
    let waiting = planned(&stuck("2026-01-01T00:05:00Z"), sets());
    assert_eq!((waiting.changes.len(), waiting.after), (0, Some(Duration::from_secs(301))), "{waiting:?}");
    let late = status(&planned(&stuck("2025-12-31T23:59:59Z"), sets()));
    let condition = find(&late, PROGRESSING).unwrap();
    assert_eq!((condition.status.as_str(), condition.reason.as_deref()), ("False", Some(TIMED_OUT)));
    assert_eq!(condition.message.as_deref(), Some("ReplicaSet \"new\" has timed out progressing."));
}

#[test]
fn a_complete_rollout_says_so_and_prunes_history() {
    let extra = json!({"metadata": {"annotations": {REVISION: "3"}}, "spec": {"revisionHistoryLimit": 1},
        "status": {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1, "availableReplicas": 1}});
    let done = deployment(1, "c", extra);
    let sets = vec![set("one", "a", 1, 0, 0, 1), set("two", "b", 2, 0, 0, 1), set("three", "c", 3, 1, 1, 1)];
    let plan = planned(&done, sets);
    assert!(plan.changes.contains(&Change::Delete { name: "one".to_owned(), uid: "one".to_owned() }), "{plan:?}");
    let status = status(&plan);
    let condition = find(&status, PROGRESSING).unwrap();
    assert_eq!(condition.message.as_deref(), Some("ReplicaSet \"three\" has successfully progressed."));
    assert_eq!(plan.after, None);
}
