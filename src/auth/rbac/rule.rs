//! One rule of a Role or ClusterRole, and what it allows (`rbac.authorization.k8s.io/v1` PolicyRule).

use crate::auth::Attributes;
use serde::{Deserialize, Serialize};

/// Verbs on resources, or verbs on URL paths.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyRule {
    #[serde(deserialize_with = "null_as_empty", skip_serializing_if = "Vec::is_empty")]
    pub api_groups: Vec<String>,
    #[serde(rename = "nonResourceURLs", deserialize_with = "null_as_empty", skip_serializing_if = "Vec::is_empty")]
    pub non_resource_urls: Vec<String>,
    #[serde(deserialize_with = "null_as_empty", skip_serializing_if = "Vec::is_empty")]
    pub resource_names: Vec<String>,
    #[serde(deserialize_with = "null_as_empty", skip_serializing_if = "Vec::is_empty")]
    pub resources: Vec<String>,
    #[serde(deserialize_with = "null_as_empty")]
    pub verbs: Vec<String>,
}

/// JSON `null` where a list belongs, as Go clients write empty lists.
pub(super) fn null_as_empty<'de, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::<Vec<T>>::deserialize(deserializer)?.unwrap_or_default())
}

fn holds(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == wanted)
}

fn holds_or_all(list: &[String], wanted: &str) -> bool {
    list.iter().any(|item| item == "*" || item == wanted)
}

/// Whether the pattern of a rule (`/a/b`, `/a/*`, `*`) takes in `path`.
pub(super) fn url_matches(pattern: &str, path: &str) -> bool {
    pattern == "*"
        || pattern == path
        || pattern.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix.trim_end_matches('*')))
}

/// Whether the resource of a rule (`*`, `pods`, `pods/log`, `*/scale`) takes in `resource` with its subresource.
fn resource_matches(pattern: &str, resource: &str, subresource: &str) -> bool {
    if pattern == "*" {
        return true;
    }
    match (pattern.split_once('/'), subresource) {
        (None, "") => pattern == resource,
        (Some((of, sub)), wanted) if !wanted.is_empty() => sub == wanted && (of == resource || of == "*"),
        _ => false,
    }
}

impl PolicyRule {
    /// Whether this rule alone allows the request.
    pub fn allows(&self, request: &Attributes<'_>) -> bool {
        if !holds_or_all(&self.verbs, request.verb) {
            return false;
        }
        if !request.is_resource {
            return self.non_resource_urls.iter().any(|pattern| url_matches(pattern, request.path));
        }
        holds_or_all(&self.api_groups, request.group)
            && self.resources.iter().any(|r| resource_matches(r, request.resource, request.subresource))
            && (self.resource_names.is_empty() || holds(&self.resource_names, request.name))
    }

    /// Splits the rule into ones with a single verb on a single thing, of which cover checks are made.
    pub(super) fn atoms(&self) -> Vec<PolicyRule> {
        let one = |text: &String| vec![text.clone()];
        let mut atoms = Vec::new();
        for group in &self.api_groups {
            for resource in &self.resources {
                for verb in &self.verbs {
                    let atom = PolicyRule {
                        api_groups: one(group),
                        resources: one(resource),
                        verbs: one(verb),
                        ..PolicyRule::default()
                    };
                    if self.resource_names.is_empty() {
                        atoms.push(atom);
                    } else {
                        let named = |name| PolicyRule { resource_names: one(name), ..atom.clone() };
                        atoms.extend(self.resource_names.iter().map(named));
                    }
                }
            }
        }
        for url in &self.non_resource_urls {
            for verb in &self.verbs {
                atoms.push(PolicyRule { non_resource_urls: one(url), verbs: one(verb), ..PolicyRule::default() });
            }
        }
        atoms
    }

    /// Whether everything that `atom` allows is allowed by this rule. Literal comparison, as upstream's: `*` in the atom is
    /// only covered by `*`.
    pub(super) fn covers_atom(&self, atom: &PolicyRule) -> bool {
        let all = |mine: &[String], theirs: &[String]| holds(mine, "*") || theirs.iter().all(|t| holds(mine, t));
        let resource = |wanted: &String| {
            holds_or_all(&self.resources, wanted)
                || wanted.split_once('/').is_some_and(|(_, sub)| holds(&self.resources, &format!("*/{sub}")))
        };
        let names = self.resource_names.is_empty()
            || (!atom.resource_names.is_empty() && atom.resource_names.iter().all(|n| holds(&self.resource_names, n)));
        let url = |wanted: &String| {
            self.non_resource_urls
                .iter()
                .any(|mine| mine == wanted || mine.strip_suffix('*').is_some_and(|prefix| wanted.starts_with(prefix)))
        };
        all(&self.verbs, &atom.verbs)
            && all(&self.api_groups, &atom.api_groups)
            && atom.resources.iter().all(resource)
            && names
            && atom.non_resource_urls.iter().all(url)
    }
}

