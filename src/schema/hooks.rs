//! The conditional defaults, one function per struct.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::default::Hook;
use super::quantity::Quantity;

type Object = Map<String, Value>;

/// In the order that `Node::hook` indexes.
pub(super) const HOOKS: &[(&str, Hook)] = &[
    ("io.k8s.api.core.v1.Pod", pod),
    ("io.k8s.api.core.v1.PodSpec", pod_spec),
    ("io.k8s.api.core.v1.PodStatus", pod_status),
    ("io.k8s.api.core.v1.Container", container),
    ("io.k8s.api.core.v1.EphemeralContainer", container),
    ("io.k8s.api.core.v1.Volume", volume),
    ("io.k8s.api.core.v1.ImageVolumeSource", image_volume),
    ("io.k8s.api.core.v1.Service", service),
    ("io.k8s.api.core.v1.ReplicationController", replication_controller),
    ("io.k8s.api.core.v1.ReplicationControllerSpec", replicas),
    ("io.k8s.api.core.v1.Namespace", namespace),
    ("io.k8s.api.core.v1.PersistentVolume", persistent_volume),
    ("io.k8s.api.core.v1.NodeSpec", node_spec),
    ("io.k8s.api.core.v1.NodeStatus", node_status),
    ("io.k8s.api.core.v1.LimitRangeItem", limit_range_item),
    ("io.k8s.api.core.v1.Secret", secret),
    ("io.k8s.api.apps.v1.DeploymentStrategy", deployment_strategy),
    ("io.k8s.api.apps.v1.DaemonSetUpdateStrategy", daemon_set_strategy),
    ("io.k8s.api.apps.v1.StatefulSetSpec", stateful_set_spec),
    ("io.k8s.api.batch.v1.Job", job),
    ("io.k8s.api.networking.v1.NetworkPolicySpec", network_policy_spec),
    ("io.k8s.api.rbac.v1.Subject", subject),
    ("io.k8s.api.autoscaling.v2.HorizontalPodAutoscalerSpec", autoscaler_spec),
    ("io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.CustomResourceDefinition", custom_resource_definition),
    ("io.k8s.api.resource.v1.ExactDeviceRequest", device_count),
    ("io.k8s.api.resource.v1.DeviceSubRequest", device_count),
    ("io.k8s.api.resource.v1beta2.ExactDeviceRequest", device_count),
    ("io.k8s.api.resource.v1beta2.DeviceSubRequest", device_count),
    ("io.k8s.api.resource.v1beta1.DeviceSubRequest", device_count),
    ("io.k8s.api.resource.v1beta1.DeviceRequest", device_request),
    ("io.k8s.api.resource.v1.DeviceTaint", device_taint),
    ("io.k8s.api.resource.v1beta2.DeviceTaint", device_taint),
    ("io.k8s.api.resource.v1beta1.DeviceTaint", device_taint),
    ("io.k8s.api.resource.v1alpha3.DeviceTaint", device_taint),
];

fn text<'a>(map: &'a Object, key: &str) -> &'a str {
    map.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn number(map: &Object, key: &str) -> i64 {
    map.get(key).and_then(Value::as_i64).unwrap_or(0)
}

fn flag(map: &Object, key: &str) -> bool {
    map.get(key).and_then(Value::as_bool).unwrap_or(false)
}

fn set(map: &Object, key: &str) -> bool {
    map.get(key).is_some_and(|v| !v.is_null())
}

fn default(map: &mut Object, key: &str, value: impl Into<Value>) {
    if !set(map, key) {
        map.insert(key.to_owned(), value.into());
    }
}

fn object<'a>(map: &'a mut Object, key: &str) -> Option<&'a mut Object> {
    map.get_mut(key).and_then(Value::as_object_mut)
}

fn objects<'a>(map: &'a mut Object, key: &str) -> impl Iterator<Item = &'a mut Object> {
    map.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten().filter_map(Value::as_object_mut)
}

