//! `paths`: the operations of each resource.

use serde_json::{Map, Value, json};

use super::components::Names;
use crate::apiserver::resources::{Resource, Subresource, SubresourceKind, Verbs};
use crate::schema::node::Schema;

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.";
const MEDIA: [&str; 3] = ["application/json", "application/vnd.kubernetes.protobuf", "application/yaml"];
const STREAMS: [&str; 2] = ["application/json;stream=watch", "application/vnd.kubernetes.protobuf;stream=watch"];
const PATCHES: [&str; 4] = [
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];

const WRITE: [&str; 3] = ["dryRun", "fieldManager", "fieldValidation"];
const PATCH: [&str; 4] = ["dryRun", "fieldManager", "fieldValidation", "force"];
const DELETE: [&str; 4] = ["dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"];
const LIST: [&str; 10] = [
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
const DELETE_COLLECTION: [&str; 12] = [
    "continue",
    "dryRun",
    "fieldSelector",
    "gracePeriodSeconds",
    "labelSelector",
    "limit",
    "orphanDependents",
    "propagationPolicy",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
];

/// Writes the paths of one group and version.
pub struct Paths<'a> {
    pub schema: &'a Schema,
    pub group: &'a str,
    pub version: &'a str,
}

/// One operation before it is written.
struct Operation<'a> {
    /// `createCoreV1NamespacedPod`
    id: String,
    action: &'static str,
    description: String,
    parameters: &'a [&'a str],
    /// OpenAPI name of the body; empty for none.
    body: String,
    /// OpenAPI name of the answer; empty for text.
    answer: String,
    codes: &'a [&'a str],
    gvk: (&'a str, &'a str, &'a str),
}

type Path = (String, Value);