/// Joins atoms that differ only in their verb, as upstream does before it shows missing rights.
pub(super) fn compact(atoms: Vec<PolicyRule>) -> Vec<PolicyRule> {
    let mut rules: Vec<PolicyRule> = Vec::new();
    for atom in atoms {
        let same = |rule: &&mut PolicyRule| {
            rule.api_groups == atom.api_groups
                && rule.resources == atom.resources
                && rule.resource_names == atom.resource_names
                && rule.non_resource_urls == atom.non_resource_urls
        };
        match rules.iter_mut().find(same) {
            Some(rule) => {
                for verb in atom.verbs {
                    if !rule.verbs.contains(&verb) {
                        rule.verbs.push(verb);
                    }
                }
            }
            None => rules.push(atom),
        }
    }
    rules
}

/// What of `wanted` the rules in `own` do not cover, described and sorted as upstream does.
pub fn missing_rules(own: &[PolicyRule], wanted: &[PolicyRule]) -> Vec<String> {
    let uncovered = |atom: &PolicyRule| !own.iter().any(|rule| rule.covers_atom(atom));
    let missing = compact(wanted.iter().flat_map(PolicyRule::atoms).filter(uncovered).collect());
    let texts: std::collections::BTreeSet<String> = missing.iter().map(PolicyRule::describe).collect();
    texts.into_iter().collect()
}

impl PolicyRule {
    /// `{APIGroups:[""], Resources:["pods"], Verbs:["get"]}`
    fn describe(&self) -> String {
        let fields = [
            ("APIGroups", &self.api_groups),
            ("Resources", &self.resources),
            ("NonResourceURLs", &self.non_resource_urls),
            ("ResourceNames", &self.resource_names),
            ("Verbs", &self.verbs),
        ];
        let list = |items: &[String]| items.iter().map(|item| format!("{item:?}")).collect::<Vec<_>>().join(" ");
        let parts: Vec<String> = fields
            .iter()
            .filter(|(_, items)| !items.is_empty())
            .map(|(name, items)| format!("{name}:[{}]", list(items)))
            .collect();
        format!("{{{}}}", parts.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rule(json: serde_json::Value) -> PolicyRule {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn what_a_rule_allows() {
        let pods = rule(json!({ "apiGroups": [""], "resources": ["pods", "pods/log", "*/scale"], "verbs": ["get"] }));
        let get = Attributes { verb: "get", resource: "pods", name: "p", is_resource: true, ..Attributes::default() };
        let cases = [
            (get, true),
            (Attributes { verb: "list", ..get }, false),
            (Attributes { subresource: "log", ..get }, true),
            (Attributes { subresource: "exec", ..get }, false),
            (Attributes { resource: "replicationcontrollers", subresource: "scale", ..get }, true),
            (Attributes { resource: "secrets", ..get }, false),
            (Attributes { group: "apps", ..get }, false),
            (Attributes { is_resource: false, path: "/", ..get }, false),
        ];
        for (attributes, allowed) in cases {
            assert_eq!(pods.allows(&attributes), allowed, "{attributes:?}");
        }
        let named = rule(json!({ "apiGroups": ["*"], "resources": ["*"], "verbs": ["*"], "resourceNames": ["p"] }));
        assert!(named.allows(&get));
        assert!(!named.allows(&Attributes { name: "q", ..get }));
        assert!(!named.allows(&Attributes { verb: "list", name: "", ..get }));
        let urls = rule(json!({ "nonResourceURLs": ["/livez", "/openapi/*"], "verbs": ["get"], "resources": null }));
        let path = |path| Attributes { verb: "get", path, ..Attributes::default() };
        for (at, allowed) in [("/livez", true), ("/livez/ping", false), ("/openapi/v3", true), ("/openapi", false)] {
            assert_eq!(urls.allows(&path(at)), allowed, "{at}");
        }
    }

    #[test]
    fn missing_rights_are_what_no_single_rule_covers() {
        let own = [
            rule(json!({ "apiGroups": [""], "resources": ["pods", "*/scale"], "verbs": ["get", "list"] })),
            rule(json!({ "apiGroups": ["apps"], "resources": ["*"], "verbs": ["*"], "resourceNames": ["a"] })),
            rule(json!({ "nonResourceURLs": ["/x/*"], "verbs": ["get"] })),
        ];
        let missing = |wanted: serde_json::Value| missing_rules(&own, &[rule(wanted)]);
        let none: [&str; 0] = [];
        assert_eq!(missing(json!({ "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"] })), none);
        assert_eq!(missing(json!({ "apiGroups": [""], "resources": ["rc/scale"], "verbs": ["get"] })), none);
        assert_eq!(missing(json!({ "nonResourceURLs": ["/x/y"], "verbs": ["get"] })), none);
        assert_eq!(
            missing(json!({ "apiGroups": [""], "resources": ["pods", "secrets"], "verbs": ["get", "delete"] })),
            [
                r#"{APIGroups:[""], Resources:["pods"], Verbs:["delete"]}"#,
                r#"{APIGroups:[""], Resources:["secrets"], Verbs:["get" "delete"]}"#,
            ]
        );
        // A right to one name is no right to all.
        let all = json!({ "apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["get"] });
        assert_eq!(missing(all), [r#"{APIGroups:["apps"], Resources:["deployments"], Verbs:["get"]}"#]);
        let named = json!({ "apiGroups": ["apps"], "resources": ["x"], "verbs": ["get"], "resourceNames": ["a"] });
        assert_eq!(missing(named), none);
        assert_eq!(missing(json!({ "apiGroups": [""], "resources": ["*"], "verbs": ["get"] })).len(), 1);
    }
}
