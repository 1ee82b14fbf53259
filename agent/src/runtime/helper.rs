//! The helper: this program executed once more to create one container with libcontainer, then gone.
//!
//! libcontainer clones without care for threads and changes the working directory of the whole process, so it never
//! runs inside the agent. The shim starts the helper and, as a subreaper, inherits the container's first process.

use std::ffi::{CString, OsStr};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use coracle_shim::protocol::{HELPER_NAME, HELPER_STATUS_FD, HELPER_STDERR_FD, HELPER_STDIN_FD, HELPER_STDOUT_FD};
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};

/// Runs the helper and exits if this process was started as one. Call it first thing in `main`, before any thread
/// exists.
pub fn helper_main_if_requested() {
    let mut arguments = std::env::args_os();
    if arguments.next().as_deref() != Some(OsStr::new(HELPER_NAME)) {
        return;
    }
    let arguments: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    let [_container, bundle, console] = arguments.as_slice() else { std::process::exit(2) };
    let code = match create(bundle, console) {
        Ok(()) => 0,
        Err(message) => {
            let _ = std::io::stderr().write_all(message.as_bytes());
            1
        }
    };
    std::process::exit(code);
}

fn create(bundle: &Path, console: &Path) -> Result<(), String> {
    // SAFETY: the shim opened them for this process alone; number 7 is free.
    let status = unsafe {
        libc::dup3(2, ERROR_FD, libc::O_CLOEXEC);
        libc::fcntl(HELPER_STATUS_FD, libc::F_SETFD, libc::FD_CLOEXEC)
    };
    if status < 0 {
        return Err("started without a shim".to_owned());
    }
    // The causes of an error stay in libcontainer's log; its processes write them where the shim reads.
    let _ = tracing::subscriber::set_global_default(ErrorLog);
    let terminal = !console.as_os_str().is_empty();
    let mut builder = ContainerBuilder::new("c".to_owned(), SyscallType::default())
        .with_executor(Program)
        .with_pid_file(Some(bundle.join("pid")))
        .and_then(|builder| builder.with_root_path(bundle.join("state")))
        .map_err(|error| explain(&error))?;
    if terminal {
        builder = builder.with_console_socket(Some(console));
    } else {
        let stream = |number| {
            // SAFETY: the shim opened it for this process; taken once.
            unsafe { OwnedFd::from_raw_fd(number) }
        };
        builder = builder
            .with_stdin(stream(HELPER_STDIN_FD))
            .with_stdout(stream(HELPER_STDOUT_FD))
            .with_stderr(stream(HELPER_STDERR_FD));
    }
    builder.as_init(bundle).with_systemd(false).with_detach(true).build().map(|_| ()).map_err(|error| explain(&error))
}

/// The error with its causes, each said once.
fn explain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let message = inner.to_string();
        if !text.contains(&message) {
            let _ = write!(text, ": {message}");
        }
        cause = inner.source();
    }
    text
}

/// Where [`ErrorLog`] writes: a copy of standard error, which the container's own replaces.
const ERROR_FD: i32 = 7;

/// Writes libcontainer's log entries of level error, one a line.
struct ErrorLog;

impl tracing::Subscriber for ErrorLog {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::ERROR
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        struct Line(String, String);
        impl tracing::field::Visit for Line {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                if field.name() == "message" {
                    let _ = write!(self.0, "{value:?}");
                } else {
                    let _ = write!(self.1, " {}={value:?}", field.name());
                }
            }
        }
        let mut line = Line(String::new(), String::new());
        event.record(&mut line);
        let text = format!("{}{}\n", line.0, line.1);
        // SAFETY: writes a buffer of the given length to a descriptor that this process opened for it.
        unsafe { libc::write(ERROR_FD, text.as_ptr().cast(), text.len()) };
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

/// Executes the container's program, the way runc words its errors.
#[derive(Clone)]
struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let message = execute(spec);
        // SAFETY: the status descriptor is open in this process until it executes.
        let mut status = unsafe { fs::File::from_raw_fd(HELPER_STATUS_FD) };
        let _ = status.write_all(message.as_bytes());
        Err(ExecutorError::Execution(message.into()))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let (args, env) = words(spec);
        let name = args.first().map_or("", String::as_str);
        match candidates(name, &env).iter().map(|path| usable(path)).find(|found| *found != Usable::Missing) {
            Some(Usable::Yes) => Ok(()),
            Some(_) => Err(ExecutorValidationError::ArgValidationError(format!("exec: {name:?}: permission denied"))),
            None => Err(ExecutorValidationError::ArgValidationError(missing(name))),
        }
    }

    fn setup_envs(&self, _: std::collections::HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // The environment is handed to execve in the order of the specification, see `execute`.
        Ok(())
    }
}

fn words(spec: &Spec) -> (Vec<String>, Vec<String>) {
    let process = spec.process().as_ref();
    let list = |list: Option<&Option<Vec<String>>>| list.cloned().flatten().unwrap_or_default();
    (list(process.map(|process| process.args())), list(process.map(|process| process.env())))
}

#[derive(PartialEq, Eq)]
enum Usable {
    Yes,
    No,
    Missing,
}

fn usable(path: &Path) -> Usable {
    match fs::metadata(path) {
        Ok(data) if data.is_dir() || data.permissions().mode() & 0o111 == 0 => Usable::No,
        Ok(_) => Usable::Yes,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Usable::No,
        Err(_) => Usable::Missing,
    }
}

fn candidates(name: &str, env: &[String]) -> Vec<PathBuf> {
    if name.contains('/') {
        return vec![PathBuf::from(name)];
    }
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or("");
    path.split(':').map(|folder| Path::new(if folder.is_empty() { "." } else { folder }).join(name)).collect()
}

fn missing(name: &str) -> String {
    if name.contains('/') {
        format!("exec: {name:?}: stat {name}: no such file or directory")
    } else {
        format!("exec: {name:?}: executable file not found in $PATH")
    }
}

/// Becomes the program; returns only with the reason why not.
fn execute(spec: &Spec) -> String {
    let (args, env) = words(spec);
    let convert = |list: &[String]| list.iter().map(|text| CString::new(text.as_str())).collect::<Result<Vec<_>, _>>();
    let (Ok(argv), Ok(envp)) = (convert(&args), convert(&env)) else {
        return "an argument or variable contains a NUL".to_owned();
    };
    let name = args.first().map_or("", String::as_str);
    coracle_shim::reset_signals();
    let mut failure = None;
    for path in candidates(name, &env) {
        let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { continue };
        match nix::unistd::execve(&path, &argv, &envp) {
            Err(nix::Error::ENOENT | nix::Error::ENOTDIR) => {}
            Err(errno) => failure = failure.or(Some(errno)),
            Ok(never) => match never {},
        }
    }
    match failure {
        Some(errno) => format!("exec: {name:?}: {}", errno.desc().to_lowercase()),
        None => missing(name),
    }
}
