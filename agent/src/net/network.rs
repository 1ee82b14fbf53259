//! The node's network as one handle: what the runtime and the kubelet hold.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use ipnet::IpNet;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::attach::{self, PodLink};
use super::config::NetworkConfig;
use super::feed::{Feed, Follower, Relist};
use super::host::{self, HostFacts};
use super::ipam::{Attachment, Ipam};
use super::mailbox::Mailbox;
use super::netlink::route::Link;
use super::netlink::{NetlinkError, Socket};
use super::nodes::Node;
use super::proxy::plan::LocalPod;
use super::{NetworkError, PodAddresses, PodNetwork, PodNetworkRequest, names, overlay, proxy, recall};
use crate::dns;
use crate::watch::Event;

/// How long a sandbox may wait for the node's range.
const RANGE_WITHIN: Duration = Duration::from_secs(30);

/// The running network of a node. Clones are one network.
#[derive(Debug, Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: NetworkConfig,
    facts: HostFacts,
    ipam: Mutex<Ipam>,
    /// The node's ranges; empty until they are known.
    ranges: watch::Sender<Vec<IpNet>>,
    /// The service proxy's thread; `None` when the node runs without.
    proxy: Option<Mailbox<proxy::Input>>,
}

/// What of the network is to run besides pod attachment.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    /// The service proxy.
    pub service_proxy: bool,
    /// The DNS responder on [`NetworkConfig::cluster_dns`]. Without it that address is a Service like any other.
    pub dns: bool,
}

impl Network {
    /// Prepares the namespace of this process and starts the service proxy. Needs a running tokio runtime.
    ///
    /// # Errors
    /// What does not heal by itself: a data directory that cannot be written, a kernel that refuses.
    pub async fn start(
        mut config: NetworkConfig,
        parts: Parts,
        client: kube::Client,
        shutdown: &CancellationToken,
    ) -> Result<Self, NetworkError> {
        if !parts.dns {
            config.cluster_dns.clear();
        }
        let (config, facts, ipam) = on_thread(move || {
            let ipam = Ipam::load(config.agent_dir.join("ipam"))?;
            let facts = host::prepare(&config)?;
            super::teardown::remember(&config)?;
            Ok((config, facts, ipam))
        })
        .await?;
        let failed = |step: &str, source| NetworkError::Kernel { step: step.to_owned(), source };
        let relist = Relist::new();
        let proxy = if parts.service_proxy {
            let (health, followed) = watch::channel(Default::default());
            tokio::spawn(proxy::health::serve(followed));
            let (config, relist) = (config.clone(), relist.clone());
            let started = on_thread(move || Ok(proxy::start(&config, health, Box::new(move || relist.ask())))).await?;
            Some(started.map_err(|source| failed("start the service proxy", source))?)
        } else {
            None
        };
        let (ours, asking) = (config.clone(), relist.clone());
        let overlay = on_thread(move || Ok(overlay::start(&ours, Box::new(move || asking.ask())))).await?;
        let overlay = overlay.map_err(|source| failed("start the overlay", source))?;
        let network = Self::assemble(config, facts, ipam, proxy);
        network.announce_all();
        network.follow(parts, overlay, &client, &relist, shutdown)?;
        Ok(network)
    }

    pub(super) fn assemble(
        config: NetworkConfig,
        facts: HostFacts,
        ipam: Ipam,
        proxy: Option<Mailbox<proxy::Input>>,
    ) -> Self {
        let ranges = watch::Sender::new(ipam.ranges().to_vec());
        Self { inner: Arc::new(Inner { config, facts, ipam: Mutex::new(ipam), ranges, proxy }) }
    }

