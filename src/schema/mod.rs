//! The table of all API types: decoding, defaults, patches and server-side apply work from it, no kind has code of its own.
//!
//! ```ignore
//! let schema = schema::builtin();
//! let pod = schema.by_gvk("", "v1", "Pod").ok_or(..)?;
//! let wanted = Expected { group: "", version: "v1", kind: "Pod", node: pod };
//! let Decoded { mut value, warnings } = decode::decode(schema, &wanted, body, Format::Json, FieldValidation::Strict)?;
//! default::apply(schema, pod, &mut value);                  // what SetDefaults_* does upstream
//! ```
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`node`] | [`Schema`], [`Node`], [`Field`]: the graph that everything else walks |
//! | [`table`] | reads `table.txt` (written by `generate.py`, reviewable) into that graph, once, about 1 ms |
//! | [`decode`] | request bodies (JSON, YAML) to values: group, version and kind, strict fields, upstream's error texts |
//! | [`typed`] | the walk under it: what Go's decoder and encoder make of a value of a type |
//! | `keys` | keys of maps and structs |
//! | [`quantity`], [`time`] | scalars with a canonical form |
//! | [`default`] | static defaults of the table and the conditional ones |
//! | [`proto`] | protobuf bodies to values and back |
//! | [`openapi`] | OpenAPI v3 documents |
//! | [`managed`] | managed fields on every write, server-side apply |
//! | [`patch`] | JSON patch, merge patch, strategic merge patch |
//!
//! A value that went through [`decode`] or [`typed::normalize`] is in **Go form**: what encoding the decoded Go struct would give.
//! Unset optional fields are absent, `status: {}` and `resources: {}` are there, `null` means an empty required list.

pub mod decode;
pub mod default;
mod generic;
mod hooks;
mod keys;
pub mod managed;
pub mod node;
pub mod openapi;
pub mod patch;
pub mod proto;
pub mod quantity;
mod syntax;
pub mod table;
pub mod time;
pub mod typed;
mod yaml;

pub use node::{Field, Kind, ListType, Node, PatchStrategy, Schema, TypeId};
pub use table::builtin;
