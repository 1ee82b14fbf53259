//! Several machines: network namespaces on one switch, each with its own data folder, and what runs on them. Everything
//! that is made is removed by drop.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use http::Method;
use serde_json::Value;

use super::client::{self, Client, Credential, Failure};
use super::disks::Disk;
use super::switch::{Port, Switch, Weather, inside};
use crate::assert_eventually;
use crate::harness::{binary, ip, run};

/// How long a server may take until it is ready, on a machine that is busy with other stories.
const PATIENCE: Duration = Duration::from_secs(300);

/// What a host runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Server,
    Agent,
    /// Nothing: clients are there.
    Client,
}

/// One machine of a cluster.
pub struct Host {
    pub name: String,
    pub role: Role,
    pub address: Ipv4Addr,
    pub flags: Vec<String>,
    namespace: String,
    port: Port,
    dir: PathBuf,
    /// What the kernel shall say is the identity of this boot.
    boot_id: Option<PathBuf>,
    child: Option<Child>,
}

impl Host {
    /// A command on the machine.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg("--").arg(program.as_ref());
        command
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.join("kubeconfig")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Where its API is, if it is a server.
    pub fn api(&self) -> SocketAddr {
        (self.address, 6443).into()
    }

    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// `coracle COMMAND ARGS` on the machine, for its instance: standard output, or standard error if it failed.
    pub fn coracle(&self, args: &[&str]) -> Result<String, String> {
        let output = self.command(binary()).args(args).arg("--data-dir").arg(self.data_dir()).output().unwrap();
        said(&output)
    }

