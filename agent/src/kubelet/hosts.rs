//! `/etc/hosts`, the hostname and the resolver configuration of a pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{HostAlias, Pod};

use super::containers;
use crate::runtime::DnsConfig;

/// Longest label of a hostname.
const MAX_LABEL: usize = 63;
/// Longest hostname the kernel takes.
const MAX_HOSTNAME: usize = 64;

/// A pod's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hostname {
    /// What `hostname` prints.
    pub hostname: String,
    /// The pod's own name, the first label.
    pub short: String,
    /// `sub.ns.svc.cluster.local` when the pod has a subdomain.
    pub domain: String,
}

/// Names of a pod; those of the node with its network.
///
/// # Errors
/// The message for people when the full name must be the hostname and is too long.
pub fn hostname(pod: &Pod, cluster_domain: &str, node: &str) -> Result<Hostname, String> {
    let spec = containers::spec(pod);
    if let Some(name) = spec.hostname_override.as_deref().filter(|_| spec.host_network != Some(true)) {
        return Ok(Hostname { hostname: name.to_owned(), short: name.to_owned(), domain: String::new() });
    }
    if containers::is_host_network(pod) {
        return Ok(Hostname { hostname: node.to_owned(), short: node.to_owned(), domain: String::new() });
    }
    let wanted = spec.hostname.as_deref().filter(|name| !name.is_empty()).unwrap_or_else(|| containers::name(pod));
    let cut = &wanted[..wanted.len().min(MAX_LABEL)];
    let short = cut.trim_end_matches(['-', '.']).to_owned();
    let domain = match spec.subdomain.as_deref().filter(|name| !name.is_empty()) {
        Some(subdomain) => format!("{subdomain}.{}.svc.{cluster_domain}", containers::namespace(pod)),
        None => String::new(),
    };
    let mut hostname = short.clone();
    if spec.set_hostname_as_fqdn == Some(true) && !domain.is_empty() {
        hostname = format!("{short}.{domain}");
        if hostname.len() > MAX_HOSTNAME {
            return Err(format!(
                "failed to construct FQDN from pod hostname and cluster domain, FQDN {hostname} is too long ({MAX_HOSTNAME} characters is the max, {} characters requested)",
                hostname.len()
            ));
        }
    }
    Ok(Hostname { hostname, short, domain })
}

/// The managed hosts file of a pod with its own network.
pub fn pod_hosts(ips: &[IpAddr], names: &Hostname, aliases: &[HostAlias]) -> String {
    let mut hosts = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        if names.domain.is_empty() {
            hosts.push_str(&format!("{ip}\t{}\n", names.short));
        } else {
            hosts.push_str(&format!("{ip}\t{}.{}\t{}\n", names.short, names.domain, names.short));
        }
    }
    hosts.push_str(&alias_lines(aliases));
    hosts
}

/// The hosts file of a pod with the node's network: the node's own and the pod's aliases.
pub fn node_hosts(own: &str, aliases: &[HostAlias]) -> String {
    format!("# Kubernetes-managed hosts file (host network).\n{own}{}", alias_lines(aliases))
}

fn alias_lines(aliases: &[HostAlias]) -> String {
    if aliases.is_empty() {
        return String::new();
    }
    let mut lines = String::from("\n# Entries added by HostAliases.\n");
    for alias in aliases {
        lines.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t")));
    }
    lines
}

/// What the resolver of the cluster is.
#[derive(Debug, Clone)]
pub struct ClusterDns<'a> {
    /// Its addresses.
    pub servers: &'a [IpAddr],
    /// `cluster.local`.
    pub domain: &'a str,
}

