//! A node of its own namespace: everything of the network but the watches, whose events the test tells.

use std::net::{IpAddr, SocketAddr};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use super::space::Space;
use super::*;

/// A node (without default route) and the threads of its network.
pub struct Host {
    pub node: Space,
    pub network: Network,
    pub proxy: Mailbox<Input>,
    pub overlay: Mailbox<overlay::Input>,
    pub config: NetworkConfig,
    pub directory: tempfile::TempDir,
}

/// A node and a machine beside it.
pub struct World {
    pub host: Host,
    pub client: Space,
}

impl std::ops::Deref for World {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl std::ops::DerefMut for World {
    fn deref_mut(&mut self) -> &mut Host {
        &mut self.host
    }
}

impl World {
    pub fn new(instance: &str) -> Self {
        let (node, client) = (Space::new(), Space::new());
        node.wire("wire", &client, "wire".into());
        node.address("wire", &format!("{NODE}/24"));
        client.address("wire", &format!("{CLIENT}/24"));
        let host = Host::new(node, instance, "me", |config| config.node_ips = vec![NODE.parse().unwrap()]);
        host.network.set_pod_cidrs(&["10.42.0.0/24".parse().unwrap()]).unwrap();
        Self { host, client }
    }
}

impl Host {
    /// Starts the network in a namespace that has its wire.
    pub fn new(node: Space, instance: &str, name: &str, adjust: impl FnOnce(&mut NetworkConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = NetworkConfig {
            instance_id: instance.to_owned(),
            agent_dir: directory.path().to_owned(),
            resolv_conf: directory.path().join("resolv.conf"),
            node_name: name.into(),
            node_ips: Vec::new(),
            cluster_cidrs: vec!["10.42.0.0/16".parse().unwrap()],
            service_cidrs: vec!["10.43.0.0/16".parse().unwrap()],
            cluster_dns: vec!["10.43.0.10".parse().unwrap()],
            cluster_domain: "cluster.local".into(),
            backend: Backend::Vxlan,
        };
        adjust(&mut config);
        let (network, proxy, overlay) = Self::start(&node, &config);
        let host = Self { node, network, proxy, overlay, config, directory };
        host.tell(Event::Restarted, Event::Restarted);
        host.tell(Event::Synced, Event::Synced);
        host.settle();
        host
    }

    fn start(node: &Space, config: &NetworkConfig) -> (Network, Mailbox<Input>, Mailbox<overlay::Input>) {
        let config = config.clone();
        node.run(move || {
            let facts = host::prepare(&config).unwrap();
            let (health, followed) = tokio::sync::watch::channel(Default::default());
            // In this thread's namespace, until the proxy ends.
            std::thread::spawn(|| block_on(proxy::health::serve(followed)));
            teardown::remember(&config).unwrap();
            let ipam = ipam::Ipam::load(config.agent_dir.join("ipam")).unwrap();
            let sender = proxy::start(&config, health, Box::new(|| ())).unwrap();
            let overlay = overlay::start(&config, Box::new(|| ())).unwrap();
            (Network::assemble(config, facts, ipam, Some(sender.clone())), sender, overlay)
        })
    }

    pub fn tell(&self, service: Event, slice: Event) {
        self.proxy.tell(Input::Service(service));
        self.proxy.tell(Input::Slice(slice));
    }

    /// Waits until all that was said is in the kernel; returns how long it took.
    pub fn settle(&self) -> Duration {
        let started = Instant::now();
        let (sender, done) = channel();
        self.proxy.tell(Input::Barrier(sender));
        assert_eq!(done.recv_timeout(Duration::from_secs(60)).unwrap(), None);
        started.elapsed()
    }

    pub fn service(&self, name: &str, spec: &str) {
        let json = format!(r#"{{"metadata":{{"namespace":"n","name":"{name}"}},"spec":{{{spec}}}}}"#);
        self.proxy.tell(Input::Service(Event::Applied(object(name, &json))));
    }

    /// Endpoints as (address, node) pairs.
    pub fn slice(&self, name: &str, ports: &str, endpoints: &[(&str, &str)]) {
        let family = if endpoints.iter().any(|(ip, _)| ip.contains(':')) { "IPv6" } else { "IPv4" };
        let endpoints: Vec<String> = endpoints
            .iter()
            .map(|(ip, node)| format!(r#"{{"addresses":["{ip}"],"nodeName":"{node}","conditions":{{"ready":true}}}}"#))
            .collect();
        let json = format!(
            r#"{{"metadata":{{"namespace":"n","name":"{name}-1","labels":{{"kubernetes.io/service-name":"{name}"}}}},
            "addressType":"{family}","ports":[{ports}],"endpoints":[{}]}}"#,
            endpoints.join(",")
        );
        self.proxy.tell(Input::Slice(Event::Applied(object(&format!("{name}-1"), &json))));
    }

    /// A pod with servers on 8080.
    pub fn pod(&self, name: &'static str, host_ports: Vec<HostPort>) -> (Space, IpAddr) {
        let (space, ips) = self.pod_of_all_families(name, host_ports);
        (space, ips[0])
    }

    /// A pod with servers on 8080 of all its addresses.
    pub fn pod_of_all_families(&self, name: &'static str, host_ports: Vec<HostPort>) -> (Space, Vec<IpAddr>) {
        let space = Space::new();
        let ips = self.attach(name, &space, host_ports);
        ips.iter().for_each(|ip| space.serve(SocketAddr::new(*ip, 8080), name));
        (space, ips)
    }

    pub fn attach(&self, name: &str, space: &Space, host_ports: Vec<HostPort>) -> Vec<IpAddr> {
        let request = PodNetworkRequest {
            uid: format!("uid-{name}"),
            namespace: "n".into(),
            name: name.into(),
            netns: space.path.clone(),
            host_ports,
        };
        let network = self.network.clone();
        self.node.run(move || block_on(async move { network.attach(&request).await })).unwrap().ips
    }

    /// The process dies and the next one starts; the API is listed anew.
    pub fn restart(&mut self, again: impl FnOnce(&Self)) {
        (self.proxy, self.overlay) = (mailbox::mailbox().0, mailbox::mailbox().0);
        self.network = Network::assemble(
            self.config.clone(),
            host::HostFacts { mtu: 1450 },
            ipam::Ipam::load(self.directory.path().join("ipam")).unwrap(),
            None,
        );
        // The thread ends when its last sender is gone, and its socket with it.
        std::thread::sleep(Duration::from_millis(50));
        (self.network, self.proxy, self.overlay) = Self::start(&self.node, &self.config);
        self.network.announce_all();
        self.tell(Event::Restarted, Event::Restarted);
        again(self);
        self.tell(Event::Synced, Event::Synced);
        self.settle();
    }

    pub fn detach(&self, name: &str) {
        let (network, uid) = (self.network.clone(), format!("uid-{name}"));
        self.node.run(move || block_on(async move { network.detach(&uid).await })).unwrap();
    }

    /// Names of the servers that answer so many new connections.
    pub fn asked(space: &Space, at: &str, times: usize) -> BTreeSet<String> {
        (0..times).filter_map(|_| space.ask(at).ok()).map(|(name, _)| name).collect()
    }

    pub fn nft(&self) -> String {
        self.node.command("nft -n list ruleset")
    }
}
