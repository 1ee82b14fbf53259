//! Which nodes can be reached, and how. The own agent has a pipe; other agents dial us and stay connected.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use coracle_agent::NodeLink;
use coracle_agent::link::Tunnel;
use futures::FutureExt;
use parking_lot::RwLock;

use super::protocols::Handler;

/// The registry. Clones are one registry.
#[derive(Clone, Default)]
pub struct NodeLinks {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    nodes: RwLock<HashMap<String, Entry>>,
    next: AtomicU64,
}

struct Entry {
    link: NodeLink,
    /// Tells registrations of one name apart.
    number: u64,
}

impl NodeLinks {
    /// The way to a node.
    #[must_use]
    pub fn get(&self, node: &str) -> Option<NodeLink> {
        self.inner.nodes.read().get(node).map(|entry| entry.link.clone())
    }

    /// Names of the nodes that can be reached, in order.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.inner.nodes.read().keys().cloned().collect();
        names.sort();
        names
    }

    /// Registers a node for as long as the answer lives. The latest registration counts, except that nobody takes the
    /// place of the agent of this process. `None` for that one.
    #[must_use]
    pub fn register(&self, node: &str, link: NodeLink) -> Option<Registration> {
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let mut nodes = self.inner.nodes.write();
        if matches!(nodes.get(node), Some(Entry { link: NodeLink::Pipe(_), .. })) {
            return None;
        }
        nodes.insert(node.to_owned(), Entry { link, number });
        Some(Registration { links: self.clone(), node: node.to_owned(), number })
    }

    /// Takes over tunnels that agents dial: the client certificate says whose node it is.
    #[must_use]
    pub fn handler(&self) -> Handler {
        let links = self.clone();
        Arc::new(move |stream, peer, address| {
            let links = links.clone();
            async move {
                let Some(node) = peer.node_name() else {
                    return tracing::debug!(%address, user = peer.user.name, "only nodes have tunnels");
                };
                let (tunnel, connection) = match Tunnel::over(stream).await {
                    Ok(both) => both,
                    Err(error) => return tracing::debug!(%error, %address, node, "tunnel not made"),
                };
                let Some(_registration) = links.register(node, NodeLink::Tunnel(tunnel)) else {
                    return tracing::warn!(%address, node, "another machine uses the name of this server's own node");
                };
                tracing::debug!(%address, node, "tunnel stands");
                let left = peer.not_after.duration_since(SystemTime::now()).unwrap_or_default();
                tokio::select! {
                    ended = connection => if let Err(error) = ended {
                        tracing::debug!(%error, node, "tunnel ended");
                    },
                    // Agents renew long before and dial anew.
                    () = tokio::time::sleep(left) => tracing::debug!(node, "certificate of a tunnel has ended"),
                }
            }
            .boxed()
        })
    }
}

/// A node that can be reached until this is dropped.
pub struct Registration {
    links: NodeLinks,
    node: String,
    number: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let mut nodes = self.links.inner.nodes.write();
        // A later one may have taken the place.
        if nodes.get(&self.node).is_some_and(|entry| entry.number == self.number) {
            nodes.remove(&self.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tunnel() -> NodeLink {
        NodeLink::Tunnel(Tunnel::over(tokio::io::duplex(1024).0).await.unwrap().0)
    }

    #[tokio::test]
    async fn the_latest_tunnel_counts_and_an_old_ones_end_leaves_it_alone() {
        let links = NodeLinks::default();
        let first = links.register("a", tunnel().await).unwrap();
        let second = links.register("a", tunnel().await).unwrap();
        drop(first);
        assert_eq!(links.names(), ["a"]);
        drop(second);
        assert!(links.get("a").is_none());
    }

    #[tokio::test]
    async fn nobody_takes_the_place_of_the_own_agent() {
        let links = NodeLinks::default();
        let (pipe, _listener) = coracle_agent::node_link();
        let own = links.register("a", pipe).unwrap();
        assert!(links.register("a", tunnel().await).is_none());
        assert!(matches!(links.get("a"), Some(NodeLink::Pipe(_))));
        drop(own);
        assert!(links.get("a").is_none());
    }
}
