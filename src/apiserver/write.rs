//! create and update: the walk of a write from a decoded object to a transaction. Patches and most subresources end here too.

use super::body::Body;
use super::call::Call;
use super::codec::{self, BodyFormat};
use super::confine::{carry_over, completes_deletion, confine, count_generation};
use super::field::FieldError;
use super::metadata;
use super::names;
use super::object::{self, meta, metadata_mut};
use super::options::WriteOptions;
use super::resources::Resource;
use super::service::ApiServer;
use super::status::Status;
use super::tracking;
use crate::admission::{Operation, Request};
use crate::strategy::Context;
use bytes::Bytes;
use coracle_store::{Compare, KeyValue, Op, Txn};
use http::{Response, StatusCode};
use serde_json::{Value, json};

/// Attempts of an update that does not insist on a resource version, while others write the same object.
const ATTEMPTS: usize = 64;
/// Attempts to find a free name for `generateName`.
const NAME_ATTEMPTS: usize = 8;
/// Largest stored object, in bytes (etcd's limit of a request).
const OBJECT_MAX: usize = 1536 * 1024;

/// What a write left behind.
pub struct Written {
    /// The stored bytes.
    pub value: Bytes,
    /// The revision of the object; 0 when nothing was stored (a dry run of a create).
    pub revision: u64,
    pub created: bool,
}

impl Written {
    /// The answer to the client.
    ///
    /// # Errors
    /// 406 when the client accepts nothing we can write.
    pub fn respond(self, call: &Call<'_>) -> Result<Response<Body>, Status> {
        let code = if self.created { StatusCode::CREATED } else { StatusCode::OK };
        if self.revision > 0 {
            return call.stored(code, &self.value, self.revision);
        }
        call.stored_value(code, self.object()?)
    }

    /// The object, in the storage version.
    ///
    /// # Errors
    /// 500 when the bytes are not what this program writes.
    pub fn object(&self) -> Result<Value, Status> {
        let mut object = object::decode(&self.value, self.revision)?;
        if self.revision == 0 {
            metadata_mut(&mut object).remove("resourceVersion");
        }
        Ok(object)
    }
}

/// The verb create.
pub async fn create(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let options = WriteOptions::new(call.query, "CreateOptions", false)?;
    let mut object = read_object(call, body, &options).await?;
    if !call.info.name.is_empty() {
        return Err(Status::method_not_allowed());
    }
    place(call, &mut object)?;
    codec::to_storage(call.resource, call.info.version, &mut object);
    insert(call, object, &options).await?.respond(call)
}

/// Reads and decodes the body as an object of the call's kind, with defaults.
pub async fn read_object(call: &Call<'_>, body: Body, options: &WriteOptions) -> Result<Value, Status> {
    let format = BodyFormat::of(call.headers)?;
    let bytes = body.collect(codec::BODY_MAX).await.map_err(Status::from)?;
    let decoded = codec::decode(call.kind(), &bytes, format, options.field_validation)?;
    call.warn(decoded.warnings);
    let mut object = decoded.value;
    codec::default(call.kind(), &mut object);
    Ok(object)
}

