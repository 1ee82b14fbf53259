//! Commands in a running container: join its cgroups and namespaces, become its user, execute.
//!
//! Two forks: the first child enters the namespaces, the second one is in the process-id namespace and, by
//! `CLONE_PARENT`, a child of the shim.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use coracle_shim::protocol::{CapabilitySets, Exec};
use coracle_shim::wire::send_with_fds;
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setgroups, setresgid, setresuid, setsid};

use crate::pod;

/// Starts a command in the container whose first process is `init`; its pid once it executes.
pub fn run(request: &Exec, init: Pid, fds: Vec<OwnedFd>) -> Result<Pid, String> {
    if request.args.is_empty() {
        return Err("no command".to_owned());
    }
    if fds.len() != if request.tty { 1 } else { 3 } {
        return Err("wrong number of descriptors".to_owned());
    }
    let namespaces = open_namespaces(init)?;
    let (mut status, child_status) = io::pipe().map_err(|error| format!("pipe: {error}"))?;
    let (mut pid_reader, pid_writer) = io::pipe().map_err(|error| format!("pipe: {error}"))?;
    // SAFETY: the shim has one thread.
    let first = match unsafe { fork() }.map_err(|errno| format!("fork: {}", errno.desc()))? {
        ForkResult::Child => {
            drop((status, pid_reader));
            let message = enter(request, namespaces, &fds, pid_writer);
            let _ = (&child_status).write_all(message.as_bytes());
            // SAFETY: ends the child without running the parent's destructors.
            unsafe { libc::_exit(i32::from(!message.is_empty())) }
        }
        ForkResult::Parent { child } => child,
    };
    drop((child_status, pid_writer, namespaces, fds));
    let mut pid = [0u8; 4];
    let forked = pid_reader.read_exact(&mut pid).is_ok();
    let mut message = String::new();
    let _ = status.read_to_string(&mut message);
    let _ = waitpid(first, None);
    if !message.is_empty() {
        if forked {
            let _ = waitpid(Pid::from_raw(i32::from_ne_bytes(pid)), None);
        }
        return Err(message);
    }
    if forked { Ok(Pid::from_raw(i32::from_ne_bytes(pid))) } else { Err("the command could not be forked".to_owned()) }
}

/// The container's namespaces that differ from ours, mount namespace last.
fn open_namespaces(init: Pid) -> Result<Vec<OwnedFd>, String> {
    let mut found = Vec::new();
    for name in ["user", "cgroup", "ipc", "uts", "net", "pid", "mnt"] {
        let (theirs, ours) = (format!("/proc/{init}/ns/{name}"), format!("/proc/self/ns/{name}"));
        let id = match fs::read_link(&theirs) {
            Ok(id) => id,
            Err(error) if error.kind() == io::ErrorKind::NotFound && name == "cgroup" => continue,
            Err(error) => return Err(format!("the container's first process is gone: {error}")),
        };
        if fs::read_link(ours).is_ok_and(|own| own == id) {
            continue;
        }
        found.push(File::open(theirs).map_err(|error| format!("open {name} namespace: {error}"))?.into());
    }
    Ok(found)
}

/// In the first child: joins everything and makes the second child. An empty answer is success.
fn enter(request: &Exec, namespaces: Vec<OwnedFd>, fds: &[OwnedFd], pid_writer: io::PipeWriter) -> String {
    if let Some(wanted) = request.oom_score_adj {
        pod::set_oom_score_adj(wanted);
    }
    // The filter and the cgroups lie on the node; both must be reached before the mount namespace is entered.
    let filter = match request.seccomp.as_ref().map(fs::read).transpose() {
        Ok(filter) => filter,
        Err(error) => return format!("read seccomp filter: {error}"),
    };
    if let Err(message) = pod::join_cgroups(&request.cgroup_procs) {
        return message;
    }
    for namespace in namespaces {
        if let Err(errno) = setns(&namespace, CloneFlags::empty()) {
            return format!("enter namespace: {}", errno.desc());
        }
    }
    // SAFETY: a fork that makes the child a sibling; this process has one thread and both sides have own memory.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_PARENT | libc::SIGCHLD, 0usize, 0usize, 0usize, 0usize) };
    match pid {
        0 => {
            drop(pid_writer);
            become_command(request, filter.as_deref(), fds)
        }
        pid if pid > 0 => {
            let _ = (&pid_writer).write_all(&(pid as i32).to_ne_bytes());
            String::new()
        }
        _ => format!("fork: {}", io::Error::last_os_error()),
    }
}

