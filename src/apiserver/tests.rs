//! The engine as clients see it: requests to the service over a store in memory.

use super::backend::memory;
use super::body::Body;
use super::{ApiServer, Parts};
use crate::auth::Identity;
use crate::strategy::service::allocation::ServiceNetwork;
use coracle_store::{Op, Txn};
use futures::FutureExt;
use http::{Request, Response};
use serde_json::{Value, json};
use tower::ServiceExt;

pub struct Harness {
    pub server: ApiServer,
}

impl Harness {
    pub fn new() -> Harness {
        let backend = memory::backend();
        for (key, object) in [
            (
                "/registry/core/namespaces/default",
                json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "default", "uid": "n" } }),
            ),
            (
                "/registry/core/serviceaccounts/default/default",
                json!({ "apiVersion": "v1", "kind": "ServiceAccount",
                    "metadata": { "namespace": "default", "name": "default", "uid": "s" } }),
            ),
        ] {
            let put = Op::Put { key: key.into(), value: object.to_string().into(), lease: 0 };
            let written = backend.txn(Txn { then: vec![put], ..Txn::default() }).now_or_never();
            written.unwrap().unwrap();
        }
        let authorizer = crate::auth::Authorizer::new(backend.store().clone());
        let server = ApiServer::new(Parts {
            admission: crate::admission::Admission::new(backend.clone(), authorizer.clone()),
            authorizer,
            backend,
            address: "10.0.0.1:6443".to_owned(),
            services: ServiceNetwork { ranges: vec!["10.43.0.0/16".parse().unwrap()], node_ports: 30000..=32767 },
            shutdown: Default::default(),
        });
        Harness { server }
    }

    pub async fn raw(&self, method: &str, url: &str, headers: &[(&str, &str)], body: String) -> Response<Body> {
        let mut request = Request::builder().method(method).uri(url);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut request = request.body(Body::from(body)).unwrap();
        request.extensions_mut().insert(Identity::apiserver());
        self.server.clone().oneshot(request).await.unwrap()
    }

    pub async fn send(&self, method: &str, url: &str, headers: &[(&str, &str)], body: Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let response = self.raw(method, url, headers, body).await;
        let code = response.status().as_u16();
        let bytes = response.into_body().collect(1 << 24).await.unwrap();
        (code, serde_json::from_slice(&bytes).unwrap_or_else(|_| json!(String::from_utf8_lossy(&bytes))))
    }

    pub async fn get(&self, url: &str) -> (u16, Value) {
        self.send("GET", url, &[], Value::Null).await
    }

    pub async fn post(&self, url: &str, body: Value) -> (u16, Value) {
        self.send("POST", url, &[], body).await
    }
}

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

fn map(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": name, "labels": { "n": name } }, "data": { "a": "b" } })
}

#[tokio::test]
async fn an_object_lives() {
    let h = Harness::new();
    let (code, created) = h.post(MAPS, map("c")).await;
    assert_eq!(code, 201, "{created}");
    assert_eq!(created["metadata"]["namespace"], "default");
    assert!(created["metadata"]["uid"].is_string() && created["metadata"]["resourceVersion"].is_string());
    let (code, again) = h.post(MAPS, map("c")).await;
    assert_eq!((code, &again["message"]), (409, &json!("configmaps \"c\" already exists")));
    let (code, read) = h.get(&format!("{MAPS}/c")).await;
    assert_eq!((code, &read), (200, &created));
    let mut changed = read.clone();
    changed["data"]["a"] = json!("c");
    let (code, updated) = h.send("PUT", &format!("{MAPS}/c"), &[], changed.clone()).await;
    assert_eq!((code, &updated["data"]["a"]), (200, &json!("c")), "{updated}");
    assert_ne!(updated["metadata"]["resourceVersion"], read["metadata"]["resourceVersion"]);
    let (code, stale) = h.send("PUT", &format!("{MAPS}/c"), &[], changed).await;
    assert_eq!(code, 409, "{stale}");
    assert!(stale["message"].as_str().unwrap().contains("the object has been modified; please apply your changes"));
    let merge = [("content-type", "application/merge-patch+json")];
    let (code, patched) = h.send("PATCH", &format!("{MAPS}/c"), &merge, json!({ "data": { "x": "y" } })).await;
    assert_eq!((code, &patched["data"]), (200, &json!({ "a": "c", "x": "y" })), "{patched}");
    let (code, same) = h.send("PATCH", &format!("{MAPS}/c"), &merge, json!({ "data": { "x": "y" } })).await;
    assert_eq!((code, &same["metadata"]["resourceVersion"]), (200, &patched["metadata"]["resourceVersion"]));
    let (code, gone) = h.send("DELETE", &format!("{MAPS}/c"), &[], Value::Null).await;
    assert_eq!((code, &gone["status"]), (200, &json!("Success")), "{gone}");
    let (code, missing) = h.get(&format!("{MAPS}/c")).await;
    assert_eq!((code, &missing["message"]), (404, &json!("configmaps \"c\" not found")));
}

