//! In-process clients: every loop under its own user, with RBAC and audit as for anyone.

use std::sync::Arc;

use crate::apiserver::{ApiServer, client};
use crate::auth::Identity;

/// What the names of controllers begin with.
const CONTROLLERS: &str = "system:serviceaccount:kube-system:";

/// A client for a user name.
pub type ClientFor = Arc<dyn Fn(&str) -> kube::Client + Send + Sync>;

/// Clients of this API by user name.
pub fn client_for(api: &ApiServer) -> ClientFor {
    let api = api.clone();
    Arc::new(move |user| {
        let identity = match user.strip_prefix(CONTROLLERS) {
            Some(controller) => Identity::controller(controller),
            None => Identity::in_process(user, &[]),
        };
        client(&api, identity)
    })
}