/// In the second child: returns only with an error.
fn become_command(request: &Exec, filter: Option<&[u8]>, fds: &[OwnedFd]) -> String {
    match prepare(request, filter, fds) {
        Ok(()) => execute(&request.args, &request.env),
        Err(message) => message,
    }
}

fn prepare(request: &Exec, filter: Option<&[u8]>, fds: &[OwnedFd]) -> Result<(), String> {
    let step = |what: &str, result: Result<(), nix::Error>| result.map_err(|errno| format!("{what}: {}", errno.desc()));
    step("setsid", setsid().map(drop))?;
    if request.tty {
        let (master, terminal) = open_terminal(request.uid).map_err(|error| format!("open a terminal: {error}"))?;
        send_with_fds(fds[0].as_raw_fd(), b"\n", &[master]).map_err(|error| format!("hand over terminal: {error}"))?;
        standard_streams([&terminal, &terminal, &terminal]).map_err(|error| format!("connect terminal: {error}"))?;
    } else {
        standard_streams([&fds[0], &fds[1], &fds[2]]).map_err(|error| format!("connect streams: {error}"))?;
    }
    for limit in &request.rlimits {
        let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: the value outlives the call.
        checked(unsafe { libc::setrlimit(limit.resource as _, &value) })
            .map_err(|error| format!("set rlimit {}: {error}", limit.resource))?;
    }
    if !request.no_new_privileges {
        // Loading a filter without no_new_privs needs CAP_SYS_ADMIN, so it comes before the capabilities go.
        load_filter(filter)?;
    }
    drop_bounding(request.capabilities.bounding)?;
    // SAFETY: prctl with plain numbers.
    checked(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) }).map_err(|error| format!("keepcaps: {error}"))?;
    let groups: Vec<Gid> = request.groups.iter().copied().map(Gid::from_raw).collect();
    step("setgroups", setgroups(&groups))?;
    let (uid, gid) = (Uid::from_raw(request.uid), Gid::from_raw(request.gid));
    step("setgid", setresgid(gid, gid, gid))?;
    step("setuid", setresuid(uid, uid, uid))?;
    // SAFETY: prctl with plain numbers.
    checked(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 0, 0, 0, 0) }).map_err(|error| format!("keepcaps: {error}"))?;
    set_capabilities(&request.capabilities)?;
    let cwd = if request.cwd.is_empty() { "/" } else { &request.cwd };
    std::env::set_current_dir(cwd).map_err(|error| format!("chdir to cwd ({cwd:?}) failed: {error}"))?;
    if request.no_new_privileges {
        // SAFETY: prctl with plain numbers.
        checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
            .map_err(|error| format!("no_new_privs: {error}"))?;
        load_filter(filter)?;
    }
    coracle_shim::reset_signals();
    Ok(())
}

/// A terminal of the container's own devpts.
fn open_terminal(uid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = File::options().read(true).write(true).open("/dev/ptmx")?;
    let unlock: libc::c_int = 0;
    // SAFETY: both requests take what is given here; TIOCGPTPEER answers a new descriptor.
    let terminal = unsafe {
        checked(libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlock))?;
        let fd = libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC);
        checked(fd)?;
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: plain numbers.
    unsafe {
        checked(libc::fchown(terminal.as_raw_fd(), uid, u32::MAX))?;
        checked(libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0))?;
    }
    Ok((master.into(), terminal))
}

/// Puts the three descriptors on 0, 1 and 2.
pub fn standard_streams(streams: [&OwnedFd; 3]) -> io::Result<()> {
    for (number, stream) in streams.into_iter().enumerate() {
        // SAFETY: dup2 onto the standard numbers, which no Rust value owns.
        checked(unsafe { libc::dup2(stream.as_raw_fd(), number as i32) })?;
    }
    Ok(())
}

