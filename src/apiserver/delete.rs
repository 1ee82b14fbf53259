//! delete and deletecollection: preconditions, grace, finalizers, propagation.

use super::body::Body;
use super::call::Call;
use super::codec::{self, BodyFormat};
use super::metadata::{FINALIZER_FOREGROUND, FINALIZER_ORPHAN};
use super::object::{self, finalizers, meta, metadata_mut};
use super::options::{DeleteOptions, ListOptions, Propagation};
use super::read;
use super::resources::{Dependents, Resource};
use super::status::{self, Status};
use super::write::encode;
use crate::admission::{Operation, Request};
use coracle_store::{Compare, KeyValue, Op, Txn};
use http::{Response, StatusCode};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

/// Attempts while others write the same object.
const ATTEMPTS: usize = 64;
/// Grace of a pod that does not say.
const DEFAULT_GRACE: i64 = 30;

/// What is to become of an object.
#[derive(Clone, Debug, PartialEq)]
enum Plan {
    /// It goes now.
    Remove,
    /// It stays for now, changed like this.
    Mark(Value),
    /// It is on its way already.
    Keep,
}

fn stamp(time: Timestamp) -> Value {
    Value::String(time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

fn bump_generation(object: &mut Value) {
    let generation = object.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(0);
    if generation > 0 {
        metadata_mut(object).insert("generation".to_owned(), json!(generation + 1));
    }
}

/// How long a pod may take to end; none for kinds that end at once.
fn grace(resource: &Resource, object: &Value, asked: Option<i64>) -> Option<i64> {
    if resource.kind != "Pod" || !resource.group.is_empty() {
        return None;
    }
    let wanted = asked.or_else(|| object.pointer("/spec/terminationGracePeriodSeconds").and_then(Value::as_i64));
    let unscheduled = object.pointer("/spec/nodeName").and_then(Value::as_str).unwrap_or_default().is_empty();
    let phase = object.pointer("/status/phase").and_then(Value::as_str).unwrap_or_default();
    if unscheduled || matches!(phase, "Succeeded" | "Failed") {
        return Some(0);
    }
    Some(match wanted.unwrap_or(DEFAULT_GRACE) {
        seconds if seconds < 0 => 1,
        seconds => seconds,
    })
}

/// The finalizers after the propagation policy is taken into account.
fn policy_finalizers(resource: &Resource, object: &Value, options: &DeleteOptions) -> Vec<String> {
    let old = finalizers(object);
    let (orphan, foreground) = match (resource.dependents, options.orphan_dependents, options.propagation) {
        (Dependents::None, ..) => (false, false),
        (_, Some(orphan), _) => (orphan, false),
        (_, None, Some(policy)) => (policy == Propagation::Orphan, policy == Propagation::Foreground),
        (default, None, None) => {
            let first = old.iter().find(|f| matches!(**f, FINALIZER_ORPHAN | FINALIZER_FOREGROUND));
            match first {
                Some(found) => (*found == FINALIZER_ORPHAN, *found == FINALIZER_FOREGROUND),
                None => (default == Dependents::Orphan, false),
            }
        }
    };
    let mut new: Vec<String> =
        old.into_iter().filter(|f| !matches!(*f, FINALIZER_ORPHAN | FINALIZER_FOREGROUND)).map(str::to_owned).collect();
    if orphan {
        new.push(FINALIZER_ORPHAN.to_owned());
    }
    if foreground {
        new.push(FINALIZER_FOREGROUND.to_owned());
    }
    new
}

/// Decides what a delete does to an object as it is now.
fn plan(resource: &Resource, object: &Value, options: &DeleteOptions, now: Timestamp) -> Result<Plan, Status> {
    check_preconditions(resource, object, options)?;
    if resource.kind == "Namespace" && resource.group.is_empty() {
        return plan_namespace(object, options, now, resource);
    }
    let deleting = object.pointer("/metadata/deletionTimestamp").and_then(Value::as_str);
    let pending_grace = object.pointer("/metadata/deletionGracePeriodSeconds").and_then(Value::as_i64).unwrap_or(0);
    let asked = options.grace_period_seconds.map(|s| if s < 0 { 1 } else { s });
    let mut marked = object.clone();
    let mut graceful = None;
    if let Some(grace) = grace(resource, object, asked) {
        match deleting {
            Some(_) if pending_grace == 0 => {}
            Some(timestamp) => match asked {
                Some(period) if period < pending_grace => {
                    let period = shorten(&mut marked, timestamp, pending_grace, period, now);
                    graceful = Some(period);
                }
                _ => return Ok(Plan::Keep),
            },
            None => {
                let end = now.saturating_add(SignedDuration::from_secs(grace)).map_err(Status::internal)?;
                let metadata = metadata_mut(&mut marked);
                metadata.insert("deletionTimestamp".to_owned(), stamp(end));
                metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(grace));
                bump_generation(&mut marked);
                graceful = Some(grace);
            }
        }
    }
    let kept = policy_finalizers(resource, object, options);
    let metadata = metadata_mut(&mut marked);
    if kept.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".to_owned(), json!(kept));
    }
    match graceful {
        None if kept.is_empty() => Ok(Plan::Remove),
        Some(0) if kept.is_empty() => Ok(Plan::Remove),
        None => {
            if deleting.is_none() {
                metadata.insert("deletionTimestamp".to_owned(), stamp(now));
                bump_generation(&mut marked);
            }
            let metadata = metadata_mut(&mut marked);
            metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(0));
            Ok(if marked == *object { Plan::Keep } else { Plan::Mark(marked) })
        }
        Some(_) => Ok(Plan::Mark(marked)),
    }
}

