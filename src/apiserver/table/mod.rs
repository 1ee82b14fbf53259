//! `meta.k8s.io` Tables: what `kubectl get` prints. A kind without columns of its own shows its name and when it was made.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`pod`] | pods |
//! | [`workloads`] | what makes pods |
//! | [`cluster`] | network, nodes, access, policy |
//! | [`storage`] | volumes and claims |
//! | [`format`] | how values read in cells |

mod cluster;
mod format;
mod pod;
mod storage;
mod workloads;

use super::call::partial_metadata;
use super::object::meta;
use super::query::Query;
use super::resources::Resource;
use super::status::Status;
use serde_json::{Value, json};

/// What each row carries besides its cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Include {
    None,
    Metadata,
    Object,
}

impl Include {
    /// The query parameter `includeObject`.
    ///
    /// # Errors
    /// 400 for unknown values.
    pub fn of(query: &Query<'_>) -> Result<Include, Status> {
        match query.get("includeObject").unwrap_or_default() {
            "" | "Metadata" => Ok(Include::Metadata),
            "None" => Ok(Include::None),
            "Object" => Ok(Include::Object),
            other => Err(Status::bad_request(format!(
                "includeObject: Invalid value: {}: must be 'Metadata', 'Object', 'None', or empty",
                crate::apiserver::field::quote(other)
            ))),
        }
    }
}

/// One column.
pub struct Column {
    pub name: &'static str,
    /// `string`, `integer`, `boolean`, `date`.
    pub kind: &'static str,
    /// `name` for the name, otherwise empty.
    pub format: &'static str,
    /// 0 is always shown, 1 only in wide output.
    pub priority: i32,
}

impl Column {
    /// The object's name.
    pub const NAME: Column = Column { name: "Name", kind: "string", format: "name", priority: 0 };

    /// Text that is always shown.
    pub const fn text(name: &'static str) -> Column {
        Column { name, kind: "string", format: "", priority: 0 }
    }

    /// Text of the wide output.
    pub const fn wide(name: &'static str) -> Column {
        Column { name, kind: "string", format: "", priority: 1 }
    }

    /// A whole number.
    pub const fn integer(name: &'static str) -> Column {
        Column { name, kind: "integer", format: "", priority: 0 }
    }

    /// True or false.
    pub const fn boolean(name: &'static str) -> Column {
        Column { name, kind: "boolean", format: "", priority: 0 }
    }
}

/// How a kind is printed.
pub struct Printer {
    pub columns: &'static [Column],
    /// The cells of one object, as many as there are columns.
    pub cells: fn(&Value) -> Vec<Value>,
}

static DEFAULT: Printer = Printer {
    columns: &[Column::NAME, Column { name: "Created At", kind: "date", format: "", priority: 0 }],
    cells: |object| vec![json!(meta(object, "name")), json!(meta(object, "creationTimestamp"))],
};

/// The table of some objects in their served version.
pub fn render(resource: &Resource, objects: &[Value], list_meta: Value, include: Include, meta_version: &str) -> Value {
    let printer = printer(resource);
    let columns: Vec<Value> = printer
        .columns
        .iter()
        .map(|c| {
            json!({ "name": c.name, "type": c.kind, "format": c.format, "description": "", "priority": c.priority })
        })
        .collect();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({ "cells": (printer.cells)(object) });
            if let Some(conditions) = (resource.kind == "Pod").then(|| pod::conditions(object)).flatten() {
                row["conditions"] = conditions;
            }
            match include {
                Include::None => {}
                Include::Metadata => row["object"] = partial_metadata(object, meta_version),
                Include::Object => row["object"] = object.clone(),
            }
            row
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": format!("meta.k8s.io/{meta_version}"),
        "metadata": list_meta,
        "columnDefinitions": columns,
        "rows": rows,
    })
}

