//! Claims bound to volumes that lie on this node: hostPath and local.

use std::path::PathBuf;

use k8s_openapi::api::core::v1::{HostPathVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod};

use super::VolumeError;
use super::host_path;
use crate::kubelet::containers;
use crate::kubelet::reads::Reads;

/// Where a claim's data lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Folder on the node.
    pub path: PathBuf,
    /// The volume may only be read.
    pub read_only: bool,
}

/// Follows `claim` to its volume.
///
/// # Errors
/// When it is not bound, belongs to another pod, or its volume is of a kind the node cannot mount.
pub async fn resolve(reads: &Reads, pod: &Pod, claim: &str, read_only: bool) -> Result<Found, VolumeError> {
    let namespace = containers::namespace(pod);
    let path = format!("/api/v1/namespaces/{namespace}/persistentvolumeclaims/{claim}");
    let object: PersistentVolumeClaim = match reads.get(&path).await {
        Ok(object) => object,
        Err(error) if error.is_not_found() => {
            return Err(VolumeError::NotFound { kind: "persistentvolumeclaim", name: claim.to_owned() });
        }
        Err(error) => return Err(error.into()),
    };
    if object.metadata.deletion_timestamp.is_some() {
        return Err(VolumeError::Invalid("PVC is being deleted".to_owned()));
    }
    let bound = object.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Bound");
    let name = object.spec.as_ref().and_then(|spec| spec.volume_name.clone()).filter(|_| bound);
    let Some(name) = name else { return Err(VolumeError::Invalid("PVC is not bound".to_owned())) };
    let volume: PersistentVolume = reads.get(&format!("/api/v1/persistentvolumes/{name}")).await?;
    let spec = volume.spec.unwrap_or_default();
    let claim_uid = spec.claim_ref.as_ref().and_then(|reference| reference.uid.clone());
    if claim_uid.is_some() && claim_uid != object.metadata.uid {
        return Err(VolumeError::Invalid(format!("PV {name} is bound to another claim")));
    }
    if let Some(source) = &spec.host_path {
        host_path::set_up(source)?;
        return Ok(Found { path: PathBuf::from(&source.path), read_only });
    }
    if let Some(source) = &spec.local {
        let check = HostPathVolumeSource { path: source.path.clone(), type_: Some("Directory".to_owned()) };
        host_path::set_up(&check)?;
        return Ok(Found { path: PathBuf::from(&source.path), read_only });
    }
    Err(VolumeError::Unsupported(format!("the kind of persistent volume {name:?}")))
}
