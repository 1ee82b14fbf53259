//! Seccomp: the `RuntimeDefault` profile, profiles of the node, and filters compiled for exec.
//!
//! The default profile allows what containerd's allows: everything except what can leave a container, and a few
//! calls only with the capability that makes them harmless.

use std::fs;
use std::path::Path;

use libcontainer::oci_spec::runtime::{LinuxSeccomp, LinuxSeccompAction, LinuxSeccompOperator};
use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use serde_json::{Value, json};

use super::capabilities::CapabilitySet;
use super::{RuntimeError, SecurityProfile};

/// Calls that every container may make.
const ALLOWED: &str = "accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod chown chown32 \
    clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep \
    clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1 \
    epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit \
    exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 \
    fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat \
    fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait \
    futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid getegid32 geteuid geteuid32 getgid \
    getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid \
    getresgid32 getresuid getresuid32 getrlimit get_robust_list getrusage getsid getsockname getsockopt \
    get_thread_area gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init \
    inotify_init1 inotify_rm_watch io_cancel ioctl io_destroy io_getevents io_pgetevents io_pgetevents_time64 \
    ioprio_get ioprio_set io_setup io_submit ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self \
    lchown lchown32 lgetxattr link linkat listen listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek \
    lsetxattr lstat lstat64 madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod \
    mknodat mlock mlock2 mlockall mmap mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive \
    mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync \
    munlock munlockall munmap name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open \
    pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv \
    preadv2 prlimit64 process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink \
    readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename \
    renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask \
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo \
    sched_getaffinity sched_getattr sched_getparam sched_get_priority_max sched_get_priority_min sched_getscheduler \
    sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam \
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop semtimedop_time64 send sendfile \
    sendfile64 sendmmsg sendmsg sendto setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 \
    setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 \
    setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address setuid setuid32 setxattr setxattrat \
    shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair \
    splice stat stat64 statfs statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee \
    tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime \
    timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill \
    truncate truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes vfork \
    vmsplice wait4 waitid waitpid write writev process_vm_readv process_vm_writev ptrace";

/// Calls that a capability opens.
const BY_CAPABILITY: [(&str, &str); 12] = [
    ("DAC_READ_SEARCH", "open_by_handle_at"),
    (
        "SYS_ADMIN",
        "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie lsm_get_self_attr \
         lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree perf_event_open quotactl \
         quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare",
    ),
    ("SYS_BOOT", "reboot"),
    ("SYS_CHROOT", "chroot"),
    ("SYS_MODULE", "delete_module init_module finit_module"),
    ("SYS_PACCT", "acct"),
    ("SYS_PTRACE", "kcmp pidfd_getfd process_madvise"),
    ("SYS_RAWIO", "iopl ioperm"),
    ("SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("SYS_TTY_CONFIG", "vhangup"),
    ("SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("SYSLOG", "syslog"),
];

/// Flags of clone(2) that make namespaces; without SYS_ADMIN none may be set.
const CLONE_NAMESPACES: u64 = 0x7e02_0000;

/// `AF_VSOCK` talks to the hypervisor.
const AF_VSOCK: u64 = 40;

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// The profile of a container as the OCI runtime specification writes it; `None` is unconfined.
pub fn profile(
    wanted: &SecurityProfile,
    capabilities: CapabilitySet,
    privileged: bool,
) -> Result<Option<Value>, RuntimeError> {
    match wanted {
        // A privileged container is never confined, as upstream.
        _ if privileged => Ok(None),
        SecurityProfile::Unconfined => Ok(None),
        SecurityProfile::RuntimeDefault => Ok(Some(default_profile(capabilities))),
        SecurityProfile::Localhost(path) => local_profile(path).map(Some),
    }
}

fn local_profile(path: &Path) -> Result<Value, RuntimeError> {
    let wrong = |why: String| RuntimeError::Invalid(format!("cannot load seccomp profile {:?}: {why}", path.display()));
    let text = fs::read(path).map_err(|error| wrong(error.to_string()))?;
    let mut value: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
    // The kubelet's profiles may have docker's extra fields, which are no part of the specification.
    if let Some(object) = value.as_object_mut() {
        object.remove("archMap");
        for rule in object.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(rule) = rule.as_object_mut() {
                for name in ["comment", "includes", "excludes"] {
                    rule.remove(name);
                }
                if let Some(name) = rule.remove("name") {
                    rule.insert("names".to_owned(), json!([name]));
                }
            }
        }
    }
    serde_json::from_value::<LinuxSeccomp>(value.clone()).map_err(|error| wrong(error.to_string()))?;
    Ok(value)
}

/// The `RuntimeDefault` profile for a container with these capabilities.
pub fn default_profile(capabilities: CapabilitySet) -> Value {
    let allow =
        |names: &str| json!({"names": names.split_whitespace().collect::<Vec<_>>(), "action": "SCMP_ACT_ALLOW"});
    let allow_if = |name: &str, args: Value| json!({"names": [name], "action": "SCMP_ACT_ALLOW", "args": args});
    let equals = |index: u32, value: u64| json!([{"index": index, "value": value, "op": "SCMP_CMP_EQ"}]);
    let mut rules = vec![allow(ALLOWED)];
    rules.push(allow_if("socket", json!([{"index": 0, "value": AF_VSOCK, "op": "SCMP_CMP_NE"}])));
    // personality(2): Linux, 32 bits, uname 2.6, both, and the query.
    for value in [0x0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff] {
        rules.push(allow_if("personality", equals(0, value)));
    }
    if cfg!(target_arch = "x86_64") {
        rules.push(allow("arch_prctl modify_ldt"));
    } else if cfg!(target_arch = "aarch64") {
        rules.push(allow("arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush set_tls"));
    }
    for (capability, names) in BY_CAPABILITY {
        if capabilities.contains(capability) {
            rules.push(allow(names));
        }
    }
    if capabilities.contains("BPF") && !capabilities.contains("SYS_ADMIN") {
        rules.push(allow("bpf"));
    }
    if capabilities.contains("PERFMON") && !capabilities.contains("SYS_ADMIN") {
        rules.push(allow("perf_event_open"));
    }
    if !capabilities.contains("SYS_ADMIN") {
        let masked = json!([{"index": 0, "value": CLONE_NAMESPACES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]);
        rules.push(allow_if("clone", masked));
        // Its flags lie in memory that a filter cannot see; C libraries fall back to clone on ENOSYS.
        rules.push(json!({"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": ENOSYS}));
    }
    let architectures = if cfg!(target_arch = "aarch64") {
        json!(["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"])
    } else {
        json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    };
    json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": EPERM,
        "architectures": architectures,
        "syscalls": rules,
    })
}

