//! A node in a folder: image store, network that only hands out addresses, runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use coracle_agent::image::ImageStore;
use coracle_agent::net::{NetworkError, PodAddresses, PodNetwork, PodNetworkRequest};
use coracle_agent::runtime::*;
use futures::future::BoxFuture;
use parking_lot::Mutex;

pub type Story = (&'static str, fn() -> Pin<Box<dyn Future<Output = ()>>>);

/// Runs the stories one after the other; the number of failed ones is the exit code.
pub fn run(stories: &[Story], wanted: Option<&str>) -> i32 {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the runtime's tests need root: skipped");
        return 0;
    }
    // Everything that the tests do with networks stays in here.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let (mut passed, mut failed) = (0, 0);
    for (name, story) in stories.iter().filter(|(name, _)| wanted.is_none_or(|wanted| name.contains(wanted))) {
        let started = Instant::now();
        let outcome = std::panic::catch_unwind(|| {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime
                .block_on(async { tokio::time::timeout(Duration::from_secs(120), story()).await.expect("too slow") });
        });
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        passed += i32::from(outcome.is_ok());
        failed += i32::from(outcome.is_err());
        println!("test {name} ... {word} ({} ms)", started.elapsed().as_millis());
    }
    println!("{passed} passed, {failed} failed");
    failed
}

/// Builds the shim's programs once, as `src/build.rs` of the server does.
fn program(name: &str) -> &'static [u8] {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("shim-test");
    static BUILT: std::sync::Once = std::sync::Once::new();
    BUILT.call_once(|| {
        let status = Command::new(env!("CARGO"))
            .args(["build", "-q", "-p", "coracle-shim", "--bins", "--profile", "shim", "--target-dir"])
            .arg(&target)
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .status();
        assert!(status.unwrap().success());
    });
    let triple =
        std::fs::read_dir(&target).unwrap().flatten().find(|entry| entry.path().join("shim").is_dir()).unwrap();
    Box::leak(std::fs::read(triple.path().join("shim").join(name)).unwrap().into_boxed_slice())
}

#[derive(Default)]
pub struct FakeNetwork {
    pub attached: Mutex<BTreeMap<String, PathBuf>>,
    next: AtomicU8,
}

impl PodNetwork for FakeNetwork {
    fn attach<'a>(&'a self, request: &'a PodNetworkRequest) -> BoxFuture<'a, Result<PodAddresses, NetworkError>> {
        assert!(request.netns.exists());
        self.attached.lock().insert(request.uid.clone(), request.netns.clone());
        let ip = IpAddr::from([10, 42, 0, self.next.fetch_add(1, Ordering::Relaxed) + 2]);
        Box::pin(std::future::ready(Ok(PodAddresses { ips: vec![ip] })))
    }

    fn detach<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), NetworkError>> {
        self.attached.lock().remove(uid);
        Box::pin(std::future::ready(Ok(())))
    }

    fn retain<'a>(&'a self, _: &'a BTreeSet<String>) -> BoxFuture<'a, Result<(), NetworkError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A node; everything of it goes when it is dropped.
pub struct Node {
    pub folder: tempfile::TempDir,
    pub name: String,
    pub runtime: Embedded,
    pub images: Arc<ImageStore>,
    pub network: Arc<FakeNetwork>,
}

