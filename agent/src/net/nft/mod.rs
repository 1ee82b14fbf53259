//! nftables over netlink: our own encoder for what the proxy's tables use.
//!
//! Only what `nft list ruleset` can print is ever emitted, so that an administrator sees what happens.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`expr`] | the expressions that rules are made of |
//! | (here) | transactions: tables, chains, rules, sets, elements |

pub mod expr;

use super::netlink::message::{APPEND, Batch, CREATE, DUMP, Writer, attribute, text};
use super::netlink::{NetlinkError, Socket};
use expr::Expr;

const SUBSYSTEM: u16 = 10 << 8;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = SUBSYSTEM;
const GETTABLE: u16 = SUBSYSTEM | 1;
const DELTABLE: u16 = SUBSYSTEM | 2;
const NEWCHAIN: u16 = SUBSYSTEM | 3;
const DELCHAIN: u16 = SUBSYSTEM | 5;
const NEWRULE: u16 = SUBSYSTEM | 6;
const DELRULE: u16 = SUBSYSTEM | 8;
const NEWSET: u16 = SUBSYSTEM | 9;
const DELSET: u16 = SUBSYSTEM | 11;
const NEWSETELEM: u16 = SUBSYSTEM | 12;
const GETSETELEM: u16 = SUBSYSTEM | 13;
const DELSETELEM: u16 = SUBSYSTEM | 14;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
/// Only the socket that made the table may change it.
pub const TABLE_OWNER: u32 = 2;
/// The table outlives its owner and can be adopted (Linux 6.9).
pub const TABLE_PERSIST: u32 = 4;

const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;

const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_FLAGS: u16 = 3;
const NFTA_SET_KEY_TYPE: u16 = 4;
const NFTA_SET_KEY_LEN: u16 = 5;
const NFTA_SET_DATA_TYPE: u16 = 6;
const NFTA_SET_DATA_LEN: u16 = 7;
const NFTA_SET_DESC: u16 = 9;
const NFTA_SET_ID: u16 = 10;
const NFTA_SET_TIMEOUT: u16 = 11;
const NFTA_SET_DESC_SIZE: u16 = 1;
const SET_MAP: u32 = 8;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const DATA_VERDICT: u32 = 0xffff_ff00;

const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_EXPIRATION: u16 = 5;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;

/// A list of elements is one attribute, whose length is 16 bits.
const ELEMENT_BYTES: usize = 60_000;
/// Most clients that one endpoint remembers.
const DYNAMIC_SIZE: u32 = 65_535;

/// `ip` or `ip6`: our tables are one of each, named alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl Family {
    /// `NFPROTO_*`.
    pub fn number(self) -> u8 {
        match self {
            Self::Ip => libc::NFPROTO_IPV4 as u8,
            Self::Ip6 => libc::NFPROTO_IPV6 as u8,
        }
    }

    /// The family of an address.
    pub fn of(ip: std::net::IpAddr) -> Self {
        if ip.is_ipv4() { Self::Ip } else { Self::Ip6 }
    }

    /// Bytes of an address.
    pub fn address_len(self) -> usize {
        match self {
            Self::Ip => 4,
            Self::Ip6 => 16,
        }
    }
}

/// Types of the parts of set keys, by the numbers that `nft` knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyType {
    /// `ipv4_addr` or `ipv6_addr`.
    Address,
    /// `inet_proto`.
    Protocol,
    /// `inet_service`.
    Port,
    /// `mark`: a 32-bit number in host order that `nft` can print within a concatenation.
    Mark,
}

impl KeyType {
    fn number(self, family: Family) -> u32 {
        match (self, family) {
            (Self::Address, Family::Ip) => 7,
            (Self::Address, Family::Ip6) => 8,
            (Self::Protocol, _) => 12,
            (Self::Port, _) => 13,
            (Self::Mark, _) => 19,
        }
    }

    /// Bytes in a register: every part is padded to four.
    fn len(self, family: Family) -> usize {
        match self {
            Self::Address => family.address_len(),
            Self::Protocol | Self::Port | Self::Mark => 4,
        }
    }
}

/// What a set maps its keys to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetData {
    /// Nothing: a set.
    None,
    /// Verdicts.
    Verdict,
    /// Values of these types.
    Value(&'static [KeyType]),
    /// Nothing, and elements are added by packets and forgotten after so many seconds without one.
    Dynamic {
        /// Seconds.
        timeout: u32,
    },
}

/// Declaration of a set or map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetSpec {
    /// Parts of the key.
    pub key: &'static [KeyType],
    /// What keys are mapped to.
    pub data: SetData,
}

