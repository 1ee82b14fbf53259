use serde_json::json;

use super::*;
use crate::schema::builtin;

const NOW: &str = "2024-01-01T00:00:00Z";
const LATER: &str = "2024-01-02T00:00:00Z";

struct Cluster {
    id: TypeId,
    version: &'static str,
    object: Option<Value>,
}

impl Cluster {
    fn of(group: &str, version: &str, kind: &str, api_version: &'static str) -> Cluster {
        Cluster { id: builtin().by_gvk(group, version, kind).unwrap(), version: api_version, object: None }
    }

    fn deployments() -> Cluster {
        Cluster::of("apps", "v1", "Deployment", "apps/v1")
    }

    fn config_maps() -> Cluster {
        Cluster::of("", "v1", "ConfigMap", "v1")
    }

    fn operation<'a>(&self, manager: &'a str, now: &'a str, reset: &'a Set) -> Operation<'a> {
        Operation { manager, api_version: self.version, subresource: "", now, reset }
    }

    /// Stores an object as a create or update does.
    fn put(&mut self, manager: &str, body: Value) -> &Value {
        self.put_at(manager, NOW, "", body)
    }

    fn put_at(&mut self, manager: &str, now: &str, subresource: &str, body: Value) -> &Value {
        let schema = builtin();
        let mut new = typed::normalize(schema, self.id, body).unwrap();
        default::apply(schema, self.id, &mut new);
        let (group, kind) = match self.version {
            "v1" => ("", "ConfigMap"),
            _ => ("apps", "Deployment"),
        };
        let reset = reset_fields(schema, self.id, group, kind, subresource);
        let operation = Operation { subresource, ..self.operation(manager, now, &reset) };
        update(schema, self.id, self.object.as_ref(), &mut new, &operation);
        new["metadata"]["uid"] = json!("u");
        self.object.insert(new)
    }

    fn apply_with(&mut self, manager: &str, body: Value, force: bool) -> Result<&Value, ApplyError> {
        let reset = Set::path(&["status"]);
        let operation = self.operation(manager, LATER, &reset);
        let new = apply(builtin(), self.id, self.object.as_ref(), &body, &operation, force)?;
        Ok(self.object.insert(new))
    }

    fn apply(&mut self, manager: &str, body: Value) -> &Value {
        self.apply_with(manager, body, false).unwrap()
    }

    fn entries(&self) -> Vec<(String, String, Value)> {
        let list = managed_fields(self.object.as_ref().unwrap()).as_array().cloned().unwrap_or_default();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        list.iter().map(|e| (text(&e["manager"]), text(&e["operation"]), e["fieldsV1"].clone())).collect()
    }
}

fn deployment(replicas: Option<i64>, image: &str) -> Value {
    let mut value = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image}]}}}});
    if let Some(replicas) = replicas {
        value["spec"]["replicas"] = json!(replicas);
    }
    value
}

fn config(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "d"}, "data": data})
}

#[test]
fn a_created_deployment_is_owned_as_upstream_records_it() {
    let mut cluster = Cluster::deployments();
    cluster.put("kubectl-create", deployment(None, "nginx"));
    assert_eq!(
        managed_fields(cluster.object.as_ref().unwrap()),
        &json!([{"apiVersion": "apps/v1", "fieldsType": "FieldsV1", "manager": "kubectl-create", "operation": "Update",
            "time": NOW, "fieldsV1": {"f:spec": {
                "f:progressDeadlineSeconds": {}, "f:replicas": {}, "f:revisionHistoryLimit": {}, "f:selector": {},
                "f:strategy": {"f:rollingUpdate": {".": {}, "f:maxSurge": {}, "f:maxUnavailable": {}}, "f:type": {}},
                "f:template": {"f:metadata": {"f:labels": {".": {}, "f:app": {}}}, "f:spec": {
                    "f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}, "f:imagePullPolicy": {}, "f:name": {},
                        "f:resources": {}, "f:terminationMessagePath": {}, "f:terminationMessagePolicy": {}}},
                    "f:dnsPolicy": {}, "f:restartPolicy": {}, "f:schedulerName": {}, "f:securityContext": {},
                    "f:terminationGracePeriodSeconds": {}}}}}}])
    );
}

#[test]
fn an_update_moves_what_it_changes() {
    let mut cluster = Cluster::config_maps();
    cluster.put("a", config(json!({"x": "1", "y": "1"})));
    let mut changed = cluster.object.clone().unwrap();
    changed["data"]["x"] = json!("2");
    cluster.put("b", changed);
    assert_eq!(
        cluster.entries(),
        [
            ("a".to_owned(), "Update".to_owned(), json!({"f:data": {".": {}, "f:y": {}}})),
            ("b".to_owned(), "Update".to_owned(), json!({"f:data": {"f:x": {}}}))
        ]
    );
}

