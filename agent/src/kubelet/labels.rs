//! Labels and annotations on sandboxes and containers: what an agent that has just started knows about them.
//! Names are upstream's.

/// Pod name.
pub const POD_NAME: &str = "io.kubernetes.pod.name";
/// Pod namespace.
pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// Pod uid.
pub const POD_UID: &str = "io.kubernetes.pod.uid";
/// Container name.
pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
/// [`super::containers::hash`] of the specification it was made from.
pub const HASH: &str = "io.kubernetes.container.hash";
/// Restarts before this container.
pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
/// File on the node that the container's `terminationMessagePath` is.
pub const TERMINATION_MESSAGE: &str = "coracle.dev/termination-message";
/// `terminationMessagePolicy`.
pub const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
/// `spec.terminationGracePeriodSeconds`.
pub const POD_GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
