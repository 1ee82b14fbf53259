use super::super::*;
use super::*;

/// Golden files live beside this file; `CORACLE_GOLDEN=write` makes them anew, to be reviewed as a diff.
fn golden(name: &str, value: &Value) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/runtime/golden").join(name);
    let text = serde_json::to_string_pretty(value).unwrap() + "\n";
    if std::env::var_os("CORACLE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &text).unwrap();
    }
    let expected: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    assert_eq!(*value, expected, "{name} differs; CORACLE_GOLDEN=write regenerates it");
}

fn made(config: &ContainerConfig, seccomp: Option<&Value>) -> Value {
    let image = ImageConfig {
        env: vec!["PATH=/bin".into(), "KEEP=image".into()],
        entrypoint: vec!["/entry".into()],
        cmd: vec!["default".into()],
        ..ImageConfig::default()
    };
    let user = User { uid: 33, gid: 34, groups: vec![34, 50], home: "/home".into() };
    spec(&SpecInput {
        config,
        image: &image,
        user: &user,
        rootfs: "/run/pod/c/rootfs".into(),
        hostname: "web-1",
        namespaces: "/run/pod/ns".into(),
        pid_target: config.linux.security_context.pid_target.as_ref().map(|_| 4242),
        shm: Some("/run/pod/shm".into()),
        cgroup: "coracle-1/kubepods/pod1/c".into(),
        cgroup_v2: false,
        host_capabilities: CapabilitySet(CapabilitySet::ALL.0 & !(1 << 24)),
        devices: Vec::new(),
        seccomp,
    })
    .unwrap()
}

#[test]
fn an_ordinary_container() {
    golden("ordinary.json", &made(&ContainerConfig::default(), None));
}

#[test]
fn a_debugger_shares_the_process_ids_of_its_target() {
    let mut config = ContainerConfig::default();
    config.linux.security_context.pid_target = Some("target".into());
    let made = made(&config, None);
    let namespaces = made["linux"]["namespaces"].as_array().unwrap();
    let pid: Vec<_> = namespaces.iter().filter(|namespace| namespace["type"] == "pid").collect();
    assert_eq!(pid, [&serde_json::json!({"type": "pid", "path": "/proc/4242/ns/pid"})]);
}

#[test]
fn a_container_with_everything() {
    let config = ContainerConfig {
        command: vec!["/run".into()],
        working_dir: "/work".into(),
        envs: vec![KeyValue { key: "KEEP".into(), value: "pod".into() }],
        tty: true,
        mounts: vec![
            Mount {
                container_path: "/a/inner/".into(),
                host_path: "/v/1".into(),
                readonly: true,
                recursive_read_only: true,
                ..Mount::default()
            },
            Mount {
                container_path: "/a".into(),
                host_path: "/v/2".into(),
                propagation: MountPropagation::HostToContainer,
                ..Mount::default()
            },
            Mount { container_path: "/dev/shm".into(), host_path: "/v/shm".into(), ..Mount::default() },
        ],
        linux: LinuxContainerConfig {
            security_context: LinuxContainerSecurityContext {
                capabilities: Capabilities {
                    add_capabilities: vec!["SYS_TIME".into()],
                    drop_capabilities: vec!["ALL".into()],
                },
                namespace_options: NamespaceOptions { pid: NamespaceMode::Pod, ..NamespaceOptions::default() },
                readonly_rootfs: true,
                no_new_privs: true,
                masked_paths: Some(vec![]),
                ..LinuxContainerSecurityContext::default()
            },
            ..LinuxContainerConfig::default()
        },
        ..ContainerConfig::default()
    };
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ERRNO",
        "args": [{"index": 0, "value": 5, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]}]});
    golden("everything.json", &made(&config, Some(&profile)));
}

#[test]
fn a_privileged_container_of_the_node() {
    let node = NamespaceOptions { network: NamespaceMode::Node, pid: NamespaceMode::Node, ipc: NamespaceMode::Node };
    let config = ContainerConfig {
        linux: LinuxContainerConfig {
            security_context: LinuxContainerSecurityContext {
                privileged: true,
                namespace_options: node,
                ..LinuxContainerSecurityContext::default()
            },
            ..LinuxContainerConfig::default()
        },
        ..ContainerConfig::default()
    };
    golden("privileged.json", &made(&config, None));
}

#[test]
fn words_of_the_command_line() {
    let image = ImageConfig { entrypoint: vec!["e".into()], cmd: vec!["c".into()], ..ImageConfig::default() };
    let list = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    for (command, args, expected) in [
        (&[][..], &[][..], &["e", "c"][..]),
        (&[], &["a"], &["e", "a"]),
        (&["x"], &[], &["x"]),
        (&["x"], &["a"], &["x", "a"]),
    ] {
        let config = ContainerConfig { command: list(command), args: list(args), ..ContainerConfig::default() };
        assert_eq!(arguments(&config, &image).unwrap(), expected);
    }
    let error = arguments(&ContainerConfig::default(), &ImageConfig::default()).unwrap_err();
    assert!(error.to_string().contains("no command specified"));
}