#[test]
fn an_update_without_change_touches_nothing() {
    let mut cluster = Cluster::config_maps();
    cluster.put("a", config(json!({"x": "1"})));
    let before = cluster.object.clone().unwrap();
    assert_eq!(cluster.put_at("b", LATER, "", before.clone()), &before);
}

#[test]
fn status_has_its_own_entry_and_the_object_does_not_own_it() {
    let mut cluster = Cluster::deployments();
    let mut body = deployment(None, "x");
    body["status"] = json!({"replicas": 5});
    cluster.put("a", body);
    assert!(cluster.entries()[0].2["f:status"].is_null());
    let mut changed = cluster.object.clone().unwrap();
    changed["status"] = json!({"replicas": 3});
    changed["spec"]["replicas"] = json!(9);
    cluster.put_at("controller", LATER, "status", changed);
    let entry = &managed_fields(cluster.object.as_ref().unwrap())[1];
    assert_eq!(
        (&entry["subresource"], &entry["fieldsV1"]),
        (&json!("status"), &json!({"f:status": {"f:replicas": {}}}))
    );
}

#[test]
fn a_client_can_reset_managed_fields() {
    let mut cluster = Cluster::config_maps();
    cluster.put("a", config(json!({"x": "1"})));
    let mut changed = cluster.object.clone().unwrap();
    changed["metadata"]["managedFields"] = json!([{}]);
    cluster.put("b", changed);
    assert!(cluster.entries().is_empty());
}

#[test]
fn more_than_ten_updaters_are_merged() {
    let mut cluster = Cluster::config_maps();
    cluster.put("m0", config(json!({"k0": "v"})));
    for i in 1..15 {
        let mut changed = cluster.object.clone().unwrap();
        changed["data"][format!("k{i}")] = json!("v");
        cluster.put_at(&format!("m{i}"), &format!("2024-01-{:02}T00:00:00Z", i + 1), "", changed);
    }
    let entries = cluster.entries();
    assert_eq!(entries.len(), 10);
    assert_eq!(entries[0].0, "ancient-changes");
}

#[test]
fn apply_creates_and_owns_only_what_it_names() {
    let mut cluster = Cluster::deployments();
    let object = cluster.apply("ci", deployment(Some(2), "a"));
    assert_eq!(
        (&object["spec"]["replicas"], &object["spec"]["strategy"]["type"]),
        (&json!(2), &json!("RollingUpdate"))
    );
    let expected = json!({"f:spec": {"f:replicas": {}, "f:selector": {}, "f:template": {
        "f:metadata": {"f:labels": {"f:app": {}}},
        "f:spec": {"f:containers": {"k:{\"name\":\"c\"}": {".": {}, "f:image": {}, "f:name": {}}}}}}});
    assert_eq!(cluster.entries(), [("ci".to_owned(), "Apply".to_owned(), expected)]);
}

#[test]
fn applying_what_another_manager_set_conflicts() {
    let mut cluster = Cluster::deployments();
    cluster.put("kubectl-create", deployment(Some(1), "a"));
    let error = cluster.apply_with("ci", deployment(Some(5), "a"), false).unwrap_err();
    let message = "conflict with \"kubectl-create\" using apps/v1".to_owned();
    assert_eq!(
        error,
        ApplyError::Conflict {
            message: format!("Apply failed with 1 conflict: {message}: .spec.replicas"),
            causes: vec![Cause { message, field: ".spec.replicas".to_owned() }],
        }
    );
    let error = cluster.apply_with("ci", deployment(Some(5), "b"), false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Apply failed with 2 conflicts: conflicts with \"kubectl-create\" using apps/v1:\n- .spec.replicas\n- .spec.template.spec.containers[name=\"c\"].image"
    );
    let object = cluster.apply_with("ci", deployment(Some(5), "b"), true).unwrap();
    assert_eq!(object["spec"]["replicas"], 5);
    let owner = cluster.entries().into_iter().find(|e| e.0 == "kubectl-create").unwrap();
    assert!(owner.2["f:spec"]["f:replicas"].is_null());
}

