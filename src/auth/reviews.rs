//! Answers to questions: access reviews, token reviews, who am I.

use super::identity::UserInfo;
use super::service_account::ServiceAccountTokens;
use super::token_request;
use super::{Attributes, Authenticator, Authorizer, Identity};
use crate::admission::Admission;
use crate::apiserver::Reviews;
use crate::apiserver::field::FieldError;
use crate::apiserver::resources::Virtual;
use crate::apiserver::status::Status;
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::{Map, Value, json};

const AUTHORIZATION: &str = "authorization.k8s.io";

/// Everything that answers need.
#[derive(Clone)]
pub struct Answers {
    pub authenticator: Authenticator,
    pub authorizer: Authorizer,
    pub admission: Admission,
    pub tokens: ServiceAccountTokens,
}

impl Reviews for Answers {
    fn review<'a>(
        &'a self,
        what: Virtual,
        caller: &'a Identity,
        namespace: &'a str,
        review: Value,
    ) -> BoxFuture<'a, Result<Value, Status>> {
        let answer = match what {
            Virtual::SelfSubjectReview => Ok(who_am_i(caller.user(), review)),
            Virtual::TokenReview => self.token_review(review),
            Virtual::SelfSubjectAccessReview => self.access_review(caller.user(), "SelfSubjectAccessReview", review),
            Virtual::SubjectAccessReview => self.subject_review("SubjectAccessReview", None, review),
            Virtual::LocalSubjectAccessReview => {
                self.subject_review("LocalSubjectAccessReview", Some(namespace), review)
            }
            Virtual::SelfSubjectRulesReview => self.rules_review(caller.user(), review),
            Virtual::Binding | Virtual::ComponentStatus => Err(Status::no_such_resource()),
        };
        std::future::ready(answer).boxed()
    }

    fn token<'a>(
        &'a self,
        caller: &'a Identity,
        namespace: &'a str,
        name: &'a str,
        request: Value,
        dry_run: bool,
    ) -> BoxFuture<'a, Result<Value, Status>> {
        token_request::issue(self, caller, namespace, name, request, dry_run).boxed()
    }
}

/// UserInfo in JSON (`authentication.k8s.io/v1`), empty fields left out.
pub(crate) fn user_value(user: &UserInfo) -> Value {
    let mut value = json!({ "username": user.name, "groups": user.groups });
    if !user.uid.is_empty() {
        value["uid"] = user.uid.as_str().into();
    }
    if !user.extra.is_empty() {
        value["extra"] = json!(user.extra);
    }
    value
}

