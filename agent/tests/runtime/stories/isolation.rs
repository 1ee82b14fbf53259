//! What a container may see and do.

use coracle_agent::runtime::*;

use crate::harness::Node;

fn context() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext::default()
}

pub async fn users_and_groups_come_from_the_image() {
    let node = Node::new().await;
    let show = "id -u; id -g; id -G; echo $HOME";
    assert_eq!(node.output(show, context()).await, "0\n0\n0\n/root\n");
    let web = LinuxContainerSecurityContext { run_as_user: Some(33), supplemental_groups: vec![1234], ..context() };
    assert_eq!(node.output(show, web.clone()).await, "33\n34\n34 50 1234\n/home\n");
    let named = LinuxContainerSecurityContext { run_as_username: "web".into(), run_as_group: Some(7), ..context() };
    assert_eq!(node.output(show, named).await, "33\n7\n7 50\n/home\n");
    // Its own streams can be opened by name, and commands are the same user.
    assert_eq!(node.output("echo again > /dev/stdout", web.clone()).await, "again\n");
    let mut config = node.script("sleep 1000");
    config.linux.security_context = web;
    let (sandbox, id) = node.run(&node.pod(), &config).await;
    assert_eq!(node.sh(&id, show).await.1, "33\n34\n34 50 1234\n/home\n");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    config.linux.security_context.run_as_user = None;
    config.linux.security_context.run_as_username = "ghost".into();
    let sandbox = node.runtime.run_pod_sandbox(&node.pod()).await.unwrap();
    let error = node.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert!(error.to_string().contains("ghost"), "{error}");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

pub async fn environment_and_working_directory_are_complete() {
    let node = Node::new().await;
    let mut config = node.script("pwd; env | sort; grep SigIgn /proc/self/status; grep SigBlk /proc/self/status");
    config.working_dir = "/not/there/yet".into();
    config.envs = vec![
        KeyValue { key: "FROM_IMAGE".into(), value: "no".into() },
        KeyValue { key: "ODD".into(), value: "a=b c".into() },
    ];
    let (log, _) = node.run_to_end(config).await;
    for line in [
        "/not/there/yet",
        "FROM_IMAGE=no",
        "ODD=a=b c",
        "HOME=/root",
        "PATH=/bin",
        "HOSTNAME=my-pod",
        "SigIgn:\t0000000000000000",
        "SigBlk:\t0000000000000000",
    ] {
        assert!(log.lines().any(|have| have == line), "{line} in {log}");
    }
    let (sandbox, id) = node.run(&node.pod(), &node.script("sleep 1000")).await;
    // Not through a shell, which has its own mind about SIGQUIT.
    let command = ["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"].map(str::to_owned);
    let signals = node.runtime.exec_sync(&id, &command, None).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&signals.stdout), "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

pub async fn capabilities_and_filters_hold_in_exec_too() {
    let node = Node::new().await;
    let show = "grep -E 'Cap(Prm|Eff|Bnd|Amb|Inh)|NoNewPrivs|Seccomp:' /proc/self/status | tr -d '\\t\\n'";
    let cases = [
        (
            context(),
            "CapInh:0000000000000000CapPrm:00000000a80425fbCapEff:00000000a80425fbCapBnd:00000000a80425fbCapAmb:0000000000000000NoNewPrivs:0Seccomp:0",
        ),
        (
            LinuxContainerSecurityContext {
                capabilities: Capabilities {
                    add_capabilities: vec!["NET_ADMIN".into()],
                    drop_capabilities: vec!["ALL".into()],
                },
                seccomp: SecurityProfile::RuntimeDefault,
                ..context()
            },
            "CapInh:0000000000000000CapPrm:0000000000001000CapEff:0000000000001000CapBnd:0000000000001000CapAmb:0000000000000000NoNewPrivs:0Seccomp:2",
        ),
        (
            LinuxContainerSecurityContext {
                run_as_user: Some(1000),
                no_new_privs: true,
                seccomp: SecurityProfile::RuntimeDefault,
                ..context()
            },
            "CapInh:0000000000000000CapPrm:0000000000000000CapEff:0000000000000000CapBnd:00000000a80425fbCapAmb:0000000000000000NoNewPrivs:1Seccomp:2",
        ),
    ];
    for (security, expected) in cases {
        let mut config = node.script(&format!("{show}; echo; sleep 1000"));
        config.linux.security_context = security;
        let (sandbox, id) = node.run(&node.pod(), &config).await;
        assert_eq!(node.sh(&id, show).await.1, expected, "exec");
        let status = node.runtime.container_status(&id).await.unwrap();
        assert_eq!(node.log(&status).trim(), expected, "first process");
        node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    }
}

pub async fn the_default_seccomp_profile_lets_programs_work() {
    let node = Node::new().await;
    let security = LinuxContainerSecurityContext { seccomp: SecurityProfile::RuntimeDefault, ..context() };
    // Forks, pipes and files work; new namespaces and mounts do not.
    let script = "(echo forked | cat); touch /tmp/x && rm /tmp/x; unshare -m true 2>/dev/null || echo refused; \
                  mount -t tmpfs none /tmp 2>/dev/null || echo refused";
    assert_eq!(node.output(script, security.clone()).await, "forked\nrefused\nrefused\n");
    // Only the filter stands between root with SYS_ADMIN and a call.
    let folder = node.folder.path().join("profile.json");
    std::fs::write(
        &folder,
        r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO"}]}"#,
    )
    .unwrap();
    let local = LinuxContainerSecurityContext { seccomp: SecurityProfile::Localhost(folder), ..context() };
    assert_eq!(node.output("mkdir /tmp/d 2>/dev/null || echo refused", local).await, "refused\n");
    let absent =
        LinuxContainerSecurityContext { seccomp: SecurityProfile::Localhost("/nope.json".into()), ..context() };
    let mut config = node.script("true");
    config.linux.security_context = absent;
    let sandbox = node.runtime.run_pod_sandbox(&node.pod()).await.unwrap();
    let error = node.runtime.create_container(&sandbox, &config).await.unwrap_err();
    assert!(error.to_string().contains("cannot load seccomp profile \"/nope.json\""), "{error}");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
}

pub async fn read_only_masked_and_privileged() {
    let node = Node::new().await;
    let try_write = "touch /x 2>/dev/null && echo wrote; touch /dev/shm/y && echo shm; head -c1 /proc/timer_list | wc -c; \
                     echo 1 2>/dev/null > /proc/sys/kernel/sysrq && echo sysctl; ls /sys/firmware | wc -l";
    assert_eq!(node.output(try_write, context()).await, "wrote\nshm\n0\n0\n");
    let fixed = LinuxContainerSecurityContext { readonly_rootfs: true, ..context() };
    assert_eq!(node.output(try_write, fixed).await, "shm\n0\n0\n");
    let unmasked =
        LinuxContainerSecurityContext { masked_paths: Some(vec![]), readonly_paths: Some(vec![]), ..context() };
    assert!(
        node.output("ls -ld /proc/acpi /proc/timer_list; head -c1 /proc/timer_list | wc -c", unmasked)
            .await
            .ends_with("1\n")
    );
    let privileged = LinuxContainerSecurityContext { privileged: true, ..context() };
    let text = node.output("mkdir /m; mount -t tmpfs none /m && echo mounted; ls /dev | grep -c .", privileged).await;
    let devices: usize = text.lines().last().unwrap().parse().unwrap();
    assert!(text.starts_with("mounted\n") && devices > 15, "{text}");
}

pub async fn volumes_and_devices() {
    let node = Node::new().await;
    let volume = node.folder.path().join("volume");
    std::fs::create_dir_all(volume.join("inner")).unwrap();
    std::fs::write(volume.join("file"), "content\n").unwrap();
    let mut config = node.script(
        "cat /data/file /one; touch /data/new && echo rw; touch /fixed/new 2>/dev/null || echo ro; \
         test -c /dev/mine && echo device; head -c 3 /dev/mine | wc -c; ls /made",
    );
    let mount = |container: &str, host: &std::path::Path, readonly| Mount {
        container_path: container.into(),
        host_path: host.to_owned(),
        readonly,
        ..Default::default()
    };
    config.mounts = vec![
        mount("/fixed/", &volume, true),
        mount("/data", &volume, false),
        mount("/one", &volume.join("file"), false),
        mount("/made", &volume.join("made/by/us"), false),
    ];
    config.devices =
        vec![Device { container_path: "/dev/mine".into(), host_path: "/dev/zero".into(), permissions: "r".into() }];
    let (log, _) = node.run_to_end(config).await;
    assert_eq!(log, "content\ncontent\nrw\nro\ndevice\n3\n");
    assert!(volume.join("new").exists() && volume.join("made/by/us").is_dir());
    // A mount made on the node later is seen where the volume asks for it.
    let shared = node.folder.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let none: Option<&str> = None;
    let flags = nix::mount::MsFlags::MS_BIND;
    nix::mount::mount(Some(&shared), &shared, none, flags, none).unwrap();
    nix::mount::mount(none, &shared, none, nix::mount::MsFlags::MS_SHARED, none).unwrap();
    std::fs::create_dir(shared.join("sub")).unwrap();
    for (propagation, seen) in [(MountPropagation::HostToContainer, "late\n"), (MountPropagation::Private, "")] {
        let mut config = node.script("sleep 1000");
        config.mounts = vec![Mount { propagation, ..mount("/shared", &shared, false) }];
        let (sandbox, id) = node.run(&node.pod(), &config).await;
        nix::mount::mount(Some("none"), &shared.join("sub"), Some("tmpfs"), nix::mount::MsFlags::empty(), none)
            .unwrap();
        std::fs::write(shared.join("sub/late"), "").unwrap();
        assert_eq!(node.sh(&id, "ls /shared/sub").await.1, seen, "{propagation:?}");
        nix::mount::umount(&shared.join("sub")).unwrap();
        node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    }
    // And the other way round.
    let mut config = node.script("mount -t tmpfs none /shared/sub && touch /shared/sub/inside && sleep 1000");
    config.linux.security_context.privileged = true;
    config.mounts = vec![Mount { propagation: MountPropagation::Bidirectional, ..mount("/shared", &shared, false) }];
    let (sandbox, id) = node.run(&node.pod(), &config).await;
    node.sh(&id, "until test -e /shared/sub/inside; do sleep 0.05; done").await;
    assert!(shared.join("sub/inside").exists());
    nix::mount::umount(&shared.join("sub")).unwrap();
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    nix::mount::umount(&shared).unwrap();
}

pub async fn namespaces_are_shared_as_asked() {
    let node = Node::new().await;
    let own = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().to_string_lossy().into_owned();
    let show = "for n in net ipc uts pid mnt; do readlink /proc/self/ns/$n; done";
    let script = format!("{show}; sleep 1000");
    let of = |log: &str| log.lines().map(str::to_owned).collect::<Vec<_>>();
    // Two containers of one pod: network, IPC and hostname together, processes apart.
    let (sandbox, first) = node.run(&node.pod(), &node.script(&script)).await;
    let second = node.runtime.create_container(&sandbox, &node.script(&script)).await.unwrap();
    node.runtime.start_container(&second).await.unwrap();
    let (a, b) = (of(&node.sh(&first, show).await.1), of(&node.sh(&second, show).await.1));
    assert_eq!(a[..3], b[..3]);
    assert!(a[3] != b[3] && a[4] != b[4]);
    assert!(a[0] != own("net") && a[3] != own("pid"));
    assert_eq!(
        node.sh(&first, "cat /sys/class/net/lo/operstate; ls /sys/class/net").await.1.lines().last(),
        Some("lo")
    );
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    // One process-id namespace for the pod, with a reaper for process 1.
    let mut pod = node.pod();
    pod.linux.namespace_options.pid = NamespaceMode::Pod;
    let mut config = node.script("sleep 1000 & echo child; exit 0");
    config.linux.security_context.namespace_options = pod.linux.namespace_options;
    let (sandbox, first) = node.run(&pod, &config).await;
    node.wait(&first, ContainerState::Exited).await;
    config.command = ["sh", "-c", "sleep 1000"].map(str::to_owned).to_vec();
    let second = node.runtime.create_container(&sandbox, &config).await.unwrap();
    node.runtime.start_container(&second).await.unwrap();
    assert_eq!(node.sh(&second, "cat /proc/1/cmdline | tr -d '\\0'").await.1, "/pause");
    assert_eq!(node.count(&second, "sleep 1000").await, 1, "what the first left behind went with it");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    // The node's own.
    let mut pod = node.pod();
    let host = NamespaceOptions { network: NamespaceMode::Node, pid: NamespaceMode::Node, ipc: NamespaceMode::Node };
    pod.linux.namespace_options = host;
    let mut config = node.script(&script);
    config.linux.security_context.namespace_options = host;
    let (sandbox, id) = node.run(&pod, &config).await;
    assert_eq!(of(&node.sh(&id, show).await.1)[..4], [own("net"), own("ipc"), own("uts"), own("pid")]);
    assert!(node.network.attached.lock().is_empty());
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    // Sysctls of the pod's namespaces, and of no others.
    let mut pod = node.pod();
    pod.linux.sysctls = [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "80")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
    let (sandbox, id) = node.run(&pod, &node.script("sleep 1000")).await;
    let read = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start";
    assert_eq!(node.sh(&id, read).await.1, "1\n80\n");
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    pod.linux.sysctls = [("kernel.panic".to_owned(), "1".to_owned())].into();
    assert!(node.runtime.run_pod_sandbox(&pod).await.unwrap_err().to_string().contains("not namespaced"));
}

pub async fn limits_are_in_the_cgroup() {
    let node = Node::new().await;
    let mut pod = node.pod();
    pod.linux.resources.memory_limit_in_bytes = Some(512 << 20);
    let mut config = node.script("sleep 1000");
    config.linux.resources = LinuxContainerResources {
        memory_limit_in_bytes: Some(64 << 20),
        cpu_shares: Some(512),
        cpu_quota: Some(20_000),
        cpu_period: Some(100_000),
        pids_limit: Some(100),
        oom_score_adj: Some(-998),
        ..Default::default()
    };
    let (sandbox, id) = node.run(&pod, &config).await;
    let status = node.runtime.container_status(&id).await.unwrap();
    let leaf = node.cgroups().into_iter().find(|path| path.ends_with(&id) && path.to_string_lossy().contains("memory"));
    let v1 = leaf.as_ref().map(|path| std::fs::read_to_string(path.join("memory.limit_in_bytes")).unwrap());
    if let Some(limit) = v1 {
        assert_eq!(limit.trim(), (64 << 20).to_string());
        let cpu =
            node.cgroups().into_iter().find(|path| path.ends_with(&id) && path.join("cpu.shares").exists()).unwrap();
        assert_eq!(std::fs::read_to_string(cpu.join("cpu.shares")).unwrap().trim(), "512");
        assert_eq!(std::fs::read_to_string(cpu.join("cpu.cfs_quota_us")).unwrap().trim(), "20000");
    }
    // Where the host forbids it, the nearest value; never a failure.
    let score: i32 = std::fs::read_to_string(format!("/proc/{}/oom_score_adj", status.pid.unwrap()))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!((-998..=0).contains(&score), "{score}");
    let more =
        LinuxContainerResources { memory_limit_in_bytes: Some(128 << 20), cpu_quota: Some(-1), ..Default::default() };
    node.runtime.update_container_resources(&id, &more).await.unwrap();
    let status = node.runtime.container_status(&id).await.unwrap();
    assert_eq!((status.resources.memory_limit_in_bytes, status.resources.cpu_shares), (Some(128 << 20), Some(512)));
    node.sh(&id, "dd if=/dev/zero of=/tmp/f bs=1M count=3 2>/dev/null").await;
    let stats = node.runtime.container_stats(&id).await.unwrap();
    assert_eq!(stats.usage.memory_limit_bytes, Some(128 << 20));
    assert!(
        stats.usage.memory_usage_bytes > 0 && !stats.usage.cpu.is_zero() && stats.usage.process_count == 1,
        "{stats:?}"
    );
    assert!(stats.writable_layer.used_bytes >= 3 << 20, "{stats:?}");
    let pods = node.runtime.list_pod_sandbox_stats(&Default::default()).await.unwrap();
    assert_eq!((pods.len(), pods[0].containers.len(), pods[0].usage.memory_limit_bytes), (1, 1, Some(512 << 20)));
    node.runtime.remove_pod_sandbox(&sandbox).await.unwrap();
    let mut foreign = node.pod();
    foreign.linux.cgroup_parent = "../somebody".into();
    assert!(node.runtime.run_pod_sandbox(&foreign).await.is_err());
}
