//! Defaults: static ones stand in the table, conditional ones are functions here, called when their struct is present.
//!
//! Besides `SetDefaults_*` the functions do what upstream's round trip over its internal types does to a v1 object
//! (`stringData` moves into `data`, `serviceAccount` mirrors `serviceAccountName`, `podIP` mirrors `podIPs`): to a client
//! it is the same step.

use serde_json::{Map, Value};

use super::hooks;
use super::node::{Kind, Schema, TypeId};
use super::quantity::Quantity;
use super::typed;

/// A conditional default. It runs after the static defaults of the same struct and before those of the structs below.
pub(super) type Hook = fn(&mut Map<String, Value>);

/// OpenAPI names of the structs with a conditional default; their order gives `Node::hook`.
pub(super) fn hook_names() -> impl Iterator<Item = &'static str> {
    hooks::HOOKS.iter().map(|(name, _)| *name)
}

/// Sets every unset field of `value` that has a default. Takes and gives Go form; doing it again changes nothing.
pub fn apply(schema: &Schema, id: TypeId, value: &mut Value) {
    let node = schema.node(id);
    if !node.has_defaults {
        return;
    }
    match (node.kind, value) {
        (Kind::Struct, Value::Object(map)) => structure(schema, id, map),
        (Kind::Map, Value::Object(map)) if schema.kind(node.item) == Kind::Quantity => {
            map.values_mut().for_each(round_to_milli);
        }
        (Kind::Map, Value::Object(map)) => map.values_mut().for_each(|v| apply(schema, node.item, v)),
        (Kind::List, Value::Array(items)) => items.iter_mut().for_each(|v| apply(schema, node.item, v)),
        _ => {}
    }
}

fn structure(schema: &Schema, id: TypeId, map: &mut Map<String, Value>) {
    for field in schema.fields(id) {
        if let Some(default) = schema.field_default(field) {
            let name = schema.field_name(field);
            let set = map.get(name).is_some_and(|v| !typed::is_zero(schema, field, v));
            // A default that Go would not write (`+default=""`) is only shown in OpenAPI.
            if !set && !typed::unset(schema, field, default) {
                map.insert(name.to_owned(), default.clone());
            }
        }
    }
    if let Some((_, hook)) = schema.node(id).hook.and_then(|i| hooks::HOOKS.get(usize::from(i))) {
        hook(map);
    }
    for (name, value) in map.iter_mut() {
        if let Some(field) = schema.field(id, name) {
            apply(schema, field.node, value);
        }
    }
}