    fn spawn(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = match &self.boot_id {
            None => self.command(binary()),
            Some(file) => {
                let mut command = self.command("unshare");
                let script = r#"mount --bind "$0" /proc/sys/kernel/random/boot_id && exec "$@""#;
                command.args(["--mount", "sh", "-c", script]).arg(file).arg(binary());
                command
            }
        };
        command.arg(if self.role == Role::Agent { "agent" } else { "server" });
        command.args(["--config", "/dev/null", "--node-name", &self.name, "--data-dir"]).arg(self.data_dir());
        if self.role == Role::Server {
            command.arg("--write-kubeconfig").arg(self.kubeconfig());
        }
        command.args(&self.flags).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Fails when the process has ended by itself.
    pub fn assert_alive(&mut self) {
        let status = self.child.as_mut().and_then(|child| child.try_wait().unwrap());
        assert!(status.is_none(), "{} has ended: {status:?}", self.name);
    }

    /// Waits until the process ends by itself; its last words.
    pub fn wait_for_end(&mut self, seconds: u64) -> String {
        let mut child = self.child.take().expect("it runs");
        assert_eventually!(seconds, format!("{} ends", self.name), {
            child.try_wait().unwrap().map(|_| ()).ok_or_else(|| self.log().lines().last().unwrap_or("").to_owned())
        });
        self.log()
    }

    pub fn kill9(&mut self) {
        let mut child = self.child.take().expect("it runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// No thread of its process runs any more, until it is killed. One that waits for its disk gets its answer, but does
    /// nothing with it.
    pub fn freeze(&self) {
        let pid = self.child.as_ref().expect("it runs").id();
        run(Command::new("kill").arg("-STOP").arg(pid.to_string()));
        assert_eventually!(30, format!("{} stands still", self.name), {
            let running: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/task"))
                .unwrap()
                .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok())
                .filter(|stat| {
                    !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T") || rest.starts_with(" D"))
                })
                .collect();
            if running.is_empty() { Ok(()) } else { Err(running.concat()) }
        });
    }

    /// SIGTERM; returns how long it took.
    pub fn stop(&mut self) -> Duration {
        let begin = Instant::now();
        let mut child = self.child.take().expect("it runs");
        run(Command::new("kill").arg(child.id().to_string()));
        assert!(child.wait().unwrap().success(), "{}: {}", self.name, self.log());
        begin.elapsed()
    }
}

fn said(output: &Output) -> Result<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Machines on one network, 10.80.0.0/24, without a default route.
pub struct Cluster {
    pub hosts: Vec<Host>,
    pub switch: Switch,
    dir: tempfile::TempDir,
}

impl Cluster {
    /// Machines s1.. with servers that have formed one cluster, and c1.. for clients.
    pub fn of(servers: usize, clients: usize, flags: &[&str]) -> Cluster {
        let mut cluster = Cluster::empty();
        for n in 0..servers {
            let host = cluster.add(Role::Server, flags);
            cluster.start(host);
            if n == 0 {
                cluster.wait_ready(host);
            }
        }
        for _ in 0..clients {
            cluster.add(Role::Client, &[]);
        }
        for host in 0..servers {
            cluster.wait_ready(host);
        }
        cluster
    }

    pub fn empty() -> Cluster {
        let dir = tempfile::Builder::new().prefix("coracle-cluster-").tempdir().unwrap();
        Cluster { hosts: Vec::new(), switch: Switch::new(), dir }
    }

    /// Plugs in one more machine; returns its index.
    pub fn add(&mut self, role: Role, flags: &[&str]) -> usize {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let namespace = format!("ccl{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let index = self.hosts.len();
        let port = Port::try_from(index + 1).unwrap();
        let address = Ipv4Addr::new(10, 80, 0, u8::try_from(port).unwrap());
        let letter = match role {
            Role::Server => 's',
            Role::Agent => 'a',
            Role::Client => 'c',
        };
        let same = self.hosts.iter().filter(|h| h.name.starts_with(letter)).count();
        let name = format!("{letter}{}", same + 1);
        let dir = self.dir.path().join(&name);
        std::fs::create_dir(&dir).unwrap();
        ip(&format!("netns add {namespace}"));
        let flags = flags.iter().map(ToString::to_string).collect();
        // Owned by the cluster before anything can fail.
        self.hosts.push(Host {
            name,
            role,
            address,
            flags,
            namespace: namespace.clone(),
            port,
            dir,
            boot_id: None,
            child: None,
        });
        self.switch.plug(port, &namespace);
        ip(&format!("-n {namespace} link set lo up"));
        ip(&format!("-n {namespace} link set eth0 up"));
        ip(&format!("-n {namespace} addr add {address}/24 dev eth0"));
        index
    }

    /// Gives a host that has not started a disk of its own.
    pub fn disk(&self, host: usize) -> Disk {
        let host = &self.hosts[host];
        Disk::new(&host.dir.join("disk.img"), &host.data_dir())
    }

    /// The next start of a stopped server is the first after a reboot. Only for hosts without a node: a private mount
    /// namespace hides the pods of the last start.
    pub fn reboot(&mut self, host: usize) {
        let host = &mut self.hosts[host];
        assert!(host.child.is_none() && host.flags.iter().any(|f| f == "--disable-agent"));
        let file = host.dir.join("boot_id");
        std::fs::copy("/proc/sys/kernel/random/uuid", &file).unwrap();
        host.boot_id = Some(file);
    }

    fn of_role(&self, role: Role) -> impl Iterator<Item = usize> {
        self.hosts.iter().enumerate().filter(move |(_, h)| h.role == role).map(|(index, _)| index)
    }

    pub fn servers(&self) -> Vec<usize> {
        self.of_role(Role::Server).collect()
    }

    pub fn clients(&self) -> Vec<usize> {
        self.of_role(Role::Client).collect()
    }

    /// Starts what a host runs. Its first start joins the cluster of the first host, if it is not that host.
    pub fn start(&mut self, host: usize) {
        let first = host == 0;
        if !first && !self.hosts[host].flags.iter().any(|f| f.starts_with("--server=")) {
            let token = self.token(if self.hosts[host].role == Role::Agent { "agent-token" } else { "token" });
            let url = format!("--server=https://{}:6443", self.hosts[0].address);
            self.hosts[host].flags.extend([url, format!("--token={token}")]);
        }
        self.hosts[host].spawn();
    }

    /// The join token, as the first server wrote it.
    pub fn token(&self, name: &str) -> String {
        let path = self.hosts[0].data_dir().join("server").join(name);
        std::fs::read_to_string(path).unwrap().trim().to_owned()
    }

    pub fn wait_ready(&mut self, host: usize) {
        let begin = Instant::now();
        loop {
            self.hosts[host].assert_alive();
            let ready = self.hosts[host].kubeconfig().exists().then(|| self.get(host, "/readyz"));
            match ready {
                Some(Ok((200, _))) => return,
                last if begin.elapsed() > PATIENCE => {
                    panic!("{} is not ready after {:?}: {last:?}", self.hosts[host].name, begin.elapsed())
                }
                _ => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// The administrator's credential: that of any server, they have the same roots.
    pub fn credential(&self) -> Credential {
        let server =
            self.servers().into_iter().find(|s| self.hosts[*s].kubeconfig().exists()).expect("a server has started");
        client::credential(&self.hosts[server].kubeconfig())
    }

    /// One call to a server from its own machine.
    pub fn call(
        &self,
        server: usize,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<(u16, Value), Failure> {
        let host = &self.hosts[server];
        let (credential, address) = (client::credential(&host.kubeconfig()), host.api());
        let (path, body) = (path.to_owned(), body.cloned());
        let work = move || {
            client::block_on(async { Client::new(credential, address).call(method, &path, body.as_ref()).await })
        };
        inside(&host.namespace, work).join().unwrap()
    }

    pub fn get(&self, server: usize, path: &str) -> Result<(u16, Value), Failure> {
        self.call(server, Method::GET, path, None)
    }

    /// Starts a client on a machine: a thread in its network.
    pub fn client<T: Send + 'static, F: Future<Output = T>>(
        &self,
        host: usize,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        inside(&self.hosts[host].namespace, move || client::block_on(work()))
    }

    /// What a server says of the members: their rows of `coracle member list -o json`.
    pub fn members(&self, server: usize) -> Result<Vec<Value>, String> {
        let text = self.hosts[server].coracle(&["member", "list", "-o", "json"])?;
        serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
    }

    /// The server that leads, when all servers that run agree on one that runs.
    pub fn leader(&self) -> Result<usize, String> {
        let mut leaders = Vec::new();
        for server in self.servers().into_iter().filter(|s| self.hosts[*s].runs()) {
            let members = self.members(server)?;
            let leader = members.iter().find(|m| m["leader"] == true).and_then(|m| m["name"].as_str());
            leaders.push(leader.ok_or_else(|| format!("{} knows no leader", self.hosts[server].name))?.to_owned());
        }
        leaders.dedup();
        let [leader] = &leaders[..] else { return Err(format!("servers disagree: {leaders:?}")) };
        let leader = self.hosts.iter().position(|h| h.name == *leader && h.runs());
        leader.ok_or_else(|| "the leader does not run".to_owned())
    }

    pub fn wait_leader(&self) -> usize {
        assert_eventually!(60, "all servers agree on a leader", self.leader())
    }

    /// Parts hosts from others, in both directions.
    pub fn part(&self, some: &[usize], others: &[usize]) {
        for &a in some {
            for &b in others {
                self.cut(a, b);
                self.cut(b, a);
            }
        }
    }

    /// Drops what one host sends to another; not the way back.
    pub fn cut(&self, from: usize, to: usize) {
        self.weather(from, to, Weather { cut: true, ..Weather::default() });
    }

    pub fn weather(&self, from: usize, to: usize, weather: Weather) {
        self.switch.set(self.hosts[from].port, self.hosts[to].port, weather);
    }

    /// Gives a stopped host another address.
    pub fn readdress(&mut self, host: usize, address: Ipv4Addr) {
        let Host { namespace, address: old, .. } = &self.hosts[host];
        ip(&format!("-n {namespace} addr del {old}/24 dev eth0"));
        ip(&format!("-n {namespace} addr add {address}/24 dev eth0"));
        self.hosts[host].address = address;
    }

    /// kubectl by way of a server.
    pub fn kubectl(&self, server: usize, args: &[&str]) -> Result<String, String> {
        let host = &self.hosts[server];
        let mut command = host.command("kubectl");
        command.arg("--kubeconfig").arg(host.kubeconfig()).args(args).env("KUBECACHEDIR", host.dir.join("cache"));
        said(&command.stdin(Stdio::null()).output().unwrap())
    }

    /// kubectl with a file.
    pub fn apply(&self, server: usize, yaml: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), yaml).unwrap();
        self.kubectl(server, &["apply", "-f", &file.path().to_string_lossy()]).unwrap();
    }

    /// A page, as seen from a machine.
    pub fn fetch(&self, host: usize, url: &str) -> Result<String, String> {
        let mut command = self.hosts[host].command("curl");
        said(&command.args(["-sS", "-f", "--max-time", "3", url]).output().unwrap())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in self.hosts.iter().filter(|h| h.role != Role::Client) {
                let log = host.log();
                let tail: Vec<&str> = log.lines().rev().take(25).collect();
                eprintln!("--- {}'s last words\n{}", host.name, tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
            }
        }
        for host in &mut self.hosts {
            if host.data_dir().exists() {
                let _ = Command::new(binary()).arg("uninstall").arg("--data-dir").arg(host.data_dir()).output();
            }
            if let Some(mut child) = host.child.take() {
                let _ = child.kill();
                let _ = child.wait();
            }
            let _ = Command::new("ip").args(["netns", "del", &host.namespace]).status();
        }
    }
}

/// Another address for a host.
pub fn moved(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 80, 0, 100 + u8::try_from(n).unwrap())
}
