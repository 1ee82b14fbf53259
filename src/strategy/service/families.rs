//! Which families a Service has: what upstream infers from policy, addresses and the cluster's ranges, and what it refuses
//! (`initIPFamilyFields`, `ValidateServiceClusterIPsRelatedFields` and the two checks of upgrades and downgrades).
//!
//! Everything here is a function of the new object, the old one and the cluster's families, and may be done twice: the
//! strategy does it when it prepares an object and once more to tell what was wrong with it.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::{has_cluster_ip, is_headless};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::strategy::value::{list, text};

/// `IPv4`.
pub const V4: &str = "IPv4";
/// `IPv6`.
pub const V6: &str = "IPv6";

const FAMILIES: [&str; 2] = [V4, V6];
const POLICIES: [&str; 3] = ["PreferDualStack", "RequireDualStack", SINGLE];
const SINGLE: &str = "SingleStack";
const INVALID_IP: &str = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";

/// The family of an address, as the API spells it.
pub fn family_of(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { V4 } else { V6 }
}

fn family_of_text(ip: &str) -> &'static str {
    if ip.contains(':') { V6 } else { V4 }
}

fn other(family: &str) -> &'static str {
    if family == V4 { V6 } else { V4 }
}

fn policy(spec: &Value) -> &str {
    text(spec, "/ipFamilyPolicy")
}

fn policy_value(spec: &Value) -> Value {
    spec.get("ipFamilyPolicy").cloned().unwrap_or_default()
}

fn ips_value(spec: &Value) -> Value {
    Value::Array(list(spec, "/clusterIPs").to_vec())
}

fn same(a: &Value, b: &Value, pointer: &str) -> bool {
    list(a, pointer) == list(b, pointer)
}

fn has_selector(spec: &Value) -> bool {
    spec.get("selector").and_then(Value::as_object).is_some_and(|selector| !selector.is_empty())
}

fn set_list(spec: &mut Value, key: &str, items: Vec<Value>) {
    if let Value::Object(map) = spec {
        map.insert(key.to_owned(), Value::Array(items));
    }
}

/// A client that does not know of an allocated address keeps it by leaving it out.
pub(super) fn keep_addresses(spec: &mut Map<String, Value>, old: &Value) {
    if spec.get("clusterIP").and_then(Value::as_str).unwrap_or_default().is_empty() {
        match old.get("clusterIP") {
            Some(ip) => spec.insert("clusterIP".to_owned(), ip.clone()),
            None => spec.remove("clusterIP"),
        };
    }
    let ips = list(old, "/clusterIPs");
    if spec.get("clusterIPs").is_none_or(no_items) && !ips.is_empty() {
        spec.insert("clusterIPs".to_owned(), Value::Array(ips.to_vec()));
    }
}

fn no_items(value: &Value) -> bool {
    value.is_null() || *value == json!("") || value.as_array().is_some_and(Vec::is_empty)
}

/// Makes `clusterIPs` follow `clusterIP` where only the older field carries the client's intent.
pub(super) fn synchronize(spec: &mut Value, old: Option<&Value>) {
    let ip = text(spec, "/clusterIP").to_owned();
    let Some(old) = old else {
        if !ip.is_empty() && list(spec, "/clusterIPs").is_empty() {
            set_list(spec, "clusterIPs", vec![json!(ip)]);
        }
        return;
    };
    let before = text(old, "/clusterIP");
    if list(spec, "/clusterIPs").is_empty() && !list(old, "/clusterIPs").is_empty() && ip == before {
        set_list(spec, "clusterIPs", list(old, "/clusterIPs").to_vec());
    }
    if ip == before || !same(spec, old, "/clusterIPs") {
        return;
    }
    if ip.is_empty() {
        if let Value::Object(map) = spec {
            map.remove("clusterIPs");
        }
    } else {
        set_list(spec, "clusterIPs", vec![json!(ip)]);
    }
}

/// On the way to ExternalName: what belongs to addresses goes if the client did not change it as well.
pub(super) fn drop_fields(spec: &mut Map<String, Value>, old: &Value) {
    let same = |spec: &Map<String, Value>, key: &str| {
        let items = |value: Option<&Value>| value.filter(|value| !no_items(value)).cloned();
        items(spec.get(key)) == items(old.get(key))
    };
    if same(spec, "clusterIP") && same(spec, "clusterIPs") {
        spec.remove("clusterIP");
        spec.remove("clusterIPs");
    }
    for key in ["ipFamilies", "ipFamilyPolicy"] {
        if same(spec, key) {
            spec.remove(key);
        }
    }
}

/// A Service that prefers two families stays as it is when the cluster's families change under it.
fn prefers_as_before(new: &Value, old: &Value) -> bool {
    let prefers = "PreferDualStack";
    text(new, "/type") == text(old, "/type")
        && policy(new) == prefers
        && ["", prefers].contains(&policy(old))
        && same(new, old, "/clusterIPs")
        && same(new, old, "/ipFamilies")
}

