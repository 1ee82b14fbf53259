//! The proxy's hand on the kernel: the tables of one instance.
//!
//! Where the kernel has it (6.9) the tables are owned and persistent: nobody else can flush them, they stay when this
//! process dies, and the next one adopts them. On older kernels they are plain tables: a listening thread tells of a
//! foreign flush, and what it took comes back.

use std::io;

use super::super::netlink::{NetlinkError, Socket, conntrack};
use super::super::nft::{Family, TABLE_OWNER, TABLE_PERSIST, Transaction};
use super::desired::{At, Frontend, protocol_number};
use super::plan::Diff;
use super::tables::Settings;

/// Largest transaction that is sent as one; the kernel copies it whole.
const LARGE: usize = 32 << 20;

/// The tables of one instance, and the one socket that may change them.
#[derive(Debug)]
pub struct Kernel {
    socket: Socket,
    table: String,
    families: Vec<Settings>,
    flags: u32,
}

impl Kernel {
    /// Opens the socket; touches nothing.
    pub fn open(table: String, families: Vec<Settings>) -> io::Result<Self> {
        Ok(Self { socket: Socket::netfilter()?, table, families, flags: TABLE_OWNER | TABLE_PERSIST })
    }

    /// The same tables by another socket.
    pub fn reopened(&self) -> io::Result<Self> {
        let families = self.families.clone();
        Ok(Self { socket: Socket::netfilter()?, table: self.table.clone(), families, flags: self.flags })
    }

    /// Name of the tables.
    pub fn table(&self) -> &str {
        &self.table
    }

    /// How the kernel names this socket in notifications.
    pub fn port(&self) -> io::Result<u32> {
        self.socket.port()
    }

    /// Does without ownership, as on a kernel that has none.
    #[cfg(test)]
    pub(super) fn unprotect(&mut self) -> Result<(), NetlinkError> {
        self.delete()?;
        self.flags = 0;
        Ok(())
    }

    /// Whether tables of this name exist in all families, e.g. from before a restart.
    pub fn exists(&mut self) -> Result<bool, NetlinkError> {
        let mut all = true;
        for settings in &self.families {
            all &= self.socket.table(settings.family, &self.table)?.is_some();
        }
        Ok(all)
    }

    /// Whether the tables are protected against other programs.
    pub fn is_owner(&self) -> bool {
        self.flags & TABLE_OWNER != 0
    }

    /// Replaces whatever is there by the fixed rules and `diff`, in one transaction.
    pub fn rebuild(&mut self, diff: &Diff) -> Result<(), NetlinkError> {
        match self.try_rebuild(diff) {
            // Flags that the kernel does not know.
            Err(error) if self.is_owner() && matches!(error.errno(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
                tracing::debug!(%error, "nftables has no persistent owned tables, going on without");
                self.flags = 0;
                self.try_rebuild(diff)
            }
            result => result,
        }
    }

    fn try_rebuild(&mut self, diff: &Diff) -> Result<(), NetlinkError> {
        let mut clients = Vec::new();
        for settings in &self.families {
            let sets = diff.dynamic_sets(settings.family);
            for set in sets {
                let found = self.socket.elements(settings.family, &self.table, set)?;
                if !found.is_empty() {
                    clients.push((settings.family, set.clone(), found));
                }
            }
        }
        let mut transaction = Transaction::new(&self.table);
        for settings in &self.families {
            // Adopt, delete, make again: so it does not matter what was there.
            transaction.add_table(settings.family, self.flags);
            transaction.delete_table(settings.family);
            transaction.add_table(settings.family, self.flags);
            settings.write(&mut transaction);
        }
        diff.write(&mut transaction);
        for (family, set, elements) in &clients {
            transaction.add_timed_elements(*family, set, elements);
        }
        if transaction.size() > LARGE {
            tracing::warn!(bytes = transaction.size(), "large nftables transaction");
        }
        transaction.commit(&mut self.socket)
    }

    /// Applies changes, in one transaction.
    pub fn apply(&mut self, diff: &Diff) -> Result<(), NetlinkError> {
        let mut transaction = Transaction::new(&self.table);
        diff.write(&mut transaction);
        transaction.commit(&mut self.socket)
    }

    /// Forgets flows for UDP whose endpoint is gone, and those that began before there was one: nothing ends them
    /// otherwise as long as the client keeps sending.
    pub fn forget_datagrams(&mut self, diff: &Diff) -> Result<usize, NetlinkError> {
        if diff.datagrams.is_empty() {
            return Ok(0);
        }
        let udp = protocol_number(super::super::Protocol::Udp);
        let mut count = 0;
        for settings in &self.families {
            let any = match settings.family {
                Family::Ip => std::net::Ipv4Addr::UNSPECIFIED.into(),
                Family::Ip6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
            };
            let flows = self.socket.flows(any, udp)?;
            let stale: Vec<_> = flows.iter().filter(|flow| is_stale(flow, settings.family, diff)).collect();
            count += stale.len();
            self.socket.delete_flows(stale.into_iter())?;
        }
        Ok(count)
    }

    /// Deletes the tables; those that are not there are fine.
    pub fn delete(&mut self) -> Result<(), NetlinkError> {
        for family in [Family::Ip, Family::Ip6] {
            let Some(flags) = self.socket.table(family, &self.table)? else { continue };
            // An orphan has to be adopted before it can be deleted.
            let mut transaction = Transaction::new(&self.table);
            transaction.add_table(family, flags & (TABLE_OWNER | TABLE_PERSIST));
            transaction.delete_table(family);
            transaction.commit(&mut self.socket)?;
        }
        Ok(())
    }
}

fn is_stale(flow: &conntrack::Flow, family: Family, diff: &Diff) -> bool {
    let (ip, port) = (flow.original.destination, flow.original.destination_port);
    [At::Cluster(ip), At::External(ip), At::Node(family)].into_iter().any(|at| {
        let frontend = Frontend { at, protocol: super::super::Protocol::Udp, port };
        let to = (flow.reply.source, flow.reply.source_port);
        diff.datagrams.get(&frontend).is_some_and(|endpoints| !endpoints.contains(&to))
    })
}
