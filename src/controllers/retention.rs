//! Who owns the claims of a StatefulSet's pods, by its `persistentVolumeClaimRetentionPolicy`: the garbage collector
//! deletes them with their owner.

use k8s_openapi::api::apps::v1::StatefulSetSpec;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;

/// What happens to claims when the set goes, and when it shrinks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// They go with the set.
    pub with_set: bool,
    /// They go with a pod that is scaled away.
    pub with_pod: bool,
}

impl Retention {
    /// The policy of a set; everything is kept without one.
    pub fn of(spec: &StatefulSetSpec) -> Retention {
        let policy = spec.persistent_volume_claim_retention_policy.as_ref();
        let deletes = |rule: Option<&String>| rule.is_some_and(|rule| rule == "Delete");
        Retention {
            with_set: deletes(policy.and_then(|policy| policy.when_deleted.as_ref())),
            with_pod: deletes(policy.and_then(|policy| policy.when_scaled.as_ref())),
        }
    }

    /// The owners that a claim should have; none when it has them. `scaled_away`: its pod is beyond the set's range.
    pub fn owners(
        self,
        present: &[OwnerReference],
        set: &OwnerReference,
        pod: &OwnerReference,
        scaled_away: bool,
    ) -> Option<Vec<OwnerReference>> {
        let same = |one: &OwnerReference, other: &OwnerReference| one.kind == other.kind && one.name == other.name;
        // Owned by an earlier set or pod of the name, which is going: the claim goes too.
        let stale = |owner: &OwnerReference| {
            (same(owner, set) && owner.uid != set.uid) || (same(owner, pod) && owner.uid != pod.uid)
        };
        if present.iter().any(stale) {
            return None;
        }
        let ours = |owner: &OwnerReference| owner.uid == set.uid || owner.uid == pod.uid;
        let mut wanted: Vec<OwnerReference> = present.iter().filter(|owner| !ours(owner)).cloned().collect();
        // Somebody else controls it: we own no part of it.
        if !wanted.iter().any(|owner| owner.controller == Some(true)) {
            if self.with_pod && scaled_away {
                wanted.push(pod.clone());
            } else if self.with_set {
                wanted.push(set.clone());
            }
        }
        (wanted != present).then_some(wanted)
    }
}

/// A claim whose owner is an earlier pod of this name goes with it: a new pod has to wait for a new claim.
pub fn is_going(owners: &[OwnerReference], pod: &str, uid: Option<&str>) -> bool {
    owners.iter().any(|owner| owner.kind == "Pod" && owner.name == pod && Some(owner.uid.as_str()) != uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(kind: &str, uid: &str) -> OwnerReference {
        OwnerReference { kind: kind.to_owned(), name: "a".to_owned(), uid: uid.to_owned(), ..OwnerReference::default() }
    }

    #[test]
    fn claims_belong_to_what_takes_them_along() {
        let (set, pod) = (owner("StatefulSet", "s"), owner("Pod", "p"));
        let owners = |with_set, with_pod, present: &[OwnerReference], scaled_away| {
            Retention { with_set, with_pod }.owners(present, &set, &pod, scaled_away)
        };
        assert_eq!(owners(false, false, &[], true), None);
        assert_eq!(owners(false, false, std::slice::from_ref(&set), false), Some(vec![]));
        assert_eq!(owners(true, false, &[], true), Some(vec![set.clone()]));
        assert_eq!(owners(false, true, &[], true), Some(vec![pod.clone()]));
        assert_eq!(owners(false, true, std::slice::from_ref(&pod), false), Some(vec![]));
        assert_eq!(owners(true, true, std::slice::from_ref(&set), true), Some(vec![pod.clone()]));
        assert_eq!(owners(true, true, std::slice::from_ref(&pod), false), Some(vec![set.clone()]));
        assert_eq!(owners(true, true, std::slice::from_ref(&set), false), None);
    }

    #[test]
    fn what_belongs_to_others_is_left_alone() {
        let (set, pod) = (owner("StatefulSet", "s"), owner("Pod", "p"));
        let other = OwnerReference { controller: Some(true), ..owner("Database", "d") };
        let all = Retention { with_set: true, with_pod: true };
        assert_eq!(all.owners(std::slice::from_ref(&other), &set, &pod, false), None);
        assert_eq!(all.owners(&[owner("StatefulSet", "earlier")], &set, &pod, false), None);
        assert!(is_going(&[owner("Pod", "earlier")], "a", None) && !is_going(&[pod], "a", Some("p")));
    }
}
