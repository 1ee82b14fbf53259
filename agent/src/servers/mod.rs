//! The servers of the cluster as an agent uses them.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`list`] | where the servers are: configured, learnt, persisted at `DATA/agent/servers.json` |
//! | [`learn`] | follows the endpoints of `default/kubernetes` into the list |
//! | [`resolve`] | names of servers, without the C library |
//! | [`identity`] | the node's client certificate, swapped while connections live |
//! | [`dial`] | TLS to one server: the cluster's CA, any address |
//! | [`channel`] | one HTTP/2 connection to one server |
//! | [`pool`] | the API over whichever server is well |
//!
//! # Tasks
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | pool | which channel is used | with the agent | with the agent |
//! | learn | the list | with the agent | with the agent |
//! | link (`crate::link::dial`), one per server | its tunnel | when the server is known | when it is not |

pub mod channel;
pub mod dial;
pub mod identity;
pub mod learn;
pub mod list;
pub mod pool;
pub mod resolve;
#[cfg(test)]
pub(crate) mod testing;

pub use dial::{DialError, Dialer};
pub use identity::NodeIdentity;
pub use list::ServerList;
pub use pool::Pool;

/// What an agent needs to reach servers.
#[derive(Clone)]
pub struct Servers {
    /// Where they are.
    pub list: ServerList,
    /// How they are dialed.
    pub dialer: Dialer,
    /// Address (`host:port`) of the server of this process, which is not dialed.
    pub own: Option<String>,
}

/// An error with its causes.
pub(crate) fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}