    /// Starts the watches, and the DNS responder that hangs on them. One watch of all nodes: the own one tells the pod
    /// ranges and the zone, all of them the ways to other pods.
    fn follow(
        &self,
        parts: Parts,
        overlay: Mailbox<overlay::Input>,
        client: &kube::Client,
        relist: &Relist,
        shutdown: &CancellationToken,
    ) -> Result<(), NetworkError> {
        let config = &self.inner.config;
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let to_dns = |source: dns::Source| -> Option<Follower> {
            let sender = sender.clone();
            parts.dns.then(|| Box::new(move |event| drop(sender.send((source, event)))) as Follower)
        };
        let to_proxy = |wrap: fn(Event) -> proxy::Input| -> Option<Follower> {
            let sender = self.inner.proxy.clone()?;
            Some(Box::new(move |event| sender.tell(wrap(event))))
        };
        let network = self.clone();
        let own: Follower = Box::new(move |event| network.take_own_node(&event));
        let all: Follower = Box::new(move |event| overlay.tell(overlay::Input::Node(event)));
        let sources = [
            (recall::SERVICES, [to_proxy(proxy::Input::Service), to_dns(dns::Source::Services)]),
            (recall::SLICES, [to_proxy(proxy::Input::Slice), to_dns(dns::Source::Slices)]),
            (recall::NAMESPACES, [None, to_dns(dns::Source::Namespaces)]),
            (recall::NODES, [Some(own), Some(all)]),
        ];
        let collections: Vec<_> = sources.iter().map(|(collection, _)| *collection).collect();
        let (recorder, known) = recall::recall(&config.agent_dir.join("net"), &collections)
            .map_err(|source| NetworkError::Kernel { step: "start a thread".into(), source })?;
        for (index, ((collection, followers), known)) in sources.into_iter().zip(known).enumerate() {
            let feed = Feed { collection, known, recorder: recorder.clone(), index };
            feed.follow(client, followers.into_iter().flatten().collect(), relist, shutdown);
        }
        if parts.dns {
            dns::start(&config.cluster_domain, &config.cluster_dns, config.resolv_conf.clone(), events, shutdown);
        }
        Ok(())
    }

    /// Keeps new connections to the Service of the API away from `lost` servers, until shutdown: this node may know sooner
    /// than the cluster that one is gone, or be parted from one that others reach.
    pub async fn avoid_servers(self, mut lost: watch::Receiver<BTreeSet<SocketAddr>>, shutdown: CancellationToken) {
        let Some(proxy) = self.inner.proxy.clone() else { return };
        while let Some(Ok(())) = shutdown.run_until_cancelled(lost.changed()).await {
            proxy.tell(proxy::Input::Lost(lost.borrow_and_update().clone()));
        }
    }

    fn take_own_node(&self, event: &Event) {
        let Event::Applied(object) = event else { return };
        if object.name != self.inner.config.node_name {
            return;
        }
        let Ok(node) = Node::parse(&object.json) else { return };
        if let Some(proxy) = &self.inner.proxy {
            proxy.tell(proxy::Input::Zone(node.zone));
        }
        if node.pod_cidrs.is_empty() || *self.inner.ranges.borrow() == node.pod_cidrs {
            return;
        }
        if let Err(error) = self.set_pod_cidrs(&node.pod_cidrs) {
            tracing::error!(error = super::describe(&error), "pod range not taken over");
        }
    }

    /// Takes over `Node.spec.podCIDRs`. Attachments that wait go on.
    ///
    /// # Errors
    /// The ranges could not be written down.
    pub(super) fn set_pod_cidrs(&self, cidrs: &[IpNet]) -> Result<(), NetworkError> {
        self.inner.ipam.lock().set_ranges(cidrs)?;
        self.inner.ranges.send_replace(cidrs.to_vec());
        Ok(())
    }

    pub(super) fn announce_all(&self) {
        let known: Vec<Attachment> = self.inner.ipam.lock().attachments().cloned().collect();
        for attachment in known {
            self.announce(&attachment.uid, Some(&attachment));
        }
    }

    /// Tells the proxy of a pod.
    fn announce(&self, uid: &str, attachment: Option<&Attachment>) {
        let Some(proxy) = &self.inner.proxy else { return };
        let pod =
            attachment.map(|attachment| LocalPod { ips: attachment.ips.clone(), ports: attachment.host_ports.clone() });
        proxy.tell(proxy::Input::Pod(uid.to_owned(), pod));
    }