/// Moves the end of a pod that is ending already; gives the new grace.
fn shorten(marked: &mut Value, timestamp: &str, pending: i64, period: i64, now: Timestamp) -> i64 {
    let end = timestamp
        .parse::<Timestamp>()
        .ok()
        .and_then(|t| t.saturating_add(SignedDuration::from_secs(period - pending)).ok())
        .unwrap_or(now);
    let (end, period) = if end < now { (now, period.min(1)) } else { (end, period) };
    let metadata = metadata_mut(marked);
    metadata.insert("deletionTimestamp".to_owned(), stamp(end));
    metadata.insert("deletionGracePeriodSeconds".to_owned(), json!(period));
    period
}

fn plan_namespace(
    object: &Value,
    options: &DeleteOptions,
    now: Timestamp,
    resource: &Resource,
) -> Result<Plan, Status> {
    let pending = object.pointer("/spec/finalizers").and_then(Value::as_array).is_some_and(|f| !f.is_empty());
    if object.pointer("/metadata/deletionTimestamp").is_none() {
        let mut marked = object.clone();
        let kept = policy_finalizers(resource, object, options);
        let metadata = metadata_mut(&mut marked);
        metadata.insert("deletionTimestamp".to_owned(), stamp(now));
        if kept.is_empty() {
            metadata.remove("finalizers");
        } else {
            metadata.insert("finalizers".to_owned(), json!(kept));
        }
        if !pending && kept.is_empty() {
            return Ok(Plan::Remove);
        }
        bump_generation(&mut marked);
        marked["status"]["phase"] = json!("Terminating");
        return Ok(Plan::Mark(marked));
    }
    if pending {
        let why = "The system is ensuring all content is removed from this namespace.  Upon completion, this namespace will automatically be purged by the system.";
        return Err(Status::conflict("", "namespaces", meta(object, "name"), why));
    }
    Ok(if finalizers(object).is_empty() { Plan::Remove } else { Plan::Keep })
}

/// The preconditions of a delete.
///
/// # Errors
/// 409 when the object is another one than the caller meant.
pub fn check_preconditions(resource: &Resource, object: &Value, options: &DeleteOptions) -> Result<(), Status> {
    let name = meta(object, "name");
    let conflict = |why: String| Err(Status::conflict(&resource.group, &resource.kind, name, why));
    if let Some(uid) = options.uid.as_deref().filter(|uid| *uid != meta(object, "uid")) {
        return conflict(format!(
            "the UID in the precondition ({uid}) does not match the UID in record ({}). The object might have been deleted and then recreated",
            meta(object, "uid")
        ));
    }
    let version = meta(object, "resourceVersion");
    if let Some(wanted) = options.resource_version.as_deref().filter(|wanted| *wanted != version) {
        return conflict(format!(
            "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record ({version}). The object might have been modified"
        ));
    }
    Ok(())
}

/// What a delete left.
pub struct Deleted {
    /// The object as it was, or as it is now while something keeps it.
    pub object: Value,
    pub gone: bool,
}

/// The options of a delete: body or query.
pub async fn read_options(call: &Call<'_>, body: Body) -> Result<DeleteOptions, Status> {
    let format = BodyFormat::of(call.headers)?;
    let bytes = body.collect(codec::BODY_MAX).await?;
    if bytes.is_empty() {
        return DeleteOptions::new(None, call.query);
    }
    let value = codec::decode_delete_options(&bytes, format)?;
    DeleteOptions::new(Some(&value), call.query)
}