#[tokio::test]
async fn lists_select_and_continue() {
    let h = Harness::new();
    for name in ["a", "b", "c"] {
        h.post(MAPS, map(name)).await;
    }
    let (_, all) = h.get("/api/v1/configmaps").await;
    assert_eq!((&all["kind"], all["items"].as_array().unwrap().len()), (&json!("ConfigMapList"), 3));
    let (_, one) = h.get(&format!("{MAPS}?labelSelector=n%3Db")).await;
    assert_eq!(one["items"][0]["metadata"]["name"], "b");
    let (_, one) = h.get(&format!("{MAPS}?fieldSelector=metadata.name%3Dc")).await;
    assert_eq!(one["items"].as_array().unwrap().len(), 1);
    let (_, first) = h.get(&format!("{MAPS}?limit=2")).await;
    assert_eq!((first["items"].as_array().unwrap().len(), &first["metadata"]["remainingItemCount"]), (2, &json!(1)));
    let token = first["metadata"]["continue"].as_str().unwrap();
    h.post(MAPS, map("d")).await;
    let (_, rest) = h.get(&format!("{MAPS}?limit=2&continue={token}")).await;
    let names: Vec<&str> =
        rest["items"].as_array().unwrap().iter().map(|i| i["metadata"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["c"]);
    assert_eq!(rest["metadata"]["resourceVersion"], first["metadata"]["resourceVersion"]);
}

#[tokio::test]
async fn a_watch_sees_changes_and_selectors_turn_them() {
    use http_body_util::BodyExt;
    let h = Harness::new();
    h.post(MAPS, map("a")).await;
    let response = h.raw("GET", &format!("{MAPS}?watch=1&labelSelector=n%3Da"), &[], String::new()).await;
    let mut body = response.into_body();
    let mut next = async || -> Vec<Value> {
        let frame = tokio::time::timeout(std::time::Duration::from_secs(5), body.frame()).await.unwrap();
        let bytes = frame.unwrap().unwrap().into_data().unwrap();
        bytes.split(|c| *c == b'\n').filter(|l| !l.is_empty()).map(|l| serde_json::from_slice(l).unwrap()).collect()
    };
    assert_eq!(next().await[0]["type"], "ADDED");
    h.post(MAPS, map("b")).await;
    let merge = [("content-type", "application/merge-patch+json")];
    h.send("PATCH", &format!("{MAPS}/a"), &merge, json!({ "data": { "x": "y" } })).await;
    let seen = next().await;
    assert_eq!((&seen[0]["type"], &seen[0]["object"]["data"]["x"]), (&json!("MODIFIED"), &json!("y")));
    h.send("PATCH", &format!("{MAPS}/a"), &merge, json!({ "metadata": { "labels": { "n": "z" } } })).await;
    let seen = next().await;
    assert_eq!((&seen[0]["type"], &seen[0]["object"]["metadata"]["labels"]["n"]), (&json!("DELETED"), &json!("a")));
    h.send("PATCH", &format!("{MAPS}/b"), &merge, json!({ "metadata": { "labels": { "n": "a" } } })).await;
    let seen = next().await;
    assert_eq!((&seen[0]["type"], &seen[0]["object"]["metadata"]["name"]), (&json!("ADDED"), &json!("b")));
    h.send("DELETE", &format!("{MAPS}/b"), &[], Value::Null).await;
    assert_eq!(next().await[0]["type"], "DELETED");
}

#[tokio::test]
async fn status_and_spec_are_written_apart_and_generation_counts() {
    let h = Harness::new();
    let url = "/apis/apps/v1/namespaces/default/deployments";
    let deployment = json!({ "apiVersion": "apps/v1", "kind": "Deployment", "metadata": { "name": "web" },
        "spec": { "replicas": 2, "selector": { "matchLabels": { "a": "b" } }, "template": {
            "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } } },
        "status": { "replicas": 9 } });
    let (code, created) = h.post(url, deployment).await;
    assert_eq!(code, 201, "{created}");
    assert_eq!((&created["metadata"]["generation"], &created["status"]), (&json!(1), &json!({})));
    assert_eq!(created["spec"]["template"]["spec"]["containers"][0]["terminationMessagePath"], "/dev/termination-log");
    let merge = [("content-type", "application/merge-patch+json")];
    let patch = json!({ "spec": { "replicas": 3 }, "status": { "replicas": 5 } });
    let (_, spec) = h.send("PATCH", &format!("{url}/web"), &merge, patch.clone()).await;
    assert_eq!(
        (&spec["spec"]["replicas"], &spec["status"], &spec["metadata"]["generation"]),
        (&json!(3), &json!({}), &json!(2))
    );
    let patch = json!({ "spec": { "replicas": 4 }, "status": { "replicas": 5 } });
    let (_, status) = h.send("PATCH", &format!("{url}/web/status"), &merge, patch).await;
    assert_eq!((&status["spec"]["replicas"], &status["status"]["replicas"]), (&json!(3), &json!(5)));
    assert_eq!(status["metadata"]["generation"], 2);
}

#[tokio::test]
async fn names_are_generated_and_checked() {
    let h = Harness::new();
    let (code, made) = h.post(MAPS, json!({ "metadata": { "generateName": "x-" } })).await;
    assert_eq!((code, made["metadata"]["name"].as_str().unwrap().len()), (201, 7), "{made}");
    let (code, refused) = h.post(MAPS, json!({ "metadata": { "name": "A" } })).await;
    assert_eq!(code, 422);
    assert!(
        refused["message"].as_str().unwrap().starts_with(
            "ConfigMap \"A\" is invalid: metadata.name: Invalid value: \"A\": a lowercase RFC 1123 subdomain"
        ),
        "{refused}"
    );
    let (code, _) = h.post(MAPS, json!({ "metadata": { "name": "a", "namespace": "other" } })).await;
    assert_eq!(code, 400);
    let (code, dry) = h.post(&format!("{MAPS}?dryRun=All"), map("dry")).await;
    assert_eq!((code, &dry["metadata"]["resourceVersion"]), (201, &Value::Null));
    assert_eq!(h.get(&format!("{MAPS}/dry")).await.0, 404);
}

#[tokio::test]
async fn unknown_paths_and_verbs() {
    let h = Harness::new();
    assert_eq!(h.get("/api/v1/nope").await.0, 404);
    assert_eq!(h.get("/apis/apps/v1/namespaces/default/deployments/x/nope").await.0, 404);
    assert_eq!(h.post("/api/v1/configmaps", map("c")).await.0, 405);
    assert_eq!(h.send("DELETE", "/api/v1/namespaces", &[], Value::Null).await.0, 405);
    assert_eq!(h.get("/version").await.1["gitVersion"], "v1.35.4+coracle");
}

#[tokio::test]
async fn managed_fields_and_apply() {
    let h = Harness::new();
    let agent = [("user-agent", "kubectl/v1.35")];
    let (_, created) = h.send("POST", MAPS, &agent, map("c")).await;
    let entry = &created["metadata"]["managedFields"][0];
    assert_eq!((&entry["manager"], &entry["operation"]), (&json!("kubectl"), &json!("Update")));
    assert_eq!(entry["fieldsV1"]["f:data"]["f:a"], json!({}));
    let apply = [("content-type", "application/apply-patch+yaml")];
    let url = format!("{MAPS}/c?fieldManager=me");
    let body = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "c" }, "data": { "a": "x" } });
    let (code, conflict) = h.send("PATCH", &url, &apply, body.clone()).await;
    assert_eq!((code, &conflict["details"]["causes"][0]["field"]), (409, &json!(".data.a")), "{conflict}");
    let (code, applied) = h.send("PATCH", &format!("{url}&force=true"), &apply, body.clone()).await;
    assert_eq!((code, &applied["data"]["a"]), (200, &json!("x")), "{applied}");
    let (code, again) = h.send("PATCH", &url, &apply, body).await;
    assert_eq!(
        (code, &again["metadata"]["resourceVersion"]),
        (200, &applied["metadata"]["resourceVersion"]),
        "{again}"
    );
    let new = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "n" }, "data": { "a": "x" } });
    let (code, made) = h.send("PATCH", &format!("{MAPS}/n?fieldManager=me"), &apply, new).await;
    assert_eq!((code, &made["metadata"]["namespace"]), (201, &json!("default")), "{made}");
}

