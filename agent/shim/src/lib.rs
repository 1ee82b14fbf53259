//! What the agent and a pod's shim say to each other.
//!
//! One shim per pod: it makes the pod's namespaces, parents and reaps its processes, writes their logs, and outlives
//! the agent. The agent finds it again by its socket `<pod folder>/shim.sock`.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`protocol`] | requests, replies and events: JSON lines over the socket, descriptors beside them |
//! | [`wire`] | sending and receiving such lines together with file descriptors (SCM_RIGHTS) |
//! | `main` | the shim program: `pod` (namespaces), `server` (the one loop), `container`, `exec`, `log` |
//! | `hello` | the program of the built-in image |

pub mod protocol;
pub mod wire;
