//! Settings that all servers of a cluster share: any of them may lead, and what it does must not depend on which.

use std::net::IpAddr;

use coracle_agent::net::Backend;
use serde::{Deserialize, Serialize};

use crate::server::Settings;

/// What servers compare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Agreement {
    /// Address ranges of pods.
    pub cluster_cidr: Vec<String>,
    /// Address ranges of Services.
    pub service_cidr: Vec<String>,
    /// How pods of different nodes reach each other.
    pub flannel_backend: Backend,
    /// Ports of NodePort Services.
    pub service_node_port_range: String,
    /// Addresses of the cluster DNS.
    pub cluster_dns: Vec<IpAddr>,
    /// DNS domain.
    pub cluster_domain: String,
}

impl Agreement {
    /// What this server was told.
    pub fn of(settings: &Settings) -> Agreement {
        Agreement {
            cluster_cidr: texts(&settings.cluster_cidr),
            service_cidr: texts(&settings.service_cidr),
            flannel_backend: settings.backend,
            service_node_port_range: format!("{}-{}", settings.node_ports.start(), settings.node_ports.end()),
            cluster_dns: settings.cluster_dns.clone(),
            cluster_domain: settings.cluster_domain.clone(),
        }
    }

    /// Each flag in which a joiner differs, with both values.
    pub fn differences(&self, joiner: &Agreement) -> Vec<String> {
        let pairs = [
            ("cluster-cidr", self.cluster_cidr.join(","), joiner.cluster_cidr.join(",")),
            ("service-cidr", self.service_cidr.join(","), joiner.service_cidr.join(",")),
            ("flannel-backend", self.flannel_backend.to_string(), joiner.flannel_backend.to_string()),
            ("service-node-port-range", self.service_node_port_range.clone(), joiner.service_node_port_range.clone()),
            ("cluster-dns", texts(&self.cluster_dns).join(","), texts(&joiner.cluster_dns).join(",")),
            ("cluster-domain", self.cluster_domain.clone(), joiner.cluster_domain.clone()),
        ];
        let differ = pairs.into_iter().filter(|(_, cluster, joiner)| cluster != joiner);
        differ
            .map(|(flag, cluster, joiner)| format!("--{flag}: the cluster has {cluster}, this server {joiner}"))
            .collect()
    }
}

fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_named_with_both_values() {
        let cluster = Agreement {
            cluster_cidr: vec!["10.42.0.0/16".into()],
            service_cidr: vec!["10.43.0.0/16".into()],
            flannel_backend: Backend::Vxlan,
            service_node_port_range: "30000-32767".into(),
            cluster_dns: vec!["10.43.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
        };
        assert!(cluster.differences(&cluster).is_empty());
        let joiner = Agreement {
            cluster_cidr: vec!["10.50.0.0/16".into()],
            cluster_domain: "example.org".into(),
            ..cluster.clone()
        };
        assert_eq!(
            cluster.differences(&joiner),
            [
                "--cluster-cidr: the cluster has 10.42.0.0/16, this server 10.50.0.0/16",
                "--cluster-domain: the cluster has cluster.local, this server example.org",
            ]
        );
    }
}
