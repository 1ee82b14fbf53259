//! Machines that come back with another address.

use super::hosts::{Cluster, moved};
use super::load::Load;
use crate::assert_eventually;

fn addresses_are_known(cluster: &Cluster) {
    for server in cluster.servers() {
        assert_eventually!(60, "the members' addresses are known", {
            let members = cluster.members(server)?;
            let known = cluster.servers().into_iter().all(|s| {
                let host = &cluster.hosts[s];
                members
                    .iter()
                    .any(|m| m["name"] == host.name && m["address"] == format!("https://{}:6443", host.address))
            });
            if known { Ok(()) } else { Err(format!("{members:?}")) }
        });
    }
}

#[test]
fn one_and_then_all_servers_change_their_address() {
    let mut cluster = Cluster::of(3, 1, &["--disable-agent"]);
    let load = Load::start(&cluster, 4, &cluster.clients());
    load.wait_for_writes(20, 120);
    cluster.hosts[1].stop();
    cluster.readdress(1, moved(1));
    cluster.start(1);
    load.servers_are_at(cluster.servers().into_iter().map(|s| cluster.hosts[s].api()).collect());
    cluster.wait_ready(1);
    addresses_are_known(&cluster);
    load.wait_for_writes(20, 120);

    for server in cluster.servers() {
        cluster.hosts[server].stop();
        cluster.readdress(server, moved(10 + server));
    }
    load.servers_are_at(cluster.servers().into_iter().map(|s| cluster.hosts[s].api()).collect());
    // Nobody is where the others know it: one of them is named, as at the first join.
    let token = cluster.token("token");
    for server in cluster.servers() {
        let flags = &mut cluster.hosts[server].flags;
        flags.retain(|f| !f.starts_with("--server=") && !f.starts_with("--token="));
        flags.extend([
            format!("--server=https://{}:6443", moved(if server == 0 { 11 } else { 10 })),
            format!("--token={token}"),
        ]);
        cluster.start(server);
    }
    for server in cluster.servers() {
        cluster.wait_ready(server);
    }
    addresses_are_known(&cluster);
    load.wait_for_writes(20, 120);
    load.finish(&cluster);
}