fn who_am_i(user: &UserInfo, mut review: Value) -> Value {
    review["status"] = json!({ "userInfo": user_value(user) });
    review["metadata"]["creationTimestamp"] = token_request::timestamp(jiff::Timestamp::now()).into();
    review
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The user that a SubjectAccessReview asks about.
pub(super) fn asked_user(spec: &Value) -> UserInfo {
    let text = |key: &str| spec[key].as_str().unwrap_or("").to_owned();
    let extra = spec["extra"].as_object().into_iter().flatten();
    UserInfo {
        name: text("user"),
        uid: text("uid"),
        groups: strings(&spec["groups"]),
        extra: extra.map(|(key, values)| (key.clone(), strings(values))).collect(),
    }
}

/// The field selector of resource attributes as text. Requirements that text cannot express are left out, which asks for
/// more, never for less.
fn field_selector(resource: &Value) -> String {
    let selector = &resource["fieldSelector"];
    if let Some(raw) = selector["rawSelector"].as_str() {
        return raw.to_owned();
    }
    let escape = |text: &str| text.replace('\\', "\\\\").replace(',', "\\,").replace('=', "\\=");
    let one = |requirement: &Value| {
        let sign = match requirement["operator"].as_str()? {
            "In" => "=",
            "NotIn" => "!=",
            _ => return None,
        };
        match strings(&requirement["values"]).as_slice() {
            [value] => Some(format!("{}{sign}{}", requirement["key"].as_str()?, escape(value))),
            _ => None,
        }
    };
    selector["requirements"].as_array().into_iter().flatten().filter_map(one).collect::<Vec<_>>().join(",")
}

impl Answers {
    fn decide(&self, user: &UserInfo, spec: &Value) -> Value {
        let selector = field_selector(&spec["resourceAttributes"]);
        let text = |at: &'static str, key: &'static str| spec[at][key].as_str().unwrap_or("");
        let attributes = if spec["resourceAttributes"].is_object() {
            let of = |key| text("resourceAttributes", key);
            Attributes {
                verb: of("verb"),
                group: of("group"),
                version: if of("version").is_empty() { "*" } else { of("version") },
                resource: of("resource"),
                subresource: of("subresource"),
                name: of("name"),
                namespace: of("namespace"),
                path: "",
                is_resource: true,
                field_selector: &selector,
            }
        } else {
            let of = |key| text("nonResourceAttributes", key);
            Attributes { verb: of("verb"), path: of("path"), ..Attributes::default() }
        };
        let decision = self.authorizer.authorize_user(user, &attributes);
        let mut status = json!({ "allowed": decision.allowed });
        if !decision.reason.is_empty() {
            status["reason"] = decision.reason.into();
        }
        status
    }

    fn access_review(&self, user: &UserInfo, kind: &str, mut review: Value) -> Result<Value, Status> {
        let errors = validate_attributes(&review["spec"]);
        if !errors.is_empty() {
            return Err(Status::invalid(AUTHORIZATION, kind, "", &errors));
        }
        review["status"] = self.decide(user, &review["spec"]);
        Ok(review)
    }

    fn subject_review(&self, kind: &str, namespace: Option<&str>, review: Value) -> Result<Value, Status> {
        let spec = &review["spec"];
        let user = asked_user(spec);
        let mut errors = Vec::new();
        if user.name.is_empty() && user.groups.is_empty() {
            errors.push(FieldError::invalid("spec.user", "", "at least one of user or group must be specified"));
        }
        if let Some(namespace) = namespace {
            let asked = spec["resourceAttributes"]["namespace"].as_str().unwrap_or("");
            if spec["resourceAttributes"].is_object() && asked != namespace {
                let field = "spec.resourceAttributes.namespace";
                errors.push(FieldError::invalid(field, asked, "must match metadata.namespace"));
            }
            if spec["nonResourceAttributes"].is_object() {
                let given = spec["nonResourceAttributes"].clone();
                let field = "spec.nonResourceAttributes";
                errors.push(FieldError::invalid(field, given, "disallowed on this kind of request"));
            }
        }
        if !errors.is_empty() {
            let mut all = validate_attributes(spec);
            all.extend(errors);
            return Err(Status::invalid(AUTHORIZATION, kind, "", &all));
        }
        self.access_review(&user, kind, review)
    }

    fn token_review(&self, mut review: Value) -> Result<Value, Status> {
        let token = review["spec"]["token"].as_str().unwrap_or("").to_owned();
        if token.is_empty() {
            return Err(Status::bad_request("token is required for TokenReview in authentication"));
        }
        let wanted = strings(&review["spec"]["audiences"]);
        review["status"] = match self.authenticator.authenticate_token(&token, &wanted) {
            Ok(Some(accepted)) => {
                json!({ "authenticated": true, "user": user_value(&accepted.user), "audiences": accepted.audiences })
            }
            Ok(None) => json!({ "user": {} }),
            Err(error) => json!({ "user": {}, "error": format!("[invalid bearer token, {error}]") }),
        };
        Ok(review)
    }

    fn rules_review(&self, user: &UserInfo, mut review: Value) -> Result<Value, Status> {
        let namespace = review["spec"]["namespace"].as_str().unwrap_or("").to_owned();
        if namespace.is_empty() {
            return Err(Status::bad_request("no namespace on request"));
        }
        let (rules, mut errors) = self.authorizer.rules_for(user, &namespace).map_err(Status::internal)?;
        let is_node = user.as_node().is_some();
        if is_node {
            errors.push("node authorizer does not support user rule resolution".to_owned());
        }
        let (mut resources, mut paths) = (Vec::new(), Vec::new());
        for rule in rules {
            let mut value = Map::from_iter([("verbs".to_owned(), json!(rule.verbs))]);
            if rule.non_resource_urls.is_empty() {
                value.insert("apiGroups".to_owned(), json!(rule.api_groups));
                value.insert("resources".to_owned(), json!(rule.resources));
                if !rule.resource_names.is_empty() {
                    value.insert("resourceNames".to_owned(), json!(rule.resource_names));
                }
                resources.push(Value::Object(value));
            } else {
                value.insert("nonResourceURLs".to_owned(), json!(rule.non_resource_urls));
                paths.push(Value::Object(value));
            }
        }
        let mut status = json!({ "resourceRules": resources, "nonResourceRules": paths, "incomplete": is_node });
        if !errors.is_empty() {
            status["evaluationError"] = errors.join(", ").into();
        }
        review["status"] = status;
        Ok(review)
    }
}

fn validate_attributes(spec: &Value) -> Vec<FieldError> {
    let (resource, path) = (&spec["resourceAttributes"], &spec["nonResourceAttributes"]);
    let mut errors = Vec::new();
    match (resource.is_object(), path.is_object()) {
        (true, true) => errors.push(FieldError::invalid(
            "spec.nonResourceAttributes",
            path.clone(),
            "cannot be specified in combination with resourceAttributes",
        )),
        (false, false) => errors.push(FieldError::invalid(
            "spec.resourceAttributes",
            Value::Null,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
        _ => {}
    }
    for (selector, requirement) in [("fieldSelector", "requirements"), ("labelSelector", "requirements")] {
        let given = &resource[selector];
        let raw = given["rawSelector"].as_str().unwrap_or("");
        let listed = given[requirement].as_array().is_some_and(|list| !list.is_empty());
        let at = format!("spec.resourceAttributes.{selector}");
        if given.is_object() && !raw.is_empty() && listed {
            let why = "may not specified at the same time as requirements";
            errors.push(FieldError::invalid(format!("{at}.rawSelector"), raw, why));
        } else if given.is_object() && raw.is_empty() && !listed {
            let why = format!("when {at} is specified, requirements or rawSelector is required");
            errors.push(FieldError::required(format!("{at}.requirements"), why));
        }
    }
    errors
}
