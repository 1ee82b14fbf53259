//! The API: one generic engine over stored bytes.
//!
//! # Layout
//! In the order a request flows through it:
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`listener`] | TLS, HTTP, credentials, bounds on what strangers can make us hold |
//! | [`protocols`] | protocols of our own on the same port |
//! | [`service`] | [`ApiServer`]: the whole API as one `tower::Service` |
//! | [`limits`], [`deadline`] | how many requests at once, and how long each may take |
//! | [`query`], [`request`] | the URL grammar: [`request::RequestInfo`] |
//! | [`resources`], [`registry`] | [`resources::RESOURCES`]: one row per kind; the kinds served right now |
//! | [`verbs`] | what can be done with a kind |
//! | [`discovery`], [`openapi`], [`health`] | `/api`, `/apis`; `/openapi/v3`; `/livez`, `/readyz`, `/version` |
//! | [`call`], [`negotiate`] | one request to a resource, and the shapes of answers |
//! | [`options`], [`selector`], [`fields`] | the options of each verb; label and field selectors |
//! | [`read`] | get and list |
//! | [`watch`] | watch |
//! | [`write`], [`patch`], [`delete`] | create and update, patch, delete and deletecollection |
//! | [`confine`] | what an update may not change |
//! | [`subresource`] | what lies below an object's path |
//! | [`links`] | which nodes can be reached, and how |
//! | [`reviews`] | kinds that are questions, and token requests |
//! | [`metadata`], [`names`], [`tracking`] | what every object has, filled in and checked; `managedFields` |
//! | [`codec`], [`convert`], [`yaml`] | bodies, defaults, versions, answers as YAML |
//! | [`object`], [`scan`] | the stored form: splicing, encoding, looking in without parsing |
//! | [`table`] | what `kubectl get` prints |
//! | [`backend`] | store and log underneath |
//! | [`field`], [`status`] | field errors; `metav1.Status`: what a failure looks like outside |
//! | [`body`] | the one body type |

pub mod backend;
pub mod body;
pub mod call;
pub mod codec;
pub mod confine;
pub mod convert;
pub mod deadline;
pub mod delete;
pub mod discovery;
pub mod field;
pub mod fields;
pub mod health;
pub mod limits;
pub mod links;
pub mod listener;
pub mod metadata;
pub mod names;
pub mod negotiate;
pub mod object;
pub mod openapi;
pub mod options;
pub mod patch;
pub mod protocols;
pub mod query;
pub mod read;
pub mod registry;
pub mod request;
pub mod resources;
pub mod reviews;
pub mod scan;
pub mod selector;
pub mod service;
pub mod status;
pub mod subresource;
pub mod table;
pub mod tracking;
pub mod verbs;
pub mod watch;
pub mod write;
pub mod yaml;

pub use reviews::Reviews;
pub use service::{ApiServer, Parts, client};

#[cfg(test)]
mod tests;
