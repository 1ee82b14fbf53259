//! Environment variables that name the Services a container can reach, as Docker links did.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::api::{ApiClient, ApiResult};
use super::reads::Reads;

/// The part of a Service that its variables need.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServiceFacts {
    metadata: Meta,
    #[serde(default)]
    spec: Spec,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Meta {
    name: String,
    namespace: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "clusterIP")]
    cluster_ip: String,
    ports: Vec<Port>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Port {
    #[serde(default)]
    name: String,
    #[serde(default = "tcp")]
    protocol: String,
    port: u16,
}

fn tcp() -> String {
    "TCP".to_owned()
}

#[derive(Deserialize)]
struct List {
    #[serde(default)]
    items: Option<Vec<ServiceFacts>>,
}

/// The Services whose variables a pod of `namespace` gets; those of last time while no server answers.
///
/// # Errors
/// When the API does not answer and there was no last time.
pub async fn fetch(reads: &Reads, namespace: &str, links: bool) -> ApiResult<Vec<ServiceFacts>> {
    let kept = format!("services/{namespace}/{links}");
    match ask(&reads.api, namespace, links).await {
        Ok(services) => {
            reads.keep(&kept, &services).await;
            Ok(services)
        }
        Err(error) if error.is_no_answer() => reads.recall(&kept).await.ok_or(error),
        Err(error) => Err(error),
    }
}

async fn ask(api: &ApiClient, namespace: &str, links: bool) -> ApiResult<Vec<ServiceFacts>> {
    let mut services = Vec::new();
    if links {
        let list: List = api.get(&format!("/api/v1/namespaces/{namespace}/services")).await?;
        services.extend(list.items.unwrap_or_default());
    }
    if namespace != "default" || !links {
        match api.get("/api/v1/namespaces/default/services/kubernetes").await {
            Ok(service) => services.push(service),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(services)
}

/// The variables of `services`: those of the pod's own namespace when `links` is on, and `default/kubernetes` always
/// (unless a Service of the same name in the namespace takes its place).
pub fn service_environment(services: &[ServiceFacts], namespace: &str, links: bool) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<&str, &ServiceFacts> = BTreeMap::new();
    for service in services.iter().filter(|service| has_address(service)) {
        let meta = &service.metadata;
        if meta.namespace == namespace && links {
            chosen.insert(&meta.name, service);
        } else if meta.namespace == "default" && meta.name == "kubernetes" {
            chosen.entry(&meta.name).or_insert(service);
        }
    }
    let mut variables = BTreeMap::new();
    for service in chosen.values() {
        add(service, &mut variables);
    }
    variables
}

fn has_address(service: &ServiceFacts) -> bool {
    !service.spec.cluster_ip.is_empty() && service.spec.cluster_ip != "None" && !service.spec.ports.is_empty()
}

fn constant_case(name: &str) -> String {
    name.to_ascii_uppercase().replace('-', "_")
}

fn add(service: &ServiceFacts, variables: &mut BTreeMap<String, String>) {
    let name = constant_case(&service.metadata.name);
    let address = &service.spec.cluster_ip;
    let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
    variables.insert(format!("{name}_SERVICE_HOST"), address.clone());
    for (index, port) in service.spec.ports.iter().enumerate() {
        let protocol = port.protocol.to_ascii_lowercase();
        let url = format!("{protocol}://{host}:{}", port.port);
        if index == 0 {
            variables.insert(format!("{name}_SERVICE_PORT"), port.port.to_string());
            variables.insert(format!("{name}_PORT"), url.clone());
        }
        if !port.name.is_empty() {
            variables.insert(format!("{name}_SERVICE_PORT_{}", constant_case(&port.name)), port.port.to_string());
        }
        let prefix = format!("{name}_PORT_{}_{}", port.port, port.protocol.to_ascii_uppercase());
        variables.insert(format!("{prefix}_PROTO"), protocol);
        variables.insert(format!("{prefix}_PORT"), port.port.to_string());
        variables.insert(format!("{prefix}_ADDR"), address.clone());
        variables.insert(prefix, url);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_named_as_docker_links() {
        let services: Vec<ServiceFacts> = serde_json::from_value(serde_json::json!([
            {"metadata": {"name": "kubernetes", "namespace": "default"}, "spec": {"clusterIP": "10.43.0.1", "ports": [{"name": "https", "port": 443}]}},
            {"metadata": {"name": "my-web", "namespace": "n"}, "spec": {"clusterIP": "10.43.0.2", "ports": [{"port": 80, "protocol": "TCP"}]}},
            {"metadata": {"name": "headless", "namespace": "n"}, "spec": {"clusterIP": "None", "ports": [{"port": 80}]}}
        ]))
        .unwrap();
        let variables = service_environment(&services, "n", true);
        assert_eq!(variables["MY_WEB_SERVICE_HOST"], "10.43.0.2");
        assert_eq!(variables["MY_WEB_PORT_80_TCP"], "tcp://10.43.0.2:80");
        assert_eq!(variables["KUBERNETES_SERVICE_PORT_HTTPS"], "443");
        assert!(variables.keys().all(|key| !key.starts_with("HEADLESS")));
        assert!(service_environment(&services, "n", false).keys().all(|key| key.starts_with("KUBERNETES_")));
    }
}
