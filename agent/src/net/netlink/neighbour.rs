//! Neighbours of a link and the forwarding table of a VXLAN link: who has which hardware address, and where it is.

use std::net::IpAddr;

use super::message::{ACK, Batch, CREATE, DUMP, REPLACE, Writer, attribute, u32_at};
use super::route::{Mac, family, ip, octets};
use super::{NetlinkError, Socket};

const RTM_NEWNEIGH: u16 = 28;
pub(super) const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
/// The entry is the link's own, not one of a bridge that the link is in.
const NTF_SELF: u8 = 2;
const AF_BRIDGE: u8 = libc::AF_BRIDGE as u8;

fn header(message: &mut Writer<'_>, family: u8, device: u32, flags: u8) {
    message.raw(&[family, 0, 0, 0]);
    message.raw(&device.to_ne_bytes());
    message.raw(&NUD_PERMANENT.to_ne_bytes());
    message.raw(&[flags, 0]);
}

impl Batch {
    /// Adds or replaces a neighbour that is never asked for.
    pub fn add_neighbour(&mut self, device: u32, ip: IpAddr, mac: Mac) {
        self.push("add the neighbour", &[], RTM_NEWNEIGH, CREATE | REPLACE | ACK, |message| {
            header(message, family(ip), device, 0);
            message.attr(NDA_DST, &octets(ip));
            message.attr(NDA_LLADDR, &mac);
        });
    }

    /// Removes a neighbour; one that is gone already is fine.
    pub fn delete_neighbour(&mut self, device: u32, ip: IpAddr) {
        self.push("remove the neighbour", &[libc::ENOENT], RTM_DELNEIGH, ACK, |message| {
            header(message, family(ip), device, 0);
            message.attr(NDA_DST, &octets(ip));
        });
    }

    /// A VXLAN link sends frames for `mac` to the machine `to` from now on.
    pub fn add_forwarding(&mut self, device: u32, mac: Mac, to: IpAddr) {
        self.push("add the forwarding entry", &[], RTM_NEWNEIGH, CREATE | REPLACE | ACK, |message| {
            header(message, AF_BRIDGE, device, NTF_SELF);
            message.attr(NDA_LLADDR, &mac);
            message.attr(NDA_DST, &octets(to));
        });
    }

    /// Removes what [`Self::add_forwarding`] made; one that is gone already is fine.
    pub fn delete_forwarding(&mut self, device: u32, mac: Mac, to: IpAddr) {
        self.push("remove the forwarding entry", &[libc::ENOENT], RTM_DELNEIGH, ACK, |message| {
            header(message, AF_BRIDGE, device, NTF_SELF);
            message.attr(NDA_LLADDR, &mac);
            message.attr(NDA_DST, &octets(to));
        });
    }
}

/// Device, address and hardware address of an entry that does not age.
fn entry(payload: &[u8]) -> Option<(u32, IpAddr, Mac)> {
    let attributes = payload.get(12..)?;
    let state = u16::from_ne_bytes(payload.get(8..10)?.try_into().ok()?);
    if state & NUD_PERMANENT == 0 {
        return None;
    }
    let mac = attribute(attributes, NDA_LLADDR)?.try_into().ok()?;
    Some((u32_at(payload, 4), ip(attribute(attributes, NDA_DST)?)?, mac))
}

impl Socket {
    /// Permanent neighbours on a device, of both families.
    pub fn neighbours(&mut self, device: u32) -> Result<Vec<(IpAddr, Mac)>, NetlinkError> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            found.extend(self.entries(family as u8, device)?);
        }
        Ok(found)
    }

    /// Where a VXLAN link sends which hardware address.
    pub fn forwarding(&mut self, device: u32) -> Result<Vec<(IpAddr, Mac)>, NetlinkError> {
        self.entries(AF_BRIDGE, device)
    }

    fn entries(&mut self, family: u8, device: u32) -> Result<Vec<(IpAddr, Mac)>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("list the neighbours", &[libc::EOPNOTSUPP], RTM_GETNEIGH, DUMP, |message| {
            message.raw(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        });
        let mut found = Vec::new();
        self.dump(&mut batch, |_, payload| {
            found.extend(entry(payload).filter(|(of, ..)| *of == device).map(|(_, ip, mac)| (ip, mac)));
        })?;
        Ok(found)
    }
}
