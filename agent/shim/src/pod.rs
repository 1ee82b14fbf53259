//! A pod's namespaces: made by short-lived children, kept alive by bind mounts of their `/proc` entries.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use coracle_shim::protocol::PodSpec;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pause, sethostname, setsid};

/// Makes and pins the namespaces that `spec` asks for.
pub fn make_namespaces(spec: &PodSpec) -> Result<(), String> {
    if spec.namespaces.is_empty() && spec.sysctls.is_empty() {
        return Ok(());
    }
    fs::create_dir_all(spec.dir.join("ns")).map_err(|error| format!("create the namespaces' folder: {error}"))?;
    in_child(|| {
        let mut flags = CloneFlags::empty();
        for name in &spec.namespaces {
            flags |= flag(name).ok_or_else(|| format!("unknown namespace {name:?}"))?;
        }
        unshare(flags).map_err(|errno| format!("unshare {}: {}", spec.namespaces.join(","), errno.desc()))?;
        if flags.contains(CloneFlags::CLONE_NEWUTS) && !spec.hostname.is_empty() {
            sethostname(&spec.hostname).map_err(|errno| format!("set hostname: {}", errno.desc()))?;
        }
        if flags.contains(CloneFlags::CLONE_NEWNET) {
            loopback_up().map_err(|error| format!("set loopback up: {error}"))?;
        }
        for (name, value) in &spec.sysctls {
            set_sysctl(name, value).map_err(|error| format!("set sysctl {name}={value}: {error}"))?;
        }
        for name in &spec.namespaces {
            pin(&format!("/proc/self/ns/{name}"), &spec.dir.join("ns").join(name))?;
        }
        Ok(())
    })
}

/// Starts the init of the pod's shared process-id namespace and pins the namespace. The init only reaps.
pub fn make_pid_namespace(spec: &PodSpec) -> Result<Pid, String> {
    let pin_path = spec.dir.join("ns/pid");
    fs::create_dir_all(spec.dir.join("ns")).map_err(|error| format!("create the namespaces' folder: {error}"))?;
    let id_file = spec.dir.join("ns/.pid");
    in_child(|| {
        join_cgroups(&spec.init_cgroup_procs)?;
        unshare(CloneFlags::CLONE_NEWPID).map_err(|errno| format!("unshare pid: {}", errno.desc()))?;
        // SAFETY: this process has one thread.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => be_init(),
            Ok(ForkResult::Parent { child }) => {
                pin(&format!("/proc/{child}/ns/pid"), &pin_path)?;
                fs::write(&id_file, child.to_string()).map_err(|error| format!("write pid: {error}"))
            }
            Err(errno) => Err(format!("fork: {}", errno.desc())),
        }
    })?;
    let id = fs::read_to_string(&id_file).map_err(|error| format!("read pid: {error}"))?;
    let _ = fs::remove_file(&id_file);
    id.parse().map(Pid::from_raw).map_err(|_| "no pid".to_owned())
}

/// Process 1 of a shared process-id namespace: adopts orphans and ends at SIGTERM.
fn be_init() -> ! {
    let _ = setsid();
    crate::name_process("pause", "/pause");
    extern "C" fn reap(_: i32) {
        while matches!(waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
    }
    extern "C" fn end(_: i32) {
        // SAFETY: _exit is async-signal-safe.
        unsafe { libc::_exit(0) }
    }
    // SAFETY: the handlers only call async-signal-safe functions.
    unsafe {
        let _ = signal(Signal::SIGCHLD, SigHandler::Handler(reap));
        let _ = signal(Signal::SIGTERM, SigHandler::Handler(end));
        let _ = signal(Signal::SIGINT, SigHandler::Handler(end));
        // Nothing of the shim's may stay open here; closing descriptors that Rust owns is fine, none is used again.
        libc::close_range(0, u32::MAX, 0);
    }
    let _ = SigSet::empty().thread_set_mask();
    loop {
        pause();
    }
}

/// Writes this process into each `cgroup.procs`.
pub fn join_cgroups(procs: &[std::path::PathBuf]) -> Result<(), String> {
    for path in procs {
        fs::write(path, "0").map_err(|error| format!("join cgroup {}: {error}", path.display()))?;
    }
    Ok(())
}

/// Sets `oom_score_adj` of this process. Without CAP_SYS_RESOURCE it cannot be lowered and stays as it is.
pub fn set_oom_score_adj(wanted: i32) {
    let _ = fs::write("/proc/self/oom_score_adj", wanted.to_string());
}

fn flag(name: &str) -> Option<CloneFlags> {
    Some(match name {
        "net" => CloneFlags::CLONE_NEWNET,
        "ipc" => CloneFlags::CLONE_NEWIPC,
        "uts" => CloneFlags::CLONE_NEWUTS,
        _ => return None,
    })
}

fn pin(source: &str, target: &Path) -> Result<(), String> {
    File::create(target).map_err(|error| format!("create {}: {error}", target.display()))?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| format!("bind {source} to {}: {}", target.display(), errno.desc()))
}

fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    // Either separator may be used; with slashes, dots belong to the name (an interface such as eth0.1).
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    if path.split('/').any(|part| part == "..") {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    fs::OpenOptions::new().write(true).open(Path::new("/proc/sys").join(path))?.write_all(value.as_bytes())
}

fn loopback_up() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").or_else(|_| std::net::UdpSocket::bind("0.0.0.0:0"))?;
    // SAFETY: a zeroed ifreq is valid; the name fits and is terminated.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (slot, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *slot = *byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs `work` in a forked child and hands its error back.
fn in_child(work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let (mut reader, mut writer) = io::pipe().map_err(|error| format!("pipe: {error}"))?;
    // SAFETY: the shim has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            drop(reader);
            let code = match work() {
                Ok(()) => 0,
                Err(message) => {
                    let _ = writer.write_all(message.as_bytes());
                    1
                }
            };
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(code) }
        }
        Ok(ForkResult::Parent { child }) => {
            drop(writer);
            let mut message = String::new();
            let _ = io::Read::read_to_string(&mut reader, &mut message);
            match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, 0)) => Ok(()),
                Ok(_) if !message.is_empty() => Err(message),
                Ok(status) => Err(format!("the child ended with {status:?}")),
                Err(errno) => Err(format!("wait: {}", errno.desc())),
            }
        }
        Err(errno) => Err(format!("fork: {}", errno.desc())),
    }
}
