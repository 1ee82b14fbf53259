//! The endpoints of `default/kubernetes` are the servers: every live one writes itself there.

use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use std::collections::BTreeMap;
use tokio_util::sync::CancellationToken;

use super::list::ServerList;
use crate::watch::{Event, Target, Watcher};

/// Follows the slices into the list until shutdown.
pub async fn run(client: kube::Client, list: ServerList, shutdown: CancellationToken) {
    let target = Target::all("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices")
        .with_labels("kubernetes.io/service-name=kubernetes");
    let mut watcher = Watcher::new(client, target);
    let mut slices: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let mut synced = false;
    loop {
        let event = tokio::select! {
            event = watcher.next() => event,
            () = shutdown.cancelled() => return,
        };
        match event {
            Event::Restarted => {
                slices.clear();
                synced = false;
            }
            Event::Synced => synced = true,
            Event::Applied(object) => match serde_json::from_slice(&object.json) {
                Ok(slice) => drop(slices.insert(object.name, addresses(&slice))),
                Err(error) => tracing::warn!(%error, name = object.name, "endpoints of the API not understood"),
            },
            Event::Deleted(object) => drop(slices.remove(&object.name)),
        }
        if synced {
            list.learn(slices.values().flatten().cloned().collect());
        }
    }
}

/// `host:port` of the ready endpoints.
fn addresses(slice: &EndpointSlice) -> Vec<String> {
    let ports = slice.ports.iter().flatten();
    let port = ports.filter(|port| port.name.as_deref() == Some("https")).find_map(|port| port.port);
    let Some(port) = port.and_then(|port| u16::try_from(port).ok()) else { return Vec::new() };
    let ready = slice
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.ready) != Some(false));
    let ips = ready.flat_map(|endpoint| &endpoint.addresses).filter_map(|text| text.parse::<IpAddr>().ok());
    ips.map(|ip| SocketAddr::new(ip, port).to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ready_endpoints_are_servers() {
        let slice: EndpointSlice = serde_json::from_value(json!({
            "addressType": "IPv6", "ports": [{"name": "https", "port": 6443}],
            "endpoints": [
                {"addresses": ["fd00::1"]},
                {"addresses": ["fd00::2"], "conditions": {"ready": false}},
                {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
            ],
        }))
        .unwrap();
        assert_eq!(addresses(&slice), ["[fd00::1]:6443", "10.0.0.1:6443"]);
    }
}
