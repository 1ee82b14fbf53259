//! How everything else is printed: network, nodes, access, policy.

use super::format::{age, flag, human_duration, items, labels, name, number, or, scalar, selector, since, some, text};
use super::{Column, Printer};
use crate::apiserver::object::meta;
use serde_json::{Value, json};
use std::collections::BTreeSet;

const AGE: Column = Column::text("Age");

pub const SERVICE: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Type"),
        Column::text("Cluster-IP"),
        Column::text("External-IP"),
        Column::text("Port(s)"),
        AGE,
        Column::wide("Selector"),
    ],
    cells: |service| {
        let ports: Vec<String> = items(service, "/spec/ports")
            .map(|port| {
                let (number_, protocol, node) =
                    (number(port, "/port"), text(port, "/protocol"), number(port, "/nodePort"));
                if node > 0 { format!("{number_}:{node}/{protocol}") } else { format!("{number_}/{protocol}") }
            })
            .collect();
        vec![
            name(service),
            json!(text(service, "/spec/type")),
            json!(or(text(service, "/spec/clusterIPs/0"), "<none>")),
            json!(external(service)),
            json!(or(&ports.join(","), "<none>")),
            age(service),
            json!(labels(service, "/spec/selector")),
        ]
    },
};

fn ingress_addresses(object: &Value) -> Vec<String> {
    let all: BTreeSet<&str> = items(object, "/status/loadBalancer/ingress")
        .map(|i| or(text(i, "/ip"), text(i, "/hostname")))
        .filter(|a| !a.is_empty())
        .collect();
    all.into_iter().map(str::to_owned).collect()
}

fn external(service: &Value) -> String {
    let given: Vec<String> =
        items(service, "/spec/externalIPs").filter_map(|a| a.as_str()).map(str::to_owned).collect();
    match text(service, "/spec/type") {
        "ClusterIP" | "NodePort" => or(&given.join(","), "<none>").to_owned(),
        "LoadBalancer" => {
            let all: Vec<String> = ingress_addresses(service).into_iter().chain(given).collect();
            or(&all.join(","), "<pending>").to_owned()
        }
        "ExternalName" => text(service, "/spec/externalName").to_owned(),
        _ => "<unknown>".to_owned(),
    }
}

pub const INGRESS: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Class"),
        Column::text("Hosts"),
        Column::text("Address"),
        Column::text("Ports"),
        AGE,
    ],
    cells: |ingress| {
        let hosts: Vec<String> =
            items(ingress, "/spec/rules").map(|r| text(r, "/host").to_owned()).filter(|h| !h.is_empty()).collect();
        let ports = if items(ingress, "/spec/tls").len() > 0 { "80, 443" } else { "80" };
        vec![
            name(ingress),
            json!(or(text(ingress, "/spec/ingressClassName"), "<none>")),
            json!(some(&hosts, 3, "*")),
            json!(ingress_addresses(ingress).join(",")),
            json!(ports),
            age(ingress),
        ]
    },
};

pub const INGRESS_CLASS: Printer = Printer {
    columns: &[Column::NAME, Column::text("Controller"), Column::text("Parameters"), AGE],
    cells: |class| {
        let parameters = class.pointer("/spec/parameters").map_or("<none>".to_owned(), |p| {
            let group = text(p, "/apiGroup");
            let dot = if group.is_empty() { "" } else { "." };
            format!("{}{dot}{group}/{}", text(p, "/kind"), text(p, "/name"))
        });
        vec![name(class), json!(text(class, "/spec/controller")), json!(parameters), age(class)]
    },
};

pub const ENDPOINTS: Printer = Printer {
    columns: &[Column::NAME, Column::text("Endpoints"), AGE],
    cells: |endpoints| {
        let mut all = Vec::new();
        for subset in items(endpoints, "/subsets") {
            let addresses = || items(subset, "/addresses").map(|a| text(a, "/ip"));
            if items(subset, "/ports").len() == 0 {
                all.extend(addresses().map(str::to_owned));
            }
            for port in items(subset, "/ports") {
                let port = number(port, "/port");
                all.extend(
                    addresses().map(|a| if a.contains(':') { format!("[{a}]:{port}") } else { format!("{a}:{port}") }),
                );
            }
        }
        vec![name(endpoints), json!(some(&all, 3, "<none>")), age(endpoints)]
    },
};

