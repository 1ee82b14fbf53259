//! `coracle-shim <pod folder>`: parent of one pod's processes.
//!
//! It makes the pod's namespaces, says `ready` (or why not) on its standard output, and goes on in the background in
//! its own session until it is told to shut down.

mod container;
mod exec;
mod log;
mod pod;
mod server;

use std::fs;
use std::io::Write;
use std::path::PathBuf;

use coracle_shim::protocol::{POD_FILE, PodSpec};
use nix::unistd::{ForkResult, fork, setsid};

fn main() {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("coracle-shim: started by coracle's agent with the folder of a pod");
        std::process::exit(2);
    };
    // SAFETY: the process has one thread.
    match unsafe { fork() } {
        // The agent waits for what the child says; orphaned at once, the child belongs to nobody but itself.
        Ok(ForkResult::Parent { .. }) => {}
        Ok(ForkResult::Child) => run(folder),
        Err(errno) => say(&format!("error fork: {}\n", errno.desc())),
    }
}

fn run(folder: PathBuf) {
    match start(folder) {
        Ok(server) => {
            say(&format!("ready {}\n", std::process::id()));
            release_streams();
            server.run();
        }
        Err(message) => say(&format!("error {message}\n")),
    }
}

fn start(folder: PathBuf) -> Result<server::Server, String> {
    setsid().map_err(|errno| format!("setsid: {}", errno.desc()))?;
    name_process("coracle-shim", "coracle-shim");
    // SAFETY: prctl with plain numbers.
    if unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) } < 0 {
        return Err(format!("become a subreaper: {}", std::io::Error::last_os_error()));
    }
    std::env::set_current_dir(&folder).map_err(|error| format!("enter {}: {error}", folder.display()))?;
    let text = fs::read(POD_FILE).map_err(|error| format!("read {POD_FILE}: {error}"))?;
    let spec: PodSpec = serde_json::from_slice(&text).map_err(|error| format!("read {POD_FILE}: {error}"))?;
    pod::join_cgroups(&spec.cgroup_procs)?;
    pod::set_oom_score_adj(-998);
    pod::make_namespaces(&spec)?;
    let init = if spec.shared_pid { Some(pod::make_pid_namespace(&spec)?) } else { None };
    server::Server::new(init).map_err(|error| format!("listen: {error}"))
}

fn say(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

/// The agent's pipes must not stay open here.
fn release_streams() {
    if let Ok(null) = fs::OpenOptions::new().read(true).write(true).open("/dev/null") {
        let null = null.into();
        let _ = exec::standard_streams([&null, &null, &null]);
    }
}

/// Sets what `ps` shows: the short name and the argument vector, which is overwritten in place.
pub fn name_process(short: &str, arguments: &str) {
    let mut name = [0u8; 16];
    for (slot, byte) in name.iter_mut().take(15).zip(short.bytes()) {
        *slot = byte;
    }
    // SAFETY: the name is terminated and outlives the call.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0) };
    let Ok(stat) = fs::read_to_string("/proc/self/stat") else { return };
    // Fields 48 and 49 of stat(5); counting starts behind the parenthesised name, which is field 2.
    let Some((_, rest)) = stat.rsplit_once(')') else { return };
    let mut fields = rest.split_whitespace().skip(45).map(|field| field.parse::<usize>().unwrap_or(0));
    let (Some(start), Some(end)) = (fields.next(), fields.next()) else { return };
    if start == 0 || end <= start + arguments.len() {
        return;
    }
    // SAFETY: the kernel says that the writable argument area of this process is here; std keeps no reference to it
    // beyond `args_os`, which copies and is not called again.
    unsafe {
        std::ptr::write_bytes(start as *mut u8, 0, end - start);
        std::ptr::copy_nonoverlapping(arguments.as_ptr(), start as *mut u8, arguments.len());
    }
}
