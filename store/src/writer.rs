//! The only one that changes state. Commands are applied in log order, a batch at a time: one atomic write to the engine,
//! then events to the watchers, then the new revision to the readers.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use crate::engine::Batch;
use crate::rows;
use crate::store::{Lease, Pinned, SnapshotMeta, Store, StoreError};
use crate::types::{
    Command, Compare, Event, EventKind, KeyValue, Op, OpResponse, Refusal, Response, Txn, TxnResponse, in_range,
};

/// Rows written at once while a snapshot is restored.
const RESTORE_BATCH: usize = 1000;

/// The exclusive right to write. An error of [`Writer::apply`] means that the engine failed: the state must be rebuilt.
pub struct Writer {
    pub(crate) store: Store,
    /// The consensus layer's record as of the last applied batch.
    meta: Bytes,
}

impl Writer {
    pub(crate) fn new(store: Store) -> Self {
        let meta = store.meta().ok().flatten().unwrap_or_default();
        Writer { store, meta }
    }

    /// Applies commands in order, atomically together with `meta` (opaque; [`Store::meta`] returns it), and returns one
    /// response for each.
    pub fn apply(&mut self, commands: Vec<Command>, meta: Bytes) -> Result<Vec<Response>, StoreError> {
        let revision = self.store.revision();
        let mut pending = Pending::new(&self.store, revision);
        let responses = commands.into_iter().map(|c| pending.command(c)).collect::<Result<Vec<_>, _>>()?;
        let Pending { mut batch, events, revision: after, compacted, leases, restarted, .. } = pending;
        if after != revision {
            batch.put(rows::REVISION, after.to_le_bytes().to_vec());
        }
        if let Some(compacted) = compacted {
            batch.put(rows::COMPACTED, compacted.to_le_bytes().to_vec());
        }
        batch.put(rows::META, meta.clone());
        let shared = &self.store.shared;
        shared.engine.write(batch)?;
        self.meta = meta;
        if let Some(compacted) = compacted {
            shared.compacted.store(compacted, Ordering::Release);
        }
        if !leases.is_empty() {
            let mut live = shared.leases.lock();
            for (id, ttl) in leases {
                match ttl {
                    Some(ttl) => live.insert(id, Lease::new(ttl)),
                    None => live.remove(&id),
                };
            }
        }
        let publish = || shared.revision.store(after, Ordering::Release);
        if restarted {
            shared.hub.restart(after, publish);
        } else {
            shared.hub.publish(&events, publish);
        }
        Ok(responses)
    }

    /// The consensus layer's record as of the last applied batch; empty before the first.
    pub fn meta(&self) -> &Bytes {
        &self.meta
    }

    /// Holds the present state readable for a snapshot, while commands go on being applied.
    pub fn pin(&self) -> Pinned {
        let leases = self.store.shared.leases.lock().iter().map(|(id, lease)| (*id, lease.ttl_seconds)).collect();
        let meta = SnapshotMeta { revision: self.store.revision(), leases, meta: self.meta.clone() };
        Pinned::new(self.store.clone(), meta)
    }

    /// Replaces everything by a snapshot. Watchers are told that their revisions are compacted.
    pub fn restore<E: From<StoreError>>(
        &mut self,
        snapshot: SnapshotMeta,
        kvs: impl Iterator<Item = Result<KeyValue, E>>,
    ) -> Result<(), E> {
        let shared = self.store.shared.clone();
        // Stays odd if this fails: what is there then must not be read.
        shared.generation.fetch_add(1, Ordering::AcqRel);
        shared.engine.wipe().map_err(StoreError::from)?;
        let mut batch = Batch::default();
        for kv in kvs {
            let kv = kv?;
            if kv.lease != 0 {
                batch.put(rows::lease_key_row(kv.lease, &kv.key), Bytes::new());
            }
            batch.insert(rows::version_row(&kv.key, kv.mod_revision), rows::encode_value(&kv, false));
            if batch.rows.len() >= RESTORE_BATCH {
                shared.engine.write(std::mem::take(&mut batch)).map_err(StoreError::from)?;
            }
        }
        for (id, ttl) in &snapshot.leases {
            batch.put(rows::lease_row(*id), ttl.to_le_bytes().to_vec());
        }
        let revision = snapshot.revision.to_le_bytes().to_vec();
        batch.put(rows::REVISION, revision.clone());
        batch.put(rows::COMPACTED, revision);
        // Last, so that a restore that was cut off is told by the missing record.
        batch.put(rows::META, snapshot.meta.clone());
        shared.engine.write(batch).map_err(StoreError::from)?;
        *shared.leases.lock() = snapshot.leases.iter().map(|(id, ttl)| (*id, Lease::new(*ttl))).collect();
        shared.compacted.store(snapshot.revision, Ordering::Release);
        shared.hub.restart(snapshot.revision, || shared.revision.store(snapshot.revision, Ordering::Release));
        shared.generation.fetch_add(1, Ordering::AcqRel);
        self.meta = snapshot.meta;
        Ok(())
    }

