//! What follows once the port is open: a plausible clock, a leader, what every cluster needs, and then readiness. None of it ends
//! the process; while something is missing `/readyz` says what.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use coracle_raft::Standing;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cluster::Cluster;
use super::{Settings, bootstrap, explain, live, peering};
use crate::apiserver::ApiServer;
use crate::apiserver::health::Health;
use crate::auth::pki::clock;
use crate::auth::rbac;
use crate::controllers::backoff::Backoff;

/// Delays between attempts at what needs a leader.
const RETRY: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// How often a learner looks how far it is.
const LOOK: Duration = Duration::from_secs(1);
/// A step of the progress that is worth a line in the log, in percent.
const STEP: u64 = 10;

/// What `/readyz` tells.
#[derive(Clone)]
pub struct Readiness {
    /// What is being waited for before the API is open and the system's objects are there.
    pub waiting: Arc<watch::Sender<Option<String>>>,
    /// How far a learner is.
    pub joining: Arc<watch::Sender<Option<String>>>,
    /// The clock is wrong.
    pub clock: Arc<watch::Sender<Option<String>>>,
    /// This server has been told to stop.
    pub stopping: Arc<AtomicBool>,
}

impl Readiness {
    /// Not ready yet. `clock` is the state that opening the data folder has used.
    pub fn new(clock: Arc<watch::Sender<Option<String>>>) -> Readiness {
        let some = |text: &str| Arc::new(watch::Sender::new(Some(text.to_owned())));
        Readiness { waiting: some("starting"), joining: some("joining"), clock, stopping: Arc::default() }
    }

    /// Adds the checks.
    pub fn register(&self, health: &Health, cluster: &Cluster) {
        let (leader, standing) = (cluster.node.leader(), cluster.node.standing());
        health.add_ready(
            "store",
            Arc::new(move || match *standing.borrow() {
                Standing::Removed => Err("this server was removed from the cluster".to_owned()),
                Standing::Superseded => Err("the cluster was restored or reset without this server".to_owned()),
                Standing::Member if leader.borrow().is_none() => Err("no leader".to_owned()),
                Standing::Member => Ok(()),
            }),
        );
        for (name, state) in [("member", &self.joining), ("bootstrap", &self.waiting), ("clock", &self.clock)] {
            let state = state.subscribe();
            health.add_ready(name, Arc::new(move || state.borrow().clone().map_or(Ok(()), Err)));
        }
        let stopping = self.stopping.clone();
        let check = move || if stopping.load(Ordering::Acquire) { Err("stopping".to_owned()) } else { Ok(()) };
        health.add_ready("shutdown", Arc::new(check));
    }

    fn wait_for(&self, what: impl Into<String>) {
        self.waiting.send_replace(Some(what.into()));
    }
}

/// Returns once the API is open: the clock is plausible and what this server's store holds is known to be the newest.
pub async fn open_api(api: &ApiServer, cluster: &Cluster, readiness: &Readiness) {
    readiness.wait_for("the system clock is wrong");
    let born = cluster.keyring.keys.server_ca.not_before();
    clock::wait_until_plausible(clock::earliest(Some(born)), &readiness.clock).await;
    readiness.wait_for("waiting for a leader");
    let mut retry = Backoff::new(RETRY.0, RETRY.1);
    while let Err(error) = cluster.node.read_barrier().await {
        tracing::debug!(%error, "no leader yet");
        tokio::time::sleep(retry.fail()).await;
    }
    api.open();
}

/// Makes the system namespaces, which everything else needs.
pub async fn namespaces(client: &kube::Client, readiness: &Readiness) {
    insist(readiness, || bootstrap::namespaces(client)).await;
}

/// Makes what every cluster has and points the `kubernetes` Service at the living servers.
pub async fn bootstrap(client: &kube::Client, settings: &Settings, cluster: &Cluster, readiness: &Readiness) {
    insist(readiness, || bootstrap_once(client, settings, cluster)).await;
}

/// Does it as often as it takes.
async fn insist<F: Future<Output = anyhow::Result<()>>>(readiness: &Readiness, attempt: impl Fn() -> F) {
    readiness.wait_for("system objects are being made");
    let mut retry = Backoff::new(RETRY.0, RETRY.1);
    while let Err(error) = attempt().await {
        let why = explain(error.as_ref());
        tracing::warn!(error = why, "making system objects failed; trying on");
        readiness.wait_for(format!("system objects are being made: {why}"));
        tokio::time::sleep(retry.fail()).await;
    }
}

async fn bootstrap_once(client: &kube::Client, settings: &Settings, cluster: &Cluster) -> anyhow::Result<()> {
    rbac::bootstrap::reconcile(client).await.context("write the bootstrap policy")?;
    bootstrap::ensure(client, settings).await?;
    live::set_leaving(&cluster.node, false).await?;
    if cluster.is_alone() {
        // Nobody else could say so, and readiness need not wait for the leader's next look.
        let own = cluster.address.parse()?;
        live::reconcile(client, &std::iter::once(own).collect(), Some(own)).await?;
    }
    anyhow::ensure!(live::exists(client).await?, "the leader has not written the endpoints of default/kubernetes yet");
    Ok(())
}

/// Shows how far this server is until it has a vote; forgets its data and ends the process's current run (through `again`) when
/// the cluster began anew without it.
pub async fn follow_membership(
    cluster: Cluster,
    api: ApiServer,
    data_dir: PathBuf,
    readiness: Readiness,
    again: CancellationToken,
    shutdown: CancellationToken,
) {
    let mut removed = false;
    let work = async {
        let mut voter = cluster.node.voter();
        let mut standing = cluster.node.standing();
        let mut told = None;
        while !*voter.borrow_and_update() {
            let percent = peering::progress(&cluster).await;
            let text = match (percent, cluster.leader()) {
                (Some(percent), _) => format!("joining: {percent} %"),
                (None, Some(_)) => "joining".to_owned(),
                (None, None) => "joining: no leader".to_owned(),
            };
            if percent.map(|percent| percent / STEP) != told {
                told = percent.map(|percent| percent / STEP);
                tracing::info!(percent, "catching up with the cluster");
            }
            readiness.joining.send_replace(Some(text));
            tokio::select! {
                changed = voter.changed() => if changed.is_err() { return },
                changed = standing.changed() => {
                    if changed.is_err() || act_on(*standing.borrow(), &mut removed, &api, &again) { return }
                }
                () = tokio::time::sleep(LOOK) => {}
            }
        }
        if told.is_some() {
            tracing::info!("caught up: this server is a full member now");
        }
        readiness.joining.send_replace(None);
        while standing.changed().await.is_ok() {
            if act_on(*standing.borrow(), &mut removed, &api, &again) {
                return;
            }
        }
    };
    shutdown.run_until_cancelled(work).await;
    // Whom this server looks for when it begins anew.
    super::cluster::remember(&cluster, &data_dir);
}

/// Whether there is nothing more to follow.
fn act_on(standing: Standing, removed: &mut bool, api: &ApiServer, again: &CancellationToken) -> bool {
    match standing {
        Standing::Member => false,
        Standing::Removed if std::mem::replace(removed, true) => false,
        Standing::Removed => {
            // What it holds grows old from now on.
            api.close("this server was removed from its cluster");
            tracing::error!(
                "this server was removed from the cluster; stop it, or let it join anew after `coracle uninstall --data-dir`"
            );
            false
        }
        Standing::Superseded => {
            tracing::warn!(
                "the cluster was restored or reset without this server, which now begins anew as its member"
            );
            again.cancel();
            true
        }
    }
}
