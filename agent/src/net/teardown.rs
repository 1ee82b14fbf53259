//! Leaves nothing behind: what `coracle uninstall` calls, from whatever namespace.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::config::NetworkConfig;
use super::ipam::write_by_rename;
use super::netlink::message::Batch;
use super::netlink::route::Link;
use super::netlink::{NetlinkError, Socket};
use super::proxy::kernel::Kernel;
use super::{NetworkError, host, names, overlay};

/// File below `DATA/agent` that tells where the network was set up.
const FILE: &str = "network.json";

/// What a teardown has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// `st_dev` and `st_ino` of the namespace.
    namespace: (u64, u64),
    /// `kernel.random.boot_id`: after a reboot the numbers mean nothing.
    boot_id: String,
    service_cidrs: Vec<String>,
    #[serde(default)]
    cluster_cidrs: Vec<String>,
    cluster_dns: Vec<IpAddr>,
}

fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn namespace_of(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Writes down where this thread's namespace is set up.
pub(super) fn remember(config: &NetworkConfig) -> Result<(), NetworkError> {
    let own = Path::new("/proc/thread-self/ns/net");
    let namespace = namespace_of(own).map_err(|source| NetworkError::Namespace { path: own.to_owned(), source })?;
    let record = Record {
        namespace,
        boot_id: boot_id(),
        service_cidrs: config.service_cidrs.iter().map(ToString::to_string).collect(),
        cluster_cidrs: config.cluster_cidrs.iter().map(ToString::to_string).collect(),
        cluster_dns: config.cluster_dns.clone(),
    };
    let path = config.agent_dir.join(FILE);
    write_by_rename(&path, &record).map_err(|source| NetworkError::Storage { step: "write", path, source })
}

/// Removes links, tables, routes, addresses and changed settings of a stopped instance, wherever it ran. Blocking, goes
/// on after errors and returns them all. A namespace that is gone has taken everything with it.
///
/// `agent_dir` is `DATA/agent`, `instance_id` as in [`NetworkConfig`].
pub fn teardown(instance_id: &str, agent_dir: &Path) -> Vec<NetworkError> {
    let path = agent_dir.join(FILE);
    let record = match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice::<Record>(&bytes).ok(),
        Err(_) => None,
    };
    // Without a record nothing was set up, or a reboot has removed it: look here, to be sure.
    let namespace = match &record {
        Some(record) if record.boot_id == boot_id() => match find_namespace(record.namespace) {
            Some(file) => Some(file),
            None => return Vec::new(),
        },
        _ => None,
    };
    let (instance, directory) = (instance_id.to_owned(), agent_dir.to_owned());
    let thread = std::thread::Builder::new().name("net-teardown".into()).spawn(move || {
        if let Some(file) = namespace
            && let Err(errno) = setns(&file, CloneFlags::CLONE_NEWNET)
        {
            let path = PathBuf::from("/proc/self/ns/net");
            return vec![NetworkError::Namespace { path, source: errno.into() }];
        }
        remove_all(&instance, &directory, record.as_ref())
    });
    let failed = |source| vec![NetworkError::Kernel { step: "start a thread".into(), source }];
    match thread.map(std::thread::JoinHandle::join) {
        Ok(Ok(errors)) => errors,
        Ok(Err(_)) => failed(io::Error::other("the thread ended early")),
        Err(error) => failed(error),
    }
}

fn remove_all(instance_id: &str, agent_dir: &Path, record: Option<&Record>) -> Vec<NetworkError> {
    let mut errors = Vec::new();
    errors.extend(delete_links(instance_id, |_| true).err());
    let tables = Kernel::open(names::table(instance_id), Vec::new())
        .map_err(NetlinkError::from)
        .and_then(|mut kernel| kernel.delete());
    errors.extend(tables.err().map(NetworkError::from));
    let parsed = |texts: fn(&Record) -> &[String]| -> Vec<IpNet> {
        record.map(texts).unwrap_or_default().iter().filter_map(|text| text.parse().ok()).collect()
    };
    let routes = overlay::kernel::Kernel::open(parsed(|record| &record.cluster_cidrs))
        .map_err(NetlinkError::from)
        .and_then(|mut kernel| kernel.remove_routes());
    errors.extend(routes.err().map(NetworkError::from));
    let cidrs = parsed(|record| &record.service_cidrs);
    let dns = record.map_or(&[][..], |record| &record.cluster_dns);
    errors.extend(host::restore(agent_dir, &cidrs, dns));
    errors
}

/// Deletes those links of the instance in this thread's namespace that are `unwanted`.
pub(super) fn delete_links(instance_id: &str, unwanted: impl Fn(&Link) -> bool) -> Result<(), NetworkError> {
    let owner = names::link_alias(instance_id, "");
    let mut socket = Socket::route().map_err(NetlinkError::from)?;
    let mut batch = Batch::new();
    for link in socket.links()?.iter().filter(|link| link.alias.starts_with(&owner) && unwanted(link)) {
        batch.delete_link(&link.name);
    }
    Ok(socket.apply(&mut batch)?)
}

/// Opens the namespace of those numbers: a thread is in it, or a file is bound to it.
fn find_namespace(wanted: (u64, u64)) -> Option<File> {
    let own = std::iter::once(PathBuf::from("/proc/thread-self/ns/net"));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let bound = mounts.lines().filter(|line| line.contains(" - nsfs ")).filter_map(|line| line.split(' ').nth(4));
    let children = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let threads = children("/proc".into()).flat_map(|process| children(process.join("task")));
    own.chain(bound.map(PathBuf::from))
        .chain(threads.map(|thread| thread.join("ns/net")))
        .find(|path| namespace_of(path).is_ok_and(|found| found == wanted))
        .and_then(|path| File::open(path).ok())
}
