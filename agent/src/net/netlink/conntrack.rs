//! Connection tracking entries over ctnetlink: list and delete.

use std::net::IpAddr;

use super::message::{ACK, Batch, DUMP, Writer, attribute};
use super::route::octets;
use super::{NetlinkError, Socket};

const IPCTNL_MSG_CT_GET: u16 = 0x101;
const IPCTNL_MSG_CT_DELETE: u16 = 0x102;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_ID: u16 = 12;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Number of the transport protocol.
    pub protocol: u8,
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
}

/// A tracked flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// As the first packet was sent.
    pub original: Tuple,
    /// As answers come: its source is where the flow was sent to.
    pub reply: Tuple,
    id: Vec<u8>,
}

fn header(message: &mut Writer<'_>, ip: IpAddr) {
    let family = if ip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    message.raw(&[family as u8, 0, 0, 0]);
}

impl Socket {
    /// Flows of one family and transport protocol.
    pub fn flows(&mut self, any: IpAddr, protocol: u8) -> Result<Vec<Flow>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("list connections", &[], IPCTNL_MSG_CT_GET, DUMP, |message| header(message, any));
        let mut found = Vec::new();
        self.dump(&mut batch, |_, payload| {
            found.extend(flow(payload).filter(|flow| flow.original.protocol == protocol));
        })?;
        Ok(found)
    }

    /// Forgets flows; the next packet of one is looked at as a new one.
    pub fn delete_flows<'a>(&mut self, flows: impl Iterator<Item = &'a Flow>) -> Result<(), NetlinkError> {
        let mut batch = Batch::new();
        for flow in flows {
            batch.push("delete a connection", &[libc::ENOENT], IPCTNL_MSG_CT_DELETE, ACK, |message| {
                header(message, flow.original.source);
                message.nest(CTA_TUPLE_ORIG, |tuple| write_tuple(tuple, &flow.original));
                message.attr(CTA_ID, &flow.id);
            });
        }
        self.apply(&mut batch)
    }
}

fn write_tuple(message: &mut Writer<'_>, tuple: &Tuple) {
    let (source, destination) =
        if tuple.source.is_ipv4() { (CTA_IP_V4_SRC, CTA_IP_V4_DST) } else { (CTA_IP_V6_SRC, CTA_IP_V6_DST) };
    message.nest(CTA_TUPLE_IP, |ip| {
        ip.attr(source, &octets(tuple.source));
        ip.attr(destination, &octets(tuple.destination));
    });
    message.nest(CTA_TUPLE_PROTO, |proto| {
        proto.attr(CTA_PROTO_NUM, &[tuple.protocol]);
        proto.attr(CTA_PROTO_SRC_PORT, &tuple.source_port.to_be_bytes());
        proto.attr(CTA_PROTO_DST_PORT, &tuple.destination_port.to_be_bytes());
    });
}

fn flow(payload: &[u8]) -> Option<Flow> {
    let attributes = payload.get(4..)?;
    Some(Flow {
        original: tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?,
        reply: tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?,
        id: attribute(attributes, CTA_ID)?.to_vec(),
    })
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (attribute(bytes, CTA_TUPLE_IP)?, attribute(bytes, CTA_TUPLE_PROTO)?);
    let port = |kind| attribute(proto, kind).and_then(|bytes| bytes.try_into().ok()).map_or(0, u16::from_be_bytes);
    let address = |v4, v6| {
        let four = attribute(ip, v4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(IpAddr::from);
        four.or_else(|| attribute(ip, v6).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from))
    };
    Some(Tuple {
        source: address(CTA_IP_V4_SRC, CTA_IP_V6_SRC)?,
        destination: address(CTA_IP_V4_DST, CTA_IP_V6_DST)?,
        protocol: *attribute(proto, CTA_PROTO_NUM)?.first()?,
        source_port: port(CTA_PROTO_SRC_PORT),
        destination_port: port(CTA_PROTO_DST_PORT),
    })
}