/// Where a chain hangs in the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// `filter` or `nat`.
    pub kind: &'static str,
    /// `NF_INET_*`.
    pub number: u32,
    /// Order among the chains of a hook.
    pub priority: i32,
}

/// Value of an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ElementData {
    /// Of a set.
    None,
    /// Go to a chain.
    Goto(String),
    /// Drop the packet.
    Drop,
    /// The value in register layout.
    Value(Vec<u8>),
}

/// A transaction under construction: all of it happens or nothing.
#[derive(Debug)]
pub struct Transaction {
    batch: Batch,
    table: String,
    sets: u32,
}

fn generic(message: &mut Writer<'_>, family: u8, resource: u16) {
    let [high, low] = resource.to_be_bytes();
    message.raw(&[family, 0, high, low]);
}

/// A concatenation's type is its parts' numbers, six bits each.
fn type_number(parts: &[KeyType], family: Family) -> u32 {
    parts.iter().fold(0, |sum, part| (sum << 6) | part.number(family))
}

fn type_len(parts: &[KeyType], family: Family) -> u32 {
    match parts {
        [KeyType::Protocol] => 1,
        [KeyType::Port] => 2,
        _ => parts.iter().map(|part| part.len(family) as u32).sum(),
    }
}

impl Transaction {
    /// A transaction on the tables of that name.
    pub fn new(table: &str) -> Self {
        let mut batch = Batch::new();
        batch.push("begin a transaction", &[], NFNL_MSG_BATCH_BEGIN, 0, |message| generic(message, 0, SUBSYSTEM >> 8));
        Self { batch, table: table.to_owned(), sets: 0 }
    }

    /// Whether it would change nothing.
    pub fn is_empty(&self) -> bool {
        self.batch.len() == 1
    }

    /// Bytes so far.
    pub fn size(&self) -> usize {
        self.batch.bytes().len()
    }

    /// Sends it.
    pub fn commit(mut self, socket: &mut Socket) -> Result<(), NetlinkError> {
        if self.is_empty() {
            return Ok(());
        }
        self.batch.await_last();
        self.batch.push("end a transaction", &[], NFNL_MSG_BATCH_END, 0, |message| generic(message, 0, SUBSYSTEM >> 8));
        socket.apply(&mut self.batch)
    }

