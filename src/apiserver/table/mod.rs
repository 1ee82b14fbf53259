//! `meta.k8s.io` Tables: what `kubectl get` prints. A kind without columns of its own shows its name and age.

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
    /// `string`, `integer`, ...
    pub kind: &'static str,
    /// `name` for the name, otherwise empty.
    pub format: &'static str,
    /// 0 is always shown, 1 only in wide output.
    pub priority: i32,
    pub description: &'static str,
}

/// How a kind is printed.
pub struct Printer {
    pub columns: &'static [Column],
    /// The cells of one object, as many as there are columns.
    pub cells: fn(&Value) -> Vec<Value>,
}

const DEFAULT: Printer = Printer {
    columns: &[
        Column {
            name: "Name",
            kind: "string",
            format: "name",
            priority: 0,
            description: "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically. Name is primarily intended for creation idempotence and configuration definition. Cannot be updated. More info: https://kubernetes.io/docs/concepts/overview/working-with-objects/names#names",
        },
        Column {
            name: "Created At",
            kind: "date",
            format: "",
            priority: 0,
            description: "CreationTimestamp is a timestamp representing the server time when this object was created. It is not guaranteed to be set in happens-before order across separate operations. Clients may not set this value. It is represented in RFC3339 form and is in UTC.\n\nPopulated by the system. Read-only. Null for lists. More info: https://git.k8s.io/community/contributors/devel/sig-architecture/api-conventions.md#metadata",
        },
    ],
    cells: |object| vec![json!(meta(object, "name")), json!(meta(object, "creationTimestamp"))],
};

/// The table of some objects in their served version.
pub fn render(resource: &Resource, objects: &[Value], list_meta: Value, include: Include, meta_version: &str) -> Value {
    let printer = printer(resource);
    let columns: Vec<Value> = printer
        .columns
        .iter()
        .map(|c| {
            json!({ "name": c.name, "type": c.kind, "format": c.format, "description": c.description,
                "priority": c.priority })
        })
        .collect();
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({ "cells": (printer.cells)(object) });
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

fn printer(resource: &Resource) -> &'static Printer {
    let _ = resource;
    &DEFAULT
}