/// Fills in the namespace of the URL, or refuses another one.
pub fn place(call: &Call<'_>, object: &mut Value) -> Result<(), Status> {
    let namespace = call.namespace().to_owned();
    let metadata = metadata_mut(object);
    match metadata.get("namespace").and_then(Value::as_str).unwrap_or_default() {
        "" if namespace.is_empty() => {
            metadata.remove("namespace");
        }
        "" => {
            metadata.insert("namespace".to_owned(), Value::String(namespace));
        }
        found if found == namespace || namespace.is_empty() => {}
        _ => {
            return Err(Status::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
    }
    Ok(())
}

/// Creates an object (in the storage version); tries other names while `generateName` meets existing ones.
pub async fn insert(call: &Call<'_>, object: Value, options: &WriteOptions) -> Result<Written, Status> {
    let generates = meta(&object, "name").is_empty() && !meta(&object, "generateName").is_empty();
    if !generates {
        return insert_once(call, object, options).await;
    }
    let base = meta(&object, "generateName").to_owned();
    let mut name = String::new();
    for _ in 0..NAME_ATTEMPTS {
        let mut attempt = object.clone();
        name = names::generate(&base);
        metadata_mut(&mut attempt).insert("name".to_owned(), Value::String(name.clone()));
        match insert_once(call, attempt, options).await {
            Err(status) if status.reason() == "AlreadyExists" => {}
            other => return other,
        }
    }
    Err(Status::generate_name_conflict(&call.resource.group, &call.resource.plural, &name))
}

async fn insert_once(call: &Call<'_>, mut object: Value, options: &WriteOptions) -> Result<Written, Status> {
    let resource = call.resource;
    let now = metadata::now();
    if !matches!(meta(&object, "resourceVersion"), "" | "0") {
        let why = "resourceVersion should not be set on objects to be created";
        return Err(Status::new(StatusCode::INTERNAL_SERVER_ERROR, "", why));
    }
    let fields = metadata_mut(&mut object);
    for key in ["resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"] {
        fields.remove(key);
    }
    fields.insert("uid".to_owned(), Value::String(names::uuid()));
    fields.insert("creationTimestamp".to_owned(), Value::String(now.clone()));
    let name = meta(&object, "name").to_owned();
    tracking::track(call, &mut object, None, options, &now)?;
    admit(call, Operation::Create, &name, &mut object, None, options, Phase::Mutate).await?;
    // Admission may not move the object.
    let name = meta(&object, "name").to_owned();
    let context = Context {
        resource,
        subresource: "",
        namespace: call.namespace(),
        name: &name,
        identity: call.identity,
        now: &now,
        dry_run: options.dry_run,
        services: call.server.service_network(),
    };
    reset_status(resource, &mut object);
    (resource.strategy.prepare_create)(&context, &mut object);
    if resource.strategy.generation {
        metadata_mut(&mut object).insert("generation".to_owned(), json!(1));
    } else if !resource.keeps_generation() {
        metadata_mut(&mut object).remove("generation");
    }
    let mut object = normalize(call, object)?;
    let mut errors = metadata::validate(resource, &object);
    errors.extend((resource.strategy.validate_create)(&context, &object));
    if !errors.is_empty() {
        return Err(Status::invalid(&resource.group, &resource.kind, &name, &errors));
    }
    if let Some(allocate) = resource.strategy.allocate {
        allocate(call.server, &context, &mut object, None).await?;
    }
    call.warn((resource.strategy.warnings)(&context, &object));
    admit(call, Operation::Create, &name, &mut object, None, options, Phase::Validate).await?;
    let key = resource.key(call.namespace(), &name);
    let value = encode(resource, &object)?;
    if options.dry_run {
        if let Some(existing) = call.server.backend().get(&key)? {
            return Err(already_exists(resource, &name, &existing));
        }
        return Ok(Written { value, revision: 0, created: true });
    }
    let lease = call.server.lease_for(resource).await?;
    let txn = Txn {
        compare: vec![Compare::ModRevision { key: key.clone(), equals: 0 }],
        then: vec![Op::Put { key: key.clone(), value: value.clone(), lease }],
        or_else: Vec::new(),
    };
    let response = call.server.backend().txn(txn).await?;
    if !response.succeeded {
        return Err(match call.server.backend().get(&key)? {
            Some(existing) => already_exists(resource, &name, &existing),
            None => Status::already_exists(&resource.group, &resource.plural, &name),
        });
    }
    Ok(Written { value, revision: response.revision, created: true })
}

fn already_exists(resource: &Resource, name: &str, existing: &KeyValue) -> Status {
    let status = Status::already_exists(&resource.group, &resource.plural, name);
    let deleting = super::scan::find(&existing.value, &["metadata", "deletionTimestamp"]).is_some();
    if deleting { status.prefixed("object is being deleted: ") } else { status }
}

/// The stored bytes, refused when they are too many.
pub fn encode(resource: &Resource, object: &Value) -> Result<Bytes, Status> {
    let value = object::encode(resource, object)?;
    if value.len() > OBJECT_MAX {
        return Err(Status::too_large(format!("limit is {OBJECT_MAX}")));
    }
    Ok(value)
}

fn normalize(call: &Call<'_>, object: Value) -> Result<Value, Status> {
    codec::normalize(call.storage_kind(), object).map_err(Status::bad_request)
}

/// A client does not say what the status of a new object is.
fn reset_status(resource: &Resource, object: &mut Value) {
    if resource.resets_status()
        && let Some(fields) = object.as_object_mut()
    {
        fields.remove("status");
    }
}

/// One half of admission.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Mutate,
    Validate,
}

/// Runs the plug-ins over an object in the storage version.
pub async fn admit(
    call: &Call<'_>,
    operation: Operation,
    name: &str,
    object: &mut Value,
    old: Option<&Value>,
    options: &WriteOptions,
    phase: Phase,
) -> Result<(), Status> {
    let resource = call.resource;
    let kind = if operation == Operation::Create { "CreateOptions" } else { "UpdateOptions" };
    let raw = options.to_value(kind);
    let mut request = Request {
        identity: call.identity,
        operation,
        group: &resource.group,
        version: if resource.shares_storage() { call.info.version } else { &resource.storage_version },
        resource: &resource.plural,
        subresource: call.subresource_name(),
        kind: &resource.kind,
        namespace: call.info.namespace,
        name,
        object,
        old,
        dry_run: options.dry_run,
        options: Some(&raw),
    };
    let admission = call.server.admission();
    let warnings = match phase {
        Phase::Mutate => admission.mutate(&mut request).await?,
        Phase::Validate => admission.validate(&request).await?,
    };
    call.warn(warnings);
    Ok(())
}

/// The verb update, also of status-like subresources.
pub async fn update(call: &Call<'_>, body: Body) -> Result<Response<Body>, Status> {
    let options = WriteOptions::new(call.query, "UpdateOptions", false)?;
    let mut object = read_object(call, body, &options).await?;
    place(call, &mut object)?;
    check_name(call, &mut object)?;
    codec::to_storage(call.resource, call.info.version, &mut object);
    modify(call, &options, &|_| Ok(object.clone())).await?.respond(call)
}

/// The body may leave the name out, but may not give another one.
pub fn check_name(call: &Call<'_>, object: &mut Value) -> Result<(), Status> {
    let wanted = &call.info.name;
    match meta(object, "name") {
        "" => {
            metadata_mut(object).insert("name".to_owned(), Value::String(wanted.clone()));
            Ok(())
        }
        found if found == wanted => Ok(()),
        found => Err(Status::bad_request(format!(
            "the name of the object ({found}) does not match the name on the URL ({wanted})"
        ))),
    }
}

/// Makes the new object (storage version) from the stored one; none when it does not exist. Called again when
/// somebody else wrote in between.
pub type Change<'a> = dyn Fn(Option<&Value>) -> Result<Value, Status> + Send + Sync + 'a;

/// What one attempt came to.
enum Attempt {
    Done(Written),
    /// Somebody else wrote first. True when the caller insists on what it saw.
    Lost(bool),
}

/// Reads, changes and writes the named object; creates it where the kind allows that.
pub async fn modify(call: &Call<'_>, options: &WriteOptions, change: &Change<'_>) -> Result<Written, Status> {
    let creates = call.resource.strategy.create_on_update && call.subresource.is_none();
    modify_or(call, options, creates, change).await
}

/// Reads, changes and writes the named object; 404 when it does not exist.
pub async fn modify_existing(call: &Call<'_>, options: &WriteOptions, change: &Change<'_>) -> Result<Written, Status> {
    modify_or(call, options, false, change).await
}

/// Reads, changes and writes the named object. `creates` says what happens when it does not exist.
pub async fn modify_or(
    call: &Call<'_>,
    options: &WriteOptions,
    creates: bool,
    change: &Change<'_>,
) -> Result<Written, Status> {
    let key = call.key();
    let mut fresh = false;
    for _ in 0..ATTEMPTS {
        let existing = call.server.backend().get(&key)?;
        let attempt = match &existing {
            None if fresh => {
                if !creates {
                    return Err(call.not_found());
                }
                let created = change(None)?;
                match insert_once(call, without_version(created), options).await {
                    Err(status) if status.reason() == "AlreadyExists" => Ok(Attempt::Lost(false)),
                    other => other.map(Attempt::Done),
                }
            }
            // Another member may know more.
            None => Ok(Attempt::Lost(false)),
            Some(existing) => attempt(call, options, change, &key, existing).await,
        };
        match attempt {
            Ok(Attempt::Done(written)) => return Ok(written),
            Ok(Attempt::Lost(true)) if fresh => return Err(call.modified(&call.info.name)),
            Ok(Attempt::Lost(_)) => {}
            Err(status) => return Err(status),
        }
        call.server.backend().barrier().await?;
        fresh = true;
    }
    Err(call.modified(&call.info.name))
}

/// An object about to be created by an update; a resource version of "0" or none is fine.
fn without_version(mut object: Value) -> Value {
    metadata_mut(&mut object).remove("resourceVersion");
    object
}

async fn attempt(
    call: &Call<'_>,
    options: &WriteOptions,
    change: &Change<'_>,
    key: &Bytes,
    existing: &KeyValue,
) -> Result<Attempt, Status> {
    let resource = call.resource;
    let old = object::decode_kv(existing)?;
    let mut object = change(Some(&old))?;
    match meta(&object, "resourceVersion") {
        "" | "0" if resource.strategy.unconditional_update || call.subresource.is_some() => {}
        "" | "0" => {
            let error = FieldError::invalid("metadata.resourceVersion", 0, "must be specified for an update");
            let name = &call.info.name;
            return Err(Status::invalid(&resource.group, &resource.plural, name, &vec![error]));
        }
        version if version == existing.mod_revision.to_string() => {}
        _ => return Ok(Attempt::Lost(true)),
    }
    let (wanted, uid) = (meta(&object, "uid"), meta(&old, "uid"));
    if !wanted.is_empty() && wanted != uid {
        let why = format!(
            "StorageError: invalid object, Code: 4, Key: {}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}",
            String::from_utf8_lossy(key)
        );
        return Err(Status::conflict(&resource.group, &resource.plural, &call.info.name, why));
    }
    let now = metadata::now();
    let name = call.info.name.as_str();
    let context = Context {
        resource,
        subresource: call.subresource_name(),
        namespace: call.namespace(),
        name,
        identity: call.identity,
        now: &now,
        dry_run: options.dry_run,
        services: call.server.service_network(),
    };
    confine(call, &mut object, &old);
    carry_over(&mut object, &old);
    tracking::track(call, &mut object, Some(&old), options, &now)?;
    admit(call, Operation::Update, name, &mut object, Some(&old), options, Phase::Mutate).await?;
    (resource.strategy.prepare_update)(&context, &mut object, &old);
    let mut object = normalize(call, object)?;
    count_generation(resource, &mut object, &old);
    let mut errors = metadata::validate(resource, &object);
    errors.extend(metadata::validate_update(&object, &old));
    errors.extend((resource.strategy.validate_update)(&context, &object, &old));
    if !errors.is_empty() {
        return Err(Status::invalid(&resource.group, &resource.kind, name, &errors));
    }
    if let Some(allocate) = resource.strategy.allocate {
        allocate(call.server, &context, &mut object, Some(&old)).await?;
    }
    call.warn((resource.strategy.warnings)(&context, &object));
    admit(call, Operation::Update, name, &mut object, Some(&old), options, Phase::Validate).await?;
    let mut value = encode(resource, &object)?;
    let deletes = completes_deletion(resource, &object, &old);
    if !deletes {
        if value == existing.value {
            return Ok(Attempt::Done(Written { value, revision: existing.mod_revision, created: false }));
        }
        if tracking::only_times_differ(&object, &old) {
            value = existing.value.clone();
            return Ok(Attempt::Done(Written { value, revision: existing.mod_revision, created: false }));
        }
    }
    if options.dry_run {
        return Ok(Attempt::Done(Written { value, revision: existing.mod_revision, created: false }));
    }
    let compare = vec![Compare::ModRevision { key: key.clone(), equals: existing.mod_revision }];
    let operation = if deletes {
        Op::Delete { key: key.clone() }
    } else {
        let lease = call.server.lease_for(resource).await?;
        Op::Put { key: key.clone(), value: value.clone(), lease }
    };
    let response = call.server.backend().txn(Txn { compare, then: vec![operation], or_else: Vec::new() }).await?;
    if !response.succeeded {
        return Ok(Attempt::Lost(false));
    }
    release(call, name, &old, (!deletes).then_some(&object)).await;
    let revision = if deletes { existing.mod_revision } else { response.revision };
    Ok(Attempt::Done(Written { value, revision, created: false }))
}

/// Gives back what the strategy had allocated for an object that has been changed or (`new` is none) deleted.
pub(super) async fn release(call: &Call<'_>, name: &str, old: &Value, new: Option<&Value>) {
    let Some(released) = call.resource.strategy.released else { return };
    let namespace = old["metadata"]["namespace"].as_str().unwrap_or_default();
    let now = metadata::now();
    let context = Context {
        resource: call.resource,
        subresource: call.subresource_name(),
        namespace,
        name,
        identity: call.identity,
        now: &now,
        dry_run: false,
        services: call.server.service_network(),
    };
    released(call.server, &context, old, new).await;
}

/// Changes a stored object without admission and strategy: for the server's own bookkeeping (bindings, evictions), as
/// upstream's storage does.
///
/// # Errors
/// 404 when it is not there, whatever `change` answers.
pub async fn direct(
    server: &ApiServer,
    resource: &Resource,
    namespace: &str,
    name: &str,
    dry_run: bool,
    change: &(dyn Fn(&Value) -> Result<Value, Status> + Send + Sync),
) -> Result<Written, Status> {
    let key = resource.key(namespace, name);
    let mut fresh = false;
    for _ in 0..ATTEMPTS {
        if let Some(existing) = server.backend().get(&key)? {
            match change(&object::decode_kv(&existing)?) {
                Ok(object) => {
                    let value = encode(resource, &object)?;
                    if dry_run || value == existing.value {
                        return Ok(Written { value, revision: existing.mod_revision, created: false });
                    }
                    let txn = Txn {
                        compare: vec![Compare::ModRevision { key: key.clone(), equals: existing.mod_revision }],
                        then: vec![Op::Put { key: key.clone(), value: value.clone(), lease: existing.lease }],
                        or_else: Vec::new(),
                    };
                    let response = server.backend().txn(txn).await?;
                    if response.succeeded {
                        return Ok(Written { value, revision: response.revision, created: false });
                    }
                }
                Err(status) if fresh => return Err(status),
                // Perhaps only because this server is behind.
                Err(_) => {}
            }
        } else if fresh {
            return Err(Status::not_found(&resource.group, &resource.plural, name));
        }
        server.backend().barrier().await?;
        fresh = true;
    }
    Err(Status::modified(&resource.group, &resource.plural, name))
}