/// Compiles a profile to the instructions that seccomp(2) loads.
pub fn compile(profile: &Value) -> Result<Vec<u8>, RuntimeError> {
    let wrong = |error: libseccomp::error::SeccompError| {
        RuntimeError::Invalid(format!("cannot compile the seccomp profile: {error}"))
    };
    let profile: LinuxSeccomp = serde_json::from_value(profile.clone())
        .map_err(|error| RuntimeError::Invalid(format!("cannot read the seccomp profile: {error}")))?;
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = ScmpFilterContext::new(default).map_err(wrong)?;
    for name in profile.architectures().iter().flatten() {
        // Architectures other than this machine's family cannot be added; they cannot occur either.
        if let Some(arch) = serde_json::to_value(name).ok().as_ref().and_then(Value::as_str).and_then(architecture) {
            filter.add_arch(arch).map_err(wrong)?;
        }
    }
    for rule in profile.syscalls().iter().flatten() {
        let wanted = action(rule.action(), rule.errno_ret());
        if wanted == default {
            continue;
        }
        let conditions: Vec<ScmpArgCompare> = rule
            .args()
            .iter()
            .flatten()
            .map(|arg| {
                ScmpArgCompare::new(
                    arg.index() as u32,
                    comparison(arg.op(), arg.value()),
                    datum(arg.op(), arg.value(), arg.value_two()),
                )
            })
            .collect();
        let mut indexes: Vec<usize> = rule.args().iter().flatten().map(|arg| arg.index()).collect();
        indexes.sort_unstable();
        let repeated = indexes.windows(2).any(|pair| pair[0] == pair[1]);
        for name in rule.names() {
            // A call that this library does not know cannot be filtered by name; the default action covers it.
            let Ok(call) = ScmpSyscall::from_name(name) else { continue };
            if conditions.is_empty() {
                filter.add_rule(wanted, call).map_err(wrong)?;
            } else if repeated {
                for condition in &conditions {
                    filter.add_rule_conditional(wanted, call, std::slice::from_ref(condition)).map_err(wrong)?;
                }
            } else {
                filter.add_rule_conditional(wanted, call, &conditions).map_err(wrong)?;
            }
        }
    }
    // Through a descriptor: exporting to memory needs a newer library than Debian 12's.
    let (mut reader, writer) = std::io::pipe()
        .map_err(|source| RuntimeError::Io { what: "compile the seccomp profile".to_owned(), source })?;
    let collector = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut bytes).map(|_| bytes)
    });
    let exported = filter.export_bpf(&writer);
    drop(writer);
    let bytes = collector.join().unwrap_or_else(|_| Err(std::io::Error::other("the reader panicked")));
    exported.map_err(wrong)?;
    bytes.map_err(|source| RuntimeError::Io { what: "compile the seccomp profile".to_owned(), source })
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => ScmpAction::KillThread,
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno(errno.unwrap_or(EPERM) as i32),
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno.unwrap_or(EPERM) as u16),
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        // Nobody listens for notifications of a command; it would hang for ever.
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Errno(ENOSYS as i32),
    }
}

