//! ResourceQuota: a write that would use more of a namespace than allowed is refused; one that fits is charged before it is
//! stored, in the quota's status, against a concurrent writer by compare-and-swap. The quota controller recomputes the true
//! usage, so a charge for a write that then failed does not stay.
//!
//! # Layout
//!
//! | file | what it holds |
//! | --- | --- |
//! | [`usage`] | what an object uses, which quotas count it |

pub mod usage;

use super::resource_list::{ResourceList, add, read, write};
use super::{Operation, Request, World};
use crate::apiserver::status::Status;
use crate::apiserver::{object, resources};
use crate::auth::objects::{decode, prefix};
use coracle_store::{Compare, KeyValue, Op, Txn};
use serde_json::Value;
use usage::Evaluator;

/// Attempts against concurrent writers.
const ATTEMPTS: usize = 10;
/// What upstream says when somebody else was always faster.
const BUSY: &str = "object updated concurrently";

/// Checks and charges. Last of all plug-ins.
pub async fn charge(world: &World, request: &Request<'_>) -> Result<(), Status> {
    if request.namespace.is_empty() || !matches!(request.operation, Operation::Create | Operation::Update) {
        return Ok(());
    }
    let Some(evaluator) = Evaluator::of(request) else { return Ok(()) };
    for _ in 0..ATTEMPTS {
        let rows = world
            .authorizer
            .objects()
            .rows(&prefix("", "resourcequotas", request.namespace))
            .map_err(Status::internal)?;
        if rows.is_empty() {
            return Ok(());
        }
        let charges = plan(&evaluator, request, &rows)?;
        if charges.is_empty() || request.dry_run || commit(world, charges).await? {
            return Ok(());
        }
    }
    Err(Status::conflict("", "resourcequotas", "", BUSY))
}

/// A quota with its new status.
struct Charge<'a> {
    row: &'a KeyValue,
    quota: Value,
}

fn plan<'a>(evaluator: &Evaluator, request: &Request<'_>, rows: &'a [KeyValue]) -> Result<Vec<Charge<'a>>, Status> {
    let object = &*request.object;
    let mut charges = Vec::new();
    let asked = evaluator.usage(object);
    for row in rows {
        let mut quota: Value = decode(row).map_err(Status::internal)?;
        let name = quota["metadata"]["name"].as_str().unwrap_or("").to_owned();
        let hard = read(&quota["status"]["hard"]);
        let counted: Vec<&String> = hard.keys().filter(|resource| evaluator.counts(resource)).collect();
        if counted.is_empty() || !evaluator.in_scope(&quota["spec"], object) {
            continue;
        }
        if let Some(why) = evaluator.unspecified(&counted, object) {
            return Err(request.forbidden(format_args!("failed quota: {name}: {why}")));
        }
        let used = read(&quota["status"]["used"]);
        if counted.iter().any(|resource| !used.contains_key(*resource)) {
            let mut names: Vec<&str> = counted.iter().map(|resource| resource.as_str()).collect();
            names.sort_unstable();
            return Err(
                request.forbidden(format_args!("status unknown for quota: {name}, resources: {}", names.join(",")))
            );
        }
        let before = request.old.filter(|old| request.updates() && evaluator.in_scope(&quota["spec"], old));
        let more = delta(&asked, before.map(|old| evaluator.usage(old)), &hard);
        if more.is_empty() {
            continue;
        }
        let mut total = used.clone();
        add(&mut total, &more);
        let exceeded: Vec<&String> =
            more.keys().filter(|resource| total.get(*resource) > hard.get(*resource)).collect();
        if !exceeded.is_empty() {
            let show = |list: &ResourceList| {
                let entry = |resource: &&String| Some(format!("{resource}={}", list.get(*resource)?));
                exceeded.iter().filter_map(entry).collect::<Vec<_>>().join(",")
            };
            return Err(request.forbidden(format_args!(
                "exceeded quota: {name}, requested: {}, used: {}, limited: {}",
                show(&more),
                show(&used),
                show(&hard)
            )));
        }
        quota["status"]["used"] = write(&total);
        charges.push(Charge { row, quota });
    }
    Ok(charges)
}