fn drop_bounding(keep: u64) -> Result<(), String> {
    for capability in 0..64u32 {
        // SAFETY: prctl with plain numbers.
        let known = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        if known < 0 {
            break;
        }
        if known == 1 && keep & (1 << capability) == 0 {
            // SAFETY: as above.
            checked(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) })
                .map_err(|error| format!("drop capability {capability}: {error}"))?;
        }
    }
    Ok(())
}

/// What the host itself does not have cannot be given.
fn set_capabilities(sets: &CapabilitySets) -> Result<(), String> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let mut have = [Data::default(); 2];
    // SAFETY: capget(2) fills two Data for version 3.
    checked(unsafe { libc::syscall(libc::SYS_capget, &header, have.as_mut_ptr()) as i32 })
        .map_err(|error| format!("capget: {error}"))?;
    let permitted = sets.permitted & (u64::from(have[0].permitted) | u64::from(have[1].permitted) << 32);
    let half = |shift: u32| Data {
        effective: ((sets.effective & permitted) >> shift) as u32,
        permitted: (permitted >> shift) as u32,
        inheritable: ((sets.inheritable & permitted) >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: capset(2) reads two Data for version 3.
    checked(unsafe { libc::syscall(libc::SYS_capset, &header, data.as_ptr()) as i32 })
        .map_err(|error| format!("capset: {error}"))?;
    // SAFETY: prctl with plain numbers.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    for capability in (0..64u32).filter(|bit| sets.ambient & permitted & (1 << bit) != 0) {
        // SAFETY: as above.
        unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, capability, 0, 0) };
    }
    Ok(())
}

fn load_filter(filter: Option<&[u8]>) -> Result<(), String> {
    let Some(bytes) = filter else { return Ok(()) };
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    let program: Vec<libc::sock_filter> = bytes
        .chunks_exact(INSTRUCTION)
        .map(|c| libc::sock_filter {
            code: u16::from_ne_bytes([c[0], c[1]]),
            jt: c[2],
            jf: c[3],
            k: u32::from_ne_bytes([c[4], c[5], c[6], c[7]]),
        })
        .collect();
    if program.is_empty() || program.len() * INSTRUCTION != bytes.len() || program.len() > usize::from(u16::MAX) {
        return Err("the seccomp filter is damaged".to_owned());
    }
    let mut program = program;
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program outlives the call.
    checked(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0usize, &filter) as i32 })
        .map_err(|error| format!("load seccomp filter: {error}"))
}

/// Executes `args` with `env`, searching its PATH. Returns only with an error, worded as runc does.
fn execute(args: &[String], env: &[String]) -> String {
    let convert = |list: &[String]| list.iter().map(|text| CString::new(text.as_str())).collect::<Result<Vec<_>, _>>();
    let (Ok(argv), Ok(envp)) = (convert(args), convert(env)) else {
        return "an argument or variable contains a NUL".to_owned();
    };
    let name = &args[0];
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let candidates: Vec<CString> = if name.contains('/') {
        argv[..1].to_vec()
    } else {
        path.split(':')
            .map(|folder| if folder.is_empty() { "." } else { folder })
            .filter_map(|folder| CString::new(std::path::Path::new(folder).join(name).as_os_str().as_bytes()).ok())
            .collect()
    };
    let mut failure = None;
    for candidate in &candidates {
        match execve(candidate, &argv, &envp) {
            nix::Error::ENOENT | nix::Error::ENOTDIR => {}
            errno => failure = failure.or(Some(errno)),
        }
    }
    match failure {
        None if name.contains('/') => format!("exec: {name:?}: stat {name}: no such file or directory"),
        None => format!("exec: {name:?}: executable file not found in $PATH"),
        Some(errno) => format!("exec: {name:?}: {}", errno.desc().to_lowercase()),
    }
}

fn execve(path: &CStr, argv: &[CString], envp: &[CString]) -> nix::Error {
    match nix::unistd::execve(path, argv, envp) {
        Ok(never) => match never {},
        Err(errno) => errno,
    }
}

/// Where programs are looked for when the container's environment has no PATH.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn checked(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