pub const ENDPOINT_SLICE: Printer = Printer {
    columns: &[Column::NAME, Column::text("AddressType"), Column::text("Ports"), Column::text("Endpoints"), AGE],
    cells: |slice| {
        let ports: Vec<String> = items(slice, "/ports")
            .map(|p| match p.get("port").and_then(Value::as_i64) {
                Some(port) => port.to_string(),
                None => or(text(p, "/name"), "*").to_owned(),
            })
            .collect();
        let addresses: Vec<String> = items(slice, "/endpoints")
            .flat_map(|e| items(e, "/addresses"))
            .filter_map(|a| a.as_str().map(str::to_owned))
            .collect();
        vec![
            name(slice),
            json!(text(slice, "/addressType")),
            json!(some(&ports, 3, "<unset>")),
            json!(some(&addresses, 3, "<unset>")),
            age(slice),
        ]
    },
};

pub const NETWORK_POLICY: Printer = Printer {
    columns: &[Column::NAME, Column::text("Pod-Selector"), AGE],
    cells: |policy| vec![name(policy), json!(selector(policy, "/spec/podSelector")), age(policy)],
};

pub const SERVICE_CIDR: Printer = Printer {
    columns: &[Column::NAME, Column::text("CIDRs"), AGE],
    cells: |cidr| {
        let all: Vec<&str> = items(cidr, "/spec/cidrs").filter_map(Value::as_str).collect();
        vec![name(cidr), json!(all.join(",")), age(cidr)]
    },
};

pub const IP_ADDRESS: Printer = Printer {
    columns: &[Column::NAME, Column::text("ParentRef"), AGE],
    cells: |address| {
        let parent = address.pointer("/spec/parentRef").map_or("<none>".to_owned(), |p| {
            let mut parts =
                vec![crate::apiserver::status::qualified(text(p, "/group"), text(p, "/resource")).to_lowercase()];
            parts.extend(
                [text(p, "/namespace"), text(p, "/name")].into_iter().filter(|t| !t.is_empty()).map(str::to_owned),
            );
            parts.join("/")
        });
        vec![name(address), json!(parent), age(address)]
    },
};

pub const NODE: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Status"),
        Column::text("Roles"),
        AGE,
        Column::text("Version"),
        Column::wide("Internal-IP"),
        Column::wide("External-IP"),
        Column::wide("OS-Image"),
        Column::wide("Kernel-Version"),
        Column::wide("Container-Runtime"),
    ],
    cells: |node| {
        let ready = items(node, "/status/conditions").find(|c| c["type"] == "Ready");
        let mut status = match ready.map(|c| text(c, "/status")) {
            None => "Unknown".to_owned(),
            Some("True") => "Ready".to_owned(),
            Some(_) => "NotReady".to_owned(),
        };
        if flag(node, "/spec/unschedulable") {
            status.push_str(",SchedulingDisabled");
        }
        let address = |kind: &str| {
            let found = items(node, "/status/addresses").find(|a| a["type"] == kind);
            json!(found.map_or("<none>", |a| text(a, "/address")))
        };
        let info = |key: &str| json!(or(text(node, &format!("/status/nodeInfo/{key}")), "<unknown>"));
        vec![
            name(node),
            json!(status),
            json!(or(&roles(node).join(","), "<none>")),
            age(node),
            json!(text(node, "/status/nodeInfo/kubeletVersion")),
            address("InternalIP"),
            address("ExternalIP"),
            info("osImage"),
            info("kernelVersion"),
            info("containerRuntimeVersion"),
        ]
    },
};

