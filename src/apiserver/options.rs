//! The options of each verb: from the query (and for deletes the body), checked with upstream's texts.

use super::field::{ErrorList, FieldError};
use super::fields::FieldSelector;
use super::query::Query;
use super::resources::Resource;
use super::selector::LabelSelector;
use super::status::Status;
use crate::schema::decode::FieldValidation;
use http::StatusCode;
use serde_json::{Value, json};

const META: &str = "meta.k8s.io";
/// Longest `fieldManager`.
const FIELD_MANAGER_MAX: usize = 128;

fn refuse(kind: &str, errors: &ErrorList) -> Result<(), Status> {
    if errors.is_empty() { Ok(()) } else { Err(Status::invalid(META, kind, "", errors)) }
}

/// How `resourceVersion` of a list is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionMatch {
    Exact,
    NotOlderThan,
}

/// Options of list, watch and deletecollection.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    pub labels: LabelSelector,
    pub fields: FieldSelector,
    pub resource_version: String,
    pub version_match: Option<VersionMatch>,
    /// 0 for no limit.
    pub limit: u64,
    pub continue_token: String,
    pub watch: bool,
    pub bookmarks: bool,
    /// Seconds; only watches use it.
    pub timeout_seconds: Option<u64>,
    pub send_initial_events: Option<bool>,
}

impl ListOptions {
    /// Reads and checks the query of a request for this kind.
    ///
    /// # Errors
    /// 400 for what does not parse, 422 for what does not fit together.
    pub fn new(query: &Query<'_>, resource: &Resource, watch: bool) -> Result<ListOptions, Status> {
        let text = |key: &str| query.get(key).unwrap_or_default();
        let labels = LabelSelector::parse(text("labelSelector")).map_err(Status::bad_request)?;
        let fields = FieldSelector::parse(text("fieldSelector")).map_err(Status::bad_request)?;
        let (limit, timeout) = (query.int("limit")?, query.int("timeoutSeconds")?);
        let options = ListOptions {
            labels,
            fields: fields.for_resource(resource).map_err(Status::bad_request)?,
            resource_version: text("resourceVersion").to_owned(),
            version_match: match text("resourceVersionMatch") {
                "Exact" => Some(VersionMatch::Exact),
                "NotOlderThan" => Some(VersionMatch::NotOlderThan),
                _ => None,
            },
            limit: limit.and_then(|l| u64::try_from(l).ok()).unwrap_or(0),
            continue_token: text("continue").to_owned(),
            watch,
            bookmarks: query.bool("allowWatchBookmarks"),
            timeout_seconds: timeout.and_then(|t| u64::try_from(t).ok()).filter(|t| *t > 0),
            send_initial_events: query.optional_bool("sendInitialEvents"),
        };
        let errors = options.check(text("resourceVersionMatch"));
        refuse("ListOptions", &errors)?;
        Ok(options)
    }

    fn check(&self, version_match: &str) -> ErrorList {
        let field = "resourceVersionMatch";
        let mut errors = ErrorList::new();
        if self.watch {
            if self.send_initial_events.is_some() && version_match != "NotOlderThan" {
                let why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan";
                errors.push(FieldError::forbidden(field, why));
            }
            if !version_match.is_empty() {
                if self.send_initial_events.is_none() {
                    let why = "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided";
                    errors.push(FieldError::forbidden(field, why));
                }
                if version_match != "NotOlderThan" {
                    errors.push(FieldError::not_supported(field, version_match, &["NotOlderThan"]));
                }
                if !self.continue_token.is_empty() {
                    let why = "resourceVersionMatch is forbidden when continue is provided";
                    errors.push(FieldError::forbidden(field, why));
                }
            }
            return errors;
        }
        if !version_match.is_empty() {
            if self.resource_version.is_empty() {
                let why = "resourceVersionMatch is forbidden unless resourceVersion is provided";
                errors.push(FieldError::forbidden(field, why));
            }
            if !self.continue_token.is_empty() {
                let why = "resourceVersionMatch is forbidden when continue is provided";
                errors.push(FieldError::forbidden(field, why));
            }
            if self.version_match.is_none() {
                errors.push(FieldError::not_supported(field, version_match, &["Exact", "NotOlderThan", ""]));
            }
            if version_match == "Exact" && self.resource_version == "0" {
                let why = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
                errors.push(FieldError::forbidden(field, why));
            }
        }
        if self.send_initial_events.is_some() {
            errors.push(FieldError::forbidden("sendInitialEvents", "sendInitialEvents is forbidden for list"));
        }
        errors
    }

    /// The revision in `resourceVersion`; none when it is empty.
    ///
    /// # Errors
    /// When it is no number: 400 for lists, 500 for watches, as upstream has it.
    pub fn revision(&self) -> Result<Option<u64>, Status> {
        parse_revision(&self.resource_version).map_err(|error| match self.watch {
            true => Status::new(StatusCode::INTERNAL_SERVER_ERROR, "", error.to_string()),
            false => Status::bad_request(format!("invalid resource version: {error}")),
        })
    }

