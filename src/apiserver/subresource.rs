//! Subresources: what lies below an object's path.

use super::body::Body;
use super::call::Call;
use super::resources::SubresourceKind;
use super::status::Status;
use super::{patch, read, write};
use http::Response;

/// Sends a request below an object to what the subresource does.
pub async fn dispatch(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let Some(subresource) = call.subresource else { return Err(Status::no_such_resource()) };
    match (subresource.does, call.info.verb) {
        (
            SubresourceKind::Status
            | SubresourceKind::Approval
            | SubresourceKind::EphemeralContainers
            | SubresourceKind::Resize,
            verb,
        ) => match verb {
            "get" => read::get(call).await,
            "update" => write::update(call, body).await,
            "patch" => patch::patch(call, body).await,
            _ => Err(Status::method_not_allowed()),
        },
        (SubresourceKind::Finalize, "update") => write::update(call, body).await,
        _ => Err(Status::no_such_resource()),
    }
}
