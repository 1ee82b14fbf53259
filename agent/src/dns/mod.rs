//! The cluster DNS responder: names of Services, endpoints and pods, and a relay for all others.
//!
//! It answers on the cluster DNS address itself, a host address on `lo` of every node, so that no query is rewritten on
//! its way.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`index`] | what names mean (pure) |
//! | [`answer`] | messages: what to do with a query (pure) |
//! | [`relay`] | the host's own servers, with a small cache |
//! | [`server`] | sockets |
//!
//! | task | owns | lives |
//! | --- | --- | --- |
//! | updater | the only writer of the index | until shutdown |
//! | one per address and transport | its socket | until shutdown |

pub mod answer;
pub mod index;
pub mod relay;
pub mod server;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio_util::sync::CancellationToken;

use crate::watch::Event;
use index::{Index, Key, Service, Slice};
use relay::Relay;
use server::Shared;

/// Which collection an event is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Services.
    Services,
    /// EndpointSlices.
    Slices,
    /// Namespaces.
    Namespaces,
}

/// Starts the responder. Queries for the cluster's names get `SERVFAIL` until all three collections were listed.
pub fn start(
    domain: &str,
    addresses: &[IpAddr],
    resolv_conf: PathBuf,
    events: UnboundedReceiver<(Source, Event)>,
    shutdown: &CancellationToken,
) {
    let index = Index::new(domain, addresses.to_vec());
    let shared = Arc::new(Shared::new(index, Relay::new(resolv_conf, addresses.to_vec())));
    for ip in addresses {
        tokio::spawn(server::serve(shared.clone(), *ip, shutdown.clone()));
    }
    let shutdown = shutdown.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = update(&shared, events) => {}
        }
    });
}

/// What the lists in progress have not shown yet, and which lists are complete.
#[derive(Debug, Default)]
struct Listed {
    services: Option<BTreeSet<Key>>,
    slices: Option<BTreeSet<Key>>,
    namespaces: Option<BTreeSet<String>>,
    complete: BTreeSet<u8>,
}

async fn update(shared: &Shared, mut events: UnboundedReceiver<(Source, Event)>) {
    let mut listed = Listed::default();
    while let Some((source, event)) = events.recv().await {
        let synced = matches!(event, Event::Synced);
        {
            let mut index = shared.index.write();
            match source {
                Source::Services => services(&mut index, &mut listed.services, event),
                Source::Slices => slices(&mut index, &mut listed.slices, event),
                Source::Namespaces => namespaces(&mut index, &mut listed.namespaces, event),
            }
        }
        if synced && listed.complete.len() < 3 {
            listed.complete.insert(source as u8);
            shared.ready.store(listed.complete.len() == 3, Ordering::Release);
        }
    }
}

fn services(index: &mut Index, unseen: &mut Option<BTreeSet<Key>>, event: Event) {
    match event {
        Event::Restarted => *unseen = Some(index.service_keys().into_iter().collect()),
        Event::Synced => {
            unseen.take().into_iter().flatten().for_each(|key| index.set_service(&key, None));
        }
        Event::Applied(object) => {
            let key = (object.namespace, object.name);
            if let Some(unseen) = unseen {
                unseen.remove(&key);
            }
            match Service::parse(&object.json) {
                Ok(service) => index.set_service(&key, Some(service)),
                Err(error) => tracing::warn!(namespace = key.0, service = key.1, %error, "cannot read Service"),
            }
        }
        Event::Deleted(object) => index.set_service(&(object.namespace, object.name), None),
    }
}

fn slices(index: &mut Index, unseen: &mut Option<BTreeSet<Key>>, event: Event) {
    match event {
        Event::Restarted => *unseen = Some(index.slice_keys().into_iter().collect()),
        Event::Synced => {
            unseen.take().into_iter().flatten().for_each(|key| index.set_slice(&key, None));
        }
        Event::Applied(object) => {
            let key = (object.namespace, object.name);
            if let Some(unseen) = unseen {
                unseen.remove(&key);
            }
            match Slice::parse(&object.json) {
                Ok(slice) => index.set_slice(&key, slice),
                Err(error) => tracing::warn!(namespace = key.0, slice = key.1, %error, "cannot read EndpointSlice"),
            }
        }
        Event::Deleted(object) => index.set_slice(&(object.namespace, object.name), None),
    }
}

fn namespaces(index: &mut Index, unseen: &mut Option<BTreeSet<String>>, event: Event) {
    match event {
        Event::Restarted => *unseen = Some(index.namespace_keys().into_iter().collect()),
        Event::Synced => {
            unseen.take().into_iter().flatten().for_each(|name| index.set_namespace(&name, false));
        }
        Event::Applied(object) => {
            if let Some(unseen) = unseen {
                unseen.remove(&object.name);
            }
            index.set_namespace(&object.name, true);
        }
        Event::Deleted(object) => index.set_namespace(&object.name, false),
    }
}
