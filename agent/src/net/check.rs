//! What the kernel must have for the network, found out by trying it in a namespace of its own: what
//! `coracle check-config` asks.

use nix::sched::{CloneFlags, unshare};

use super::netlink::message::Batch;
use super::netlink::route::Veth;
use super::netlink::{NetlinkError, Socket};
use super::nft::Family;
use super::proxy::kernel::Kernel;
use super::proxy::plan::Diff;
use super::proxy::tables::Settings;

/// One thing that the network needs, and whether this kernel has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fact {
    /// What it is.
    pub name: &'static str,
    /// `None` when it is there, else what the kernel said.
    pub lack: Option<String>,
    /// What to do about it.
    pub remedy: &'static str,
    /// Without an optional one some features are missing, the rest works.
    pub optional: bool,
}

/// Tries everything. Needs root; blocks for some milliseconds and leaves nothing behind.
pub fn facts() -> Vec<Fact> {
    let thread = std::thread::Builder::new().name("check-network".into()).spawn(|| {
        if let Err(errno) = unshare(CloneFlags::CLONE_NEWNET) {
            return vec![fact("network namespaces", Err(errno.to_string()), "CONFIG_NET_NS and root", false)];
        }
        probe()
    });
    thread.ok().and_then(|thread| thread.join().ok()).unwrap_or_default()
}

fn fact(name: &'static str, result: Result<(), String>, remedy: &'static str, optional: bool) -> Fact {
    Fact { name, lack: result.err(), remedy, optional }
}

fn text(error: &NetlinkError) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

fn probe() -> Vec<Fact> {
    let rules = |family, address: &str| rules(family, address).map_err(|error| text(&error));
    let persistent = owned_tables().map_err(|error| text(&error));
    vec![
        fact("veth links", veth().map_err(|error| text(&error)), "modprobe veth, or CONFIG_VETH", false),
        fact("VXLAN links", link_kind("vxlan"), "modprobe vxlan, or CONFIG_VXLAN (several nodes need it)", true),
        fact(
            "nftables for IPv4: maps, NAT, numgen, fib, reject",
            rules(Family::Ip, "192.0.2.1"),
            "modprobe nf_tables nft_chain_nat nft_fib_ipv4 nft_numgen nft_reject_ipv4 nft_masq, or CONFIG_NF_TABLES and CONFIG_NFT_*",
            false,
        ),
        fact(
            "nftables for IPv6",
            rules(Family::Ip6, "2001:db8::1"),
            "modprobe nft_fib_ipv6 nft_reject_ipv6, or CONFIG_NF_TABLES_IPV6 (dual-stack clusters need it)",
            true,
        ),
        fact(
            "nftables tables that others cannot flush",
            persistent,
            "Linux 6.9 or newer; without, rules that others flush are gone until the proxy puts them back, some milliseconds later",
            true,
        ),
        fact(
            "connection tracking over netlink",
            conntrack().map_err(|error| text(&error)),
            "modprobe nf_conntrack_netlink, or CONFIG_NF_CT_NETLINK",
            false,
        ),
    ]
}

fn veth() -> Result<(), NetlinkError> {
    use std::os::fd::AsRawFd;
    let own = std::fs::File::open("/proc/thread-self/ns/net")?;
    let mut batch = Batch::new();
    batch.add_veth(&Veth {
        name: "probe0",
        alias: "",
        mac: [2, 0, 0, 0, 0, 1],
        peer_name: "probe1",
        peer_mac: [2, 0, 0, 0, 0, 2],
        peer_netns: own.as_raw_fd(),
        mtu: 1450,
    });
    Socket::route()?.apply(&mut batch)
}

/// Whether the kernel knows a kind of link: one that it does not know is refused with `EOPNOTSUPP`.
fn link_kind(kind: &'static str) -> Result<(), String> {
    let mut batch = Batch::new();
    batch.add_link_of_kind("probe2", kind);
    let tried = Socket::route().map_err(NetlinkError::from).and_then(|mut socket| socket.apply(&mut batch));
    match tried {
        Err(error) if error.errno() == Some(libc::EOPNOTSUPP) => Err(text(&error)),
        // Made, or refused for the parameters that a real one has.
        _ => Ok(()),
    }
}

/// Whether this kernel has that kind of link, tried in a namespace of its own.
pub fn has_link_kind(kind: &'static str) -> bool {
    let tried = std::thread::Builder::new().name("check-network".into()).spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| errno.to_string()).and_then(|()| link_kind(kind))
    });
    tried.ok().and_then(|thread| thread.join().ok()).is_some_and(|result| result.is_ok())
}

fn settings(family: Family, address: &str) -> Settings {
    let ip: Option<std::net::IpAddr> = address.parse().ok();
    let range = ip.map(ipnet::IpNet::from);
    Settings { family, cluster_cidr: range, service_cidr: range, cluster_dns: ip, node_ip: ip }
}

/// The fixed rules use every expression that we have.
fn rules(family: Family, address: &str) -> Result<(), NetlinkError> {
    Kernel::open("coracle-probe".into(), vec![settings(family, address)])?.rebuild(&Diff::default())
}

fn owned_tables() -> Result<(), NetlinkError> {
    let mut kernel = Kernel::open("coracle-probe-owned".into(), vec![settings(Family::Ip, "192.0.2.1")])?;
    kernel.rebuild(&Diff::default())?;
    if kernel.is_owner() { Ok(()) } else { Err(NetlinkError::Answer("persistent owned tables")) }
}

fn conntrack() -> Result<(), NetlinkError> {
    let any = std::net::Ipv4Addr::UNSPECIFIED.into();
    Socket::netfilter()?.flows(any, libc::IPPROTO_UDP as u8).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_runs_our_other_tests_has_all_that_is_needed() {
        if nix::unistd::geteuid().is_root() {
            let facts = facts();
            assert_eq!(facts.len(), 6);
            assert!(facts.iter().all(|fact| fact.optional || fact.lack.is_none()), "{facts:?}");
        }
    }

    #[test]
    fn an_unknown_kind_of_link_is_seen() {
        if nix::unistd::geteuid().is_root() {
            let seen = std::thread::spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).unwrap();
                link_kind("no-such-kind")
            });
            assert!(seen.join().unwrap().is_err());
        }
    }
}
