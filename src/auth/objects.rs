//! Reads of stored API objects that authentication, authorization and admission need. Always the newest acknowledged
//! state: there is no cache in between that could lag behind a write.

use bytes::Bytes;
use coracle_store::{KeyValue, RangeRequest, Store, StoreError, prefix_end};
use serde::Deserialize;
use serde::de::DeserializeOwned;

/// A read that failed.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    #[error("reading the store")]
    Store(#[from] StoreError),
    #[error("the stored object {key} cannot be read")]
    Damaged {
        key: String,
        #[source]
        source: serde_json::Error,
    },
}

/// What of `metav1.ObjectMeta` decisions depend on.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    pub name: String,
    pub namespace: String,
    pub uid: String,
    pub deletion_timestamp: Option<String>,
}

/// An object of which only the metadata matters.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    pub metadata: Meta,
}

/// Read access by group, plural, namespace and name.
#[derive(Clone)]
pub struct Objects {
    store: Store,
}

/// The key prefix of a resource, or of a namespace of it: `/registry/<group or core>/<plural>/[<namespace>/]`.
pub fn prefix(group: &str, plural: &str, namespace: &str) -> String {
    let group = if group.is_empty() { "core" } else { group };
    if namespace.is_empty() {
        format!("/registry/{group}/{plural}/")
    } else {
        format!("/registry/{group}/{plural}/{namespace}/")
    }
}

impl Objects {
    pub fn new(store: Store) -> Objects {
        Objects { store }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The stored row; an empty or odd name finds nothing rather than another object.
    pub fn row(&self, group: &str, plural: &str, namespace: &str, name: &str) -> Result<Option<KeyValue>, ObjectError> {
        if name.is_empty() || name.contains(['/', '\0']) || namespace.contains(['/', '\0']) {
            return Ok(None);
        }
        Ok(self.store.get((prefix(group, plural, namespace) + name).as_bytes())?)
    }

    pub fn get<T: DeserializeOwned>(
        &self,
        group: &str,
        plural: &str,
        namespace: &str,
        name: &str,
    ) -> Result<Option<T>, ObjectError> {
        self.row(group, plural, namespace, name)?.map(|row| decode(&row)).transpose()
    }

    /// All objects of the resource, in `namespace` or (empty) everywhere.
    pub fn list<T: DeserializeOwned>(&self, group: &str, plural: &str, namespace: &str) -> Result<Vec<T>, ObjectError> {
        self.rows(&prefix(group, plural, namespace))?.iter().map(decode).collect()
    }

    /// All objects of a resource with `metadata.resourceVersion`, fit to be sent back to the API.
    pub fn list_versioned(&self, group: &str, plural: &str) -> Result<Vec<serde_json::Value>, ObjectError> {
        let rows = self.rows(&prefix(group, plural, ""))?;
        rows.iter()
            .map(|row| {
                let mut object: serde_json::Value = decode(row)?;
                object["metadata"]["resourceVersion"] = row.mod_revision.to_string().into();
                Ok(object)
            })
            .collect()
    }

    /// All rows under a key prefix.
    pub fn rows(&self, prefix: &str) -> Result<Vec<KeyValue>, ObjectError> {
        let start = Bytes::copy_from_slice(prefix.as_bytes());
        let end = prefix_end(prefix.as_bytes());
        Ok(self.store.range(&RangeRequest { start, end, ..RangeRequest::default() })?.kvs)
    }
}

/// Decodes a stored row.
pub fn decode<T: DeserializeOwned>(row: &KeyValue) -> Result<T, ObjectError> {
    serde_json::from_slice(&row.value)
        .map_err(|source| ObjectError::Damaged { key: String::from_utf8_lossy(&row.key).into_owned(), source })
}

#[cfg(test)]
pub(crate) mod testing {
    //! A store with objects in it, for tests of everything that reads through [`Objects`].

    use super::*;
    use coracle_store::{Command, Op, Options, Txn, Writer};
    use serde_json::Value;

    /// A memory store and its writer.
    pub struct World {
        pub objects: Objects,
        writer: Writer,
    }

    impl World {
        pub fn new() -> World {
            let (store, writer) = Store::open(Options::memory()).unwrap();
            World { objects: Objects::new(store), writer }
        }

        fn apply(&mut self, op: Op) {
            let txn = Txn { compare: vec![], then: vec![op], or_else: vec![] };
            self.writer.apply(vec![Command::Txn(txn)], Bytes::new()).unwrap();
        }

        /// Stores `object` under the key that its metadata gives.
        pub fn put(&mut self, group: &str, plural: &str, object: Value) -> &mut World {
            let text = |name: &str| object["metadata"][name].as_str().unwrap_or("").to_owned();
            let key = prefix(group, plural, &text("namespace")) + &text("name");
            self.apply(Op::Put { key: key.into(), value: object.to_string().into(), lease: 0 });
            self
        }

        pub fn delete(&mut self, group: &str, plural: &str, namespace: &str, name: &str) {
            self.apply(Op::Delete { key: (prefix(group, plural, namespace) + name).into() });
        }
    }
}
