//! How storage is printed.

use super::format::{access_modes, age, flag, items, name, or, scalar, text};
use super::{Column, Printer};
use crate::apiserver::object::meta;
use serde_json::{Value, json};

const AGE: Column = Column::text("Age");

pub const VOLUME: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Capacity"),
        Column::text("Access Modes"),
        Column::text("Reclaim Policy"),
        Column::text("Status"),
        Column::text("Claim"),
        Column::text("StorageClass"),
        Column::text("VolumeAttributesClass"),
        Column::text("Reason"),
        AGE,
        Column::wide("VolumeMode"),
    ],
    cells: |volume| {
        let claim = volume
            .pointer("/spec/claimRef")
            .map_or(String::new(), |c| format!("{}/{}", text(c, "/namespace"), text(c, "/name")));
        vec![
            name(volume),
            json!(or(&scalar(volume.pointer("/spec/capacity/storage")), "0")),
            json!(access_modes(volume, "/spec/accessModes")),
            json!(text(volume, "/spec/persistentVolumeReclaimPolicy")),
            json!(phase(volume)),
            json!(claim),
            json!(storage_class(volume)),
            json!(or(text(volume, "/spec/volumeAttributesClassName"), "<unset>")),
            json!(text(volume, "/status/reason")),
            age(volume),
            json!(or(text(volume, "/spec/volumeMode"), "<unset>")),
        ]
    },
};

fn phase(object: &Value) -> &str {
    if object.pointer("/metadata/deletionTimestamp").is_some() { "Terminating" } else { text(object, "/status/phase") }
}

fn storage_class(object: &Value) -> &str {
    let annotations = object.pointer("/metadata/annotations");
    let old = annotations.and_then(|a| a.get("volume.beta.kubernetes.io/storage-class")).and_then(Value::as_str);
    old.unwrap_or_else(|| text(object, "/spec/storageClassName"))
}

pub const CLAIM: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Status"),
        Column::text("Volume"),
        Column::text("Capacity"),
        Column::text("Access Modes"),
        Column::text("StorageClass"),
        Column::text("VolumeAttributesClass"),
        AGE,
        Column::wide("VolumeMode"),
    ],
    cells: |claim| {
        let bound = !text(claim, "/spec/volumeName").is_empty();
        let capacity = scalar(claim.pointer("/status/capacity/storage"));
        vec![
            name(claim),
            json!(phase(claim)),
            json!(text(claim, "/spec/volumeName")),
            json!(if bound { or(&capacity, "0") } else { "" }),
            json!(if bound { access_modes(claim, "/status/accessModes") } else { String::new() }),
            json!(storage_class(claim)),
            json!(or(text(claim, "/spec/volumeAttributesClassName"), "<unset>")),
            age(claim),
            json!(or(text(claim, "/spec/volumeMode"), "<unset>")),
        ]
    },
};

pub const STORAGE_CLASS: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Provisioner"),
        Column::text("ReclaimPolicy"),
        Column::text("VolumeBindingMode"),
        Column::text("AllowVolumeExpansion"),
        AGE,
    ],
    cells: |class| {
        let annotations = class.pointer("/metadata/annotations");
        let default =
            ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"]
                .iter()
                .any(|key| annotations.and_then(|a| a.get(key)) == Some(&json!("true")));
        let mark = if default { " (default)" } else { "" };
        vec![
            json!(format!("{}{mark}", meta(class, "name"))),
            json!(text(class, "/provisioner")),
            json!(or(text(class, "/reclaimPolicy"), "Delete")),
            json!(or(text(class, "/volumeBindingMode"), "Immediate")),
            json!(flag(class, "/allowVolumeExpansion")),
            age(class),
        ]
    },
};

pub const ATTRIBUTES_CLASS: Printer = Printer {
    columns: &[Column::NAME, Column::text("DriverName"), AGE],
    cells: |class| vec![name(class), json!(text(class, "/driverName")), age(class)],
};

pub const ATTACHMENT: Printer = Printer {
    columns: &[
        Column::NAME,
        Column { format: "name", ..Column::text("Attacher") },
        Column::text("PV"),
        Column::text("Node"),
        Column::boolean("Attached"),
        AGE,
    ],
    cells: |attachment| {
        vec![
            name(attachment),
            json!(text(attachment, "/spec/attacher")),
            json!(text(attachment, "/spec/source/persistentVolumeName")),
            json!(text(attachment, "/spec/nodeName")),
            json!(flag(attachment, "/status/attached")),
            age(attachment),
        ]
    },
};

pub const CSI_NODE: Printer = Printer {
    columns: &[Column::NAME, Column::integer("Drivers"), AGE],
    cells: |node| vec![name(node), json!(items(node, "/spec/drivers").len()), age(node)],
};

pub const CSI_DRIVER: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::boolean("AttachRequired"),
        Column::boolean("PodInfoOnMount"),
        Column::boolean("StorageCapacity"),
        Column::text("TokenRequests"),
        Column::boolean("RequiresRepublish"),
        Column::text("Modes"),
        AGE,
    ],
    cells: |driver| {
        let attach = driver.pointer("/spec/attachRequired").and_then(Value::as_bool).unwrap_or(true);
        let modes: Vec<&str> = items(driver, "/spec/volumeLifecycleModes").filter_map(Value::as_str).collect();
        let audiences: Vec<&str> = items(driver, "/spec/tokenRequests").map(|t| text(t, "/audience")).collect();
        let tokens =
            if driver.pointer("/spec/tokenRequests").is_some() { audiences.join(",") } else { "<unset>".to_owned() };
        vec![
            name(driver),
            json!(attach),
            json!(flag(driver, "/spec/podInfoOnMount")),
            json!(flag(driver, "/spec/storageCapacity")),
            json!(tokens),
            json!(flag(driver, "/spec/requiresRepublish")),
            json!(or(&modes.join(","), "<none>")),
            age(driver),
        ]
    },
};

pub const CSI_CAPACITY: Printer = Printer {
    columns: &[Column::NAME, Column::text("StorageClassName"), Column::text("Capacity")],
    cells: |capacity| {
        let size = scalar(capacity.get("capacity"));
        vec![name(capacity), json!(text(capacity, "/storageClassName")), json!(or(&size, "<unset>"))]
    },
};