/// The verb delete.
pub async fn delete(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let options = read_options(call, body).await?;
    let deleted = remove(call, &call.info.name, call.namespace(), &options).await?;
    let cascades = options.orphan_dependents == Some(false);
    let code = if !deleted.gone && cascades { StatusCode::ACCEPTED } else { StatusCode::OK };
    if deleted.gone && !call.resource.returns_deleted {
        let uid = meta(&deleted.object, "uid");
        let shown = status::deleted(&call.resource.group, &call.resource.plural, &call.info.name, uid);
        return call.value(code, &shown);
    }
    call.stored_value(code, deleted.object)
}

/// Deletes one object as the options say.
pub async fn remove(call: &Call<'_>, name: &str, namespace: &str, options: &DeleteOptions) -> Result<Deleted, Status> {
    let resource = call.resource;
    let key = resource.key(namespace, name);
    let not_found = || Status::not_found(&resource.group, &resource.plural, name);
    let mut fresh = false;
    let mut admitted = false;
    for _ in 0..ATTEMPTS {
        let Some(existing) = call.server.backend().get(&key)? else {
            if fresh {
                return Err(not_found());
            }
            call.server.backend().barrier().await?;
            fresh = true;
            continue;
        };
        let object = object::decode_kv(&existing)?;
        let planned = match plan(resource, &object, options, Timestamp::now()) {
            // A precondition may fail only because this server is behind.
            Err(_) if !fresh => {
                call.server.backend().barrier().await?;
                fresh = true;
                continue;
            }
            other => other?,
        };
        if !std::mem::replace(&mut admitted, true) {
            admit(call, name, namespace, &object, options).await?;
        }
        if options.dry_run {
            return Ok(match planned {
                Plan::Remove => Deleted { object, gone: true },
                Plan::Keep => Deleted { object, gone: false },
                Plan::Mark(marked) => Deleted { object: marked, gone: false },
            });
        }
        if let Some(deleted) = carry_out(call, &key, &existing, object, planned).await? {
            return Ok(deleted);
        }
        call.server.backend().barrier().await?;
        fresh = true;
    }
    Err(call.modified(name))
}

/// Writes what was planned; none when somebody else wrote first.
async fn carry_out(
    call: &Call<'_>,
    key: &bytes::Bytes,
    existing: &KeyValue,
    object: Value,
    planned: Plan,
) -> Result<Option<Deleted>, Status> {
    let compare = vec![Compare::ModRevision { key: key.clone(), equals: existing.mod_revision }];
    let (operation, mut after, gone) = match planned {
        Plan::Keep => return Ok(Some(Deleted { object, gone: false })),
        Plan::Remove => (Op::Delete { key: key.clone() }, object, true),
        Plan::Mark(marked) => {
            let value = encode(call.resource, &marked)?;
            (Op::Put { key: key.clone(), value, lease: existing.lease }, marked, false)
        }
    };
    let txn = Txn { compare, then: vec![operation], or_else: Vec::new() };
    let response = call.server.backend().txn(txn).await?;
    if !response.succeeded {
        return Ok(None);
    }
    if gone {
        super::write::release(call, name_of(&after), &after, None).await;
    } else {
        object::set_revision(&mut after, response.revision);
    }
    Ok(Some(Deleted { object: after, gone }))
}