impl Node {
    pub async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let name = format!("coracle-test-{:08x}", rand::random::<u32>());
        let images = Arc::new(ImageStore::open(&folder.path().join("agent/images-store"), true).unwrap());
        images.add_builtin(program("coracle-hello")).unwrap();
        let archive = folder.path().join("busybox.tar");
        std::fs::write(&archive, busybox()).unwrap();
        images.import(&archive).unwrap();
        let network = Arc::new(FakeNetwork::default());
        let runtime = start(folder.path(), &name, &images, &network).await;
        Self { folder, name, runtime, images, network }
    }

    /// What a kill -9 of the agent and a new start amount to: the old one's connections are cut, nothing is told.
    pub async fn restart(&mut self) {
        self.runtime = start(self.folder.path(), &self.name, &self.images, &self.network).await;
    }

    pub fn run_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    pub fn image(&self, name: &str) -> String {
        self.images.find(name).unwrap().unwrap().id
    }

    pub fn pod(&self) -> PodSandboxConfig {
        let uid = format!("{:08x}", rand::random::<u32>());
        PodSandboxConfig {
            metadata: PodSandboxMetadata {
                name: "pod".into(),
                uid: uid.clone(),
                namespace: "default".into(),
                attempt: 0,
            },
            hostname: "my-pod".into(),
            log_directory: self.folder.path().join("logs").join(&uid),
            linux: LinuxPodSandboxConfig {
                cgroup_parent: format!("{}/kubepods/burstable/pod{uid}", self.name),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    /// A container of the busybox image that runs a shell script.
    pub fn script(&self, text: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: ContainerMetadata { name: "main".into(), attempt: 0 },
            image: self.image("busybox"),
            command: vec!["sh".into(), "-c".into(), text.into()],
            log_path: "main/0.log".into(),
            ..Default::default()
        }
    }

    /// Runs a sandbox with one container in it; their ids.
    pub async fn run(&self, pod: &PodSandboxConfig, container: &ContainerConfig) -> (String, String) {
        let sandbox = self.runtime.run_pod_sandbox(pod).await.unwrap();
        let id = self.runtime.create_container(&sandbox, container).await.unwrap();
        self.runtime.start_container(&id).await.unwrap();
        (sandbox, id)
    }

    /// Runs a script to its end and answers its log's texts and the container's last status.
    pub async fn run_to_end(&self, container: ContainerConfig) -> (String, ContainerStatus) {
        let pod = self.pod();
        let (sandbox, id) = self.run(&pod, &container).await;
        let status = self.wait(&id, ContainerState::Exited).await;
        let log = self.log(&status);
        self.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
        (log, status)
    }

    /// Output of a script under a security context.
    pub async fn output(&self, script: &str, context: LinuxContainerSecurityContext) -> String {
        let mut config = self.script(script);
        config.linux.security_context = context;
        let (log, status) = self.run_to_end(config).await;
        assert_eq!(status.exit_code, 0, "{log} {status:?}");
        log
    }

    pub async fn wait(&self, id: &str, state: ContainerState) -> ContainerStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.runtime.container_status(id).await.unwrap();
            if status.state == state {
                return status;
            }
            assert!(Instant::now() < deadline, "{status:?} instead of {state:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Texts of a container's log without times and streams.
    pub fn log(&self, status: &ContainerStatus) -> String {
        let text = std::fs::read_to_string(&status.log_path).unwrap_or_default();
        text.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap_or("").to_owned() + "\n").collect()
    }

    pub async fn sh(&self, id: &str, script: &str) -> (i32, String) {
        let command = ["sh", "-c", script].map(str::to_owned);
        let answer = self.runtime.exec_sync(id, &command, None).await.unwrap();
        (answer.exit_code, String::from_utf8_lossy(&[answer.stdout, answer.stderr].concat()).into_owned())
    }

    /// How many processes that the container sees have exactly this command line.
    pub async fn count(&self, id: &str, command: &str) -> usize {
        let script = "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done 2>/dev/null";
        self.sh(id, script).await.1.lines().filter(|line| line.trim() == command).count()
    }

    pub fn mounts(&self) -> usize {
        let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let folder = self.folder.path().to_string_lossy().into_owned();
        table.lines().filter(|line| line.contains(&folder)).count()
    }

    /// Cgroups of this node that exist, in any hierarchy.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mounts = std::iter::once(PathBuf::from("/sys/fs/cgroup"))
            .chain(std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path()));
        for mount in mounts {
            walk(&mount.join(&self.name), &mut found);
        }
        found
    }
}

fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
    if folder.is_dir() {
        found.push(folder.to_owned());
        for entry in std::fs::read_dir(folder).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
            walk(&entry.path(), found);
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        purge(&self.run_dir(), &self.name);
        let left = self.cgroups();
        if !std::thread::panicking() {
            assert!(left.is_empty(), "cgroups left: {left:?}");
            assert_eq!(self.mounts(), 0, "mounts left");
        }
    }
}

async fn start(folder: &Path, name: &str, images: &Arc<ImageStore>, network: &Arc<FakeNetwork>) -> Embedded {
    let options = RuntimeOptions {
        run_dir: folder.join("run"),
        agent_dir: folder.join("agent"),
        cgroup: name.to_owned(),
        shim: program("coracle-shim"),
        log_max_bytes: 10 << 20,
        log_max_files: 5,
    };
    Embedded::start(options, Arc::clone(images), Arc::clone(network) as Arc<dyn PodNetwork>).await.unwrap()
}

/// A docker archive with the machine's static busybox in it.
fn busybox() -> Vec<u8> {
    let program = std::fs::read("/bin/busybox").expect("the tests need the package busybox-static");
    let mut layer = tar::Builder::new(Vec::new());
    let mut add = |kind, path: &str, mode, link: &str, data: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        if link.is_empty() {
            layer.append_data(&mut header, path, data).unwrap();
        } else {
            layer.append_link(&mut header, path, link).unwrap();
        }
    };
    use tar::EntryType::{Directory, Link, Regular};
    for (folder, mode) in [("bin", 0o755), ("etc", 0o755), ("tmp", 0o1777), ("home", 0o755)] {
        add(Directory, folder, mode, "", b"");
    }
    add(Regular, "etc/passwd", 0o644, "", b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/home:/bin/sh\n");
    add(Regular, "etc/group", 0o644, "", b"root:x:0:\nweb:x:34:\nextra:x:50:web\n");
    add(Regular, "etc/plain", 0o644, "", b"no program");
    add(Regular, "bin/busybox", 0o4755, "", &program);
    let list = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for name in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
        add(Link, &format!("bin/{name}"), 0o755, "bin/busybox", b"");
    }
    let layer = layer.into_inner().unwrap();
    let id = coracle_agent::image::archive::digest_of(&layer);
    let config = format!(
        r#"{{"architecture":"{}","config":{{"Env":["PATH=/bin","FROM_IMAGE=yes"],"Cmd":["sh"]}},"rootfs":{{"type":"layers","diff_ids":["{id}"]}}}}"#,
        coracle_agent::image::archive::architecture()
    );
    let manifest = r#"[{"Config":"c.json","RepoTags":["busybox:latest"],"Layers":["l.tar"]}]"#;
    let mut tar = tar::Builder::new(Vec::new());
    for (path, data) in [("manifest.json", manifest.as_bytes()), ("c.json", config.as_bytes()), ("l.tar", &layer)] {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, path, data).unwrap();
    }
    tar.into_inner().unwrap()
}