/// The list's or map's length; 0 when absent.
fn len(map: &Object, key: &str) -> usize {
    match map.get(key) {
        Some(Value::Array(items)) => items.len(),
        Some(Value::Object(entries)) => entries.len(),
        _ => 0,
    }
}

fn pod(pod: &mut Object) {
    let Some(spec) = object(pod, "spec") else { return };
    for list in ["containers", "initContainers"] {
        for container in objects(spec, list) {
            if let Some(resources) = object(container, "resources") {
                requests_from_limits(resources);
            }
        }
    }
    pod_resources(spec);
    default(spec, "enableServiceLinks", true);
    if flag(spec, "hostNetwork") {
        for list in ["containers", "initContainers"] {
            for port in objects(spec, list).flat_map(|c| objects(c, "ports")) {
                let own = number(port, "containerPort");
                if number(port, "hostPort") == 0 && own != 0 {
                    port.insert("hostPort".to_owned(), own.into());
                }
            }
        }
    }
    if number(spec, "terminationGracePeriodSeconds") < 0 {
        spec.insert("terminationGracePeriodSeconds".to_owned(), 1.into());
    }
}

fn requests_from_limits(resources: &mut Object) {
    let Some(limits) = resources.get("limits").and_then(Value::as_object).filter(|l| !l.is_empty()).cloned() else {
        return;
    };
    default(resources, "requests", json!({}));
    if let Some(requests) = object(resources, "requests") {
        for (name, limit) in limits {
            requests.entry(name).or_insert(limit);
        }
    }
}

/// Pod-level resources (KEP-2837): huge page limits and all requests follow the containers, then the pod's own limits.
fn pod_resources(spec: &mut Object) {
    let Some(resources) = spec.get("resources").and_then(Value::as_object) else { return };
    if len(resources, "limits") == 0 && len(resources, "requests") == 0 {
        return;
    }
    let container_limits = aggregate(spec, "limits");
    let container_requests = aggregate(spec, "requests");
    let Some(resources) = object(spec, "resources") else { return };
    let requested: Vec<String> =
        resources.get("requests").and_then(Value::as_object).map(|r| r.keys().cloned().collect()).unwrap_or_default();
    for (name, amount) in &container_limits {
        if huge_pages(name) && !requested.contains(name) {
            insert_amount(resources, "limits", name, &amount.to_string());
        }
    }
    let limits = resources.get("limits").and_then(Value::as_object).cloned().unwrap_or_default();
    if limits.is_empty() {
        return;
    }
    for (name, amount) in &container_requests {
        if matches!(name.as_str(), "cpu" | "memory") {
            insert_amount(resources, "requests", name, &amount.to_string());
        }
    }
    for (name, limit) in &limits {
        if let (true, Some(limit)) = (matches!(name.as_str(), "cpu" | "memory") || huge_pages(name), limit.as_str()) {
            insert_amount(resources, "requests", name, limit);
        }
    }
}

fn huge_pages(name: &str) -> bool {
    name.starts_with("hugepages-")
}

/// Adds an amount unless the resource is there.
fn insert_amount(resources: &mut Object, list: &str, name: &str, amount: &str) {
    default(resources, list, json!({}));
    if let Some(map) = object(resources, list) {
        map.entry(name.to_owned()).or_insert_with(|| amount.into());
    }
}

/// What the containers of a pod need together: all at once, or the largest init container beside the sidecars started before.
fn aggregate(spec: &Object, list: &str) -> BTreeMap<String, Quantity> {
    let mut total: BTreeMap<String, Quantity> = BTreeMap::new();
    for container in items(spec, "containers") {
        add(&mut total, &amounts(container, list));
    }
    let (mut sidecars, mut largest) = (BTreeMap::new(), BTreeMap::new());
    for container in items(spec, "initContainers") {
        let mut needed = amounts(container, list);
        if container.get("restartPolicy").and_then(Value::as_str) == Some("Always") {
            add(&mut total, &needed);
            add(&mut sidecars, &needed);
            needed.clone_from(&sidecars);
        } else {
            add(&mut needed, &sidecars);
        }
        raise(&mut largest, &needed);
    }
    raise(&mut total, &largest);
    total
}

