//! The control loops, and the small runtime that they share.
//!
//! Everything here runs only while this server leads: gaining leadership starts a [`Term`] (informers, loops, scheduler),
//! losing it ends the term and drops its caches. All reads come from informers' caches, all writes go through the API
//! under the loop's own service account.
//!
//! # Layout
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`resource`] | names, group, version and scope of a resource |
//! | [`object`], [`selector`] | a cached object: bytes and a few facts; labels and selectors |
//! | [`cache`], [`informer`] | list and watch of one resource into one cache with subscribers |
//! | [`api`] | an identity's requests, written through to the caches |
//! | [`queue`], [`runner`], [`backoff`] | keys to work on, who works on them, when again after a failure |
//! | [`event`] | events for people |
//! | [`owner`], [`replica`], [`template`] | adopting and releasing, choosing pods to delete, pods from templates |
//! | [`quantity`] | quantities as numbers |
//! | [`discovery`] | what the API serves, custom resources included |
//! | `deployment` + `rollout`, `replicaset` | Deployments, ReplicaSets and ReplicationControllers |
//! | `statefulset` + `retention`, `daemonset`, `history` | StatefulSets, DaemonSets and their revisions |
//! | `job` + `completion`, `cronjob` + [`schedule`], [`timezone`], `ttl` | Jobs, CronJobs, what remains of them |
//! | `backend`, `slices`, `endpointslice`, `endpoint`, `mirroring` | what is behind Services |
//! | `serviceaccount`, `namespace`, `quota`, `clusterrole` | what belongs to namespaces and policy |
//! | `garbage`, `podgc` | owners and dependents, pods nobody finishes |
//! | `volume` + `binding`, `protection`, `ephemeral` | PersistentVolumes and claims |
//! | `servicecidr` | ranges of Service addresses |
//! | `node` + `zone`, `nodecidr`, `eviction`, `disruption` | nodes and what has to leave them |
//!
//! | task | owns | starts | ends |
//! | --- | --- | --- | --- |
//! | leadership | the term | [`spawn_all`] | shutdown |
//! | informer, one per resource | its cache | first use in a term | end of the term |
//! | loop, one per controller | keys in work | begin of a term | end of the term |
//! | event recorder | counts of known events | begin of a term | end of the term |

pub mod api;
pub mod backoff;
pub mod cache;
pub mod discovery;
pub mod event;
pub mod informer;
pub mod object;
pub mod owner;
pub mod quantity;
pub mod queue;
pub mod replica;
pub mod resource;
pub mod runner;
pub mod schedule;
pub mod selector;
pub mod template;
pub mod timezone;

mod backend;
mod binding;
mod clusterrole;
mod completion;
mod cronjob;
mod daemonset;
mod deployment;
mod disruption;
mod endpoint;
mod endpointslice;
mod ephemeral;
mod eviction;
mod garbage;
mod history;
mod job;
mod mirroring;
mod namespace;
mod node;
mod nodecidr;
mod podgc;
mod protection;
mod quota;
mod replicaset;
mod retention;
mod rollout;
mod serviceaccount;
mod servicecidr;
mod slices;
mod statefulset;
mod ttl;
mod volume;
mod zone;

use std::future::Future;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::api::Api;
use self::discovery::Discovery;
use self::event::Recorder;
use self::informer::Informers;
use self::runner::Controller;

/// The user that informers list and watch as.
pub const INFORMER_USER: &str = "system:kube-controller-manager";

/// What the loops get from the server they run in.
#[derive(Clone)]
pub struct Context {
    /// A client for a user name: `system:kube-controller-manager`, `system:kube-scheduler` or
    /// `system:serviceaccount:kube-system:<controller>` (which belongs to the groups of service accounts).
    pub client_for: Arc<dyn Fn(&str) -> kube::Client + Send + Sync>,
    /// Whether this server leads.
    pub leadership: watch::Receiver<bool>,
    /// Pod ranges of the cluster, from which nodes get theirs; empty: nodes get none.
    pub cluster_cidrs: Vec<IpNet>,
    /// The CA bundle that pods verify the API with.
    pub root_ca_pem: Arc<str>,
    /// Ends everything.
    pub shutdown: CancellationToken,
}

/// One period of leadership: what loops are built from.
pub struct Term {
    /// The server's context.
    pub context: Context,
    /// The shared caches.
    pub informers: Arc<Informers>,
    /// The event recorder.
    pub recorder: Recorder,
    /// Ends with the term.
    pub cancel: CancellationToken,
    tasks: TaskTracker,
}

impl Term {
    /// The API as the service account of a controller sees it.
    pub fn api(&self, controller: &str) -> Api {
        self.api_as(&format!("system:serviceaccount:kube-system:{controller}"))
    }

    /// The API as a user sees it.
    pub fn api_as(&self, user: &str) -> Api {
        Api::new((self.context.client_for)(user), self.informers.clone())
    }

    /// Runs a loop until the term ends; a panic ends only the reconcile it happened in.
    pub fn start(&self, controller: Controller) {
        let controller = Arc::new(controller);
        let cancel = self.cancel.clone();
        self.tasks.spawn(runner::supervise(controller.name, cancel.clone(), move || {
            let (controller, cancel) = (controller.clone(), cancel.clone());
            async move { controller.run(cancel).await }
        }));
    }

    /// Runs a task until the term ends, again if it ends or panics before.
    pub fn start_task<F>(&self, name: &'static str, start: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tasks.spawn(runner::supervise(name, self.cancel.clone(), start));
    }
}

/// Starts control loops and scheduler; they run whenever `leadership` says so, until `shutdown`.
pub fn spawn_all(context: Context) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut leadership = context.leadership.clone();
        loop {
            tokio::select! {
                () = context.shutdown.cancelled() => return,
                led = leadership.wait_for(|leads| *leads) => if led.is_err() { return },
            }
            let term = begin_term(&context);
            tokio::select! {
                () = context.shutdown.cancelled() => {}
                _over = leadership.wait_for(|leads| !*leads) => {}
            }
            term.cancel.cancel();
            term.tasks.close();
            term.tasks.wait().await;
        }
    })
}

fn begin_term(context: &Context) -> Term {
    let cancel = context.shutdown.child_token();
    let tasks = TaskTracker::new();
    let informers = Informers::new((context.client_for)(INFORMER_USER), cancel.clone(), tasks.clone());
    let (recorder, write_events) = Recorder::new();
    let ended = cancel.clone();
    tasks.spawn(async move {
        tokio::select! {
            () = ended.cancelled() => {}
            () = write_events => {}
        }
    });
    let term = Term { context: context.clone(), informers, recorder, cancel, tasks };
    deployment::start(&term);
    replicaset::start(&term);
    endpointslice::start(&term);
    endpoint::start(&term);
    mirroring::start(&term);
    serviceaccount::start(&term);
    let discovery = Discovery::new(term.api_as(INFORMER_USER));
    namespace::start(&term, &discovery);
    quota::start(&term, &discovery);
    garbage::start(&term, &discovery);
    crate::scheduler::start(&term);
    node::start(&term);
    nodecidr::start(&term);
    eviction::start(&term);
    podgc::start(&term);
    job::start(&term);
    statefulset::start(&term);
    daemonset::start(&term);
    cronjob::start(&term);
    disruption::start(&term);
    ttl::start(&term);
    clusterrole::start(&term);
    volume::start(&term);
    protection::start(&term);
    ephemeral::start(&term);
    servicecidr::start(&term);
    term
}

#[cfg(test)]
mod tests;
