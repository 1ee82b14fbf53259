//! A member from its first start to its last.
//!
//! | at start | then |
//! | --- | --- |
//! | nothing is kept | admission by the token; servers that don't answer are waited for, a refusal is the end |
//! | settings and a good certificate are kept | the agent runs at once, with or without servers |
//! | settings are kept, the certificate is missing or over | the agent runs at once, so that pods go on; admission by the token in the background |
//!
//! While it runs the certificate is renewed when a third of its life is left, or when the operator says so.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::admission::{self, AdmissionError, Admitted, Applicant, ClusterSettings};
use super::credentials::{ClientCertificate, Credentials, CredentialsError, FreshKey};
use super::introduction::ca_hash;
use super::renewal;
use super::token::Token;
use crate::kubelet::api::ApiClient;
use crate::kubelet::backoff::Jitter;
use crate::servers::resolve::Resolver;
use crate::servers::{Dialer, NodeIdentity, ServerList, Servers, explain};

/// How often the certificate's age is looked at; jumps of the clock make one long sleep unreliable.
const CHECK: Duration = Duration::from_secs(60);
/// The shortest time between two looks.
const MOMENT: Duration = Duration::from_secs(1);
/// Delays between attempts at being admitted.
const ADMISSION: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// Delays between attempts at renewal.
const RENEWAL: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(3600));

/// What the operator wants.
#[derive(Debug, Clone)]
pub struct Wish {
    /// `--server` as `host:port`.
    pub server: Option<String>,
    /// `--token`.
    pub token: Option<Token>,
    /// `--node-name`.
    pub node_name: String,
    /// `DATA/agent`.
    pub agent_dir: PathBuf,
    /// Where names of servers are looked up.
    pub resolv_conf: PathBuf,
}

/// Why this node cannot be a member.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// First start without a server.
    #[error("this machine has not joined a cluster yet: give --server https://ADDRESS:6443 and --token TOKEN")]
    NoServer,
    /// First start without a token.
    #[error("this machine has not joined a cluster yet: give --token TOKEN (DATA/server/agent-token of a server)")]
    NoToken,
    /// The folder is another cluster's.
    #[error(
        "{agent_dir} belongs to a node of another cluster than the token: choose another --data-dir, or remove this \
         instance with `coracle uninstall --data-dir`"
    )]
    OtherCluster {
        /// The folder.
        agent_dir: PathBuf,
    },
    /// Refused for good.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// What is kept.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The CA or the certificate is no use to TLS.
    #[error("prepare TLS")]
    Tls(#[from] rustls::Error),
    /// Told to stop while waiting.
    #[error("stopped before a server answered")]
    Stopped,
}

/// A node that is, or once was, let into a cluster.
pub struct Membership {
    /// What all nodes agree on.
    pub settings: ClusterSettings,
    /// The way to the servers.
    pub servers: Servers,
    wish: Wish,
    credentials: Credentials,
    resolver: Resolver,
}

impl Membership {
    /// Opens what is kept, or asks to be admitted and waits for that.
    ///
    /// # Errors
    /// See [`MembershipError`].
    pub async fn open(wish: Wish, shutdown: &CancellationToken) -> Result<Membership, MembershipError> {
        let credentials = Credentials::new(wish.agent_dir.clone());
        let resolver = Resolver::new(wish.resolv_conf.clone());
        let list = ServerList::open(&wish.agent_dir, wish.server.clone());
        let mut roots = credentials.roots()?;
        let mut settings = credentials.cluster()?;
        let known = |token: &Token| roots.iter().any(|root| ca_hash(root) == token.ca_hash);
        if !roots.is_empty() && wish.token.as_ref().is_some_and(|token| !known(token)) {
            return Err(MembershipError::OtherCluster { agent_dir: wish.agent_dir });
        }
        if roots.is_empty() || settings.is_none() {
            if list.current().is_empty() {
                return Err(MembershipError::NoServer);
            }
            let Some(token) = wish.token.clone() else { return Err(MembershipError::NoToken) };
            let admitted = first_admission(&wish, &credentials, &resolver, &list, &token);
            let admitted = shutdown.run_until_cancelled(admitted).await.ok_or(MembershipError::Stopped)??;
            roots = vec![admitted.ca];
            settings = Some(admitted.settings);
        }
        let settings = settings.ok_or(MembershipError::NoToken)?;
        let servers = connectable(&roots, &resolver, list)?;
        let membership = Membership { settings, servers, wish, credentials, resolver };
        membership.show_certificate(SystemTime::now())?;
        Ok(membership)
    }

    /// Gives TLS the certificate that is kept, unless it is over.
    fn show_certificate(&self, now: SystemTime) -> Result<Option<ClientCertificate>, MembershipError> {
        let kept = self.credentials.certificate(&self.wish.node_name)?.filter(|kept| !kept.is_over(now));
        if let Some(kept) = &kept {
            self.servers.dialer.identity().set(kept.chain.clone(), &kept.key)?;
        }
        Ok(kept)
    }

