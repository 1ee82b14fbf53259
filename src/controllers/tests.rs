//! The loops over the real API service in this process: stories about what users see.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Context, spawn_all};
use crate::apiserver::{ApiServer, Parts, backend::memory, client};
use crate::auth::Identity;
use crate::strategy::service::allocation::ServiceNetwork;

/// How long a busy machine may take.
const PATIENCE: Duration = Duration::from_secs(60);

struct Cluster {
    client: kube::Client,
    shutdown: CancellationToken,
    _leadership: watch::Sender<bool>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

impl Cluster {
    /// A cluster with one node and the namespace `default`.
    async fn start() -> Cluster {
        // RUST_LOG=coracle=debug shows what loops complain about.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _another_test_did = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let shutdown = CancellationToken::new();
        let backend = memory::backend();
        let authorizer = crate::auth::Authorizer::new(backend.store().clone());
        let server = ApiServer::new(Parts {
            admission: crate::admission::Admission::new(backend.clone(), authorizer.clone()),
            authorizer,
            backend,
            address: "10.0.0.1:6443".to_owned(),
            services: ServiceNetwork { ranges: vec!["10.43.0.0/16".parse().unwrap()], node_ports: 30000..=32767 },
            shutdown: shutdown.clone(),
        });
        let own = client(&server, Identity::apiserver());
        for namespace in ["default", "kube-system", "kube-public", "kube-node-lease"] {
            let body = json!({"metadata": {"name": namespace}}).to_string().into_bytes();
            let json = "application/json";
            super::api::send(&own, http::Method::POST, "/api/v1/namespaces", json, json, body).await.unwrap();
        }
        crate::auth::rbac::bootstrap::reconcile(&own).await.unwrap();
        let (sender, leadership) = watch::channel(true);
        let client_for = move |user: &str| match user.strip_prefix("system:serviceaccount:kube-system:") {
            Some(controller) => client(&server, Identity::controller(controller)),
            None => client(&server, Identity::in_process(user, &[])),
        };
        spawn_all(Context {
            client_for: Arc::new(client_for),
            leadership,
            cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap()],
            root_ca_pem: "PEM".into(),
            shutdown: shutdown.clone(),
        });
        let cluster = Cluster { client: own, shutdown, _leadership: sender };
        cluster.post("/api/v1/nodes", json!({"metadata": {"name": "one"}})).await;
        let status = json!({"status": {"allocatable": {"cpu": "8", "memory": "8Gi", "pods": "110"},
            "conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "2999-01-01T00:00:00Z"}]}});
        cluster.merge("/api/v1/nodes/one/status", status).await;
        // Pods are refused before their account exists.
        cluster.eventually("/api/v1/namespaces/default/serviceaccounts/default", Value::is_object).await;
        cluster
    }

    async fn call(&self, method: &str, path: &str, kind: &str, body: Value) -> (u16, Value) {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        let method = method.parse().unwrap();
        match super::api::send(&self.client, method, path, kind, "application/json", body).await {
            Ok(bytes) => (200, serde_json::from_slice(&bytes).unwrap_or_default()),
            Err(error) => (error.code(), json!(error.to_string())),
        }
    }

    async fn get(&self, path: &str) -> Value {
        self.call("GET", path, "", Value::Null).await.1
    }

    async fn post(&self, path: &str, body: Value) -> Value {
        let (code, answer) = self.call("POST", path, "application/json", body).await;
        assert_eq!(code, 200, "{path}: {answer}");
        answer
    }

    async fn merge(&self, path: &str, patch: Value) -> Value {
        let (code, answer) = self.call("PATCH", path, "application/merge-patch+json", patch).await;
        assert_eq!(code, 200, "{path}: {answer}");
        answer
    }

    async fn delete(&self, path: &str, options: Value) {
        let (code, answer) = self.call("DELETE", path, "application/json", options).await;
        assert_eq!(code, 200, "{path}: {answer}");
    }

    async fn items(&self, path: &str) -> Vec<Value> {
        self.get(path).await["items"].as_array().cloned().unwrap_or_default()
    }

    /// Waits until `what` holds of the answer at `path`.
    async fn eventually(&self, path: &str, what: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = self.get(path).await;
            if what(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "{path} is still {answer:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// What a kubelet does: every bound pod runs and is ready, every deleted one goes.
    async fn run_pods(&self, namespace: &str) {
        let pods = format!("/api/v1/namespaces/{namespace}/pods");
        for (index, pod) in self.items(&pods).await.into_iter().enumerate() {
            let path = format!("{pods}/{}", pod["metadata"]["name"].as_str().unwrap());
            if pod["metadata"]["deletionTimestamp"].is_string() {
                self.call("DELETE", &path, "application/json", json!({"gracePeriodSeconds": 0})).await;
            } else if pod["spec"]["nodeName"].is_string() && pod["status"]["phase"] != "Running" {
                let ip = format!("10.42.0.{}", index + 2);
                let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                    "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}});
                self.call("PATCH", &format!("{path}/status"), "application/merge-patch+json", status).await;
            }
        }
    }

    /// Runs pods until `what` holds of the answer at `path`.
    async fn running_until(&self, path: &str, what: impl Fn(&Value) -> bool) -> Value {
        self.running_in("default", path, what).await
    }

    async fn running_in(&self, namespace: &str, path: &str, what: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.run_pods(namespace).await;
            let answer = self.get(path).await;
            if what(&answer) {
                return answer;
            }
            assert!(Instant::now() < deadline, "{path} is still {answer:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

const PODS: &str = "/api/v1/namespaces/default/pods";
const DEPLOYMENTS: &str = "/apis/apps/v1/namespaces/default/deployments";
const SETS: &str = "/apis/apps/v1/namespaces/default/replicasets";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

fn count(list: &Value) -> usize {
    list["items"].as_array().map_or(0, Vec::len)
}

fn web(replicas: u32, image: &str) -> Value {
    json!({"metadata": {"name": "web"}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "progressDeadlineSeconds": 600, "revisionHistoryLimit": 10,
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
        "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [
            {"name": "c", "image": image, "ports": [{"containerPort": 8080, "name": "http"}]}]}}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_becomes_pods_endpoints_and_a_status_rolls_and_goes_with_all_it_made() {
    let cluster = Cluster::start().await;
    cluster
        .post(
            "/api/v1/namespaces/default/services",
            json!({"metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "clusterIP": "10.43.0.9",
                "ports": [{"port": 80, "targetPort": "http", "protocol": "TCP"}]}}),
        )
        .await;
    cluster.post(DEPLOYMENTS, web(3, "a")).await;
    let deployment =
        cluster.running_until(&format!("{DEPLOYMENTS}/web"), |web| web["status"]["availableReplicas"] == 3).await;
    assert_eq!(deployment["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "1");
    let slice = cluster
        .eventually(SLICES, |list| list["items"][0]["endpoints"].as_array().is_some_and(|all| all.len() == 3))
        .await;
    assert_eq!(slice["items"][0]["ports"][0]["port"], 8080);
    cluster
        .eventually("/api/v1/namespaces/default/endpoints/web", |endpoints| {
            endpoints["subsets"][0]["addresses"].as_array().is_some_and(|all| all.len() == 3)
        })
        .await;

    cluster
        .merge(&format!("{DEPLOYMENTS}/web"), json!({"spec": {"template": {"metadata": {"labels": {"v": "2"}}}}}))
        .await;
    let rolled = cluster
        .running_until(&format!("{DEPLOYMENTS}/web"), |web| {
            // The status of the generation before looks just as finished.
            web["status"]["observedGeneration"] == web["metadata"]["generation"]
                && web["status"]["updatedReplicas"] == 3
                && web["status"]["replicas"] == 3
                && web["status"]["availableReplicas"] == 3
        })
        .await;
    assert_eq!(rolled["metadata"]["annotations"]["deployment.kubernetes.io/revision"], "2");
    assert_eq!(cluster.items(SETS).await.len(), 2);

    cluster.delete(&format!("{DEPLOYMENTS}/web"), json!({"propagationPolicy": "Foreground"})).await;
    cluster.running_until(PODS, |pods| count(pods) == 0).await;
    cluster.eventually(SETS, |sets| count(sets) == 0).await;
    cluster.eventually(DEPLOYMENTS, |all| count(all) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn orphaned_pods_stay_and_are_adopted_again() {
    let cluster = Cluster::start().await;
    let mut set = web(2, "a");
    set["spec"]
        .as_object_mut()
        .unwrap()
        .retain(|field, _| ["replicas", "selector", "template"].contains(&field.as_str()));
    cluster.post(SETS, set.clone()).await;
    cluster.running_until(&format!("{SETS}/web"), |set| set["status"]["readyReplicas"] == 2).await;
    let before: Vec<Value> = cluster.items(PODS).await.iter().map(|pod| pod["metadata"]["uid"].clone()).collect();
    cluster.delete(&format!("{SETS}/web"), json!({"propagationPolicy": "Orphan"})).await;
    cluster.eventually(SETS, |sets| count(sets) == 0).await;
    assert!(cluster.items(PODS).await.iter().all(|pod| pod["metadata"]["ownerReferences"].is_null()));
    cluster.post(SETS, set).await;
    cluster.eventually(&format!("{SETS}/web"), |set| set["status"]["readyReplicas"] == 2).await;
    let after: Vec<Value> = cluster.items(PODS).await.iter().map(|pod| pod["metadata"]["uid"].clone()).collect();
    assert_eq!(before, after);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_gets_its_account_and_ca_and_goes_with_its_content() {
    let cluster = Cluster::start().await;
    cluster
        .post("/api/v1/namespaces", json!({"metadata": {"name": "team"}, "spec": {"finalizers": ["kubernetes"]}}))
        .await;
    cluster.eventually("/api/v1/namespaces/team/serviceaccounts/default", Value::is_object).await;
    let map = cluster.eventually("/api/v1/namespaces/team/configmaps/kube-root-ca.crt", Value::is_object).await;
    assert_eq!(map["data"]["ca.crt"], "PEM");
    cluster.post("/api/v1/namespaces/team/configmaps", json!({"metadata": {"name": "c"}})).await;
    cluster.delete("/api/v1/namespaces/team", Value::Null).await;
    cluster.eventually("/api/v1/namespaces/team", Value::is_string).await;
    assert_eq!(cluster.items("/api/v1/namespaces/team/configmaps").await, Vec::<Value>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_goes_while_a_job_in_it_wants_more_pods() {
    let cluster = Cluster::start().await;
    cluster.post("/api/v1/namespaces", json!({"metadata": {"name": "batch"}})).await;
    cluster.eventually("/api/v1/namespaces/batch/serviceaccounts/default", Value::is_object).await;
    let job = json!({"metadata": {"name": "job"}, "spec": {"completions": 4, "parallelism": 2,
        "template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}}});
    cluster.post("/apis/batch/v1/namespaces/batch/jobs", job).await;
    cluster.running_in("batch", "/api/v1/namespaces/batch/pods", |list| count(list) == 2).await;
    cluster.delete("/api/v1/namespaces/batch", Value::Null).await;
    // Pods in their last state keep the Job's finalizer until it has counted them.
    cluster.running_in("batch", "/api/v1/namespaces/batch", |answer| !answer.is_object()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_pods_are_bound_at_once_and_what_does_not_fit_says_why() {
    let cluster = Cluster::start().await;
    cluster.eventually("/api/v1/namespaces/default/serviceaccounts/default", Value::is_object).await;
    let start = Instant::now();
    let mut set = web(50, "a");
    set["spec"]
        .as_object_mut()
        .unwrap()
        .retain(|field, _| ["replicas", "selector", "template"].contains(&field.as_str()));
    cluster.post(SETS, set).await;
    cluster
        .eventually(PODS, |pods| {
            count(pods) == 50 && pods["items"].as_array().unwrap().iter().all(|pod| pod["spec"]["nodeName"] == "one")
        })
        .await;
    println!("50 pods created and bound in {:?}", start.elapsed());
    cluster
        .post(
            PODS,
            json!({"metadata": {"name": "huge"}, "spec": {"containers": [
                {"name": "c", "image": "a", "resources": {"requests": {"cpu": "100"}}}]}}),
        )
        .await;
    let huge = cluster
        .eventually(&format!("{PODS}/huge"), |pod| pod["status"]["conditions"][0]["reason"] == "Unschedulable")
        .await;
    assert_eq!(
        huge["status"]["conditions"][0]["message"],
        "0/1 nodes are available: 1 Insufficient cpu. preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."
    );
    cluster
        .eventually("/api/v1/namespaces/default/events", |events| {
            let all = events["items"].as_array().cloned().unwrap_or_default();
            all.iter().any(|event| event["reason"] == "FailedScheduling" && event["involvedObject"]["name"] == "huge")
        })
        .await;
}
