//! Every namespace has a ServiceAccount `default` and a ConfigMap with the cluster's CA.

use std::sync::Arc;

use futures::future::{BoxFuture, FutureExt};
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;

use super::api::{Api, ApiError};
use super::informer::{Informer, Subscription};
use super::object::{Key, Object};
use super::owner::enqueue_self;
use super::queue::Queue;
use super::resource::{CONFIG_MAPS, NAMESPACES, Resource, SERVICE_ACCOUNTS};
use super::runner::{Controller, Next, Reconcile, ReconcileError};
use super::{INFORMER_USER, Term};

const DEFAULT: &str = "default";
const ROOT_CA: &str = "kube-root-ca.crt";
const CA_FILE: &str = "ca.crt";
const DESCRIPTION: &str = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across distributions of Kubernetes clusters.";

/// Starts both loops.
pub fn start(term: &Term) {
    let namespaces = term.informers.of(&NAMESPACES);

    let (queue, accounts) = (Arc::new(Queue::default()), term.informers.of(&SERVICE_ACCOUNTS));
    let subscriptions = vec![enqueue_self(&queue, &namespaces), enqueue_namespace(&queue, &accounts, DEFAULT)];
    let reconcile = Arc::new(DefaultAccount {
        api: term.api("service-account-controller"),
        namespaces: namespaces.clone(),
        accounts: accounts.clone(),
    });
    let needs = vec![namespaces.clone(), accounts];
    term.start(Controller { name: "serviceaccount", queue, concurrency: 4, needs, subscriptions, reconcile });

    // ConfigMaps can be many and large: of these only the metadata is kept, and what is in ours is read when it changes.
    let (queue, maps) = (Arc::new(Queue::default()), term.informers.metadata_of(&CONFIG_MAPS));
    let subscriptions = vec![enqueue_self(&queue, &namespaces), enqueue_namespace(&queue, &maps, ROOT_CA)];
    let reconcile = Arc::new(RootCa {
        api: term.api("root-ca-cert-publisher"),
        reader: term.api_as(INFORMER_USER),
        namespaces: namespaces.clone(),
        pem: term.context.root_ca_pem.clone(),
    });
    let needs = vec![namespaces, maps];
    term.start(Controller { name: "root-ca", queue, concurrency: 4, needs, subscriptions, reconcile });
}

/// Asks for the namespace of an object of that name.
fn enqueue_namespace(queue: &Arc<Queue>, informer: &Arc<Informer>, name: &'static str) -> Subscription {
    let queue = queue.clone();
    informer.subscribe(move |delta| {
        if let Some(object) = delta.latest().filter(|object| object.key.name() == name) {
            queue.add(Key::new("", object.key.namespace()));
        }
    })
}

fn lives(namespace: Option<Arc<Object>>) -> bool {
    namespace.is_some_and(|namespace| namespace.deleting.is_none() && namespace.phase() != "Terminating")
}

async fn ensure(api: &Api, resource: &Resource, namespace: &str, object: &serde_json::Value) -> Result<(), ApiError> {
    match api.create(resource, namespace, object).await {
        Err(error) if !error.is_already_exists() && !error.is_namespace_terminating() && !error.is_not_found() => {
            Err(error)
        }
        _ => Ok(()),
    }
}

struct DefaultAccount {
    api: Api,
    namespaces: Arc<Informer>,
    accounts: Arc<Informer>,
}

impl Reconcile for DefaultAccount {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        async move {
            let namespace = key.name();
            if lives(self.namespaces.get(key)) && self.accounts.get(&Key::new(namespace, DEFAULT)).is_none() {
                let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
                    "metadata": {"name": DEFAULT, "namespace": namespace}});
                ensure(&self.api, &SERVICE_ACCOUNTS, namespace, &account).await?;
            }
            Ok(Next::Done)
        }
        .boxed()
    }
}

struct RootCa {
    api: Api,
    /// The publisher itself may only write.
    reader: Api,
    namespaces: Arc<Informer>,
    pem: Arc<str>,
}

impl Reconcile for RootCa {
    fn reconcile<'a>(&'a self, key: &'a Key) -> BoxFuture<'a, Result<Next, ReconcileError>> {
        self.sync(key).boxed()
    }
}

impl RootCa {
    async fn sync(&self, key: &Key) -> Result<Next, ReconcileError> {
        if !lives(self.namespaces.get(key)) {
            return Ok(Next::Done);
        }
        let map = Key::new(key.name(), ROOT_CA);
        match self.reader.get::<ConfigMap>(&CONFIG_MAPS, &map).await {
            Ok(present) => self.correct(&map, present).await?,
            Err(error) if error.is_not_found() => {
                let new = json!({"apiVersion": "v1", "kind": "ConfigMap",
                    "metadata": {"name": ROOT_CA, "namespace": key.name(),
                        "annotations": {"kubernetes.io/description": DESCRIPTION}},
                    "data": {CA_FILE: &*self.pem}});
                ensure(&self.api, &CONFIG_MAPS, key.name(), &new).await?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(Next::Done)
    }

    async fn correct(&self, key: &Key, mut present: ConfigMap) -> Result<(), ApiError> {
        let data = present.data.get_or_insert_default();
        if data.len() == 1 && data.get(CA_FILE).map(String::as_str) == Some(&*self.pem) {
            return Ok(());
        }
        data.clear();
        data.insert(CA_FILE.to_owned(), self.pem.to_string());
        let annotations = present.metadata.annotations.get_or_insert_default();
        annotations.insert("kubernetes.io/description".to_owned(), DESCRIPTION.to_owned());
        self.api.update(&CONFIG_MAPS, key, "", &present).await.map(drop)
    }
}
