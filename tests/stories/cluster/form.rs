//! Servers join each other with one command and a token.

use serde_json::json;

use super::hosts::{Cluster, Role};
use crate::assert_eventually;

#[test]
fn three_servers_form_one_cluster() {
    let cluster = Cluster::of(3, 0, &["--disable-agent"]);
    let leader = cluster.wait_leader();
    for server in cluster.servers() {
        let members = assert_eventually!(30, "all members vote", {
            let members = cluster.members(server).unwrap();
            let voters = members.iter().filter(|m| m["learner"] == false).count();
            if voters == 3 { Ok(members) } else { Err(format!("{members:?}")) }
        });
        let names: Vec<&str> = members.iter().map(|m| m["name"].as_str().unwrap()).collect();
        assert_eq!(names.len(), 3, "{members:?}");
        for (index, host) in cluster.hosts.iter().enumerate() {
            let member = members.iter().find(|m| m["name"] == host.name).unwrap_or_else(|| panic!("{members:?}"));
            assert_eq!(member["address"], format!("https://{}:6443", host.address));
            assert_eq!(member["leader"], index == leader);
        }
    }
    // Every server takes writes, and every other one has them at once.
    for writer in cluster.servers() {
        let name = format!("from-{}", cluster.hosts[writer].name);
        let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}});
        let path = "/api/v1/namespaces/default/configmaps";
        let (status, answer) = cluster.call(writer, http::Method::POST, path, Some(&object)).unwrap();
        assert_eq!(status, 201, "{answer}");
        for reader in cluster.servers() {
            let (status, answer) = cluster.get(reader, &format!("{path}/{name}")).unwrap();
            assert_eq!(status, 200, "{}: {answer}", cluster.hosts[reader].name);
        }
    }
}

#[test]
fn a_server_without_the_right_token_is_told_why() {
    let mut cluster = Cluster::of(1, 0, &["--disable-agent"]);
    let token = cluster.token("token");
    let agent_token = cluster.token("agent-token");
    let (hash, _) = token.split_once("::").unwrap();
    let other_hash =
        token.replacen(&token[3..11], if token[3..11] == *"00000000" { "11111111" } else { "00000000" }, 1);
    let mut said = Vec::new();
    for token in [agent_token, format!("{hash}::server:wrong"), other_hash, "nonsense".to_owned()] {
        let host = cluster.add(Role::Server, &["--disable-agent", "--server=https://10.80.0.1:6443"]);
        cluster.hosts[host].flags.push(format!("--token={token}"));
        cluster.start(host);
        let log = cluster.hosts[host].wait_for_end(60);
        said.push(log.lines().last().unwrap_or_default().to_owned());
    }
    let mut different = said.clone();
    different.sort();
    different.dedup();
    assert_eq!(different.len(), said.len(), "each has a message of its own: {said:?}");
    assert!(said.iter().all(|text| text.contains("token")), "{said:?}");
    assert_eq!(cluster.members(0).unwrap().len(), 1);
}