    fn push(
        &mut self,
        step: &'static str,
        kind: u16,
        flags: u16,
        family: Family,
        write: impl FnOnce(&mut Writer<'_>, &str),
    ) {
        let table = &self.table;
        self.batch.push(step, &[], kind, flags, |message| {
            generic(message, family.number(), 0);
            write(message, table);
        });
    }

    /// Makes, adopts or keeps the table.
    pub fn add_table(&mut self, family: Family, flags: u32) {
        self.push("add the nftables table", NEWTABLE, CREATE, family, |message, table| {
            message.attr_str(NFTA_TABLE_NAME, table);
            message.attr_be32(NFTA_TABLE_FLAGS, flags);
        });
    }

    /// Deletes the table with everything in it.
    pub fn delete_table(&mut self, family: Family) {
        self.push("delete the nftables table", DELTABLE, 0, family, |message, table| {
            message.attr_str(NFTA_TABLE_NAME, table);
        });
    }

    /// Makes a chain.
    pub fn add_chain(&mut self, family: Family, name: &str, hook: Option<Hook>) {
        self.push("add a chain", NEWCHAIN, CREATE, family, |message, table| {
            message.attr_str(NFTA_CHAIN_TABLE, table);
            message.attr_str(NFTA_CHAIN_NAME, name);
            if let Some(hook) = hook {
                message.nest(NFTA_CHAIN_HOOK, |nested| {
                    nested.attr_be32(NFTA_HOOK_HOOKNUM, hook.number);
                    nested.attr_be32(NFTA_HOOK_PRIORITY, hook.priority.cast_unsigned());
                });
                message.attr_str(NFTA_CHAIN_TYPE, hook.kind);
            }
        });
    }

    /// Deletes a chain that no rule or element names any more.
    pub fn delete_chain(&mut self, family: Family, name: &str) {
        self.push("delete a chain", DELCHAIN, 0, family, |message, table| {
            message.attr_str(NFTA_CHAIN_TABLE, table);
            message.attr_str(NFTA_CHAIN_NAME, name);
        });
    }

    /// Deletes the rules of a chain.
    pub fn flush_chain(&mut self, family: Family, name: &str) {
        self.push("flush a chain", DELRULE, 0, family, |message, table| {
            message.attr_str(NFTA_RULE_TABLE, table);
            message.attr_str(NFTA_RULE_CHAIN, name);
        });
    }

    /// Appends a rule.
    pub fn add_rule(&mut self, family: Family, chain: &str, exprs: &[Expr]) {
        self.push("add a rule", NEWRULE, CREATE | APPEND, family, |message, table| {
            message.attr_str(NFTA_RULE_TABLE, table);
            message.attr_str(NFTA_RULE_CHAIN, chain);
            message.nest(NFTA_RULE_EXPRESSIONS, |list| {
                for expr in exprs {
                    expr.write(list, family);
                }
            });
        });
    }

    /// Makes a set or map.
    pub fn add_set(&mut self, family: Family, name: &str, spec: &SetSpec) {
        self.sets += 1;
        let id = self.sets;
        self.push("add a set", NEWSET, CREATE, family, |message, table| {
            message.attr_str(NFTA_SET_TABLE, table);
            message.attr_str(NFTA_SET_NAME, name);
            let kind = match spec.data {
                SetData::None => 0,
                SetData::Verdict | SetData::Value(_) => SET_MAP,
                SetData::Dynamic { .. } => SET_TIMEOUT | SET_EVAL,
            };
            message.attr_be32(NFTA_SET_FLAGS, kind);
            message.attr_be32(NFTA_SET_KEY_TYPE, type_number(spec.key, family));
            message.attr_be32(NFTA_SET_KEY_LEN, type_len(spec.key, family));
            match spec.data {
                SetData::None => {}
                SetData::Verdict => {
                    message.attr_be32(NFTA_SET_DATA_TYPE, DATA_VERDICT);
                    message.attr_be32(NFTA_SET_DATA_LEN, 0);
                }
                SetData::Value(parts) => {
                    message.attr_be32(NFTA_SET_DATA_TYPE, type_number(parts, family));
                    message.attr_be32(NFTA_SET_DATA_LEN, type_len(parts, family));
                }
                SetData::Dynamic { timeout } => {
                    message.attr(NFTA_SET_TIMEOUT, &(u64::from(timeout) * 1000).to_be_bytes());
                    message.nest(NFTA_SET_DESC, |desc| desc.attr_be32(NFTA_SET_DESC_SIZE, DYNAMIC_SIZE));
                }
            }
            message.attr_be32(NFTA_SET_ID, id);
        });
    }

    /// Deletes a set that no rule names any more.
    pub fn delete_set(&mut self, family: Family, name: &str) {
        self.push("delete a set", DELSET, 0, family, |message, table| {
            message.attr_str(NFTA_SET_TABLE, table);
            message.attr_str(NFTA_SET_NAME, name);
        });
    }

    /// Adds elements.
    pub fn add_elements<'a>(
        &mut self,
        family: Family,
        set: &str,
        elements: impl Iterator<Item = (&'a [u8], &'a ElementData)>,
    ) {
        let mut elements = elements.peekable();
        while elements.peek().is_some() {
            self.push("add elements", NEWSETELEM, CREATE, family, |message, table| {
                message.attr_str(NFTA_SET_ELEM_LIST_TABLE, table);
                message.attr_str(NFTA_SET_ELEM_LIST_SET, set);
                message.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                    let mut room = ELEMENT_BYTES;
                    while let Some((key, data)) = elements.next_if(|_| room > 256) {
                        room = room.saturating_sub(element_size(key, data));
                        list.nest(NFTA_LIST_ELEM, |element| write_element(element, key, data));
                    }
                });
            });
        }
    }

    /// Adds elements of a dynamic set with the milliseconds left to each.
    pub fn add_timed_elements(&mut self, family: Family, set: &str, elements: &[(Vec<u8>, u64)]) {
        for chunk in elements.chunks(ELEMENT_BYTES / 64) {
            self.push("add elements", NEWSETELEM, CREATE, family, |message, table| {
                message.attr_str(NFTA_SET_ELEM_LIST_TABLE, table);
                message.attr_str(NFTA_SET_ELEM_LIST_SET, set);
                message.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                    for (key, left) in chunk.iter().filter(|(_, left)| *left > 0) {
                        list.nest(NFTA_LIST_ELEM, |element| {
                            element.nest(NFTA_SET_ELEM_KEY, |nested| nested.attr(NFTA_DATA_VALUE, key));
                            element.attr(NFTA_SET_ELEM_EXPIRATION, &left.to_be_bytes());
                        });
                    }
                });
            });
        }
    }

    /// Deletes elements.
    pub fn delete_elements<'a>(&mut self, family: Family, set: &str, keys: impl Iterator<Item = &'a [u8]>) {
        let mut keys = keys.peekable();
        while keys.peek().is_some() {
            self.push("delete elements", DELSETELEM, 0, family, |message, table| {
                message.attr_str(NFTA_SET_ELEM_LIST_TABLE, table);
                message.attr_str(NFTA_SET_ELEM_LIST_SET, set);
                message.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                    let mut room = ELEMENT_BYTES;
                    while let Some(key) = keys.next_if(|_| room > 256) {
                        room = room.saturating_sub(element_size(key, &ElementData::None));
                        list.nest(NFTA_LIST_ELEM, |element| write_element(element, key, &ElementData::None));
                    }
                });
            });
        }
    }
}