/// What the argument, masked if so asked, is compared with.
fn datum(operator: LinuxSeccompOperator, value: u64, second: Option<u64>) -> u64 {
    if operator == LinuxSeccompOperator::ScmpCmpMaskedEq { second.unwrap_or(0) } else { value }
}

/// The profile as libcontainer 0.7 has to be told it: it takes the second value of a masked comparison for the mask,
/// where the specification (and runc) has the mask first.
pub fn for_libcontainer(profile: &Value) -> Value {
    let mut profile = profile.clone();
    let rules = profile.get_mut("syscalls").and_then(Value::as_array_mut);
    for arg in rules.into_iter().flatten().filter_map(|rule| rule.get_mut("args")?.as_array_mut()).flatten() {
        if arg["op"] == "SCMP_CMP_MASKED_EQ" {
            let (mask, datum) = (arg["value"].clone(), arg.get("valueTwo").cloned().unwrap_or(json!(0)));
            arg["value"] = datum;
            arg["valueTwo"] = mask;
        }
    }
    profile
}

fn comparison(operator: LinuxSeccompOperator, value: u64) -> ScmpCompareOp {
    match operator {
        LinuxSeccompOperator::ScmpCmpNe => ScmpCompareOp::NotEqual,
        LinuxSeccompOperator::ScmpCmpLt => ScmpCompareOp::Less,
        LinuxSeccompOperator::ScmpCmpLe => ScmpCompareOp::LessOrEqual,
        LinuxSeccompOperator::ScmpCmpEq => ScmpCompareOp::Equal,
        LinuxSeccompOperator::ScmpCmpGe => ScmpCompareOp::GreaterEqual,
        LinuxSeccompOperator::ScmpCmpGt => ScmpCompareOp::Greater,
        // The first value is the mask (seccomp_rule_add(3), runtime-spec).
        LinuxSeccompOperator::ScmpCmpMaskedEq => ScmpCompareOp::MaskedEqual(value),
    }
}

fn architecture(name: &str) -> Option<ScmpArch> {
    Some(match name {
        "SCMP_ARCH_X86_64" => ScmpArch::X8664,
        "SCMP_ARCH_X86" => ScmpArch::X86,
        "SCMP_ARCH_X32" => ScmpArch::X32,
        "SCMP_ARCH_AARCH64" => ScmpArch::Aarch64,
        "SCMP_ARCH_ARM" => ScmpArch::Arm,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_profile_compiles_for_any_capabilities() {
        for capabilities in [CapabilitySet(0), CapabilitySet::ALL] {
            let filter = compile(&default_profile(capabilities)).unwrap();
            assert!(filter.len() > 800 && filter.len().is_multiple_of(8), "{}", filter.len());
        }
    }

    #[test]
    fn capabilities_open_calls() {
        let names = |capabilities| default_profile(capabilities)["syscalls"].to_string();
        assert!(!names(CapabilitySet(0)).contains("\"mount\""));
        assert!(names(CapabilitySet(0)).contains("\"clone3\""));
        assert!(names(CapabilitySet::ALL).contains("\"mount\""));
    }

    #[test]
    fn local_profiles_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            profile(&SecurityProfile::Localhost(path.clone()), CapabilitySet(0), false)
        };
        assert!(read("{").is_err());
        assert!(read(r#"{"defaultAction": "SCMP_ACT_NOPE"}"#).is_err());
        let docker = r#"{"defaultAction":"SCMP_ACT_ALLOW","archMap":[],"syscalls":[{"name":"mkdir","action":"SCMP_ACT_ERRNO","args":[],"comment":""}]}"#;
        let value = read(docker).unwrap().unwrap();
        compile(&value).unwrap();
        assert_eq!(profile(&SecurityProfile::Localhost(path), CapabilitySet(0), true).unwrap(), None);
    }
}
