//! Kinds that are questions: reviews of access and of tokens, and token requests. Nothing is stored; the answer is made by
//! whoever knows about credentials.

use super::body::Body;
use super::call::Call;
use super::codec;
use super::negotiate::{self};
use super::options::WriteOptions;
use super::resources::Virtual;
use super::status::Status;
use super::subresource;
use super::write;
use crate::auth::Identity;
use futures::future::BoxFuture;
use http::{Response, StatusCode};
use serde_json::{Value, json};

/// Answers reviews and issues tokens.
pub trait Reviews: Send + Sync {
    /// Fills in the status of a review. `namespace` is that of the URL.
    fn review<'a>(
        &'a self,
        what: Virtual,
        caller: &'a Identity,
        namespace: &'a str,
        review: Value,
    ) -> BoxFuture<'a, Result<Value, Status>>;

    /// Fills in the status of a `TokenRequest` for a service account.
    fn token<'a>(
        &'a self,
        caller: &'a Identity,
        namespace: &'a str,
        name: &'a str,
        request: Value,
        dry_run: bool,
    ) -> BoxFuture<'a, Result<Value, Status>>;
}

/// create of a kind without storage.
pub async fn create(call: &Call<'_>, what: Virtual, body: Body) -> Result<Response<Body>, Status> {
    if what == Virtual::Binding {
        return subresource::binding::create(call, "", body).await;
    }
    let options = WriteOptions::new(call.query, "CreateOptions", false)?;
    let review = subresource::read_body(call, call.kind(), body, &options).await?;
    let mut review = review;
    write::place(call, &mut review)?;
    let answer = call.server.reviews()?.review(what, call.identity, call.namespace(), review).await?;
    call.value(StatusCode::CREATED, &answer)
}

/// get and list of component statuses: the store is all there is.
pub fn component_status(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let healthy = call.server.backend().store().revision() > 0;
    let one = |name: &str| {
        json!({ "metadata": { "name": name }, "conditions": [{ "type": "Healthy",
            "status": if healthy { "True" } else { "False" }, "message": "ok" }] })
    };
    let accepted = negotiate::negotiate(call.headers, true)?;
    if call.info.verb == "list" {
        let kind = codec::Kind { group: "", version: "v1", kind: "ComponentStatusList" };
        let list = json!({ "kind": kind.kind, "apiVersion": "v1", "metadata": {}, "items": [one("etcd-0")] });
        return call.format(StatusCode::OK, accepted, &list);
    }
    if call.info.name != "etcd-0" {
        return Err(call.not_found());
    }
    let mut object = one("etcd-0");
    object["kind"] = json!("ComponentStatus");
    object["apiVersion"] = json!("v1");
    call.format(StatusCode::OK, accepted, &object)
}
