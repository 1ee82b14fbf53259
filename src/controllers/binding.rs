//! Which volume a claim gets: the decisions of [`super::volume`], without any writing.

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};

use super::quantity::units;
use super::selector::{Labels, Selector};
use crate::scheduler::pod_info::NodeTerm;

/// On a claim: its binding is complete, and what is missing now has been lost.
pub const BIND_COMPLETED: &str = "pv.kubernetes.io/bind-completed";
/// On a claim or volume: the other side was chosen by this loop and not by a person.
pub const BOUND_BY_CONTROLLER: &str = "pv.kubernetes.io/bound-by-controller";
/// On a claim: the node that the scheduler chose for its first pod.
pub const SELECTED_NODE: &str = "volume.kubernetes.io/selected-node";
const OLD_CLASS: &str = "volume.beta.kubernetes.io/storage-class";

/// A node as volumes see it.
pub struct Place<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its labels.
    pub labels: &'a Labels,
}

/// What is to be done about a claim.
#[derive(Debug, PartialEq, Eq)]
pub enum ClaimPlan {
    /// Bind it to the volume of this name.
    Bind(String),
    /// It stays pending; nothing is to be said.
    Pending,
    /// It stays pending for this reason (event reason, message; the first is a warning when true).
    Waits(bool, &'static str, String),
    /// Nothing fits: a provisioner may make a volume.
    Provision,
    /// What it was bound to is lost (event reason, message).
    Lost(&'static str, &'static str),
}

/// What is to be done about a volume.
#[derive(Debug, PartialEq, Eq)]
pub enum VolumePlan {
    /// It has this phase.
    Phase(&'static str),
    /// It waits for its claim's own turn.
    Wait,
    /// Its claim is gone.
    Release,
    /// Its claim chose another volume: forget the claim. True: forget its name too.
    Unbind(bool),
}

/// The storage class of a claim.
pub fn class_of(claim: &PersistentVolumeClaim) -> &str {
    let old = claim.metadata.annotations.as_ref().and_then(|all| all.get(OLD_CLASS));
    let new = claim.spec.as_ref().and_then(|spec| spec.storage_class_name.as_ref());
    old.or(new).map_or("", String::as_str)
}

fn volume_class(volume: &PersistentVolume) -> &str {
    let old = volume.metadata.annotations.as_ref().and_then(|all| all.get(OLD_CLASS));
    let new = volume.spec.as_ref().and_then(|spec| spec.storage_class_name.as_ref());
    old.or(new).map_or("", String::as_str)
}

/// Whether the annotation is there.
pub fn annotated(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta, name: &str) -> bool {
    metadata.annotations.as_ref().is_some_and(|all| all.contains_key(name))
}

/// Whether a volume names this claim, by name alone or as exactly this object.
pub fn is_for(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> bool {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    reference.is_some_and(|reference| {
        reference.name == claim.metadata.name
            && reference.namespace == claim.metadata.namespace
            && reference.uid.as_deref().is_none_or(|uid| uid.is_empty() || Some(uid) == claim.metadata.uid.as_deref())
    })
}

fn request(claim: &PersistentVolumeClaim) -> i64 {
    let resources = claim.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    resources.and_then(|resources| resources.requests.as_ref()?.get("storage")).map_or(0, units)
}

fn capacity(volume: &PersistentVolume) -> i64 {
    volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()?.get("storage")).map_or(0, units)
}

/// Why the volume cannot be the claim's even if it was made for it, in upstream's words.
fn unusable(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<String> {
    let (offers, wants) = (volume.spec.as_ref()?, claim.spec.as_ref()?);
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    if volume.metadata.deletion_timestamp.is_some() {
        let name = volume.metadata.name.as_deref().unwrap_or_default();
        return Some(format!("the volume is marked for deletion {name:?}"));
    }
    let why = if capacity(volume) < request(claim) {
        "requested PV is too small"
    } else if text(&wants.volume_attributes_class_name) != text(&offers.volume_attributes_class_name) {
        "volumeAttributesClassName does not match"
    } else if mode(&wants.volume_mode) != mode(&offers.volume_mode) {
        "incompatible volumeMode"
    } else {
        return None;
    };
    Some(why.to_owned())
}

/// Why the volume cannot be the claim's, in upstream's words.
pub fn mismatch(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<String> {
    if let Some(why) = unusable(volume, claim) {
        return Some(why);
    }
    let modes = |modes: Option<&Vec<String>>| modes.cloned().unwrap_or_default();
    let offered = modes(volume.spec.as_ref().and_then(|spec| spec.access_modes.as_ref()));
    let wanted = modes(claim.spec.as_ref().and_then(|spec| spec.access_modes.as_ref()));
    let why = if volume_class(volume) != class_of(claim) {
        "storageClassName does not match"
    } else if !wanted.iter().all(|mode| offered.contains(mode)) {
        "incompatible accessMode"
    } else {
        return None;
    };
    Some(why.to_owned())
}

fn reachable(volume: &PersistentVolume, place: &Place<'_>) -> bool {
    let affinity = volume.spec.as_ref().and_then(|spec| spec.node_affinity.as_ref());
    affinity.and_then(|affinity| affinity.required.as_ref()).is_none_or(|required| {
        required.node_selector_terms.iter().any(|term| NodeTerm::new(term, 0).matches(place.name, place.labels))
    })
}

/// The volume for a claim: one that was made for it, else the smallest that fits. A claim that `waits` for its first pod
/// gets none before a place is known.
pub fn find<'a>(
    claim: &PersistentVolumeClaim,
    volumes: impl Iterator<Item = &'a PersistentVolume>,
    place: Option<&Place<'_>>,
    waits: bool,
) -> Option<&'a PersistentVolume> {
    let selector = claim.spec.as_ref().and_then(|spec| spec.selector.as_ref());
    let selector = match selector {
        None => None,
        // A selector that cannot be read selects nothing.
        some => Some(Selector::of_label_selector(some)?),
    };
    let mut best: Option<&PersistentVolume> = None;
    for volume in volumes {
        let owned = is_for(volume, claim);
        let taken = volume.spec.as_ref().is_some_and(|spec| spec.claim_ref.is_some()) && !owned;
        let unfit = taken || if owned { unusable(volume, claim).is_some() } else { mismatch(volume, claim).is_some() };
        if unfit {
            continue;
        }
        let fits = place.is_none_or(|place| reachable(volume, place));
        if owned {
            return fits.then_some(volume);
        }
        let phase = volume.status.as_ref().and_then(|status| status.phase.as_deref());
        let labels = || Labels::from_map(volume.metadata.labels.as_ref());
        if !fits
            || (waits && place.is_none())
            || phase != Some("Available")
            || selector.as_ref().is_some_and(|selector| !selector.matches(&labels()))
        {
            continue;
        }
        if best.is_none_or(|best| capacity(best) > capacity(volume)) {
            best = Some(volume);
        }
    }
    best
}

/// What is to be done about a claim. `class`: whether its storage class waits for the first pod, none when there is no
/// such class.
pub fn plan_claim(
    claim: &PersistentVolumeClaim,
    volumes: &[PersistentVolume],
    place: Option<&Place<'_>>,
    class: Option<bool>,
) -> ClaimPlan {
    let chosen = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    let by_name = |name: &str| volumes.iter().find(|volume| volume.metadata.name.as_deref() == Some(name));
    let name = |volume: &PersistentVolume| volume.metadata.name.clone().unwrap_or_default();
    if annotated(&claim.metadata, BIND_COMPLETED) {
        return plan_bound(claim, chosen, by_name(chosen));
    }
    if chosen.is_empty() {
        let waits = class == Some(true);
        return match find(claim, volumes.iter(), place, waits) {
            Some(volume) => ClaimPlan::Bind(name(volume)),
            None if waits && place.is_none() => {
                let message = "waiting for first consumer to be created before binding".to_owned();
                ClaimPlan::Waits(false, "WaitForFirstConsumer", message)
            }
            None if !class_of(claim).is_empty() => ClaimPlan::Provision,
            None => {
                let message = "no persistent volumes available for this claim and no storage class is set".to_owned();
                ClaimPlan::Waits(false, "FailedBinding", message)
            }
        };
    }
    let Some(volume) = by_name(chosen) else { return ClaimPlan::Pending };
    let owner = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    if owner.is_none() {
        return match mismatch(volume, claim) {
            Some(why) => {
                let message = format!("Cannot bind to requested volume {chosen:?}: {why}");
                ClaimPlan::Waits(true, "VolumeMismatch", message)
            }
            None => ClaimPlan::Bind(name(volume)),
        };
    }
    if is_for(volume, claim) {
        return ClaimPlan::Bind(name(volume));
    }
    ClaimPlan::Waits(true, "FailedBinding", format!("volume {chosen:?} already bound to a different claim."))
}

fn plan_bound(claim: &PersistentVolumeClaim, chosen: &str, volume: Option<&PersistentVolume>) -> ClaimPlan {
    if chosen.is_empty() {
        let message = "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!";
        return ClaimPlan::Lost("ClaimLost", message);
    }
    let Some(volume) = volume else {
        return ClaimPlan::Lost("ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!");
    };
    let owner = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    match owner.map(|owner| owner.uid.as_deref()) {
        None => ClaimPlan::Bind(chosen.to_owned()),
        Some(uid) if uid == claim.metadata.uid.as_deref() => ClaimPlan::Bind(chosen.to_owned()),
        Some(_) => {
            let message = "Two claims are bound to the same volume, this one is bound incorrectly";
            ClaimPlan::Lost("ClaimMisbound", message)
        }
    }
}

/// What is to be done about a volume, given the claim that has the name it refers to.
pub fn plan_volume(volume: &PersistentVolume, claim: Option<&PersistentVolumeClaim>) -> VolumePlan {
    let reference = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    let Some(uid) = reference.map(|reference| reference.uid.as_deref().unwrap_or_default()) else {
        return VolumePlan::Phase("Available");
    };
    if uid.is_empty() {
        return VolumePlan::Phase("Available");
    }
    let Some(claim) = claim.filter(|claim| claim.metadata.uid.as_deref() == Some(uid)) else {
        return VolumePlan::Release;
    };
    let chosen = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default();
    if chosen == volume.metadata.name.as_deref().unwrap_or_default() {
        VolumePlan::Phase("Bound")
    } else if chosen.is_empty() {
        VolumePlan::Wait
    } else {
        VolumePlan::Unbind(annotated(&volume.metadata, BOUND_BY_CONTROLLER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn volume(name: &str, size: &str, extra: Value) -> PersistentVolume {
        let mut object = json!({"metadata": {"name": name}, "status": {"phase": "Available"},
            "spec": {"capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "storageClassName": "c"}});
        json_patch::merge(&mut object, &extra);
        serde_json::from_value(object).unwrap()
    }

    fn claim(extra: Value) -> PersistentVolumeClaim {
        let mut object = json!({"metadata": {"name": "a", "namespace": "n", "uid": "u"}, "spec": {"storageClassName": "c",
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}});
        json_patch::merge(&mut object, &extra);
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn the_smallest_volume_that_fits_is_taken_and_one_made_for_the_claim_before_it() {
        let mut volumes =
            vec![volume("small", "1Gi", json!({})), volume("big", "9Gi", json!({})), volume("fit", "3Gi", json!({}))];
        assert_eq!(plan_claim(&claim(json!({})), &volumes, None, Some(false)), ClaimPlan::Bind("fit".to_owned()));
        let made = json!({"spec": {"claimRef": {"name": "a", "namespace": "n"}}});
        volumes.push(volume("made", "8Gi", made));
        volumes.push(volume("other", "2Gi", json!({"spec": {"claimRef": {"name": "b", "namespace": "n"}}})));
        assert_eq!(plan_claim(&claim(json!({})), &volumes, None, Some(false)), ClaimPlan::Bind("made".to_owned()));
        assert_eq!(plan_claim(&claim(json!({})), &volumes[..1], None, Some(false)), ClaimPlan::Provision);
        let plain = claim(json!({"spec": {"storageClassName": ""}}));
        assert!(matches!(plan_claim(&plain, &volumes[..3], None, None), ClaimPlan::Waits(false, "FailedBinding", _)));
    }

    #[test]
    fn a_claim_that_waits_for_its_pod_gets_a_volume_of_the_pods_node() {
        let term = |host: &str| {
            json!({"spec": {"nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions":
            [{"key": "host", "operator": "In", "values": [host]}]}]}}}})
        };
        let volumes = [volume("one", "2Gi", term("n1")), volume("two", "3Gi", term("n2"))];
        let waits = plan_claim(&claim(json!({})), &volumes, None, Some(true));
        assert!(matches!(waits, ClaimPlan::Waits(false, "WaitForFirstConsumer", _)));
        let labels = Labels::from_pairs([("host", "n2")]);
        let place = Place { name: "n2", labels: &labels };
        assert_eq!(
            plan_claim(&claim(json!({})), &volumes, Some(&place), Some(true)),
            ClaimPlan::Bind("two".to_owned())
        );
    }

    #[test]
    fn what_was_bound_and_is_gone_is_lost() {
        let bound = claim(json!({"metadata": {"annotations": {BIND_COMPLETED: "yes"}}, "spec": {"volumeName": "v"}}));
        assert!(matches!(plan_claim(&bound, &[], None, None), ClaimPlan::Lost("ClaimLost", _)));
        let reference = |uid: &str| json!({"spec": {"claimRef": {"name": "a", "namespace": "n", "uid": uid}}});
        assert_eq!(
            plan_claim(&bound, &[volume("v", "1Gi", reference("u"))], None, None),
            ClaimPlan::Bind("v".to_owned())
        );
        let other = plan_claim(&bound, &[volume("v", "1Gi", reference("x"))], None, None);
        assert!(matches!(other, ClaimPlan::Lost("ClaimMisbound", _)));
    }

    #[test]
    fn a_volume_follows_its_claim() {
        let reference = json!({"spec": {"claimRef": {"name": "a", "namespace": "n", "uid": "u"}}});
        let owned = volume("v", "1Gi", reference);
        assert_eq!(plan_volume(&volume("v", "1Gi", json!({})), None), VolumePlan::Phase("Available"));
        assert_eq!(plan_volume(&owned, None), VolumePlan::Release);
        let chosen = |name: &str| claim(json!({"spec": {"volumeName": name}}));
        assert_eq!(plan_volume(&owned, Some(&chosen("v"))), VolumePlan::Phase("Bound"));
        assert_eq!(plan_volume(&owned, Some(&chosen("w"))), VolumePlan::Unbind(false));
        let again = claim(json!({"metadata": {"uid": "later"}}));
        assert_eq!(plan_volume(&owned, Some(&again)), VolumePlan::Release);
    }
}