impl Paths<'_> {
    /// `/apis/apps/v1`
    fn base(&self) -> String {
        format!("/{}", super::document_path(self.group, self.version))
    }

    /// `AppsV1`, `CoreV1`, `RbacAuthorizationV1`
    fn prefix(&self) -> String {
        let group = if self.group.is_empty() { "core" } else { self.group };
        let group = group.strip_suffix(".k8s.io").unwrap_or(group);
        let capital = |part: &str| {
            let mut chars = part.chars();
            chars.next().map_or(String::new(), |c| c.to_ascii_uppercase().to_string() + chars.as_str())
        };
        group.split('.').chain([self.version]).map(capital).collect()
    }

    fn tag(&self) -> String {
        let mut chars = self.prefix();
        chars.truncate(chars.len() - self.version.len());
        let mut chars = chars.chars();
        let first = chars.next().map(|c| c.to_ascii_lowercase());
        first.into_iter().chain(chars).chain("_".chars()).chain(self.version.chars()).collect()
    }

    fn name(&self, group: &str, version: &str, kind: &str) -> String {
        let id = self.schema.by_gvk(group, version, kind);
        id.and_then(|id| Names::new(self.schema).of(id)).unwrap_or_default()
    }

    /// The list of resources of the group and version.
    pub fn root(&self) -> Path {
        let operation = self.operation(Operation {
            id: format!("get{}APIResources", self.prefix()),
            action: "",
            description: "get available resources".to_owned(),
            parameters: &[],
            body: String::new(),
            answer: format!("{META}APIResourceList"),
            codes: &["200"],
            gvk: ("", "", ""),
        });
        (format!("{}/", self.base()), json!({ "get": operation }))
    }

    /// All paths of one resource.
    pub fn of(&self, row: &Resource) -> Vec<Path> {
        let base = self.base();
        let (folder, scoped) = if row.is_namespaced() {
            (format!("{base}/namespaces/{{namespace}}/{}", row.plural), "Namespaced")
        } else {
            (format!("{base}/{}", row.plural), "")
        };
        let mut paths = Vec::new();
        if row.is_namespaced() && row.verbs.contains(Verbs::LIST) {
            let id = format!("list{}{}ForAllNamespaces", self.prefix(), row.kind);
            let list = self.list(row, id);
            paths.push((format!("{base}/{}", row.plural), json!({"get": list, "parameters": [query("pretty")]})));
        }
        paths.push((folder.clone(), self.collection(row, scoped)));
        let item = self.item(row, scoped);
        if item.keys().any(|k| k != "parameters") {
            paths.push((format!("{folder}/{{name}}"), Value::Object(item)));
        }
        for sub in &row.subresources {
            for (suffix, id) in suffixes(sub) {
                let path = format!("{folder}/{{name}}/{}{suffix}", sub.name);
                paths.push((path, self.subresource(row, scoped, sub, suffix, id)));
            }
        }
        paths
    }

    fn list(&self, row: &Resource, id: String) -> Value {
        self.operation(Operation {
            id,
            action: "list",
            description: format!("list or watch objects of kind {}", row.kind),
            parameters: &LIST,
            body: String::new(),
            answer: self.name(self.group, self.version, &format!("{}List", row.kind)),
            codes: &["200"],
            gvk: (self.group, self.version, &row.kind),
        })
    }

    fn own<'a>(&self, row: &'a Resource, id: String, action: &'static str, description: &str) -> Operation<'a>
    where
        Self: 'a,
    {
        let kind = self.name(self.group, self.version, &row.kind);
        Operation {
            id,
            action,
            description: format!("{description} {}", article(&row.kind)),
            parameters: &[],
            body: String::new(),
            answer: kind,
            codes: &["200"],
            gvk: ("", "", &row.kind),
        }
    }

    fn collection(&self, row: &Resource, scoped: &str) -> Value {
        let kind = self.name(self.group, self.version, &row.kind);
        let id = |verb: &str| format!("{verb}{}{scoped}{}", self.prefix(), row.kind);
        let mut out = Map::new();
        if row.verbs.contains(Verbs::LIST) {
            out.insert("get".to_owned(), self.list(row, id("list")));
        }
        if row.verbs.contains(Verbs::CREATE) {
            let operation = Operation {
                parameters: &WRITE,
                body: kind,
                codes: &["200", "201", "202"],
                ..self.own(row, id("create"), "post", "create")
            };
            out.insert("post".to_owned(), self.operation(operation));
        }
        if row.verbs.contains(Verbs::DELETECOLLECTION) {
            let operation = Operation {
                parameters: &DELETE_COLLECTION,
                body: format!("{META}DeleteOptions"),
                answer: format!("{META}Status"),
                description: format!("delete collection of {}", row.kind),
                ..self.own(
                    row,
                    format!("delete{}Collection{scoped}{}", self.prefix(), row.kind),
                    "deletecollection",
                    "",
                )
            };
            out.insert("delete".to_owned(), self.operation(operation));
        }
        out.insert("parameters".to_owned(), path_parameters(!scoped.is_empty(), false, false));
        Value::Object(out)
    }

    fn item(&self, row: &Resource, scoped: &str) -> Map<String, Value> {
        let kind = self.name(self.group, self.version, &row.kind);
        let id = |verb: &str| format!("{verb}{}{scoped}{}", self.prefix(), row.kind);
        let mut out = Map::new();
        let mut put = |method: &str, operation| out.insert(method.to_owned(), self.operation(operation));
        if row.verbs.contains(Verbs::GET) {
            put("get", self.own(row, id("read"), "get", "read the specified"));
        }
        if row.verbs.contains(Verbs::UPDATE) {
            let base = self.own(row, id("replace"), "put", "replace the specified");
            put("put", Operation { parameters: &WRITE, body: kind, codes: &["200", "201"], ..base });
        }
        if row.verbs.contains(Verbs::PATCH) {
            let base = self.own(row, id("patch"), "patch", "partially update the specified");
            let body = format!("{META}Patch");
            put("patch", Operation { parameters: &PATCH, body, codes: &["200", "201"], ..base });
        }
        if row.verbs.contains(Verbs::DELETE) {
            let base = self.own(row, id("delete"), "delete", "delete");
            let (body, answer) = (format!("{META}DeleteOptions"), format!("{META}Status"));
            let parameters = &DELETE;
            put("delete", Operation { parameters, body, answer, codes: &["200", "202"], ..base });
        }
        out.insert("parameters".to_owned(), path_parameters(!scoped.is_empty(), true, false));
        out
    }

    fn subresource(&self, row: &Resource, scoped: &str, sub: &Subresource, suffix: &str, with: &str) -> Value {
        let inherits = sub.group.is_empty() && sub.version.is_empty();
        let (group, version) = if inherits { (self.group, self.version) } else { (sub.group, sub.version) };
        let kind: &str = if sub.kind.is_empty() { &row.kind } else { sub.kind };
        let name = self.name(group, version, kind);
        let mut title = String::new();
        for (index, c) in sub.name.chars().enumerate() {
            title.push(if index == 0 { c.to_ascii_uppercase() } else { c });
        }
        let connect = matches!(
            sub.does,
            SubresourceKind::Exec | SubresourceKind::Attach | SubresourceKind::PortForward | SubresourceKind::Proxy
        );
        let mut out = Map::new();
        let verbs = [
            (Verbs::GET, "get", "read", "Get"),
            (Verbs::UPDATE, "put", "replace", "Put"),
            (Verbs::PATCH, "patch", "patch", "Patch"),
            (Verbs::CREATE, "post", "create", "Post"),
            (Verbs::DELETE, "delete", "delete", "Delete"),
        ];
        for (verb, method, word, connected) in verbs {
            if !sub.verbs.contains(verb) {
                continue;
            }
            let prefix = self.prefix();
            let id = if connect {
                format!("connect{prefix}{connected}{scoped}{}{title}{with}", row.kind)
            } else {
                format!("{word}{prefix}{scoped}{}{title}", row.kind)
            };
            let (parameters, body): (&[&str], String) = match method {
                _ if connect => (&[], String::new()),
                "put" | "post" => (&WRITE, name.clone()),
                "patch" => (&PATCH, format!("{META}Patch")),
                _ => (&[], String::new()),
            };
            let text = connect || sub.does == SubresourceKind::Log;
            let operation = Operation {
                id,
                action: if connect { "connect" } else { method },
                description: format!("{word} {} of the specified {}", sub.name, row.kind),
                parameters,
                body,
                answer: if text { String::new() } else { name.clone() },
                codes: match method {
                    _ if connect => &["200"],
                    "post" => &["200", "201", "202"],
                    "put" | "patch" => &["200", "201"],
                    _ => &["200"],
                },
                gvk: (group, version, kind),
            };
            out.insert(method.to_owned(), self.operation(operation));
        }
        out.insert("parameters".to_owned(), path_parameters(!scoped.is_empty(), true, !suffix.is_empty()));
        Value::Object(out)
    }

    fn operation(&self, operation: Operation<'_>) -> Value {
        let content = |media: &[&str], name: &str| -> Value {
            let schema = if name.is_empty() { json!({"type": "string"}) } else { reference(name) };
            media.iter().map(|m| ((*m).to_owned(), json!({ "schema": schema }))).collect::<Map<_, _>>().into()
        };
        let answer = match (operation.answer.as_str(), operation.action) {
            ("", _) => content(&["*/*"], ""),
            (name, "list") => content(&[&MEDIA[..], &STREAMS[..]].concat(), name),
            (name, _) => content(&MEDIA, name),
        };
        let mut responses: Map<String, Value> = Map::new();
        for code in operation.codes {
            let text = match *code {
                "201" => "Created",
                "202" => "Accepted",
                _ => "OK",
            };
            responses.insert((*code).to_owned(), json!({"content": answer, "description": text}));
        }
        responses.insert("401".to_owned(), json!({"description": "Unauthorized"}));
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        put("description", operation.description.into());
        put("operationId", operation.id.into());
        if !operation.parameters.is_empty() {
            put("parameters", operation.parameters.iter().map(|p| query(p)).collect());
        }
        if !operation.body.is_empty() {
            let patch = operation.action == "patch";
            let media: &[&str] = if patch { &PATCHES } else { &["*/*"] };
            let mut body = json!({"content": content(media, &operation.body)});
            if !operation.body.ends_with(".DeleteOptions") {
                body["required"] = true.into();
            }
            put("requestBody", body);
        }
        put("responses", Value::Object(responses));
        put("tags", json!([self.tag()]));
        if !operation.action.is_empty() {
            put("x-kubernetes-action", operation.action.into());
            let (group, version, kind) = match operation.gvk {
                ("", "", kind) => (self.group, self.version, kind),
                other => other,
            };
            put("x-kubernetes-group-version-kind", json!({"group": group, "kind": kind, "version": version}));
        }
        Value::Object(out)
    }
}

