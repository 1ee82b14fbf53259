//! What the cluster does not know, the host's own servers do: relay with a small cache.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::RData;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// How long one server may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Rounds over all servers.
const ROUNDS: usize = 2;
/// How often the file is looked at.
const RELOAD: Duration = Duration::from_secs(5);
/// Longest that an answer is kept, like k3s's CoreDNS.
const LONGEST: u32 = 30;
/// Answers kept.
const ENTRIES: usize = 1024;
/// resolv.conf(5): more are ignored.
const SERVERS: usize = 3;
const PORT: u16 = 53;

/// Asks the servers of a resolv.conf.
#[derive(Debug)]
pub struct Relay {
    file: PathBuf,
    /// Addresses of the responder itself: asking them would ask for ever.
    own: Vec<IpAddr>,
    servers: Mutex<Servers>,
    cache: Mutex<Cache>,
}

#[derive(Debug, Default)]
struct Servers {
    checked: Option<Instant>,
    modified: Option<SystemTime>,
    addresses: Vec<IpAddr>,
}

type Cache = HashMap<(Query, bool), Cached>;

#[derive(Debug)]
struct Cached {
    stored: Instant,
    seconds: u32,
    answer: Message,
}

impl Relay {
    /// `file` is read again when it changes; it need not exist.
    pub fn new(file: PathBuf, own: Vec<IpAddr>) -> Self {
        Self { file, own, servers: Mutex::default(), cache: Mutex::default() }
    }

    /// What the host's servers answer, with the query's id; `None` when none of them does.
    pub async fn ask(&self, query: &Message) -> Option<Message> {
        let question = query.queries.first()?;
        let key = (question.clone(), query.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok));
        if let Some(mut answer) = self.cached(&key) {
            answer.metadata.id = query.metadata.id;
            return Some(answer);
        }
        let servers = self.servers();
        for server in std::iter::repeat_n(&servers, ROUNDS).flatten() {
            match tokio::time::timeout(ANSWER_WITHIN, exchange(SocketAddr::new(*server, PORT), query)).await {
                Ok(Ok(answer)) if answer.metadata.response_code != ResponseCode::ServFail => {
                    self.store(key, &answer);
                    return Some(answer);
                }
                Ok(Ok(_)) => {}
                Ok(Err(error)) => tracing::debug!(%server, %error, "upstream DNS server failed"),
                Err(_) => tracing::debug!(%server, "upstream DNS server is silent"),
            }
        }
        None
    }

    fn cached(&self, key: &(Query, bool)) -> Option<Message> {
        let mut cache = self.cache.lock();
        let cached = cache.get(key)?;
        let age = u32::try_from(cached.stored.elapsed().as_secs()).unwrap_or(u32::MAX);
        if age >= cached.seconds {
            cache.remove(key);
            return None;
        }
        let mut answer = cached.answer.clone();
        for record in answer.answers.iter_mut().chain(&mut answer.authorities).chain(&mut answer.additionals) {
            record.decrement_ttl(age);
        }
        Some(answer)
    }

    fn store(&self, key: (Query, bool), answer: &Message) {
        let seconds = keep(answer);
        if seconds == 0 || answer.metadata.truncation {
            return;
        }
        let mut cache = self.cache.lock();
        if cache.len() >= ENTRIES {
            cache.retain(|_, cached| cached.stored.elapsed().as_secs() < u64::from(cached.seconds));
            if cache.len() >= ENTRIES {
                cache.clear();
            }
        }
        cache.insert(key, Cached { stored: Instant::now(), seconds, answer: answer.clone() });
    }

    fn servers(&self) -> Vec<IpAddr> {
        let mut servers = self.servers.lock();
        if servers.checked.is_none_or(|checked| checked.elapsed() >= RELOAD) {
            servers.checked = Some(Instant::now());
            let modified = std::fs::metadata(&self.file).and_then(|metadata| metadata.modified()).ok();
            if servers.modified != modified || modified.is_none() {
                servers.modified = modified;
                let text = std::fs::read_to_string(&self.file).unwrap_or_default();
                servers.addresses = parse(&text, &self.own);
            }
        }
        servers.addresses.clone()
    }
}

/// The servers that a resolv.conf names, without our own.
fn parse(text: &str, own: &[IpAddr]) -> Vec<IpAddr> {
    let lines = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let addresses = lines.filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok());
    addresses.filter(|ip| !own.contains(ip)).take(SERVERS).collect()
}

/// Seconds that an answer may be kept.
fn keep(answer: &Message) -> u32 {
    let least = answer.answers.iter().map(|record| record.ttl).min();
    let negative = answer.authorities.iter().find_map(|record| match &record.data {
        RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
        _ => None,
    });
    match answer.metadata.response_code {
        ResponseCode::NoError | ResponseCode::NXDomain => least.or(negative).unwrap_or(0).min(LONGEST),
        _ => 0,
    }
}

/// Asks one server, by TCP when its answer does not fit a datagram.
async fn exchange(server: SocketAddr, query: &Message) -> std::io::Result<Message> {
    let mut own = query.clone();
    // An id that the client cannot know, and a port that the kernel draws for each query.
    own.metadata.id = rand::random();
    own.metadata.recursion_desired = true;
    let bytes = own.to_vec().map_err(std::io::Error::other)?;
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).await?;
    socket.connect(server).await?;
    socket.send(&bytes).await?;
    let mut buffer = vec![0; 4096];
    let mut answer = loop {
        let length = socket.recv(&mut buffer).await?;
        // Anything that is no answer to this very question was not sent by the server that we asked.
        match Message::from_vec(buffer.get(..length).unwrap_or_default()) {
            Ok(answer) if answer.metadata.id == own.metadata.id && answer.queries == own.queries => break answer,
            _ => {}
        }
    };
    if answer.metadata.truncation {
        answer = exchange_stream(server, &bytes).await?;
    }
    answer.metadata.id = query.metadata.id;
    Ok(answer)
}

async fn exchange_stream(server: SocketAddr, query: &[u8]) -> std::io::Result<Message> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(query.len()).map_err(std::io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], query].concat()).await?;
    let mut bytes = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut bytes).await?;
    Message::from_vec(&bytes).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_and_what_is_no_address_are_not_asked() {
        let text = "# c\nsearch a b\nnameserver 10.43.0.10\nnameserver 9.9.9.9 \n nameserver fd00::1\nnameserver x\n";
        let own: Vec<IpAddr> = vec!["10.43.0.10".parse().unwrap()];
        assert_eq!(parse(text, &own), ["9.9.9.9".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    }
}