fn pod(name: &str) -> Value {
    json!({ "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "a": "b" } },
        "spec": { "containers": [{ "name": "c", "image": "i" }] } })
}

const PODS: &str = "/api/v1/namespaces/default/pods";

#[tokio::test]
async fn a_pod_is_bound_evicted_and_ends_gracefully() {
    let h = Harness::new();
    let (code, made) = h.post(PODS, pod("p")).await;
    assert_eq!(
        (code, &made["status"]["phase"], &made["status"]["qosClass"]),
        (201, &json!("Pending"), &json!("BestEffort")),
        "{made}"
    );
    let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": "p" }, "target": { "kind": "Node", "name": "n" } });
    let (code, bound) = h.post(&format!("{PODS}/p/binding"), binding.clone()).await;
    assert_eq!((code, &bound["status"]), (201, &json!("Success")), "{bound}");
    let (code, again) = h.post(&format!("{PODS}/p/binding"), binding).await;
    assert_eq!(code, 409, "{again}");
    let (_, on_node) = h.get("/api/v1/pods?fieldSelector=spec.nodeName%3Dn").await;
    assert_eq!(on_node["items"].as_array().unwrap().len(), 1);
    let (code, ending) = h.send("DELETE", &format!("{PODS}/p"), &[], Value::Null).await;
    assert_eq!((code, &ending["metadata"]["deletionGracePeriodSeconds"]), (200, &json!(30)), "{ending}");
    let merge = [("content-type", "application/merge-patch+json")];
    let (_, _) =
        h.send("PATCH", &format!("{PODS}/p/status"), &merge, json!({ "status": { "phase": "Succeeded" } })).await;
    let (code, _) = h.send("DELETE", &format!("{PODS}/p?gracePeriodSeconds=0"), &[], Value::Null).await;
    assert_eq!((code, h.get(&format!("{PODS}/p")).await.0), (200, 404));
    h.post(PODS, pod("q")).await;
    let eviction = json!({ "apiVersion": "policy/v1", "kind": "Eviction", "metadata": { "name": "q" } });
    let (code, evicted) = h.post(&format!("{PODS}/q/eviction"), eviction).await;
    assert_eq!((code, h.get(&format!("{PODS}/q")).await.0), (201, 404), "{evicted}");
}

