//! Resource lists (`cpu`, `memory`, ...) and what a whole pod asks for.

use super::pod::items;
use crate::schema::quantity::{Notation, Quantity};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Amounts by resource name.
pub type ResourceList = BTreeMap<String, Quantity>;

/// Reads a list; amounts that do not parse are left out (validation refuses them elsewhere).
pub fn read(value: &Value) -> ResourceList {
    let entries = value.as_object().into_iter().flatten();
    entries
        .filter_map(|(name, amount)| {
            let text = amount.as_str().map_or_else(|| amount.to_string(), str::to_owned);
            Some((name.clone(), Quantity::parse(&text).ok()?))
        })
        .collect()
}

/// The JSON form.
pub fn write(list: &ResourceList) -> Value {
    Value::Object(list.iter().map(|(name, amount)| (name.clone(), amount.to_string().into())).collect::<Map<_, _>>())
}

/// `n` whole units.
pub fn count(n: usize) -> Quantity {
    Quantity::from_int(i64::try_from(n).unwrap_or(i64::MAX), Notation::Decimal)
}

/// Adds all of `other`.
pub fn add(list: &mut ResourceList, other: &ResourceList) {
    for (name, amount) in other {
        match list.get_mut(name) {
            Some(sum) => sum.add(*amount),
            None => drop(list.insert(name.clone(), *amount)),
        }
    }
}

fn maximum(list: &mut ResourceList, other: &ResourceList) {
    for (name, amount) in other {
        match list.get_mut(name) {
            Some(most) if *most >= *amount => {}
            _ => drop(list.insert(name.clone(), *amount)),
        }
    }
}

/// `requests` or `limits` of the pod: the sum over its containers and sidecars, or the most that an init container needs at
/// its time; what the pod itself says goes before that.
pub fn of_pod(spec: &Value, which: &str) -> ResourceList {
    let of = |container: &Value| read(&container["resources"][which]);
    let mut sum = ResourceList::new();
    for container in items(&spec["containers"]) {
        add(&mut sum, &of(container));
    }
    let (mut sidecars, mut most) = (ResourceList::new(), ResourceList::new());
    for container in items(&spec["initContainers"]) {
        let own = of(container);
        let mut now = sidecars.clone();
        add(&mut now, &own);
        if container["restartPolicy"] == "Always" {
            add(&mut sum, &own);
            sidecars = now.clone();
        }
        maximum(&mut most, &now);
    }
    maximum(&mut sum, &most);
    for (name, amount) in read(&spec["resources"][which]) {
        if name == "cpu" || name == "memory" || name.starts_with("hugepages-") {
            sum.insert(name, amount);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_needs_its_containers_together_or_its_greediest_init_container() {
        let cpu = |amount: &str| json!({ "resources": { "requests": { "cpu": amount } } });
        let mut sidecar = cpu("100m");
        sidecar["restartPolicy"] = "Always".into();
        let spec =
            json!({ "containers": [cpu("200m"), cpu("300m")], "initContainers": [cpu("1"), sidecar, cpu("600m")] });
        assert_eq!(of_pod(&spec, "requests")["cpu"].to_string(), "1");
        let light = json!({ "containers": [cpu("200m"), cpu("300m")], "initContainers": [spec["initContainers"][1]] });
        assert_eq!(of_pod(&light, "requests")["cpu"].to_string(), "600m");
        let mut whole = light.clone();
        whole["resources"] = json!({ "requests": { "cpu": "2", "example.com/x": "1" } });
        assert_eq!(write(&of_pod(&whole, "requests")), json!({ "cpu": "2" }));
    }
}
