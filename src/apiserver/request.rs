//! The fixed URL grammar: what a request is about, as upstream's `RequestInfo`.

use super::fields::FieldSelector;
use super::names;
use super::query::Query;
use crate::auth::Attributes;
use http::Method;

/// What a request asks for. Borrowed from the decoded path and the query.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo<'a> {
    pub is_resource: bool,
    pub path: &'a str,
    /// create, get, list, watch, update, patch, delete, deletecollection; for other paths the lower-case method.
    pub verb: &'a str,
    pub group: &'a str,
    pub version: &'a str,
    pub namespace: &'a str,
    pub resource: &'a str,
    pub subresource: &'a str,
    pub name: String,
    /// What follows the subresource, without a leading slash (proxies).
    pub rest: &'a str,
    /// Whether a rest is there at all: `/proxy` and `/proxy/` differ.
    pub has_rest: bool,
    /// The `fieldSelector` of a list, watch or deletecollection; the node authorizer judges by it.
    pub field_selector: String,
}

fn lower(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::POST => "post",
        Method::PUT => "put",
        Method::DELETE => "delete",
        Method::PATCH => "patch",
        Method::HEAD => "head",
        Method::OPTIONS => "options",
        _ => "",
    }
}

/// The next segment and what follows its slash.
fn segment(path: &str) -> (&str, Option<&str>) {
    match path.split_once('/') {
        Some((head, rest)) => (head, Some(rest)),
        None => (path, None),
    }
}