/// An upper bound of an element's encoded bytes.
fn element_size(key: &[u8], data: &ElementData) -> usize {
    let data = match data {
        ElementData::None => 0,
        ElementData::Drop => 20,
        ElementData::Goto(chain) => 28 + chain.len(),
        ElementData::Value(value) => 12 + value.len(),
    };
    16 + key.len() + data
}

fn write_element(element: &mut Writer<'_>, key: &[u8], data: &ElementData) {
    element.nest(NFTA_SET_ELEM_KEY, |nested| nested.attr(NFTA_DATA_VALUE, key));
    match data {
        ElementData::None => {}
        ElementData::Value(value) => element.nest(NFTA_SET_ELEM_DATA, |nested| nested.attr(NFTA_DATA_VALUE, value)),
        ElementData::Goto(chain) => {
            element.nest(NFTA_SET_ELEM_DATA, |nested| write_verdict(nested, expr::Verdict::Goto(chain)));
        }
        ElementData::Drop => {
            element.nest(NFTA_SET_ELEM_DATA, |nested| write_verdict(nested, expr::Verdict::Drop));
        }
    }
}

fn write_verdict(data: &mut Writer<'_>, verdict: expr::Verdict<'_>) {
    let (code, chain): (i32, Option<&str>) = match verdict {
        expr::Verdict::Drop => (0, None),
        expr::Verdict::Accept => (1, None),
        expr::Verdict::Return => (-5, None),
        expr::Verdict::Jump(chain) => (-3, Some(chain)),
        expr::Verdict::Goto(chain) => (-4, Some(chain)),
    };
    data.nest(NFTA_DATA_VERDICT, |nested| {
        nested.attr_be32(NFTA_VERDICT_CODE, code.cast_unsigned());
        if let Some(chain) = chain {
            nested.attr_str(NFTA_VERDICT_CHAIN, chain);
        }
    });
}

/// Whether a notification says that something of the table has gone.
pub fn is_loss(kind: u16, payload: &[u8], table: &str) -> bool {
    // The table's name is the first attribute of all of them.
    [DELTABLE, DELCHAIN, DELRULE, DELSET, DELSETELEM].contains(&kind)
        && attribute(payload.get(4..).unwrap_or_default(), NFTA_TABLE_NAME).map(text).as_deref() == Some(table)
}

impl Socket {
    /// Flags of the table, if it exists.
    pub fn table(&mut self, family: Family, name: &str) -> Result<Option<u32>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("list the nftables tables", &[], GETTABLE, DUMP, |message| generic(message, family.number(), 0));
        let mut found = None;
        self.dump(&mut batch, |kind, payload| {
            let attributes = payload.get(4..).unwrap_or_default();
            if kind == NEWTABLE && attribute(attributes, NFTA_TABLE_NAME).map(text).as_deref() == Some(name) {
                let flags = attribute(attributes, NFTA_TABLE_FLAGS).and_then(|bytes| bytes.try_into().ok());
                found = Some(flags.map_or(0, u32::from_be_bytes));
            }
        })?;
        Ok(found)
    }

    /// Keys of a set's elements with the milliseconds left to them. Empty when there is no such set.
    pub fn elements(&mut self, family: Family, table: &str, set: &str) -> Result<Vec<(Vec<u8>, u64)>, NetlinkError> {
        let mut batch = Batch::new();
        batch.push("list elements", &[libc::ENOENT], GETSETELEM, DUMP, |message| {
            generic(message, family.number(), 0);
            message.attr_str(NFTA_SET_ELEM_LIST_TABLE, table);
            message.attr_str(NFTA_SET_ELEM_LIST_SET, set);
        });
        let mut found = Vec::new();
        self.dump(&mut batch, |kind, payload| {
            if kind != NEWSETELEM {
                return;
            }
            let attributes = payload.get(4..).unwrap_or_default();
            let list = attribute(attributes, NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
            for (_, element) in super::netlink::message::attributes(list) {
                let key = attribute(element, NFTA_SET_ELEM_KEY).and_then(|key| attribute(key, NFTA_DATA_VALUE));
                let left = attribute(element, NFTA_SET_ELEM_EXPIRATION).and_then(|bytes| bytes.try_into().ok());
                found.extend(key.map(|key| (key.to_vec(), left.map_or(0, u64::from_be_bytes))));
            }
        })?;
        Ok(found)
    }
}