fn items<'a>(spec: &'a Object, key: &str) -> impl Iterator<Item = &'a Value> {
    spec.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn amounts(container: &Value, list: &str) -> BTreeMap<String, Quantity> {
    let map = container.get("resources").and_then(|r| r.get(list)).and_then(Value::as_object);
    let parsed = |v: &Value| v.as_str().and_then(|t| Quantity::parse(t).ok());
    map.into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), parsed(v)?))).collect()
}

fn add(sum: &mut BTreeMap<String, Quantity>, more: &BTreeMap<String, Quantity>) {
    for (name, amount) in more {
        match sum.get_mut(name) {
            Some(total) => total.add(*amount),
            None => {
                sum.insert(name.clone(), *amount);
            }
        }
    }
}

fn raise(to: &mut BTreeMap<String, Quantity>, at_least: &BTreeMap<String, Quantity>) {
    for (name, amount) in at_least {
        if to.get(name).is_none_or(|current| current < amount) {
            to.insert(name.clone(), *amount);
        }
    }
}

/// `serviceAccount` is an alias of `serviceAccountName`, which wins.
fn pod_spec(spec: &mut Object) {
    let name = match (text(spec, "serviceAccountName"), text(spec, "serviceAccount")) {
        ("", "") => return,
        ("", alias) => alias.to_owned(),
        (name, _) => name.to_owned(),
    };
    spec.insert("serviceAccount".to_owned(), name.as_str().into());
    spec.insert("serviceAccountName".to_owned(), name.into());
}

/// `podIP` is the first of `podIPs`; when both are given and differ it wins.
fn pod_status(status: &mut Object) {
    let first = status.get("podIPs").and_then(|ips| ips.get(0)).and_then(|ip| ip.get("ip")).and_then(Value::as_str);
    match (text(status, "podIP"), first.map(str::to_owned)) {
        ("", Some(first)) => {
            status.insert("podIP".to_owned(), first.into());
        }
        (own, first) if !own.is_empty() && first.as_deref() != Some(own) => {
            let ips = json!([{ "ip": own }]);
            status.insert("podIPs".to_owned(), ips);
        }
        _ => {}
    }
}

/// Not on the type of the spec: a volume attachment holds one inline.
fn persistent_volume(volume: &mut Object) {
    if let Some(spec) = object(volume, "spec") {
        if text(spec, "persistentVolumeReclaimPolicy").is_empty() {
            spec.insert("persistentVolumeReclaimPolicy".to_owned(), "Retain".into());
        }
        default(spec, "volumeMode", "Filesystem");
    }
}

fn node_spec(spec: &mut Object) {
    let first = spec.get("podCIDRs").and_then(|c| c.get(0)).and_then(Value::as_str).map(str::to_owned);
    match (text(spec, "podCIDR"), first) {
        ("", Some(first)) => {
            spec.insert("podCIDR".to_owned(), first.into());
        }
        (own, first) if !own.is_empty() && first.as_deref() != Some(own) => {
            let cidrs = json!([own]);
            spec.insert("podCIDRs".to_owned(), cidrs);
        }
        _ => {}
    }
}

fn container(container: &mut Object) {
    if text(container, "imagePullPolicy").is_empty() {
        let policy = pull_policy(text(container, "image"));
        container.insert("imagePullPolicy".to_owned(), policy.into());
    }
}

fn image_volume(source: &mut Object) {
    if text(source, "pullPolicy").is_empty() {
        let policy = pull_policy(text(source, "reference"));
        source.insert("pullPolicy".to_owned(), policy.into());
    }
}

