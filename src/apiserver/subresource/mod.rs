//! Subresources: what lies below an object's path.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`scale`] | `autoscaling/v1` Scale over `spec.replicas` |
//! | [`binding`] | a pod's node |
//! | [`eviction`] | deletion of a pod within its disruption budget |
//! | [`connect`] | log, exec, attach and portforward: requests that go on to a node |
//! | [`proxy`] | HTTP to nodes, pods and Services |

pub mod binding;
pub mod connect;
pub mod eviction;
pub mod log_socket;
pub mod proxy;
pub mod scale;

use super::body::Body;
use super::call::Call;
use super::codec::{self, BodyFormat, Kind};
use super::options::WriteOptions;
use super::resources::SubresourceKind;
use super::status::Status;
use super::{patch, read, write};
use http::{Response, StatusCode};
use serde_json::{Value, json};

/// Sends a request below an object to what the subresource does.
pub async fn dispatch(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    use SubresourceKind as S;
    let Some(subresource) = call.subresource else { return Err(Status::no_such_resource()) };
    match (subresource.does, call.info.verb) {
        (S::Status | S::Approval | S::EphemeralContainers | S::Resize, "get") => read::get(call).await,
        (S::Status | S::Approval | S::EphemeralContainers | S::Resize | S::Finalize, "update") => {
            write::update(call, body).await
        }
        (S::Status | S::Approval | S::EphemeralContainers | S::Resize, "patch") => patch::patch(call, body).await,
        (S::Scale, "get") => scale::get(call).await,
        (S::Scale, "update") => scale::update(call, body).await,
        (S::Scale, "patch") => scale::patch(call, body).await,
        (S::Binding, "create") => binding::create(call, &call.info.name, body).await,
        (S::Eviction, "create") => eviction::create(call, body).await,
        (S::Token, "create") => token(call, body).await,
        _ => Err(Status::method_not_allowed()),
    }
}

/// Whether a subresource is a connection to somewhere else rather than a view of the object.
pub fn connects(does: SubresourceKind) -> bool {
    use SubresourceKind as S;
    matches!(does, S::Log | S::Exec | S::Attach | S::PortForward | S::Proxy)
}

/// Decodes the body of a subresource that is of another kind than its parent.
pub async fn read_body(call: &Call<'_>, kind: Kind<'_>, body: Body, options: &WriteOptions) -> Result<Value, Status> {
    let format = BodyFormat::of(call.headers)?;
    let bytes = body.collect(codec::BODY_MAX).await?;
    let decoded = codec::decode(kind, &bytes, format, options.field_validation)?;
    call.warn(decoded.warnings);
    let mut value = decoded.value;
    codec::default(kind, &mut value);
    Ok(value)
}

/// The answer of a create that leaves nothing to show.
pub fn success(call: &Call<'_>) -> Result<Response<Body>, Status> {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201 });
    call.value(StatusCode::CREATED, &status)
}

/// `serviceaccounts/token`: a TokenRequest.
async fn token(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let options = WriteOptions::new(call.query, "CreateOptions", false)?;
    let kind = Kind { group: "authentication.k8s.io", version: "v1", kind: "TokenRequest" };
    let request = read_body(call, kind, body, &options).await?;
    let (namespace, name) = (call.namespace(), call.info.name.as_str());
    let answer = call.server.reviews()?.token(call.identity, namespace, name, request, options.dry_run).await?;
    call.value(StatusCode::CREATED, &answer)
}
