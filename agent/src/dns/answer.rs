//! Messages: a query in, an answer or the wish to ask upstream out. Pure.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use hickory_proto::serialize::binary::{BinEncodable, BinEncoder};

use super::index::{Answer, Data, Index, Kind};

/// Seconds that a cluster record may be kept.
const TTL: u32 = 5;
/// What we take by UDP, and the most that we send: fits every link without fragments (DNS flag day 2020).
const PAYLOAD: u16 = 1232;
/// Without EDNS (RFC 1035).
const SMALLEST: u16 = 512;
/// Aliases that are followed within the cluster.
const ALIASES: usize = 8;

/// What to do with a query.
#[derive(Debug)]
pub enum Reply {
    /// Send this.
    Done(Box<Message>),
    /// Nobody here knows: ask upstream what was asked.
    Upstream,
    /// Send this after adding what upstream knows about the alias's target.
    Chase(Box<Message>, Name),
    /// Not a query: answer nothing.
    Silence,
}

/// Decides on a query. `ready` is false until the cluster's objects were listed once.
pub fn decide(query: &Message, index: &Index, ready: bool) -> Reply {
    if query.metadata.message_type != MessageType::Query {
        return Reply::Silence;
    }
    if query.metadata.op_code != OpCode::Query {
        return Reply::Done(Box::new(failure(query, ResponseCode::NotImp)));
    }
    let [question] = query.queries.as_slice() else {
        return Reply::Done(Box::new(failure(query, ResponseCode::FormErr)));
    };
    if query.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return Reply::Done(Box::new(failure(query, ResponseCode::BADVERS)));
    }
    if question.query_class() != DNSClass::IN || matches!(question.query_type(), RecordType::AXFR | RecordType::IXFR) {
        return Reply::Done(Box::new(failure(query, ResponseCode::Refused)));
    }
    let labels = labels(question.name());
    if index.is_ours(&labels) {
        if !ready {
            return Reply::Done(Box::new(failure(query, ResponseCode::ServFail)));
        }
        return within(query, labels, index);
    }
    match reverse(question.name()).and_then(|ip| index.names_of(ip)) {
        Some(names) => Reply::Done(Box::new(pointers(query, names, index))),
        None => Reply::Upstream,
    }
}

/// Lower-case labels, leftmost first.
fn labels(name: &Name) -> Vec<String> {
    name.iter().map(|label| String::from_utf8_lossy(label).to_ascii_lowercase()).collect()
}

/// The address whose PTR name this is.
fn reverse(name: &Name) -> Option<IpAddr> {
    let net = name.parse_arpa_name().ok()?;
    (net.prefix_len() == net.max_prefix_len()).then(|| net.addr())
}

fn kind(record_type: RecordType) -> Kind {
    match record_type {
        RecordType::A => Kind::A,
        RecordType::AAAA => Kind::Aaaa,
        RecordType::SRV => Kind::Srv,
        RecordType::PTR => Kind::Ptr,
        RecordType::TXT => Kind::Txt,
        RecordType::NS => Kind::Ns,
        _ => Kind::Other,
    }
}

/// An answer without records.
fn empty(query: &Message, code: ResponseCode) -> Message {
    let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
    answer.metadata = Metadata::response_from_request(&query.metadata);
    answer.metadata.response_code = code;
    answer.metadata.recursion_available = true;
    answer.queries.clone_from(&query.queries);
    if query.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(PAYLOAD);
        answer.edns = Some(edns);
    }
    answer
}

/// An answer that only tells what is wrong.
pub fn failure(query: &Message, code: ResponseCode) -> Message {
    empty(query, code)
}

/// Answers for a name below the cluster's domain.
fn within(query: &Message, mut labels: Vec<String>, index: &Index) -> Reply {
    let Some(question) = query.queries.first() else { return Reply::Silence };
    let mut answer = empty(query, ResponseCode::NoError);
    answer.metadata.authoritative = true;
    let mut owner = question.name().clone();
    for _ in 0..ALIASES {
        match index.lookup(&labels, kind(question.query_type())) {
            Answer::NoName => {
                // After an alias the first name does exist.
                if answer.answers.is_empty() {
                    answer.metadata.response_code = ResponseCode::NXDomain;
                }
                return Reply::Done(Box::new(with_authority(answer, index)));
            }
            Answer::Data(data) => {
                add(&mut answer, &owner, &data);
                return Reply::Done(Box::new(with_authority(answer, index)));
            }
            Answer::Alias(target) => {
                let Ok(target) = name(&target) else { break };
                let record = Record::from_rdata(owner, TTL, RData::CNAME(CNAME(target.clone())));
                answer.add_answer(record);
                if question.query_type() == RecordType::CNAME {
                    return Reply::Done(Box::new(answer));
                }
                labels = self::labels(&target);
                if !index.is_ours(&labels) {
                    return Reply::Chase(Box::new(answer), target);
                }
                owner = target;
            }
        }
    }
    Reply::Done(Box::new(failure(query, ResponseCode::ServFail)))
}

