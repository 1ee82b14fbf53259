//! The roles and bindings that every cluster starts with, and the reconciliation that puts back what is missing from them.
//! What an administrator added stays; an object whose annotation `rbac.authorization.kubernetes.io/autoupdate` is `false`
//! is left alone.

use super::rule::PolicyRule;
use futures::{StreamExt, TryStreamExt};
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};

const TABLE: &str = include_str!("bootstrap_policy.txt");
const API: &str = "/apis/rbac.authorization.k8s.io/v1";
const GROUP: &str = "rbac.authorization.k8s.io";
const AUTOUPDATE: &str = "rbac.authorization.kubernetes.io/autoupdate";
/// Objects written at the same time; the log batches them.
const PARALLEL: usize = 32;

/// Why the bootstrap policy could not be put in place.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    #[error("line {line} of the bootstrap policy is not understood")]
    BadTable { line: usize },
    #[error("writing the bootstrap object {name}")]
    Write {
        name: String,
        #[source]
        source: Box<kube::Error>,
    },
}

/// One object of the table and where it lives.
#[derive(Debug)]
pub struct BootstrapObject {
    plural: &'static str,
    namespace: String,
    name: String,
    object: Value,
}

fn list(text: &str) -> Vec<String> {
    text.trim().split(',').map(|item| if item == "core" { String::new() } else { item.to_owned() }).collect()
}

fn parse_rule(line: &str) -> Option<PolicyRule> {
    let columns: Vec<&str> = line.split('|').map(str::trim).collect();
    let (verbs, rest) = columns.split_first()?;
    let verbs = list(verbs);
    Some(match rest {
        ["url", urls] => PolicyRule { verbs, non_resource_urls: list(urls), ..PolicyRule::default() },
        [groups, resources] => {
            PolicyRule { verbs, api_groups: list(groups), resources: list(resources), ..PolicyRule::default() }
        }
        [groups, resources, names] => PolicyRule {
            verbs,
            api_groups: list(groups),
            resources: list(resources),
            resource_names: list(names),
            ..PolicyRule::default()
        },
        _ => return None,
    })
}

fn parse_subject(word: &str) -> Option<Value> {
    let (kind, name) = word.split_once(':')?;
    Some(match kind {
        "ServiceAccount" => {
            let (namespace, name) = name.split_once('/')?;
            json!({ "kind": kind, "namespace": namespace, "name": name })
        }
        _ => json!({ "kind": kind, "apiGroup": GROUP, "name": name }),
    })
}

fn parse_head(line: &str) -> Option<BootstrapObject> {
    let (kind, rest) = line.split_once(' ')?;
    let mut words = rest.split(' ');
    let full = words.next()?;
    let (namespace, name) = match kind {
        "Role" | "RoleBinding" => full.split_once('/')?,
        _ => ("", full),
    };
    let mut object = json!({
        "apiVersion": format!("{GROUP}/v1"), "kind": kind,
        "metadata": {
            "name": name,
            "labels": { "kubernetes.io/bootstrapping": "rbac-defaults" },
            "annotations": { AUTOUPDATE: "true" },
        },
    });
    if !namespace.is_empty() {
        object["metadata"]["namespace"] = namespace.into();
    }
    let plural = match kind {
        "ClusterRole" => "clusterroles",
        "Role" => "roles",
        "ClusterRoleBinding" => "clusterrolebindings",
        "RoleBinding" => "rolebindings",
        _ => return None,
    };
    if plural.ends_with("bindings") {
        let ("=", role, "to") = (words.next()?, words.next()?, words.next()?) else { return None };
        let (role_kind, role_name) = role.split_once(':')?;
        object["roleRef"] = json!({ "apiGroup": GROUP, "kind": role_kind, "name": role_name });
        let subjects = words.filter(|w| !w.is_empty()).map(parse_subject).collect::<Option<Vec<_>>>()?;
        if !subjects.is_empty() {
            object["subjects"] = subjects.into();
        }
    } else {
        object["rules"] = json!([]);
        for word in words {
            let label = |aggregate: &str| format!("{GROUP}/aggregate-to-{aggregate}");
            if let Some(aggregate) = word.strip_prefix("into:") {
                object["metadata"]["labels"][label(aggregate)] = "true".into();
            } else {
                let selector = json!({ "matchLabels": { label(word.strip_prefix("from:")?): "true" } });
                object["aggregationRule"] = json!({ "clusterRoleSelectors": [selector] });
            }
        }
    }
    Some(BootstrapObject { plural, namespace: namespace.to_owned(), name: name.to_owned(), object })
}

