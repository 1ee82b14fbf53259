//! The expressions that rules are made of: what the kernel's virtual machine runs.

use super::super::netlink::message::Writer;
use super::{Family, write_verdict};

const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;

const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_L4PROTO: u32 = 16;
const CT_STATE: u32 = 0;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const RANDOM_FULLY: u32 = 1 << 4;
const FIB_ADDRTYPE: u32 = 3;
const FIB_DADDR: u32 = 2;
/// `RTN_LOCAL`.
const ADDRTYPE_LOCAL: u32 = 2;
const RT_TCPMSS: u32 = 3;
const TCPOPT_MAXSEG: u8 = 2;

/// Bit of the connection state `new`.
pub const STATE_NEW: u32 = 1 << 3;
/// Bit of the connection state `invalid`.
pub const STATE_INVALID: u32 = 1;

/// Where a chain or element sends a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict<'a> {
    /// Accept.
    Accept,
    /// Drop.
    Drop,
    /// Back to the calling chain.
    Return,
    /// Into a chain and back.
    Jump(&'a str),
    /// Into a chain.
    Goto(&'a str),
}

/// A 4-byte register, 0 to 15.
pub type Register = u8;

/// Which address of the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// Source.
    Source,
    /// Destination.
    Destination,
}

/// One expression. Loads name the register they write, tests the one they read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Load an address of the packet.
    Address(Address, Register),
    /// Load the number of the transport protocol.
    L4Proto(Register),
    /// Load the destination port.
    DestinationPort(Register),
    /// Load the flags of the TCP header.
    TcpFlags(Register),
    /// Load the name of the device that the packet came in by.
    InName(Register),
    /// Load the name of the device that the packet goes out by.
    OutName(Register),
    /// Load the mark.
    Mark(Register),
    /// Store the mark.
    SetMark(Register),
    /// Load the connection's state bits.
    CtState(Register),
    /// Load whether the destination is an address of this machine, and test for it.
    DestinationIsLocal,
    /// Load a random number below the modulus.
    Random(u32, Register),
    /// Keep bits of a mask and flip bits: `reg = (reg & mask) ^ flip`.
    Bitwise(Register, Vec<u8>, Vec<u8>),
    /// Go on if equal.
    Equal(Register, Vec<u8>),
    /// Go on if not equal.
    NotEqual(Register, Vec<u8>),
    /// Go on if the key is in the set.
    InSet(Register, String),
    /// Verdict by a map.
    VerdictMap(Register, String),
    /// Load a map's value; ends the rule when the key is not there.
    Map(Register, String, Register),
    /// Load bytes.
    Immediate(Register, Vec<u8>),
    /// Add the key to a dynamic set or renew its time.
    Update(Register, String),
    /// Rewrite the destination to the address in the first register and the port in the second.
    Dnat(Register, Register),
    /// Rewrite the source to the address in the register, with a random port.
    Snat(Register),
    /// Rewrite the source to an address of the device that the packet goes out by, with a random port.
    Masquerade,
    /// Answer that the port cannot be reached.
    RejectPort,
    /// Answer with a TCP reset.
    RejectReset,
    /// Lower the maximum segment size of a SYN to what the route carries.
    ClampMss,
    /// Verdict.
    Accept,
    /// Verdict.
    Return,
    /// Verdict.
    Drop,
    /// Verdict.
    Jump(String),
    /// Verdict.
    Goto(String),
}

/// Number by which attributes name a register: `NFT_REG32_00` is 8.
fn number(register: Register) -> u32 {
    8 + u32::from(register)
}

/// Writes an expression's name and attributes.
fn expression(list: &mut Writer<'_>, name: &str, write: impl FnOnce(&mut Writer<'_>)) {
    list.nest(NFTA_LIST_ELEM, |element| {
        element.attr_str(NFTA_EXPR_NAME, name);
        element.nest(NFTA_EXPR_DATA, write);
    });
}

fn payload(list: &mut Writer<'_>, register: Register, base: u32, offset: u32, length: u32) {
    expression(list, "payload", |data| {
        data.attr_be32(1, number(register));
        data.attr_be32(2, base);
        data.attr_be32(3, offset);
        data.attr_be32(4, length);
    });
}

/// `kind` is the attribute of the register: 1 loads, 3 stores.
fn meta(list: &mut Writer<'_>, kind: u16, register: Register, key: u32) {
    expression(list, "meta", |data| {
        data.attr_be32(kind, number(register));
        data.attr_be32(2, key);
    });
}

fn compare(list: &mut Writer<'_>, register: Register, operation: u32, value: &[u8]) {
    expression(list, "cmp", |data| {
        data.attr_be32(1, number(register));
        data.attr_be32(2, operation);
        data.nest(3, |nested| nested.attr(NFTA_DATA_VALUE, value));
    });
}

fn lookup(list: &mut Writer<'_>, key: Register, set: &str, to: Option<u32>) {
    expression(list, "lookup", |data| {
        data.attr_str(1, set);
        data.attr_be32(2, number(key));
        if let Some(to) = to {
            data.attr_be32(3, to);
        }
    });
}

fn verdict(list: &mut Writer<'_>, verdict: Verdict<'_>) {
    expression(list, "immediate", |data| {
        data.attr_be32(1, 0);
        data.nest(2, |nested| write_verdict(nested, verdict));
    });
}