impl<'a> RequestInfo<'a> {
    /// Reads method, decoded path and query.
    ///
    /// # Errors
    /// The text of a `watch/` or `proxy/` prefix with nothing behind it.
    pub fn new(method: &Method, path: &'a str, query: &Query<'_>) -> Result<RequestInfo<'a>, String> {
        let mut info = RequestInfo { path, verb: lower(method), ..RequestInfo::default() };
        let trimmed = path.trim_matches('/');
        let (prefix, Some(rest)) = segment(trimmed) else { return Ok(info) };
        let (group, rest) = match prefix {
            "api" => ("", rest),
            "apis" => match segment(rest) {
                (group, Some(rest)) => (group, rest),
                _ => return Ok(info),
            },
            _ => return Ok(info),
        };
        let (version, Some(mut rest)) = segment(rest) else { return Ok(info) };
        (info.is_resource, info.group, info.version) = (true, group, version);
        info.verb = match *method {
            Method::POST => "create",
            Method::GET | Method::HEAD => "get",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "",
        };
        if let (special @ ("watch" | "proxy"), after) = segment(rest) {
            rest = after.ok_or_else(|| format!("unable to determine kind and namespace from url, {path}"))?;
            info.verb = special;
        }
        if let ("namespaces", Some(after)) = segment(rest) {
            let (namespace, after) = segment(after);
            info.namespace = namespace;
            if let Some(after) = after.filter(|a| !matches!(segment(a).0, "status" | "finalize")) {
                rest = after;
            }
        }
        let (resource, after) = segment(rest);
        info.resource = resource;
        if let Some(after) = after {
            let (name, after) = segment(after);
            info.name = name.to_owned();
            if let Some(after) = after.filter(|_| info.verb != "proxy") {
                let (subresource, after) = segment(after);
                info.subresource = subresource;
                // The trailing slash is part of a proxied path.
                info.has_rest = after.is_some() || path.ends_with('/');
                info.rest = match after {
                    // `after` lies in `trimmed`, which lost the slashes at the end of `path`.
                    Some(after) => {
                        &path[path.len() - path.trim_start_matches('/').len() + trimmed.len() - after.len()..]
                    }
                    None => "",
                };
            }
        }
        info.select(query);
        Ok(info)
    }

    /// What depends on the query: list or watch, and the name in a field selector.
    fn select(&mut self, query: &Query<'_>) {
        if self.name.is_empty() && self.verb == "get" {
            self.verb = if query.bool("watch") { "watch" } else { "list" };
        }
        if self.name.is_empty() && matches!(self.verb, "list" | "watch") {
            let selector = query.get("fieldSelector").map(FieldSelector::parse);
            if let Some(name) = selector.and_then(Result::ok).as_ref().and_then(|s| s.exact("metadata.name"))
                && names::path_segment(name, false).is_empty()
            {
                self.name = name.to_owned();
            }
        }
        if self.name.is_empty() && self.verb == "delete" {
            self.verb = "deletecollection";
        }
        if matches!(self.verb, "list" | "watch" | "deletecollection") {
            self.field_selector = query.get("fieldSelector").unwrap_or_default().to_owned();
        }
    }

    /// The question for the authorizer.
    pub fn attributes(&self) -> Attributes<'_> {
        Attributes {
            verb: self.verb,
            group: self.group,
            version: self.version,
            resource: self.resource,
            subresource: self.subresource,
            name: &self.name,
            namespace: self.namespace,
            path: self.path,
            is_resource: self.is_resource,
            field_selector: &self.field_selector,
        }
    }

    /// Whether it is a resource request that changes nothing.
    pub fn is_read_only(&self) -> bool {
        matches!(self.verb, "get" | "list" | "watch" | "head" | "options")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(method: Method, url: &'static str) -> RequestInfo<'static> {
        let (path, query) = url.split_once('?').map_or((url, None), |(p, q)| (p, Some(q)));
        RequestInfo::new(&method, path, &Query::parse(query)).unwrap()
    }

    fn short(i: &RequestInfo<'_>) -> String {
        format!("{} {}/{} {}:{}/{}/{}", i.verb, i.group, i.version, i.namespace, i.resource, i.name, i.subresource)
    }

    #[test]
    fn grammar() {
        for (method, url, expected) in [
            (Method::GET, "/api/v1/namespaces/default/pods/p", "get /v1 default:pods/p/"),
            (Method::GET, "/api/v1/namespaces/default/pods/p/log", "get /v1 default:pods/p/log"),
            (Method::GET, "/api/v1/pods", "list /v1 :pods//"),
            (Method::GET, "/api/v1/pods?watch=1", "watch /v1 :pods//"),
            (Method::GET, "/api/v1/watch/namespaces/d/pods/p", "watch /v1 d:pods/p/"),
            (Method::GET, "/api/v1/namespaces/d", "get /v1 d:namespaces/d/"),
            (Method::PUT, "/api/v1/namespaces/d/status", "update /v1 d:namespaces/d/status"),
            (Method::PUT, "/api/v1/namespaces/d/finalize", "update /v1 d:namespaces/d/finalize"),
            (Method::DELETE, "/apis/apps/v1/namespaces/d/deployments", "deletecollection apps/v1 d:deployments//"),
            (Method::DELETE, "/apis/apps/v1/namespaces/d/deployments/x", "delete apps/v1 d:deployments/x/"),
            (Method::POST, "/apis/apps/v1/namespaces/d/deployments", "create apps/v1 d:deployments//"),
            (Method::GET, "/api/v1/pods?fieldSelector=metadata.name%3Dx", "list /v1 :pods/x/"),
            (Method::GET, "/version", "get / ://"),
            (Method::GET, "/apis/apps/v1", "get / ://"),
        ] {
            assert_eq!(short(&info(method, url)), expected, "{url}");
        }
        assert!(!info(Method::GET, "/apis/apps/v1/").is_resource);
        assert!(RequestInfo::new(&Method::GET, "/api/v1/watch", &Query::default()).is_err());
    }

    #[test]
    fn proxied_paths_keep_their_slashes() {
        let i = info(Method::GET, "/api/v1/namespaces/d/services/http:web:80/proxy/a//b/");
        assert_eq!((&*i.name, i.subresource, i.rest, i.has_rest), ("http:web:80", "proxy", "a//b/", true));
        let i = info(Method::GET, "/api/v1/namespaces/d/pods/p/proxy/");
        assert_eq!((i.subresource, i.rest, i.has_rest), ("proxy", "", true));
        let i = info(Method::GET, "/api/v1/namespaces/d/pods/p/proxy");
        assert_eq!((i.rest, i.has_rest), ("", false));
    }
}
