//! What every cluster has from its first second: system namespaces, priority classes, the `default/kubernetes` Service and that
//! of the cluster DNS. Written through the API like anything else.

use std::net::IpAddr;

use anyhow::Context;
use http::{Method, Request};
use serde_json::{Value, json};

use super::Settings;

/// The namespaces that upstream's API server makes.
pub const NAMESPACES: [&str; 4] = ["default", "kube-system", "kube-public", "kube-node-lease"];

/// Makes the system namespaces; everything else needs them.
pub async fn namespaces(client: &kube::Client) -> anyhow::Result<()> {
    for name in NAMESPACES {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        create(client, "/api/v1/namespaces", object).await?;
    }
    Ok(())
}

/// Makes what is missing. Repeatable. What is behind the `kubernetes` Service is [`super::live`]'s to write.
pub async fn ensure(client: &kube::Client, settings: &Settings) -> anyhow::Result<()> {
    for (name, value, what) in [
        (
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
        (
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
    ] {
        let object = json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "description": what,
        });
        create(client, "/apis/scheduling.k8s.io/v1/priorityclasses", object).await?;
    }
    let range = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": settings.service_cidr.iter().map(ToString::to_string).collect::<Vec<_>>()},
    });
    create(client, "/apis/networking.k8s.io/v1/servicecidrs", range).await?;
    if let Some(address) = super::service_network(settings).first() {
        kubernetes_service(client, settings, address).await?;
    }
    if settings.dns {
        dns_service(client, &settings.cluster_dns).await?;
    }
    Ok(())
}

async fn kubernetes_service(client: &kube::Client, settings: &Settings, service_ip: IpAddr) -> anyhow::Result<()> {
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let ports = json!([{"name": "https", "port": 443, "protocol": "TCP", "targetPort": settings.port}]);
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {
            "type": "ClusterIP", "clusterIP": service_ip.to_string(), "clusterIPs": [service_ip.to_string()],
            "sessionAffinity": "None", "ports": ports,
        },
    });
    create(client, "/api/v1/namespaces/default/services", service).await
}

/// Has no selector: the responder of every node answers on the address itself.
async fn dns_service(client: &kube::Client, addresses: &[IpAddr]) -> anyhow::Result<()> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": "kube-dns", "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": addresses.first(), "clusterIPs": addresses,
            "ipFamilyPolicy": if addresses.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
            ],
        },
    });
    create(client, "/api/v1/namespaces/kube-system/services", service).await
}

async fn send(client: &kube::Client, method: Method, path: &str, body: &Value) -> Result<Value, kube::Error> {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(serde_json::to_vec(body).unwrap_or_default())
        .map_err(kube::Error::HttpError)?;
    client.request(request).await
}

/// Reads an object; none when it is not there.
///
/// # Errors
/// The API does not answer.
pub async fn get(client: &kube::Client, path: &str) -> anyhow::Result<Option<Value>> {
    let request = Request::get(path).body(Vec::new())?;
    match client.request::<Value>(request).await {
        Ok(object) => Ok(Some(object)),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(e) => Err(e).with_context(|| format!("read {path}")),
    }
}

/// Deletes an object; one that is gone is fine.
///
/// # Errors
/// The API refuses or does not answer.
pub async fn delete(client: &kube::Client, path: &str) -> anyhow::Result<()> {
    let request = Request::delete(path).body(Vec::new())?;
    match client.request::<Value>(request).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(e) => Err(e).with_context(|| format!("delete {path}")),
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// Creates an object; one that is there stays as it is.
async fn create(client: &kube::Client, collection: &str, object: Value) -> anyhow::Result<()> {
    let path = format!("{collection}/{}", name(&object));
    if get(client, &path).await?.is_some() {
        return Ok(());
    }
    match send(client, Method::POST, collection, &object).await {
        Ok(_) => Ok(()),
        Err(e) if is_conflict(&e) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("create {path}")),
    }
}

/// Creates an object or replaces it.
///
/// # Errors
/// The API refuses or does not answer.
pub async fn put(client: &kube::Client, collection: &str, object: Value) -> anyhow::Result<()> {
    match send(client, Method::POST, collection, &object).await {
        Ok(_) => Ok(()),
        Err(e) if is_conflict(&e) => {
            let path = format!("{collection}/{}", name(&object));
            let replaced = send(client, Method::PUT, &path, &object).await;
            replaced.map(|_| ()).with_context(|| format!("update {path}"))
        }
        Err(e) => Err(e).with_context(|| format!("create {collection}/{}", name(&object))),
    }
}
