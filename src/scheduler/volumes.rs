//! Whether a pod's volumes can be used on a node (the part of upstream's VolumeBinding that needs no provisioner).

use super::filter::{Plugin, Rejection};
use super::pod_info::PodInfo;
use super::world::{Claim, Node, Volume, World};
use crate::controllers::object::Key;

fn claims<'a>(pod: &'a PodInfo) -> impl Iterator<Item = Key> + 'a {
    let names = pod.rules.iter().flat_map(|rules| &rules.claims);
    names.map(|name| Key::new(pod.key.namespace(), name))
}

/// What keeps the pod from any node at all, in upstream's words.
pub fn obstacle(world: &World, pod: &PodInfo) -> Option<String> {
    for key in claims(pod) {
        let Some(claim) = world.claims.get(&key) else {
            return Some(format!("persistentvolumeclaim \"{}\" not found", key.name()));
        };
        if claim.deleting {
            return Some(format!("persistentvolumeclaim \"{}\" is being deleted", key.name()));
        }
        if !claim.bound && !waits(world, claim) {
            return Some("pod has unbound immediate PersistentVolumeClaims".to_owned());
        }
    }
    None
}

fn waits(world: &World, claim: &Claim) -> bool {
    world.classes.get(&claim.class).is_some_and(|(waits, _)| *waits)
}

/// Whether the volumes of bound claims are reachable from the node and the others can still be bound there.
pub fn check(world: &World, pod: &PodInfo, node: &Node) -> Result<(), Rejection> {
    let reject = |reason| Err(Rejection::new(Plugin::VolumeBinding, reason, true));
    for key in claims(pod) {
        let Some(claim) = world.claims.get(&key) else { continue };
        if claim.bound {
            let Some(volume) = world.volumes.get(&claim.volume) else {
                return reject("node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)");
            };
            if !reachable(volume, node) {
                return reject("node(s) didn't match PersistentVolume's node affinity");
            }
        } else if !bindable(world, &key, claim, node) {
            return reject("node(s) didn't find available persistent volumes to bind");
        }
    }
    Ok(())
}

fn reachable(volume: &Volume, node: &Node) -> bool {
    volume.affinity.as_ref().is_none_or(|terms| terms.iter().any(|term| term.matches(&node.name, &node.labels)))
}

fn bindable(world: &World, key: &Key, claim: &Claim, node: &Node) -> bool {
    let provisions = world.classes.get(&claim.class).is_some_and(|(_, provisions)| *provisions);
    provisions
        || world.volumes.values().any(|volume| {
            volume.class == claim.class
                && volume.claim.as_ref().is_none_or(|owner| owner == key)
                && volume.capacity >= claim.request
                && claim.modes.iter().all(|mode| volume.modes.contains(mode))
                && reachable(volume, node)
        })
}

/// Claims that wait for the scheduler's choice of a node.
pub fn waiting(world: &World, pod: &PodInfo) -> Vec<Key> {
    claims(pod).filter(|key| world.claims.get(key).is_some_and(|claim| !claim.bound && waits(world, claim))).collect()
}