/// `Always` for the tag `latest`, given or implied.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
    let last = name.rsplit('/').next().unwrap_or_default();
    let tag = last.split_once(':').map(|(_, tag)| tag);
    let path = name.split_once('/').filter(|(host, _)| host.contains(['.', ':']) || *host == "localhost");
    let path = path.map_or(name, |(_, path)| path).split(':').next().unwrap_or_default();
    let malformed = path.is_empty() || path.bytes().any(|b| b.is_ascii_uppercase());
    match (tag, digest) {
        _ if malformed => "IfNotPresent",
        (Some("latest"), _) | (None, None) => "Always",
        _ => "IfNotPresent",
    }
}

fn volume(volume: &mut Object) {
    if volume.keys().all(|k| k == "name") {
        volume.insert("emptyDir".to_owned(), json!({}));
    }
}

fn service(service: &mut Object) {
    let Some(spec) = object(service, "spec") else { return };
    // The service is looked at before its spec: these two have static defaults as well.
    if text(spec, "sessionAffinity").is_empty() {
        spec.insert("sessionAffinity".to_owned(), "None".into());
    }
    if text(spec, "type").is_empty() {
        spec.insert("type".to_owned(), "ClusterIP".into());
    }
    if text(spec, "sessionAffinity") == "None" {
        spec.remove("sessionAffinityConfig");
    } else if text(spec, "sessionAffinity") == "ClientIP" {
        let timeout = spec.get("sessionAffinityConfig").and_then(|c| c.get("clientIP")?.get("timeoutSeconds"));
        if timeout.is_none_or(Value::is_null) {
            spec.insert("sessionAffinityConfig".to_owned(), json!({"clientIP": {"timeoutSeconds": 10800}}));
        }
    }
    for port in objects(spec, "ports") {
        let target = port.get("targetPort");
        if target.is_none_or(|t| t.is_null() || t.as_i64() == Some(0) || t.as_str() == Some("")) {
            let own = number(port, "port");
            port.insert("targetPort".to_owned(), own.into());
        }
    }
    let kind = text(spec, "type").to_owned();
    let accessible = matches!(kind.as_str(), "LoadBalancer" | "NodePort") || len(spec, "externalIPs") > 0;
    if accessible && kind != "ExternalName" && text(spec, "externalTrafficPolicy").is_empty() {
        spec.insert("externalTrafficPolicy".to_owned(), "Cluster".into());
    }
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer" | "ClusterIP") {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" {
        default(spec, "allocateLoadBalancerNodePorts", true);
        let ingress = object(service, "status").and_then(|s| object(s, "loadBalancer"));
        for entry in ingress.into_iter().flat_map(|l| objects(l, "ingress")) {
            if !text(entry, "ip").is_empty() {
                default(entry, "ipMode", "VIP");
            }
        }
    }
}

fn template_labels(object: &Object) -> Option<Value> {
    let labels = object.get("spec")?.get("template")?.get("metadata")?.get("labels")?;
    labels.as_object().filter(|l| !l.is_empty()).map(|l| Value::Object(l.clone()))
}

fn label_from_template(object_: &mut Object, labels: Value) {
    if let Some(metadata) = object(object_, "metadata")
        && len(metadata, "labels") == 0
    {
        metadata.insert("labels".to_owned(), labels);
    }
}

fn replication_controller(controller: &mut Object) {
    let Some(labels) = template_labels(controller) else { return };
    if let Some(spec) = object(controller, "spec")
        && len(spec, "selector") == 0
    {
        spec.insert("selector".to_owned(), labels.clone());
    }
    label_from_template(controller, labels);
}

fn replicas(spec: &mut Object) {
    default(spec, "replicas", 1);
}

fn namespace(namespace: &mut Object) {
    let Some(metadata) = object(namespace, "metadata") else { return };
    let name = text(metadata, "name").to_owned();
    if name.is_empty() {
        return;
    }
    default(metadata, "labels", json!({}));
    if let Some(labels) = object(metadata, "labels") {
        labels.insert("kubernetes.io/metadata.name".to_owned(), name.into());
    }
}