/// What is asked for beyond `before`, of the resources in `hard`, without what is not more.
fn delta(asked: &ResourceList, before: Option<ResourceList>, hard: &ResourceList) -> ResourceList {
    let mut more = ResourceList::new();
    for (resource, amount) in asked.iter().filter(|(resource, _)| hard.contains_key(*resource)) {
        let mut amount = *amount;
        if let Some(old) = before.as_ref().and_then(|before| before.get(resource)) {
            amount.sub(*old);
        }
        if amount.nanos() > 0 {
            more.insert(resource.clone(), amount);
        }
    }
    more
}

/// Writes the charges; false when somebody else wrote one of the quotas first.
async fn commit(world: &World, charges: Vec<Charge<'_>>) -> Result<bool, Status> {
    let resource = resources::builtin("", "resourcequotas").ok_or_else(|| Status::internal("no such resource"))?;
    let mut txn = Txn::default();
    for Charge { row, quota } in charges {
        txn.compare.push(Compare::ModRevision { key: row.key.clone(), equals: row.mod_revision });
        let value = object::encode(resource, &quota)?;
        txn.then.push(Op::Put { key: row.key.clone(), value, lease: 0 });
    }
    Ok(world.backend.txn(txn).await?.succeeded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Admission;
    use crate::apiserver::backend::{Backend, memory};
    use crate::auth::{Authorizer, Identity};
    use serde_json::json;

    async fn put(backend: &Backend, quota: Value) {
        let key = "/registry/core/resourcequotas/a/q".into();
        let op = Op::Put { key, value: quota.to_string().into(), lease: 0 };
        backend.txn(Txn { then: vec![op], ..Txn::default() }).await.unwrap();
    }

    #[tokio::test]
    async fn what_fits_is_charged_and_what_does_not_is_refused() {
        let backend = memory::backend();
        let admission = Admission::new(backend.clone(), Authorizer::new(backend.store().clone()));
        let world = &*admission.world;
        let hard = json!({ "pods": "2", "requests.cpu": "1" });
        put(
            &backend,
            json!({ "apiVersion": "v1", "kind": "ResourceQuota", "metadata": { "name": "q", "namespace": "a" },
            "spec": { "hard": hard }, "status": { "hard": hard, "used": { "pods": "0", "requests.cpu": "0" } } }),
        )
        .await;
        let identity = Identity::in_process("x", &[]);
        let pod = |cpu: Value| {
            json!({ "metadata": { "name": "p" }, "spec": { "containers": [
            { "name": "c", "resources": { "requests": cpu } }] } })
        };
        let ask = async |mut object: Value| {
            let request = Request {
                identity: &identity,
                operation: Operation::Create,
                group: "",
                version: "v1",
                resource: "pods",
                subresource: "",
                kind: "Pod",
                namespace: "a",
                name: "p",
                object: &mut object,
                old: None,
                dry_run: false,
                options: None,
            };
            charge(world, &request).await.map_err(|status| status.message().to_owned())
        };
        assert_eq!(ask(pod(json!({ "cpu": "600m" }))).await, Ok(()));
        assert_eq!(
            ask(pod(json!({ "cpu": "600m" }))).await,
            Err("pods \"p\" is forbidden: exceeded quota: q, requested: requests.cpu=600m, used: requests.cpu=600m, limited: requests.cpu=1".into())
        );
        assert_eq!(
            ask(pod(json!({}))).await,
            Err("pods \"p\" is forbidden: failed quota: q: must specify requests.cpu for: c".into())
        );
        assert_eq!(ask(pod(json!({ "cpu": "400m" }))).await, Ok(()));
        assert_eq!(
            ask(pod(json!({ "cpu": "0" }))).await,
            Err("pods \"p\" is forbidden: exceeded quota: q, requested: pods=1, used: pods=2, limited: pods=2".into())
        );
        let row = backend.get(b"/registry/core/resourcequotas/a/q").unwrap().unwrap();
        let stored: Value = serde_json::from_slice(&row.value).unwrap();
        assert_eq!(stored["status"]["used"], json!({ "pods": "2", "requests.cpu": "1" }));
        put(&backend, json!({ "metadata": { "name": "q" }, "status": { "hard": hard } })).await;
        assert_eq!(
            ask(pod(json!({ "cpu": "1" }))).await,
            Err("pods \"p\" is forbidden: status unknown for quota: q, resources: pods,requests.cpu".into())
        );
    }
}
