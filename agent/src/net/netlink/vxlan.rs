//! VXLAN links (RFC 7348), as the overlay uses them: nothing is learnt, everything is said.

use std::net::IpAddr;

use super::message::{ACK, Batch, CREATE, EXCL, attribute, text, u32_at};
use super::route::{
    IFF_UP, IFLA_ADDRESS, IFLA_IFALIAS, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MTU, Mac,
    RTM_GETLINK, RTM_NEWLINK, ip, link_header, octets,
};
use super::{NetlinkError, Socket};

const KIND: &str = "vxlan";
const IFLA_VXLAN_ID: u16 = 1;
const IFLA_VXLAN_LOCAL: u16 = 4;
const IFLA_VXLAN_LEARNING: u16 = 7;
const IFLA_VXLAN_PORT: u16 = 15;
const IFLA_VXLAN_LOCAL6: u16 = 17;

/// What cannot be changed of a link once it exists, and its MTU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// Name.
    pub name: String,
    /// Free text, shown by `ip link`.
    pub alias: String,
    /// Hardware address.
    pub mac: Mac,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port on every machine.
    pub port: u16,
    /// This machine's address on the network underneath.
    pub local: IpAddr,
    /// MTU in bytes.
    pub mtu: u32,
}

impl Batch {
    /// Makes a VXLAN link.
    pub fn add_vxlan(&mut self, link: &Vxlan) {
        self.push("create the VXLAN link", &[], RTM_NEWLINK, CREATE | EXCL | ACK, |message| {
            link_header(message, 0, 0, 0);
            message.attr_str(IFLA_IFNAME, &link.name);
            message.attr(IFLA_ADDRESS, &link.mac);
            message.attr_u32(IFLA_MTU, link.mtu);
            message.attr(IFLA_IFALIAS, link.alias.as_bytes());
            message.nest(IFLA_LINKINFO, |info| {
                info.attr_str(IFLA_INFO_KIND, KIND);
                info.nest(IFLA_INFO_DATA, |data| {
                    data.attr_u32(IFLA_VXLAN_ID, link.vni);
                    let local = if link.local.is_ipv4() { IFLA_VXLAN_LOCAL } else { IFLA_VXLAN_LOCAL6 };
                    data.attr(local, &octets(link.local));
                    data.attr(IFLA_VXLAN_PORT, &link.port.to_be_bytes());
                    data.attr(IFLA_VXLAN_LEARNING, &[0]);
                });
            });
        });
    }
}

/// A VXLAN link that the kernel has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// `ifindex`.
    pub index: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// The rest.
    pub vxlan: Vxlan,
}

fn found(payload: &[u8]) -> Option<Found> {
    let attributes = payload.get(16..)?;
    let info = attribute(attributes, IFLA_LINKINFO)?;
    if text(attribute(info, IFLA_INFO_KIND)?) != KIND {
        return None;
    }
    let data = attribute(info, IFLA_INFO_DATA)?;
    let local = attribute(data, IFLA_VXLAN_LOCAL).or_else(|| attribute(data, IFLA_VXLAN_LOCAL6));
    let learns = attribute(data, IFLA_VXLAN_LEARNING).and_then(|value| value.first()) != Some(&0);
    let vxlan = Vxlan {
        name: text(attribute(attributes, IFLA_IFNAME)?),
        alias: attribute(attributes, IFLA_IFALIAS).map(text).unwrap_or_default(),
        mac: attribute(attributes, IFLA_ADDRESS)?.try_into().ok()?,
        vni: attribute(data, IFLA_VXLAN_ID).map_or(0, |value| u32_at(value, 0)),
        // One that learns is none that we made: it is known by a port that nobody wants.
        port: if learns { 0 } else { u16::from_be_bytes(attribute(data, IFLA_VXLAN_PORT)?.try_into().ok()?) },
        local: ip(local?)?,
        mtu: attribute(attributes, IFLA_MTU).map_or(0, |value| u32_at(value, 0)),
    };
    Some(Found { index: u32_at(payload, 4), is_up: u32_at(payload, 8) & IFF_UP != 0, vxlan })
}

impl Socket {
    /// The VXLAN link of that name; `None` when there is none or it is of another kind.
    pub fn vxlan(&mut self, name: &str) -> Result<Option<Found>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("read the VXLAN link", &[libc::ENODEV], RTM_GETLINK, ACK, |message| {
            link_header(message, 0, 0, 0);
            message.attr_str(IFLA_IFNAME, name);
        });
        let mut link = None;
        self.dump(&mut batch, |_, payload| link = found(payload))?;
        Ok(link)
    }
}