fn node_status(status: &mut Object) {
    if !set(status, "allocatable")
        && let Some(capacity) = status.get("capacity").filter(|c| !c.is_null()).cloned()
    {
        status.insert("allocatable".to_owned(), capacity);
    }
}

fn limit_range_item(item: &mut Object) {
    if text(item, "type") != "Container" {
        return;
    }
    for (to, from) in [("default", "max"), ("defaultRequest", "default"), ("defaultRequest", "min")] {
        let Some(amounts) = item.get(from).and_then(Value::as_object).filter(|a| !a.is_empty()).cloned() else {
            continue;
        };
        default(item, to, json!({}));
        if let Some(target) = object(item, to) {
            for (name, amount) in amounts {
                target.entry(name).or_insert(amount);
            }
        }
    }
}

fn secret(secret: &mut Object) {
    let Some(Value::Object(texts)) = secret.remove("stringData") else { return };
    if texts.is_empty() {
        return;
    }
    default(secret, "data", json!({}));
    if let Some(data) = object(secret, "data") {
        for (name, value) in texts {
            data.insert(name, STANDARD.encode(value.as_str().unwrap_or_default()).into());
        }
    }
}

fn deployment_strategy(strategy: &mut Object) {
    if text(strategy, "type") == "RollingUpdate" {
        default(strategy, "rollingUpdate", json!({}));
        if let Some(update) = object(strategy, "rollingUpdate") {
            default(update, "maxUnavailable", "25%");
            default(update, "maxSurge", "25%");
        }
    }
}

fn daemon_set_strategy(strategy: &mut Object) {
    if text(strategy, "type") == "RollingUpdate" {
        default(strategy, "rollingUpdate", json!({}));
        if let Some(update) = object(strategy, "rollingUpdate") {
            default(update, "maxUnavailable", 1);
            default(update, "maxSurge", 0);
        }
    }
}

fn stateful_set_spec(spec: &mut Object) {
    for claim in objects(spec, "volumeClaimTemplates") {
        if text(claim, "apiVersion").is_empty() && text(claim, "kind").is_empty() {
            claim.insert("apiVersion".to_owned(), "v1".into());
            claim.insert("kind".to_owned(), "PersistentVolumeClaim".into());
        }
    }
    default(spec, "updateStrategy", json!({}));
    let Some(strategy) = object(spec, "updateStrategy") else { return };
    if text(strategy, "type").is_empty() {
        strategy.insert("type".to_owned(), "RollingUpdate".into());
        default(strategy, "rollingUpdate", json!({}));
    }
    if text(strategy, "type") == "RollingUpdate"
        && let Some(update) = object(strategy, "rollingUpdate")
    {
        default(update, "partition", 0);
    }
}

fn job(job: &mut Object) {
    if let Some(labels) = template_labels(job) {
        label_from_template(job, labels);
    }
    let Some(spec) = object(job, "spec") else { return };
    if !set(spec, "completions") && !set(spec, "parallelism") {
        spec.insert("completions".to_owned(), 1.into());
    }
    default(spec, "parallelism", 1);
    default(spec, "completionMode", "NonIndexed");
    default(spec, "suspend", false);
    default(spec, "manualSelector", false);
    let limit = if set(spec, "backoffLimitPerIndex") { i32::MAX } else { 6 };
    default(spec, "backoffLimit", limit);
    let policy = if set(spec, "podFailurePolicy") { "Failed" } else { "TerminatingOrFailed" };
    default(spec, "podReplacementPolicy", policy);
}

fn network_policy_spec(spec: &mut Object) {
    if len(spec, "policyTypes") == 0 {
        let types = if len(spec, "egress") > 0 { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) };
        spec.insert("policyTypes".to_owned(), types);
    }
}

fn subject(subject: &mut Object) {
    if text(subject, "apiGroup").is_empty() && matches!(text(subject, "kind"), "User" | "Group") {
        subject.insert("apiGroup".to_owned(), "rbac.authorization.k8s.io".into());
    }
}