#[test]
fn equal_values_are_shared_and_not_applied_any_more_means_removed() {
    let mut cluster = Cluster::config_maps();
    cluster.apply("a", config(json!({"x": "1", "y": "1"})));
    cluster.apply("b", config(json!({"y": "1", "z": "1"})));
    let object = cluster.apply("a", config(json!({"x": "1"})));
    assert_eq!(object["data"], json!({"x": "1", "y": "1", "z": "1"}), "b still owns y");
    let object = cluster.apply("b", config(json!({"z": "1"})));
    assert_eq!(object["data"], json!({"x": "1", "z": "1"}));
}

#[test]
fn applying_the_same_again_changes_nothing() {
    let mut cluster = Cluster::deployments();
    let first = cluster.apply("ci", deployment(Some(1), "a")).clone();
    assert_eq!(cluster.apply("ci", deployment(Some(1), "a")), &first);
}

#[test]
fn lists_merge_by_key_and_keep_foreign_items() {
    let mut cluster = Cluster::deployments();
    cluster.apply("ci", deployment(None, "a"));
    let mut sidecar = deployment(None, "a");
    sidecar["spec"] = json!({"template": {"spec": {"containers": [{"name": "side", "image": "s"}]}}});
    cluster.apply("mesh", sidecar);
    let object = cluster.apply("ci", deployment(None, "b"));
    let containers = object["spec"]["template"]["spec"]["containers"].as_array().unwrap();
    let names: Vec<&str> = containers.iter().map(|c| c["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["c", "side"]);
    assert_eq!(containers[0]["image"], "b");
}

#[test]
fn ports_are_told_apart_by_number_and_protocol() {
    let mut cluster = Cluster::deployments();
    let mut body = deployment(None, "a");
    body["spec"]["template"]["spec"]["containers"][0]["ports"] =
        json!([{"containerPort": 53, "protocol": "UDP"}, {"containerPort": 53}]);
    let object = cluster.apply("ci", body);
    assert_eq!(object["spec"]["template"]["spec"]["containers"][0]["ports"].as_array().unwrap().len(), 2);
    let ports =
        &cluster.entries()[0].2["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"c\"}"]["f:ports"];
    assert!(ports.get("k:{\"containerPort\":53,\"protocol\":\"TCP\"}").is_some());
}

#[test]
fn malformed_configurations_are_refused_in_upstreams_words() {
    let mut cluster = Cluster::deployments();
    let mut refused = |change: fn(&mut Value)| {
        let mut body = deployment(None, "a");
        change(&mut body);
        cluster.apply_with("ci", body, false).unwrap_err().to_string()
    };
    let prefix = "failed to create typed patch object (/web; apps/v1, Kind=Deployment): ";
    assert_eq!(refused(|b| b["spec"]["foo"] = json!(1)), format!("{prefix}.spec.foo: field not declared in schema"));
    assert_eq!(
        refused(|b| b["spec"]["replicas"] = json!("x")),
        format!("{prefix}.spec.replicas: expected numeric (int or float), got string")
    );
    assert_eq!(
        refused(|b| {
            b["spec"]["template"]["spec"]["containers"] = json!([{"name": "c"}, {"name": "c"}]);
        }),
        format!("{prefix}.spec.template.spec.containers: duplicate entries for key [name=\"c\"]")
    );
    assert_eq!(refused(|b| b["metadata"]["managedFields"] = json!([])), "metadata.managedFields must be nil");
    assert_eq!(refused(|b| b["apiVersion"] = json!("v1")), "invalid object type: /v1, Kind=Deployment");
}

#[test]
fn kubectl_takes_over_from_client_side_apply() {
    let mut cluster = Cluster::config_maps();
    let last = config(json!({"x": "1"}));
    let mut body = last.clone();
    body["metadata"]["annotations"] = json!({LAST_APPLIED: last.to_string()});
    cluster.put("kubectl-client-side-apply", body);
    assert!(cluster.apply_with("other", config(json!({"x": "2"})), false).is_err());
    let object = cluster.apply("kubectl", config(json!({"x": "2"})));
    assert_eq!(object["data"]["x"], "2");
    let annotation = object["metadata"]["annotations"][LAST_APPLIED].as_str().unwrap();
    assert!(annotation.contains("\"x\":\"2\""));
}

#[test]
fn an_untracked_object_gets_a_first_entry_when_applied() {
    let mut cluster = Cluster::config_maps();
    cluster.put("a", config(json!({"x": "1"})));
    take_managed_fields(cluster.object.as_mut().unwrap());
    cluster.apply("ci", config(json!({"y": "1"})));
    let names: Vec<String> = cluster.entries().into_iter().map(|e| e.0).collect();
    assert_eq!(names, ["ci", "before-first-apply"]);
}
