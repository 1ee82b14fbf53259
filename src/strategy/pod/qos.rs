//! The quality of service class of a pod: upstream's `ComputePodQOS`.

use serde_json::Value;

use crate::schema::quantity::Quantity;
use crate::strategy::value::list;

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub fn class(spec: &Value) -> &'static str {
    let (mut requests, mut limits) = (Totals::default(), Totals::default());
    let mut guaranteed = true;
    for container in list(spec, "/containers").iter().chain(list(spec, "/initContainers")) {
        requests.add(&container["resources"]["requests"]);
        let limited = limits.add(&container["resources"]["limits"]);
        guaranteed &= limited == 2;
    }
    if requests.is_empty() && limits.is_empty() {
        return "BestEffort";
    }
    if guaranteed && requests.0 == limits.0 { "Guaranteed" } else { "Burstable" }
}

/// cpu and memory in nano-units; `None` while nobody named it.
#[derive(Default, PartialEq, Eq)]
struct Totals([Option<i128>; 2]);

impl Totals {
    /// Adds what is more than zero; returns how many of the two resources that was.
    fn add(&mut self, resources: &Value) -> usize {
        let mut named = 0;
        for (total, name) in self.0.iter_mut().zip(["cpu", "memory"]) {
            let amount = resources.get(name).and_then(Value::as_str).and_then(|text| Quantity::parse(text).ok());
            if let Some(nanos) = amount.map(|q| q.nanos()).filter(|n| *n > 0) {
                *total = Some(total.unwrap_or(0) + nanos);
                named += 1;
            }
        }
        named
    }

    fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_three_classes() {
        let pod = |resources: Value| class(&json!({"containers": [{"resources": resources}]}));
        let both = json!({"cpu": "1", "memory": "1Gi"});
        assert_eq!(pod(json!({})), "BestEffort");
        assert_eq!(pod(json!({"requests": {"cpu": "0"}})), "BestEffort");
        assert_eq!(pod(json!({"requests": both, "limits": {"cpu": "1000m", "memory": "1024Mi"}})), "Guaranteed");
        assert_eq!(pod(json!({"requests": {"cpu": "1"}, "limits": {"cpu": "1"}})), "Burstable");
        let two = json!({"containers": [{"resources": {"limits": both, "requests": both}}, {}]});
        assert_eq!(class(&two), "Burstable");
    }
}
