//! Keeps the Node object and its lease current: registration, a lease every ten seconds, status when the API does not
//! hold what is so (it has changed, or others have written over it) or every five minutes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{Node, NodeStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::api::{ApiError, PatchType};
use super::backoff::Jitter;
use super::context::Context;
use super::events::EventType;
use super::node::{self, Machine, Pressure};
use super::observed::api_time;

const LEASE_PERIOD: Duration = Duration::from_secs(10);
const LEASE_SECONDS: i32 = 40;
const STATUS_PERIOD: Duration = Duration::from_secs(300);
/// How soon and how seldom the runtime is asked while the node is not ready.
const NOT_READY_FIRST: Duration = Duration::from_millis(50);
const NOT_READY_LIMIT: Duration = Duration::from_secs(2);

/// Conditions whose changes are told as events, with the reasons for "False" and "True".
const TOLD: [(&str, [&str; 2]); 4] = [
    ("MemoryPressure", ["NodeHasSufficientMemory", "NodeHasInsufficientMemory"]),
    ("DiskPressure", ["NodeHasNoDiskPressure", "NodeHasDiskPressure"]),
    ("PIDPressure", ["NodeHasSufficientPID", "NodeHasInsufficientPID"]),
    ("Ready", ["NodeNotReady", "NodeReady"]),
];

/// The node's task.
pub struct NodeSync {
    context: Arc<Context>,
    machine: Machine,
    uid: String,
    /// As the API held it when last asked or told.
    status: NodeStatus,
    written_at: Option<SystemTime>,
    lease_at: Option<SystemTime>,
}

impl NodeSync {
    /// A node that is not registered yet.
    pub fn new(context: Arc<Context>, machine: Machine) -> Self {
        Self { context, machine, uid: String::new(), status: NodeStatus::default(), written_at: None, lease_at: None }
    }