fn add(answer: &mut Message, owner: &Name, data: &[Data]) {
    let mut seen = std::collections::BTreeSet::new();
    for item in data {
        let record = match item {
            Data::Address(ip) => Some(address(*ip)),
            Data::Pointer(target) => name(target).ok().map(|target| RData::PTR(PTR(target))),
            Data::NameServer(target) => name(target).ok().map(|target| RData::NS(NS(target))),
            Data::Text(text) => Some(RData::TXT(TXT::new(vec![text.clone()]))),
            Data::Server { port, weight, target, addresses } => name(target).ok().map(|target| {
                if seen.insert(target.clone()) {
                    for ip in addresses {
                        answer.add_additional(Record::from_rdata(target.clone(), TTL, address(*ip)));
                    }
                }
                RData::SRV(SRV::new(0, *weight, *port, target))
            }),
        };
        if let Some(record) = record {
            answer.add_answer(Record::from_rdata(owner.clone(), TTL, record));
        }
    }
    // Clients that take the first address share the load.
    let length = answer.answers.len();
    if length > 1 {
        answer.answers.rotate_left(rand::random_range(0..length));
    }
}

fn address(ip: IpAddr) -> RData {
    match ip {
        IpAddr::V4(ip) => RData::A(A(ip)),
        IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
    }
}

/// An answer without data tells how long that may be believed (RFC 2308).
fn with_authority(mut answer: Message, index: &Index) -> Message {
    let asks_soa = answer.queries.first().is_some_and(|question| question.query_type() == RecordType::SOA);
    let apex = answer.queries.first().is_some_and(|question| labels(question.name()) == labels_of(&index.domain()));
    if answer.answers.is_empty()
        && let Some(record) = authority(index)
    {
        if asks_soa && apex {
            answer.add_answer(record);
        } else {
            answer.add_authority(record);
        }
    }
    answer
}

fn labels_of(domain: &str) -> Vec<String> {
    domain.split('.').map(str::to_owned).collect()
}

fn authority(index: &Index) -> Option<Record> {
    let domain = index.domain();
    let zone = name(&domain).ok()?;
    let server = name(&format!("ns.dns.{domain}")).ok()?;
    let person = name(&format!("hostmaster.{domain}")).ok()?;
    let serial =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs() as u32);
    Some(Record::from_rdata(zone, TTL, RData::SOA(SOA::new(server, person, serial, 7200, 1800, 86400, TTL))))
}

fn pointers(query: &Message, names: Vec<String>, index: &Index) -> Message {
    let mut answer = empty(query, ResponseCode::NoError);
    answer.metadata.authoritative = true;
    if let Some(question) = query.queries.first()
        && matches!(question.query_type(), RecordType::PTR | RecordType::ANY)
    {
        let data: Vec<Data> = names.into_iter().map(Data::Pointer).collect();
        add(&mut answer, question.name(), &data);
    }
    with_authority(answer, index)
}

fn name(text: &str) -> Result<Name, hickory_proto::ProtoError> {
    let mut name = Name::from_ascii(text)?;
    name.set_fqdn(true);
    Ok(name)
}

/// Bytes to send by TCP (`limit` of 65535) or by UDP to a client that announced `limit`.
pub fn encode(answer: &Message, limit: u16) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(512);
    let mut encoder = BinEncoder::new(&mut bytes);
    encoder.set_max_size(limit);
    answer.emit(&mut encoder).ok()?;
    Some(bytes)
}

/// Bytes that a client takes by UDP.
pub fn udp_limit(query: &Message) -> u16 {
    query.edns.as_ref().map_or(SMALLEST, |edns| edns.max_payload().clamp(SMALLEST, PAYLOAD))
}

#[cfg(test)]
mod tests {
    use super::super::index::{Service, Slice};
    use super::*;
    use hickory_proto::op::Query;

