//! IPAddresses and ServiceCIDRs: which addresses Services may have, and which they do have.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::value::{list, text};
use super::{Context, NameRule, Strategy, fixed};
use crate::apiserver::field::{ErrorList, FieldError};
use crate::apiserver::names;

const IMMUTABLE: &str = "field is immutable";

/// IPAddresses: named by the address.
pub static ADDRESS: Strategy = Strategy {
    validate_create: |_, new| parent(&new["spec"]["parentRef"]),
    validate_update: fixed::changes,
    names: NameRule::Address,
    ..Strategy::DEFAULT
};

fn parent(parent: &Value) -> ErrorList {
    let mut errors = ErrorList::new();
    if !parent.is_object() {
        errors.push(FieldError::required("spec.parentRef", ""));
        return errors;
    }
    let group = text(parent, "/group");
    if !group.is_empty() {
        let faults = names::dns1123_subdomain(group).into_iter();
        errors.extend(faults.map(|why| FieldError::invalid("spec.parentRef.group", group, why)));
    }
    for (key, required) in [("resource", true), ("name", true), ("namespace", false)] {
        let (value, field) = (text(parent, &format!("/{key}")), format!("spec.parentRef.{key}"));
        if value.is_empty() {
            if required {
                errors.push(FieldError::required(field, ""));
            }
            continue;
        }
        let faults = names::path_segment(value, false).into_iter();
        errors.extend(faults.map(|why| FieldError::invalid(field.clone(), value, why)));
    }
    errors
}

/// ServiceCIDRs: one range, or one of each family; a second one may be added later.
pub static RANGE: Strategy = Strategy {
    validate_create: |_, new| ranges(new),
    validate_update: |context: &Context<'_>, new, old| {
        if !context.subresource.is_empty() {
            return ErrorList::new();
        }
        let (now, before) = (list(new, "/spec/cidrs"), list(old, "/spec/cidrs"));
        let changed = |i: &usize| now[*i] != before[*i];
        let fault = |i: usize| FieldError::invalid(format!("spec.cidrs[{i}]"), now[i].clone(), IMMUTABLE);
        if now.len() == before.len() {
            return (0..now.len()).filter(changed).map(fault).collect();
        }
        if before.len() == 1 && now.len() == 2 {
            let mut errors: ErrorList = (0..1).filter(changed).map(fault).collect();
            errors.extend(ranges(new));
            return errors;
        }
        vec![FieldError::invalid("spec.cidrs", now.to_vec(), IMMUTABLE)]
    },
    ..Strategy::DEFAULT
};

fn ranges(object: &Value) -> ErrorList {
    let cidrs = list(object, "/spec/cidrs");
    match cidrs.len() {
        0 => return vec![FieldError::required("spec.cidrs", "at least one CIDR required")],
        1 | 2 => {}
        _ => {
            let why = "may only hold up to 2 values";
            return vec![FieldError::invalid("spec.cidrs", object["spec"].clone(), why)];
        }
    }
    let mut errors = ErrorList::new();
    let texts: Vec<&str> = cidrs.iter().map(|cidr| cidr.as_str().unwrap_or_default()).collect();
    for (i, cidr) in texts.iter().enumerate() {
        if let Some(why) = range_fault(cidr) {
            errors.push(FieldError::invalid(format!("spec.cidrs[{i}]"), *cidr, why));
        }
    }
    let six = |cidr: &&str| cidr.parse::<IpNet>().ok().map(|net| net.addr().is_ipv6());
    if let [one, other] = texts.as_slice()
        && six(one).is_some()
        && six(one) == six(other)
    {
        let why = "may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64";
        errors.push(FieldError::invalid("spec.cidrs", cidrs.to_vec(), why));
    }
    errors
}

/// What is wrong with a range, by upstream's present rules.
fn range_fault(cidr: &str) -> Option<String> {
    let Ok(net) = cidr.parse::<IpNet>() else {
        return Some("must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)".to_owned());
    };
    if mapped(net.addr()) {
        return Some("must not have an IPv4-mapped IPv6 address".to_owned());
    }
    if net.addr() != net.network() {
        return Some("must not have bits set beyond the prefix length".to_owned());
    }
    (net.to_string() != cidr).then(|| format!("must be in canonical form (\"{net}\")"))
}

fn mapped(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some())
}

/// What is wrong with an address that is a name.
pub fn address_faults(name: &str) -> Vec<String> {
    let Ok(ip) = name.parse::<IpAddr>() else {
        return vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".to_owned()];
    };
    if mapped(ip) {
        return vec!["must not be an IPv4-mapped IPv6 address".to_owned()];
    }
    if ip.to_string() != name {
        return vec![format!("must be in canonical form (\"{ip}\")")];
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn texts(errors: &ErrorList) -> Vec<String> {
        errors.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_are_written_in_one_way_only() {
        assert!(address_faults("fe80::42:1dff:fe84:f9e2").is_empty() && address_faults("10.0.0.1").is_empty());
        assert_eq!(address_faults("FE80::1"), ["must be in canonical form (\"fe80::1\")"]);
        assert_eq!(address_faults("10.0.0.01"), ["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"]);
        assert_eq!(address_faults("::ffff:1.2.3.4"), ["must not be an IPv4-mapped IPv6 address"]);
    }

    #[test]
    fn ranges_are_one_of_each_family() {
        let fault = |cidrs: Value| texts(&ranges(&json!({"spec": {"cidrs": cidrs}})));
        assert!(fault(json!(["10.0.0.0/24", "fd00::/112"])).is_empty());
        assert_eq!(fault(json!([])), ["spec.cidrs: Required value: at least one CIDR required"]);
        assert!(fault(json!(["10.0.0.1/24"]))[0].ends_with("must not have bits set beyond the prefix length"));
        assert!(fault(json!(["10.0.0.0/24", "10.1.0.0/24"]))[0].contains("no more than one IP for each IP family"));
    }

    #[test]
    fn an_address_says_whose_it_is() {
        assert_eq!(texts(&parent(&Value::Null)), ["spec.parentRef: Required value"]);
        let errors = parent(&json!({"resource": "a/b"}));
        assert_eq!(texts(&errors)[1], "spec.parentRef.name: Required value");
        assert!(texts(&errors)[0].contains("may not contain '/'"));
    }
}