    /// Keeps the certificate good until shutdown; `rotate` asks for another one at once.
    pub async fn keep(self, client: kube::Client, rotate: Arc<Notify>, shutdown: CancellationToken) {
        shutdown.run_until_cancelled(self.keep_good(ApiClient::new(client), &rotate)).await;
    }

    async fn keep_good(&self, api: ApiClient, rotate: &Notify) {
        let mut asked = false;
        let mut renewal_delay = Jitter::new(RENEWAL.0, RENEWAL.1);
        let mut admission_delay = Jitter::new(ADMISSION.0, ADMISSION.1);
        let mut complained = false;
        loop {
            let now = SystemTime::now();
            let kept = self.credentials.certificate(&self.wish.node_name);
            let kept = kept.unwrap_or_default().filter(|kept| !kept.is_over(now));
            let result = match &kept {
                Some(kept) if !asked && !kept.due_in(now).is_zero() => Ok(false),
                Some(_) => self.renew(&api).await.map(|()| true),
                None => self.readmit().await.map(|()| true),
            };
            let wait = match result {
                Ok(news) => {
                    if news {
                        tracing::info!("node certificate renewed");
                    }
                    renewal_delay.reset();
                    admission_delay.reset();
                    (complained, asked) = (false, false);
                    // What was just renewed is looked at anew in a moment.
                    kept.as_ref().map_or(MOMENT, |kept| kept.due_in(now)).clamp(MOMENT, CHECK)
                }
                Err(error) if kept.is_some() => {
                    tracing::warn!(error, "node certificate not renewed; trying on");
                    renewal_delay.delay()
                }
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        tracing::error!(error, "this node has no good certificate; its pods go on without servers");
                    }
                    admission_delay.delay()
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = rotate.notified() => asked = true,
            }
        }
    }

    async fn renew(&self, api: &ApiClient) -> Result<(), String> {
        let (key, pem) = renewal::renew(api, &self.wish.node_name).await.map_err(|error| explain(&error))?;
        let kept = self.credentials.keep_certificate(&key, &pem, &self.wish.node_name);
        let kept = kept.map_err(|error| explain(&error))?;
        self.servers.dialer.identity().set(kept.chain, &kept.key).map_err(|error| error.to_string())
    }

    /// Admission of a node that was away for longer than its certificate.
    async fn readmit(&self) -> Result<(), String> {
        let Some(token) = &self.wish.token else {
            return Err("its certificate has ended: start the agent with --token to have it admitted again".to_owned());
        };
        let admitted = admit(&self.wish, &self.credentials, &self.resolver, &self.servers.list, token).await;
        admitted.map_err(|error| explain(&error))?;
        self.show_certificate(SystemTime::now()).map_err(|error| explain(&error))?;
        Ok(())
    }
}

fn connectable(
    roots: &[CertificateDer<'static>],
    resolver: &Resolver,
    list: ServerList,
) -> Result<Servers, rustls::Error> {
    let dialer = Dialer::new(roots, NodeIdentity::default(), resolver.clone())?;
    Ok(Servers { list, dialer, own: None })
}

/// Asks until a server answers.
async fn first_admission(
    wish: &Wish,
    credentials: &Credentials,
    resolver: &Resolver,
    list: &ServerList,
    token: &Token,
) -> Result<Admitted, MembershipError> {
    let mut retry = Jitter::new(ADMISSION.0, ADMISSION.1);
    loop {
        match admit(wish, credentials, resolver, list, token).await {
            Ok(admitted) => return Ok(admitted),
            Err(MembershipError::Admission(error)) if !error.is_final() => {
                tracing::warn!(error = explain(&error), "not admitted yet; trying on");
                tokio::time::sleep(retry.delay()).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Asks every server once until one lets us in, and keeps what it gives.
async fn admit(
    wish: &Wish,
    credentials: &Credentials,
    resolver: &Resolver,
    list: &ServerList,
    token: &Token,
) -> Result<Admitted, MembershipError> {
    let node_secret = credentials.node_secret()?;
    let key = FreshKey::make(&wish.node_name)?;
    let applicant = Applicant { node_name: &wish.node_name, node_secret: &node_secret, key: &key };
    let mut last = MembershipError::NoServer;
    for server in list.current().into_iter().chain(list.fallbacks()) {
        match admission::ask(resolver, &server, token, &applicant).await {
            Ok(admitted) => {
                credentials.keep_root(&admitted.ca)?;
                credentials.keep_certificate(&key, &admitted.certificate, &wish.node_name)?;
                // Last: with it this is a member.
                credentials.keep_cluster(&admitted.settings)?;
                list.learn(admitted.servers.clone());
                tracing::info!(server, "admitted to the cluster");
                return Ok(admitted);
            }
            Err(error) if error.is_final() => return Err(error.into()),
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}