/// Parses the table; done once at start, nothing of it is kept.
pub fn objects() -> Result<Vec<BootstrapObject>, BootstrapError> {
    let mut all: Vec<BootstrapObject> = Vec::new();
    for (number, line) in TABLE.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#')) {
        let bad = || BootstrapError::BadTable { line: number + 1 };
        if line.starts_with(' ') {
            let rule = parse_rule(line).ok_or_else(bad)?;
            let rule = serde_json::to_value(rule).map_err(|_| bad())?;
            let rules = all.last_mut().and_then(|last| last.object.get_mut("rules")?.as_array_mut());
            rules.ok_or_else(bad)?.push(rule);
        } else {
            all.push(parse_head(line).ok_or_else(bad)?);
        }
    }
    let aggregated: Vec<(usize, Vec<Value>)> =
        (0..all.len()).filter_map(|at| Some((at, aggregate(&all, &all[at].object)?))).collect();
    for (at, rules) in aggregated {
        all[at].object["rules"] = rules.into();
    }
    Ok(all)
}

/// The rules that an aggregating role has from the start, so that nobody waits for the aggregation loop.
fn aggregate(all: &[BootstrapObject], role: &Value) -> Option<Vec<Value>> {
    let selected = role.get("aggregationRule")?["clusterRoleSelectors"][0]["matchLabels"].as_object()?;
    let mut rules: Vec<Value> = Vec::new();
    for other in all.iter().map(|o| &o.object).filter(|o| *o != role) {
        if selected.iter().all(|(label, value)| other["metadata"]["labels"].get(label) == Some(value)) {
            let own = other["rules"].as_array().cloned().unwrap_or_default();
            let nested = aggregate(all, other).unwrap_or_default();
            for rule in own.into_iter().chain(nested) {
                if !rules.contains(&rule) {
                    rules.push(rule);
                }
            }
        }
    }
    Some(rules)
}

/// What must change in `existing` so that it holds at least what `wanted` says; `None` when nothing must.
fn repaired(existing: &Value, wanted: &Value) -> Option<Value> {
    if existing["metadata"]["annotations"][AUTOUPDATE] == "false" {
        return None;
    }
    let mut result = existing.clone();
    for map in ["labels", "annotations"] {
        for (key, value) in wanted["metadata"][map].as_object().into_iter().flatten() {
            result["metadata"][map][key] = value.clone();
        }
    }
    if wanted.get("aggregationRule").is_some() {
        // Its rules are the aggregation loop's.
        result["aggregationRule"] = wanted["aggregationRule"].clone();
    } else if wanted.get("rules").is_some() {
        let have: Vec<PolicyRule> = serde_json::from_value(existing["rules"].clone()).unwrap_or_default();
        let want: Vec<PolicyRule> = serde_json::from_value(wanted["rules"].clone()).unwrap_or_default();
        let missing = want.iter().flat_map(PolicyRule::atoms).filter(|atom| !have.iter().any(|r| r.covers_atom(atom)));
        let missing: Vec<Value> =
            super::rule::compact(missing.collect()).iter().filter_map(|rule| serde_json::to_value(rule).ok()).collect();
        if !missing.is_empty() {
            let mut rules = existing["rules"].as_array().cloned().unwrap_or_default();
            rules.extend(missing);
            result["rules"] = rules.into();
        }
    } else {
        let mut subjects = existing["subjects"].as_array().cloned().unwrap_or_default();
        for subject in wanted["subjects"].as_array().into_iter().flatten() {
            if !subjects.contains(subject) {
                subjects.push(subject.clone());
            }
        }
        if !subjects.is_empty() {
            result["subjects"] = subjects.into();
        }
    }
    (result != *existing).then_some(result)
}

