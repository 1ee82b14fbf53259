//! `Impersonate-*` headers: acting as somebody else, each attribute of whom must be allowed to be taken on.

use super::identity::{SYSTEM_ANONYMOUS, SYSTEM_AUTHENTICATED, SYSTEM_UNAUTHENTICATED};
use super::{Attributes, Authorizer, Identity, UserInfo};
use crate::apiserver::status::Status;
use http::HeaderMap;

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";
const AUTHENTICATION: &str = "authentication.k8s.io";

/// The identity that the request acts under. The headers are taken out of the request.
pub fn impersonate(caller: Identity, headers: &mut HeaderMap, authorizer: &Authorizer) -> Result<Identity, Status> {
    let wanted = match Wanted::read(headers)? {
        Some(wanted) => wanted,
        None => return Ok(caller),
    };
    let check = |attributes: Attributes<'_>| {
        let attributes = Attributes { verb: "impersonate", is_resource: true, ..attributes };
        let decision = authorizer.authorize(&caller, &attributes);
        if decision.allowed {
            return Ok(());
        }
        let message = attributes.forbidden_message(caller.user(), &decision.reason);
        Err(Status::forbidden_message(attributes.group, attributes.resource, attributes.name, message))
    };
    let any = Attributes::default();
    let account = UserInfo { name: wanted.user.clone(), ..UserInfo::default() };
    let account = account.as_service_account();
    match account {
        Some((namespace, name)) => {
            check(Attributes { resource: "serviceaccounts", namespace, name, version: "v1", ..any })?
        }
        None => check(Attributes { resource: "users", name: &wanted.user, ..any })?,
    }
    for group in &wanted.groups {
        check(Attributes { resource: "groups", name: group, ..any })?;
    }
    let special = Attributes { group: AUTHENTICATION, version: "v1", ..any };
    for (key, value) in &wanted.extra {
        check(Attributes { resource: "userextras", subresource: key, name: value, ..special })?;
    }
    if !wanted.uid.is_empty() {
        check(Attributes { resource: "uids", name: &wanted.uid, ..special })?;
    }

    let mut user =
        UserInfo { name: wanted.user.clone(), uid: wanted.uid, groups: wanted.groups, ..UserInfo::default() };
    if let (Some((namespace, _)), true) = (account, user.groups.is_empty()) {
        user.groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    if user.name == SYSTEM_ANONYMOUS {
        if !user.in_group(SYSTEM_UNAUTHENTICATED) {
            user.groups.push(SYSTEM_UNAUTHENTICATED.to_owned());
        }
    } else if !user.in_group(SYSTEM_AUTHENTICATED) && !user.in_group(SYSTEM_UNAUTHENTICATED) {
        user.groups.push(SYSTEM_AUTHENTICATED.to_owned());
    }
    for (key, value) in wanted.extra {
        user.extra.entry(key).or_default().push(value);
    }
    Ok(caller.acting_as(user))
}

/// What the headers ask for.
struct Wanted {
    user: String,
    groups: Vec<String>,
    uid: String,
    extra: Vec<(String, String)>,
}

impl Wanted {
    fn read(headers: &mut HeaderMap) -> Result<Option<Wanted>, Status> {
        let names: Vec<http::HeaderName> =
            headers.keys().filter(|name| name.as_str().starts_with("impersonate-")).cloned().collect();
        if names.is_empty() {
            return Ok(None);
        }
        let mut wanted = Wanted { user: String::new(), groups: Vec::new(), uid: String::new(), extra: Vec::new() };
        for name in names {
            let mut values = Vec::new();
            for value in headers.get_all(&name) {
                let text = std::str::from_utf8(value.as_bytes())
                    .map_err(|_| Status::bad_request(format!("the header {name} is not UTF-8")))?;
                values.push(text.to_owned());
            }
            headers.remove(&name);
            match name.as_str() {
                USER => wanted.user = values.into_iter().next().unwrap_or_default(),
                GROUP => wanted.groups.append(&mut values),
                UID => wanted.uid = values.into_iter().next().unwrap_or_default(),
                other => match other.strip_prefix(EXTRA) {
                    Some(key) => {
                        let key = unescape(key);
                        wanted.extra.extend(values.into_iter().map(|value| (key.clone(), value)));
                    }
                    None => {
                        return Err(Status::bad_request(format!("unknown impersonation header {name}")));
                    }
                },
            }
        }
        if !wanted.user.is_empty() {
            return Ok(Some(wanted));
        }
        if wanted.groups.is_empty() && wanted.extra.is_empty() && wanted.uid.is_empty() {
            return Ok(None);
        }
        let asked: Vec<&String> = wanted.groups.iter().chain([&wanted.uid]).filter(|text| !text.is_empty()).collect();
        Err(Status::bad_request(format!("requested {asked:?} without impersonating a user")))
    }
}

