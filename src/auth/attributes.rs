//! What a caller asks for, as authorization sees it.

use super::UserInfo;
use crate::apiserver::fields::FieldSelector;

/// One request in the terms of `SubjectAccessReview`: a verb on a resource, or a verb on a path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes<'a> {
    /// get, list, watch, create, update, patch, delete, deletecollection, impersonate, ...; for paths the lower-case method.
    pub verb: &'a str,
    /// API group, empty for the core group.
    pub group: &'a str,
    pub version: &'a str,
    /// Lower-case plural.
    pub resource: &'a str,
    pub subresource: &'a str,
    /// Empty for collections.
    pub name: &'a str,
    /// Empty for cluster-scoped resources and for all namespaces; for the resource `namespaces` the name itself.
    pub namespace: &'a str,
    /// The URL path of a request that is not for a resource.
    pub path: &'a str,
    pub is_resource: bool,
    /// The `fieldSelector` of a list, watch or deletecollection as sent (decoded), else empty: a node may list the pods with
    /// `spec.nodeName=<itself>`.
    pub field_selector: &'a str,
}

impl Attributes<'_> {
    /// Whether the request only reads, in upstream's sense (`get`, `list`, `watch`).
    pub fn is_read_only(&self) -> bool {
        matches!(self.verb, "get" | "list" | "watch")
    }

    /// Whether the field selector demands that `field` equals `value`.
    pub fn selects_field(&self, field: &str, value: &str) -> bool {
        !self.field_selector.is_empty()
            && FieldSelector::parse(self.field_selector).is_ok_and(|selector| selector.exact(field) == Some(value))
    }

    /// Upstream's sentence for a refused request, without the reason of the authorizer, e.g.
    /// `User "x" cannot list resource "pods" in API group "" in the namespace "default"`.
    fn refusal(&self, user: &UserInfo) -> String {
        let name = &user.name;
        if !self.is_resource {
            return format!("User \"{name}\" cannot {} path \"{}\"", self.verb, self.path);
        }
        let mut resource = self.resource.to_owned();
        if !self.subresource.is_empty() {
            resource.push('/');
            resource.push_str(self.subresource);
        }
        let scope = match self.namespace {
            "" => " at the cluster scope".to_owned(),
            namespace => format!(" in the namespace \"{namespace}\""),
        };
        format!("User \"{name}\" cannot {} resource \"{resource}\" in API group \"{}\"{scope}", self.verb, self.group)
    }

    /// The message of the 403 that answers a refused request:
    /// `pods "web" is forbidden: User "x" cannot get resource "pods" in API group "" in the namespace "default"`.
    pub fn forbidden_message(&self, user: &UserInfo, reason: &str) -> String {
        let mut refusal = self.refusal(user);
        if !reason.is_empty() {
            refusal.push_str(": ");
            refusal.push_str(reason);
        }
        if !self.is_resource {
            return format!("forbidden: {refusal}");
        }
        let resource = match self.group {
            "" => self.resource.to_owned(),
            group => format!("{}.{group}", self.resource),
        };
        match self.name {
            "" => format!("{resource} is forbidden: {refusal}"),
            name => format!("{resource} \"{name}\" is forbidden: {refusal}"),
        }
    }
}

/// The answer of the authorizers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Why (allowed), or what went wrong (refused); often empty for a refusal, as upstream's.
    pub reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_read_as_upstreams() {
        let user = UserInfo { name: "x".into(), ..UserInfo::default() };
        let list = Attributes {
            verb: "list",
            resource: "pods",
            namespace: "default",
            is_resource: true,
            ..Attributes::default()
        };
        assert_eq!(
            list.forbidden_message(&user, ""),
            r#"pods is forbidden: User "x" cannot list resource "pods" in API group "" in the namespace "default""#
        );
        let scale = Attributes {
            verb: "get",
            group: "apps",
            resource: "deployments",
            subresource: "scale",
            name: "web",
            is_resource: true,
            ..Attributes::default()
        };
        assert_eq!(
            scale.forbidden_message(&user, "why"),
            r#"deployments.apps "web" is forbidden: User "x" cannot get resource "deployments/scale" in API group "apps" at the cluster scope: why"#
        );
        let path = Attributes { verb: "get", path: "/metrics", ..Attributes::default() };
        assert_eq!(path.forbidden_message(&user, ""), r#"forbidden: User "x" cannot get path "/metrics""#);
    }
}
