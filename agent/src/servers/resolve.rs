//! Names of servers become addresses without the C library, whose static form cannot load NSS: `/etc/hosts`, then the
//! servers of a resolv.conf.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};

use crate::dns::relay::Relay;

/// `host:port` does not lead anywhere.
#[derive(Debug, thiserror::Error)]
pub enum ResolveError {
    /// Neither `host:port` nor `[v6]:port`.
    #[error("{0:?} is not of the form HOST:PORT")]
    Malformed(String),
    /// No address for the name.
    #[error("no address found for the name {0:?}")]
    Unknown(String),
}

/// Resolves `host:port`. Clones share one cache.
#[derive(Debug, Clone)]
pub struct Resolver {
    relay: Arc<Relay>,
    hosts: PathBuf,
}

impl Resolver {
    /// Asks the servers of `resolv_conf`, which need not exist.
    #[must_use]
    pub fn new(resolv_conf: PathBuf) -> Resolver {
        Resolver { relay: Arc::new(Relay::new(resolv_conf, Vec::new())), hosts: PathBuf::from("/etc/hosts") }
    }

    /// All addresses of `host:port`, the better ones first.
    ///
    /// # Errors
    /// When it has none.
    pub async fn resolve(&self, address: &str) -> Result<Vec<SocketAddr>, ResolveError> {
        let (host, port) = split(address)?;
        if let Ok(ip) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, port)]);
        }
        let mut ips = from_hosts(&self.hosts, host);
        if ips.is_empty() {
            let (four, six) = tokio::join!(self.ask(host, RecordType::A), self.ask(host, RecordType::AAAA));
            ips = [four, six].concat();
        }
        if ips.is_empty() {
            return Err(ResolveError::Unknown(host.to_owned()));
        }
        Ok(ips.into_iter().map(|ip| SocketAddr::new(ip, port)).collect())
    }

    async fn ask(&self, host: &str, kind: RecordType) -> Vec<IpAddr> {
        let Ok(mut name) = Name::from_utf8(host) else { return Vec::new() };
        name.set_fqdn(true);
        let mut question = Message::query();
        question.add_query(Query::query(name, kind));
        let Some(answer) = self.relay.ask(&question).await else { return Vec::new() };
        let address = |data: &RData| match data {
            RData::A(four) => Some(IpAddr::V4(four.0)),
            RData::AAAA(six) => Some(IpAddr::V6(six.0)),
            _ => None,
        };
        answer.answers.iter().filter_map(|record| address(&record.data)).collect()
    }
}

/// Host (without brackets) and port.
///
/// # Errors
/// When it is neither `host:port` nor `[v6]:port`.
pub fn split(address: &str) -> Result<(&str, u16), ResolveError> {
    let malformed = || ResolveError::Malformed(address.to_owned());
    let (host, port) = address.rsplit_once(':').ok_or_else(malformed)?;
    let port = port.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(malformed)?;
    let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(six)) => six,
        Some(None) => return Err(malformed()),
        None if host.is_empty() || host.contains(':') => return Err(malformed()),
        None => host,
    };
    Ok((host, port))
}

/// hosts(5): an address, then its names.
fn from_hosts(file: &Path, host: &str) -> Vec<IpAddr> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let found = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let ip = words.next()?.parse().ok()?;
        words.any(|name| name.eq_ignore_ascii_case(host)).then_some(ip)
    });
    found.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports_are_told_apart() {
        assert_eq!(split("a.b:6443").unwrap(), ("a.b", 6443));
        assert_eq!(split("[fd00::1]:1").unwrap(), ("fd00::1", 1));
        for bad in ["a", "a:0", "a:x", ":1", "fd00::1", "[fd00::1:1", "a:b:1"] {
            assert!(split(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn the_hosts_file_comes_before_the_network() {
        let dir = tempfile::tempdir().unwrap();
        let hosts = dir.path().join("hosts");
        std::fs::write(&hosts, "# x\n192.0.2.7 one Two # three\nfd00::7 two\n").unwrap();
        let resolver = Resolver { hosts, ..Resolver::new(dir.path().join("none")) };
        let found = resolver.resolve("two:1").await.unwrap();
        assert_eq!(found, ["192.0.2.7:1".parse::<SocketAddr>().unwrap(), "[fd00::7]:1".parse().unwrap()]);
        assert_eq!(resolver.resolve("192.0.2.1:5").await.unwrap().len(), 1);
        assert!(matches!(resolver.resolve("three:1").await, Err(ResolveError::Unknown(_))));
    }
}