    fn index() -> Index {
        let mut index = Index::new("cluster.local", Vec::new());
        index.set_namespace("n", true);
        let service = |ips: &[&str], external: Option<&str>| Service {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            external_name: external.map(str::to_owned),
            ports: Vec::new(),
        };
        let key = |name: &str| ("n".to_owned(), name.to_owned());
        index.set_service(&key("web"), Some(service(&["10.43.0.5"], None)));
        index.set_service(&key("in"), Some(service(&[], Some("web.n.svc.cluster.local"))));
        index.set_service(&key("out"), Some(service(&[], Some("example.org"))));
        index.set_service(&key("loop"), Some(service(&[], Some("loop.n.svc.cluster.local"))));
        index.set_service(&key("many"), Some(service(&[], None)));
        let endpoints = (0..100).map(|n| (format!("h{n}"), vec![IpAddr::from([10, 42, 0, n])])).collect();
        index.set_slice(&key("many-1"), Some(Slice { service: "many".into(), endpoints, ports: Vec::new() }));
        index
    }

    fn query(text: &str, record_type: RecordType) -> Message {
        let mut message = Message::query();
        message.add_query(Query::query(Name::from_ascii(text).unwrap(), record_type));
        message
    }

    fn done(text: &str, record_type: RecordType) -> Message {
        match decide(&query(text, record_type), &index(), true) {
            Reply::Done(answer) => *answer,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_question_comes_back_as_it_was_spelled_and_negative_answers_carry_the_authority() {
        let answer = done("WEB.n.svc.cluster.LOCAL.", RecordType::A);
        assert_eq!(answer.answers[0].name.to_ascii(), "WEB.n.svc.cluster.LOCAL.");
        assert!(answer.metadata.authoritative && answer.authorities.is_empty());
        let answer = done("web.n.svc.cluster.local.", RecordType::AAAA);
        assert_eq!((answer.metadata.response_code, answer.authorities.len()), (ResponseCode::NoError, 1));
        let answer = done("absent.n.svc.cluster.local.", RecordType::AAAA);
        assert_eq!((answer.metadata.response_code, answer.authorities.len()), (ResponseCode::NXDomain, 1));
    }

    #[test]
    fn aliases_are_followed_inside_chased_outside_and_loops_end() {
        let answer = done("in.n.svc.cluster.local.", RecordType::A);
        assert_eq!(answer.answers.len(), 2);
        assert!(matches!(
            decide(&query("out.n.svc.cluster.local.", RecordType::A), &index(), true),
            Reply::Chase(_, target) if target.to_ascii() == "example.org."
        ));
        assert_eq!(done("loop.n.svc.cluster.local.", RecordType::A).metadata.response_code, ResponseCode::ServFail);
    }

    #[test]
    fn what_does_not_fit_is_cut_and_says_so() {
        let answer = done("many.n.svc.cluster.local.", RecordType::A);
        assert_eq!(answer.answers.len(), 100);
        let bytes = encode(&answer, 512).unwrap();
        assert!(bytes.len() <= 512);
        assert!(Message::from_vec(&bytes).unwrap().metadata.truncation);
        let whole = Message::from_vec(&encode(&answer, u16::MAX).unwrap()).unwrap();
        assert_eq!((whole.metadata.truncation, whole.answers.len()), (false, 100));
    }

    #[test]
    fn names_of_others_go_upstream_and_pointers_of_ours_do_not() {
        assert!(matches!(decide(&query("example.org.", RecordType::A), &index(), true), Reply::Upstream));
        let unknown = query("9.9.9.9.in-addr.arpa.", RecordType::PTR);
        assert!(matches!(decide(&unknown, &index(), true), Reply::Upstream));
        let answer = done("5.0.43.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(answer.answers[0].data.to_string(), "web.n.svc.cluster.local.");
    }

    #[test]
    fn before_the_first_list_the_cluster_domain_is_not_denied() {
        let Reply::Done(answer) = decide(&query("web.n.svc.cluster.local.", RecordType::A), &index(), false) else {
            panic!()
        };
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }

    #[test]
    fn odd_messages_get_the_code_that_their_rfc_says() {
        let mut two = query("a.", RecordType::A);
        two.add_query(Query::query(Name::root(), RecordType::A));
        let mut update = query("a.", RecordType::A);
        update.metadata.op_code = OpCode::Update;
        for (message, code) in [
            (two, ResponseCode::FormErr),
            (update, ResponseCode::NotImp),
            (query("cluster.local.", RecordType::AXFR), ResponseCode::Refused),
        ] {
            let Reply::Done(answer) = decide(&message, &index(), true) else { panic!() };
            assert_eq!(answer.metadata.response_code, code);
        }
        let mut response = query("a.", RecordType::A);
        response.metadata.message_type = MessageType::Response;
        assert!(matches!(decide(&response, &index(), true), Reply::Silence));
    }
}