fn roles(node: &Value) -> Vec<String> {
    let labels = node.pointer("/metadata/labels").and_then(Value::as_object);
    let mut roles = BTreeSet::new();
    for (key, value) in labels.into_iter().flatten() {
        match key.strip_prefix("node-role.kubernetes.io/") {
            Some(role) if !role.is_empty() => {
                roles.insert(role.to_owned());
            }
            _ if key == "kubernetes.io/role" => {
                roles.extend(value.as_str().filter(|v| !v.is_empty()).map(str::to_owned));
            }
            _ => {}
        }
    }
    roles.into_iter().collect()
}

pub const EVENT: Printer = Printer {
    columns: &[
        Column::text("Last Seen"),
        Column::text("Type"),
        Column::text("Reason"),
        Column::text("Object"),
        Column::wide("Subobject"),
        Column::wide("Source"),
        Column::text("Message"),
        Column::wide("First Seen"),
        Column::wide("Count"),
        Column { priority: 1, ..Column::NAME },
    ],
    cells: event,
};

fn event(event: &Value) -> Vec<Value> {
    // Both groups' names of the same fields.
    let either = |core: &str, events: &str| or(text(event, core), text(event, events)).to_owned();
    let first = either("/firstTimestamp", "/deprecatedFirstTimestamp");
    let first = since(or(&first, text(event, "/eventTime")));
    let last = either("/lastTimestamp", "/deprecatedLastTimestamp");
    let mut last = if last.is_empty() { first.clone() } else { since(&last) };
    let mut count = number(event, "/count").max(number(event, "/deprecatedCount")).max(1);
    if let Some(series) = event.get("series").filter(|s| s.is_object()) {
        last = since(text(series, "/lastObservedTime"));
        count = number(series, "/count");
    }
    let kind = either("/involvedObject/kind", "/regarding/kind").to_lowercase();
    let target = either("/involvedObject/name", "/regarding/name");
    let target = if target.is_empty() { kind } else { format!("{kind}/{target}") };
    let component = either("/source/component", "/deprecatedSource/component");
    let controller = either("/reportingComponent", "/reportingController");
    let host = either("/source/host", "/deprecatedSource/host");
    let host = or(&host, text(event, "/reportingInstance"));
    let component = or(&component, &controller);
    let source = if host.is_empty() { component.to_owned() } else { format!("{component}, {host}") };
    vec![
        json!(last),
        json!(text(event, "/type")),
        json!(text(event, "/reason")),
        json!(target),
        json!(either("/involvedObject/fieldPath", "/regarding/fieldPath")),
        json!(source),
        json!(either("/message", "/note").trim()),
        json!(first),
        json!(count),
        json!(meta(event, "name")),
    ]
}

pub const NAMESPACE: Printer = Printer {
    columns: &[Column::NAME, Column::text("Status"), AGE],
    cells: |namespace| vec![name(namespace), json!(text(namespace, "/status/phase")), age(namespace)],
};

fn entries(object: &Value, key: &str) -> usize {
    object.get(key).and_then(Value::as_object).map_or(0, serde_json::Map::len)
}

pub const SECRET: Printer = Printer {
    columns: &[Column::NAME, Column::text("Type"), Column::text("Data"), AGE],
    cells: |secret| vec![name(secret), json!(text(secret, "/type")), json!(entries(secret, "data")), age(secret)],
};

pub const CONFIG_MAP: Printer = Printer {
    columns: &[Column::NAME, Column::text("Data"), AGE],
    cells: |map| vec![name(map), json!(entries(map, "data") + entries(map, "binaryData")), age(map)],
};

pub const NAME_AND_AGE: Printer =
    Printer { columns: &[Column::NAME, AGE], cells: |object| vec![name(object), age(object)] };