/// The resolver configuration that `dnsPolicy` and `dnsConfig` ask for; `host` is the node's.
pub fn dns(pod: &Pod, cluster: &ClusterDns<'_>, host: &DnsConfig) -> DnsConfig {
    let spec = containers::spec(pod);
    let policy = spec.dns_policy.as_deref().unwrap_or("ClusterFirst");
    let in_cluster = match policy {
        "ClusterFirstWithHostNet" => true,
        "ClusterFirst" => !containers::is_host_network(pod),
        _ => false,
    };
    let mut config = match policy {
        "None" => DnsConfig::default(),
        _ if in_cluster && !cluster.servers.is_empty() => {
            let namespace = containers::namespace(pod);
            let domain = cluster.domain;
            let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
            searches.extend(host.searches.iter().cloned());
            DnsConfig {
                servers: cluster.servers.iter().map(ToString::to_string).collect(),
                searches,
                options: vec!["ndots:5".to_owned()],
            }
        }
        _ => host.clone(),
    };
    if let Some(own) = &spec.dns_config {
        config.servers.extend(own.nameservers.iter().flatten().cloned());
        config.searches.extend(own.searches.iter().flatten().cloned());
        for option in own.options.iter().flatten() {
            let name = option.name.as_deref().unwrap_or_default();
            config.options.retain(|other| other.split(':').next() != Some(name));
            config.options.push(match &option.value {
                Some(value) => format!("{name}:{value}"),
                None => name.to_owned(),
            });
        }
    }
    dedup(&mut config.servers);
    dedup(&mut config.searches);
    config.servers.truncate(3);
    config
}

fn dedup(list: &mut Vec<String>) {
    let mut seen = std::collections::BTreeSet::new();
    list.retain(|item| seen.insert(item.clone()));
}

/// Reads a resolver configuration; what is not understood is skipped.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines() {
        let line = line.split(['#', ';']).next().unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(ToOwned::to_owned)),
            // The last search line counts; a trailing dot is only spelling.
            Some("search") => {
                config.searches =
                    words.map(|word| if word == "." { word } else { word.trim_end_matches('.') }.to_owned()).collect();
            }
            Some("options") => config.options.extend(words.map(ToOwned::to_owned)),
            _ => {}
        }
    }
    config
}

/// Writes a resolver configuration.
pub fn format_resolv_conf(config: &DnsConfig) -> String {
    let mut text = String::new();
    if !config.searches.is_empty() {
        text.push_str(&format!("search {}\n", config.searches.join(" ")));
    }
    for server in &config.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !config.options.is_empty() {
        text.push_str(&format!("options {}\n", config.options.join(" ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "web-0", "namespace": "n"}, "spec": spec}))
            .unwrap()
    }

    #[test]
    fn cluster_first_searches_the_cluster_then_the_host() {
        let servers = [IpAddr::from([10, 43, 0, 10])];
        let cluster = ClusterDns { servers: &servers, domain: "cluster.local" };
        let host = parse_resolv_conf("nameserver 1.1.1.1\nsearch example.com.\noptions edns0 # x\n");
        let config = dns(&pod(serde_json::json!({"containers": []})), &cluster, &host);
        assert_eq!(
            format_resolv_conf(&config),
            "search n.svc.cluster.local svc.cluster.local cluster.local example.com\nnameserver 10.43.0.10\noptions ndots:5\n"
        );
        let own = pod(serde_json::json!({"containers": [], "dnsPolicy": "None",
            "dnsConfig": {"nameservers": ["9.9.9.9"], "options": [{"name": "ndots", "value": "2"}]}}));
        assert_eq!(format_resolv_conf(&dns(&own, &cluster, &host)), "nameserver 9.9.9.9\noptions ndots:2\n");
        let default = pod(serde_json::json!({"containers": [], "dnsPolicy": "Default"}));
        assert_eq!(dns(&default, &cluster, &host), host);
    }

    #[test]
    fn names_follow_hostname_and_subdomain() {
        let spec = serde_json::json!({"containers": [], "subdomain": "sub", "setHostnameAsFQDN": true});
        let names = hostname(&pod(spec), "cluster.local", "node").unwrap();
        assert_eq!(names.hostname, "web-0.sub.n.svc.cluster.local");
        let hosts = pod_hosts(&[IpAddr::from([10, 42, 0, 2])], &names, &[]);
        assert!(hosts.ends_with("10.42.0.2\tweb-0.sub.n.svc.cluster.local\tweb-0\n"));
        let long = serde_json::json!({"containers": [], "subdomain": "s".repeat(60), "setHostnameAsFQDN": true});
        assert!(hostname(&pod(long), "cluster.local", "node").is_err());
    }
}