/// Fills `ipFamilyPolicy` and `ipFamilies` of `spec` (`old`: the spec before the update). `cluster`: the families of the
/// cluster, the primary one first.
///
/// # Errors
/// What upstream refuses before it allocates anything. `spec` is then changed in part.
pub fn init(spec: &mut Value, old: Option<&Value>, cluster: &[&'static str]) -> Result<(), ErrorList> {
    if !has_cluster_ip(spec) || old.is_some_and(|old| prefers_as_before(spec, old)) {
        return Ok(());
    }
    let selectorless = is_headless(spec) && !has_selector(spec);
    if policy(spec).is_empty() {
        let before = old.map(policy).filter(|policy| !policy.is_empty());
        let chosen = before.unwrap_or(if selectorless { "RequireDualStack" } else { SINGLE });
        spec["ipFamilyPolicy"] = json!(chosen);
    }
    none(related(spec))?;
    let mut errors = old.map(|old| release(spec, old)).unwrap_or_default();
    let single = policy(spec) == SINGLE;
    for (key, what) in [("/clusterIPs", "cluster IPs"), ("/ipFamilies", "IP families")] {
        if single && list(spec, key).len() == 2 {
            let text = format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified");
            errors.push(FieldError::invalid("spec.ipFamilyPolicy", policy_value(spec), text));
        }
    }
    errors.extend(infer(spec, cluster));
    none(errors)?;
    let mut families = list(spec, "/ipFamilies").to_vec();
    let primary = cluster.first().copied().unwrap_or(V4);
    if !selectorless {
        none(configured(spec, &families, cluster))?;
    }
    if families.is_empty() {
        families.push(json!(primary));
    }
    // Endpoints of a headless Service without selector are the client's, so the cluster's families do not matter.
    if !single && families.len() == 1 && (selectorless || cluster.len() == 2) {
        families.push(json!(other(families[0].as_str().unwrap_or_default())));
    }
    set_list(spec, "ipFamilies", families);
    Ok(())
}

fn none(errors: ErrorList) -> Result<(), ErrorList> {
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Gives up the second family when the policy says so; refuses to when it does not.
fn release(spec: &mut Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    for (key, what) in [("clusterIPs", "cluster IP"), ("ipFamilies", "IP family")] {
        let pointer = format!("/{key}");
        let (now, before) = (list(spec, &pointer), list(old, &pointer));
        if policy(spec) == SINGLE {
            if now == before && now.len() > 1 {
                let first = now[..1].to_vec();
                set_list(spec, key, first);
            }
        } else if !now.is_empty() && now.len() < before.len() {
            let text = format!("must be 'SingleStack' to release the secondary {what}");
            errors.push(FieldError::invalid("spec.ipFamilyPolicy", policy_value(spec), text));
        }
    }
    errors
}

/// Families of addresses that were given without saying them.
fn infer(spec: &mut Value, cluster: &[&'static str]) -> ErrorList {
    let mut errors = ErrorList::new();
    let mut families = list(spec, "/ipFamilies").to_vec();
    let known = families.len();
    for (i, ip) in list(spec, "/clusterIPs").iter().filter_map(Value::as_str).enumerate() {
        if ip == "None" {
            break;
        }
        let family = family_of_text(ip);
        if i >= known && cluster.contains(&family) {
            families.push(json!(family));
        } else if i >= known {
            let text = format!("{family} is not configured on this cluster");
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{i}]"), ips_value(spec), text));
        }
    }
    set_list(spec, "ipFamilies", families);
    errors
}

fn configured(spec: &Value, families: &[Value], cluster: &[&'static str]) -> ErrorList {
    let mut errors = ErrorList::new();
    if policy(spec) == "RequireDualStack" && cluster.len() < 2 {
        let text = "this cluster is not configured for dual-stack services";
        errors.push(FieldError::invalid("spec.ipFamilyPolicy", policy_value(spec), text));
    }
    for (i, family) in families.iter().enumerate() {
        if !family.as_str().is_some_and(|family| cluster.contains(&family)) {
            let field = format!("spec.ipFamilies[{i}]");
            errors.push(FieldError::invalid(field, family.clone(), "not configured on this cluster"));
        }
    }
    errors
}

/// Faults of `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy` among each other.
pub(super) fn related(spec: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    if !has_cluster_ip(spec) {
        return errors;
    }
    let (ip, ips, families) = (text(spec, "/clusterIP"), list(spec, "/clusterIPs"), list(spec, "/ipFamilies"));
    let all = |detail: &str| FieldError::invalid("spec.clusterIPs", ips_value(spec), detail);
    match ips.first() {
        None if !ip.is_empty() => errors.push(FieldError::required("spec.clusterIPs", "")),
        Some(_) if ip.is_empty() => errors.push(all("must be empty when `clusterIP` is not specified")),
        Some(first) if first.as_str() != Some(ip) => errors.push(all("first value must match `clusterIP`")),
        _ => {}
    }
    for (i, family) in families.iter().enumerate() {
        let field = format!("spec.ipFamilies[{i}]");
        if !family.as_str().is_some_and(|family| FAMILIES.contains(&family)) {
            errors.push(FieldError::not_supported(field.clone(), family.clone(), &FAMILIES));
        }
        if families[..i].contains(family) {
            errors.push(FieldError::duplicate(field, family.clone()));
        }
    }
    if !policy(spec).is_empty() && !POLICIES.contains(&policy(spec)) {
        errors.push(FieldError::not_supported("spec.ipFamilyPolicy", policy_value(spec), &POLICIES));
    }
    let mut unreadable = false;
    for (i, ip) in ips.iter().enumerate() {
        let ip = ip.as_str().unwrap_or_default();
        if i == 0 && ip == "None" {
            if ips.len() > 1 {
                unreadable = true;
                errors.push(all("'None' must be the first and only value"));
            }
        } else if ip.parse::<IpAddr>().is_err() {
            unreadable = true;
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{i}]"), ip, INVALID_IP));
        }
    }
    if ips.len() > 2 {
        errors.push(all("may only hold up to 2 values"));
    }
    if !unreadable {
        errors.extend(matching(spec, ips, families));
    }
    errors
}

/// At most one address of each family, in the order of `ipFamilies`.
fn matching(spec: &Value, ips: &[Value], families: &[Value]) -> ErrorList {
    let mut errors = ErrorList::new();
    let own: Vec<&str> = ips.iter().map(|ip| family_of_text(ip.as_str().unwrap_or_default())).collect();
    if ips.len() > 1 && !(own.contains(&V4) && own.contains(&V6)) {
        let text = "may specify no more than one IP for each IP family";
        errors.push(FieldError::invalid("spec.clusterIPs", ips_value(spec), text));
    }
    if is_headless(spec) {
        return errors;
    }
    for (i, (ip, said)) in ips.iter().zip(families).enumerate() {
        let said = said.as_str().unwrap_or_default();
        if FAMILIES.contains(&said) && said != own[i] {
            let text = format!("expected an {said} value as indicated by `ipFamilies[{i}]`");
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{i}]"), ip.clone(), text));
        }
    }
    errors
}

/// What an update must not change: the primary address and family, ever; the second ones may come and go.
pub(super) fn transition(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    if !has_cluster_ip(new) || !has_cluster_ip(old) {
        return errors;
    }
    let (headless, was_headless) = (is_headless(new), is_headless(old));
    if !(headless && was_headless) {
        errors.extend(addresses_change(new, old));
    }
    if !headless && !was_headless {
        errors.extend(families_change(new, old));
    }
    errors
}

fn released(what: &str, spec: &Value) -> Option<FieldError> {
    let text = format!("must be set to 'SingleStack' when releasing the secondary {what}");
    (policy(spec) != SINGLE).then(|| FieldError::invalid("spec.ipFamilyPolicy", policy_value(spec), text))
}

fn addresses_change(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let (now, before) = (list(new, "/clusterIPs"), list(old, "/clusterIPs"));
    let at = |i: usize, text: &str| FieldError::invalid(format!("spec.clusterIPs[{i}]"), ips_value(new), text);
    if now.len() == before.len() {
        let changed = now.iter().zip(before).enumerate().filter(|(_, (now, before))| now != before);
        errors.extend(changed.map(|(i, _)| at(i, "may not change once set")));
        return errors;
    }
    if now.is_empty() {
        errors.push(at(0, "primary clusterIP can not be unset"));
    } else if !before.is_empty() && now[0] != before[0] {
        errors.push(at(0, "may not change once set"));
    }
    if now.len() < before.len() && now.len() == 1 {
        errors.extend(released("clusterIP", new));
    }
    errors
}

fn families_change(new: &Value, old: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    let (now, before) = (list(new, "/ipFamilies"), list(old, "/ipFamilies"));
    let at = |value: Value| FieldError::invalid("spec.ipFamilies[0]", value, "may not change once set");
    if now.len() == before.len() {
        let changed = now.iter().zip(before).filter(|(now, before)| now != before);
        errors.extend(changed.map(|_| at(Value::Array(now.to_vec()))));
        return errors;
    }
    if !now.is_empty() && !before.is_empty() && now[0] != before[0] {
        errors.push(at(ips_value(new)));
    }
    if now.len() < before.len() && now.len() == 1 {
        errors.extend(released("ipFamily", new));
    }
    errors
}

#[cfg(test)]
#[path = "families_tests.rs"]
mod tests;