    /// Whether some objects may be left out.
    pub fn selects(&self) -> bool {
        !self.labels.is_empty() || !self.fields.is_empty()
    }
}

/// A `resourceVersion`; none when empty.
///
/// # Errors
/// The field error when it is no number.
pub fn parse_revision(text: &str) -> Result<Option<u64>, FieldError> {
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|error: std::num::ParseIntError| {
        let why = match error.kind() {
            std::num::IntErrorKind::PosOverflow => "value out of range",
            _ => "invalid syntax",
        };
        let quoted = super::field::quote(text);
        FieldError::invalid("resourceVersion", text, format!("strconv.ParseUint: parsing {quoted}: {why}"))
    })
}

/// Options of create, update and patch.
#[derive(Clone, Debug, Default)]
pub struct WriteOptions {
    pub dry_run: bool,
    /// As sent; see [`WriteOptions::manager`].
    pub field_manager: String,
    pub field_validation: FieldValidation,
    /// Only of server-side apply.
    pub force: bool,
    /// Whether this is a server-side apply, which keeps its own record of managed fields.
    pub applied: bool,
}

impl WriteOptions {
    /// Reads and checks the query; `kind` is `CreateOptions`, `UpdateOptions` or `PatchOptions`, `apply` is set for server-side apply.
    ///
    /// # Errors
    /// 422 of that kind.
    pub fn new(query: &Query<'_>, kind: &str, apply: bool) -> Result<WriteOptions, Status> {
        let mut errors = ErrorList::new();
        let field_manager = query.get("fieldManager").unwrap_or_default();
        if kind == "PatchOptions" {
            if apply && field_manager.is_empty() {
                errors.push(FieldError::required("fieldManager", "is required for apply patch"));
            } else if !apply && query.get("force").is_some() {
                errors.push(FieldError::forbidden("force", "may not be specified for non-apply patch"));
            }
        }
        if field_manager.len() > FIELD_MANAGER_MAX {
            errors.push(FieldError::too_long("fieldManager", FIELD_MANAGER_MAX));
        }
        for (at, c) in field_manager.char_indices().filter(|(_, c)| c.is_control()) {
            let why = format!("invalid character U+{:04X} (at position {at})", c as u32);
            errors.push(FieldError::invalid("fieldManager", field_manager, why));
        }
        let dry_run = check_dry_run(query.all("dryRun").collect(), &mut errors);
        let level = query.get("fieldValidation").unwrap_or_default();
        let field_validation = FieldValidation::parse(level).unwrap_or_else(|| {
            errors.push(FieldError::not_supported("fieldValidation", level, &["", "Ignore", "Strict", "Warn"]));
            FieldValidation::Warn
        });
        refuse(kind, &errors)?;
        let force = query.bool("force");
        Ok(WriteOptions { dry_run, field_manager: field_manager.to_owned(), field_validation, force, applied: false })
    }

    /// The manager of the written fields: as sent, else the first part of the user agent.
    pub fn manager(&self, user_agent: Option<&str>) -> String {
        if !self.field_manager.is_empty() {
            return self.field_manager.clone();
        }
        let agent = user_agent.unwrap_or_default().split('/').next().unwrap_or_default();
        let printable: String = agent.chars().filter(|c| !c.is_control()).collect();
        match printable.char_indices().nth(FIELD_MANAGER_MAX) {
            Some((end, _)) => printable[..end].to_owned(),
            None if printable.is_empty() => "unknown".to_owned(),
            None => printable,
        }
    }

    /// The options object for admission.
    pub fn to_value(&self, kind: &str) -> Value {
        let mut value = json!({ "apiVersion": "meta.k8s.io/v1", "kind": kind });
        if self.dry_run {
            value["dryRun"] = json!(["All"]);
        }
        if !self.field_manager.is_empty() {
            value["fieldManager"] = json!(self.field_manager);
        }
        if self.force {
            value["force"] = json!(true);
        }
        value
    }
}

fn check_dry_run(values: Vec<&str>, errors: &mut ErrorList) -> bool {
    // kubectl sends one empty value for "not a dry run".
    let values: Vec<&str> = values.into_iter().collect();
    if values.iter().any(|v| *v != "All") {
        errors.push(FieldError::not_supported("dryRun", json!(values), &["All"]));
    }
    !values.is_empty()
}

/// What happens to the objects an object owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Propagation {
    Orphan,
    Background,
    Foreground,
}

/// Options of delete and deletecollection.
#[derive(Clone, Debug, Default)]
pub struct DeleteOptions {
    pub dry_run: bool,
    pub grace_period_seconds: Option<i64>,
    pub orphan_dependents: Option<bool>,
    pub propagation: Option<Propagation>,
    pub uid: Option<String>,
    pub resource_version: Option<String>,
    /// As sent, for admission.
    pub raw: Value,
}