/// A proxy also answers below itself.
fn suffixes(sub: &Subresource) -> Vec<(&'static str, &'static str)> {
    if sub.does == SubresourceKind::Proxy { vec![("", ""), ("/{path}", "WithPath")] } else { vec![("", "")] }
}

fn article(kind: &str) -> String {
    let vowel = kind.starts_with(['A', 'E', 'I', 'O', 'U']);
    format!("{} {kind}", if vowel { "an" } else { "a" })
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn query(name: &str) -> Value {
    let kind = match name {
        "allowWatchBookmarks" | "force" | "orphanDependents" | "sendInitialEvents" | "watch" => "boolean",
        "gracePeriodSeconds" | "limit" | "timeoutSeconds" => "integer",
        _ => "string",
    };
    json!({"in": "query", "name": name, "schema": {"type": kind, "uniqueItems": true}})
}

fn path_parameters(namespace: bool, name: bool, path: bool) -> Value {
    let one = |name: &str| json!({"in": "path", "name": name, "required": true, "schema": {"type": "string", "uniqueItems": true}});
    let wanted = [("name", name), ("namespace", namespace), ("path", path)];
    let mut out: Vec<Value> = wanted.into_iter().filter(|(_, on)| *on).map(|(name, _)| one(name)).collect();
    out.push(query("pretty"));
    Value::Array(out)
}
