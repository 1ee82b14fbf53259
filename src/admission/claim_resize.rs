//! PersistentVolumeClaimResize: only bound claims of a class that allows it grow.

use super::{Request, World};
use crate::apiserver::status::Status;
use crate::controllers::quantity::units;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::Value;

const OLD_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

fn size(claim: &Value) -> i64 {
    let text = claim["spec"]["resources"]["requests"]["storage"].as_str().unwrap_or("0");
    units(&Quantity(text.to_owned()))
}

fn class(claim: &Value) -> &str {
    let old = claim["metadata"]["annotations"][OLD_CLASS].as_str();
    old.or_else(|| claim["spec"]["storageClassName"].as_str()).unwrap_or_default()
}

/// Refuses a growth that nobody could carry out.
pub fn validate(world: &World, request: &Request<'_>) -> Result<(), Status> {
    let Some(old) = request.old.filter(|_| request.is("", "persistentvolumeclaims") && request.updates()) else {
        return Ok(());
    };
    if size(request.object) <= size(old) {
        return Ok(());
    }
    if old["status"]["phase"] != "Bound" {
        return Err(request.forbidden("Only bound persistent volume claims can be expanded"));
    }
    let name = class(request.object);
    let found = match name {
        "" => None,
        name if name != class(old) => None,
        name => world.get::<Value>("storage.k8s.io", "storageclasses", "", name)?,
    };
    if found.is_some_and(|class| class["allowVolumeExpansion"] == true) {
        return Ok(());
    }
    Err(request.forbidden(
        "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize",
    ))
}