pub const BINDING: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Role"),
        AGE,
        Column::wide("Users"),
        Column::wide("Groups"),
        Column::wide("ServiceAccounts"),
    ],
    cells: |binding| {
        let of = |kind: &str| -> Value {
            let all: Vec<String> = items(binding, "/subjects")
                .filter(|s| s["kind"] == kind)
                .map(|s| match kind {
                    "ServiceAccount" => format!("{}/{}", text(s, "/namespace"), text(s, "/name")),
                    _ => text(s, "/name").to_owned(),
                })
                .collect();
            json!(all.join(", "))
        };
        let role = format!("{}/{}", text(binding, "/roleRef/kind"), text(binding, "/roleRef/name"));
        vec![name(binding), json!(role), age(binding), of("User"), of("Group"), of("ServiceAccount")]
    },
};

pub const SIGNING_REQUEST: Printer = Printer {
    columns: &[
        Column::NAME,
        AGE,
        Column::text("SignerName"),
        Column::text("Requestor"),
        Column::text("RequestedDuration"),
        Column::text("Condition"),
    ],
    cells: |request| {
        let is = |kind: &str| items(request, "/status/conditions").any(|c| c["type"] == kind);
        let mut state = match () {
            () if is("Denied") => "Denied".to_owned(),
            () if is("Approved") => "Approved".to_owned(),
            () => "Pending".to_owned(),
        };
        if is("Failed") {
            state.push_str(",Failed");
        }
        if !text(request, "/status/certificate").is_empty() {
            state.push_str(",Issued");
        }
        let duration = request.pointer("/spec/expirationSeconds").and_then(Value::as_i64);
        vec![
            name(request),
            age(request),
            json!(or(text(request, "/spec/signerName"), "<none>")),
            json!(text(request, "/spec/username")),
            json!(duration.map_or("<none>".to_owned(), human_duration)),
            json!(state),
        ]
    },
};

pub const LEASE: Printer = Printer {
    columns: &[Column::NAME, Column::text("Holder"), AGE],
    cells: |lease| vec![name(lease), json!(text(lease, "/spec/holderIdentity")), age(lease)],
};

pub const QUOTA: Printer = Printer {
    columns: &[Column::NAME, Column::text("Request"), Column::text("Limit"), AGE],
    cells: |quota| {
        let (mut requests, mut limits) = (Vec::new(), Vec::new());
        for (resource, hard) in quota.pointer("/status/hard").and_then(Value::as_object).into_iter().flatten() {
            let used = quota.pointer("/status/used").and_then(|u| u.get(resource));
            let line = format!("{resource}: {}/{}", or(&scalar(used), "0"), scalar(Some(hard)));
            if resource.starts_with("limits.") { limits.push(line) } else { requests.push(line) }
        }
        vec![name(quota), json!(requests.join(", ")), json!(limits.join(", ")), age(quota)]
    },
};

pub const PRIORITY_CLASS: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::integer("Value"),
        Column::boolean("Global-Default"),
        AGE,
        Column::wide("PreemptionPolicy"),
    ],
    cells: |class| {
        vec![
            name(class),
            json!(number(class, "/value")),
            json!(flag(class, "/globalDefault")),
            age(class),
            json!(text(class, "/preemptionPolicy")),
        ]
    },
};

pub const RUNTIME_CLASS: Printer = Printer {
    columns: &[Column::NAME, Column::text("Handler"), AGE],
    cells: |class| vec![name(class), json!(text(class, "/handler")), age(class)],
};

pub const WEBHOOKS: Printer = Printer {
    columns: &[Column::NAME, Column::integer("Webhooks"), AGE],
    cells: |hooks| vec![name(hooks), json!(items(hooks, "/webhooks").len()), age(hooks)],
};

pub const POLICY: Printer = Printer {
    columns: &[Column::NAME, Column::integer("Validations"), Column::text("ParamKind"), AGE],
    cells: |policy| {
        let kind = policy.pointer("/spec/paramKind").filter(|k| k.is_object());
        let kind = kind.map_or("<unset>".to_owned(), |k| format!("{}/{}", text(k, "/apiVersion"), text(k, "/kind")));
        vec![name(policy), json!(items(policy, "/spec/validations").len()), json!(kind), age(policy)]
    },
};