fn name_of(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

async fn admit(
    call: &Call<'_>,
    name: &str,
    namespace: &str,
    old: &Value,
    options: &DeleteOptions,
) -> Result<(), Status> {
    let resource = call.resource;
    let mut nothing = Value::Null;
    let mut request = Request {
        identity: call.identity,
        operation: Operation::Delete,
        group: &resource.group,
        version: if resource.shares_storage() { call.info.version } else { &resource.storage_version },
        resource: &resource.plural,
        subresource: "",
        kind: &resource.kind,
        namespace: if namespace.is_empty() { call.info.namespace } else { namespace },
        name,
        object: &mut nothing,
        old: Some(old),
        dry_run: options.dry_run,
        options: Some(&options.raw),
    };
    call.warn(call.server.admission().admit(&mut request).await?);
    Ok(())
}

/// The verb deletecollection: deletes what a list with the same options shows.
pub async fn delete_collection(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let list = ListOptions::new(call.query, call.resource, false)?;
    let options = read_options(call, body).await?;
    let page = read::page(call, &list).await?;
    let mut items = Vec::with_capacity(page.kvs.len());
    for kv in &page.kvs {
        let (namespace, name) = names_of(call.resource, kv);
        match remove(call, &name, &namespace, &options).await {
            Ok(deleted) => {
                let mut object = deleted.object;
                codec::from_storage(call.resource, call.info.version, &mut object);
                if let Some(fields) = object.as_object_mut() {
                    fields.remove("apiVersion");
                    fields.remove("kind");
                }
                items.push(object);
            }
            Err(status) if status.reason() == "NotFound" => {}
            Err(status) => return Err(status),
        }
    }
    let mut meta = json!({ "resourceVersion": page.revision.to_string() });
    if !page.continue_token.is_empty() {
        meta["continue"] = json!(page.continue_token);
    }
    call.value(
        StatusCode::OK,
        &json!({
            "kind": format!("{}List", call.resource.kind),
            "apiVersion": call.resource.api_version(call.info.version),
            "metadata": meta,
            "items": items,
        }),
    )
}

/// Namespace and name in a key.
fn names_of(resource: &Resource, kv: &KeyValue) -> (String, String) {
    let rest = kv.key.strip_prefix(&resource.prefix()[..]).unwrap_or_default();
    let rest = String::from_utf8_lossy(rest).into_owned();
    match rest.split_once('/') {
        Some((namespace, name)) if resource.is_namespaced() => (namespace.to_owned(), name.to_owned()),
        _ => (String::new(), rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apiserver::resources::RESOURCES;

    fn find(kind: &str) -> &'static Resource {
        RESOURCES.iter().find(|r| r.kind == kind && r.group != "events.k8s.io").unwrap()
    }

    fn pod(node: &str) -> Value {
        json!({ "metadata": { "name": "p", "generation": 1, "uid": "u" }, "spec": { "nodeName": node }, "status": {} })
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    #[test]
    fn scheduled_pods_get_their_grace_and_others_go_at_once() {
        let options = DeleteOptions::default();
        let Plan::Mark(marked) = plan(find("Pod"), &pod("n"), &options, now()).unwrap() else { panic!() };
        assert_eq!(marked["metadata"]["deletionTimestamp"], "2026-01-01T00:00:30Z");
        assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
        assert_eq!(marked["metadata"]["generation"], 2);
        assert_eq!(plan(find("Pod"), &pod(""), &options, now()).unwrap(), Plan::Remove);
        // A second delete changes nothing, unless it gives less time.
        assert_eq!(plan(find("Pod"), &marked, &options, now()).unwrap(), Plan::Keep);
        let sooner = DeleteOptions { grace_period_seconds: Some(5), ..DeleteOptions::default() };
        let Plan::Mark(again) = plan(find("Pod"), &marked, &sooner, now()).unwrap() else { panic!() };
        assert_eq!(again["metadata"]["deletionTimestamp"], "2026-01-01T00:00:05Z");
        let force = DeleteOptions { grace_period_seconds: Some(0), ..DeleteOptions::default() };
        assert_eq!(plan(find("Pod"), &marked, &force, now()).unwrap(), Plan::Remove);
    }

    #[test]
    fn finalizers_keep_an_object_and_policies_add_them() {
        let foreground = DeleteOptions { propagation: Some(Propagation::Foreground), ..DeleteOptions::default() };
        let object = json!({ "metadata": { "name": "d", "uid": "u", "generation": 3 } });
        let Plan::Mark(marked) = plan(find("Deployment"), &object, &foreground, now()).unwrap() else { panic!() };
        assert_eq!(marked["metadata"]["finalizers"], json!(["foregroundDeletion"]));
        assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 0);
        assert_eq!(marked["metadata"]["generation"], 4);
        let default = DeleteOptions::default();
        assert_eq!(plan(find("Deployment"), &object, &default, now()).unwrap(), Plan::Remove);
        assert!(matches!(plan(find("Job"), &object, &default, now()).unwrap(), Plan::Mark(_)));
        let background = DeleteOptions { propagation: Some(Propagation::Background), ..DeleteOptions::default() };
        assert_eq!(plan(find("Job"), &object, &background, now()).unwrap(), Plan::Remove);
    }

    #[test]
    fn preconditions() {
        let options = DeleteOptions { uid: Some("v".into()), ..DeleteOptions::default() };
        let refused = plan(find("Pod"), &pod(""), &options, now()).unwrap_err();
        assert_eq!(refused.code(), 409);
        assert!(refused.message().contains("the UID in the precondition (v) does not match the UID in record (u)"));
    }

    #[test]
    fn namespaces_wait_for_their_finalizer() {
        let mut namespace = json!({ "metadata": { "name": "a" }, "spec": { "finalizers": ["kubernetes"] } });
        let options = DeleteOptions::default();
        let Plan::Mark(marked) = plan(find("Namespace"), &namespace, &options, now()).unwrap() else { panic!() };
        assert_eq!(marked["status"]["phase"], "Terminating");
        assert_eq!(plan(find("Namespace"), &marked, &options, now()).unwrap_err().code(), 409);
        namespace["spec"]["finalizers"] = json!([]);
        assert_eq!(plan(find("Namespace"), &namespace, &options, now()).unwrap(), Plan::Remove);
    }
}
