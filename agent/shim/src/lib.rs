//! What the agent and a pod's shim say to each other.
//!
//! One shim per pod: it makes the pod's namespaces, parents and reaps its processes, writes their logs, and outlives
//! the agent. The agent finds it again by its socket `<pod folder>/shim.sock`.
//!
//! # Layout
//! | module | what it holds |
//! | --- | --- |
//! | [`protocol`] | requests, replies and events: JSON lines over the socket, descriptors beside them |
//! | [`wire`] | sending and receiving such lines together with file descriptors (SCM_RIGHTS) |
//! | `main` | the shim program: `pod` (namespaces), `server` (the one loop), `container`, `exec`, `log` |
//! | `hello` | the program of the built-in image |

pub mod protocol;
pub mod wire;

/// Signals as a fresh program expects them: nothing blocked, nothing ignored. Ignored signals survive execve, so
/// whatever the agent was started with (Rust ignores SIGPIPE, a shell in the background more) would reach containers.
pub fn reset_signals() {
    let default = [0usize; 4];
    for signal in 1..=64 {
        // By the system call: the C library hides the two signals that it uses itself. SIGKILL and SIGSTOP fail.
        // SAFETY: a zeroed kernel sigaction is SIG_DFL without flags; it outlives the call.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0usize, 8usize) };
    }
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
}
