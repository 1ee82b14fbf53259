//! `coracle check-config`: what the kernel must have, and the remedy for what it lacks.

use std::path::Path;
use std::process::ExitCode;

/// One requirement: how to see that it is there, and what to do when it is not.
struct Requirement {
    name: &'static str,
    met: fn() -> bool,
    remedy: &'static str,
    /// Without an optional one some features are refused, the rest works.
    optional: bool,
}

const REQUIREMENTS: &[Requirement] = &[
    Requirement { name: "root", met: || nix::unistd::geteuid().is_root(), remedy: "run it as root", optional: false },
    Requirement {
        name: "kernel 5.10 or newer",
        met: || kernel_version().is_none_or(|v| v >= (5, 10)),
        remedy: "install a newer kernel (Debian 11 and later have one)",
        optional: false,
    },
    Requirement { name: "network namespaces", met: || namespace("net"), remedy: "CONFIG_NET_NS", optional: false },
    Requirement { name: "mount namespaces", met: || namespace("mnt"), remedy: "CONFIG_NAMESPACES", optional: false },
    Requirement { name: "pid namespaces", met: || namespace("pid"), remedy: "CONFIG_PID_NS", optional: false },
    Requirement { name: "ipc namespaces", met: || namespace("ipc"), remedy: "CONFIG_IPC_NS", optional: false },
    Requirement { name: "uts namespaces", met: || namespace("uts"), remedy: "CONFIG_UTS_NS", optional: false },
    Requirement {
        name: "overlayfs",
        met: || filesystem("overlay"),
        remedy: "modprobe overlay, or CONFIG_OVERLAY_FS",
        optional: false,
    },
    Requirement {
        name: "cgroup: cpu",
        met: || cgroup("cpu"),
        remedy: "CONFIG_CGROUP_SCHED; remove cgroup_disable=cpu from the kernel's command line",
        optional: false,
    },
    Requirement {
        name: "cgroup: memory",
        met: || cgroup("memory"),
        remedy: "add cgroup_enable=memory to the kernel's command line (on a Raspberry Pi: /boot/firmware/cmdline.txt) and reboot",
        optional: false,
    },
    Requirement { name: "cgroup: pids", met: || cgroup("pids"), remedy: "CONFIG_CGROUP_PIDS", optional: false },
    Requirement { name: "cgroup: cpuset", met: || cgroup("cpuset"), remedy: "CONFIG_CPUSETS", optional: true },
    Requirement {
        name: "seccomp",
        met: || Path::new("/proc/sys/kernel/seccomp").exists(),
        remedy: "CONFIG_SECCOMP_FILTER",
        optional: false,
    },
    Requirement { name: "tmpfs", met: || filesystem("tmpfs"), remedy: "CONFIG_TMPFS", optional: false },
    Requirement {
        name: "IPv4 forwarding can be set",
        met: || Path::new("/proc/sys/net/ipv4/ip_forward").exists(),
        remedy: "CONFIG_INET and a writable /proc/sys",
        optional: false,
    },
    Requirement { name: "mqueue", met: || filesystem("mqueue"), remedy: "CONFIG_POSIX_MQUEUE", optional: true },
];

/// Prints a line for each requirement; fails when one that is not optional is missing.
pub fn run() -> anyhow::Result<ExitCode> {
    let mut missing = 0;
    let rows = REQUIREMENTS.iter().map(|r| (r.name.to_owned(), (r.met)(), r.remedy.to_owned(), r.optional));
    let network = coracle_agent::net::check::facts().into_iter().map(|f| {
        let remedy =
            f.lack.iter().fold(f.remedy.to_owned(), |remedy, lack| format!("{remedy} (the kernel says: {lack})"));
        (f.name.to_owned(), f.lack.is_none(), remedy, f.optional)
    });
    for (name, met, remedy, optional) in rows.chain(network) {
        match (met, optional) {
            (true, _) => println!("ok       {name}"),
            (false, true) => println!("lacking  {name} (optional): {remedy}"),
            (false, false) => {
                missing += 1;
                println!("MISSING  {name}: {remedy}");
            }
        }
    }
    if missing == 0 {
        println!("This machine can run Coracle.");
        return Ok(ExitCode::SUCCESS);
    }
    println!("{missing} missing: Coracle cannot run here until that is mended.");
    Ok(ExitCode::FAILURE)
}

fn kernel_version() -> Option<(u32, u32)> {
    let uname = nix::sys::utsname::uname().ok()?;
    let mut parts = uname.release().to_str()?.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn namespace(kind: &str) -> bool {
    Path::new("/proc/self/ns").join(kind).exists()
}

/// Whether the kernel has the filesystem now. One that is a module counts once it can be loaded.
fn filesystem(name: &str) -> bool {
    let listed = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    listed.lines().any(|line| line.split_whitespace().last() == Some(name)) || module(name)
}

fn module(name: &str) -> bool {
    let Ok(uname) = nix::sys::utsname::uname() else { return false };
    let dir = Path::new("/lib/modules").join(uname.release());
    ["modules.dep", "modules.builtin"].iter().any(|file| {
        let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
        text.lines().any(|line| line.split(':').next().is_some_and(|path| path.contains(&format!("/{name}.ko"))))
    })
}

/// Whether a controller is enabled, in either version of cgroups.
fn cgroup(controller: &str) -> bool {
    let v2 = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if v2.split_whitespace().any(|c| c == controller) {
        return true;
    }
    let v1 = std::fs::read_to_string("/proc/cgroups").unwrap_or_default();
    v1.lines().any(|line| {
        let mut fields = line.split_whitespace();
        fields.next() == Some(controller) && fields.last() == Some("1")
    })
}
