//! Rows of upstream's tables of Services with one and two families.

use super::*;

const ONE: &[&str] = &[V4];
const BOTH: &[&str] = &[V4, V6];
const SIX_FIRST: &[&str] = &[V6, V4];

/// What the strategy makes of a spec, or the texts of its faults.
fn written(mut spec: Value, old: Option<&Value>, cluster: &[&'static str]) -> Result<Value, Vec<String>> {
    spec.as_object_mut().unwrap().entry("type").or_insert(json!("ClusterIP"));
    if let Some(old) = old {
        keep_addresses(spec.as_object_mut().unwrap(), old);
    }
    synchronize(&mut spec, old);
    let texts = |errors: ErrorList| errors.iter().map(ToString::to_string).collect::<Vec<_>>();
    init(&mut spec, old, cluster).map_err(texts)?;
    let once = spec.clone();
    init(&mut spec, old, cluster).map_err(texts)?;
    assert_eq!(once, spec, "doing it twice changes nothing");
    let faults = old.map(|old| transition(&spec, old)).unwrap_or_default();
    if faults.is_empty() { Ok(spec) } else { Err(texts(faults)) }
}

fn families(spec: Result<Value, Vec<String>>) -> (String, Vec<String>) {
    let spec = spec.unwrap();
    let all = list(&spec, "/ipFamilies").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    (policy(&spec).to_owned(), all)
}

fn fault(spec: Result<Value, Vec<String>>) -> String {
    spec.unwrap_err().join("; ")
}

fn pair(policy: &str, all: &[&str]) -> (String, Vec<String>) {
    (policy.to_owned(), all.iter().map(|family| (*family).to_owned()).collect())
}

#[test]
fn a_new_service_gets_the_families_that_its_policy_asks_for() {
    let new = |spec, cluster| families(written(spec, None, cluster));
    assert_eq!(new(json!({}), BOTH), pair(SINGLE, &[V4]));
    assert_eq!(new(json!({}), SIX_FIRST), pair(SINGLE, &[V6]));
    assert_eq!(new(json!({"ipFamilyPolicy": "PreferDualStack"}), ONE), pair("PreferDualStack", &[V4]));
    assert_eq!(new(json!({"ipFamilyPolicy": "PreferDualStack"}), BOTH), pair("PreferDualStack", &[V4, V6]));
    let six = json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]});
    assert_eq!(new(six, BOTH), pair("RequireDualStack", &[V6, V4]));
    assert_eq!(new(json!({"ipFamilies": ["IPv6"]}), BOTH), pair(SINGLE, &[V6]));
    assert_eq!(new(json!({"clusterIP": "fd43::9"}), BOTH), pair(SINGLE, &[V6]));
    let two =
        json!({"clusterIP": "fd43::9", "clusterIPs": ["fd43::9", "10.0.0.9"], "ipFamilyPolicy": "PreferDualStack"});
    assert_eq!(new(two, BOTH), pair("PreferDualStack", &[V6, V4]));
}

#[test]
fn a_headless_service_without_selector_has_both_families_on_any_cluster() {
    let headless = json!({"clusterIP": "None"});
    assert_eq!(families(written(headless.clone(), None, ONE)), pair("RequireDualStack", &[V4, V6]));
    let selected = json!({"clusterIP": "None", "selector": {"a": "b"}});
    assert_eq!(families(written(selected, None, ONE)), pair(SINGLE, &[V4]));
    let single = json!({"clusterIP": "None", "ipFamilyPolicy": SINGLE, "ipFamilies": ["IPv6"]});
    assert_eq!(families(written(single, None, ONE)), pair(SINGLE, &[V6]));
    let old = written(headless, None, ONE).unwrap();
    let changed = json!({"clusterIP": "None", "ipFamilyPolicy": SINGLE, "ipFamilies": ["IPv6"]});
    assert_eq!(families(written(changed, Some(&old), ONE)), pair(SINGLE, &[V6]), "headless may change families");
}

#[test]
fn what_the_cluster_cannot_give_is_refused_with_upstreams_words() {
    let new = |spec, cluster| fault(written(spec, None, cluster));
    assert_eq!(
        new(json!({"ipFamilyPolicy": "RequireDualStack"}), ONE),
        "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services"
    );
    assert_eq!(
        new(json!({"ipFamilies": ["IPv6"]}), ONE),
        "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster"
    );
    assert_eq!(
        new(json!({"clusterIP": "fd43::9"}), ONE),
        "spec.clusterIPs[0]: Invalid value: [\"fd43::9\"]: IPv6 is not configured on this cluster"
    );
}