    /// Begins to hand what was applied so far to the operating system.
    pub fn lower(&self) -> Result<(), StoreError> {
        Ok(self.store.shared.engine.lower()?)
    }

    /// Hands everything to the operating system before a clean stop.
    pub fn flush(&self) -> Result<(), StoreError> {
        Ok(self.store.shared.engine.flush()?)
    }
}

/// The effect of a batch of commands that is not written yet; later commands see what earlier ones did.
struct Pending<'a> {
    store: &'a Store,
    /// The revision that readers see; engine rows up to it are what the batch starts from.
    base: u64,
    revision: u64,
    compacted: Option<u64>,
    /// Keys that the batch wrote; `None` for deleted ones.
    heads: HashMap<Bytes, Option<KeyValue>>,
    /// Leases that the batch granted (duration) or ended (`None`).
    leases: BTreeMap<u64, Option<u64>>,
    batch: Batch,
    events: Vec<Arc<Event>>,
    restarted: bool,
}

impl<'a> Pending<'a> {
    fn new(store: &'a Store, base: u64) -> Self {
        Pending {
            store,
            base,
            revision: base,
            compacted: None,
            heads: HashMap::new(),
            leases: BTreeMap::new(),
            batch: Batch::default(),
            events: Vec::new(),
            restarted: false,
        }
    }

    fn command(&mut self, command: Command) -> Result<Response, StoreError> {
        match command {
            Command::Txn(txn) => return self.txn(txn),
            Command::Compact { revision } => {
                if revision > self.revision {
                    return Ok(Response::Refused(Refusal::FutureRevision));
                }
                if revision <= self.compacted.unwrap_or_else(|| self.store.compacted_revision()) {
                    return Ok(Response::Refused(Refusal::Compacted));
                }
                self.compacted = Some(revision);
            }
            Command::LeaseGrant { id, ttl_seconds } => {
                self.batch.put(rows::lease_row(id), ttl_seconds.to_le_bytes().to_vec());
                self.leases.insert(id, Some(ttl_seconds));
            }
            Command::LeaseKeepAlive { id } => match self.lease(id) {
                None => return Ok(Response::Refused(Refusal::LeaseNotFound)),
                Some(ttl) => {
                    self.leases.insert(id, Some(ttl));
                }
            },
            Command::LeaseRevoke { id } => {
                if self.lease(id).is_none() {
                    return Ok(Response::Refused(Refusal::LeaseNotFound));
                }
                self.revoke(id)?;
            }
            Command::BumpRevision { by } => {
                self.revision += by;
                self.compacted = Some(self.revision);
                self.restarted = true;
            }
        }
        Ok(Response::Done { revision: self.revision })
    }

    fn lease(&self, id: u64) -> Option<u64> {
        match self.leases.get(&id) {
            Some(ttl) => *ttl,
            None => self.store.shared.leases.lock().get(&id).map(|lease| lease.ttl_seconds),
        }
    }

    fn revoke(&mut self, id: u64) -> Result<(), StoreError> {
        self.leases.insert(id, None);
        self.batch.remove(rows::lease_row(id));
        let start = rows::lease_key_row(id, b"");
        let end = rows::lease_key_row(id + 1, b"");
        let mut keys = BTreeSet::new();
        for row in self.store.shared.engine.scan(start.clone(), end) {
            keys.insert(row?.0.slice(start.len()..));
        }
        keys.extend(
            self.heads.iter().filter(|(_, kv)| kv.as_ref().is_some_and(|kv| kv.lease == id)).map(|(k, _)| k.clone()),
        );
        let mut write = Write::at(self.revision + 1);
        for key in keys {
            // Rows of bindings that a later put of the batch undid are still in the engine.
            if let Some(prev) = self.head(&key)?
                && prev.lease == id
            {
                self.delete(key, prev, &mut write);
            }
        }
        self.finish(write);
        Ok(())
    }

    fn head(&self, key: &Bytes) -> Result<Option<KeyValue>, StoreError> {
        match self.heads.get(key) {
            Some(kv) => Ok(kv.clone()),
            None => self.store.get_at(key, self.base),
        }
    }

    fn txn(&mut self, txn: Txn) -> Result<Response, StoreError> {
        let mut succeeded = true;
        for compare in &txn.compare {
            if !self.holds(compare)? {
                succeeded = false;
                break;
            }
        }
        let ops = if succeeded { txn.then } else { txn.or_else };
        if let Err(refusal) = self.check(&ops) {
            return Ok(Response::Refused(refusal));
        }
        let mut write = Write::at(self.revision + 1);
        let mut responses = Vec::with_capacity(ops.len());
        for op in ops {
            responses.push(match op {
                Op::Put { key, value, lease } => OpResponse::Put { prev: self.put(key, value, lease, &mut write)? },
                Op::Delete { key } => match self.head(&key)? {
                    Some(prev) => {
                        self.delete(key, prev.clone(), &mut write);
                        OpResponse::Delete { prev: vec![prev] }
                    }
                    None => OpResponse::Delete { prev: Vec::new() },
                },
                Op::DeleteRange { start, end } => {
                    OpResponse::Delete { prev: self.delete_range(&start, &end, &mut write)? }
                }
                Op::Get { key } => OpResponse::Get { kv: self.head(&key)? },
            });
        }
        self.finish(write);
        Ok(Response::Txn(TxnResponse { revision: self.revision, succeeded, responses }))
    }