async fn send(client: &kube::Client, method: Method, path: &str, body: Option<&Value>) -> Result<Value, kube::Error> {
    let bytes = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
    let request = Request::builder().method(method).uri(path).header("content-type", "application/json").body(bytes);
    client.request(request.map_err(kube::Error::HttpError)?).await
}

fn is_code(error: &kube::Error, code: StatusCode) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code.as_u16())
}

async fn reconcile_one(client: &kube::Client, wanted: &BootstrapObject) -> Result<(), kube::Error> {
    let collection = match wanted.namespace.as_str() {
        "" => format!("{API}/{}", wanted.plural),
        namespace => format!("{API}/namespaces/{namespace}/{}", wanted.plural),
    };
    let path = format!("{collection}/{}", wanted.name);
    loop {
        let existing = match send(client, Method::GET, &path, None).await {
            Ok(existing) => existing,
            Err(error) if is_code(&error, StatusCode::NOT_FOUND) => {
                match send(client, Method::POST, &collection, Some(&wanted.object)).await {
                    Err(error) if is_code(&error, StatusCode::CONFLICT) => continue,
                    other => return other.map(drop),
                }
            }
            Err(error) => return Err(error),
        };
        if wanted.object.get("roleRef").is_some_and(|role| existing["roleRef"] != *role) {
            // A roleRef cannot be changed in place.
            send(client, Method::DELETE, &path, None).await?;
            continue;
        }
        let Some(repaired) = repaired(&existing, &wanted.object) else { return Ok(()) };
        match send(client, Method::PUT, &path, Some(&repaired)).await {
            Err(error) if is_code(&error, StatusCode::CONFLICT) => continue,
            other => return other.map(drop),
        }
    }
}

