//! Settings that all servers of a cluster share: any of them may lead, and what it does must not depend on which.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::server::Settings;

/// What servers compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Agreement {
    /// Address range of pods.
    pub cluster_cidr: String,
    /// Address range of Services.
    pub service_cidr: String,
    /// Ports of NodePort Services.
    pub service_node_port_range: String,
    /// Address of the cluster DNS.
    pub cluster_dns: IpAddr,
    /// DNS domain.
    pub cluster_domain: String,
}

impl Agreement {
    /// What this server was told.
    pub fn of(settings: &Settings) -> Agreement {
        Agreement {
            cluster_cidr: settings.cluster_cidr.to_string(),
            service_cidr: settings.service_cidr.to_string(),
            service_node_port_range: format!("{}-{}", settings.node_ports.start(), settings.node_ports.end()),
            cluster_dns: settings.cluster_dns,
            cluster_domain: settings.cluster_domain.clone(),
        }
    }

    /// Each flag in which a joiner differs, with both values.
    pub fn differences(&self, joiner: &Agreement) -> Vec<String> {
        let pairs = [
            ("cluster-cidr", self.cluster_cidr.clone(), joiner.cluster_cidr.clone()),
            ("service-cidr", self.service_cidr.clone(), joiner.service_cidr.clone()),
            ("service-node-port-range", self.service_node_port_range.clone(), joiner.service_node_port_range.clone()),
            ("cluster-dns", self.cluster_dns.to_string(), joiner.cluster_dns.to_string()),
            ("cluster-domain", self.cluster_domain.clone(), joiner.cluster_domain.clone()),
        ];
        let differ = pairs.into_iter().filter(|(_, cluster, joiner)| cluster != joiner);
        differ
            .map(|(flag, cluster, joiner)| format!("--{flag}: the cluster has {cluster}, this server {joiner}"))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_named_with_both_values() {
        let cluster = Agreement {
            cluster_cidr: "10.42.0.0/16".into(),
            service_cidr: "10.43.0.0/16".into(),
            service_node_port_range: "30000-32767".into(),
            cluster_dns: "10.43.0.10".parse().unwrap(),
            cluster_domain: "cluster.local".into(),
        };
        assert!(cluster.differences(&cluster).is_empty());
        let joiner =
            Agreement { cluster_cidr: "10.50.0.0/16".into(), cluster_domain: "example.org".into(), ..cluster.clone() };
        assert_eq!(
            cluster.differences(&joiner),
            [
                "--cluster-cidr: the cluster has 10.42.0.0/16, this server 10.50.0.0/16",
                "--cluster-domain: the cluster has cluster.local, this server example.org",
            ]
        );
    }
}