    fn holds(&self, compare: &Compare) -> Result<bool, StoreError> {
        Ok(match compare {
            Compare::ModRevision { key, equals } => self.head(key)?.map_or(0, |kv| kv.mod_revision) == *equals,
            Compare::CreateRevision { key, equals } => self.head(key)?.map_or(0, |kv| kv.create_revision) == *equals,
            Compare::Version { key, equals } => self.head(key)?.map_or(0, |kv| kv.version) == *equals,
            Compare::Lease { key, equals } => self.head(key)?.map_or(0, |kv| kv.lease) == *equals,
            Compare::Value { key, equals } => self.head(key)?.is_some_and(|kv| kv.value == *equals),
        })
    }

    /// What must hold before the first operation, so that a transaction is refused whole.
    fn check(&self, ops: &[Op]) -> Result<(), Refusal> {
        let mut written = BTreeSet::new();
        for op in ops {
            if let Op::Put { key, lease, .. } = op {
                if key.is_empty() || key.contains(&0) {
                    return Err(Refusal::InvalidKey);
                }
                if *lease != 0 && self.lease(*lease).is_none() {
                    return Err(Refusal::LeaseNotFound);
                }
            }
            if let Op::Put { key, .. } | Op::Delete { key } = op
                && !written.insert(key)
            {
                return Err(Refusal::DuplicateKey);
            }
        }
        let deleted = |key: &Bytes| {
            ops.iter().any(|op| matches!(op, Op::DeleteRange { start, end } if in_range(key, start, end)))
        };
        if written.into_iter().any(deleted) { Err(Refusal::DuplicateKey) } else { Ok(()) }
    }

    fn put(&mut self, key: Bytes, value: Bytes, lease: u64, write: &mut Write) -> Result<Option<KeyValue>, StoreError> {
        let prev = self.head(&key)?;
        let kv = KeyValue {
            key: key.clone(),
            value,
            create_revision: prev.as_ref().map_or(write.revision, |p| p.create_revision),
            mod_revision: write.revision,
            version: prev.as_ref().map_or(1, |p| p.version + 1),
            lease,
        };
        let bound = prev.as_ref().map_or(0, |p| p.lease);
        if bound != lease {
            self.unbind(bound, &key);
            if lease != 0 {
                self.batch.put(rows::lease_key_row(lease, &key), Bytes::new());
            }
        }
        self.batch.insert(rows::version_row(&key, write.revision), rows::encode_value(&kv, false));
        self.heads.insert(key, Some(kv.clone()));
        self.event(EventKind::Put, kv, prev.clone(), write);
        Ok(prev)
    }

    fn delete(&mut self, key: Bytes, prev: KeyValue, write: &mut Write) {
        self.unbind(prev.lease, &key);
        let gone = KeyValue {
            key: key.clone(),
            value: Bytes::new(),
            create_revision: 0,
            mod_revision: write.revision,
            version: 0,
            lease: 0,
        };
        self.batch.insert(rows::version_row(&key, write.revision), rows::encode_value(&gone, true));
        self.heads.insert(key, None);
        self.event(EventKind::Delete, gone, Some(prev), write);
    }

    fn delete_range(&mut self, start: &[u8], end: &[u8], write: &mut Write) -> Result<Vec<KeyValue>, StoreError> {
        let mut live = BTreeMap::new();
        for kv in self.store.live(start, end, self.base) {
            let kv = kv?;
            live.insert(kv.key.clone(), kv);
        }
        for (key, head) in self.heads.iter().filter(|(key, _)| in_range(key, start, end)) {
            match head {
                Some(kv) => live.insert(key.clone(), kv.clone()),
                None => live.remove(key),
            };
        }
        let prev: Vec<KeyValue> = live.into_values().collect();
        for kv in &prev {
            self.delete(kv.key.clone(), kv.clone(), write);
        }
        Ok(prev)
    }

    fn unbind(&mut self, lease: u64, key: &[u8]) {
        if lease != 0 {
            self.batch.remove(rows::lease_key_row(lease, key));
        }
    }

    fn event(&mut self, kind: EventKind, kv: KeyValue, prev: Option<KeyValue>, write: &mut Write) {
        // A copy: a part of the command would keep all of it in memory.
        let key = Bytes::copy_from_slice(&kv.key);
        self.batch.insert(rows::event_row(write.revision, write.events), key);
        write.events += 1;
        self.events.push(Arc::new(Event::new(kind, kv, prev)));
    }

    /// The revision is taken only if something was written.
    fn finish(&mut self, write: Write) {
        if write.events > 0 {
            self.revision = write.revision;
        }
    }
}

/// The revision that a transaction writes at, and how many events it has.
struct Write {
    revision: u64,
    events: u32,
}

impl Write {
    fn at(revision: u64) -> Self {
        Write { revision, events: 0 }
    }
}