#[tokio::test]
async fn scale_is_a_window_on_replicas() {
    let h = Harness::new();
    let url = "/apis/apps/v1/namespaces/default/deployments";
    h.post(url, json!({ "metadata": { "name": "web" }, "spec": { "replicas": 2, "selector": { "matchLabels": { "a": "b" } },
        "template": { "metadata": { "labels": { "a": "b" } }, "spec": { "containers": [{ "name": "c", "image": "i" }] } } } })).await;
    let (code, scale) = h.get(&format!("{url}/web/scale")).await;
    assert_eq!(
        (code, &scale["spec"]["replicas"], &scale["status"]["selector"]),
        (200, &json!(2), &json!("a=b")),
        "{scale}"
    );
    let mut more = scale.clone();
    more["spec"]["replicas"] = json!(5);
    let (code, scaled) = h.send("PUT", &format!("{url}/web/scale"), &[], more).await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (200, &json!(5)), "{scaled}");
    let merge = [("content-type", "application/merge-patch+json")];
    let (code, scaled) =
        h.send("PATCH", &format!("{url}/web/scale"), &merge, json!({ "spec": { "replicas": 7 } })).await;
    assert_eq!((code, &scaled["spec"]["replicas"]), (200, &json!(7)), "{scaled}");
    let (_, web) = h.get(&format!("{url}/web")).await;
    assert_eq!((&web["spec"]["replicas"], &web["metadata"]["generation"]), (&json!(7), &json!(3)));
}

#[tokio::test]
async fn a_namespace_waits_for_its_finalizer() {
    let h = Harness::new();
    let (code, made) = h.post("/api/v1/namespaces", json!({ "metadata": { "name": "a" } })).await;
    assert_eq!((code, &made["spec"]["finalizers"]), (201, &json!(["kubernetes"])), "{made}");
    assert_eq!(made["metadata"]["labels"]["kubernetes.io/metadata.name"], "a");
    let (_, ending) = h.send("DELETE", "/api/v1/namespaces/a", &[], Value::Null).await;
    assert_eq!(ending["status"]["phase"], "Terminating", "{ending}");
    let mut left = ending.clone();
    left["spec"]["finalizers"] = json!([]);
    let (code, done) = h.send("PUT", "/api/v1/namespaces/a/finalize", &[], left).await;
    assert_eq!((code, h.get("/api/v1/namespaces/a").await.0), (200, 404), "{done}");
}

#[tokio::test]
async fn events_are_one_thing_under_two_groups() {
    let h = Harness::new();
    let event = json!({ "metadata": { "name": "e" }, "involvedObject": { "name": "p", "namespace": "default", "kind": "Pod" }, "message": "m", "reason": "R", "type": "Normal" });
    let (code, made) = h.post("/api/v1/namespaces/default/events", event).await;
    assert_eq!(code, 201, "{made}");
    let (code, other) = h.get("/apis/events.k8s.io/v1/namespaces/default/events/e").await;
    assert_eq!((code, &other["regarding"]["name"], &other["note"]), (200, &json!("p"), &json!("m")), "{other}");
    assert_eq!(other["apiVersion"], "events.k8s.io/v1");
    let (_, list) = h.get("/api/v1/events?fieldSelector=involvedObject.name%3Dp").await;
    assert_eq!(list["items"].as_array().unwrap().len(), 1);
}
