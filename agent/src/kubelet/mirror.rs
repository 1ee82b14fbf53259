//! Mirror pods: how the API sees static pods. Nobody changes a static pod through the API; its mirror only shows it.

use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

use super::api::{ApiClient, ApiError};
use super::{containers, report};

const HASH: &str = "kubernetes.io/config.hash";
const MIRROR: &str = "kubernetes.io/config.mirror";

fn path(pod: &Pod) -> String {
    format!("/api/v1/namespaces/{}/pods/{}", containers::namespace(pod), containers::name(pod))
}

/// Shows `pod` with `status`: makes the mirror, replaces one of another version, writes the status.
///
/// # Errors
/// When the API does not answer or refuses.
pub async fn show(api: &ApiClient, node: &str, pod: &Pod, status: &PodStatus) -> Result<(), ApiError> {
    let existing: Option<Pod> = match api.get(&path(pod)).await {
        Ok(existing) => Some(existing),
        Err(error) if error.is_not_found() => None,
        Err(error) => return Err(error),
    };
    let hash = containers::annotation(pod, HASH);
    let mirror = match existing {
        Some(mirror)
            if containers::annotation(&mirror, MIRROR) == hash && mirror.metadata.deletion_timestamp.is_none() =>
        {
            mirror
        }
        Some(other) => {
            remove(api, &other).await?;
            create(api, node, pod).await?
        }
        None => create(api, node, pod).await?,
    };
    let old = mirror.status.clone().unwrap_or_default();
    report::write(api, &mirror, &old, status).await.map(|_| ())
}

async fn create(api: &ApiClient, node: &str, pod: &Pod) -> Result<Pod, ApiError> {
    let owner: Node = api.get(&format!("/api/v1/nodes/{node}")).await?;
    let mut mirror = pod.clone();
    mirror.status = None;
    let meta = &mut mirror.metadata;
    meta.uid = None;
    let hash = containers::annotation(pod, HASH).unwrap_or_default().to_owned();
    meta.annotations.get_or_insert_default().insert(MIRROR.to_owned(), hash);
    meta.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.to_owned(),
        uid: owner.metadata.uid.unwrap_or_default(),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    api.create(&format!("/api/v1/namespaces/{}/pods", containers::namespace(pod)), &mirror).await
}

/// The static pod is gone, or another one.
///
/// # Errors
/// When the API does not answer or refuses; a mirror that is gone already is no error.
pub async fn remove(api: &ApiClient, pod: &Pod) -> Result<(), ApiError> {
    let mirror: Pod = match api.get(&path(pod)).await {
        Ok(mirror) => mirror,
        Err(error) if error.is_not_found() => return Ok(()),
        Err(error) => return Err(error),
    };
    if containers::annotation(&mirror, MIRROR).is_none() {
        // A pod of that name which is no mirror belongs to somebody else.
        return Ok(());
    }
    match api.delete_now(&path(pod), containers::uid(&mirror)).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}