/// Decodes `%xx`; text that is not well encoded stays as it is.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let decoded = after.get(..2).and_then(|hex| std::str::from_utf8(hex).ok());
        match decoded.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(decoded) => {
                bytes.push(decoded);
                rest = &after[2..];
            }
            None => return text.to_owned(),
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::objects::testing::World;
    use serde_json::json;

    const RBAC: &str = "rbac.authorization.k8s.io";

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn each_attribute_must_be_allowed() {
        let mut world = World::new();
        let authorizer = Authorizer::new(world.objects.store().clone());
        let rules = json!([
            { "apiGroups": [""], "resources": ["users"], "verbs": ["impersonate"], "resourceNames": ["jane"] },
            { "apiGroups": [""], "resources": ["groups"], "verbs": ["impersonate"], "resourceNames": ["dev"] },
            { "apiGroups": [AUTHENTICATION], "resources": ["userextras/acme.com/team"], "verbs": ["impersonate"] },
        ]);
        world.put(RBAC, "clusterroles", json!({ "metadata": { "name": "as" }, "rules": rules }));
        world.put(
            RBAC,
            "clusterrolebindings",
            json!({ "metadata": { "name": "as" },
            "roleRef": { "kind": "ClusterRole", "name": "as" }, "subjects": [{ "kind": "User", "name": "bob" }] }),
        );
        let ask = |caller: &Identity, pairs: &[(&'static str, &str)]| {
            let mut headers = headers(pairs);
            let result = impersonate(caller.clone(), &mut headers, &authorizer);
            assert!(headers.is_empty());
            result
        };
        let bob = Identity::in_process("bob", &[]);
        let team = ("impersonate-extra-acme.com%2fteam", "a");
        let jane = ask(&bob, &[(USER, "jane"), (GROUP, "dev"), team]).unwrap();
        assert_eq!(jane.user().groups, ["dev", SYSTEM_AUTHENTICATED]);
        assert_eq!(jane.user().extra["acme.com/team"], ["a"]);
        assert_eq!(jane.impersonator().unwrap().name, "bob");
        let refused = |pairs: &[(&'static str, &str)]| ask(&bob, pairs).unwrap_err();
        assert_eq!(
            refused(&[(USER, "root")]).message(),
            r#"users "root" is forbidden: User "bob" cannot impersonate resource "users" in API group "" at the cluster scope"#
        );
        for pairs in [
            [(USER, "jane"), (GROUP, "system:masters")],
            [(USER, "jane"), (UID, "1")],
            [(USER, "system:serviceaccount:kube-system:admin"), (GROUP, "dev")],
            [(USER, "jane"), ("impersonate-extra-other", "x")],
        ] {
            assert_eq!(refused(&pairs).code(), 403, "{pairs:?}");
        }
        assert_eq!(refused(&[(GROUP, "dev")]).code(), 400);
        let admin = Identity::apiserver();
        let robot = ask(&admin, &[(USER, "system:serviceaccount:a:robot")]).unwrap();
        assert!(robot.user().in_group("system:serviceaccounts:a"));
        assert!(!robot.user().in_group(crate::auth::identity::SYSTEM_MASTERS));
        assert!(ask(&bob, &[]).unwrap().impersonator().is_none());
    }
}