#[test]
fn contradictions_are_refused_with_upstreams_words() {
    let two = ["10.0.0.1", "fd43::1"];
    for (spec, text) in [
        (
            json!({"ipFamilyPolicy": "Both"}),
            "supported values: \"PreferDualStack\", \"RequireDualStack\", \"SingleStack\"",
        ),
        (json!({"ipFamilies": ["IPv5"]}), "spec.ipFamilies[0]: Unsupported value: \"IPv5\""),
        (json!({"ipFamilies": ["IPv4", "IPv4"]}), "spec.ipFamilies[1]: Duplicate value: \"IPv4\""),
        (json!({"ipFamilies": ["IPv4", "IPv6"]}), "'PreferDualStack' when multiple IP families are specified"),
        (json!({"clusterIP": two[0], "clusterIPs": two}), "'PreferDualStack' when multiple cluster IPs are specified"),
        (json!({"clusterIPs": two}), "must be empty when `clusterIP` is not specified"),
        (json!({"clusterIP": "10.0.0.2", "clusterIPs": two}), "first value must match `clusterIP`"),
        (json!({"clusterIP": "None", "clusterIPs": ["None", two[1]]}), "'None' must be the first and only value"),
        (json!({"clusterIP": two[0], "clusterIPs": [two[0], "10.0.0.2"]}), "no more than one IP for each IP family"),
        (
            json!({"clusterIP": two[0], "ipFamilies": ["IPv6"]}),
            "spec.clusterIPs[0]: Invalid value: \"10.0.0.1\": expected an IPv6 value as indicated by `ipFamilies[0]`",
        ),
        (json!({"clusterIP": "x"}), "spec.clusterIPs[0]: Invalid value: \"x\": must be a valid IP address"),
    ] {
        let got = fault(written(spec.clone(), None, BOTH));
        assert!(got.contains(text), "{spec}: {got}");
    }
}

fn stored(policy: &str, ips: &[&str]) -> Value {
    let all: Vec<_> = ips.iter().map(|ip| family_of_text(ip)).collect();
    json!({"type": "ClusterIP", "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": all, "ipFamilyPolicy": policy})
}

#[test]
fn a_second_family_comes_and_goes_with_the_policy() {
    let one = stored(SINGLE, &["10.0.0.1"]);
    let upgraded = written(json!({"ipFamilyPolicy": "RequireDualStack"}), Some(&one), BOTH).unwrap();
    assert_eq!(upgraded["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert_eq!(upgraded["clusterIPs"], json!(["10.0.0.1"]), "the allocator adds the second address");
    let two = stored("RequireDualStack", &["10.0.0.1", "fd43::1"]);
    let mut downgraded = two.clone();
    downgraded["ipFamilyPolicy"] = json!(SINGLE);
    let downgraded = written(downgraded, Some(&two), BOTH).unwrap();
    assert_eq!((&downgraded["ipFamilies"], &downgraded["clusterIPs"]), (&json!(["IPv4"]), &json!(["10.0.0.1"])));
    let kept = written(json!({"ports": [{"port": 81}]}), Some(&two), BOTH).unwrap();
    assert_eq!((&kept["ipFamilies"], &kept["clusterIPs"]), (&two["ipFamilies"], &two["clusterIPs"]));
    let mut less = two.clone();
    less["clusterIPs"] = json!(["10.0.0.1"]);
    less["ipFamilies"] = json!(["IPv4"]);
    let text = fault(written(less, Some(&two), BOTH));
    assert!(text.contains("must be 'SingleStack' to release the secondary cluster IP"), "{text}");
    assert!(text.contains("must be 'SingleStack' to release the secondary IP family"), "{text}");
}

#[test]
fn the_primary_address_and_family_never_change() {
    let one = stored(SINGLE, &["10.0.0.1"]);
    for (spec, text) in [
        (
            json!({"clusterIP": "10.0.0.2"}),
            "spec.clusterIPs[0]: Invalid value: [\"10.0.0.2\"]: may not change once set",
        ),
        (json!({"clusterIP": "None"}), "spec.clusterIPs[0]: Invalid value: [\"None\"]: may not change once set"),
    ] {
        let mut new = one.clone();
        for (key, value) in spec.as_object().unwrap() {
            new[key] = value.clone();
        }
        assert_eq!(fault(written(new, Some(&one), BOTH)), text);
    }
    let two = stored("RequireDualStack", &["10.0.0.1", "fd43::1"]);
    let mut swapped = two.clone();
    swapped["ipFamilies"] = json!(["IPv6", "IPv4"]);
    assert!(fault(written(swapped, Some(&two), BOTH)).contains("expected an IPv6 value"));
}

#[test]
fn a_preference_does_not_follow_the_cluster_by_itself() {
    let one = stored("PreferDualStack", &["10.0.0.1"]);
    assert_eq!(families(written(one.clone(), Some(&one), BOTH)), pair("PreferDualStack", &[V4]));
    let two = stored("PreferDualStack", &["10.0.0.1", "fd43::1"]);
    assert_eq!(families(written(two.clone(), Some(&two), ONE)), pair("PreferDualStack", &[V4, V6]));
}

#[test]
fn an_external_name_drops_what_the_client_left_as_it_was() {
    let old = stored("RequireDualStack", &["10.0.0.1", "fd43::1"]);
    let mut new = old.clone();
    new["type"] = json!("ExternalName");
    drop_fields(new.as_object_mut().unwrap(), &old);
    assert_eq!(new, json!({"type": "ExternalName"}));
    let mut new = json!({"type": "ExternalName", "clusterIP": "10.0.0.2", "clusterIPs": ["10.0.0.2"]});
    drop_fields(new.as_object_mut().unwrap(), &old);
    assert_eq!(new["clusterIPs"], json!(["10.0.0.2"]), "left for the validation to refuse");
}