/// Creates what is missing and repairs what lost something; `client` acts as the server itself. Namespaces `kube-system` and
/// `kube-public` must exist.
pub async fn reconcile(client: &kube::Client) -> Result<(), BootstrapError> {
    futures::stream::iter(objects()?)
        .map(|wanted| async move {
            let written = reconcile_one(client, &wanted).await;
            written.map_err(|source| BootstrapError::Write { name: wanted.name, source: Box::new(source) })
        })
        .buffer_unordered(PARALLEL)
        .try_collect::<()>()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(objects: &[BootstrapObject], plural: &str, name: &str) -> Value {
        objects.iter().find(|o| o.plural == plural && o.name == name).unwrap().object.clone()
    }

    #[test]
    fn the_table_is_understood_whole() {
        let objects = objects().unwrap();
        assert_eq!(objects.len(), 134);
        let admin = find(&objects, "clusterrolebindings", "cluster-admin");
        assert_eq!(admin["subjects"][0]["name"], "system:masters");
        let view = find(&objects, "clusterroles", "view");
        assert!(!view["rules"].as_array().unwrap().is_empty());
        let admin = find(&objects, "clusterroles", "admin");
        let text = admin["rules"].to_string();
        assert!(text.contains("rolebindings") && text.contains("pods/exec"), "admin aggregates edit's parts too");
        let node = find(&objects, "clusterrolebindings", "system:node");
        assert!(node.get("subjects").is_none());
    }

    #[test]
    fn repairs_add_and_never_take_away() {
        let wanted = find(&objects().unwrap(), "clusterroles", "system:discovery");
        assert_eq!(repaired(&wanted, &wanted), None);
        let mut poorer = wanted.clone();
        poorer["rules"] = json!([{ "nonResourceURLs": ["/mine"], "verbs": ["get"] }]);
        let fixed = repaired(&poorer, &wanted).unwrap();
        assert_eq!(fixed["rules"][0], poorer["rules"][0]);
        assert!(fixed["rules"].to_string().contains("/openapi/*"));
        assert_eq!(repaired(&fixed, &wanted), None);
        poorer["metadata"]["annotations"][AUTOUPDATE] = "false".into();
        assert_eq!(repaired(&poorer, &wanted), None);
    }

    #[test]
    fn the_policy_gives_each_caller_its_part() {
        use crate::auth::objects::testing::World;
        use crate::auth::{Attributes, Authorizer, Identity, UserInfo};
        let mut world = World::new();
        for o in objects().unwrap() {
            world.put(GROUP, o.plural, o.object);
        }
        let bind = json!({ "metadata": { "name": "jane", "namespace": "a" }, "subjects": [{ "kind": "User", "name": "jane" }],
            "roleRef": { "kind": "ClusterRole", "name": "view" } });
        world.put(GROUP, "rolebindings", bind);
        let authorizer = Authorizer::new(world.objects.store().clone());
        let named = |name: &str| Identity::in_process(name, &[]);
        let anonymous = UserInfo {
            name: "system:anonymous".into(),
            groups: vec!["system:unauthenticated".into()],
            ..UserInfo::default()
        };
        let on = |verb, group, resource, namespace| Attributes {
            verb,
            group,
            resource,
            namespace,
            is_resource: true,
            ..Attributes::default()
        };
        let renewal = Attributes {
            subresource: "selfnodeclient",
            ..on("create", "certificates.k8s.io", "certificatesigningrequests", "")
        };
        let path = |path| Attributes { verb: "get", path, ..Attributes::default() };
        let account = Identity::controller("stranger");
        for (caller, request, allowed) in [
            (&Identity::apiserver(), on("delete", "", "nodes", ""), true),
            (&named("system:kube-scheduler"), on("list", "", "pods", ""), true),
            (&named("system:kube-scheduler"), on("get", "", "secrets", "a"), false),
            (&Identity::controller("replicaset-controller"), on("create", "", "pods", "a"), true),
            (&Identity::controller("replicaset-controller"), on("create", "", "secrets", "a"), false),
            (&Identity::controller("namespace-controller"), on("deletecollection", "x.io", "things", "a"), true),
            (&Identity::node("n1"), on("watch", "", "services", ""), true),
            (&Identity::node("n1"), on("watch", "discovery.k8s.io", "endpointslices", ""), true),
            (&Identity::node("n1"), on("list", "", "secrets", ""), false),
            (&Identity::node("n1"), on("create", "", "secrets", "a"), false),
            (&Identity::node("n1"), renewal, true),
            (&named("jane"), renewal, false),
            (&named("jane"), on("list", "", "pods", "a"), true),
            (&named("jane"), on("get", "", "secrets", "a"), false),
            (&named("jane"), on("list", "", "pods", "b"), false),
            (&named("jane"), on("create", "authorization.k8s.io", "selfsubjectaccessreviews", ""), true),
            (&named("jane"), path("/openapi/v3"), true),
            (&named("jane"), path("/metrics"), false),
            (&account, path("/openid/v1/jwks"), true),
            (&account, on("list", "", "pods", "kube-system"), false),
        ] {
            let decision = authorizer.authorize(caller, &request);
            assert_eq!(decision.allowed, allowed, "{} {request:?}", caller.user().name);
        }
        for (at, allowed) in [("/readyz", true), ("/version", true), ("/api", false), ("/openid/v1/jwks", false)] {
            assert_eq!(authorizer.authorize_user(&anonymous, &path(at)).allowed, allowed, "{at}");
        }
    }
}
