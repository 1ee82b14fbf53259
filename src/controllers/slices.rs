//! EndpointSlices of one manager: which are to be made, changed and deleted for the endpoints that are wanted, and the
//! writing of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::api::{Api, ApiError};
use super::informer::{Informer, Subscription};
use super::object::Key;
use super::queue::Queue;
use super::resource::ENDPOINT_SLICES;

/// Endpoints of one slice.
const MAX_ENDPOINTS: usize = 100;
/// Label that names the Service of a slice.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label that names the manager of a slice.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Label of what belongs to a Service without an address.
pub const HEADLESS: &str = "service.kubernetes.io/headless";

/// Asks for the Service of a slice that is ours.
pub fn enqueue_service_of_slice(queue: &Arc<Queue>, slices: &Arc<Informer>, manager: &'static str) -> Subscription {
    let queue = queue.clone();
    slices.subscribe(move |delta| {
        for slice in delta.states().filter(|slice| slice.labels.get(MANAGED_BY) == Some(manager)) {
            if let Some(service) = slice.labels.get(SERVICE_NAME) {
                queue.add(Key::new(slice.key.namespace(), service));
            }
        }
    })
}

/// The slices that one manager keeps.
pub struct Slices {
    /// Writes them.
    pub api: Api,
    /// All slices.
    pub slices: Arc<Informer>,
    /// The manager, as its slices' label says.
    pub manager: &'static str,
}

impl Slices {
    /// The manager's slices of a Service.
    pub fn of(&self, service: &Key) -> Result<Vec<EndpointSlice>, serde_json::Error> {
        let cached = self.slices.read();
        let own = cached.namespace(service.namespace()).filter(|slice| {
            slice.labels.get(SERVICE_NAME) == Some(service.name())
                && slice.labels.get(MANAGED_BY) == Some(self.manager)
                && slice.deleting.is_none()
        });
        own.map(|slice| slice.decode()).collect()
    }

    /// Writes the changes; new slices first, so that no endpoint is missing in between.
    pub async fn apply(&self, namespace: &str, changes: Changes) -> Result<(), ApiError> {
        for slice in &changes.create {
            self.api.create(&ENDPOINT_SLICES, namespace, slice).await?;
        }
        for slice in &changes.update {
            self.api.update(&ENDPOINT_SLICES, &Key::new(namespace, name(slice)), "", slice).await?;
        }
        for name in &changes.delete {
            let key = Key::new(namespace, name);
            if let Some(slice) = self.slices.get(&key) {
                self.api.delete(&ENDPOINT_SLICES, &key, &slice.uid).await?;
            }
        }
        Ok(())
    }
}

/// What is to be done about slices.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    /// New slices.
    pub create: Vec<EndpointSlice>,
    /// Changed slices.
    pub update: Vec<EndpointSlice>,
    /// Names of slices that go.
    pub delete: Vec<String>,
}

/// The endpoints wanted for one set of ports.
pub struct Group {
    /// The ports.
    pub ports: Vec<EndpointPort>,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
}

/// Plans the slices of one address family: existing ones keep what they hold, changes touch as few as possible.
/// `skeleton` is an empty slice as a new one should begin.
pub fn plan(skeleton: &EndpointSlice, groups: Vec<Group>, existing: Vec<EndpointSlice>) -> Changes {
    let mut changes = Changes::default();
    let mut rest = existing;
    let groups = if groups.iter().all(|group| group.endpoints.is_empty()) && groups.len() <= 1 {
        // Without endpoints one empty slice says so.
        groups.into_iter().chain([Group { ports: Vec::new(), endpoints: Vec::new() }]).take(1).collect()
    } else {
        groups
    };
    for group in groups {
        let (own, others): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|slice| port_key(slice.ports.as_deref()) == port_key(Some(&group.ports)));
        rest = others;
        plan_group(skeleton, group, own, &mut changes);
    }
    // Rather than deleting a slice and creating another, the one becomes the other.
    for slice in rest {
        match changes.create.pop() {
            Some(new) => changes.update.push(EndpointSlice { metadata: renewed(&slice, skeleton), ..new }),
            None => changes.delete.push(name(&slice).to_owned()),
        }
    }
    changes
}