/// The printer of a kind.
fn printer(resource: &Resource) -> &'static Printer {
    match (&*resource.group, &*resource.kind) {
        ("", "Pod") => &pod::POD,
        ("", "ReplicationController") | ("apps", "ReplicaSet") => &workloads::REPLICAS,
        ("apps", "Deployment") => &workloads::DEPLOYMENT,
        ("apps", "StatefulSet") => &workloads::STATEFUL_SET,
        ("apps", "DaemonSet") => &workloads::DAEMON_SET,
        ("apps", "ControllerRevision") => &workloads::CONTROLLER_REVISION,
        ("batch", "Job") => &workloads::JOB,
        ("batch", "CronJob") => &workloads::CRON_JOB,
        ("", "PodTemplate") => &workloads::POD_TEMPLATE,
        ("policy", "PodDisruptionBudget") => &workloads::DISRUPTION_BUDGET,
        ("autoscaling", "HorizontalPodAutoscaler") => &workloads::AUTOSCALER,
        ("", "Service") => &cluster::SERVICE,
        ("networking.k8s.io", "Ingress") => &cluster::INGRESS,
        ("networking.k8s.io", "IngressClass") => &cluster::INGRESS_CLASS,
        ("", "Endpoints") => &cluster::ENDPOINTS,
        ("discovery.k8s.io", "EndpointSlice") => &cluster::ENDPOINT_SLICE,
        ("networking.k8s.io", "NetworkPolicy") => &cluster::NETWORK_POLICY,
        ("networking.k8s.io", "ServiceCIDR") => &cluster::SERVICE_CIDR,
        ("networking.k8s.io", "IPAddress") => &cluster::IP_ADDRESS,
        ("", "Node") => &cluster::NODE,
        ("" | "events.k8s.io", "Event") => &cluster::EVENT,
        ("", "Namespace") => &cluster::NAMESPACE,
        ("", "Secret") => &cluster::SECRET,
        ("", "ConfigMap") => &cluster::CONFIG_MAP,
        ("", "ServiceAccount") | ("resource.k8s.io", "DeviceClass" | "ResourceClaimTemplate") => &cluster::NAME_AND_AGE,
        ("", "PersistentVolume") => &storage::VOLUME,
        ("", "PersistentVolumeClaim") => &storage::CLAIM,
        ("storage.k8s.io", "StorageClass") => &storage::STORAGE_CLASS,
        ("storage.k8s.io", "VolumeAttributesClass") => &storage::ATTRIBUTES_CLASS,
        ("storage.k8s.io", "VolumeAttachment") => &storage::ATTACHMENT,
        ("storage.k8s.io", "CSINode") => &storage::CSI_NODE,
        ("storage.k8s.io", "CSIDriver") => &storage::CSI_DRIVER,
        ("storage.k8s.io", "CSIStorageCapacity") => &storage::CSI_CAPACITY,
        ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => &cluster::BINDING,
        ("certificates.k8s.io", "CertificateSigningRequest") => &cluster::SIGNING_REQUEST,
        ("coordination.k8s.io", "Lease") => &cluster::LEASE,
        ("", "ResourceQuota") => &cluster::QUOTA,
        ("scheduling.k8s.io", "PriorityClass") => &cluster::PRIORITY_CLASS,
        ("node.k8s.io", "RuntimeClass") => &cluster::RUNTIME_CLASS,
        ("admissionregistration.k8s.io", "MutatingWebhookConfiguration" | "ValidatingWebhookConfiguration") => {
            &cluster::WEBHOOKS
        }
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy") => &cluster::POLICY,
        ("admissionregistration.k8s.io", "ValidatingAdmissionPolicyBinding") => &cluster::POLICY_BINDING,
        ("flowcontrol.apiserver.k8s.io", "FlowSchema") => &cluster::FLOW_SCHEMA,
        ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration") => &cluster::PRIORITY_LEVEL,
        ("resource.k8s.io", "ResourceClaim") => &cluster::RESOURCE_CLAIM,
        ("resource.k8s.io", "ResourceSlice") => &cluster::RESOURCE_SLICE,
        ("apiregistration.k8s.io", "APIService") => &cluster::API_SERVICE,
        _ => &DEFAULT,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;

    #[test]
    fn every_row_has_as_many_cells_as_columns() {
        for resource in RESOURCES.iter() {
            let printer = printer(resource);
            let cells = (printer.cells)(&json!({ "metadata": { "name": "x" } }));
            assert_eq!(cells.len(), printer.columns.len(), "{resource:?}");
        }
    }

    #[test]
    fn a_table_has_columns_and_rows() {
        let maps = RESOURCES.iter().find(|r| r.plural == "configmaps").unwrap();
        let map = json!({ "metadata": { "name": "c", "uid": "u" }, "data": { "a": "b" } });
        let table = render(maps, &[map], json!({ "resourceVersion": "7" }), Include::Metadata, "v1");
        assert_eq!(table["columnDefinitions"][1]["name"], "Data");
        assert_eq!(table["rows"][0]["cells"], json!(["c", 1, "<unknown>"]));
        assert_eq!(table["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    }
}