pub const POLICY_BINDING: Printer = Printer {
    columns: &[Column::NAME, Column::text("PolicyName"), Column::text("ParamRef"), AGE],
    cells: |binding| {
        let (namespace, param) = (text(binding, "/spec/paramRef/namespace"), text(binding, "/spec/paramRef/name"));
        let param = match param {
            "" => "<unset>".to_owned(),
            param => format!("{}/{param}", or(namespace, "*")),
        };
        vec![name(binding), json!(text(binding, "/spec/policyName")), json!(param), age(binding)]
    },
};

pub const FLOW_SCHEMA: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("PriorityLevel"),
        Column::text("MatchingPrecedence"),
        Column::text("DistinguisherMethod"),
        AGE,
        Column::text("MissingPL"),
    ],
    cells: |schema| {
        let dangling = items(schema, "/status/conditions").find(|c| c["type"] == "Dangling");
        vec![
            name(schema),
            json!(text(schema, "/spec/priorityLevelConfiguration/name")),
            json!(number(schema, "/spec/matchingPrecedence")),
            json!(or(text(schema, "/spec/distinguisherMethod/type"), "<none>")),
            age(schema),
            json!(dangling.map_or("?", |c| text(c, "/status"))),
        ]
    },
};

pub const PRIORITY_LEVEL: Printer = Printer {
    columns: &[
        Column::NAME,
        Column::text("Type"),
        Column::text("NominalConcurrencyShares"),
        Column::text("Queues"),
        Column::text("HandSize"),
        Column::text("QueueLengthLimit"),
        AGE,
    ],
    cells: |level| {
        let or_none = |pointer: &str| level.pointer(pointer).cloned().unwrap_or_else(|| json!("<none>"));
        let queuing = "/spec/limited/limitResponse/queuing";
        vec![
            name(level),
            json!(text(level, "/spec/type")),
            or_none("/spec/limited/nominalConcurrencyShares"),
            or_none(&format!("{queuing}/queues")),
            or_none(&format!("{queuing}/handSize")),
            or_none(&format!("{queuing}/queueLengthLimit")),
            age(level),
        ]
    },
};

pub const RESOURCE_CLAIM: Printer = Printer {
    columns: &[Column::NAME, Column::text("State"), AGE],
    cells: |claim| {
        let (ending, allocated) =
            (claim.pointer("/metadata/deletionTimestamp").is_some(), claim.pointer("/status/allocation").is_some());
        let mut states = Vec::new();
        if ending {
            states.push("deleted");
        }
        match (allocated, ending) {
            (true, _) => states.push("allocated"),
            (false, false) => states.push("pending"),
            (false, true) => {}
        }
        if allocated && items(claim, "/status/reservedFor").len() > 0 {
            states.push("reserved");
        }
        vec![name(claim), json!(states.join(",")), age(claim)]
    },
};

pub const RESOURCE_SLICE: Printer = Printer {
    columns: &[Column::NAME, Column::text("Node"), Column::text("Driver"), Column::text("Pool"), AGE],
    cells: |slice| {
        vec![
            name(slice),
            json!(text(slice, "/spec/nodeName")),
            json!(text(slice, "/spec/driver")),
            json!(text(slice, "/spec/pool/name")),
            age(slice),
        ]
    },
};

pub const API_SERVICE: Printer = Printer {
    columns: &[Column::NAME, Column::text("Service"), Column::text("Available"), AGE],
    cells: |service| {
        let backend = service.pointer("/spec/service").filter(|s| s.is_object());
        let backend = backend.map_or("Local".to_owned(), |s| format!("{}/{}", text(s, "/namespace"), text(s, "/name")));
        let available = items(service, "/status/conditions").find(|c| c["type"] == "Available");
        let available = match available {
            None => "Unknown".to_owned(),
            Some(c) if c["status"] == "True" => "True".to_owned(),
            Some(c) => format!("{} ({})", text(c, "/status"), text(c, "/reason")),
        };
        vec![name(service), json!(backend), json!(available), age(service)]
    },
};