fn plan_group(skeleton: &EndpointSlice, group: Group, existing: Vec<EndpointSlice>, changes: &mut Changes) {
    let keeps_empty = group.endpoints.is_empty();
    let mut wanted: BTreeMap<String, Endpoint> =
        group.endpoints.into_iter().map(|endpoint| (endpoint_key(&endpoint), endpoint)).collect();
    let mut slices: Vec<(EndpointSlice, bool)> = Vec::new();
    for mut slice in existing {
        let before = std::mem::take(&mut slice.endpoints);
        slice.endpoints = before.iter().filter_map(|endpoint| wanted.remove(&endpoint_key(endpoint))).collect();
        let mut changed = slice.endpoints != before;
        if !labels_correct(&slice, skeleton) {
            slice.metadata = renewed(&slice, skeleton);
            changed = true;
        }
        slices.push((slice, changed));
    }
    let mut wanted: Vec<Endpoint> = wanted.into_values().collect();
    slices.sort_by_key(|(slice, changed)| (!changed, std::cmp::Reverse(slice.endpoints.len())));
    for (slice, changed) in &mut slices {
        let room = MAX_ENDPOINTS.saturating_sub(slice.endpoints.len()).min(wanted.len());
        if room > 0 {
            slice.endpoints.extend(wanted.drain(..room));
            *changed = true;
        }
    }
    while !wanted.is_empty() {
        let endpoints = wanted.drain(..wanted.len().min(MAX_ENDPOINTS)).collect();
        changes.create.push(EndpointSlice { ports: Some(group.ports.clone()), endpoints, ..skeleton.clone() });
    }
    let mut kept = 0;
    for (slice, changed) in slices {
        let last = keeps_empty && kept == 0;
        if slice.endpoints.is_empty() && !last {
            changes.delete.push(name(&slice).to_owned());
            continue;
        }
        kept += 1;
        if changed {
            changes.update.push(slice);
        }
    }
    if keeps_empty && kept == 0 {
        changes.create.push(EndpointSlice { ports: Some(group.ports), ..skeleton.clone() });
    }
}

/// Its name.
pub fn name(slice: &EndpointSlice) -> &str {
    slice.metadata.name.as_deref().unwrap_or_default()
}

fn endpoint_key(endpoint: &Endpoint) -> String {
    let uid = endpoint.target_ref.as_ref().and_then(|target| target.uid.as_deref()).unwrap_or_default();
    format!("{}/{uid}", endpoint.addresses.first().map_or("", String::as_str))
}

fn port_key(ports: Option<&[EndpointPort]>) -> BTreeSet<String> {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    ports
        .unwrap_or_default()
        .iter()
        .map(|port| {
            let number = port.port.map(|number| number.to_string()).unwrap_or_default();
            format!("{}/{}/{number}/{}", text(&port.name), text(&port.protocol), text(&port.app_protocol))
        })
        .collect()
}

fn labels_correct(slice: &EndpointSlice, skeleton: &EndpointSlice) -> bool {
    slice.metadata.labels.clone().unwrap_or_default() == skeleton.metadata.labels.clone().unwrap_or_default()
}

fn renewed(slice: &EndpointSlice, skeleton: &EndpointSlice) -> ObjectMeta {
    ObjectMeta { labels: skeleton.metadata.labels.clone(), ..slice.metadata.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(range: std::ops::Range<usize>) -> Vec<Endpoint> {
        range
            .map(|index| Endpoint {
                addresses: vec![format!("10.0.{}.{}", index / 250, index % 250)],
                ..Endpoint::default()
            })
            .collect()
    }

    fn ports(number: i32) -> Vec<EndpointPort> {
        vec![EndpointPort { port: Some(number), ..EndpointPort::default() }]
    }

    fn slice(name: &str, number: i32, endpoints: Vec<Endpoint>) -> EndpointSlice {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        EndpointSlice { metadata, ports: Some(ports(number)), endpoints, ..EndpointSlice::default() }
    }

    fn planned(groups: Vec<Group>, existing: Vec<EndpointSlice>) -> Changes {
        plan(&EndpointSlice::default(), groups, existing)
    }

    #[test]
    fn a_service_without_endpoints_has_one_empty_slice() {
        let first = planned(vec![], vec![]);
        assert_eq!((first.create.len(), first.create[0].endpoints.len()), (1, 0));
        let empty = EndpointSlice { ports: None, ..slice("e", 0, vec![]) };
        assert_eq!(planned(vec![], vec![empty.clone()]), Changes::default());
        let filled = planned(vec![Group { ports: ports(80), endpoints: endpoints(0..1) }], vec![empty]);
        assert_eq!((filled.create.len(), filled.delete.len(), filled.update.len()), (0, 0, 1));
        assert_eq!((name(&filled.update[0]), filled.update[0].ports.clone()), ("e", Some(ports(80))));
    }

    #[test]
    fn many_endpoints_are_split_and_later_ones_fill_what_has_room() {
        let group = |count| vec![Group { ports: ports(80), endpoints: endpoints(0..count) }];
        let created = planned(group(250), vec![]);
        assert_eq!(created.create.iter().map(|slice| slice.endpoints.len()).collect::<Vec<_>>(), [100, 100, 50]);
        let existing = vec![slice("full", 80, endpoints(0..100)), slice("half", 80, endpoints(100..150))];
        let grown = planned(group(160), existing.clone());
        assert_eq!((grown.create.len(), grown.update.len()), (0, 1));
        assert_eq!((name(&grown.update[0]), grown.update[0].endpoints.len()), ("half", 60));
        let shrunk = planned(group(100), existing);
        assert_eq!((shrunk.delete, shrunk.update.len()), (vec!["half".to_owned()], 0));
    }
}