impl Expr {
    /// Writes it as an element of a rule's list.
    pub(super) fn write(&self, list: &mut Writer<'_>, family: Family) {
        match self {
            Self::Address(which, register) => {
                let offset = match (family, which) {
                    (Family::Ip, Address::Source) => 12,
                    (Family::Ip, Address::Destination) => 16,
                    (Family::Ip6, Address::Source) => 8,
                    (Family::Ip6, Address::Destination) => 24,
                };
                payload(list, *register, 1, offset, family.address_len() as u32);
            }
            Self::DestinationPort(register) => payload(list, *register, 2, 2, 2),
            Self::TcpFlags(register) => payload(list, *register, 2, 13, 1),
            Self::L4Proto(register) => meta(list, 1, *register, META_L4PROTO),
            Self::InName(register) => meta(list, 1, *register, META_IIFNAME),
            Self::OutName(register) => meta(list, 1, *register, META_OIFNAME),
            Self::Mark(register) => meta(list, 1, *register, META_MARK),
            Self::SetMark(register) => meta(list, 3, *register, META_MARK),
            Self::CtState(register) => expression(list, "ct", |data| {
                data.attr_be32(1, number(*register));
                data.attr_be32(2, CT_STATE);
            }),
            Self::DestinationIsLocal => {
                expression(list, "fib", |data| {
                    data.attr_be32(1, number(0));
                    data.attr_be32(2, FIB_ADDRTYPE);
                    data.attr_be32(3, FIB_DADDR);
                });
                compare(list, 0, 0, &ADDRTYPE_LOCAL.to_ne_bytes());
            }
            Self::Random(modulus, register) => expression(list, "numgen", |data| {
                data.attr_be32(1, number(*register));
                data.attr_be32(2, *modulus);
                data.attr_be32(3, 1);
                data.attr_be32(4, 0);
            }),
            Self::Bitwise(register, mask, flip) => expression(list, "bitwise", |data| {
                data.attr_be32(1, number(*register));
                data.attr_be32(2, number(*register));
                data.attr_be32(3, mask.len() as u32);
                data.nest(4, |nested| nested.attr(NFTA_DATA_VALUE, mask));
                data.nest(5, |nested| nested.attr(NFTA_DATA_VALUE, flip));
            }),
            Self::Equal(register, value) => compare(list, *register, 0, value),
            Self::NotEqual(register, value) => compare(list, *register, 1, value),
            Self::InSet(key, set) => lookup(list, *key, set, None),
            Self::VerdictMap(key, map) => lookup(list, *key, map, Some(0)),
            Self::Map(key, map, to) => lookup(list, *key, map, Some(number(*to))),
            Self::Immediate(register, value) => expression(list, "immediate", |data| {
                data.attr_be32(1, number(*register));
                data.nest(2, |nested| nested.attr(NFTA_DATA_VALUE, value));
            }),
            Self::Update(key, set) => expression(list, "dynset", |data| {
                data.attr_str(1, set);
                data.attr_be32(3, 1);
                data.attr_be32(4, number(*key));
            }),
            Self::Dnat(address, port) => expression(list, "nat", |data| {
                data.attr_be32(1, 1);
                data.attr_be32(2, u32::from(family.number()));
                data.attr_be32(3, number(*address));
                data.attr_be32(5, number(*port));
            }),
            Self::Snat(address) => expression(list, "nat", |data| {
                data.attr_be32(1, 0);
                data.attr_be32(2, u32::from(family.number()));
                data.attr_be32(3, number(*address));
                data.attr_be32(7, RANDOM_FULLY);
            }),
            Self::Masquerade => expression(list, "masq", |data| data.attr_be32(1, RANDOM_FULLY)),
            Self::RejectPort => expression(list, "reject", |data| {
                data.attr_be32(1, 0);
                // ICMP_PORT_UNREACH, ICMPV6_PORT_UNREACH.
                data.attr(2, &[if family == Family::Ip { 3 } else { 4 }]);
            }),
            Self::RejectReset => expression(list, "reject", |data| data.attr_be32(1, 1)),
            Self::ClampMss => {
                expression(list, "rt", |data| {
                    data.attr_be32(1, number(0));
                    data.attr_be32(2, RT_TCPMSS);
                });
                expression(list, "byteorder", |data| {
                    data.attr_be32(1, number(0));
                    data.attr_be32(2, number(0));
                    data.attr_be32(3, 1);
                    data.attr_be32(4, 2);
                    data.attr_be32(5, 2);
                });
                expression(list, "exthdr", |data| {
                    data.attr(2, &[TCPOPT_MAXSEG]);
                    data.attr_be32(3, 2);
                    data.attr_be32(4, 2);
                    data.attr_be32(6, 1);
                    data.attr_be32(7, number(0));
                });
            }
            Self::Accept => verdict(list, Verdict::Accept),
            Self::Return => verdict(list, Verdict::Return),
            Self::Drop => verdict(list, Verdict::Drop),
            Self::Jump(chain) => verdict(list, Verdict::Jump(chain)),
            Self::Goto(chain) => verdict(list, Verdict::Goto(chain)),
        }
    }
}