    async fn attach_pod(&self, request: &PodNetworkRequest) -> Result<PodAddresses, NetworkError> {
        self.wait_for_range().await?;
        let attachment = self.reserve(request)?;
        let ips = attachment.ips.clone();
        let link = self.link(&attachment.uid, &ips);
        let netns = request.netns.clone();
        let joined = on_thread(move || attach::join(&link, &netns)).await;
        if let Err(error) = joined {
            // Gives the address back; the first error is the one to tell.
            let _ = self.detach_pod(&request.uid).await;
            return Err(error);
        }
        self.announce(&attachment.uid, Some(&attachment));
        Ok(PodAddresses { ips })
    }

    async fn wait_for_range(&self) -> Result<(), NetworkError> {
        let mut ranges = self.inner.ranges.subscribe();
        let known = async { ranges.wait_for(|ranges| !ranges.is_empty()).await.map(drop) };
        match tokio::time::timeout(RANGE_WITHIN, known).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(NetworkError::NoPodCidr),
        }
    }

    /// The attachment of a pod: what is known of it, else fresh addresses.
    fn reserve(&self, request: &PodNetworkRequest) -> Result<Attachment, NetworkError> {
        let mut ipam = self.inner.ipam.lock();
        let ips = match ipam.get(&request.uid) {
            Some(known) => known.ips.clone(),
            None => ipam.allocate()?,
        };
        let attachment = Attachment {
            uid: request.uid.clone(),
            namespace: request.namespace.clone(),
            name: request.name.clone(),
            ips,
            link: names::link(&self.inner.config.instance_id, &request.uid),
            host_ports: request.host_ports.clone(),
        };
        if ipam.get(&request.uid) != Some(&attachment) {
            ipam.insert(attachment.clone())?;
        }
        Ok(attachment)
    }

    fn link(&self, uid: &str, ips: &[IpAddr]) -> PodLink {
        let instance = &self.inner.config.instance_id;
        let (node_mac, pod_mac) = names::macs(instance, uid);
        PodLink {
            name: names::link(instance, uid),
            alias: names::link_alias(instance, uid),
            node_mac,
            pod_mac,
            ips: ips.to_vec(),
            mtu: self.inner.facts.mtu,
        }
    }

    async fn detach_pod(&self, uid: &str) -> Result<(), NetworkError> {
        let name = names::link(&self.inner.config.instance_id, uid);
        self.announce(uid, None);
        on_thread(move || {
            let mut socket = Socket::route().map_err(NetlinkError::from)?;
            Ok(attach::remove(&mut socket, &name)?)
        })
        .await?;
        self.inner.ipam.lock().remove(uid)?;
        Ok(())
    }

    /// Links of this instance whose pod is not in `live` go, also those without a record.
    async fn retain_pods(&self, live: &BTreeSet<String>) -> Result<(), NetworkError> {
        let recorded: Vec<String> = self.inner.ipam.lock().attachments().map(|known| known.uid.clone()).collect();
        for uid in recorded.iter().filter(|uid| !live.contains(*uid)) {
            self.detach_pod(uid).await?;
        }
        let instance = self.inner.config.instance_id.clone();
        let keep: BTreeSet<String> = live.iter().map(|uid| names::link_alias(&instance, uid)).collect();
        let lost = move |link: &Link| link.name.starts_with(names::LINK_PREFIX) && !keep.contains(&link.alias);
        on_thread(move || super::teardown::delete_links(&instance, lost)).await
    }
}

impl PodNetwork for Network {
    fn attach<'a>(&'a self, request: &'a PodNetworkRequest) -> BoxFuture<'a, Result<PodAddresses, NetworkError>> {
        self.attach_pod(request).boxed()
    }

    fn detach<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), NetworkError>> {
        self.detach_pod(uid).boxed()
    }

    fn retain<'a>(&'a self, live: &'a BTreeSet<String>) -> BoxFuture<'a, Result<(), NetworkError>> {
        self.retain_pods(live).boxed()
    }
}

/// Runs blocking work on a thread of its own, which may change its namespace.
pub(super) async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let failed = |source| NetworkError::Kernel { step: "start a thread".into(), source };
    std::thread::Builder::new()
        .name("pod-network".into())
        .spawn(move || {
            let _ = sender.send(work());
        })
        .map_err(failed)?;
    receiver.await.map_err(|_| failed(std::io::Error::other("the thread ended early")))?
}