fn autoscaler_spec(spec: &mut Object) {
    if len(spec, "metrics") == 0 {
        let target = json!({"type": "Utilization", "averageUtilization": 80});
        spec.insert("metrics".to_owned(), json!([{"type": "Resource", "resource": {"name": "cpu", "target": target}}]));
    }
    let Some(behavior) = object(spec, "behavior") else { return };
    let percent = json!({"type": "Percent", "value": 100, "periodSeconds": 15});
    let pods = json!({"type": "Pods", "value": 4, "periodSeconds": 15});
    for (name, policies, window) in
        [("scaleUp", json!([pods, percent]), Some(0)), ("scaleDown", json!([percent]), None)]
    {
        default(behavior, name, json!({}));
        if let Some(rules) = object(behavior, name) {
            default(rules, "selectPolicy", "Max");
            default(rules, "policies", policies);
            if let Some(window) = window {
                default(rules, "stabilizationWindowSeconds", window);
            }
        }
    }
}

fn custom_resource_definition(definition: &mut Object) {
    let Some(spec) = object(definition, "spec") else { return };
    let stored = spec.get("versions").and_then(Value::as_array).into_iter().flatten();
    let stored = stored.filter(|v| v.get("storage").and_then(Value::as_bool) == Some(true));
    let stored = stored.filter_map(|v| v.get("name").cloned()).next();
    if let Some(names) = object(spec, "names") {
        let kind = text(names, "kind").to_owned();
        if text(names, "singular").is_empty() && !kind.is_empty() {
            names.insert("singular".to_owned(), kind.to_lowercase().into());
        }
        if text(names, "listKind").is_empty() && !kind.is_empty() {
            names.insert("listKind".to_owned(), format!("{kind}List").into());
        }
    }
    default(spec, "conversion", json!({"strategy": "None"}));
    if let (Some(status), Some(version)) = (object(definition, "status"), stored)
        && len(status, "storedVersions") == 0
    {
        status.insert("storedVersions".to_owned(), json!([version]));
    }
}

fn device_count(request: &mut Object) {
    if text(request, "allocationMode") == "ExactCount" && number(request, "count") == 0 {
        request.insert("count".to_owned(), 1.into());
    }
}

fn device_request(request: &mut Object) {
    if text(request, "deviceClassName").is_empty() {
        return;
    }
    if text(request, "allocationMode").is_empty() {
        request.insert("allocationMode".to_owned(), "ExactCount".into());
    }
    device_count(request);
}

fn device_taint(taint: &mut Object) {
    if !set(taint, "timeAdded") {
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        taint.insert("timeAdded".to_owned(), now.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pull_policy_follows_the_tag() {
        for (image, policy) in [
            ("nginx", "Always"),
            ("nginx:latest", "Always"),
            ("nginx:1.2", "IfNotPresent"),
            ("localhost:5000/a/b", "Always"),
            ("localhost:5000/a/b:v1", "IfNotPresent"),
            ("a@sha256:00", "IfNotPresent"),
            ("a:latest@sha256:00", "Always"),
            ("", "IfNotPresent"),
            ("UPPER", "IfNotPresent"),
        ] {
            assert_eq!(pull_policy(image), policy, "{image}");
        }
    }

    #[test]
    fn pod_level_requests_follow_containers_then_limits() {
        let mut value = json!({"spec": {"resources": {"limits": {"cpu": "2", "memory": "1Gi"}},
            "containers": [{"resources": {"requests": {"cpu": "500m"}}}, {"resources": {"requests": {"cpu": "250m"}}}],
            "initContainers": [{"resources": {"requests": {"cpu": "1"}}}]}});
        pod(value.as_object_mut().unwrap());
        assert_eq!(value["spec"]["resources"]["requests"], json!({"cpu": "1", "memory": "1Gi"}));
    }
}