impl DeleteOptions {
    /// Reads a decoded body, or the query when there is none.
    ///
    /// # Errors
    /// 422 of `DeleteOptions`, 400 for numbers that do not parse.
    pub fn new(body: Option<&Value>, query: &Query<'_>) -> Result<DeleteOptions, Status> {
        let mut raw = match body {
            Some(body) => body.clone(),
            None => from_query(query)?,
        };
        raw["apiVersion"] = json!("meta.k8s.io/v1");
        raw["kind"] = json!("DeleteOptions");
        let mut errors = ErrorList::new();
        let policy = raw.get("propagationPolicy").and_then(Value::as_str);
        let orphan_dependents = raw.get("orphanDependents").and_then(Value::as_bool);
        if let (Some(policy), Some(_)) = (policy, orphan_dependents) {
            let why = "orphanDependents and deletionPropagation cannot be both set";
            errors.push(FieldError::invalid("propagationPolicy", policy, why));
        }
        let propagation = match policy {
            None => None,
            Some("Orphan") => Some(Propagation::Orphan),
            Some("Background") => Some(Propagation::Background),
            Some("Foreground") => Some(Propagation::Foreground),
            Some(other) => {
                let known = ["Foreground", "Background", "Orphan", "nil"];
                errors.push(FieldError::not_supported("propagationPolicy", other, &known));
                None
            }
        };
        let dry_run = raw.get("dryRun").and_then(Value::as_array);
        let dry_run = dry_run.into_iter().flatten().filter_map(Value::as_str).collect();
        let dry_run = check_dry_run(dry_run, &mut errors);
        refuse("DeleteOptions", &errors)?;
        let precondition =
            |key: &str| raw.pointer(&format!("/preconditions/{key}")).and_then(Value::as_str).map(str::to_owned);
        Ok(DeleteOptions {
            dry_run,
            grace_period_seconds: raw.get("gracePeriodSeconds").and_then(Value::as_i64),
            orphan_dependents,
            propagation,
            uid: precondition("uid"),
            resource_version: precondition("resourceVersion"),
            raw,
        })
    }
}

fn from_query(query: &Query<'_>) -> Result<Value, Status> {
    let mut raw = json!({});
    if let Some(seconds) = query.int("gracePeriodSeconds")? {
        raw["gracePeriodSeconds"] = json!(seconds);
    }
    if let Some(orphan) = query.optional_bool("orphanDependents") {
        raw["orphanDependents"] = json!(orphan);
    }
    if let Some(policy) = query.get("propagationPolicy") {
        raw["propagationPolicy"] = json!(policy);
    }
    let dry_run: Vec<&str> = query.all("dryRun").collect();
    if !dry_run.is_empty() {
        raw["dryRun"] = json!(dry_run);
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;

    fn list(query: &str, watch: bool) -> Result<ListOptions, Status> {
        ListOptions::new(&Query::parse(Some(query)), &RESOURCES[2], watch)
    }

    #[test]
    fn list_options() {
        assert_eq!(list("limit=5&continue=x", false).unwrap().limit, 5);
        assert_eq!(
            list("resourceVersionMatch=Exact", false).unwrap_err().message(),
            "ListOptions.meta.k8s.io \"\" is invalid: resourceVersionMatch: Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided"
        );
        assert!(list("sendInitialEvents=true&resourceVersionMatch=NotOlderThan", true).is_ok());
        assert_eq!(list("sendInitialEvents=true", true).unwrap_err().code(), 422);
        assert_eq!(list("labelSelector=a%20b", false).unwrap_err().code(), 400);
    }

    #[test]
    fn write_options() {
        let parse = |query: &str, apply| WriteOptions::new(&Query::parse(Some(query)), "PatchOptions", apply);
        assert_eq!(
            parse("", true).unwrap_err().message(),
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch"
        );
        assert_eq!(
            parse("dryRun=x", false).unwrap_err().message(),
            "PatchOptions.meta.k8s.io \"\" is invalid: dryRun: Unsupported value: [\"x\"]: supported values: \"All\""
        );
        assert_eq!(parse("", false).unwrap().manager(Some("kubectl/v1.35 (linux)")), "kubectl");
    }

    #[test]
    fn delete_options() {
        let body = json!({ "propagationPolicy": "Foreground", "preconditions": { "uid": "u" } });
        let options = DeleteOptions::new(Some(&body), &Query::default()).unwrap();
        assert_eq!((options.propagation, options.uid.as_deref()), (Some(Propagation::Foreground), Some("u")));
        let query = Query::parse(Some("gracePeriodSeconds=0&propagationPolicy=x"));
        assert_eq!(DeleteOptions::new(None, &query).unwrap_err().code(), 422);
    }
}
