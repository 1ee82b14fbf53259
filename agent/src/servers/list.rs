//! Where the servers of the cluster are.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::files;

/// Addresses that left the cluster's list and are still tried, last: an agent that was away while every server moved
/// finds the way back when one of them is where it once was.
const FORMER: usize = 8;

/// What is known, as it is kept on disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Known {
    /// `host:port` of the servers that the cluster names.
    servers: Vec<String>,
    /// Those of before, the latest first.
    former: Vec<String>,
}

impl Known {
    /// Takes over a list; the old one's addresses become former ones.
    fn learn(&self, servers: &[String]) -> Known {
        let now: BTreeSet<&String> = servers.iter().collect();
        let old = self.servers.iter().chain(&self.former).filter(|address| !now.contains(address));
        let mut former: Vec<String> = Vec::new();
        for address in old {
            if !former.contains(address) && former.len() < FORMER {
                former.push(address.clone());
            }
        }
        Known { servers: servers.to_vec(), former }
    }
}

/// The list. Clones are one list; the last one learnt survives restarts.
#[derive(Debug, Clone)]
pub struct ServerList {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// From the command line.
    configured: Option<String>,
    file: PathBuf,
    known: watch::Sender<Known>,
}

impl ServerList {
    /// The list kept in `agent_dir`; a damaged or missing file is an empty list.
    #[must_use]
    pub fn open(agent_dir: &Path, configured: Option<String>) -> ServerList {
        let file = agent_dir.join("servers.json");
        let known = match std::fs::read(&file).map(|bytes| serde_json::from_slice::<Known>(&bytes)) {
            Ok(Ok(known)) => known,
            Ok(Err(error)) => {
                tracing::warn!(%error, path = %file.display(), "the kept list of servers is damaged");
                Known::default()
            }
            Err(_) => Known::default(),
        };
        ServerList { inner: Arc::new(Inner { configured, file, known: watch::Sender::new(known) }) }
    }

    /// The servers that the cluster names; the configured one as long as nothing was learnt.
    #[must_use]
    pub fn current(&self) -> Vec<String> {
        let known = self.inner.known.borrow();
        if known.servers.is_empty() { self.inner.configured.iter().cloned().collect() } else { known.servers.clone() }
    }

    /// Addresses to try when none of [`ServerList::current`] answers: the configured one, then former ones.
    #[must_use]
    pub fn fallbacks(&self) -> Vec<String> {
        let known = self.inner.known.borrow();
        let others = self.inner.configured.iter().chain(&known.former);
        let mut fallbacks: Vec<String> = Vec::new();
        for address in others.filter(|address| !known.servers.contains(address)) {
            if !fallbacks.contains(address) {
                fallbacks.push(address.clone());
            }
        }
        fallbacks
    }

    /// Takes over what the cluster says and writes it down. An empty list says nothing: there is a server, it told us.
    pub fn learn(&self, mut servers: Vec<String>) {
        servers.sort();
        servers.dedup();
        if servers.is_empty() || self.inner.known.borrow().servers == servers {
            return;
        }
        let known = self.inner.known.borrow().learn(&servers);
        let written = serde_json::to_vec_pretty(&known)
            .map_err(std::io::Error::other)
            .and_then(|bytes| files::write_durably(&self.inner.file, &bytes, 0o600));
        if let Err(error) = written {
            tracing::warn!(%error, path = %self.inner.file.display(), "list of servers not kept");
        }
        tracing::info!(?servers, "servers of the cluster");
        self.inner.known.send_replace(known);
    }

    /// Waits for changes.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes(self.inner.known.subscribe())
    }
}

/// Tells of changes of the list.
pub struct Changes(watch::Receiver<Known>);

impl Changes {
    /// The list has changed since the last call; never ends while the list lives.
    pub async fn next(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn what_was_learnt_survives_and_former_servers_are_tried_last() {
        let dir = tempfile::tempdir().unwrap();
        let list = ServerList::open(dir.path(), Some("lb:6443".to_owned()));
        assert_eq!(list.current(), ["lb:6443"]);
        list.learn(texts(&["b:1", "a:1"]));
        list.learn(texts(&["c:1", "b:1"]));
        list.learn(Vec::new());
        let again = ServerList::open(dir.path(), Some("lb:6443".to_owned()));
        assert_eq!(again.current(), ["b:1", "c:1"]);
        assert_eq!(again.fallbacks(), ["lb:6443", "a:1"]);
        again.learn(texts(&["a:1"]));
        assert_eq!(again.fallbacks(), ["lb:6443", "b:1", "c:1"]);
    }

    #[test]
    fn former_servers_are_bounded() {
        let mut known = Known::default();
        for number in 0..30 {
            known = known.learn(&[format!("s{number}:1")]);
        }
        assert_eq!((known.former.len(), known.former[0].as_str()), (FORMER, "s28:1"));
    }

    #[test]
    fn a_damaged_file_is_an_empty_list() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("servers.json"), b"{").unwrap();
        assert_eq!(ServerList::open(dir.path(), None).current(), Vec::<String>::new());
    }
}