    /// Runs until the agent stops.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let work = async {
            let mut retry = Jitter::new(Duration::from_millis(50), Duration::from_secs(10));
            while let Err(error) = self.register().await {
                tracing::debug!(%error, "node not registered");
                tokio::time::sleep(retry.delay()).await;
            }
            self.tell("Starting", "Starting kubelet.");
            retry.reset();
            let mut not_ready = Jitter::new(NOT_READY_FIRST, NOT_READY_LIMIT);
            loop {
                let wait = match self.turn().await {
                    Ok(()) if node::holds(&self.status, "Ready") => {
                        retry.reset();
                        not_ready.reset();
                        LEASE_PERIOD
                    }
                    Ok(()) => not_ready.delay(),
                    Err(error) if error.is_not_found() => {
                        // Somebody deleted the node: come back.
                        self.written_at = None;
                        if let Err(error) = self.register().await {
                            tracing::debug!(%error, "node not registered");
                        }
                        retry.delay()
                    }
                    Err(error) => {
                        tracing::debug!(%error, "node status not written");
                        retry.delay()
                    }
                };
                tokio::time::sleep(wait).await;
            }
        };
        tokio::select! {
            () = work => {}
            () = shutdown.cancelled() => {}
        }
    }

    fn path(&self) -> String {
        format!("/api/v1/nodes/{}", self.context.config.node_name)
    }

    async fn wanted(&self) -> Node {
        let runtime = self.context.runtime.status().await.map_err(|error| error.to_string());
        let images = self.context.images.list().await.unwrap_or_default();
        let ips = self.context.host_ips();
        node::node(&node::Input {
            config: &self.context.config,
            machine: &self.machine,
            ips: &ips,
            runtime,
            pressure: Pressure::read(&self.context.config.data_dir),
            images: &images,
            old: Some(&self.status),
            now: api_time(SystemTime::now()),
        })
    }

    /// Creates the Node, or takes over the one of a former start: labels of the command line are set again.
    async fn register(&mut self) -> Result<(), ApiError> {
        let wanted = self.wanted().await;
        let existing: Node = match self.context.api.create("/api/v1/nodes", &wanted).await {
            Ok(node) => node,
            Err(error) if error.is_conflict() => {
                let existing: Node = self.context.api.get(&self.path()).await?;
                let labels = wanted.metadata.labels.clone().unwrap_or_default();
                let current = existing.metadata.labels.clone().unwrap_or_default();
                if labels.iter().any(|(key, value)| current.get(key) != Some(value)) {
                    let body = json!({"metadata": {"labels": labels}});
                    let _: IgnoredAny = self.context.api.patch(&self.path(), PatchType::Strategic, &body).await?;
                }
                existing
            }
            Err(error) => return Err(error),
        };
        self.uid = existing.metadata.uid.unwrap_or_default();
        self.status = existing.status.unwrap_or_default();
        self.written_at = None;
        Ok(())
    }

    async fn turn(&mut self) -> Result<(), ApiError> {
        let now = SystemTime::now();
        let age = |at: Option<SystemTime>| at.map(|at| now.duration_since(at).unwrap_or_default());
        if age(self.lease_at).is_none_or(|age| age + Duration::from_secs(1) >= LEASE_PERIOD) {
            self.renew().await?;
            self.lease_at = Some(now);
        }
        // The node life cycle controller sets conditions to Unknown while it hears nothing: only the API knows.
        let held: Node = self.context.api.get(&self.path()).await?;
        self.uid = held.metadata.uid.unwrap_or_default();
        self.status = held.status.unwrap_or_default();
        let wanted = self.wanted().await.status.unwrap_or_default();
        let due = age(self.written_at).is_none_or(|age| age >= STATUS_PERIOD);
        if due || !node::says(&self.status, &wanted) {
            self.write(wanted).await?;
            self.written_at = Some(now);
        }
        Ok(())
    }

    async fn write(&mut self, wanted: NodeStatus) -> Result<(), ApiError> {
        let mut body = serde_json::to_value(&wanted).map_err(ApiError::Decode)?;
        if let Value::Object(status) = &mut body
            && let Some(Value::Array(addresses)) = status.get_mut("addresses")
        {
            // Addresses are merged by type, of which there can be several.
            addresses.push(json!({"$patch": "replace"}));
        }
        let path = format!("{}/status", self.path());
        let _: IgnoredAny = self.context.api.patch(&path, PatchType::Strategic, &json!({"status": body})).await?;
        let before = std::mem::replace(&mut self.status, wanted);
        for (kind, reasons) in TOLD {
            let [was, is] = [&before, &self.status].map(|status| node::holds(status, kind));
            if was == is {
                continue;
            }
            let reason = reasons[usize::from(is)];
            if is == (kind == "Ready") {
                tracing::info!(node = self.context.config.node_name, reason, "the node's condition has changed");
            } else {
                tracing::warn!(node = self.context.config.node_name, reason, "the node's condition has changed");
            }
            self.tell(reason, &format!("Node {} status is now: {reason}", self.context.config.node_name));
        }
        Ok(())
    }

    fn tell(&self, reason: &'static str, message: &str) {
        let name = &self.context.config.node_name;
        let object = k8s_openapi::api::core::v1::ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(name.clone()),
            uid: Some(name.clone()),
            ..Default::default()
        };
        self.context.recorder.record(object, EventType::Normal, reason, message);
    }

    async fn renew(&self) -> Result<(), ApiError> {
        let name = &self.context.config.node_name;
        let collection = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
        let renew_time = MicroTime(Timestamp::now());
        let body = json!({"spec": {"renewTime": renew_time}});
        let path = format!("{collection}/{name}");
        let result: Result<IgnoredAny, _> = self.context.api.patch(&path, PatchType::Merge, &body).await;
        match result {
            Err(error) if error.is_not_found() => {}
            other => return other.map(|_| ()),
        }
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                namespace: Some("kube-node-lease".to_owned()),
                owner_references: Some(vec![OwnerReference {
                    api_version: "v1".to_owned(),
                    kind: "Node".to_owned(),
                    name: name.clone(),
                    uid: self.uid.clone(),
                    ..OwnerReference::default()
                }]),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(name.clone()),
                lease_duration_seconds: Some(LEASE_SECONDS),
                renew_time: Some(renew_time),
                ..LeaseSpec::default()
            }),
        };
        let _: IgnoredAny = self.context.api.create(collection, &lease).await?;
        Ok(())
    }
}