/// Resource amounts finer than a thousandth are rounded up.
fn round_to_milli(value: &mut Value) {
    let Value::String(text) = value else { return };
    if !text.ends_with(['n', 'u']) && !text.contains('-') {
        return;
    }
    if let Some(rounded) = Quantity::parse(text).ok().and_then(|q| q.rounded_to_milli()) {
        *text = rounded.to_string();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::builtin;
    use serde_json::json;

    fn defaulted(group: &str, version: &str, kind: &str, body: Value) -> Value {
        let schema = builtin();
        let id = schema.by_gvk(group, version, kind).unwrap();
        let mut value = typed::normalize(schema, id, body).unwrap();
        apply(schema, id, &mut value);
        let mut again = value.clone();
        apply(schema, id, &mut again);
        assert_eq!(again, value, "defaulting twice changes nothing");
        value
    }

    #[test]
    fn a_pod_gets_what_upstream_gives_it() {
        let value = defaulted(
            "",
            "v1",
            "Pod",
            json!({"spec": {"containers": [{"name": "a", "image": "b:1",
            "ports": [{"containerPort": 80}], "readinessProbe": {"httpGet": {"port": 80}},
            "resources": {"limits": {"cpu": "100m"}}}],
            "volumes": [{"name": "v"}, {"name": "c", "configMap": {"name": "x"}}]}}),
        );
        assert_eq!(
            value["spec"],
            json!({"containers": [{"name": "a", "image": "b:1", "imagePullPolicy": "IfNotPresent",
                    "ports": [{"containerPort": 80, "protocol": "TCP"}],
                    "readinessProbe": {"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1,
                        "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3},
                    "resources": {"limits": {"cpu": "100m"}, "requests": {"cpu": "100m"}},
                    "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File"}],
                "dnsPolicy": "ClusterFirst", "enableServiceLinks": true, "restartPolicy": "Always",
                "schedulerName": "default-scheduler", "securityContext": {}, "terminationGracePeriodSeconds": 30,
                "volumes": [{"name": "v", "emptyDir": {}}, {"name": "c", "configMap": {"name": "x", "defaultMode": 420}}]})
        );
    }

    #[test]
    fn a_template_does_not_get_what_only_pods_get() {
        let value = defaulted(
            "apps",
            "v1",
            "Deployment",
            json!({"spec": {"template": {"spec": {"containers": [
            {"name": "a", "image": "b", "resources": {"limits": {"cpu": "1"}}}]}}}}),
        );
        let spec = &value["spec"]["template"]["spec"];
        assert_eq!(spec["containers"][0]["imagePullPolicy"], "Always");
        assert!(spec["enableServiceLinks"].is_null() && spec["containers"][0]["resources"]["requests"].is_null());
        assert_eq!(
            value["spec"]["strategy"],
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}})
        );
        assert_eq!((&value["spec"]["replicas"], &value["spec"]["progressDeadlineSeconds"]), (&json!(1), &json!(600)));
    }

    #[test]
    fn recreate_gets_no_rolling_update() {
        let value = defaulted("apps", "v1", "Deployment", json!({"spec": {"strategy": {"type": "Recreate"}}}));
        assert_eq!(value["spec"]["strategy"], json!({"type": "Recreate"}));
    }

    #[test]
    fn a_service_gets_target_ports_and_policies() {
        let value = defaulted("", "v1", "Service", json!({"spec": {"ports": [{"port": 80}], "type": "NodePort"}}));
        assert_eq!(
            value["spec"],
            json!({"ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}], "type": "NodePort",
                "sessionAffinity": "None", "externalTrafficPolicy": "Cluster", "internalTrafficPolicy": "Cluster"})
        );
    }

    #[test]
    fn string_data_of_a_secret_becomes_data() {
        let value =
            defaulted("", "v1", "Secret", json!({"stringData": {"a": "b"}, "data": {"a": "eA==", "c": "eA=="}}));
        assert_eq!((&value["data"], &value["type"]), (&json!({"a": "Yg==", "c": "eA=="}), &json!("Opaque")));
        assert!(value["stringData"].is_null());
    }

    #[test]
    fn jobs_and_other_kinds_get_theirs() {
        let job = defaulted("batch", "v1", "Job", json!({"spec": {"template": {"metadata": {"labels": {"a": "b"}}}}}));
        assert_eq!(job["metadata"]["labels"], json!({"a": "b"}));
        assert_eq!((&job["spec"]["backoffLimit"], &job["spec"]["completions"]), (&json!(6), &json!(1)));
        let cron = defaulted("batch", "v1", "CronJob", json!({"spec": {"jobTemplate": {"spec": {}}}}));
        assert!(cron["spec"]["jobTemplate"]["spec"]["completionMode"].is_null(), "only jobs get the defaults of jobs");
        let namespace = defaulted("", "v1", "Namespace", json!({"metadata": {"name": "x"}}));
        assert_eq!(namespace["metadata"]["labels"], json!({"kubernetes.io/metadata.name": "x"}));
        assert_eq!(namespace["status"]["phase"], "Active");
        let binding = defaulted(
            "rbac.authorization.k8s.io",
            "v1",
            "RoleBinding",
            json!({"subjects": [{"kind": "User", "name": "u"}], "roleRef": {"kind": "Role", "name": "r"}}),
        );
        assert_eq!(binding["subjects"][0]["apiGroup"], "rbac.authorization.k8s.io");
        assert_eq!(binding["roleRef"]["apiGroup"], "rbac.authorization.k8s.io");
        let policy = defaulted("networking.k8s.io", "v1", "NetworkPolicy", json!({"spec": {"egress": [{}]}}));
        assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        let set = defaulted("apps", "v1", "StatefulSet", json!({"spec": {}}));
        assert_eq!(set["spec"]["updateStrategy"], json!({"type": "RollingUpdate", "rollingUpdate": {"partition": 0}}));
        assert_eq!(set["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"], "Retain");
    }

    #[test]
    fn amounts_finer_than_a_thousandth_round_up() {
        let value =
            defaulted("", "v1", "Pod", json!({"spec": {"containers": [{"resources": {"requests": {"cpu": "1u"}}}]}}));
        assert_eq!(value["spec"]["containers"][0]["resources"]["requests"]["cpu"], "1m");
    }
}
